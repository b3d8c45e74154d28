"""AMBER: objects, attributes and relations in captions and in yes/no answers (arXiv 2311.07397).

A caption's nouns are held against the words that annotators saw (`truth`) and against the words
that models like to invent (`hallu`). The published rule is kept with its defects: an associate
credits the first word that lists it, and an exact match with an invented word is forgiven where the
noun resembles a safe one. In the questions the positive class is "no".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from vlm_steer_eval.statistics.metrics import Floats, MetricSet, harmonic_mean, ratio

__all__ = [
    "AMBER_METRICS",
    "DIMENSIONS",
    "SIMILAR",
    "Caption",
    "Similarity",
    "Vocabulary",
    "exact_similarity",
    "generative_counts",
    "official_numbers",
    "question_counts",
    "read_caption",
]

Similarity = Callable[[str, str], float]
"""How alike two words are, at most 1."""

SIMILAR = 0.8
"""Words more alike than this are taken for one another."""

DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "existence": ("discriminative-hallucination",),
    "attribute": (
        "discriminative-attribute-state",
        "discriminative-attribute-number",
        "discriminative-attribute-action",
    ),
    "state": ("discriminative-attribute-state",),
    "number": ("discriminative-attribute-number",),
    "action": ("discriminative-attribute-action",),
    "relation": ("discriminative-relation", "relation"),
}
"""Dimension of the questions -> types in the annotations."""


@dataclass(frozen=True)
class Vocabulary:
    """The words of the benchmark.

    Attributes:
        associates: word -> words that count as the same thing.
        safe: words that are never held against a caption.
    """

    associates: Mapping[str, Sequence[str]]
    safe: frozenset[str]

    @cached_property
    def known(self) -> frozenset[str]:
        """Every word that is looked at; other nouns are ignored."""
        listed = (word for words in self.associates.values() for word in words)
        return frozenset(self.associates) | frozenset(listed)


@dataclass(frozen=True)
class Caption:
    """One caption against the annotation of its image.

    Attributes:
        nouns: the nouns that the vocabulary knows, with repetition.
        hallucinated: those of them that are not there.
        covered: indices of the truth words that were named.
        invented: indices of the expected inventions that were named.
        n_truth: truth words.
        n_invented: expected inventions.
    """

    nouns: tuple[str, ...]
    hallucinated: tuple[str, ...]
    covered: frozenset[int]
    invented: frozenset[int]
    n_truth: int
    n_invented: int


def exact_similarity(first: str, second: str) -> float:
    """1 for equal words, else 0."""
    return float(first == second)


def read_caption(
    nouns: Sequence[str],
    truth: Sequence[str],
    invented: Sequence[str],
    vocabulary: Vocabulary,
    similarity: Similarity = exact_similarity,
) -> Caption:
    """Hold the nouns of one caption against an annotation.

    Args:
        nouns: the caption's nouns as lemmas, case kept, with repetition.
        truth: what is in the image.
        invented: what models expect there and is not.
        vocabulary: associates and safe words.
        similarity: how alike two words are.
    """
    safe = _slots(truth, vocabulary)
    wrong = _slots(invented, vocabulary)
    known = vocabulary.known
    kept = tuple(noun for noun in nouns if noun in known)
    covered: set[int] = set()
    named: set[int] = set()
    hallucinated = []
    for noun in kept:
        if noun in vocabulary.safe:
            continue
        here = _first(safe, noun, exact_similarity)
        if here is not None:
            covered.add(here)
            continue
        for rule in (exact_similarity, similarity):
            found = _first(wrong, noun, rule)
            if found is not None:
                named.add(found)
        alike = _first(safe, noun, similarity)
        if alike is None:
            hallucinated.append(noun)
        else:
            covered.add(alike)
    return Caption(
        kept,
        tuple(hallucinated),
        frozenset(covered),
        frozenset(named),
        len(truth),
        len(invented),
    )


def generative_counts(caption: Caption) -> list[int]:
    """The caption as one row of `AMBER_METRICS.columns`."""
    return [
        1,
        int(bool(caption.hallucinated)),
        len(caption.nouns),
        len(caption.hallucinated),
        len(caption.covered),
        caption.n_truth,
        len(caption.invented),
        caption.n_invented,
        *[0] * 7,
    ]


def question_counts(
    answer: Literal["yes", "no"] | None, truth: Literal["yes", "no"], *, unread: bool
) -> list[int]:
    """One yes/no answer as one row of `AMBER_METRICS.columns`."""
    right = answer == truth
    said_no = answer == "no"
    return [
        *[0] * 8,
        1,
        int(right),
        int(said_no),
        int(truth == "no"),
        int(right and said_no),
        int(answer == "yes"),
        int(unread),
    ]


def official_numbers(
    sums: Mapping[str, float], *, counters: int = 1, slack: float = 1e-4
) -> dict[str, float]:
    """The published script's numbers from summed counts, in percent and rounded as it prints them.

    F1 is computed from the rounded precision and recall.

    Args:
        sums: `AMBER_METRICS.columns` summed over the items.
        counters: how many of the script's counters were added up; each starts at 0.001.
        slack: what the script adds to F1's denominator.
    """
    start = 1e-3 * counters
    numbers: dict[str, float] = {}
    if sums["captions"]:
        clean = sums["captions"] - sums["hallucinating"]
        numbers |= {
            "CHAIR": _percent(sums["hallucinated"], sums["nouns"], start),
            "Cover": _percent(sums["covered"], sums["truth"], start),
            "Hal": round(100 - 100 * clean / (sums["captions"] + start), 1),
            "Cog": _percent(sums["cognised"], sums["expected"], start),
        }
    if sums["questions"]:
        precision = _percent(sums["right_no"], sums["said_no"], start)
        recall = _percent(sums["right_no"], sums["truth_no"], start)
        numbers |= {
            "Accuracy": _percent(sums["right"], sums["questions"], start),
            "Precision": precision,
            "Recall": recall,
            "F1": round(2 * precision * recall / (precision + recall + 100 * slack), 1),
        }
    return numbers


def _percent(part: float, whole: float, start: float) -> float:
    return round(100 * part / (whole + start), 1)


def _slots(words: Sequence[str], vocabulary: Vocabulary) -> list[tuple[str, int]]:
    """Look-up order of the published rule: all associates first, then the words themselves."""
    associates = [
        (other, index)
        for index, word in enumerate(words)
        for other in vocabulary.associates.get(word, ())
    ]
    return associates + [(word, index) for index, word in enumerate(words)]


def _first(slots: Sequence[tuple[str, int]], noun: str, similarity: Similarity) -> int | None:
    return next((index for word, index in slots if similarity(noun, word) > SIMILAR), None)


def _f1(c: dict[str, Floats]) -> Floats:
    return harmonic_mean(ratio(c["right_no"], c["said_no"]), ratio(c["right_no"], c["truth_no"]))


AMBER_METRICS = MetricSet(
    columns=(
        "captions",
        "hallucinating",
        "nouns",
        "hallucinated",
        "covered",
        "truth",
        "cognised",
        "expected",
        "questions",
        "right",
        "said_no",
        "truth_no",
        "right_no",
        "said_yes",
        "unread",
    ),
    formulas={
        "CHAIR": lambda c: ratio(c["hallucinated"], c["nouns"]),
        "Cover": lambda c: ratio(c["covered"], c["truth"]),
        "Hal": lambda c: ratio(c["hallucinating"], c["captions"]),
        "Cog": lambda c: ratio(c["cognised"], c["expected"]),
        "accuracy": lambda c: ratio(c["right"], c["questions"]),
        "precision": lambda c: ratio(c["right_no"], c["said_no"]),
        "recall": lambda c: ratio(c["right_no"], c["truth_no"]),
        "f1": lambda c: _f1(c),
        "amber_score": lambda c: (1 - ratio(c["hallucinated"], c["nouns"]) + _f1(c)) / 2,
        "yes_ratio": lambda c: ratio(c["said_yes"], c["questions"]),
        "unparsed": lambda c: c["unread"],
        "n": lambda c: c["captions"] + c["questions"],
    },
    integers=frozenset({"unparsed", "n"}),
    higher_is_better={
        "CHAIR": False,
        "Cover": True,
        "Hal": False,
        "Cog": False,
        "accuracy": True,
        "precision": True,
        "recall": True,
        "f1": True,
        "amber_score": True,
    },
)
"""Metrics of AMBER, fractions in 0-1; "no" is the positive class of the questions."""
