"""Risks of the words of an answer, by the detectors asked for and by the place alone."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from vlm_steer.detection.base import Detector, Evidence, Unit, build_detector, list_detectors
from vlm_steer.detection.hub import is_place
from vlm_steer.detection.recording import Need, trace_answers
from vlm_steer.detection.store import FittedDetector
from vlm_steer.detection.trace import Trace
from vlm_steer.errors import ConfigError
from vlm_steer.explanation.words import Word

__all__ = ["DetectorLike", "load_detectors", "position_risk", "with_needs", "word_risks"]

DetectorLike: TypeAlias = str | os.PathLike[str] | Detector | FittedDetector
"""A name, the folder of a fitted detector or its name on the hub, or a detector."""


def load_detectors(
    detectors: Sequence[DetectorLike], model: Any, processor: Any
) -> dict[str, FittedDetector]:
    """The detectors by name, ready for this model.

    Raises:
        ConfigError: There is no such detector, it has to be fitted first, two have one name, or it
            was made for another model.
        DataError: A folder is damaged.
    """
    found: dict[str, FittedDetector] = {}
    for given in detectors:
        fitted = _load(given, model, processor)
        name = fitted.detector.name
        if fitted.detector.must_be_fitted and fitted.classifier is None:
            raise ConfigError(
                f"{name} says nothing before it is fitted. Fit it with vlm-steer detect fit "
                f"{name}, and give the folder that this writes."
            )
        if name in found:
            raise ConfigError(f"two detectors are {name}; give each detector once.")
        found[name] = fitted
    return found


def _load(given: DetectorLike, model: Any, processor: Any) -> FittedDetector:
    if isinstance(given, FittedDetector):
        given.check(model, processor)
        return given
    if isinstance(given, Detector):
        return FittedDetector(given)
    name = os.fspath(given)
    if name not in list_detectors() and is_place(name):
        return FittedDetector.from_pretrained(given, model, processor)
    return FittedDetector(build_detector(name))


def with_needs(
    trace: Trace,
    detectors: Mapping[str, FittedDetector],
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    *,
    is_steered: bool,
) -> Trace:
    """The trace with what detectors need and only another reading of the finished text shows.

    Raises:
        ConfigError: There was steering, which that reading would be without.
    """
    needs: list[Need] = sorted({n for d in detectors.values() for n in d.detector.needs} - {"maps"})
    if not needs:
        return trace
    if is_steered:
        names = [name for name, d in detectors.items() if set(d.detector.needs) & set(needs)]
        raise ConfigError(
            f"{', '.join(names)} reads the finished text once more, without steering. Leave the "
            "method or the detector out."
        )
    (again,) = trace_answers(model, processor, inputs, [trace.ids], needs=needs)
    kept = ("received", "own", "n_rows", "lens", "blind")
    return replace(trace, **{name: getattr(again, name) for name in kept})


def word_risks(
    trace: Trace,
    words: Sequence[Word],
    detectors: Mapping[str, FittedDetector],
    evidence: Evidence,
) -> dict[str, tuple[float, ...]]:
    """Per detector, the risk of each word."""
    units = _units(words)
    if not units:
        return dict.fromkeys(detectors, ())
    return {
        name: tuple(fitted.risk(trace, units, evidence).tolist())
        for name, fitted in detectors.items()
    }


def position_risk(trace: Trace, words: Sequence[Word]) -> tuple[float, ...]:
    """The risk of each word by its place alone: how many words come before it."""
    units = _units(words)
    return tuple(FittedDetector(build_detector("position")).risk(trace, units).tolist())


def _units(words: Sequence[Word]) -> list[Unit]:
    earlier: Counter[str] = Counter()
    units = []
    for number, word in enumerate(words):
        name = word.text.casefold()
        units.append(Unit(word.tokens, word.span, name, number, earlier[name]))
        earlier[name] += 1
    return units
