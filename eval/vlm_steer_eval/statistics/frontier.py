"""The frontier of trivial baselines, which a method must lie beyond to count.

Anybody can trade recall for fewer hallucinations: cut captions short, or say yes less often. Such
baselines are points of recall and error, and their staircase says which error a given recall costs
without any method. A method counts if its error lies below the staircase at its own recall, by more
than resampling whole images explains.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .closed_form import holm
from .metrics import Floats, MetricSet
from .resampling import bootstrap_sums, cluster_totals, percentile_interval

__all__ = ["Axes", "frontier", "staircase"]

_GRID = 41


@dataclass(frozen=True)
class Axes:
    """What is traded for what.

    Attributes:
        recall: name of the metric to keep high.
        error: name of the metric to push down.
        falls: whether `error` is the complement of a metric, such as 1 - precision.
    """

    recall: str
    error: str
    falls: bool = False

    @property
    def error_name(self) -> str:
        """What to write at the axis."""
        return f"1 − {self.error}" if self.falls else self.error

    def evaluate(self, metrics: MetricSet, sums: Floats) -> tuple[Floats, Floats]:
        """Recall and error of summed counts `[..., columns]`."""
        values = metrics.evaluate(sums)
        error = values[self.error]
        return values[self.recall], 1 - error if self.falls else error


def staircase(recall: Floats, error: Floats, at: Floats) -> Floats:
    """The smallest error of any point whose recall is at least that asked for.

    Beyond the largest recall of all points, the error of that point stands in: a method there is
    asked for no more error than the baseline that comes closest.

    Args:
        recall: `[..., points]`.
        error: `[..., points]`, NaN for a point that does not count.
        at: `[..., queries]`.

    Returns:
        `[..., queries]`, NaN where no point counts.
    """
    usable = ~(np.isnan(error) | np.isnan(recall))
    reach = np.where(usable, recall, -np.inf).max(-1, keepdims=True)
    asked = np.minimum(at, reach)
    enough = usable[..., None, :] & (recall[..., None, :] >= asked[..., :, None])
    lowest = np.where(enough, error[..., None, :], np.inf).min(-1)
    return np.where(np.isinf(lowest) | np.isnan(at), np.nan, lowest)


def frontier(
    metrics: MetricSet,
    axes: Axes,
    trivial: Mapping[str, Sequence[Sequence[float]]],
    methods: Mapping[str, Sequence[Sequence[float]]],
    clusters: Sequence[str],
    *,
    tested: Collection[str] | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """The staircase with its band, and whether each method lies beyond it.

    Args:
        metrics: what to compute from the counts.
        axes: which two of them are traded.
        trivial: baseline -> one row of counts per unit.
        methods: method -> rows of the same units in the same order.
        clusters: the image of each unit.
        tested: the methods that something is claimed of, all by default; the others are controls,
            judged by their p as it is.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        `points`: baseline -> `recall` and `error`; `staircase`: its `recall`, `error` and the 95 %
        band `low`, `high` at a grid; `verdicts`: method -> `recall`, `error`, `gap` (the staircase
        minus the error, positive is better) with `ci95`, `p`, `p_holm` over the methods that are
        tested (None for the others), and `verdict`: `beyond`, `behind` or `not distinguishable`.
    """
    names = [*trivial, *methods]
    rows = np.concatenate(
        [np.asarray(r, dtype=np.float64) for r in (*trivial.values(), *methods.values())], axis=1
    )
    totals = cluster_totals(rows, clusters)
    shape = (len(names), len(metrics.columns))
    point = axes.evaluate(metrics, totals.sum(0).reshape(shape))
    sums = bootstrap_sums(totals, n_resamples=n_resamples, seed=seed)
    drawn = axes.evaluate(metrics, sums.reshape(-1, *shape))
    k = len(trivial)
    gaps = _gaps(point, k)
    drawn_gaps = _gaps(drawn, k)
    verdicts = {
        name: _verdict(
            float(point[0][k + i]), float(point[1][k + i]), float(gaps[i]), drawn_gaps[:, i]
        )
        for i, name in enumerate(methods)
    }
    known = {name: entry for name, entry in verdicts.items() if entry["p"] is not None}
    family = [entry for name, entry in known.items() if tested is None or name in tested]
    for entry, p in zip(family, holm([entry["p"] for entry in family]), strict=True):
        entry["p_holm"] = p
    for entry in known.values():
        p = entry["p"] if entry["p_holm"] is None else entry["p_holm"]
        if p < 0.05:
            entry["verdict"] = "beyond" if entry["gap"] > 0 else "behind"
    return {
        "recall": axes.recall,
        "error": axes.error_name,
        "points": {
            name: {"recall": _plain(point[0][i]), "error": _plain(point[1][i])}
            for i, name in enumerate(trivial)
        },
        "staircase": _band(point, drawn, k),
        "verdicts": verdicts,
    }


def _gaps(values: tuple[Floats, Floats], k: int) -> Floats:
    recall, error = values
    stairs = staircase(recall[..., :k], error[..., :k], recall[..., k:])
    return stairs - error[..., k:]


def _verdict(recall: float, error: float, gap: float, drawn: Floats) -> dict[str, Any]:
    drawn = drawn[~np.isnan(drawn)]
    interval = percentile_interval(drawn)
    entry: dict[str, Any] = {
        "recall": _plain(recall),
        "error": _plain(error),
        "gap": _plain(gap),
        "ci95": None,
        "p": None,
        "p_holm": None,
        "verdict": "not distinguishable",
    }
    if interval is None or np.isnan(gap):
        return entry
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (len(drawn) + 1))
    return entry | {"ci95": list(interval), "p": p}


def _band(
    point: tuple[Floats, Floats], drawn: tuple[Floats, Floats], k: int
) -> list[dict[str, float | None]]:
    known = point[0][:k][~np.isnan(point[0][:k])]
    if not len(known):
        return []
    grid = np.unique(np.concatenate([known, np.linspace(known.min(), known.max(), _GRID)]))
    values = staircase(point[0][:k], point[1][:k], grid)
    queries = np.broadcast_to(grid, (len(drawn[0]), len(grid)))
    resampled = staircase(drawn[0][:, :k], drawn[1][:, :k], queries)
    steps = []
    for i, recall in enumerate(grid):
        interval = percentile_interval(resampled[:, i])
        steps.append(
            {
                "recall": float(recall),
                "error": _plain(values[i]),
                "low": None if interval is None else interval.low,
                "high": None if interval is None else interval.high,
            }
        )
    return steps


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
