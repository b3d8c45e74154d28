"""Commands that run a benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_steer.commands.options import (
    Attn,
    BatchSize,
    DeviceMap,
    Dtype,
    ModelName,
    Quantization,
    Revision,
    Seed,
)
from vlm_steer.errors import ConfigError

from .command_options import (
    Beams,
    Columns,
    Dataset,
    DatasetSplit,
    EmbeddedScenes,
    ImageFolder,
    Images,
    Methods,
    NormaliserOption,
    OutputFolder,
    ParserOption,
    Resamples,
    SkipBadImages,
    Synonyms,
    Temperature,
    Tokens,
    TopP,
)
from .command_run import (
    chosen_normaliser,
    chosen_splits,
    loading_options,
    refuse_columns_alone,
    refuse_on_scenes,
    refuse_several_sources,
    required_folder,
    run_and_show,
)

if TYPE_CHECKING:
    from .tasks import Task

__all__ = ["eval_chair", "eval_pope"]


def eval_pope(
    output: OutputFolder,
    model: ModelName = "tiny",
    methods: Methods = "none",
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
    columns: Columns = None,
    splits: Annotated[
        str, typer.Option("--splits", help="Splits to build: random,popular,adversarial.")
    ] = "random,popular,adversarial",
    suffix: Annotated[
        str, typer.Option("--suffix", help="Appended to every question of your own data.")
    ] = "",
    parser: ParserOption = "robust",
    limit: Images = None,
    max_new_tokens: Tokens = 16,
    num_beams: Beams = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    resamples: Resamples = 10_000,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    revision: Revision = None,
    attn: Attn = None,
    skip_bad_images: SkipBadImages = False,
    share_prefix: Annotated[
        bool,
        typer.Option(help="Compute each image once for its questions, where methods allow it."),
    ] = True,
) -> None:
    """Ask yes/no questions about objects: on embedded scenes, your files, or a data set."""
    from .arms import parse_arms
    from .generation import Settings
    from .hub import hub_pope
    from .sources import built_pope, embedded_pope, local_pope

    parse_arms(methods)  # a misspelt arm is reported before anything slow begins
    settings = Settings(max_new_tokens, num_beams, temperature, top_p, seed)
    chosen = chosen_splits(splits)
    refuse_several_sources(questions=questions, annotations=annotations, dataset=dataset)
    refuse_columns_alone(columns, dataset)
    task: Task
    common: dict[str, Any] = {"seed": seed, "parser": parser}
    if dataset is not None:
        task = hub_pope(
            dataset, dataset_split, columns=columns, limit=limit, suffix=suffix, **common
        )
    elif questions:
        task = local_pope(
            questions, required_folder(images, "--questions"), limit=limit, suffix=suffix, **common
        )
    elif annotations is not None:
        task = built_pope(
            annotations,
            required_folder(images, "--annotations"),
            splits=chosen,
            limit=limit,
            suffix=suffix,
            **common,
        )
    else:
        refuse_on_scenes(images=images, suffix=suffix or None)
        task = embedded_pope(scenes, splits=chosen, limit=limit or 100, **common)
    loading = loading_options(dtype, device_map, quantization, revision, attn)
    run_and_show(
        task,
        methods,
        model,
        loading,
        settings,
        output,
        batch_size=batch_size,
        resamples=resamples,
        skip_bad_images=skip_bad_images,
        share_prefix=share_prefix,
    )


def eval_chair(
    output: OutputFolder,
    model: ModelName = "tiny",
    methods: Methods = "none",
    scenes: EmbeddedScenes = "broken",
    annotations: Annotated[
        Path | None,
        typer.Option("--annotations", help="COCO annotations folder or instances file."),
    ] = None,
    objects: Annotated[
        Path | None, typer.Option("--objects", help="Object sets per image, JSON or .gz.")
    ] = None,
    images: ImageFolder = None,
    dataset: Dataset = None,
    dataset_split: DatasetSplit = "test",
    columns: Columns = None,
    prompt: Annotated[
        str, typer.Option("--prompt", help="What the model is asked.")
    ] = "Please describe this image in detail.",
    normaliser: NormaliserOption = "table",
    synonyms: Synonyms = None,
    limit: Images = None,
    max_new_tokens: Tokens = 512,
    num_beams: Beams = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    resamples: Resamples = 10_000,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    revision: Revision = None,
    attn: Attn = None,
    skip_bad_images: SkipBadImages = False,
) -> None:
    """Count hallucinated objects in captions of embedded scenes, your images, or a data set."""
    from .arms import parse_arms
    from .generation import Settings
    from .hub import hub_chair
    from .sources import embedded_chair, local_chair

    parse_arms(methods)  # a misspelt arm is reported before anything slow begins
    settings = Settings(max_new_tokens, num_beams, temperature, top_p, seed)
    refuse_several_sources(truth=annotations or objects, dataset=dataset)
    refuse_columns_alone(columns, dataset)
    reader = chosen_normaliser(normaliser, synonyms)
    task: Task
    if dataset is not None:
        task = hub_chair(
            dataset, dataset_split, reader, columns=columns, limit=limit, seed=seed, prompt=prompt
        )
    elif annotations is not None or objects is not None:
        task = local_chair(
            required_folder(images, "--annotations and --objects"),
            reader,
            annotations=annotations,
            objects=objects,
            limit=limit,
            seed=seed,
            prompt=prompt,
        )
    else:
        refuse_on_scenes(images=images, synonyms=synonyms)
        if normaliser == "opera":
            raise ConfigError(
                "--normaliser opera reads COCO objects; the embedded scenes have a vocabulary of "
                "their own, so leave it out"
            )
        task = embedded_chair(scenes, limit=limit or 300, seed=seed, prompt=prompt)
    loading = loading_options(dtype, device_map, quantization, revision, attn)
    run_and_show(
        task,
        methods,
        model,
        loading,
        settings,
        output,
        batch_size=batch_size,
        resamples=resamples,
        skip_bad_images=skip_bad_images,
    )
