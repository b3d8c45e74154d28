"""Commands that run a benchmark."""

from pathlib import Path
from typing import Annotated

import typer

from vlm_steer.errors import ConfigError

from .groups import RunOptions, spelled_out
from .options import (
    BuiltFrom,
    BuiltSplits,
    CaptionPrompt,
    Columns,
    Dataset,
    DatasetSplit,
    EmbeddedScenes,
    ImageFolder,
    ImageList,
    Lemmas,
    NormaliserOption,
    OpopeReaderOption,
    ParserOption,
    QuestionFiles,
    SharePrefix,
    Streaming,
    Suffix,
    Synonyms,
)
from .origins import chair_task, opope_task, pope_task
from .run import check_early, chosen_splits, run_and_show

__all__ = ["eval_chair", "eval_opope", "eval_pope", "eval_power", "eval_presets"]


@spelled_out("pope", max_new_tokens=16)
def eval_pope(
    run: RunOptions,
    scenes: EmbeddedScenes = "broken",
    questions: QuestionFiles = None,
    annotations: BuiltFrom = None,
    images: ImageFolder = None,
    dataset: Dataset = None,
    dataset_split: DatasetSplit = "test",
    streaming: Streaming = False,
    columns: Columns = None,
    splits: BuiltSplits = "random,popular,adversarial",
    suffix: Suffix = "",
    parser: ParserOption = "robust",
    share_prefix: SharePrefix = True,
) -> None:
    """Ask yes/no questions about objects: on embedded scenes, your files, or a data set."""
    check_early(run)
    task = pope_task(
        scenes=scenes,
        questions=questions,
        annotations=annotations,
        images=images,
        dataset=dataset,
        dataset_split=dataset_split,
        streaming=streaming,
        columns=columns,
        splits=chosen_splits(splits),
        suffix=suffix,
        parser=parser,
        limit=run.limit,
        seed=run.seed,
    )
    run_and_show(task, run, share_prefix=share_prefix)


@spelled_out("chair", max_new_tokens=512)
def eval_chair(
    run: RunOptions,
    scenes: EmbeddedScenes = "broken",
    annotations: Annotated[
        Path | None,
        typer.Option("--annotations", help="COCO annotations folder or instances file."),
    ] = None,
    objects: Annotated[
        Path | None, typer.Option("--objects", help="Object sets per image, JSON or .gz.")
    ] = None,
    images: ImageFolder = None,
    image_list: ImageList = None,
    dataset: Dataset = None,
    dataset_split: DatasetSplit = "test",
    streaming: Streaming = False,
    columns: Columns = None,
    prompt: CaptionPrompt = "Please describe this image in detail.",
    normaliser: NormaliserOption = "table",
    synonyms: Synonyms = None,
    lemmas: Lemmas = None,
) -> None:
    """Count hallucinated objects in captions of embedded scenes, your images, or a data set."""
    check_early(run)
    task = chair_task(
        scenes=scenes,
        annotations=annotations,
        objects=objects,
        images=images,
        image_list=image_list,
        dataset=dataset,
        dataset_split=dataset_split,
        streaming=streaming,
        columns=columns,
        prompt=prompt,
        normaliser=normaliser,
        synonyms=synonyms,
        lemmas=lemmas,
        limit=run.limit,
        seed=run.seed,
    )
    run_and_show(task, run)


@spelled_out("opope", max_new_tokens=512)
def eval_opope(
    run: RunOptions,
    scenes: EmbeddedScenes = "broken",
    questions: QuestionFiles = None,
    annotations: BuiltFrom = None,
    images: ImageFolder = None,
    splits: BuiltSplits = "random,popular,adversarial",
    prompt: CaptionPrompt = "Please describe this image in detail.",
    reader: OpopeReaderOption = "table",
) -> None:
    """Describe every image once, and answer POPE's questions about it from the caption."""
    check_early(run)
    task = opope_task(
        scenes=scenes,
        questions=questions,
        annotations=annotations,
        images=images,
        splits=chosen_splits(splits),
        prompt=prompt,
        reader=reader,
        limit=run.limit,
        seed=run.seed,
    )
    run_and_show(task, run)


def eval_presets(
    name: Annotated[str | None, typer.Argument(help="A preset, to see all of it.")] = None,
) -> None:
    """List the published protocols that --preset knows, or show one of them."""
    from vlm_steer_eval.running.presets import list_benchmark_presets, load_preset

    if name is None:
        for known in list_benchmark_presets():
            preset = load_preset(known)
            options = ", ".join(f"{key} {value!r}" for key, value in preset.options.items())
            typer.echo(f"{known}: {options}")
        return
    preset = load_preset(name)
    typer.echo(f"{preset.name}: {preset.source}\ndata: {preset.data}")
    for key, value in preset.options.items():
        typer.echo(f"  --{key.replace('_', '-')} {value!r}")
    for band in preset.expected:
        typer.echo(
            f"  {band.model}: {band.metric} ({band.split}) {band.low:g} to {band.high:g}; "
            f"{band.source}"
        )


def eval_power(
    disagreement: Annotated[
        float,
        typer.Option(
            "--disagreement",
            min=0.0,
            max=1.0,
            help="Share of items that exactly one of two arms gets right; 0.05 is usual on POPE.",
        ),
    ],
    items: Annotated[
        int | None, typer.Option("--items", min=1, help="Items that you would run.")
    ] = None,
    difference: Annotated[
        float | None,
        typer.Option("--difference", help="Difference that you want to find, in (0, 1)."),
    ] = None,
    per_image: Annotated[
        float, typer.Option("--per-image", min=1.0, help="Items about one image.")
    ] = 1.0,
    correlation: Annotated[
        float,
        typer.Option("--correlation", min=0.0, max=1.0, help="Of what differs within an image."),
    ] = 0.0,
) -> None:
    """Say before a run which difference it can show, or how many items a difference needs."""
    from vlm_steer_eval.statistics.closed_form import items_needed, minimum_detectable_difference

    if (items is None) == (difference is None):
        raise ConfigError("give either --items, to see which difference they show, or --difference")
    clusters = {"cluster_size": per_image, "correlation": correlation}
    if difference is not None:
        if not 0 < difference <= disagreement:
            raise ConfigError(
                f"--difference {difference} must lie above 0 and not above --disagreement "
                f"{disagreement}: arms cannot differ by more than the items that they differ on"
            )
        needed = items_needed(difference, disagreement, **clusters)
        typer.echo(f"{needed} items show a difference of {100 * difference:g} points")
        return
    found = minimum_detectable_difference(items or 0, disagreement, **clusters)
    if found is None:
        typer.echo(f"{items} items show no difference: too few, or too little disagreement")
        return
    typer.echo(
        f"{items} items show a difference of {100 * found:.1f} points or more in 4 of 5 runs, and "
        "smaller ones are noise"
    )
