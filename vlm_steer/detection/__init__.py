"""Telling which words of a generated text the image does not support."""

from vlm_steer.detection._inputs import answer_cue
from vlm_steer.detection.base import (
    Detector,
    Evidence,
    Unit,
    build_detector,
    get_detector,
    list_detectors,
    register_detector,
    token_units,
)
from vlm_steer.detection.fitting import (
    Calibrator,
    Logistic,
    choose_strength,
    fit_calibrator,
    fit_logistic,
)
from vlm_steer.detection.recording import NEEDS, Need, trace_answers, trace_generation
from vlm_steer.detection.store import FittedDetector, made_for
from vlm_steer.detection.trace import Span, Trace, TraceLayout, char_spans

__all__ = [
    "NEEDS",
    "Calibrator",
    "Detector",
    "Evidence",
    "FittedDetector",
    "Logistic",
    "Need",
    "Span",
    "Trace",
    "TraceLayout",
    "Unit",
    "answer_cue",
    "build_detector",
    "char_spans",
    "choose_strength",
    "fit_calibrator",
    "fit_logistic",
    "get_detector",
    "list_detectors",
    "made_for",
    "register_detector",
    "token_units",
    "trace_answers",
    "trace_generation",
]
