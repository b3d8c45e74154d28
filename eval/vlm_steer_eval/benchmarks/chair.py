"""CHAIR: hallucinated objects in captions, by a closed vocabulary (arXiv 1809.02156).

A normaliser reads a caption into object mentions; `table` matches the surfaces of an
`ObjectVocabulary`, `opera` reproduces the tagger-and-lemmatiser rule of recent papers. A mention is
hallucinated when its object is not among the image's objects. CHAIRi is the share of hallucinated
mentions, CHAIRs the share of captions with at least one; neither means anything without recall and
length beside it.
"""

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Protocol

from vlm_steer_eval.statistics.metrics import MetricSet, harmonic_mean, ratio

from .vocabulary import ObjectVocabulary

__all__ = [
    "CHAIR_METRICS",
    "CaptionScore",
    "Mention",
    "Normaliser",
    "Reading",
    "TableNormaliser",
    "score_caption",
]


@dataclass(frozen=True)
class Mention:
    """One object named by a caption.

    Attributes:
        surface: the matched words, normalised.
        object: the object they name.
        span: half-open character range in the caption; None where the tokeniser rewrote the text.
        token: index of its first token.
        word: index among the caption's words after multi-word surfaces were merged.
    """

    surface: str
    object: str
    span: tuple[int, int] | None
    token: int
    word: int


@dataclass(frozen=True)
class Reading:
    """A caption as a normaliser sees it: its mentions in order and its words."""

    mentions: tuple[Mention, ...]
    words: tuple[str, ...]


class Normaliser(Protocol):
    """Turns captions into object mentions."""

    @property
    def name(self) -> str:
        """The word that selects it."""
        ...

    @property
    def vocabulary(self) -> ObjectVocabulary:
        """Its surfaces and their objects."""
        ...

    def read(self, caption: str) -> Reading:
        """Read one caption."""
        ...


@dataclass(frozen=True)
class CaptionScore:
    """One caption against the objects of its image.

    Attributes:
        reading: what the caption says.
        hallucinated: mentions of objects that the image does not hold, in order.
        truth: the image's objects.
    """

    reading: Reading
    hallucinated: tuple[Mention, ...]
    truth: frozenset[str]

    @property
    def mentioned(self) -> frozenset[str]:
        """Distinct objects named."""
        return frozenset(mention.object for mention in self.reading.mentions)

    def counts(self) -> list[int]:
        """The caption as one row of `CHAIR_METRICS.columns`."""
        return [
            1,
            int(bool(self.hallucinated)),
            len(self.reading.mentions),
            len(self.hallucinated),
            len(self.mentioned & self.truth),
            len(self.truth),
            len(self.mentioned),
            len(self.reading.words),
        ]


def score_caption(reading: Reading, truth: Set[str]) -> CaptionScore:
    """Mark the mentions whose object is not in `truth`."""
    absent = tuple(mention for mention in reading.mentions if mention.object not in truth)
    return CaptionScore(reading, absent, frozenset(truth))


CHAIR_METRICS = MetricSet(
    columns=(
        "captions",
        "hallucinating",
        "mentions",
        "hallucinated",
        "recalled",
        "truth",
        "mentioned",
        "words",
    ),
    formulas={
        "CHAIRs": lambda c: ratio(c["hallucinating"], c["captions"]),
        "CHAIRi": lambda c: ratio(c["hallucinated"], c["mentions"]),
        "Recall": lambda c: ratio(c["recalled"], c["truth"]),
        "Precision": lambda c: ratio(c["recalled"], c["mentioned"]),
        "F1": lambda c: harmonic_mean(
            ratio(c["recalled"], c["mentioned"]), ratio(c["recalled"], c["truth"])
        ),
        "Len": lambda c: ratio(c["words"], c["captions"]),
        "n": lambda c: c["captions"],
    },
    integers=frozenset({"n"}),
    higher_is_better={
        "CHAIRs": False,
        "CHAIRi": False,
        "Recall": True,
        "Precision": True,
        "F1": True,
    },
)
"""Metrics of CHAIR, fractions in 0-1; `Len` is the mean number of words of a caption."""


@dataclass(frozen=True)
class TableNormaliser:
    """Longest match of a vocabulary's surfaces, left to right; no tagger, no downloads.

    Words are runs of letters and digits; case, hyphens and possessive endings are ignored.
    """

    vocabulary: ObjectVocabulary
    name: str = "table"

    def read(self, caption: str) -> Reading:
        """Read one caption."""
        tokens = list(_WORD.finditer(caption))
        words = tuple(_POSSESSIVE.sub("", token.group().lower()) for token in tokens)
        mentions: list[Mention] = []
        position, merged = 0, 0
        while position < len(words):
            end = position + self._match(words, position)
            phrase = words[position:end]
            named = phrase in self.vocabulary.surfaces and phrase not in self.vocabulary.ignored
            if named and not self._qualifies(words, position, end):
                span = (tokens[position].start(), tokens[end - 1].end())
                next_start = tokens[end].start() if end < len(tokens) else len(caption)
                alone = bool(caption[span[1] : next_start].strip())
                if alone or not self._is_colour(words, position):
                    name = self.vocabulary.surfaces[phrase]
                    mentions.append(Mention(" ".join(phrase), name, span, position, merged))
            position = end
            merged += 1
        return Reading(tuple(mentions), words)

    def _match(self, words: tuple[str, ...], position: int) -> int:
        """Number of words of the longest known phrase at `position`; 1 where none starts."""
        for length in self.vocabulary.lengths.get(words[position], ()):
            phrase = words[position : position + length]
            if phrase in self.vocabulary.surfaces or phrase in self.vocabulary.ignored:
                return len(phrase)
        return 1

    def _qualifies(self, words: tuple[str, ...], position: int, end: int) -> bool:
        """Whether the word only describes the object that follows ("baby" elephant)."""
        allowed = self.vocabulary.qualifiers.get(words[position])
        if allowed is None or end != position + 1 or end >= len(words):
            return False
        following = words[end : end + self._match(words, end)]
        return self.vocabulary.surfaces.get(following) in allowed

    def _is_colour(self, words: tuple[str, ...], position: int) -> bool:
        """Whether the word is a colour here: a content word follows it directly."""
        return (
            words[position] in self.vocabulary.colours
            and position + 1 < len(words)
            and words[position + 1] not in self.vocabulary.function_words
        )


_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_POSSESSIVE = re.compile(r"['’]s$")
