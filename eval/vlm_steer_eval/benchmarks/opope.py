"""OPOPE: POPE's questions answered by one caption per image (HALC, arXiv 2403.00425).

An object is taken for a "yes" when the caption mentions it. `table` reads captions as CHAIR does.
`halc` is the published rule: any word of the object's name occurs anywhere in the caption, so that
"hot dog" is mentioned by "hot" and "cat" by "cattle".
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer_eval.choices import Missing, OpopeReader
from vlm_steer_eval.running.images import ImageSource
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import Floats, MetricSet, ratio, summarise

from .chair import TableNormaliser
from .pope import POPE_METRICS, Answer, parse_answer, pope_counts
from .questions import check_answered, load_questions
from .scoring import load_captions, summarise_parts, write_scores
from .tasks import Item, Scored
from .vocabulary import ObjectVocabulary, plural

__all__ = [
    "OPOPE_METRICS",
    "OpopeTask",
    "mentions_by_table",
    "mentions_by_word",
    "opope_task",
    "score_opope",
]

Mentions = Callable[[str, str], bool]

_QUESTION = re.compile(r"^Is there (?:an? )?(.+?) in (?:the|this) iman?ge\?", re.IGNORECASE)
_BETA = 0.2


def mentions_by_word(name: str, caption: str) -> bool:
    """The published rule."""
    return any(word in caption for word in name.split(" "))


def mentions_by_table(vocabulary: ObjectVocabulary) -> Mentions:
    """Objects of the vocabulary as CHAIR reads them; other names as whole words or plurals."""
    normaliser = TableNormaliser(vocabulary)
    names = frozenset(vocabulary.surfaces.values())

    def mentions(name: str, caption: str) -> bool:
        if name in names:
            return any(m.object == name for m in normaliser.read(caption).mentions)
        forms = "|".join(re.escape(form) for form in (name, plural(name)))
        return re.search(rf"\b(?:{forms})\b", caption, re.IGNORECASE) is not None

    return mentions


def score_opope(
    captions: Path,
    questions: Path,
    *,
    reader: OpopeReader = "table",
    output: Path | None = None,
    missing: Missing = "error",
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score captions by POPE's questions.

    Args:
        captions: rows with `image_id` (or `image`) and `caption` (or `text`, `answer`), one per
            image.
        questions: POPE-format file with labels.
        reader: how captions are read.
        output: folder for `scores.json`, `samples.jsonl`, `counts.jsonl` and `table.txt`; None
            writes nothing.
        missing: what to do about questions without a caption: stop, or leave them out and count
            them.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        The contents of `scores.json`.

    Raises:
        DataError: a file cannot be used, or images lack a caption.
    """
    asked = load_questions(questions)
    objects = {q.id: _object(q.text, f"{questions}, question {q.id}") for q in asked}
    given = _by_image(captions)
    silent = check_answered(
        captions,
        given,
        sorted({question.cluster for question in asked}),
        asked=f"images of {questions}",
        id_name="image ",
        answer="caption",
        advice="produce them, or pass --missing exclude to leave their questions out",
        missing=missing,
    )
    kept = [question for question in asked if question.cluster in given]
    rule = _rule(reader, ObjectVocabulary.coco())
    said: list[Answer] = ["yes" if rule(objects[q.id], given[q.cluster]) else "no" for q in kept]
    counts = [_counts(answer, q.label) for q, answer in zip(kept, said, strict=True)]
    clusters = [question.cluster for question in kept]
    result: dict[str, Any] = {
        "benchmark": "opope",
        "reader": reader,
        "n": len(kept),
        "n_images": len(set(clusters)),
        "metrics": summarise(OPOPE_METRICS, counts, clusters, n_resamples=n_resamples, seed=seed),
        "images_without_caption": silent,
    }
    parts = [question.category for question in kept]
    if any(parts):
        result["categories"] = summarise_parts(
            OPOPE_METRICS, counts, clusters, parts, n_resamples, seed
        )
    if output is not None:
        samples = [
            {
                "question_id": question.id,
                "image": question.image,
                "object": objects[question.id],
                "label": question.label,
                "text": given[question.cluster],
                "parsed": answer,
            }
            for question, answer in zip(kept, said, strict=True)
        ]
        units = [
            Unit(question.id, question.cluster, question.category, row)
            for question, row in zip(kept, counts, strict=True)
        ]
        write_scores(output, result, samples, units, f"OPOPE, reader {reader}, n = {len(kept)}")
    return result


