"""What is left of a gain when both arms say as much, find as much, or say yes as often."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_steer_eval.benchmarks.chair import CHAIR_METRICS
from vlm_steer_eval.benchmarks.pope import POPE_METRICS, Answer, Verdict, pope_counts
from vlm_steer_eval.running.runs import RunArm

from .count_model import rate_ratio
from .metrics import MetricSet

__all__ = [
    "Caption",
    "at_matched_length",
    "at_matched_recall",
    "at_matched_yes_ratio",
    "at_yes_ratio",
    "captions",
    "length_adjusted",
    "margins",
    "sentence_ends",
]

_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_WORD = re.compile(r"\S+")

Row = list[float]
Compare = Callable[[MetricSet, Sequence[Row], Sequence[Row]], dict[str, dict[str, Any]]]


class Caption:
    """A scored caption that can be cut short.

    Args:
        sample: its row of `samples.jsonl`, with the text, the mentions and the image's objects.
    """

    def __init__(self, sample: Mapping[str, Any]) -> None:
        self.text = str(sample.get("caption", sample.get("text", "")))
        self.truth = frozenset(sample["objects"])
        self.words = int(sample["words"])
        self.starts = [match.start() for match in _WORD.finditer(self.text)]
        mentions = sample["mentions"]
        self.mentions = [
            (self._position(m), str(m["object"]), bool(m["hallucinated"])) for m in mentions
        ]

    @property
    def sentences(self) -> list[int]:
        """Where each sentence ends."""
        return sentence_ends(self.text)

    def counts(self, end: int | None = None) -> Row:
        """The text up to a character as one row of `CHAIR_METRICS.columns`."""
        if end is None or end >= len(self.text):
            said, words = self.mentions, float(self.words)
        else:
            said = [mention for mention in self.mentions if mention[0] < end]
            before = sum(start < end for start in self.starts)
            words = self.words * before / max(1, len(self.starts))
        named = {name for _, name, _ in said}
        wrong = sum(hallucinated for _, _, hallucinated in said)
        return [
            1,
            int(wrong > 0),
            len(said),
            wrong,
            len(named & self.truth),
            len(self.truth),
            len(named),
            words,
        ]

    def after_words(self, n: int) -> int:
        """Where the text ends after `n` words."""
        return self.starts[n] if n < len(self.starts) else len(self.text)

    def after_sentences(self, n: int) -> int:
        """Where the text ends after `n` sentences."""
        ends = [0, *self.sentences]
        return ends[n] if n < len(ends) else len(self.text)

    def _position(self, mention: Mapping[str, Any]) -> float:
        """The character at which a mention begins, estimated where the tokeniser lost it."""
        if mention["span"] is not None:
            return float(mention["span"][0])
        return len(self.text) * int(mention["word"]) / max(1, self.words)


def sentence_ends(text: str) -> list[int]:
    """One past the last character of each sentence; an unfinished one ends with the text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    if text[ends[-1] if ends else 0 :].strip():
        ends.append(len(text))
    return ends


def captions(arm: RunArm) -> list[Caption] | None:
    """The arm's captions in the order of its units; None where they were not kept."""
    if len(arm.samples) < len(arm.units):
        return None
    if any("mentions" not in sample for sample in arm.samples.values()):
        return None
    return [Caption(arm.samples[unit]) for unit in arm.units]


def at_matched_length(
    baseline: Sequence[Caption], treated: Sequence[Caption], compare_rows: Compare
) -> dict[str, Any]:
    """Both captions of every image cut to the sentences of the shorter one."""
    limits = [
        min(len(a.sentences), len(b.sentences)) for a, b in zip(baseline, treated, strict=True)
    ]
    before = [c.counts(c.after_sentences(n)) for c, n in zip(baseline, limits, strict=True)]
    after = [c.counts(c.after_sentences(n)) for c, n in zip(treated, limits, strict=True)]
    mean = sum(limits) / len(limits)
    return {"sentences": mean, "differences": compare_rows(CHAIR_METRICS, before, after)}


