"""One answer taken apart: where its words looked, their risk, and whether looking mattered."""

from vlm_steer.explanation.checks import Check
from vlm_steer.explanation.explaining import explain
from vlm_steer.explanation.result import Arm, ExplainResult, Token
from vlm_steer.explanation.words import Word, differing, split_words

__all__ = [
    "Arm",
    "Check",
    "ExplainResult",
    "Token",
    "Word",
    "differing",
    "explain",
    "split_words",
]
