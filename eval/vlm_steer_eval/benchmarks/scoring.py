"""Scores for answers and captions that anybody produced, from files alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.choices import Missing, UnknownImages
from vlm_steer_eval.files import image_key, read_rows, write_json, write_rows, write_text
from vlm_steer_eval.reports.tables import metric_table, render
from vlm_steer_eval.statistics.counts import COUNTS_NAME, Unit, write_units
from vlm_steer_eval.statistics.metrics import MetricSet, ratio, summarise

from .chair import CHAIR_METRICS, CaptionScore, Mention, Normaliser, TableNormaliser, score_caption
from .chair_opera import load_opera_normaliser
from .objects import load_object_sets, objects_from_annotations
from .pope import PARSERS, POPE_METRICS, Verdict, parse_answer, pope_counts
from .questions import PopeQuestion, check_answered, list_some, load_answers, load_questions
from .vocabulary import ObjectVocabulary

__all__ = [
    "EDITED_PAIR",
    "PAIR_METRICS",
    "SCORED",
    "caption_row",
    "load_captions",
    "make_normaliser",
    "pair_rows",
    "parser_sensitivity",
    "score_chair",
    "score_pope",
    "summarise_parts",
    "write_scores",
]

SCORED = "scored"
"""Name of the only arm of scored answers."""


EDITED_PAIR = frozenset({"original", "removed"})
"""The parts of POPEv2."""

PAIR_METRICS = MetricSet(
    columns=("pairs", "right"),
    formulas={"pair_accuracy": lambda c: ratio(c["right"], c["pairs"])},
    higher_is_better={"pair_accuracy": True},
)
"""How often both the picture and the one without its object were answered correctly."""


@dataclass(frozen=True)
class _Caption:
    image: str
    text: str
    score: CaptionScore


def score_pope(
    questions: Path,
    answers: Path,
    *,
    parser: str = "robust",
    output: Path | None = None,
    missing: Missing = "error",
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score yes/no answers against a POPE question file.

    Args:
        questions: POPE-format file with labels.
        answers: rows with `question_id` and the text under `answer` or `text`. Answers to questions
            that the question file lacks are ignored and counted, so that one file of answers serves
            several label sets.
        parser: reading rule, a name in `PARSERS`.
        output: folder for `scores.json`, `samples.jsonl`, `counts.jsonl` and `table.txt`; None
            writes nothing.
        missing: what to do about questions without an answer: stop, or leave them out and count
            them.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        The contents of `scores.json`.

    Raises:
        ConfigError: no such parser.
        DataError: a file cannot be used, or questions lack an answer.
    """
    if parser not in PARSERS:
        raise ConfigError(f"parser {parser!r} is unknown; choose one of {', '.join(PARSERS)}")
    asked, given = load_questions(questions, dialogues=True), load_answers(answers)
    unanswered = check_answered(
        answers,
        given,
        [question.id for question in asked],
        asked=f"questions of {questions}",
        id_name="question_id ",
        advice="produce them, or pass --missing exclude to leave these questions out",
        missing=missing,
    )
    kept = [question for question in asked if question.id in given]
    if all(given[question.id] == question.text for question in kept):
        raise DataError(
            f"{answers} holds the questions of {questions}, not answers to them; give the file "
            "with the model's answers"
        )
    verdicts = [parse_answer(parser, given[q.id], q.label) for q in kept]
    clusters = [question.cluster for question in kept]
    counts = [pope_counts(verdict) for verdict in verdicts]
    result: dict[str, Any] = {
        "benchmark": "pope",
        "parser": parser,
        "n": len(kept),
        "n_images": len(set(clusters)),
        "metrics": summarise(POPE_METRICS, counts, clusters, n_resamples=n_resamples, seed=seed),
        "parsers": parser_sensitivity([given[q.id] for q in kept], [q.label for q in kept]),
        "unanswered": unanswered,
        "unused_answers": len(given.keys() - {question.id for question in asked}),
    }
    if any(question.category for question in kept):
        result["categories"] = summarise_parts(
            POPE_METRICS, counts, clusters, [q.category for q in kept], n_resamples, seed
        )
    if {question.category for question in kept} == EDITED_PAIR:
        pairs = pair_rows(clusters, [verdict.cell in ("TP", "TN") for verdict in verdicts])
        if pairs:
            found = summarise(
                PAIR_METRICS, list(pairs.values()), list(pairs), n_resamples=n_resamples, seed=seed
            )
            result["pairs"] = {"n": len(pairs), "metrics": found}
    if output is not None:
        rows = [_pope_row(q, given[q.id], v) for q, v in zip(kept, verdicts, strict=True)]
        units = [
            Unit(q.id, q.cluster, q.category, row) for q, row in zip(kept, counts, strict=True)
        ]
        write_scores(output, result, rows, units, f"POPE, parser {parser}, n = {len(kept)}")
    return result


