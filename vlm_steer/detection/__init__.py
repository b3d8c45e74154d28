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
from vlm_steer.detection.fitting import Classifier, Logistic, choose_strength, fit_logistic
from vlm_steer.detection.network import Network, Training, choose_training, fit_network
from vlm_steer.detection.place import Residual, equal_odds, fit_residual
from vlm_steer.detection.probability import Calibrator, fit_calibrator
from vlm_steer.detection.recording import NEEDS, Need, trace_answers, trace_generation
from vlm_steer.detection.store import FittedDetector, made_for
from vlm_steer.detection.trace import Span, Trace, TraceLayout, char_spans

__all__ = [
    "NEEDS",
    "Calibrator",
    "Classifier",
    "Detector",
    "Evidence",
    "FittedDetector",
    "Logistic",
    "Need",
    "Network",
    "Residual",
    "Span",
    "Trace",
    "TraceLayout",
    "Training",
    "Unit",
    "answer_cue",
    "build_detector",
    "char_spans",
    "choose_strength",
    "choose_training",
    "equal_odds",
    "fit_calibrator",
    "fit_logistic",
    "fit_network",
    "fit_residual",
    "get_detector",
    "list_detectors",
    "made_for",
    "register_detector",
    "token_units",
    "trace_answers",
    "trace_generation",
]
