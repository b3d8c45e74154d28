"""How good a risk is, and how much of that the word's place in the text tells as well."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlm_steer.detection import fit_logistic
from vlm_steer.detection.fitting import MIN_PER_CLASS, group_folds
from vlm_steer.detection.place import strata
from vlm_steer.errors import DataError
from vlm_steer_eval.benchmarks.first_token import Bools, average_precision, ranked_auroc
from vlm_steer_eval.statistics.metrics import Floats, ratio
from vlm_steer_eval.statistics.resampling import percentile_interval

__all__ = ["Labels", "best_threshold", "calibration_error", "evaluate_risk"]

_NEAR = 10
_BINS = 15
_BLOCK = 100
_FOLDS = 5


@dataclass(frozen=True)
class Labels:
    """Labelled units of many texts.

    Attributes:
        is_hallucinated: `[n]`.
        image: `[n]` image of each unit, the cluster of resampling.
        text: `[n]` text of each unit.
        word: `[n]` words before it.
        occurrence: `[n]` earlier units of the text with the same name.
    """

    is_hallucinated: Bools
    image: Sequence[str]
    text: Sequence[str]
    word: Floats
    occurrence: Floats

    def __post_init__(self) -> None:
        n_images = len(set(self.image))
        positives = int(self.is_hallucinated.sum())
        if not 0 < positives < len(self.is_hallucinated) or n_images < 2:
            raise DataError(
                f"{positives} hallucinated of {len(self.is_hallucinated)} labelled units on "
                f"{n_images} images: a detector can be judged only where both kinds occur, on two "
                "images or more. Use more images."
            )


def evaluate_risk(
    risk: Floats,
    labels: Labels,
    *,
    probability: Floats | None = None,
    threshold: float | None = None,
    is_control: bool = False,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Ranking, controls and calibration of one risk, with intervals clustered by image.

    Args:
        risk: `[n]`, of units that the detector was not fitted on.
        labels: the units.
        probability: `[n]`, what the risk was calibrated to; None where it was not.
        threshold: probability, or risk where there is none, above which a unit counts as
            hallucinated; chosen elsewhere.
        is_control: whether the risk is itself the place in the text.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of resamples and folds.

    Returns:
        Metric -> `{"value", "ci95"}`; `works` is True only where the gain over place and
        occurrence excludes 0, None for controls and where it cannot be measured.

    Raises:
        DataError: a risk is not finite.
    """
    if not np.isfinite(risk).all():
        raise DataError(f"{int((~np.isfinite(risk)).sum())} of {len(risk)} risks are not finite")
    truth = labels.is_hallucinated
    measures: dict[str, Callable[[Floats], Floats]] = {
        "auroc": lambda w: ranked_auroc(risk, truth, w),
        "average_precision": lambda w: average_precision(risk, truth, w),
        "average_precision_grounded": lambda w: average_precision(-risk, ~truth, w),
        "auroc_at_equal_position": _stratified(risk, labels),
        "auroc_within_text": _within_texts(risk, labels),
        "tpr_at_5_fpr": lambda w: _tpr_at(risk, truth, w, 0.05),
        "base_rate": lambda w: ratio(w @ truth.astype(float), w.sum(-1)),
    }
    if threshold is not None:
        measures["balanced_accuracy"] = _balanced_accuracy(
            (risk if probability is None else probability) > threshold, truth
        )
    if probability is not None:
        error = (probability - truth) ** 2
        measures["brier"] = lambda w: ratio(w @ error, w.sum(-1))
    if not is_control and (pair := _with_and_without(risk, labels, seed)) is not None:
        base, full = pair
        measures["gain_auroc"] = lambda w: (
            ranked_auroc(full, truth, w) - ranked_auroc(base, truth, w)
        )
        loss = [np.logaddexp(0, np.where(truth, -logits, logits)) for logits in pair]
        measures["gain_log_loss"] = lambda w: ratio(w @ (loss[0] - loss[1]), w.sum(-1))
    result = _with_intervals(measures, labels, n_resamples, seed)
    result["n"], result["n_images"] = len(risk), len(set(labels.image))
    result["aurc"] = _area_under_risk_coverage(risk, truth)
    if probability is not None:
        result["ece"], result["reliability"] = calibration_error(probability, truth)
    gain = result.get("gain_auroc")
    result["works"] = None if gain is None or gain["ci95"] is None else gain["ci95"][0] > 0
    return result


def best_threshold(risk: Floats, truth: Bools) -> float:
    """The risk above which balanced accuracy is largest, midway between two units' risks."""
    values = np.unique(risk)
    cuts = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2])
    found = np.array([((risk > cut) == truth)[truth].mean() for cut in cuts])
    missed = np.array([((risk > cut) == truth)[~truth].mean() for cut in cuts])
    return float(cuts[int(np.argmax(found + missed))])


