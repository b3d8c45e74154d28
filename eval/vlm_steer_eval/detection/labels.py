"""Which words of a text the image does not support, told from ground truth.

Spans are characters of the text that the model wrote, and the tokens that write them are read off
its trace, so nothing is tokenised twice.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_steer.detection import Trace, Unit
from vlm_steer.errors import DataError
from vlm_steer_eval.benchmarks.chair import Mention, Normaliser
from vlm_steer_eval.benchmarks.pope import parse_answer
from vlm_steer_eval.benchmarks.tasks import ChairTask, Item, PopeTask
from vlm_steer_eval.files import image_key, read_rows
from vlm_steer_eval.running.images import FileImage

__all__ = [
    "AMBIGUOUS",
    "Labelled",
    "Mentions",
    "caption_labels",
    "labelled_texts",
    "mention_units",
    "pope_labels",
]

Mentions = Literal["first", "all", "text"]

AMBIGUOUS = frozenset({"table"})
"""Words that name another thing as often as their object: a side table is no dining table."""

_NEGATED = re.compile(
    r"\b(no|not|without|never|neither|nor|nothing|none|lacks?|lacking|absent|missing)\b|n['’]t\b",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(r"^\W*(is|are|was|were)\s+(not|absent|missing)\b|^\W*\w+n['’]t\b", re.I)
_HEDGED = re.compile(r"\b(may|might|could|possibly|perhaps|maybe|presumably)\b", re.IGNORECASE)
_CLAUSE = re.compile(r"[.!?;,:]|\bbut\b|\bwhile\b")
_QUOTES = '"“”«»'


@dataclass(frozen=True)
class Labelled:
    """Texts whose parts can be labelled.

    Attributes:
        name: What the labels are made from.
        items: What the model is asked; those with `gold["text"]` bring their text along.
        units: `units(trace, item)` are the labelled parts of a text.
    """

    name: str
    items: Sequence[Item]
    units: Callable[[Trace, Item], list[Unit]]


def mention_units(
    trace: Trace,
    normaliser: Normaliser,
    truth: Set[str] | None,
    *,
    mentions: Mentions = "first",
    ambiguous: Set[str] = AMBIGUOUS,
) -> list[Unit]:
    """The object mentions of a caption.

    Label 1 means that the image does not hold the object. Left open (-1) are mentions that are
    denied ("no cars"), hedged ("might be a dog") or quoted, and ambiguous words whose object is not
    there.

    Args:
        trace: of the caption.
        normaliser: reads the caption.
        truth: objects of the image; None leaves every label open.
        mentions: the `first` of each object, `all`, or the `text` as one unit, which is
            hallucinated where any mention is.
        ambiguous: surfaces that are no evidence of a hallucination.

    Raises:
        DataError: the normaliser rewrites the text, so its mentions have no place in it.
    """
    if mentions == "text":
        return _whole(trace, mention_units(trace, normaliser, truth, ambiguous=ambiguous))
    seen: Counter[str] = Counter()
    units = []
    for mention in normaliser.read(trace.text).mentions:
        if mention.span is None:
            raise DataError(
                f"the normaliser {normaliser.name} does not say where in a caption it found an "
                "object; label with --normaliser table"
            )
        occurrence = seen[mention.object]
        seen[mention.object] += 1
        tokens = trace.tokens_of(mention.span)
        if tokens[0] == tokens[1] or (mentions == "first" and occurrence):
            continue
        label = -1 if truth is None else _label(trace.text, mention, truth, ambiguous)
        units.append(Unit(tokens, mention.span, mention.object, mention.token, occurrence, label))
    return units


def _whole(trace: Trace, units: Sequence[Unit]) -> list[Unit]:
    """A text as one unit, whose place is its end: longer texts hold more mistakes."""
    labels = [unit.label for unit in units]
    label = 1 if 1 in labels else (0 if labels and set(labels) == {0} else -1)
    length = len(trace.text.split())
    return [Unit((0, trace.n_tokens), (0, len(trace.text)), word=length, label=label)]


def _label(text: str, mention: Mention, truth: Set[str], ambiguous: Set[str]) -> int:
    start, stop = mention.span or (0, 0)
    before = _CLAUSE.split(text[:start])[-1]
    denied = _NEGATED.search(before) or _DENIED_AFTER.search(text[stop:])
    quoted = sum(text[:start].count(quote) for quote in _QUOTES) % 2
    if denied or quoted or _HEDGED.search(before):
        return -1
    if mention.object in truth:
        return 0
    return -1 if mention.surface in ambiguous else 1


def caption_labels(task: ChairTask, *, mentions: Mentions = "first") -> Labelled:
    """Captions of images whose objects are known."""
    return Labelled(
        f"captions, {mentions} mentions",
        task.items,
        lambda trace, item: mention_units(
            trace, task.normaliser, frozenset(item.gold["objects"]), mentions=mentions
        ),
    )


def pope_labels(task: PopeTask) -> Labelled:
    """Answers to yes/no questions: the word yes or no, hallucinated where it is wrong."""

    def units(trace: Trace, item: Item) -> list[Unit]:
        found = re.search(r"\b(yes|no)\b", trace.text, re.IGNORECASE)
        if found is None:
            return []
        label = item.gold["label"]
        answer = parse_answer(task.parser, trace.text, label).answer
        tokens = trace.tokens_of(found.span())
        if answer not in ("yes", "no") or tokens[0] == tokens[1]:
            return []
        word = len(trace.text[: found.start()].split())
        return [Unit(tokens, found.span(), answer, word, 0, int(answer != label))]

    return Labelled("answers to yes/no questions", task.items, units)


def labelled_texts(path: Path, images: Path, prompt: str) -> Labelled:
    """Texts that somebody has labelled: rows with `image`, `text` and `spans`.

    Each span has `start`, `end` (characters, half-open) and `label`: `hallucinated`, `grounded` or
    `ignore`, or 1, 0, -1.

    Raises:
        DataError: a row is malformed; the message names it.
    """
    items = []
    known: dict[str, int] = {}
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path}, row {number}"
        name = str(row.get("id", number))
        if known.setdefault(name, number) != number:
            raise DataError(
                f"{where}: the id {name!r} is that of row {known[name]} too; give every text its "
                "own, or none"
            )
        try:
            text, image = str(row["text"]), str(row["image"])
            spans = [_span(span, text, where) for span in row["spans"]]
            if not text.strip():
                raise DataError(f"{where}: the text is empty")
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{where}: expected image, text and spans of start, end and label ({error!r})"
            ) from error
        items.append(
            Item(
                id=name,
                image=FileImage(images / image),
                prompt=str(row.get("prompt", prompt)),
                split="all",
                cluster=image_key(image),
                gold={"text": text, "spans": spans},
            )
        )
    return Labelled("labelled texts", items, _given_units)


_LABELS: Mapping[Any, int] = {"hallucinated": 1, "grounded": 0, "ignore": -1, 1: 1, 0: 0, -1: -1}


def _span(span: Mapping[str, Any], text: str, where: str) -> tuple[int, int, int]:
    start, end, label = span["start"], span["end"], span["label"]
    if label not in tuple(_LABELS):
        raise DataError(f"{where}: the label {label!r} is none of hallucinated, grounded, ignore")
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
        raise DataError(
            f"{where}: the span from {start!r} to {end!r} does not lie in the text, which has "
            f"{len(text)} characters, counted from 0"
        )
    return start, end, _LABELS[label]


def _given_units(trace: Trace, item: Item) -> list[Unit]:
    # The decoded text may have gained or lost white space in front.
    shift = trace.text.find(item.gold["text"].strip())
    lead = len(item.gold["text"]) - len(item.gold["text"].lstrip())
    if shift < 0:
        raise DataError(
            f"item {item.id}: the tokenizer does not give the text back that it was given; a "
            "character of it is unknown to the model"
        )
    units, seen = [], Counter[str]()
    for start, end, label in sorted(item.gold["spans"]):
        span = (max(start - lead + shift, 0), end - lead + shift)
        tokens = trace.tokens_of(span)
        name = trace.text[slice(*span)].strip().lower()
        if tokens[0] < tokens[1]:
            word = len(trace.text[: span[0]].split())
            units.append(Unit(tokens, span, name, word, seen[name], label))
        seen[name] += 1
    return units
