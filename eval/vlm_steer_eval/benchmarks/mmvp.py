"""MMVP: two pictures that CLIP takes for one, and a question with opposite answers (2401.06209).

A pair counts only if both of its questions are answered correctly. The published grader is GPT-4;
here the letter of the option is read, or its text.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer_eval.choices import Missing, MmvpParser
from vlm_steer_eval.files import read_text
from vlm_steer_eval.running.images import FileImage
from vlm_steer_eval.running.sources import require_folder, subset
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import MetricSet, ratio, summarise

from .questions import check_answered, load_texts
from .scoring import write_scores
from .tasks import Item, Scored

__all__ = [
    "MMVP_METRICS",
    "MmvpQuestion",
    "MmvpTask",
    "load_mmvp",
    "mmvp_task",
    "pair_counts",
    "read_choice",
    "score_mmvp",
]

_OPTIONS = re.compile(r"\(([ab])\)\s*(.*?)\s*(?=\([ab]\)|$)", re.IGNORECASE | re.DOTALL)
_LETTER = re.compile(r"^\W*(?:option\W+|answer\W+)*([ab])(?:\W+|$)", re.IGNORECASE)
_MARKED = re.compile(r"\(([ab])\)|(?:answer|option)(?:\s+is)?\W+([ab])\b", re.IGNORECASE)
_LMMS_EVAL = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^\s*\(?([ab])\)?\.?\s*$",
        r"^\s*\(?([ab])\)?[.\s]",
        r"answer\s+is\s+\(?([ab])\)?",
        r"option\s+\(?([ab])\)?",
        r"\(?([ab])\)?(?:\s|$)",
    )
)


@dataclass(frozen=True)
class MmvpQuestion:
    """One question about one picture.

    Attributes:
        index: number of the picture, from 1; 2k - 1 and 2k are a pair.
        text: the question.
        options: the options as the file writes them, "(a) Open (b) Closed".
        label: `a` or `b`.
    """

    index: int
    text: str
    options: str
    label: str

    @property
    def pair(self) -> str:
        """Number of the pair, from 1."""
        return str((self.index + 1) // 2)


def load_mmvp(path: Path) -> list[MmvpQuestion]:
    """The benchmark's `Questions.csv`: Index, Question, Options, Correct Answer.

    Raises:
        DataError: the file is malformed, or a question has no partner.
    """
    questions = []
    for number, row in enumerate(csv.reader(io.StringIO(read_text(path))), 1):
        if number == 1:
            continue
        label = row[3].strip().strip("()").lower() if len(row) > 3 else ""
        if len(row) < 4 or not row[0].strip().isdigit() or label not in ("a", "b"):
            raise DataError(
                f"{path}, row {number}: expected a number, a question, its options and (a) or (b), "
                f"found {row!r}"
            )
        questions.append(MmvpQuestion(int(row[0]), row[1].strip(), row[2].strip(), label))
    indices = [question.index for question in questions]
    pairs = {question.pair for question in questions}
    if not questions or len(set(indices)) < len(indices) or len(indices) != 2 * len(pairs):
        raise DataError(f"{path}: expected every picture once, and both of each pair")
    return questions


def read_choice(text: str, options: str, parser: MmvpParser = "robust") -> str | None:
    """The option an answer chooses, `a` or `b`; None where it chooses none.

    Args:
        text: the model's answer.
        options: see `MmvpQuestion`.
        parser: `robust` takes a letter that opens the answer or is marked as one, else the text of
            one option; an answer that names both chooses none. `lmms_eval` is the rule of that
            harness, which reads "A dog" as a.
    """
    if parser == "lmms_eval":
        return _read_lmms_eval(text)
    opening = _LETTER.match(text)
    marked: set[str] = {(first or second).lower() for first, second in _MARKED.findall(text)}
    named: set[str] = {
        letter.lower()
        for letter, words in _OPTIONS.findall(options)
        if words and re.search(rf"\b{re.escape(words)}(?!\w)", text, re.IGNORECASE)
    }
    if len(marked) == 1:
        return marked.pop()
    if opening is not None and not marked and (_is_bare(text) or opening[1].lower() in named):
        return opening[1].lower()
    return named.pop() if len(named) == 1 and not marked else None


def _is_bare(text: str) -> bool:
    """Whether the letter stands alone, or is set apart by more than a space, as in "A. Open"."""
    return re.match(r"^\W*[ab](?:\W*$|[^\w\s])", text, re.IGNORECASE) is not None


def _read_lmms_eval(text: str) -> str | None:
    stripped = text.strip()
    for pattern in _LMMS_EVAL:
        found = pattern.search(stripped)
        if found is not None:
            return found[1].lower()
    first = stripped[:1].lower()
    return first if first in ("a", "b") else None


def pair_counts(pair: Sequence[tuple[str, str | None]]) -> list[int]:
    """A pair of labels and readings as one row of `MMVP_METRICS.columns`."""
    right = sum(label == read for label, read in pair)
    return [1, int(right == 2), 2, right, sum(read is None for _, read in pair)]


def score_mmvp(
    questions: Path,
    answers: Path,
    *,
    parser: MmvpParser = "robust",
    output: Path | None = None,
    missing: Missing = "error",
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score answers to MMVP.

    Args:
        questions: see `load_mmvp`.
        answers: rows with `id` (or `index`) and the text under `answer` or `text`.
        parser: how answers are read; one that cannot be read is wrong.
        output: folder for `scores.json`, `samples.jsonl`, `counts.jsonl` and `table.txt`; None
            writes nothing.
        missing: what to do about questions without an answer: stop, or leave their pairs out.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        The contents of `scores.json`.

    Raises:
        DataError: a file cannot be used, or questions lack an answer.
    """
    asked = load_mmvp(questions)
    given = load_texts(answers, ("id", "index", "question_id"), ("answer", "text"))
    unanswered = check_answered(
        answers,
        given,
        [str(question.index) for question in asked],
        asked=f"questions of {questions}",
        id_name="id ",
        advice="produce them, or pass --missing exclude to leave their pairs out",
        missing=missing,
    )
    silent = {question.pair for question in asked if str(question.index) in unanswered}
    kept = [question for question in asked if question.pair not in silent]
    read = {q.index: read_choice(given[str(q.index)], q.options, parser) for q in kept}
    pairs: dict[str, list[tuple[str, str | None]]] = {}
    for question in kept:
        pairs.setdefault(question.pair, []).append((question.label, read[question.index]))
    units = [Unit(name, name, "", pair_counts(pair)) for name, pair in pairs.items()]
    counts = [unit.counts for unit in units]
    result: dict[str, Any] = {
        "benchmark": "mmvp",
        "parser": parser,
        "n": len(kept),
        "n_images": len(kept),
        "metrics": summarise(MMVP_METRICS, counts, list(pairs), n_resamples=n_resamples, seed=seed),
        "unanswered": unanswered,
        "unused_answers": len(given.keys() - {str(question.index) for question in asked}),
    }
    if output is not None:
        samples = [
            {
                "id": str(question.index),
                "question": question.text,
                "options": question.options,
                "label": question.label,
                "text": given[str(question.index)],
                "parsed": read[question.index],
            }
            for question in kept
        ]
        write_scores(output, result, samples, units, f"MMVP, parser {parser}, n = {len(kept)}")
    return result


