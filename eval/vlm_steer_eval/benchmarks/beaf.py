"""BEAF: the same questions before and after an object is taken out of the picture (ECCV 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer_eval.choices import BeafParser
from vlm_steer_eval.files import read_rows
from vlm_steer_eval.running.images import FileImage
from vlm_steer_eval.running.sources import require_folder, subset
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import MetricSet, harmonic_mean, ratio, summarise

from .pope import Answer, parse_answer
from .questions import check_answered, list_some, load_texts, refuse_duplicates
from .scoring import write_scores
from .tasks import YES_NO, Item, Scored

__all__ = [
    "BEAF_METRICS",
    "BeafQuestion",
    "BeafTask",
    "beaf_counts",
    "beaf_task",
    "load_beaf",
    "score_beaf",
]


@dataclass(frozen=True)
class BeafQuestion:
    """One question.

    Attributes:
        id: unique.
        image: the picture.
        text: the question, equal before and after.
        label: the true answer.
        is_original: whether the picture is the untouched one.
        is_removed: whether it asks about the object that was taken out.
    """

    id: str
    image: str
    text: str
    label: Answer
    is_original: bool
    is_removed: bool

    @property
    def original(self) -> str:
        """The untouched picture: `x.jpg` of `x_03.jpg`."""
        if self.is_original:
            return self.image
        stem, dot, suffix = self.image.rpartition(".")
        return f"{(stem or suffix).rpartition('_')[0]}{dot}{suffix if stem else ''}"


def load_beaf(path: Path) -> list[BeafQuestion]:
    """Rows with `id`, `image`, `question`, `gt`, `orig_img` and `removed_q`.

    Raises:
        DataError: the file is malformed, an id occurs twice, or a question about an edited picture
            lacks the same question about the original.
    """
    questions = []
    for number, row in enumerate(read_rows(path), 1):
        label = str(row.get("gt")).strip().lower()
        flags = (row.get("orig_img"), row.get("removed_q"))
        is_asked = row.get("image") and isinstance(row.get("question"), str)
        known = row.get("id") is not None and is_asked
        if not known or label not in ("yes", "no") or not all(isinstance(f, bool) for f in flags):
            raise DataError(
                f"{path}, row {number}: expected id, image, question, gt (yes or no), orig_img and "
                f"removed_q (true or false), found {row!r}"
            )
        questions.append(
            BeafQuestion(
                str(row["id"]),
                str(row["image"]),
                row["question"],
                "yes" if label == "yes" else "no",
                bool(row["orig_img"]),
                bool(row["removed_q"]),
            )
        )
    refuse_duplicates(path, [question.id for question in questions])
    before = {(q.image, q.text) for q in questions if q.is_original}
    alone = [q.id for q in questions if (q.original, q.text) not in before]
    if alone:
        raise DataError(
            f"{path}: {len(alone)} questions about edited pictures ({list_some(alone)}) are not "
            "asked about the original; give the whole file"
        )
    return questions


def beaf_counts(
    questions: Sequence[BeafQuestion], answers: Sequence[Answer | None]
) -> list[list[int]]:
    """One row of `BEAF_METRICS.columns` per question; changes are counted at the edited picture."""
    read = {
        (question.image, question.text): answer
        for question, answer in zip(questions, answers, strict=True)
    }
    labels = {(question.image, question.text): question.label for question in questions}
    rows = []
    for question in questions:
        after = read[question.image, question.text]
        row = [int((after, question.label) == cell) for cell in _CELLS]
        row += [1, int(after is None)]
        if question.is_original:
            rows.append([*row, *[0] * 7])
            continue
        key = (question.original, question.text)
        before = read[key]
        changed = (before == labels[key]) != (after == question.label)
        removed = question.is_removed
        row += [int(removed)]
        row += [int(removed and (before, after) == pair) for pair in _CHANGES]
        rows.append([*row, int(not removed), int(not removed and changed)])
    return rows


def score_beaf(
    questions: Path,
    answers: Path,
    *,
    parser: BeafParser = "robust",
    output: Path | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score answers to BEAF.

    Args:
        questions: see `load_beaf`.
        answers: rows with `id` and the text under `answer` or `text`.
        parser: how answers are read. `official` finds "yes", else "no", anywhere, and repeats the
            previous reading where it finds neither, as published.
        output: folder for `scores.json`, `samples.jsonl`, `counts.jsonl` and `table.txt`; None
            writes nothing.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        The contents of `scores.json`.

    Raises:
        DataError: a file cannot be used, or questions lack an answer.
    """
    asked = load_beaf(questions)
    given = load_texts(answers, ("id", "question_id"), ("answer", "text"))
    check_answered(
        answers,
        given,
        [question.id for question in asked],
        asked=f"questions of {questions}",
        id_name="id ",
        advice="changes can only be counted between answered questions, so produce them",
    )
    read = _read([given[question.id] for question in asked], parser)
    counts = beaf_counts(asked, read)
    clusters = [question.original for question in asked]
    result: dict[str, Any] = {
        "benchmark": "beaf",
        "parser": parser,
        "n": len(asked),
        "n_images": len(set(clusters)),
        "metrics": summarise(BEAF_METRICS, counts, clusters, n_resamples=n_resamples, seed=seed),
    }
    if output is not None:
        samples = [_sample(q, given[q.id], a) for q, a in zip(asked, read, strict=True)]
        units = [Unit(q.id, q.original, "", row) for q, row in zip(asked, counts, strict=True)]
        write_scores(output, result, samples, units, f"BEAF, parser {parser}, n = {len(asked)}")
    return result


