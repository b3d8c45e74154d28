"""Closed choices that the commands offer and the functions behind them take.

Nothing heavy is imported here, so that help is instant.
"""

from typing import Literal, TypeAlias

__all__ = [
    "AmberParser",
    "AmberPart",
    "BeafParser",
    "HallusionParser",
    "Missing",
    "MmeParser",
    "MmhalReading",
    "MmvpParser",
    "NormaliserName",
    "OpopeReader",
    "ParserName",
    "ScenesName",
    "UnknownImages",
]

ParserName: TypeAlias = Literal[
    "robust", "official", "opera", "vcd", "spin", "icd", "repope", "lmms_eval", "vlmevalkit"
]
NormaliserName: TypeAlias = Literal["table", "opera"]
ScenesName: TypeAlias = Literal["iid", "broken", "validation"]

Missing: TypeAlias = Literal["error", "exclude"]
"""What to do about questions without an answer: stop, or leave them out and count them."""

UnknownImages: TypeAlias = Literal["error", "empty", "exclude"]
"""What to do about captions of images without ground truth."""

AmberParser: TypeAlias = Literal["robust", "official"]
AmberPart: TypeAlias = Literal[
    "all", "generative", "discriminative", "existence", "attribute", "relation"
]
BeafParser: TypeAlias = Literal["robust", "official"]
HallusionParser: TypeAlias = Literal[
    "robust", "official", "opera", "repope", "vlmevalkit", "lmms_intern"
]
MmeParser: TypeAlias = Literal["robust", "official", "lmms_eval", "vlmevalkit"]
MmhalReading: TypeAlias = Literal["robust", "official"]
MmvpParser: TypeAlias = Literal["robust", "lmms_eval"]
OpopeReader: TypeAlias = Literal["table", "halc"]
