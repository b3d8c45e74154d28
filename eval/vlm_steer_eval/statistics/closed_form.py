"""Closed-form tests and intervals: paired proportions, clustered means, many comparisons."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .resampling import Interval, cluster_totals, swap_sums

__all__ = [
    "McNemar",
    "PairedTest",
    "benjamini_hochberg",
    "clopper_pearson",
    "clustered_standard_error",
    "design_effect",
    "holm",
    "items_needed",
    "mcnemar",
    "minimum_detectable_difference",
    "paired_permutation",
    "paired_t_test",
    "student_t_two_sided",
    "wilson",
]

Floats = NDArray[np.float64]


class McNemar(NamedTuple):
    """Two-sided p values of McNemar's test on paired yes/no outcomes."""

    exact_p: float
    corrected_p: float | None


class PairedTest(NamedTuple):
    """Student's paired t test of `b - a`."""

    difference: float
    standard_error: float
    interval: Interval
    t: float
    p: float
    n: int


def mcnemar(only_first: int, only_second: int) -> McNemar:
    """McNemar's test from the two discordant counts.

    Args:
        only_first: pairs that only the first arm got right, >= 0.
        only_second: pairs that only the second arm got right, >= 0.

    Returns:
        The exact binomial p (1 without discordant pairs) and the chi-square p with continuity
        correction (None without discordant pairs).
    """
    n = only_first + only_second
    if n == 0:
        return McNemar(1.0, None)
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    exact = min(1.0, 2 * tail / 2**n)
    statistic = max(0, abs(only_first - only_second) - 1) ** 2 / n
    return McNemar(exact, math.erfc(math.sqrt(statistic / 2)))


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, in [0, 1]; `n` > 0."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = share + z**2 / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # Rounding leaves a hair below 0 or above 1.
    return Interval(max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def clopper_pearson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Clopper and Pearson's exact interval of a proportion, in [0, 1]; `n` > 0."""
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _beta_quantile(tail, successes, n - successes + 1)
    high = 1.0 if successes == n else _beta_quantile(1 - tail, successes + 1, n - successes)
    return Interval(low, high)


def clustered_standard_error(
    values: ArrayLike,
    clusters: Sequence[str] | NDArray[np.int64],
    *,
    correction: Literal["bessel", "clusters"] = "clusters",
) -> float:
    """Standard error of a mean whose items are correlated within clusters.

    Args:
        values: `[items]`.
        clusters: the cluster of each item.
        correction: `clusters` scales the cluster-robust variance by C / (C - 1) for C clusters, as
            inspect_ai does; `bessel` adds the within-cluster cross terms to the unbiased item
            variance, as lmms-eval does.
    """
    data = np.asarray(values, dtype=np.float64)
    n = len(data)
    residuals = data - data.mean()
    sums = cluster_totals(residuals[:, None], clusters)[:, 0]
    if correction == "clusters":
        n_clusters = len(sums)
        return math.sqrt((sums**2).sum() * n_clusters / (n_clusters - 1)) / n
    cross_terms = (sums**2).sum() - (residuals**2).sum()
    return math.sqrt(max(0.0, data.var(ddof=1) / n + cross_terms / n**2))


def paired_t_test(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> PairedTest:
    """Student's paired t test of `b - a`; two pairs or more, equal differences allowed."""
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    n = len(differences)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        t = 0.0 if mean == 0 else math.copysign(math.inf, mean)
        return PairedTest(mean, error, Interval(mean, mean), t, float(mean == 0), n)
    t = mean / error
    half = _student_t_quantile((1 + level) / 2, n - 1) * error
    return PairedTest(
        mean, error, Interval(mean - half, mean + half), t, student_t_two_sided(t, n - 1), n
    )


def paired_permutation(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[str] | NDArray[np.int64] | None = None,
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p of the mean of `b - a`, from swapping the pairs of whole clusters.

    Args:
        a: `[items]`.
        b: the same items under the other arm.
        clusters: the cluster of each item; None for one each.
        n_resamples: random relabellings, > 0. With few clusters, where there are no more
            relabellings than that, every one is counted and the p is exact.
        seed: seed of the relabellings.
    """
    shift = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    names = np.arange(len(shift)) if clusters is None else clusters
    shifts = cluster_totals(shift[:, None], names)[:, 0]
    observed = abs(shifts.sum())
    # The slack keeps relabellings that only differ by rounding on the side of the null.
    limit = observed - 1e-9 * max(1.0, float(np.abs(shifts).sum()))
    if len(shifts) < 60 and 2 ** len(shifts) <= n_resamples:
        bits = np.arange(2 ** len(shifts))[:, None] >> np.arange(len(shifts)) & 1
        return float((np.abs((1 - 2 * bits) @ shifts) >= limit).mean())
    zero = np.zeros((len(shifts), 1))
    moved, _ = swap_sums(zero, shifts[:, None], n_resamples=n_resamples, seed=seed)
    # Swapping turns a cluster's shift around, so the relabelled sum is the rest minus the moved.
    relabelled = shifts.sum() - 2 * moved[:, 0]
    return float(((np.abs(relabelled) >= limit).sum() + 1) / (n_resamples + 1))


def design_effect(cluster_size: float, correlation: float) -> float:
    """How many clustered items are worth one independent item: 1 + (m - 1) * rho.

    Args:
        cluster_size: items per cluster (questions per image), >= 1.
        correlation: of two items of a cluster, in [0, 1].
    """
    return 1 + (cluster_size - 1) * correlation


def minimum_detectable_difference(
    n: int,
    discordant: float,
    *,
    cluster_size: float = 1,
    correlation: float = 0,
    level: float = 0.95,
    power: float = 0.8,
) -> float | None:
    """The smallest difference of two paired proportions that a run of `n` items would show.

    With psi the share of discordant pairs, McNemar's test has the wanted power at difference d when
    sqrt(n) d = z_level sqrt(psi) + z_power sqrt(psi - d^2) (Connor, Biometrics 1987).

    Args:
        n: items, > 0.
        discordant: expected share of items that exactly one of the two arms gets right, in [0, 1];
            5 % is usual between decoding methods on POPE.
        cluster_size: items per image, >= 1.
        correlation: of the differences of two items of an image, in [0, 1].
        level: two-sided confidence, in (0, 1).
        power: probability of finding the difference, in (0, 1).

    Returns:
        The difference, or None where even a difference of `discordant`, the largest possible, would
        not be found that often.
    """
    worth = math.sqrt(n / design_effect(cluster_size, correlation))
    low, high = 0.0, discordant

    def shown(d: float) -> bool:
        return worth * d >= _required(d, discordant, level, power)

    if high == 0 or not shown(high):
        return None
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def items_needed(
    difference: float,
    discordant: float,
    *,
    cluster_size: float = 1,
    correlation: float = 0,
    level: float = 0.95,
    power: float = 0.8,
) -> int:
    """Items that show a difference of two paired proportions; see `minimum_detectable_difference`.

    Raises:
        ValueError: the difference is not between 0 and `discordant`, which bounds it.
    """
    if not 0 < difference <= discordant <= 1:
        raise ValueError(
            f"a difference of {difference} needs a discordant share between it and 1, found "
            f"{discordant}"
        )
    independent = (_required(difference, discordant, level, power) / difference) ** 2
    return math.ceil(independent * design_effect(cluster_size, correlation))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the given order."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    stepped = np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * factors)
    return _in_order(np.minimum(1.0, stepped), order)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p values (false discovery rate), in the given order."""
    order = np.argsort(p_values, kind="stable")
    n = len(order)
    scaled = np.asarray(p_values, dtype=np.float64)[order] * n / np.arange(1, n + 1)
    stepped = np.minimum.accumulate(scaled[::-1])[::-1]
    return _in_order(np.minimum(1.0, stepped), order)


def student_t_two_sided(t: float, degrees: int) -> float:
    """Two-sided p value of Student's t with `degrees` > 0 degrees of freedom."""
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def _required(difference: float, discordant: float, level: float, power: float) -> float:
    normal = NormalDist()
    spread = math.sqrt(max(0.0, discordant - difference**2))
    return normal.inv_cdf((1 + level) / 2) * math.sqrt(discordant) + normal.inv_cdf(power) * spread


def _in_order(values: Floats, order: NDArray[np.int64]) -> list[float]:
    restored = np.empty(len(values))
    restored[order] = values
    return [float(value) for value in restored]


def _student_t_quantile(share: float, degrees: int) -> float:
    x = _beta_quantile(2 * (1 - share), degrees / 2, 0.5)
    return math.sqrt(degrees * (1 - x) / x)


def _beta_quantile(share: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    while high - low > 1e-15 * max(high, 1e-3):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _incomplete_beta(a, b, middle) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by Lentz's continued fraction."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return math.exp(log_front) * fraction / a
