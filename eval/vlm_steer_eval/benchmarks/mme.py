"""MME: two yes/no questions per image, fourteen tasks (arXiv 2306.13394).

A task's score is 100 times accuracy plus 100 times the share of images with both answers right, so
at most 200. The hallucination subset that papers report is existence, count, position and color.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer_eval.choices import MmeParser
from vlm_steer_eval.files import read_rows
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import Floats, MetricSet, ratio, summarise

from .pope import Answer, parse_answer
from .questions import refuse_duplicates
from .scoring import summarise_parts, write_scores

__all__ = [
    "COGNITION",
    "HALLUCINATION",
    "MME_METRICS",
    "PERCEPTION",
    "TASK_METRICS",
    "MmeRow",
    "load_mme",
    "load_mme_questions",
    "mme_counts",
    "read_mme",
    "read_official",
    "score_mme",
]

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
HALLUCINATION = PERCEPTION[:4]
"""Object (existence, count) and attribute (position, color) hallucination."""

_TASKS = (*PERCEPTION, *COGNITION)


@dataclass(frozen=True)
class MmeRow:
    """One answered question.

    Attributes:
        task: a name in `PERCEPTION` or `COGNITION`.
        image: the image's file name, which only means something within its task.
        question: what was asked.
        label: the true answer.
        text: the model's answer.
    """

    task: str
    image: str
    question: str
    label: Answer
    text: str


def read_official(text: str) -> Answer | None:
    """The published rule: an exact yes or no, else either word within the first four characters."""
    lowered = text.lower()
    if lowered in ("yes", "no"):
        return "yes" if lowered == "yes" else "no"
    if "yes" in lowered[:4]:
        return "yes"
    return "no" if "no" in lowered[:4] else None


def _read_lmms_eval(text: str) -> Answer | None:
    """lmms-eval: without full stops, and a lone y or n is an answer."""
    lowered = text.lower().strip().replace(".", "")
    if lowered in ("y", "n"):
        return "yes" if lowered == "y" else "no"
    return read_official(lowered)


def read_mme(parser: MmeParser, text: str, label: Answer) -> Answer | None:
    """The yes or no in an answer; None where it cannot be read."""
    if parser == "official":
        return read_official(text)
    if parser == "lmms_eval":
        return _read_lmms_eval(text)
    return parse_answer(parser, text, label).answer


def load_mme(path: Path) -> list[MmeRow]:
    """Answers of the published layout, or rows of our own.

    Args:
        path: a folder with one `TASK.txt` per task, whose lines are image, question, label and
            answer between tabs; or rows with `task`, `image`, `question`, `label` and `answer`.

    Raises:
        DataError: something is missing or malformed; the message names the file and the line.
    """
    rows = _folder_rows(path) if path.is_dir() else _file_rows(path)
    if not rows:
        raise DataError(f"{path} holds no TASK.txt of MME; expected one of {', '.join(_TASKS)}")
    return rows


def score_mme(
    answers: Path,
    *,
    parser: MmeParser = "robust",
    output: Path | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score the answers to MME.

    Args:
        answers: see `load_mme`. Consecutive rows of a task form the pair of an image.
        parser: how answers are read; an answer that cannot be read is wrong.
        output: folder for `scores.json`, `samples.jsonl`, `counts.jsonl` and `table.txt`; None
            writes nothing.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        The contents of `scores.json`. `perception` (at most 2000), `cognition` (800) and
        `hallucination` (800) are points and None where one of their tasks is absent.

    Raises:
        DataError: a file cannot be used, or an image does not have its two questions.
    """
    pairs = _pairs(answers, load_mme(answers))
    readings = [[read_mme(parser, row.text, row.label) for row in pair] for pair in pairs]
    labels = [[row.label for row in pair] for pair in pairs]
    counts = [_task_counts(truth, read) for truth, read in zip(labels, readings, strict=True)]
    tasks = [pair[0].task for pair in pairs]
    clusters = [f"{pair[0].task}/{pair[0].image}" for pair in pairs]
    spread = [_spread(task, row) for task, row in zip(tasks, counts, strict=True)]
    result: dict[str, Any] = {
        "benchmark": "mme",
        "parser": parser,
        "n": 2 * len(pairs),
        "n_images": len(set(clusters)),
        "metrics": summarise(MME_METRICS, spread, clusters, n_resamples=n_resamples, seed=seed),
        "categories": summarise_parts(TASK_METRICS, counts, clusters, tasks, n_resamples, seed),
        "absent_tasks": [task for task in _TASKS if task not in tasks],
    }
    if output is not None:
        samples = [
            _sample(row, answer)
            for pair, read in zip(pairs, readings, strict=True)
            for row, answer in zip(pair, read, strict=True)
        ]
        units = [
            Unit(f"{index}/{cluster}", cluster, task, row)
            for index, (cluster, task, row) in enumerate(zip(clusters, tasks, spread, strict=True))
        ]
        title = f"MME, parser {parser}, n = {2 * len(pairs)}"
        write_scores(output, result, samples, units, title)
    return result


