"""The command that compares finished runs."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_steer.commands.options import Seed
from vlm_steer_eval.choices import Missing

from .options import ImageFolder, OutputFolder, Resamples, refuse_run

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders, or addresses, written by eval or score.", metavar="RUN..."),
    ],
    output: OutputFolder,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="Arm to compare with; the first one by default."),
    ] = None,
    trivial: Annotated[
        list[str] | None,
        typer.Option(
            "--trivial", help="Arm that is a trivial baseline and extends the frontier. Repeatable."
        ),
    ] = None,
    missing: Annotated[
        Missing, typer.Option("--missing", help="Units that not every run has.")
    ] = "error",
    pool: Annotated[
        bool,
        typer.Option(
            "--pool", help="The folders are one run under several seeds; pool their arms."
        ),
    ] = False,
    images: ImageFolder = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Images with their answers in the report.")
    ] = 12,
    resamples: Resamples = 10_000,
    seed: Seed = 0,
) -> None:
    """Compare runs: paired differences, at matched length or yes ratio, and the frontier."""
    from vlm_steer.report import Report, render_html
    from vlm_steer_eval.files import write_json, write_text
    from vlm_steer_eval.reports.comparison import comparison_blocks, comparison_text
    from vlm_steer_eval.reports.gallery import runs_gallery
    from vlm_steer_eval.reports.tables import render
    from vlm_steer_eval.running.runs import load_runs
    from vlm_steer_eval.running.sources import require_folder
    from vlm_steer_eval.statistics.comparing import compare_runs

    if images is not None:
        require_folder(images)
    refuse_run(output, "scores.json")
    loaded = load_runs(runs, baseline=baseline, missing=missing, pool=pool)
    result = compare_runs(loaded, trivial=trivial or [], n_resamples=resamples, seed=seed)
    write_json(output / "compare.json", result)
    text = render(*comparison_text(result), width=200)
    write_text(output / "table.txt", text)
    page = Report(
        f"{loaded.benchmark.upper()}: {len(loaded.arms)} runs compared",
        f"baseline: {loaded.baseline}",
        comparison_blocks(result, runs_gallery(loaded, images=images, n_samples=samples)),
    )
    write_text(output / "report.html", render_html(page))
    typer.echo(text, nl=False)
    typer.echo(f"results: {output}")
