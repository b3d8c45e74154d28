"""HallusionBench: questions in groups about pictures and their edited versions (arXiv 2310.14566).

Every question is right, wrong or unclear. An unclear answer is right where there is no picture to
look at. Figures and question pairs count only if every question of theirs is right, so what is
resampled is a whole set of pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_steer.errors import DataError
from vlm_steer_eval.choices import HallusionParser, Missing
from vlm_steer_eval.files import read_rows
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import MetricSet, ratio, summarise

from .judge import Judge
from .pope import Answer, parse_answer
from .questions import check_answered, refuse_duplicates
from .scoring import write_scores

__all__ = [
    "HALLUSION_METRICS",
    "HallusionQuestion",
    "Verdict",
    "cluster_counts",
    "is_right",
    "judge_prompt",
    "load_hallusion",
    "read_hallusion",
    "read_verdict",
    "score_hallusionbench",
    "verdict_of",
]

Verdict = Literal["wrong", "right", "unclear"]

_KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")


@dataclass(frozen=True)
class HallusionQuestion:
    """One question.

    Attributes:
        category: VD (cannot be answered without the picture) or VS (the picture supplements).
        subcategory: chart, table, map, ocr, illusion, math, figure or video.
        set_id: the pictures that belong together.
        figure_id: the picture; "0" is no picture in VS and the original in VD.
        question_id: the question, equal for all pictures of a set.
        visual_input: "0" no picture, "1" the original, "2" an edited one.
        text: the question.
        label: the true answer.
        details: the true answer as a sentence, which a judge is shown.
        filename: the picture's file; empty for none.
    """

    category: str
    subcategory: str
    set_id: str
    figure_id: str
    question_id: str
    visual_input: str
    text: str
    label: Answer
    details: str = ""
    filename: str = ""

    @property
    def id(self) -> str:
        """Unique name."""
        return "_".join(
            (self.category, self.subcategory, self.set_id, self.figure_id, self.question_id)
        )

    @property
    def cluster(self) -> str:
        """The set of pictures, which every group of questions lies within."""
        return "_".join((self.category, self.subcategory, self.set_id))

    @property
    def is_blind(self) -> bool:
        """Whether it is asked without a picture."""
        return self.category == "VS" and self.figure_id == "0"


def load_hallusion(path: Path) -> list[HallusionQuestion]:
    """The benchmark's question file.

    Raises:
        DataError: the file is malformed, or a question occurs twice.
    """
    questions = []
    for number, row in enumerate(read_rows(path), 1):
        label = str(row.get("gt_answer"))
        if any(row.get(key) is None for key in (*_KEY, "visual_input")) or label not in ("0", "1"):
            raise DataError(
                f"{path}, row {number}: expected {', '.join(_KEY)}, visual_input and a gt_answer "
                f"of 0 or 1, found {row!r}"
            )
        questions.append(
            HallusionQuestion(
                category=str(row["category"]),
                subcategory=str(row["subcategory"]),
                set_id=str(row["set_id"]),
                figure_id=str(row["figure_id"]),
                question_id=str(row["question_id"]),
                visual_input=str(row["visual_input"]),
                text=str(row.get("question", "")),
                label="yes" if label == "1" else "no",
                details=str(row.get("gt_answer_details", "")),
                filename=str(row.get("filename") or ""),
            )
        )
    refuse_duplicates(path, [question.id for question in questions])
    return questions


def is_right(question: HallusionQuestion, verdict: Verdict) -> bool:
    """Whether the answer counts; without a picture, "unclear" does."""
    return verdict == "right" or (question.is_blind and verdict == "unclear")


def judge_prompt(question: HallusionQuestion, text: str) -> str:
    """What the judge is asked about one answer."""
    return (
        "Is the answer to a question right? Compare it with the reference, which is true.\n\n"
        f"Question: {question.text}\n"
        f"Reference: {question.details or question.label}\n"
        f"Answer: {text}\n\n"
        "Reply with one word: correct if the answer says the same, incorrect if it says otherwise, "
        "unclear if it does not commit itself."
    )


def read_verdict(reply: str) -> Verdict:
    """The published reading of a judge's reply: "incorrect", else "correct", anywhere in it."""
    lowered = reply.lower()
    if "incorrect" in lowered:
        return "wrong"
    return "right" if "correct" in lowered else "unclear"


