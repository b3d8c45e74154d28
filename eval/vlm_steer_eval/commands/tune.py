"""The command that tunes a steering."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_steer.commands.groups import Loading, spelled_out
from vlm_steer.commands.options import (
    BatchSize,
)

from .options import OutputFolder, Resamples

__all__ = ["tune"]


@spelled_out()
def tune(
    loading: Loading,
    file: Annotated[
        Path,
        typer.Argument(help="A steering with ranges, and the section tune.", metavar="FILE.yaml"),
    ],
    output: OutputFolder,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Instead of the file's.", rich_help_panel="Model"),
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Settings to try, instead of the file's.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=2, help="Images to tune on, instead of the file's."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            min=1,
            help="Longest answer, instead of the file's.",
            rich_help_panel="Model",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of everything, instead of the file's.")
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes on this machine.")
    ] = 1,
    join: Annotated[
        bool,
        typer.Option("--join", help="Only add trials to a study that another process concludes."),
    ] = False,
    choose: Annotated[
        int | None,
        typer.Option("--choose", min=0, help="Confirm this trial, instead of the rule's choice."),
    ] = None,
    resamples: Resamples = 10_000,
    batch_size: BatchSize = 32,
) -> None:
    """Search the options of a steering, and confirm the best one on other images."""
    from vlm_steer_eval.tuning.run import Request
    from vlm_steer_eval.tuning.run import tune as run

    outcome = run(
        Request(
            file=file,
            output=output,
            overrides={"model": model, "trials": trials, "images": limit, "seed": seed},
            max_new_tokens=max_new_tokens,
            loading=loading.loading(),
            batch_size=batch_size,
            n_resamples=resamples,
            workers=workers,
            join=join,
            choice=choose,
        ),
        tell=lambda text: typer.echo(text, err=True),
    )
    if outcome is not None:
        typer.echo(outcome.text, nl=False)
        typer.echo(f"winner: {outcome.winner}")
