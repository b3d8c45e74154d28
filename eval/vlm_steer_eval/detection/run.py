"""Fitting detectors and judging them, on images that fitting has not seen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_steer.detection import (
    Detector,
    FittedDetector,
    Logistic,
    choose_strength,
    fit_calibrator,
    fit_logistic,
)
from vlm_steer.detection.fitting import CalibratorName
from vlm_steer.errors import DataError

from .data import PARTS, Collected, split_images
from .stats import best_threshold, evaluate_risk

__all__ = ["CONTROLS", "evaluate", "fit", "refuse_leakage", "table"]

CONTROLS = ("position", "occurrence")
"""What tells only where a word stands; every detector is held against both together."""

_COLUMNS = (
    ("auroc", "AUROC"),
    ("auroc_at_equal_position", "at equal position"),
    ("auroc_within_text", "within a caption"),
    ("gain_auroc", "gain over place"),
    ("average_precision", "AP"),
)


def fit(
    detector: Detector,
    data: Collected,
    made_for: Mapping[str, Any],
    *,
    preset: str = "default",
    calibrator: CalibratorName = "platt",
    parts: Sequence[str] | None = None,
    name: str | None = None,
    seed: int = 0,
) -> FittedDetector:
    """Fit weights on training images, calibration and threshold on calibration images.

    Args:
        detector: the detector; `data` holds its features under its name.
        data: labelled units.
        made_for: from `vlm_steer.detection.made_for`.
        preset: `default` (standardised, balanced, strength by cross-validation over images) or
            `paper` (none of these, strength 1).
        calibrator: `platt`, `temperature` or `isotonic`.
        parts: part of each unit; by `split_images` when omitted.
        name: name of its features in `data`, where it is not that of the detector.
        seed: of the division.

    Raises:
        DataError: an image is in two parts, a part has too few units of a class, or features are
            not finite.
    """
    parts = split_images(data.image, seed) if parts is None else parts
    _refuse_shared(data.image, parts)
    train, calibration = (
        data.where(torch.tensor([part == name for part in parts])) for name in PARTS[:2]
    )
    name = detector.name if name is None else name
    features = train.features[name]
    logistic, strength = _fit_weights(features, train, preset, seed)
    plain = FittedDetector(detector, logistic)
    raw = plain.raw(calibration.features[name])
    calibrated = fit_calibrator(calibrator, raw, calibration.labels)
    risk = calibrated(raw).numpy()
    return FittedDetector(
        detector,
        logistic,
        calibrated,
        best_threshold(risk, calibration.labels.numpy() == 1),
        {**made_for, "n_features": features.shape[1]},
        {
            "preset": preset,
            "strength": strength,
            "seed": seed,
            "n_units": len(train.units),
            "base_rate": float(train.labels.double().mean()),
            "images": {
                name: sorted({i for i, part in zip(data.image, parts, strict=True) if part == name})
                for name in PARTS[:2]
            },
        },
    )


def _fit_weights(
    features: Tensor, train: Collected, preset: str, seed: int
) -> tuple[Logistic, float]:
    if preset == "paper":
        fitted = fit_logistic(
            features,
            train.labels,
            strength=1.0,
            standardise=False,
            is_balanced=False,
            components=None,
        )
        return fitted, 1.0
    strength = 1.0
    if features.shape[1] > 1:
        strength = choose_strength(features, train.labels, train.image, seed=seed)
    return fit_logistic(features, train.labels, strength=strength), strength


def _refuse_shared(images: Sequence[str], parts: Sequence[str]) -> None:
    known: dict[str, str] = {}
    for image, part in zip(images, parts, strict=True):
        if known.setdefault(image, part) != part:
            raise DataError(
                f"image {image} is in the parts {known[image]} and {part}: what is fitted on it "
                "would be judged on it. Split by image."
            )


def refuse_leakage(detector: FittedDetector, data: Collected) -> None:
    """Raise DataError when the detector was fitted on any of these images."""
    fitted = {image for part in detector.made_of.get("images", {}).values() for image in part}
    shared = sorted(fitted & set(data.image))
    if shared:
        raise DataError(
            f"{detector.detector.name} was fitted on {len(shared)} of these images, such as "
            f"{shared[0]}: its score on them would say nothing. Judge it on other images."
        )


def evaluate(
    detectors: Mapping[str, FittedDetector],
    data: Collected,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge detectors on labelled units that none of them was fitted on.

    Returns:
        `detectors`: name -> what `evaluate_risk` returns; `n_units`, `n_images`, `base_rate`.

    Raises:
        DataError: a detector was fitted on one of the images, or only one class is there.
    """
    labels = data.as_labels()
    found = {}
    for name, detector in detectors.items():
        refuse_leakage(detector, data)
        raw = detector.raw(data.features[name])
        calibrated = None if detector.calibrator is None else detector.calibrator(raw).numpy()
        found[name] = evaluate_risk(
            raw.numpy(),
            labels,
            probability=calibrated,
            threshold=detector.threshold,
            is_control=name in CONTROLS,
            n_resamples=n_resamples,
            seed=seed,
        )
    return {
        "detectors": found,
        "n_units": len(data.units),
        "n_images": len(set(data.image)),
        "base_rate": float(np.mean(labels.is_hallucinated)),
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table, best AUROC first."""
    lines = [
        "| detector | " + " | ".join(head for _, head in _COLUMNS) + " | works |",
        "|---" * (len(_COLUMNS) + 2) + "|",
    ]
    order = sorted(result["detectors"].items(), key=lambda item: -(item[1]["auroc"]["value"] or 0))
    for name, found in order:
        cells = [_cell(found.get(key)) for key, _ in _COLUMNS]
        verdict = {True: "yes", False: "no", None: "control" if name in CONTROLS else "?"}
        lines.append(f"| {name} | {' | '.join(cells)} | {verdict[found['works']]} |")
    return "\n".join(lines) + "\n"


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    low, high = score["ci95"] or (float("nan"), float("nan"))
    return f"{score['value']:.3f} [{low:.3f}, {high:.3f}]"
