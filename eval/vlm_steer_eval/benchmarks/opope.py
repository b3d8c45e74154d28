"""OPOPE: POPE's questions answered by one caption per image (HALC, arXiv 2403.00425).

An object is taken for a "yes" when the caption mentions it. `table` reads captions as CHAIR does.
`halc` is the published rule: any word of the object's name occurs anywhere in the caption, so that
"hot dog" is mentioned by "hot" and "cat" by "cattle".
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer_eval.choices import Missing, OpopeReader
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import Floats, MetricSet, ratio, summarise

from .chair import TableNormaliser
from .pope import POPE_METRICS, Answer, parse_answer, pope_counts
from .questions import PopeQuestion, check_answered, load_questions
from .scoring import load_captions, summarise_parts, write_scores
from .vocabulary import ObjectVocabulary, plural

__all__ = ["OPOPE_METRICS", "mentions_by_table", "mentions_by_word", "score_opope"]

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
    objects = {question.id: _object(questions, question) for question in asked}
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
    rule = mentions_by_word if reader == "halc" else mentions_by_table(ObjectVocabulary.coco())
    said: list[Answer] = ["yes" if rule(objects[q.id], given[q.cluster]) else "no" for q in kept]
    counts = [
        pope_counts(parse_answer("official", answer, q.label))
        for q, answer in zip(kept, said, strict=True)
    ]
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


def _object(path: Path, question: PopeQuestion) -> str:
    found = _QUESTION.match(question.text)
    if found is None:
        raise DataError(
            f"{path}, question {question.id}: {question.text!r} names no object; expected a "
            "question such as 'Is there a dog in the image?'"
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
