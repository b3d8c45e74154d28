"""MMHal-Bench: free answers that a judge rates from 0 to 6 (arXiv 2309.14525).

Below 3 an answer counts as hallucinated.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer_eval.choices import MmhalReading
from vlm_steer_eval.files import read_rows
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import MetricSet, ratio, summarise

from .judge import Judge
from .scoring import summarise_parts, write_scores

__all__ = ["MMHAL_METRICS", "judge_prompt", "rating_counts", "read_rating", "score_mmhal"]

_HIGHEST = 6
_HALLUCINATED_BELOW = 3
_TEXTS = ("question", "gt_answer", "model_answer")
_RATING = re.compile(r"rating\W*?(?<!\d)([0-6])(?!\d)", re.IGNORECASE)


def judge_prompt(row: Mapping[str, Any]) -> str:
    """What the judge is asked about one answer; it sees what is in the image, not the image."""
    contents = ", ".join(map(str, row.get("image_content", ())))
    return (
        "Rate how well an answer to a question about an image keeps to what is in the image.\n\n"
        f"In the image: {contents}\n"
        f"Question: {row['question']}\n"
        f"Reference answer: {row['gt_answer']}\n"
        f"Answer to rate: {row['model_answer']}\n\n"
        "6: very informative, nothing invented. 5: somewhat informative, nothing invented. "
        "4: hardly informative, nothing invented. 3: not informative, nothing invented. "
        "2: informative, but something is invented. 1: hardly informative, and something is "
        "invented. 0: not informative, and something is invented.\n"
        "Explain in a few sentences and end with 'Rating: N'."
    )


def read_rating(reply: str, reading: MmhalReading = "robust") -> int | None:
    """The rating in a judge's reply; None where there is not exactly one.

    `official` is the published rule: the text "rating: N" anywhere, N one digit of whatever number,
    and 0 where none or several are found.
    """
    if reading == "official":
        found = [n for n in range(_HIGHEST + 1) if f"rating: {n}" in reply.lower()]
        return found[0] if len(found) == 1 else 0
    ratings = {int(number) for number in _RATING.findall(reply)}
    return ratings.pop() if len(ratings) == 1 else None


def score_mmhal(
    responses: Path,
    judge: Judge,
    *,
    reading: MmhalReading = "robust",
    output: Path | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Let a judge rate the answers.

    Args:
        responses: rows in the layout of the benchmark's template, with the answers under
            `model_answer`; the id of a row is its number, from 0.
        judge: who rates.
        reading: how ratings are read. A reply without exactly one counts nowhere and is reported
            as `unrated`, but as 0 under `official`.
        output: folder for `scores.json`, `samples.jsonl`, `counts.jsonl` and `table.txt`; None
            writes nothing.
        n_resamples: bootstrap resamples, > 0.
        seed: seed of the resampling.

    Returns:
        The contents of `scores.json`; `rating` lies in 0-6.

    Raises:
        DataError: a file cannot be used, or a reply is missing.
    """
    rows = read_rows(responses)
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(key), str) for key in _TEXTS) or not row["model_answer"]:
            raise DataError(
                f"{responses}, row {number}: expected texts under {', '.join(_TEXTS)}, found "
                f"{row!r}"
            )
    replies = judge.ask({str(index): judge_prompt(row) for index, row in enumerate(rows)})
    ratings = [read_rating(replies[str(index)], reading) for index in range(len(rows))]
    counts = [rating_counts(rating) for rating in ratings]
    clusters = [str(row.get("image_id", index)) for index, row in enumerate(rows)]
    parts = [str(row.get("question_type", "")) for row in rows]
    result: dict[str, Any] = {
        "benchmark": "mmhal",
        "judge": judge.name,
        "reading": reading,
        "n": len(rows),
        "n_images": len(set(clusters)),
        "metrics": summarise(MMHAL_METRICS, counts, clusters, n_resamples=n_resamples, seed=seed),
        "categories": summarise_parts(MMHAL_METRICS, counts, clusters, parts, n_resamples, seed),
    }
    if output is not None:
        samples = [
            {
                "id": str(index),
                "question": row["question"],
                "text": row["model_answer"],
                "reply": replies[str(index)],
                "rating": rating,
            }
            for index, (row, rating) in enumerate(zip(rows, ratings, strict=True))
        ]
        units = [
            Unit(str(index), cluster, part, row)
            for index, (cluster, part, row) in enumerate(zip(clusters, parts, counts, strict=True))
        ]
        title = f"MMHal-Bench, judge {judge.name}, n = {len(rows)}"
        write_scores(output, result, samples, units, title)
    return result


def rating_counts(rating: int | None) -> list[int]:
    """A rating as one row of `MMHAL_METRICS.columns`."""
    if rating is None:
        return [0, 0, 0, 1]
    return [1, rating, int(rating < _HALLUCINATED_BELOW), 0]


MMHAL_METRICS = MetricSet(
    columns=("rated", "rating", "hallucinated", "unrated"),
    formulas={
        "rating": lambda c: ratio(c["rating"], c["rated"]),
        "hallucination_rate": lambda c: ratio(c["hallucinated"], c["rated"]),
        "unrated": lambda c: c["unrated"],
    },
    integers=frozenset({"unrated"}),
    higher_is_better={"rating": True, "hallucination_rate": False},
)
"""Metrics of MMHal-Bench; the rating lies in 0-6, the rate in 0-1."""