def _sample(row: MmeRow, answer: Answer | None) -> dict[str, Any]:
    return {
        "task": row.task,
        "image": row.image,
        "question": row.question,
        "label": row.label,
        "text": row.text,
        "parsed": answer,
    }


def _pairs(path: Path, rows: Sequence[MmeRow]) -> list[tuple[MmeRow, MmeRow]]:
    by_task: dict[str, list[MmeRow]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    pairs = []
    for task, members in by_task.items():
        if len(members) % 2:
            raise DataError(
                f"{path}: {task} has {len(members)} answers; expected two per image, one after the "
                "other"
            )
        for first, second in zip(members[::2], members[1::2], strict=True):
            if first.image != second.image:
                raise DataError(
                    f"{path}: {task} has one answer about {first.image}, followed by one about "
                    f"{second.image}; expected two per image, one after the other"
                )
            pairs.append((first, second))
    return pairs


def load_mme_questions(folder: Path) -> dict[str, tuple[MmeRow, MmeRow]]:
    """Name of a pair -> its questions, from a folder of TASK.txt without answers.

    Raises:
        DataError: a file is malformed, an image does not have its two questions, or a question
            about it occurs twice.
    """
    rows = _folder_rows(folder, columns=("image", "question", "label"))
    if not rows:
        raise DataError(f"{folder} holds no TASK.txt of MME; expected one of {', '.join(_TASKS)}")
    refuse_duplicates(folder, [f"{row.task}/{row.image}: {row.question}" for row in rows])
    pairs = _pairs(folder, rows)
    return {f"{n}/{pair[0].task}/{pair[0].image}": pair for n, pair in enumerate(pairs)}


def _folder_rows(
    folder: Path, columns: Sequence[str] = ("image", "question", "label", "answer")
) -> list[MmeRow]:
    rows: list[MmeRow] = []
    for task in _TASKS:
        path = folder / f"{task}.txt"
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); expected tab-separated text"
            ) from error
        for number, line in enumerate(lines, 1):
            parts = line.split("\t")
            if len(parts) != len(columns):
                raise DataError(
                    f"{path}, line {number}: expected {', '.join(columns[:-1])} and {columns[-1]} "
                    f"between tabs, found {len(parts)} parts"
                )
            image, question, label, text = [*parts, ""][:4]
            rows.append(MmeRow(task, image, question, _label(path, number, label), text))
    return rows


def _file_rows(path: Path) -> list[MmeRow]:
    rows = []
    for number, row in enumerate(read_rows(path), 1):
        text = row.get("answer", row.get("text"))
        if row.get("task") not in _TASKS or row.get("image") is None or not isinstance(text, str):
            raise DataError(
                f"{path}, row {number}: expected 'task' (one of {', '.join(_TASKS)}), 'image', "
                f"'question', 'label' and 'answer', found {row!r}"
            )
        label = _label(path, number, str(row.get("label")))
        question = str(row.get("question", ""))
        rows.append(MmeRow(str(row["task"]), str(row["image"]), question, label, text))
    return rows


