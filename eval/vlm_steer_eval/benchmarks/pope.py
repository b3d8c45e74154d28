"""POPE: reading a yes/no answer under every published rule, and the metrics of the readings.

The reading rule alone moves POPE by tens of points on untidy answers, so a score without the name
of its parser means little. `robust` is ours: it never turns an answer it cannot read into a "yes".
The other rules reproduce published evaluators exactly, defects included, for comparison with their
numbers.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from vlm_steer.errors import ConfigError
from vlm_steer_eval.statistics.metrics import MetricSet, harmonic_mean, ratio

__all__ = ["PARSERS", "POPE_METRICS", "Answer", "Verdict", "parse_answer", "pope_counts"]

Answer = Literal["yes", "no"]
Cell = Literal["TP", "FP", "TN", "FN"]

_CELLS: Mapping[tuple[str, str], Cell] = MappingProxyType(
    {("yes", "yes"): "TP", ("yes", "no"): "FP", ("no", "no"): "TN", ("no", "yes"): "FN"}
)


class Verdict(NamedTuple):
    """How one answer was read and where it counts.

    Attributes:
        answer: what the rule read; None when it could not.
        cell: the confusion cell it adds to, with "yes" as the positive class; None for no cell.
        counted: whether it is part of the accuracy's denominator.
        asked: whether it is part of the yes ratio's denominator.
        said_yes: whether it is part of the yes ratio's numerator.
    """

    answer: Answer | None
    cell: Cell | None
    counted: bool
    asked: bool
    said_yes: bool


Parser = Callable[[str, Answer], Verdict]


def parse_answer(parser: str, text: str, label: Answer) -> Verdict:
    """Read one answer.

    Args:
        parser: a name in `PARSERS`.
        text: the model's answer, as generated.
        label: the true answer. Only `vcd` looks at it to read the text.

    Raises:
        ConfigError: no such parser.
    """
    if parser not in PARSERS:
        raise ConfigError(f"parser {parser!r} is unknown; choose one of {', '.join(PARSERS)}")
    return PARSERS[parser](text, label)


def pope_counts(verdict: Verdict) -> list[int]:
    """The verdict as one row of `POPE_METRICS.columns`."""
    cells = [int(verdict.cell == name) for name in ("TP", "FP", "TN", "FN")]
    return [
        *cells,
        int(verdict.counted),
        int(verdict.asked),
        int(verdict.said_yes),
        int(verdict.answer is None),
    ]


def _official(text: str) -> Answer:
    """RUCAIBox/POPE: first sentence, without commas; "no" if No, no or not stands alone in it."""
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _recorder_words(text: str) -> list[str]:
    return text.replace(".", "").replace(",", "").split(" ")


def _recorder_denies(words: list[str]) -> bool:
    return any(word in {"No", "not", "no", "NO"} or word.endswith("n't") for word in words)


def _opera(text: str) -> Answer:
    """OPERA, PAI, VISTA, SID, AvisC, HALC: the whole text, and words ending in n't deny."""
    return "no" if _recorder_denies(_recorder_words(text)) else "yes"


def _spin(text: str) -> Answer | None:
    """SPIN: OPERA's rule, but "yes" needs a yes.

    The original drops the other answers from a list that it then zips with the labels.
    """
    words = _recorder_words(text)
    if _recorder_denies(words):
        return "no"
    return "yes" if {"Yes", "yes", "YES"} & set(words) else None


def _icd(text: str) -> Answer | None:
    """ICD: the official rule, but "yes" needs a yes."""
    if _official(text) == "no":
        return "no"
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "yes" if {"Yes", "yes"} & set(words) else None


def _repope(text: str) -> Answer | None:
    """RePOPE: any "yes" in the text, else any "no"."""
    lowered = text.lower()
    if "yes" in lowered:
        return "yes"
    return "no" if "no" in lowered else None


def _exact(text: str) -> Answer | None:
    """lmms-eval: nothing but the word itself."""
    lowered = text.lower().strip()
    if lowered == "yes":
        return "yes"
    return "no" if lowered == "no" else None


_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def _vlmevalkit(text: str) -> Answer | None:
    """VLMEvalKit without a judge: VQA punctuation stripping, then exactly one of the two words."""
    lowered = text.lower()
    digits_joined = re.search(r"\d,\d", lowered) is not None
    cleaned = lowered
    for mark in _VQA_MARKS:
        beside_space = f"{mark} " in lowered or f" {mark}" in lowered
        cleaned = cleaned.replace(mark, "" if beside_space or digits_joined else " ")
    # The original passes re.UNICODE (32) where the number of replacements belongs.
    words = re.sub(r"\.(?!\d)", "", cleaned, count=32).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


_YES_WORDS = frozenset(
    {"yes", "yeah", "yep", "yup", "true", "correct", "right", "sure", "certainly", "indeed"}
)
_NO_WORDS = frozenset({"no", "nope", "nah", "false", "incorrect", "wrong"})
_DENIALS = frozenset(
    {"not", "cannot", "cant", "none", "nothing", "neither", "never", "without", "absent"}
)
_HEDGES = frozenset({"unsure", "uncertain", "unclear", "unknown", "maybe", "perhaps", "possibly"})
_SPECIAL_TOKEN = re.compile(r"<\|?/?[a-z_0-9]+\|?>", re.IGNORECASE)
_LEAD_IN = re.compile(r"^(?:(?:the|my|final|short)\s+)*answer(?:\s+is)?\s+")