def cluster_counts(
    questions: Sequence[HallusionQuestion], verdicts: Sequence[Verdict]
) -> dict[str, list[int]]:
    """Set of pictures -> one row of `HALLUSION_METRICS.columns`."""
    clusters: dict[str, list[tuple[HallusionQuestion, Verdict]]] = {}
    for question, verdict in zip(questions, verdicts, strict=True):
        clusters.setdefault(question.cluster, []).append((question, verdict))
    return {name: _row(members) for name, members in clusters.items()}


def score_hallusionbench(
    questions: Path,
    answers: Path,
    *,
    parser: HallusionParser = "robust",
    images_only: bool = False,
    judge: Judge | None = None,
    output: Path | None = None,
    missing: Missing = "error",
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score answers: the yes or no in them against the label, or by a judge.

    The published numbers come from a GPT-4 judge, so they are not comparable with those without.

    Args:
        questions: `HallusionBench.json`.
        answers: rows with category, subcategory, set_id, figure_id, question_id and the text under
            `model_prediction`, `answer` or `text`.
        parser: how answers are read. `lmms_intern` takes everything without a "yes" for a no; under
            the others an answer that cannot be read is unclear.
        images_only: leave out the questions without a picture, as lmms-eval and VLMEvalKit do.
        judge: who says whether an answer is correct; None reads it by the parser.
        output: folder for `scores.json`, `samples.jsonl`, `counts.jsonl` and `table.txt`; None
            writes nothing.
        missing: what to do about questions without an answer: stop, or leave them out and count
            them.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        The contents of `scores.json`.

    Raises:
        DataError: a file cannot be used, or questions lack an answer.
    """
    asked = [q for q in load_hallusion(questions) if not (images_only and q.is_blind)]
    given = _answers(answers)
    unanswered = check_answered(
        answers,
        given,
        [question.id for question in asked],
        asked=f"questions of {questions}",
        advice="produce them, pass --images-only if the questions without a picture were not "
        "asked, or --missing exclude to leave these out",
        missing=missing,
    )
    kept = [question for question in asked if question.id in given]
    read = [read_hallusion(parser, given[question.id], question.label) for question in kept]
    if judge is None:
        verdicts = [verdict_of(answer, q.label) for answer, q in zip(read, kept, strict=True)]
    else:
        replies = judge.ask({q.id: judge_prompt(q, given[q.id]) for q in kept})
        verdicts = [read_verdict(replies[q.id]) for q in kept]
    rows = cluster_counts(kept, verdicts)
    result: dict[str, Any] = {
        "benchmark": "hallusionbench",
        "judge": None if judge is None else judge.name,
        "parser": parser,
        "images_only": images_only,
        "n": len(kept),
        "n_images": len({q.id.rpartition("_")[0] for q in kept if q.visual_input != "0"}),
        "metrics": _summary(rows, n_resamples, seed),
        "categories": _categories(kept, rows, n_resamples, seed),
        "unanswered": unanswered,
        "unused_answers": len(given.keys() - {question.id for question in kept}),
    }
    if output is not None:
        samples = [
            {
                "question_id": question.id,
                "question": question.text,
                "label": question.label,
                "text": given[question.id],
                "parsed": answer,
                "verdict": verdict,
                "right": is_right(question, verdict),
            }
            for question, answer, verdict in zip(kept, read, verdicts, strict=True)
        ]
        rule = f"parser {parser}" if judge is None else f"judge {judge.name}"
        title = f"HallusionBench, {rule}, n = {len(kept)}"
        units = [Unit(name, name, name.partition("_")[0], row) for name, row in rows.items()]
        write_scores(output, result, samples, units, title)
    return result


def read_hallusion(parser: HallusionParser, text: str, label: Answer) -> Answer | None:
    """The yes or no in an answer; None where it cannot be read."""
    if parser == "lmms_intern":
        return "yes" if "yes" in text.lower() else "no"
    return parse_answer(parser, text, label).answer


def verdict_of(answer: Answer | None, label: Answer) -> Verdict:
    """Whether a reading is right."""
    if answer is None:
        return "unclear"
    return "right" if answer == label else "wrong"


def _answers(path: Path) -> dict[str, str]:
    given: dict[str, str] = {}
    for number, row in enumerate(read_rows(path), 1):
        keys = ("model_prediction", "answer", "text")
        text = next((row[key] for key in keys if key in row), None)
        if any(row.get(key) is None for key in _KEY) or not isinstance(text, str):
            raise DataError(
                f"{path}, row {number}: expected {', '.join(_KEY)} and the answer under "
                f"{' or '.join(repr(key) for key in keys)}, found the keys {sorted(row)}"
            )
        name = "_".join(str(row[key]) for key in _KEY)
        if name in given:
            raise DataError(f"{path}, row {number}: {name} was answered before; remove one of them")
        given[name] = text
    return given


def _summary(
    rows: Mapping[str, Sequence[float]], n_resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    return summarise(
        HALLUSION_METRICS, list(rows.values()), list(rows), n_resamples=n_resamples, seed=seed
    )


def _categories(
    questions: Sequence[HallusionQuestion],
    rows: Mapping[str, Sequence[float]],
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """VD, VS, and each of their kinds of picture."""
    table: dict[str, Any] = {}
    kinds = dict.fromkeys(f"{q.category}_{q.subcategory}" for q in questions)
    for name in [*dict.fromkeys(q.category for q in questions), *kinds]:
        chosen = {key: row for key, row in rows.items() if key.startswith(f"{name}_")}
        n = sum(q.cluster in chosen for q in questions)
        table[name] = {"n": n, "metrics": _summary(chosen, n_resamples, seed)}
    return table


def _row(members: Sequence[tuple[HallusionQuestion, Verdict]]) -> list[int]:
    outcomes = [(question, is_right(question, verdict)) for question, verdict in members]
    figures = _groups([(q.figure_id, right) for q, right in outcomes if not q.is_blind])
    pairs = _groups([(q.question_id, right) for q, right in outcomes])
    easy = _groups([(q.question_id, right) for q, right in outcomes if q.visual_input != "2"])
    hard = _groups([(q.question_id, right) for q, right in outcomes if q.visual_input == "2"])
    wrong = [question for question, right in outcomes if not right]
    said_yes = sum((q.label == "yes") == right for q, right in outcomes)
    return [
        len(members),
        len(members) - len(wrong),
        *(number for group in (figures, pairs, easy, hard) for number in group),
        said_yes,
        sum(question.label == "yes" for question, _ in outcomes),
        len(wrong),
        sum(question.label == "no" for question in wrong),
        sum(verdict == "unclear" for _, verdict in members),
    ]


def _groups(outcomes: Sequence[tuple[str, bool]]) -> tuple[int, int]:
    """Number of groups, and of those that are right throughout."""
    groups: dict[str, bool] = {}
    for name, right in outcomes:
        groups[name] = groups.get(name, True) and right
    return len(groups), sum(groups.values())


HALLUSION_METRICS = MetricSet(
    columns=(
        "questions",
        "right",
        "figures",
        "right_figures",
        "pairs",
        "right_pairs",
        "easy",
        "right_easy",
        "hard",
        "right_hard",
        "said_yes",
        "truth_yes",
        "wrong",
        "wrong_no",
        "unclear",
    ),
    formulas={
        "aAcc": lambda c: ratio(c["right"], c["questions"]),
        "fAcc": lambda c: ratio(c["right_figures"], c["figures"]),
        "qAcc": lambda c: ratio(c["right_pairs"], c["pairs"]),
        "easy": lambda c: ratio(c["right_easy"], c["easy"]),
        "hard": lambda c: ratio(c["right_hard"], c["hard"]),
        "yes_difference": lambda c: ratio(c["said_yes"] - c["truth_yes"], c["questions"]),
        "false_positive_ratio": lambda c: ratio(c["wrong_no"], c["wrong"]),
        "unclear": lambda c: c["unclear"],
    },
    integers=frozenset({"unclear"}),
    higher_is_better={"aAcc": True, "fAcc": True, "qAcc": True, "easy": True, "hard": True},
)
"""Metrics of HallusionBench, fractions.

A wrong answer counts as the opposite of its label in `yes_difference`, as published.
"""