def _rule(reader: OpopeReader, vocabulary: ObjectVocabulary) -> Mentions:
    return mentions_by_word if reader == "halc" else mentions_by_table(vocabulary)


def _counts(said: Answer, label: Answer) -> list[int]:
    return pope_counts(parse_answer("official", said, label))


def _object(text: str, where: str) -> str:
    found = _QUESTION.match(text)
    if found is None:
        raise DataError(
            f"{where}: {text!r} names no object; expected a question such as 'Is there a dog in "
            "the image?'"
        )
    return found.group(1)


def _by_image(path: Path) -> dict[str, str]:
    given: dict[str, str] = {}
    for image, text in load_captions(path):
        if image in given:
            raise DataError(f"{path} has two captions of image {image}; keep one")
        given[image] = text
    return given


def _f_beta(c: dict[str, Floats]) -> Floats:
    weight = _BETA**2
    return ratio((1 + weight) * c["TP"], (1 + weight) * c["TP"] + weight * c["FN"] + c["FP"])


_SHARED: Sequence[str] = ("accuracy", "precision", "recall", "f1")

OPOPE_METRICS = MetricSet(
    columns=POPE_METRICS.columns,
    formulas={
        **{name: POPE_METRICS.formulas[name] for name in _SHARED},
        "f_0.2": _f_beta,
        "yes_ratio": POPE_METRICS.formulas["yes_ratio"],
    },
    higher_is_better={**dict.fromkeys(_SHARED, True), "f_0.2": True},
)
"""Metrics of OPOPE; F with beta 0.2 leans to precision, as captions cannot name everything."""


@dataclass(frozen=True)
class _Asked:
    """One of the questions that a caption answers."""

    id: str
    object: str
    label: Answer
    part: str


@dataclass(frozen=True)
class OpopeTask:
    """Captions that answer questions; `gold["questions"]` are those about the image.

    Attributes:
        items: one per image.
        mentions: whether a caption mentions an object.
        reader: the name of that rule.
    """

    items: Sequence[Item]
    mentions: Mentions
    reader: OpopeReader
    name: str = "opope"
    metrics: MetricSet = OPOPE_METRICS
    first_token_words: None = None

    @property
    def scoring(self) -> Mapping[str, Any]:
        """How captions are read."""
        return {"reader": self.reader}

    def score(self, item: Item, text: str) -> Scored:
        """Answer the questions about one image by its caption."""
        asked: Sequence[_Asked] = item.gold["questions"]
        said: dict[str, Answer] = {
            question.id: "yes" if self.mentions(question.object, text) else "no"
            for question in asked
        }
        rows = [_counts(said[question.id], question.label) for question in asked]
        right = sum(said[question.id] == question.label for question in asked)
        note = f"{right} of {len(asked)} questions right"
        sums = [sum(column) for column in zip(*rows, strict=True)]
        return Scored(sums, {"said": said, "note": note})

    def units(self, scores: Mapping[str, Scored]) -> list[Unit]:
        """One unit per question."""
        return [
            Unit(
                question.id,
                item.cluster,
                question.part,
                _counts(scores[item.id].details["said"][question.id], question.label),
            )
            for item in self.items
            if item.id in scores
            for question in item.gold["questions"]
        ]


def opope_task(
    questions: Sequence[Item],
    *,
    prompt: str,
    reader: OpopeReader = "table",
    vocabulary: ObjectVocabulary | None = None,
) -> OpopeTask:
    """Captions of the images that yes/no questions about objects are about.

    Args:
        questions: items with `gold["label"]` of POPE, one caption is written for all about an
            image.
        prompt: what the user says instead of them.
        reader: how captions are read.
        vocabulary: the objects that `table` knows; those of COCO by default.

    Raises:
        DataError: a question names no object.
    """
    by_image: dict[ImageSource, list[Item]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    seen: Counter[str] = Counter()
    items = []
    for image, group in by_image.items():
        cluster = group[0].cluster
        seen[cluster] += 1
        asked = [
            _Asked(q.id, _object(q.prompt, f"question {q.id}"), q.gold["label"], q.split)
            for q in group
        ]
        present = dict.fromkeys(q.object for q in asked if q.label == "yes")
        items.append(
            Item(
                id=cluster if seen[cluster] == 1 else f"{cluster} ({seen[cluster]})",
                image=image,
                prompt=prompt,
                split="all",
                cluster=cluster,
                gold={"questions": asked, "truth": ", ".join(present)},
            )
        )
    return OpopeTask(items, _rule(reader, vocabulary or ObjectVocabulary.coco()), reader)