def pair_rows(clusters: Sequence[str], right: Sequence[bool]) -> dict[str, list[int]]:
    """Image -> a row of `PAIR_METRICS.columns`, of answers about it and about it without an object.

    Args:
        clusters: the image of each answer; those with two answers are pairs.
        right: whether each answer is right.
    """
    found: dict[str, list[bool]] = {}
    for image, is_right in zip(clusters, right, strict=True):
        found.setdefault(image, []).append(is_right)
    return {image: [1, int(all(both))] for image, both in found.items() if len(both) == 2}


def parser_sensitivity(texts: Sequence[str], labels: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """What every parser would have reported on the same texts: accuracy, F1 and unread answers."""
    table: dict[str, dict[str, Any]] = {}
    for name in PARSERS:
        rows = [
            pope_counts(parse_answer(name, text, label))
            for text, label in zip(texts, labels, strict=True)
        ]
        values = summarise(POPE_METRICS, rows, ["all"] * len(rows), n_resamples=1)
        table[name] = {key: values[key]["value"] for key in ("accuracy", "f1", "unparsed")}
    return table


def score_chair(
    captions: Path,
    *,
    objects: Path | None = None,
    annotations: Path | None = None,
    synonyms: Path | None = None,
    normaliser: str = "table",
    lemmas: Path | None = None,
    output: Path | None = None,
    unknown_images: UnknownImages | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score captions against the objects of their images.

    Args:
        captions: rows with `image_id` (or `image`) and `caption` (or `text`, `answer`).
        objects: object sets per image; see `load_object_sets`. Exclusive with `annotations`.
        annotations: folder of COCO annotations; see `objects_from_annotations`.
        synonyms: the vocabulary of surfaces. `opera` needs one; `table` then uses its surfaces with
            plurals instead of the shipped table.
        normaliser: `table` or `opera`.
        lemmas: lemmas for `opera` instead of nltk's; see `load_opera_normaliser`.
        output: folder for `scores.json`, `samples.jsonl`, `counts.jsonl` and `table.txt`; None
            writes nothing.
        unknown_images: captions of images without ground truth stop the scoring (`error`), count as
            images without objects (`empty`, as published code does) or are left out (`exclude`).
            The default is `empty` under `opera` and `error` under `table`.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        The contents of `scores.json`.

    Raises:
        ConfigError: contradictory options, or nltk or its data are absent.
        DataError: a file cannot be used, or an image has no ground truth.
    """
    if (objects is None) == (annotations is None):
        raise ConfigError("give either --objects FILE or --annotations DIR, and not both")
    reader = make_normaliser(normaliser, synonyms, lemmas)
    rows = load_captions(captions)
    images = {image for image, _ in rows}
    if objects is not None:
        truth = load_object_sets(objects)
    elif annotations is not None:
        truth = objects_from_annotations(annotations, reader, images)
    unknown = sorted(images - truth.keys())
    policy = unknown_images or ("empty" if normaliser == "opera" else "error")
    if unknown and (policy == "error" or len(unknown) == len(images)):
        raise DataError(
            f"{objects or annotations} knows nothing about {len(unknown)} of the {len(images)} "
            f"captioned images ({list_some(unknown)}); give annotations that cover them, or pass "
            "--unknown-images "
            "exclude (leave them out) or empty (count all their objects as hallucinated)"
        )
    if policy == "exclude":
        rows = [row for row in rows if row[0] in truth]
    scored = [
        _Caption(image, text, score_caption(reader.read(text), truth.get(image, frozenset())))
        for image, text in rows
    ]
    repeated = [image for image, count in Counter(c.image for c in scored).items() if count > 1]
    result: dict[str, Any] = {
        "benchmark": "chair",
        "normaliser": reader.name,
        "n_images": len({caption.image for caption in scored}),
        "metrics": summarise(
            CHAIR_METRICS,
            [caption.score.counts() for caption in scored],
            [caption.image for caption in scored],
            n_resamples=n_resamples,
            seed=seed,
        ),
        "empty_captions": sum(not caption.text.strip() for caption in scored),
        "images_with_several_captions": len(repeated),
        "unknown_images": {"policy": policy, "images": unknown},
    }
    if output is not None:
        samples = [
            {"image_id": caption.image, "caption": caption.text, **caption_row(caption.score)}
            for caption in scored
        ]
        title = f"CHAIR, normaliser {normaliser}, n = {len(scored)}"
        write_scores(output, result, samples, _caption_units(scored), title)
    return result


def _caption_units(scored: Sequence[_Caption]) -> list[Unit]:
    """One unit per caption; further captions of an image are numbered."""
    seen: Counter[str] = Counter()
    units = []
    for caption in scored:
        seen[caption.image] += 1
        again = seen[caption.image]
        name = caption.image if again == 1 else f"{caption.image} ({again})"
        units.append(Unit(name, caption.image, "", caption.score.counts()))
    return units


def make_normaliser(name: str, synonyms: Path | None, lemmas: Path | None = None) -> Normaliser:
    """The normaliser of that name.

    Args:
        name: `table` or `opera`.
        synonyms: the vocabulary of surfaces, see `score_chair`.
        lemmas: lemmas for `opera`, see `load_opera_normaliser`.

    Raises:
        ConfigError: no such normaliser, or something it needs is absent.
        DataError: a file cannot be used.
    """
    if name == "table":
        if lemmas is not None:
            raise ConfigError("--lemmas has no effect on --normaliser table; give opera")
        if synonyms is None:
            return TableNormaliser(ObjectVocabulary.coco())
        return TableNormaliser(ObjectVocabulary.from_synonyms(synonyms))
    if name == "opera":
        if synonyms is None:
            raise ConfigError("--normaliser opera needs --synonyms, the synonyms file of CHAIR")
        return load_opera_normaliser(synonyms, lemmas)
    raise ConfigError(f"normaliser {name!r} is unknown; choose table or opera")


def caption_row(score: CaptionScore) -> dict[str, Any]:
    """A scored caption as plain data: mentions, truth and counts."""
    hallucinated = set(map(id, score.hallucinated))
    return {
        "mentions": [_mention_row(m, id(m) in hallucinated) for m in score.reading.mentions],
        "objects": sorted(score.truth),
        "words": len(score.reading.words),
        "hallucinated": len(score.hallucinated),
    }


def _mention_row(mention: Mention, hallucinated: bool) -> dict[str, Any]:
    return {
        "surface": mention.surface,
        "object": mention.object,
        "span": mention.span,
        "token": mention.token,
        "word": mention.word,
        "hallucinated": hallucinated,
    }


def _pope_row(question: PopeQuestion, text: str, verdict: Verdict) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "image": question.image,
        "question": question.text,
        "label": question.label,
        "text": text,
        "parsed": verdict.answer,
        "cell": verdict.cell,
    }


def summarise_parts(
    metrics: MetricSet,
    counts: Sequence[Sequence[float]],
    clusters: Sequence[str],
    parts: Sequence[str],
    n_resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """The metrics of every part of a benchmark by itself, in order of appearance.

    Args:
        metrics: what to compute.
        counts: one row of counts per item.
        clusters: the image of each item.
        parts: the part of each item.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        part -> `{"n": items, "metrics": ...}`.
    """
    table: dict[str, dict[str, Any]] = {}
    for part in dict.fromkeys(parts):
        chosen = [index for index, name in enumerate(parts) if name == part]
        table[part] = {
            "n": len(chosen),
            "metrics": summarise(
                metrics,
                [counts[i] for i in chosen],
                [clusters[i] for i in chosen],
                n_resamples=n_resamples,
                seed=seed,
            ),
        }
    return table


def load_captions(path: Path) -> list[tuple[str, str]]:
    """Image keys and captions, in the order of the file.

    Raises:
        DataError: the file is malformed.
    """
    captions: list[tuple[str, str]] = []
    for number, row in enumerate(read_rows(path), 1):
        image = next((row[key] for key in ("image_id", "image") if row.get(key) is not None), None)
        text = next((row[key] for key in ("caption", "text", "answer") if key in row), None)
        if image is None or not isinstance(text, str):
            raise DataError(
                f"{path}, row {number}: expected 'image_id' (or 'image') and 'caption' (or 'text', "
                f"'answer'), found the keys {sorted(row)}"
            )
        captions.append((image_key(image), text))
    return captions


def write_scores(
    output: Path,
    result: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    units: Sequence[Unit],
    title: str,
) -> None:
    """Write `scores.json`, `samples.jsonl`, `counts.jsonl` and `table.txt` of scored answers.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    write_json(output / "scores.json", result)
    write_rows(output / "samples.jsonl", samples)
    write_units(output / COUNTS_NAME, {SCORED: units})
    write_text(output / "table.txt", render(metric_table(result["metrics"], title)))