def at_matched_recall(
    baseline: Sequence[Caption], treated: Sequence[Caption], compare_rows: Compare
) -> dict[str, Any]:
    """The arm that recalls more, cut after as many words as give the other's recall."""
    recalls = [_recall([c.counts() for c in arm]) for arm in (baseline, treated)]
    longer, target = (baseline, recalls[1]) if recalls[0] > recalls[1] else (treated, recalls[0])
    limit = _words_for(longer, target)
    cut = [caption.counts(caption.after_words(limit)) for caption in longer]
    whole = [caption.counts() for caption in (treated if longer is baseline else baseline)]
    before, after = (cut, whole) if longer is baseline else (whole, cut)
    return {
        "shortened": "baseline" if longer is baseline else "method",
        "words": limit,
        "differences": compare_rows(CHAIR_METRICS, before, after),
    }


def length_adjusted(
    baseline: Sequence[Sequence[float]],
    treated: Sequence[Sequence[float]],
    clusters: Sequence[str],
) -> dict[str, Any] | None:
    """How many times the baseline's rate of hallucinated mentions, at equal length.

    Args:
        baseline: rows of `CHAIR_METRICS.columns`.
        treated: the same units under the method.
        clusters: the image of each unit.
    """
    rows = np.asarray([*baseline, *treated], dtype=np.float64)
    column = CHAIR_METRICS.columns.index
    found = rate_ratio(
        rows[:, column("hallucinated")],
        rows[:, column("mentions")],
        rows[:, column("words")],
        np.arange(len(rows)) >= len(baseline),
        [*clusters, *clusters],
    )
    if found is None:
        return None
    return {"rate_ratio": found.value, "ci95": list(found.interval), "p": found.p}


def margins(arm: RunArm) -> tuple[list[float], list[Answer]] | None:
    """First-token margins and labels in the order of the units; None where one is absent."""
    if len(arm.samples) < len(arm.units):
        return None
    rows = [arm.samples[unit] for unit in arm.units]
    if any(row.get("margin") is None or row.get("label") not in ("yes", "no") for row in rows):
        return None
    labels: list[Answer] = ["yes" if row["label"] == "yes" else "no" for row in rows]
    return [float(row["margin"]) for row in rows], labels


def at_yes_ratio(values: Sequence[float], labels: Sequence[Answer], share: float) -> list[Row]:
    """The answers that a constant bias towards yes or no would give, saying yes to a share of them.

    Args:
        values: first-token margins of the unsteered model.
        labels: the true answers.
        share: of questions to answer with yes, in [0, 1].
    """
    wanted = round(share * len(values))
    # Ties are broken by order, so that exactly the wanted number is yes.
    yes = set(np.argsort(-np.asarray(values), kind="stable")[:wanted].tolist())
    rows: list[Row] = []
    for index, label in enumerate(labels):
        said: Answer = "yes" if index in yes else "no"
        cell: Any = ("T" if said == label else "F") + ("P" if said == "yes" else "N")
        verdict = Verdict(said, cell, counted=True, asked=True, said_yes=said == "yes")
        rows.append(list(map(float, pope_counts(verdict))))
    return rows


def at_matched_yes_ratio(
    baseline: RunArm, treated: RunArm, compare_rows: Compare
) -> dict[str, Any] | None:
    """The method against the baseline with a constant bias that says yes as often."""
    known = margins(baseline)
    if known is None:
        return None
    after = [list(unit.counts) for unit in treated.units.values()]
    sums = np.asarray(after, dtype=np.float64).sum(0)
    share = float(POPE_METRICS.evaluate(sums)["yes_ratio"])
    if np.isnan(share):
        return None
    before = at_yes_ratio(*known, share)
    return {"yes_ratio": share, "differences": compare_rows(POPE_METRICS, before, after)}


def _recall(rows: Sequence[Row]) -> float:
    return float(CHAIR_METRICS.evaluate(np.asarray(rows, dtype=np.float64).sum(0))["Recall"])


def _words_for(arm: Sequence[Caption], target: float) -> int:
    """The fewest words per caption that reach a recall, by bisection: recall grows with words."""
    low, high = 0, max(len(caption.starts) for caption in arm)
    while low < high:
        middle = (low + high) // 2
        if _recall([c.counts(c.after_words(middle)) for c in arm]) >= target:
            high = middle
        else:
            low = middle + 1
    return high
