"""What a benchmark is made of: items to generate for, and a rule that scores each answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vlm_steer_eval.running.images import ImageSource, NoImage
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import MetricSet

from .chair import CHAIR_METRICS, Normaliser, score_caption
from .pope import POPE_METRICS, Answer, parse_answer, pope_counts
from .scoring import caption_row

__all__ = ["YES_NO", "ChairTask", "Item", "OneUnitPerItem", "PopeTask", "Scored", "Task"]


YES_NO: tuple[Sequence[str], Sequence[str]] = (("yes", "Yes"), ("no", "No"))
"""What the first token of an answer to a yes/no question is."""


@dataclass(frozen=True)
class Item:
    """One thing to generate for.

    Attributes:
        id: unique within the task; scores are joined by it.
        image: the image; `NoImage()` for a question that is asked without one.
        prompt: what the user says, without the image and the chat template.
        split: the part of the benchmark it belongs to.
        cluster: the image's key, the unit of resampling.
        gold: what the scorer needs to know.
        after: id of the item whose conversation it continues; its answer is read first.
    """

    id: str
    image: ImageSource
    prompt: str
    split: str
    cluster: str
    gold: Mapping[str, Any] = field(default_factory=dict)
    after: str | None = None

    @property
    def has_image(self) -> bool:
        """Whether it is asked about an image."""
        return not isinstance(self.image, NoImage)


@dataclass(frozen=True)
class Scored:
    """A scored answer: its row of counts and what there is to show about it."""

    counts: Sequence[float]
    details: Mapping[str, Any]

    @property
    def outcome(self) -> tuple[Any, ...]:
        """How it counts, or was read where answers count in groups only."""
        return (*self.counts, self.details.get("parsed"), self.details.get("verdict"))


class Task(Protocol):
    """A benchmark: items, metrics, and the rule between them."""

    @property
    def name(self) -> str:
        """The benchmark's name."""
        ...

    @property
    def items(self) -> Sequence[Item]:
        """What to generate for, in a fixed order."""
        ...

    @property
    def metrics(self) -> MetricSet:
        """What its counts define."""
        ...

    @property
    def first_token_words(self) -> tuple[Sequence[str], Sequence[str]] | None:
        """Words whose log-probabilities at the first token are compared; None for free text.

        Items with a `gold["label"]` of yes or no are ranked by them.
        """
        ...

    @property
    def scoring(self) -> Mapping[str, Any]:
        """What the scores depend on beside the answers, as plain data."""
        ...

    def score(self, item: Item, text: str) -> Scored:
        """Score one answer."""
        ...

    def units(self, scores: Mapping[str, Scored]) -> list[Unit]:
        """What metrics are computed from, given scores by item id."""
        ...


class OneUnitPerItem:
    """Tasks whose answers count one by one."""

    items: Sequence[Item]

    def units(self, scores: Mapping[str, Scored]) -> list[Unit]:
        """One unit per scored item."""
        return [
            Unit(item.id, item.cluster, item.split, scores[item.id].counts)
            for item in self.items
            if item.id in scores
        ]


@dataclass(frozen=True)
class PopeTask(OneUnitPerItem):
    """Yes/no questions about objects; `gold["label"]` is the answer.

    Attributes:
        items: one per question.
        parser: reading rule, a name in `PARSERS`.
    """

    items: Sequence[Item]
    parser: str = "robust"
    name: str = "pope"
    metrics: MetricSet = POPE_METRICS
    first_token_words: tuple[Sequence[str], Sequence[str]] = YES_NO

    @property
    def scoring(self) -> Mapping[str, Any]:
        """The parser's name."""
        return {"parser": self.parser}

    def score(self, item: Item, text: str) -> Scored:
        """Parse one answer."""
        label: Answer = "yes" if item.gold["label"] == "yes" else "no"
        verdict = parse_answer(self.parser, text, label)
        return Scored(
            pope_counts(verdict), {"label": label, "parsed": verdict.answer, "cell": verdict.cell}
        )


@dataclass(frozen=True)
class ChairTask(OneUnitPerItem):
    """Captions; `gold["objects"]` are the image's objects.

    Attributes:
        items: one per image.
        normaliser: reads the captions.
    """

    items: Sequence[Item]
    normaliser: Normaliser
    name: str = "chair"
    metrics: MetricSet = CHAIR_METRICS
    first_token_words: None = None

    @property
    def scoring(self) -> Mapping[str, Any]:
        """The normaliser's name."""
        return {"normaliser": self.normaliser.name}

    def score(self, item: Item, text: str) -> Scored:
        """Mark the hallucinated mentions of one caption."""
        score = score_caption(self.normaliser.read(text), frozenset(item.gold["objects"]))
        return Scored(score.counts(), caption_row(score))
