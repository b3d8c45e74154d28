"""Whether answers depend on how they are batched: the same run again at other batch sizes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_steer.errors import ConfigError
from vlm_steer_eval.benchmarks.tasks import Task
from vlm_steer_eval.statistics.closed_form import wilson

from .arms import Arm
from .generation import Settings
from .results import Scores, score_all
from .runner import RunResult, run_arms

__all__ = ["parse_sizes", "repeat_lines", "repeat_run"]

FOLDER = "repeat"


def parse_sizes(text: str, batch_size: int) -> list[int]:
    """Batch sizes written as "1,4", in that order.

    Raises:
        ConfigError: one is no whole number above 0, occurs twice, or is that of the run itself.
    """
    parts = [part.strip() for part in text.split(",")]
    sizes = [int(part) for part in parts if part.isdecimal()]
    if len(sizes) < len(parts) or len({*sizes, batch_size, 0}) < len(sizes) + 2:
        raise ConfigError(
            f"--repeat {text!r}: give different whole numbers above 0, separated by commas and "
            f"other than --batch-size {batch_size}, such as 1,4"
        )
    return sizes


def repeat_run(
    task: Task,
    arms: Sequence[Arm],
    model: Any,
    processor: Any,
    first: RunResult,
    sizes: Sequence[int],
    *,
    model_name: str,
    settings: Settings,
    batch_size: int,
    output: Path,
    share_prefix: bool = False,
) -> dict[str, Any]:
    """Answer everything again at other batch sizes and count what changes.

    The answers are logged in folders of their own, which a later call continues.

    Args:
        task: the benchmark.
        arms: those of the run.
        model: the model of the run.
        processor: its processor.
        first: the run to compare with.
        sizes: batch sizes, from `parse_sizes`.
        model_name: what the user calls the model.
        settings: how to generate.
        batch_size: that of the run.
        output: the run's folder.
        share_prefix: see `run_arms`.

    Returns:
        `batch_size`, and `arms`: arm -> size -> `n`, `texts` and `scores` that changed, and
        `flip_rate`, the share of texts, with its interval `ci95`.
    """
    before = score_all(task, first)
    flips: dict[str, dict[str, Any]] = {arm: {} for arm in first.records}
    for size in sizes:
        again = run_arms(
            task,
            arms,
            model,
            processor,
            model_name=model_name,
            settings=settings,
            batch_size=size,
            output=output / FOLDER / str(size),
            share_prefix=share_prefix,
        )
        after = score_all(task, again)
        for arm in flips:
            flips[arm][str(size)] = _flips(arm, first, again, before, after)
    return {"batch_size": batch_size, "arms": flips}


def repeat_lines(report: Mapping[str, Any]) -> list[str]:
    """What `repeat_run` found, in sentences."""
    return [
        f"{arm} at batch size {size}: {found['texts']} of {found['n']} answers differ from those "
        f"at {report['batch_size']} ({100 * found['flip_rate']:.1f} % "
        f"[{100 * found['ci95'][0]:.1f}, {100 * found['ci95'][1]:.1f}]); "
        f"{found['scores']} score otherwise"
        for arm, by_size in report["arms"].items()
        for size, found in by_size.items()
    ]


def _flips(
    arm: str, first: RunResult, again: RunResult, before: Scores, after: Scores
) -> dict[str, Any]:
    items = list(first.records[arm])
    texts = sum(first.records[arm][i]["text"] != again.records[arm][i]["text"] for i in items)
    scores = sum(before[arm][i].outcome != after[arm][i].outcome for i in items)
    return {
        "n": len(items),
        "texts": texts,
        "scores": scores,
        "flip_rate": texts / len(items),
        "ci95": list(wilson(texts, len(items))),
    }