def _sample(question: BeafQuestion, text: str, answer: Answer | None) -> Mapping[str, Any]:
    return {
        "id": question.id,
        "image": question.image,
        "question": question.text,
        "label": question.label,
        "original": question.is_original,
        "removed": question.is_removed,
        "text": text,
        "parsed": answer,
    }


def _read(texts: Sequence[str], parser: BeafParser) -> list[Answer | None]:
    return _in_order([_read_one(text, parser) for text in texts], parser)


def _read_one(text: str, parser: BeafParser) -> Answer | None:
    return parse_answer("robust" if parser == "robust" else "repope", text, "no").answer


def _in_order(found: Sequence[Answer | None], parser: BeafParser) -> list[Answer | None]:
    """The readings as they count: the published script repeats the one before an unread answer."""
    if parser == "robust":
        return list(found)
    read: list[Answer | None] = []
    for answer in found:
        read.append(answer or (read[-1] if read else None))
    return read


_CELLS = (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"))
# What was said about the object while it was there, and after it was gone.
_CHANGES = (("yes", "no"), ("no", "yes"), ("yes", "yes"), ("no", "no"))

BEAF_METRICS = MetricSet(
    columns=(
        "TP", "FP", "TN", "FN", "questions", "unread",
        "removed", "understood", "ignorant", "stubborn_yes", "stubborn_no", "untouched", "changed",
    ),
    formulas={
        "accuracy": lambda c: ratio(c["TP"] + c["TN"], c["questions"]),
        "precision": lambda c: ratio(c["TP"], c["TP"] + c["FP"]),
        "recall": lambda c: ratio(c["TP"], c["TP"] + c["FN"]),
        "f1": lambda c: harmonic_mean(
            ratio(c["TP"], c["TP"] + c["FP"]), ratio(c["TP"], c["TP"] + c["FN"])
        ),
        "TU": lambda c: ratio(c["understood"], c["removed"]),
        "IG": lambda c: ratio(c["ignorant"], c["removed"]),
        "SBp": lambda c: ratio(c["stubborn_yes"], c["removed"]),
        "SBn": lambda c: ratio(c["stubborn_no"], c["removed"]),
        "ID": lambda c: ratio(c["changed"], c["untouched"]),
        "F1_TUID": lambda c: harmonic_mean(
            ratio(c["understood"], c["removed"]), 1 - ratio(c["changed"], c["untouched"])
        ),
        "unparsed": lambda c: c["unread"],
    },
    integers=frozenset({"unparsed"}),
    higher_is_better={
        "accuracy": True, "precision": True, "recall": True, "f1": True,
        "TU": True, "IG": False, "SBp": False, "SBn": False, "ID": False, "F1_TUID": True,
    },
)  # fmt: skip
"""Metrics of BEAF, fractions: true understanding, ignorance, stubbornness, indecision."""


@dataclass(frozen=True)
class BeafTask:
    """Questions before and after an object is removed; `gold["question"]` is the question.

    Attributes:
        items: one per question, in the order of the file.
        parser: how answers are read. `parsed` in `samples.jsonl` is what the answer itself says;
            `official` counts the reading before it where it says nothing.
    """

    items: Sequence[Item]
    parser: BeafParser = "robust"
    name: str = "beaf"
    metrics: MetricSet = BEAF_METRICS
    first_token_words: tuple[Sequence[str], Sequence[str]] = YES_NO

    @property
    def scoring(self) -> Mapping[str, Any]:
        """The parser's name."""
        return {"parser": self.parser}

    def score(self, item: Item, text: str) -> Scored:
        """Read one answer."""
        read = _read_one(text, self.parser)
        return Scored((), {"label": item.gold["label"], "parsed": read})

    def units(self, scores: Mapping[str, Scored]) -> list[Unit]:
        """One unit per question; those about edited pictures need the original's answer."""
        answered = [item for item in self.items if item.id in scores]
        asked: list[BeafQuestion] = [item.gold["question"] for item in answered]
        read = _in_order([scores[item.id].details["parsed"] for item in answered], self.parser)
        known = {(question.image, question.text) for question in asked}
        whole = [i for i, q in enumerate(asked) if (q.original, q.text) in known]
        rows = beaf_counts([asked[i] for i in whole], [read[i] for i in whole])
        return [
            Unit(asked[i].id, asked[i].original, "all", row)
            for i, row in zip(whole, rows, strict=True)
        ]


def beaf_task(
    questions: Path,
    images: Path,
    *,
    parser: BeafParser = "robust",
    limit: int | None = None,
    seed: int = 0,
    suffix: str = "",
) -> BeafTask:
    """BEAF from its question file and the folder of original and edited pictures.

    Args:
        questions: see `load_beaf`.
        images: the folder.
        parser: how answers are read.
        limit: number of original pictures, each with its edited copies; None for all.
        seed: seed of their choice.
        suffix: appended to every question.

    Raises:
        DataError: the file is malformed, or the folder does not exist.
    """
    require_folder(images)
    asked = load_beaf(questions)
    chosen = set(subset((question.original for question in asked), limit, seed))
    items = [
        Item(
            id=question.id,
            image=FileImage(images / question.image),
            prompt=question.text + suffix,
            split="all",
            cluster=question.original,
            gold={"label": question.label, "question": question},
        )
        for question in asked
        if question.original in chosen
    ]
    return BeafTask(items, parser)
