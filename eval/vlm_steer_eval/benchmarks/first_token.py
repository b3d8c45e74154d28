"""Yes/no tasks judged by the first token alone: no parser, no threshold, no habit of saying yes.

The margin m = log p(yes) - log p(no) ranks the questions, and p = 1 / (1 + exp(-m)) is the model's
own probability of yes among the two.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_steer.errors import DataError
from vlm_steer_eval.statistics.metrics import Floats, ratio
from vlm_steer_eval.statistics.resampling import percentile_interval

__all__ = [
    "average_precision",
    "bias_for_yes_ratio",
    "calibration",
    "first_token_scores",
    "ranked_auroc",
]

_BINS = 10
_BLOCK = 100

Bools = NDArray[np.bool_]


def first_token_scores(
    margins: Sequence[float | None],
    positives: Sequence[bool],
    clusters: Sequence[str],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Ranking and calibration of first-token margins, with intervals clustered by image.

    Args:
        margins: log p(yes) - log p(no) per question; None where it was not measured.
        positives: whether the true answer is yes.
        clusters: the image of each question.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        `n`; `auroc`, `average_precision`, `brier` and `ece` (expected calibration error over ten
        equal bins of p), each `{"value", "ci95"}`; and `calibration`, the bins that hold anything.
        None without any margin.
    """
    known = [i for i, margin in enumerate(margins) if margin is not None]
    if not known:
        return None
    values = np.array([margins[i] for i in known], dtype=np.float64)
    truth = np.array([positives[i] for i in known])
    _, image = np.unique(np.array([clusters[i] for i in known]), return_inverse=True)
    probability = 1 / (1 + np.exp(-np.clip(values, -700, 700)))
    measures: dict[str, Callable[[Floats], Floats]] = {
        "auroc": lambda w: ranked_auroc(values, truth, w),
        "average_precision": lambda w: average_precision(values, truth, w),
        "brier": lambda w: w @ ((probability - truth) ** 2) / w.sum(-1),
        "ece": lambda w: _error(calibration(probability, truth, w)),
    }
    whole = np.ones((1, len(values)))
    drawn: dict[str, list[Floats]] = {name: [] for name in measures}
    generator = np.random.default_rng(seed)
    n_images = int(image.max()) + 1
    shares = np.full(n_images, 1 / n_images)
    for start in range(0, n_resamples, _BLOCK):
        size = min(_BLOCK, n_resamples - start)
        weights = generator.multinomial(n_images, shares, size=size)[:, image].astype(np.float64)
        for name, measure in measures.items():
            drawn[name].append(measure(weights))
    result: dict[str, Any] = {"n": len(values)}
    for name, measure in measures.items():
        value = float(measure(whole)[0])
        interval = percentile_interval(np.concatenate(drawn[name]))
        undefined = np.isnan(value)
        result[name] = {
            "value": None if undefined else value,
            "ci95": None if undefined or interval is None else list(interval),
        }
    result["calibration"] = _bins(calibration(probability, truth, whole)[0])
    return result


def bias_for_yes_ratio(margins: Sequence[float | None], share: float) -> float:
    """The constant that, added to every margin, says yes to a share of the questions.

    Of all biases that give the same answers it is the middle one, so that rounding changes none.
    Questions with equal margins cannot be told apart; then the nearest share is taken.

    Args:
        margins: log p(yes) - log p(no) per question of an unsteered run (`margin` of its records);
            None where it was not measured.
        share: of the questions to answer with yes, in [0, 1].

    Returns:
        What `bias` of the method `yes_bias` has to be.

    Raises:
        DataError: nothing was measured, or the share lies outside [0, 1].
    """
    known = [margin for margin in margins if margin is not None]
    if not known or not 0 <= share <= 1:
        raise DataError(
            f"cannot match a yes ratio of {share} with {len(known)} first-token margins. Give a "
            "share in [0, 1] and a run of yes/no questions with margins."
        )
    values, counts = np.unique(np.array(known, dtype=np.float64), return_counts=True)
    # With a threshold below values[i], everything from values[i] up is yes; above all, nothing.
    said_yes = np.append(counts[::-1].cumsum()[::-1], 0)
    between = (values[1:] + values[:-1]) / 2
    thresholds = np.concatenate([[values[0] - 1], between, [values[-1] + 1]])
    nearest = int(np.abs(said_yes - share * len(known)).argmin())
    return -float(thresholds[nearest])


def ranked_auroc(values: Floats, positives: Bools, weights: Floats) -> Floats:
    """Probability that a positive's value exceeds a negative's, ties counting half.

    Args:
        values: `[items]`.
        positives: `[items]`.
        weights: `[resamples, items]`, how often each item counts.

    Returns:
        `[resamples]`, NaN where one side is missing.
    """
    yes, no = _by_value(values, positives, weights)
    below = no.cumsum(-1) - no
    return ratio((yes * (below + no / 2)).sum(-1), yes.sum(-1) * no.sum(-1))


def average_precision(values: Floats, positives: Bools, weights: Floats) -> Floats:
    """Area under the precision-recall steps, from the largest value down; arguments as above."""
    yes, no = (side[:, ::-1] for side in _by_value(values, positives, weights))
    found = yes.cumsum(-1)
    said = found + no.cumsum(-1)
    with np.errstate(invalid="ignore"):
        precision = np.where(said > 0, found / said, 0.0)
    return ratio((yes * precision).sum(-1), yes.sum(-1))


def calibration(probability: Floats, positives: Bools, weights: Floats) -> Floats:
    """Weight, summed probability and summed truth per bin of probability.

    Args:
        probability: `[items]`, in [0, 1].
        positives: `[items]`.
        weights: `[resamples, items]`.

    Returns:
        `[resamples, bins, 3]`.
    """
    index = np.minimum((probability * _BINS).astype(int), _BINS - 1)
    is_in = np.eye(_BINS)[index]
    facts = np.stack([np.ones_like(probability), probability, positives.astype(float)], axis=1)
    columns = (is_in[:, :, None] * facts[:, None, :]).reshape(len(probability), -1)
    bins: Floats = (weights @ columns).reshape(len(weights), _BINS, 3)
    return bins


def _error(bins: Floats) -> Floats:
    """Mean distance between what was predicted and what was true, bins weighted by their items."""
    return ratio(np.abs(bins[..., 1] - bins[..., 2]).sum(-1), bins[..., 0].sum(-1))


def _by_value(values: Floats, positives: Bools, weights: Floats) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives at each distinct value, `[resamples, values]`."""
    order = np.argsort(values, kind="stable")
    _, starts = np.unique(values[order], return_index=True)
    ordered, is_yes = weights[:, order], positives[order]
    return (
        np.add.reduceat(ordered * is_yes, starts, axis=1),
        np.add.reduceat(ordered * ~is_yes, starts, axis=1),
    )


def _bins(bins: Floats) -> list[dict[str, float]]:
    return [
        {
            "low": index / _BINS,
            "high": (index + 1) / _BINS,
            "n": int(count),
            "predicted": float(predicted / count),
            "observed": float(observed / count),
        }
        for index, (count, predicted, observed) in enumerate(bins)
        if count
    ]
