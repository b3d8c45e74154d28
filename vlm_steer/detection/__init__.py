"""Telling which words of a generated text the image does not support."""

from vlm_steer.detection._inputs import answer_cue
from vlm_steer.detection.recording import NEEDS, Need, trace_answers, trace_generation
from vlm_steer.detection.trace import Span, Trace, TraceLayout, char_spans

__all__ = [
    "NEEDS",
    "Need",
    "Span",
    "Trace",
    "TraceLayout",
    "answer_cue",
    "char_spans",
    "trace_answers",
    "trace_generation",
]