MMVP_METRICS = MetricSet(
    columns=("pairs", "right_pairs", "questions", "right", "unread"),
    formulas={
        "pair_accuracy": lambda c: ratio(c["right_pairs"], c["pairs"]),
        "accuracy": lambda c: ratio(c["right"], c["questions"]),
        "unparsed": lambda c: c["unread"],
    },
    integers=frozenset({"unparsed"}),
    higher_is_better={"pair_accuracy": True, "accuracy": True},
)
"""Metrics of MMVP, fractions; the published score is `pair_accuracy`."""


@dataclass(frozen=True)
class MmvpTask:
    """Questions about pairs of pictures; `gold` has `label`, `options` and `pair`.

    Attributes:
        items: one per picture.
        parser: how answers are read.
    """

    items: Sequence[Item]
    parser: MmvpParser = "robust"
    name: str = "mmvp"
    metrics: MetricSet = MMVP_METRICS
    first_token_words: None = None

    @property
    def scoring(self) -> Mapping[str, Any]:
        """The parser's name."""
        return {"parser": self.parser}

    def score(self, item: Item, text: str) -> Scored:
        """Read one answer."""
        read = read_choice(text, item.gold["options"], self.parser)
        return Scored((), {"label": item.gold["label"], "parsed": read})

    def units(self, scores: Mapping[str, Scored]) -> list[Unit]:
        """One unit per pair that is complete."""
        pairs: dict[str, list[tuple[str, str | None]]] = {}
        for item in self.items:
            if item.id in scores:
                read = scores[item.id].details["parsed"]
                pairs.setdefault(item.cluster, []).append((item.gold["label"], read))
        return [
            Unit(name, name, "all", pair_counts(pair))
            for name, pair in pairs.items()
            if len(pair) == 2
        ]


def mmvp_task(
    questions: Path,
    images: Path,
    *,
    parser: MmvpParser = "robust",
    limit: int | None = None,
    seed: int = 0,
    suffix: str = "",
) -> MmvpTask:
    """MMVP from its question file and its folder of `1.jpg`, `2.jpg`, ...

    Args:
        questions: see `load_mmvp`.
        images: the folder.
        parser: how answers are read.
        limit: number of pairs; None for all.
        seed: seed of their choice.
        suffix: appended to question and options.

    Raises:
        DataError: the file is malformed, or the folder does not exist.
    """
    require_folder(images)
    asked = load_mmvp(questions)
    chosen = set(subset((question.pair for question in asked), limit, seed))
    items = [
        Item(
            id=str(question.index),
            image=FileImage(images / f"{question.index}.jpg"),
            prompt=f"{question.text} {question.options}{suffix}",
            split="all",
            cluster=question.pair,
            gold={"label": question.label, "options": question.options},
        )
        for question in asked
        if question.pair in chosen
    ]
    return MmvpTask(items, parser)
