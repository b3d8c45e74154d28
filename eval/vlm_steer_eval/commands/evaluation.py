"""Commands that run a benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_steer.errors import ConfigError

from .groups import RunOptions, spelled_out
from .options import (
    Columns,
    Dataset,
    DatasetSplit,
    EmbeddedScenes,
    ImageFolder,
    ImageList,
    Lemmas,
    NormaliserOption,
    ParserOption,
    SharePrefix,
    Streaming,
    Suffix,
    Synonyms,
)
from .run import (
    check_early,
    chosen_normaliser,
    chosen_splits,
    refuse_on_scenes,
    refuse_several_sources,
    refuse_without_dataset,
    required_folder,
    run_and_show,
)

if TYPE_CHECKING:
    from vlm_steer_eval.benchmarks.tasks import Task

__all__ = ["eval_chair", "eval_pope", "eval_presets"]


@spelled_out("pope", max_new_tokens=16)
def eval_pope(
    run: RunOptions,
    scenes: EmbeddedScenes = "broken",
    questions: Annotated[
        list[Path] | None,
        typer.Option("--questions", help="POPE question file; needs --images. Repeatable."),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option("--annotations", help="COCO instances file to build questions from."),
    ] = None,
    images: ImageFolder = None,
    dataset: Dataset = None,
    dataset_split: DatasetSplit = "test",
    streaming: Streaming = False,
    columns: Columns = None,
    splits: Annotated[
        str, typer.Option("--splits", help="Splits to build: random,popular,adversarial.")
    ] = "random,popular,adversarial",
    suffix: Suffix = "",
    parser: ParserOption = "robust",
    share_prefix: SharePrefix = True,
) -> None:
    """Ask yes/no questions about objects: on embedded scenes, your files, or a data set."""
    from vlm_steer_eval.running.hub import hub_pope
    from vlm_steer_eval.running.sources import built_pope, embedded_pope, local_pope

    check_early(run)
    chosen = chosen_splits(splits)
    refuse_several_sources(questions=questions, annotations=annotations, dataset=dataset)
    refuse_without_dataset(dataset, columns=columns, streaming=streaming)
    task: Task
    common: dict[str, Any] = {"seed": run.seed, "parser": parser}
    own: dict[str, Any] = {"limit": run.limit, "suffix": suffix, **common}
    if dataset is not None:
        task = hub_pope(dataset, dataset_split, columns=columns, streaming=streaming, **own)
    elif questions:
        task = local_pope(questions, required_folder(images, "--questions"), **own)
    elif annotations is not None:
        folder = required_folder(images, "--annotations")
        task = built_pope(annotations, folder, splits=chosen, **own)
    else:
        refuse_on_scenes(images=images, suffix=suffix or None)
        task = embedded_pope(scenes, splits=chosen, limit=run.limit or 100, **common)
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
    prompt: Annotated[
        str, typer.Option("--prompt", help="What the model is asked.")
    ] = "Please describe this image in detail.",
    normaliser: NormaliserOption = "table",
    synonyms: Synonyms = None,
    lemmas: Lemmas = None,
) -> None:
    """Count hallucinated objects in captions of embedded scenes, your images, or a data set."""
    from vlm_steer_eval.running.hub import hub_chair
    from vlm_steer_eval.running.sources import embedded_chair, local_chair

    check_early(run)
    refuse_several_sources(truth=annotations or objects, dataset=dataset)
    refuse_without_dataset(dataset, columns=columns, streaming=streaming)
    if image_list is not None and annotations is None and objects is None:
        raise ConfigError("--image-list has no effect without --annotations or --objects")
    reader = chosen_normaliser(normaliser, synonyms, lemmas)
    task: Task
    common: dict[str, Any] = {"limit": run.limit, "seed": run.seed, "prompt": prompt}
    if dataset is not None:
        task = hub_chair(
            dataset, dataset_split, reader, columns=columns, streaming=streaming, **common
        )
    elif annotations is not None or objects is not None:
        task = local_chair(
            required_folder(images, "--annotations and --objects"),
            reader,
            annotations=annotations,
            objects=objects,
            listed=image_list,
            **common,
        )
    else:
        refuse_on_scenes(images=images, synonyms=synonyms)
        if normaliser == "opera":
            raise ConfigError(
                "--normaliser opera reads COCO objects; the embedded scenes have a vocabulary of "
                "their own, so leave it out"
            )
        task = embedded_chair(scenes, **{**common, "limit": run.limit or 300})
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
