"""Resampling whole images: intervals and null distributions of any metric of summed counts.

A benchmark item contributes a row of counts and a metric is a formula of the summed rows, so a
resample needs no loop over items: it is a row of cluster weights times the matrix of per-cluster
totals, and every arm of a comparison shares the same weights.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm_steer.errors import DataError

__all__ = ["Interval", "bootstrap_sums", "cluster_totals", "percentile_interval", "swap_sums"]

Floats = NDArray[np.float64]

_BLOCK_ELEMENTS = 4_000_000


class Interval(NamedTuple):
    """A closed interval."""

    low: float
    high: float


def cluster_totals(counts: ArrayLike, clusters: Sequence[str] | NDArray[np.int64]) -> Floats:
    """Sum the counts of each cluster.

    Args:
        counts: `[items, columns]`, one row of additive counts per item.
        clusters: the cluster (image) of each item.

    Returns:
        `[clusters, columns]`, clusters in sorted order.

    Raises:
        DataError: the two lengths differ.
    """
    rows = np.asarray(counts, dtype=np.float64)
    if len(rows) != len(clusters):
        raise DataError(
            f"{len(rows)} rows of counts came with {len(clusters)} cluster names; give one per row"
        )
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    totals = np.zeros((len(names), rows.shape[1]))
    np.add.at(totals, index, rows)
    return totals


def bootstrap_sums(totals: Floats, *, n_resamples: int = 10_000, seed: int = 0) -> Floats:
    """Column sums of resampled clusters, drawn with replacement.

    Args:
        totals: `[clusters, columns]` from `cluster_totals`.
        n_resamples: number of resamples, > 0.
        seed: seed of the resampling; equal seeds and cluster counts give equal weights, so that two
            arms stay paired.

    Returns:
        `[n_resamples, columns]`.
    """
    n_clusters = len(totals)
    generator = np.random.default_rng(seed)
    sums = np.empty((n_resamples, totals.shape[1]))
    for start, stop in _blocks(n_resamples, n_clusters):
        drawn = generator.integers(0, n_clusters, size=(stop - start, n_clusters), dtype=np.int64)
        drawn += np.arange(stop - start)[:, None] * n_clusters
        weights = np.bincount(drawn.ravel(), minlength=(stop - start) * n_clusters)
        sums[start:stop] = weights.reshape(stop - start, n_clusters) @ totals
    return sums


def swap_sums(
    totals_a: Floats, totals_b: Floats, *, n_resamples: int = 10_000, seed: int = 0
) -> tuple[Floats, Floats]:
    """Column sums of two arms after swapping their labels, cluster by cluster, with a fair coin.

    Under the hypothesis that the arms are exchangeable within an image these are draws from the
    null distribution of any metric.

    Args:
        totals_a: `[clusters, columns]` of the first arm.
        totals_b: `[clusters, columns]` of the second arm, clusters in the same order.
        n_resamples: number of relabellings, > 0.
        seed: seed of the coin.

    Returns:
        Two arrays `[n_resamples, columns]`.
    """
    generator = np.random.default_rng(seed)
    shift = totals_b - totals_a
    moved = np.empty((n_resamples, totals_a.shape[1]))
    for start, stop in _blocks(n_resamples, len(totals_a)):
        coin = generator.integers(0, 2, size=(stop - start, len(totals_a)), dtype=np.int8)
        moved[start:stop] = coin.astype(np.float64) @ shift
    return totals_a.sum(0) + moved, totals_b.sum(0) - moved


def percentile_interval(samples: ArrayLike, *, level: float = 0.95) -> Interval | None:
    """Percentile interval of one metric's resampled values; None where no resample defines it.

    Args:
        samples: `[resamples]`; NaN marks resamples in which the metric is undefined.
        level: coverage, in (0, 1).
    """
    values = np.asarray(samples, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _blocks(n_rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, n_rows, step):
        yield start, min(n_rows, start + step)