def _robust(text: str) -> Answer | None:
    """Ours: an opening yes or no decides; else one-sided evidence does; anything else is unread."""
    plain = _SPECIAL_TOKEN.sub(" ", unicodedata.normalize("NFKC", text)).lower().replace("’", "'")
    plain = "".join(char for char in plain if unicodedata.category(char) != "Cf")
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", plain)
    words = _LEAD_IN.sub("", " ".join(words) + " ").split()
    if not words or _HEDGES & set(words):
        return None
    both = words[1:3] in (["and", "no"], ["or", "no"], ["and", "yes"], ["or", "yes"])
    opposites = _YES_WORDS if words[0] in _NO_WORDS else _NO_WORDS
    if words[0] in _YES_WORDS | _NO_WORDS:
        contradicted = both or (len(words) > 1 and words[1] in opposites)
        return None if contradicted else ("yes" if words[0] in _YES_WORDS else "no")
    affirms = "yes" in words
    denies = any(word in _DENIALS or word == "no" or word.endswith("n't") for word in words)
    if affirms == denies:
        return None
    return "yes" if affirms else "no"


def _excluding(rule: Callable[[str], Answer | None]) -> Parser:
    """Unread answers count nowhere."""

    def parse(text: str, label: Answer) -> Verdict:
        answer = rule(text)
        cell = None if answer is None else _CELLS[answer, label]
        read = answer is not None
        return Verdict(answer, cell, counted=read, asked=read, said_yes=answer == "yes")

    return parse


def _penalising(rule: Callable[[str], Answer | None]) -> Parser:
    """Unread answers are wrong: a miss where the label is yes, and no credit where it is no."""

    def parse(text: str, label: Answer) -> Verdict:
        answer = rule(text)
        miss: Cell | None = "FN" if label == "yes" else None
        cell = miss if answer is None else _CELLS[answer, label]
        return Verdict(answer, cell, counted=True, asked=True, said_yes=answer == "yes")

    return parse


def _icd_verdict(text: str, label: Answer) -> Verdict:
    """Unread answers stay in the yes ratio's denominator only."""
    answer = _icd(text)
    cell = None if answer is None else _CELLS[answer, label]
    return Verdict(answer, cell, counted=answer is not None, asked=True, said_yes=answer == "yes")


def _vcd_verdict(text: str, label: Answer) -> Verdict:
    """VCD, AGLA, ClearSight: right iff the label's word occurs anywhere in the text."""
    right = label in text.lower().strip()
    answer: Answer = label if right else ("no" if label == "yes" else "yes")
    return Verdict(
        answer, _CELLS[answer, label], counted=True, asked=True, said_yes=answer == "yes"
    )


def _lmms_eval_verdict(text: str, label: Answer) -> Verdict:
    """Unread answers are wrong but no miss; the yes ratio is that of the labels, as published."""
    answer = _exact(text)
    cell = None if answer is None else _CELLS[answer, label]
    return Verdict(answer, cell, counted=True, asked=True, said_yes=label == "yes")


PARSERS: Mapping[str, Parser] = MappingProxyType(
    {
        "robust": _penalising(_robust),
        "official": _excluding(_official),
        "opera": _excluding(_opera),
        "vcd": _vcd_verdict,
        "spin": _excluding(_spin),
        "icd": _icd_verdict,
        "repope": _excluding(_repope),
        "lmms_eval": _lmms_eval_verdict,
        "vlmevalkit": _penalising(_vlmevalkit),
    }
)
"""Reading rules by name. `vcd` turns every answer into one or the other, as the original does."""

POPE_METRICS = MetricSet(
    columns=("TP", "FP", "TN", "FN", "counted", "asked", "said_yes", "unread"),
    formulas={
        "accuracy": lambda c: ratio(c["TP"] + c["TN"], c["counted"]),
        "precision": lambda c: ratio(c["TP"], c["TP"] + c["FP"]),
        "recall": lambda c: ratio(c["TP"], c["TP"] + c["FN"]),
        "f1": lambda c: harmonic_mean(
            ratio(c["TP"], c["TP"] + c["FP"]), ratio(c["TP"], c["TP"] + c["FN"])
        ),
        "yes_ratio": lambda c: ratio(c["said_yes"], c["asked"]),
        "TP": lambda c: c["TP"],
        "FP": lambda c: c["FP"],
        "TN": lambda c: c["TN"],
        "FN": lambda c: c["FN"],
        "unparsed": lambda c: c["unread"],
    },
    integers=frozenset({"TP", "FP", "TN", "FN", "unparsed"}),
    higher_is_better={"accuracy": True, "precision": True, "recall": True, "f1": True},
)
"""Metrics of POPE; "yes" is the positive class, fractions in 0-1."""
