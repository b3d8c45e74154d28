"""A benchmark from items to files: generate, score, compare, report."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer.config import Spec
from vlm_steer.errors import SteerWarning
from vlm_steer.report import Block, Report, render_html
from vlm_steer_eval.benchmarks.tasks import Task
from vlm_steer_eval.files import write_json, write_rows, write_text
from vlm_steer_eval.reports.evaluation import evaluation_blocks
from vlm_steer_eval.reports.tables import comparison_tables, footnotes, render
from vlm_steer_eval.statistics.counts import COUNTS_NAME, write_units

from .arms import Arm, parse_arms
from .generation import Settings
from .parts import Logs
from .presets import AppliedPreset, check_baseline, preset_remarks
from .results import evaluate, sample_rows, score_all, units
from .runner import RunResult, run_arms
from .workers import Workers

__all__ = ["Evaluation", "run_benchmark", "write_results"]

_TABLE_WIDTH = 200


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        run: answers, failures and notes.
        summary: the contents of `scores.json`.
        table: the tables as text.
        blocks: the tables, charts and examples as blocks of a report.
    """

    run: RunResult
    summary: dict[str, Any]
    table: str
    blocks: list[Block]


def run_benchmark(
    task: Task,
    methods: str | Mapping[str, Spec] | Sequence[Arm],
    model: Any,
    processor: Any,
    *,
    model_name: str,
    settings: Settings,
    batch_size: int,
    output: Path,
    n_resamples: int = 10_000,
    seed: int = 0,
    share_prefix: bool = False,
    workers: Workers | None = None,
    preset: AppliedPreset | None = None,
    logs: Logs | None = None,
) -> Evaluation:
    """Evaluate arms on a benchmark and write everything about it into a folder.

    The folder holds `generations.jsonl` (the log that a later run continues), `timings.jsonl`,
    `run.json` (what the answers depend on), `samples.jsonl` (every answer, read and scored),
    `counts.jsonl` (what the metrics are computed from), `scores.json`, `table.txt` and
    `report.html`.

    Args:
        task: the benchmark.
        methods: arms, see `parse_arms`.
        model: an image-text-to-text model.
        processor: its processor.
        model_name: what the user calls the model.
        settings: how to generate.
        batch_size: items per batch, > 0.
        output: the folder.
        n_resamples: resamples of intervals and tests, > 0.
        seed: seed of the resampling.
        share_prefix: see `run_arms`.
        workers: see `run_arms`; only the main process of several calls this.
        preset: the protocol that the settings come from; a baseline outside its band warns.
        logs: see `run_arms`.

    Raises:
        ConfigError: an arm is unknown.
        DataError: no image is usable, the folder is in use, or the disk is full.
        SteerError: memory runs out with a batch of one, or the model cannot be steered as asked.
    """
    run = run_arms(
        task,
        parse_arms(methods),
        model,
        processor,
        model_name=model_name,
        settings=settings,
        batch_size=batch_size,
        output=output,
        share_prefix=share_prefix,
        workers=workers,
        logs=logs,
    )
    return write_results(
        task,
        run,
        output,
        model_name=model_name,
        n_resamples=n_resamples,
        seed=seed,
        preset=preset,
    )


def write_results(
    task: Task,
    run: RunResult,
    output: Path,
    *,
    model_name: str,
    n_resamples: int = 10_000,
    seed: int = 0,
    preset: AppliedPreset | None = None,
) -> Evaluation:
    """Score the answers of a run and write all result files; see `run_benchmark`."""
    scores = score_all(task, run)
    summary = evaluate(task, run, scores, n_resamples=n_resamples, seed=seed)
    if preset is not None:
        summary["preset"] = check_baseline(preset, summary, model_name)
        _warn_outside(summary["preset"])
    write_rows(output / "samples.jsonl", sample_rows(task, run, scores))
    write_units(output / COUNTS_NAME, units(task, scores))
    write_json(output / "scores.json", summary)
    table = render(*comparison_tables(summary), *footnotes(summary), width=_TABLE_WIDTH)
    write_text(output / "table.txt", table)
    blocks = evaluation_blocks(task, run, scores, summary)
    page = Report(f"{task.name.upper()} of {model_name}", f"arms: {', '.join(run.records)}", blocks)
    write_text(output / "report.html", render_html(page))
    return Evaluation(run, summary, table, blocks)


def _warn_outside(found: Mapping[str, Any]) -> None:
    for entry, remark in zip(found["expected"], preset_remarks(found), strict=False):
        if entry["inside"] is False:
            warnings.warn(remark, SteerWarning, stacklevel=2)