def calibration_error(
    probability: Floats, truth: Bools, n_bins: int = _BINS
) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error over bins of equally many units, and the bins."""
    order = np.argsort(probability, kind="stable")
    bins = [
        {
            "n": len(part),
            "predicted": float(probability[part].mean()),
            "observed": float(truth[part].mean()),
        }
        for part in np.array_split(order, min(n_bins, len(order)))
        if len(part)
    ]
    error = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in bins) / len(order)
    return float(error), bins


def _with_intervals(
    measures: dict[str, Callable[[Floats], Floats]], labels: Labels, n_resamples: int, seed: int
) -> dict[str, Any]:
    _, image = np.unique(np.asarray(labels.image), return_inverse=True)
    n_images = int(image.max()) + 1
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[Floats]] = {name: [] for name in measures}
    for start in range(0, n_resamples, _BLOCK):
        size = min(_BLOCK, n_resamples - start)
        times = generator.multinomial(n_images, np.full(n_images, 1 / n_images), size=size)
        weights = times[:, image].astype(np.float64)
        for name, measure in measures.items():
            drawn[name].append(measure(weights))
    result: dict[str, Any] = {}
    for name, measure in measures.items():
        value = float(measure(np.ones((1, len(image))))[0])
        interval = percentile_interval(np.concatenate(drawn[name]))
        undefined = np.isnan(value)
        result[name] = {
            "value": None if undefined else value,
            "ci95": None if undefined or interval is None else list(interval),
        }
    return result


def _stratified(risk: Floats, labels: Labels) -> Callable[[Floats], Floats]:
    """AUROC among units in the same tenth of positions, pooled over their pairs."""
    stratum = strata(torch.from_numpy(labels.word)).numpy()
    members = [np.flatnonzero(stratum == s) for s in np.unique(stratum)]

    def measure(weights: Floats) -> Floats:
        right = pairs = np.zeros(len(weights))
        for part in members:
            truth, w = labels.is_hallucinated[part], weights[:, part]
            n = w[:, truth].sum(-1) * w[:, ~truth].sum(-1)
            right = right + np.nan_to_num(ranked_auroc(risk[part], truth, w)) * n
            pairs = pairs + n
        return ratio(right, pairs)

    return measure


def _within_texts(risk: Floats, labels: Labels) -> Callable[[Floats], Floats]:
    """Share of pairs of one text, at most ten words apart, that are in the right order."""
    members: dict[str, list[int]] = {}
    for index, text in enumerate(labels.text):
        members.setdefault(text, []).append(index)
    first, pairs, right = [], [], []
    for indices in members.values():
        part = np.array(indices)
        truth = labels.is_hallucinated[part]
        yes, no = part[truth], part[~truth]
        near = np.abs(labels.word[yes][:, None] - labels.word[no]) <= _NEAR
        over = np.sign(risk[yes][:, None] - risk[no])
        first.append(indices[0])
        pairs.append(near.sum())
        right.append(((over + 1) / 2 * near).sum())
    table = np.array([right, pairs], dtype=np.float64)

    def measure(weights: Floats) -> Floats:
        counted, total = table @ weights[:, first].T
        return ratio(counted, total)

    return measure


def _with_and_without(risk: Floats, labels: Labels, seed: int) -> tuple[Floats, Floats] | None:
    """Left-out log-odds of place and occurrence alone, and with the risk beside them."""
    truth = torch.from_numpy(labels.is_hallucinated.astype(np.int64))
    place = torch.from_numpy(
        np.stack([labels.word, np.log1p(labels.word), labels.occurrence], axis=1)
    )
    whole = torch.cat([place, torch.from_numpy(np.asarray(risk))[:, None]], dim=1)
    folds = group_folds(labels.image, _FOLDS, seed)
    left_out = [np.zeros(len(risk)), np.zeros(len(risk))]
    for fold in range(_FOLDS):
        kept, left = folds != fold, folds == fold
        if min(int((truth[kept] == c).sum()) for c in (0, 1)) < MIN_PER_CLASS:
            return None
        for logits, features in zip(left_out, (place, whole), strict=True):
            fitted = fit_logistic(features[kept], truth[kept], is_balanced=False)
            logits[left.numpy()] = fitted.logits(features[left]).numpy()
    return left_out[0], left_out[1]


def _tpr_at(risk: Floats, truth: Bools, weights: Floats, fpr: float) -> Floats:
    """Share of hallucinated units found when at most that share of grounded ones is accused."""
    order = np.argsort(-risk, kind="stable")
    _, starts = np.unique(-risk[order], return_index=True)
    ordered = weights[:, order]
    yes = np.add.reduceat(ordered * truth[order], starts, axis=1).cumsum(-1)
    no = np.add.reduceat(ordered * ~truth[order], starts, axis=1).cumsum(-1)
    allowed = ratio(no, no[:, -1:]) <= fpr
    best: Floats = np.where(allowed, yes, 0).max(-1)
    return ratio(best, yes[:, -1])


def _balanced_accuracy(accused: Bools, truth: Bools) -> Callable[[Floats], Floats]:
    def measure(weights: Floats) -> Floats:
        found = ratio(weights[:, truth] @ accused[truth].astype(float), weights[:, truth].sum(-1))
        kept = ratio(
            weights[:, ~truth] @ (~accused[~truth]).astype(float), weights[:, ~truth].sum(-1)
        )
        both: Floats = (found + kept) / 2
        return both

    return measure


def _area_under_risk_coverage(risk: Floats, truth: Bools) -> float:
    """Mean share of hallucinated units among the k least risky ones, over all k."""
    order = np.argsort(risk, kind="stable")
    shares: NDArray[np.float64] = truth[order].cumsum() / np.arange(1, len(order) + 1)
    return float(shares.mean())