def _label(path: Path, number: int, value: str) -> Answer:
    lowered = value.strip().lower()
    if lowered not in ("yes", "no"):
        raise DataError(f"{path}, line {number}: the label is {value!r}; expected Yes or No")
    return "yes" if lowered == "yes" else "no"


def mme_counts(task: str, labels: Sequence[Answer], read: Sequence[Answer | None]) -> list[int]:
    """One image of a task as one row of `MME_METRICS.columns`."""
    return _spread(task, _task_counts(labels, read))


def _task_counts(labels: Sequence[Answer], read: Sequence[Answer | None]) -> list[int]:
    """One image as one row of `TASK_METRICS.columns`."""
    outcomes = list(zip(labels, read, strict=True))
    right = [label == answer for label, answer in outcomes]
    cells = [
        outcomes.count(cell)
        for cell in (("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no"))
    ]
    return [len(outcomes), sum(right), 1, int(all(right)), *cells, sum(a is None for a in read)]


def _spread(task: str, counts: Sequence[int]) -> list[int]:
    """A task's counts as one row of `MME_METRICS.columns`."""
    row = [0] * len(MME_METRICS.columns)
    start = _TASKS.index(task) * len(TASK_METRICS.columns)
    row[start : start + len(counts)] = counts
    return row


def _points(c: dict[str, Floats], prefix: str = "") -> Floats:
    accuracy = ratio(c[f"{prefix}right"], c[f"{prefix}questions"])
    return 100 * (accuracy + ratio(c[f"{prefix}both"], c[f"{prefix}images"]))


def _total(c: dict[str, Floats], tasks: Sequence[str]) -> Floats:
    first, *others = (_points(c, f"{task}/") for task in tasks)
    return sum(others, start=first)


def _pooled(c: dict[str, Floats], column: str) -> Floats:
    first, *others = (c[f"{task}/{column}"] for task in _TASKS)
    return sum(others, start=first)


TASK_METRICS = MetricSet(
    columns=("questions", "right", "images", "both", "TP", "FP", "TN", "FN", "unread"),
    formulas={
        "points": _points,
        "accuracy": lambda c: ratio(c["right"], c["questions"]),
        "accuracy_plus": lambda c: ratio(c["both"], c["images"]),
        "precision": lambda c: ratio(c["TP"], c["TP"] + c["FP"]),
        "recall": lambda c: ratio(c["TP"], c["TP"] + c["FN"]),
        "unparsed": lambda c: c["unread"],
    },
    integers=frozenset({"unparsed"}),
    higher_is_better={
        "points": True,
        "accuracy": True,
        "accuracy_plus": True,
        "precision": True,
        "recall": True,
    },
)
"""Metrics of one task; unread answers are in neither precision nor recall, as published."""

MME_METRICS = MetricSet(
    columns=tuple(f"{task}/{column}" for task in _TASKS for column in TASK_METRICS.columns),
    formulas={
        "perception": lambda c: _total(c, PERCEPTION),
        "cognition": lambda c: _total(c, COGNITION),
        "hallucination": lambda c: _total(c, HALLUCINATION),
        "accuracy": lambda c: ratio(_pooled(c, "right"), _pooled(c, "questions")),
        "accuracy_plus": lambda c: ratio(_pooled(c, "both"), _pooled(c, "images")),
        "yes_ratio": lambda c: ratio(_pooled(c, "TP") + _pooled(c, "FP"), _pooled(c, "questions")),
        "unparsed": lambda c: _pooled(c, "unread"),
    },
    integers=frozenset({"unparsed"}),
    higher_is_better={
        "perception": True,
        "cognition": True,
        "hallucination": True,
        "accuracy": True,
        "accuracy_plus": True,
    },
)
"""Metrics of the whole; perception, cognition and hallucination are points."""
