"""A count model: rates of rare events with covariates and errors that allow for clusters."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .metrics import Floats
from .resampling import Interval, cluster_totals

__all__ = ["RateRatio", "poisson_fit", "rate_ratio"]


class RateRatio(NamedTuple):
    """How many times as frequent events are in the second arm, all else equal."""

    value: float
    interval: Interval
    p: float


def poisson_fit(
    events: ArrayLike, exposure: ArrayLike, covariates: ArrayLike, *, iterations: int = 100
) -> Floats | None:
    """Coefficients of log(events / exposure) = covariates @ beta, by maximum likelihood.

    Args:
        events: `[rows]`, counts.
        exposure: `[rows]`, > 0.
        covariates: `[rows, terms]`, of full rank, the first column constant.
        iterations: Newton steps at most.

    Returns:
        `[terms]`, or None where the likelihood has no maximum (no events at all, or a term that
        separates them).
    """
    y, size = np.asarray(events, dtype=np.float64), np.asarray(exposure, dtype=np.float64)
    x = np.asarray(covariates, dtype=np.float64)
    if y.sum() == 0:
        return None
    beta = np.zeros(x.shape[1])
    beta[0] = math.log(y.sum() / size.sum())
    for _ in range(iterations):
        expected = size * np.exp(np.clip(x @ beta, -30, 30))
        information = x.T @ (expected[:, None] * x)
        if np.linalg.cond(information) > 1e12:
            return None
        step = np.linalg.solve(information, x.T @ (y - expected))
        beta = beta + step * min(1.0, 2.0 / max(2.0, float(np.abs(step).max())))
        if np.abs(beta).max() > 25:
            return None
        if np.abs(step).max() < 1e-10:
            return beta
    return None


def rate_ratio(
    events: ArrayLike,
    exposure: ArrayLike,
    lengths: ArrayLike,
    treated: ArrayLike,
    clusters: Sequence[str],
) -> RateRatio | None:
    """The ratio of two arms' event rates at equal length.

    The rate is log-linear in the arm and in the logarithm of the length; standard errors are
    robust to overdispersion and to the correlation within clusters.

    Args:
        events: `[rows]`, hallucinated mentions; the rows of both arms.
        exposure: `[rows]`, mentions; rows without any are left out.
        lengths: `[rows]`, words, >= 1.
        treated: `[rows]`, whether the row is of the second arm.
        clusters: the image of each row.

    Returns:
        None where the model cannot be fitted, such as for an arm without a single event.
    """
    size = np.asarray(exposure, dtype=np.float64)
    kept = size > 0
    y, size = np.asarray(events, dtype=np.float64)[kept], size[kept]
    if not len(y):
        return None
    logs = np.log(np.maximum(1.0, np.asarray(lengths, dtype=np.float64)[kept]))
    arm = np.asarray(treated, dtype=np.float64)[kept]
    terms = [np.ones(len(y)), arm]
    if np.ptp(logs) > 0:
        terms.append(logs - logs.mean())
    x = np.stack(terms, axis=1)
    beta = poisson_fit(y, size, x)
    if beta is None:
        return None
    expected = size * np.exp(x @ beta)
    bread = np.linalg.inv(x.T @ (expected[:, None] * x))
    names = [name for name, keep in zip(clusters, kept, strict=True) if keep]
    scores = cluster_totals(x * (y - expected)[:, None], names)
    covariance = bread @ (scores.T @ scores) @ bread * len(scores) / max(1, len(scores) - 1)
    error = math.sqrt(max(0.0, float(covariance[1, 1])))
    effect = float(beta[1])
    p = math.erfc(abs(effect) / error / math.sqrt(2)) if error else float(effect == 0)
    low, high = effect - 1.959964 * error, effect + 1.959964 * error
    return RateRatio(math.exp(effect), Interval(math.exp(low), math.exp(high)), p)
