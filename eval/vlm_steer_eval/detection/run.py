"""Fitting detectors and judging them, on images that fitting has not seen."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlm_steer.detection import (
    Classifier,
    Detector,
    FittedDetector,
    choose_strength,
    choose_training,
    equal_odds,
    fit_calibrator,
    fit_logistic,
    fit_network,
    fit_residual,
)
from vlm_steer.detection.fitting import check_classes, check_features
from vlm_steer.detection.place import PlaceMode
from vlm_steer.detection.probability import CalibratorName
from vlm_steer.errors import ConfigError, DataError

from .data import PARTS, Collected, split_images
from .stats import best_threshold, evaluate_risk

__all__ = ["CONTROLS", "Recipe", "evaluate", "fit", "refuse_leakage", "table"]

CONTROLS = ("position", "occurrence")
"""What tells only where a word stands; every detector is held against both together."""

_COLUMNS = (
    ("auroc", "AUROC"),
    ("auroc_at_equal_position", "at equal position"),
    ("auroc_within_text", "within a caption"),
    ("gain_auroc", "gain over place"),
    ("average_precision", "AP"),
)


@dataclass(frozen=True)
class Recipe:
    """How detectors are fitted.

    Attributes:
        preset: `default` (standardised, both classes weighed alike, strength or training chosen on
            left-out images) or `paper` (neither of the former; strength 1 for `logistic`).
        classifier: `logistic`, or `mlp`, the network of SVAR's authors.
        position: `none`; `residualize` fits to what the place leaves open of each feature; `ipw`
            weighs units so that every tenth of places holds both classes in the same proportion.
        calibrator: `platt`, `temperature` or `isotonic`.
        seed: of divisions, and of training.
    """

    preset: Literal["default", "paper"] = "default"
    classifier: Literal["logistic", "mlp"] = "logistic"
    position: PlaceMode = "none"
    calibrator: CalibratorName = "platt"
    seed: int = 0

    def check(self, detector: Detector) -> None:
        """Raise ConfigError where the place is taken out of a detector that knows nothing else."""
        if self.position != "none" and detector.name == "position":
            raise ConfigError(
                f"position knows nothing but the place: fit it without --position {self.position}"
            )


def fit(
    detector: Detector,
    data: Collected,
    made_for: Mapping[str, Any],
    recipe: Recipe = Recipe(),
    *,
    parts: Sequence[str] | None = None,
    name: str | None = None,
) -> FittedDetector:
    """Fit weights on training images, calibration and threshold on calibration images.

    Args:
        detector: the detector; `data` holds its features under its name.
        data: labelled units.
        made_for: from `vlm_steer.detection.made_for`.
        recipe: how.
        parts: part of each unit; by `split_images` when omitted.
        name: name of its features in `data`, where it is not that of the detector.

    Raises:
        ConfigError: the recipe takes the place out of a detector that knows nothing else.
        DataError: an image is in two parts, a part has too few units of a class, or features are
            not finite.
    """
    recipe.check(detector)
    parts = split_images(data.image, recipe.seed) if parts is None else parts
    _refuse_shared(data.image, parts)
    train, calibration = (
        data.where(torch.tensor([part == name for part in parts])) for name in PARTS[:2]
    )
    name = detector.name if name is None else name
    with _naming(f"{name}, {PARTS[0]} images"):
        plain, about = _fit_weights(detector, train.features[name], train, recipe)
    with _naming(f"{name}, {PARTS[1]} images"):
        raw = plain.raw(calibration.features[name], calibration.words)
        calibrated = fit_calibrator(recipe.calibrator, raw, calibration.labels)
    risk = calibrated(raw).numpy()
    return replace(
        plain,
        calibrator=calibrated,
        threshold=best_threshold(risk, calibration.labels.numpy() == 1),
        made_for={**made_for, "n_features": train.features[name].shape[1]},
        made_of={
            **asdict(recipe),
            **about,
            "n_units": len(train.units),
            "base_rate": float(train.labels.double().mean()),
            "images": {
                name: sorted({i for i, part in zip(data.image, parts, strict=True) if part == name})
                for name in PARTS[:2]
            },
        },
    )


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say what data are at fault."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def _fit_weights(
    detector: Detector, features: Tensor, train: Collected, recipe: Recipe
) -> tuple[FittedDetector, dict[str, Any]]:
    """The detector with its weights, and what was chosen for them."""
    weights, residual = None, None
    check_features(features)
    check_classes(train.labels)
    if recipe.position == "residualize":
        residual = fit_residual(features, train.words)
        features = residual(features, train.words)
    elif recipe.position == "ipw":
        weights = equal_odds(train.words, train.labels)
        is_used = weights > 0
        features, train, weights = features[is_used], train.where(is_used), weights[is_used]
    build = _logistic if recipe.classifier == "logistic" else _network
    classifier, about = build(features, train, weights, recipe)
    return FittedDetector(detector, classifier, residual=residual), about


def _logistic(
    features: Tensor, train: Collected, weights: Tensor | None, recipe: Recipe
) -> tuple[Classifier, dict[str, Any]]:
    strength = 1.0
    if recipe.preset == "paper":
        fitted = fit_logistic(
            features,
            train.labels,
            weights=weights,
            standardise=False,
            is_balanced=False,
            components=None,
        )
        return fitted, {"strength": strength}
    if features.shape[1] > 1:
        strength = choose_strength(
            features, train.labels, train.image, weights=weights, seed=recipe.seed
        )
    fitted = fit_logistic(features, train.labels, strength=strength, weights=weights)
    return fitted, {"strength": strength}


def _network(
    features: Tensor, train: Collected, weights: Tensor | None, recipe: Recipe
) -> tuple[Classifier, dict[str, Any]]:
    is_default = recipe.preset == "default"
    options: Any = {
        "weights": weights,
        "standardise": is_default,
        "is_balanced": is_default,
        "seed": recipe.seed,
    }
    training = choose_training(features, train.labels, train.image, **options)
    return fit_network(features, train.labels, training, **options), training._asdict()


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
        with _naming(name):
            raw = detector.raw(data.features[name], data.words)
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
