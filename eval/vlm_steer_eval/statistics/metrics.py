"""Metrics as formulas of summed counts, with intervals and paired differences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .resampling import (
    bootstrap_sums,
    cluster_totals,
    percentile_interval,
    swap_sums,
)

__all__ = ["Floats", "MetricSet", "compare", "harmonic_mean", "ratio", "summarise"]

Floats = NDArray[np.float64]
"""An array of counts or of values of a metric."""


@dataclass(frozen=True)
class MetricSet:
    """What a benchmark counts per item, and the metrics those counts define.

    Attributes:
        columns: names of the additive counts of one item.
        formulas: metric name -> function from a mapping of summed columns (arrays of any one shape)
            to the metric's values of that shape; NaN where it is undefined.
        integers: metrics that are counts, written without decimals.
        higher_is_better: metric -> direction; metrics without a direction (a yes ratio, a length)
            are absent.
    """

    columns: tuple[str, ...]
    formulas: dict[str, Callable[[dict[str, Floats]], Floats]]
    integers: frozenset[str] = frozenset()
    higher_is_better: dict[str, bool] | None = None

    def evaluate(self, sums: Floats) -> dict[str, Floats]:
        """Metrics of summed counts `[..., columns]`, each `[...]`."""
        named = {name: sums[..., index] for index, name in enumerate(self.columns)}
        return {name: formula(named) for name, formula in self.formulas.items()}


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Quotient, NaN where the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def harmonic_mean(first: Floats, second: Floats) -> Floats:
    """2ab / (a + b), NaN where either is NaN or their sum is zero."""
    return ratio(2 * first * second, first + second)


def summarise(
    metrics: MetricSet,
    counts: Sequence[Sequence[float]],
    clusters: Sequence[str],
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Each metric's value and 95 % interval, resampling clusters.

    Args:
        metrics: what to compute.
        counts: one row of `metrics.columns` per item.
        clusters: the image of each item.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        `{name: {"value": number or None, "ci95": [low, high] or None}}`; None where the metric is
        undefined.
    """
    if not len(counts):
        return {name: {"value": None, "ci95": None} for name in metrics.formulas}
    totals = cluster_totals(np.asarray(counts, dtype=np.float64), clusters)
    point = metrics.evaluate(totals.sum(0))
    resampled = metrics.evaluate(bootstrap_sums(totals, n_resamples=n_resamples, seed=seed))
    return {
        name: {
            "value": _plain(float(point[name]), name in metrics.integers),
            "ci95": _interval(point[name], resampled[name]),
        }
        for name in metrics.formulas
    }


def compare(
    metrics: MetricSet,
    baseline: Sequence[Sequence[float]],
    treated: Sequence[Sequence[float]],
    clusters: Sequence[str],
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Paired differences `treated - baseline` with 95 % intervals and permutation p values.

    Args:
        metrics: what to compute.
        baseline: one row of counts per item.
        treated: the same items in the same order under another arm.
        clusters: the image of each item.
        n_resamples: resamples of the bootstrap and of the permutation test, > 0.
        seed: seed of both.

    Returns:
        `{name: {"value", "ci95", "p"}}`; None where undefined. `p` is two-sided, from swapping the
        arms' labels within images.
    """
    if not len(baseline):
        return {name: {"value": None, "ci95": None, "p": None} for name in metrics.formulas}
    width = len(metrics.columns)
    both = np.concatenate(
        [np.asarray(baseline, dtype=np.float64), np.asarray(treated, dtype=np.float64)], axis=1
    )
    totals = cluster_totals(both, clusters)
    point = _difference(metrics, totals.sum(0), width)
    resampled = _difference(
        metrics, bootstrap_sums(totals, n_resamples=n_resamples, seed=seed), width
    )
    null_a, null_b = swap_sums(
        totals[:, :width], totals[:, width:], n_resamples=n_resamples, seed=seed
    )
    null = _difference(metrics, np.concatenate([null_a, null_b], axis=1), width)
    return {
        name: {
            "value": _plain(float(point[name]), name in metrics.integers),
            "ci95": _interval(point[name], resampled[name]),
            "p": _two_sided(float(point[name]), null[name]),
        }
        for name in metrics.formulas
    }


def _difference(metrics: MetricSet, sums: Floats, width: int) -> dict[str, Floats]:
    before = metrics.evaluate(sums[..., :width])
    after = metrics.evaluate(sums[..., width:])
    return {name: after[name] - before[name] for name in metrics.formulas}


def _two_sided(observed: float, null: Floats) -> float | None:
    null = null[~np.isnan(null)]
    if np.isnan(observed) or not len(null):
        return None
    # The slack keeps relabellings that only differ by rounding on the side of the null.
    extreme = int((np.abs(null) >= abs(observed) - 1e-12).sum())
    return (extreme + 1) / (len(null) + 1)


def _interval(point: Floats, resampled: Floats) -> list[float] | None:
    if np.isnan(point):
        return None
    interval = percentile_interval(resampled)
    return None if interval is None else [interval.low, interval.high]


def _plain(value: float, integer: bool) -> float | int | None:
    if np.isnan(value):
        return None
    return round(value) if integer else value
