"""The items that options name, for every command that reads data, and for tuning files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_steer.errors import ConfigError
from vlm_steer_eval.choices import NormaliserName, OpopeReader

from .run import (
    chosen_normaliser,
    refuse_on_scenes,
    refuse_several_sources,
    refuse_without_dataset,
    required_folder,
)

if TYPE_CHECKING:
    from vlm_steer_eval.benchmarks.opope import OpopeTask
    from vlm_steer_eval.benchmarks.pope_builder import Strategy
    from vlm_steer_eval.benchmarks.tasks import ChairTask, PopeTask

__all__ = ["chair_task", "opope_task", "pope_task"]

_CAPTIONED_SCENES, _ASKED_SCENES = 300, 100


def chair_task(
    *,
    scenes: str | None,
    limit: int | None,
    seed: int,
    prompt: str,
    annotations: Path | None = None,
    objects: Path | None = None,
    images: Path | None = None,
    image_list: Path | None = None,
    dataset: str | None = None,
    dataset_split: str | None = None,
    streaming: bool = False,
    columns: str | None = None,
    normaliser: NormaliserName = "table",
    synonyms: Path | None = None,
    lemmas: Path | None = None,
) -> "ChairTask":
    """Captions of a data set, of images with ground truth beside them, or of embedded scenes.

    The options are those of `vlm-steer eval chair`. The embedded scenes are taken where no other
    source is named, 300 of them without a limit.

    Raises:
        ConfigError: options contradict each other, or one has no effect.
        DataError: a file cannot be used.
    """
    from vlm_steer_eval.running.hub import hub_chair
    from vlm_steer_eval.running.sources import embedded_chair, local_chair

    refuse_several_sources(truth=annotations or objects, dataset=dataset)
    refuse_without_dataset(dataset, columns=columns, streaming=streaming)
    if image_list is not None and annotations is None and objects is None:
        raise ConfigError("--image-list has no effect without --annotations or --objects")
    reader = chosen_normaliser(normaliser, synonyms, lemmas)
    if dataset is not None:
        return hub_chair(
            dataset,
            str(dataset_split),
            reader,
            columns=columns,
            streaming=streaming,
            limit=limit,
            seed=seed,
            prompt=prompt,
        )
    if annotations is not None or objects is not None:
        return local_chair(
            required_folder(images, "--annotations and --objects"),
            reader,
            annotations=annotations,
            objects=objects,
            listed=image_list,
            limit=limit,
            seed=seed,
            prompt=prompt,
        )
    refuse_on_scenes(images=images, synonyms=synonyms)
    if normaliser == "opera":
        raise ConfigError(
            "--normaliser opera reads COCO objects; the embedded scenes have a vocabulary of "
            "their own, so leave it out"
        )
    return embedded_chair(str(scenes), limit=limit or _CAPTIONED_SCENES, seed=seed, prompt=prompt)


def pope_task(
    *,
    scenes: str | None,
    limit: int | None,
    seed: int,
    splits: "Sequence[Strategy]",
    questions: Sequence[Path] | None = None,
    annotations: Path | None = None,
    images: Path | None = None,
    dataset: str | None = None,
    dataset_split: str | None = None,
    streaming: bool = False,
    columns: str | None = None,
    suffix: str = "",
    parser: str = "robust",
) -> "PopeTask":
    """Questions of a data set, of files, built from annotations, or about embedded scenes.

    The options are those of `vlm-steer eval pope`. The embedded scenes are taken where no other
    source is named, 100 of them without a limit.

    Raises:
        ConfigError: options contradict each other, or one has no effect.
        DataError: a file cannot be used.
    """
    from vlm_steer_eval.running.hub import hub_pope
    from vlm_steer_eval.running.sources import built_pope, embedded_pope, local_pope

    refuse_several_sources(questions=questions, annotations=annotations, dataset=dataset)
    refuse_without_dataset(dataset, columns=columns, streaming=streaming)
    if dataset is not None:
        return hub_pope(
            dataset,
            str(dataset_split),
            columns=columns,
            streaming=streaming,
            limit=limit,
            seed=seed,
            parser=parser,
            suffix=suffix,
        )
    if questions:
        folder = required_folder(images, "--questions")
        return local_pope(questions, folder, limit=limit, seed=seed, parser=parser, suffix=suffix)
    if annotations is not None:
        folder = required_folder(images, "--annotations")
        return built_pope(
            annotations,
            folder,
            splits=splits,
            limit=limit,
            seed=seed,
            parser=parser,
            suffix=suffix,
        )
    refuse_on_scenes(images=images, suffix=suffix or None)
    return embedded_pope(
        str(scenes), splits=splits, limit=limit or _ASKED_SCENES, seed=seed, parser=parser
    )


def opope_task(
    *,
    scenes: str | None,
    limit: int | None,
    seed: int,
    splits: "Sequence[Strategy]",
    prompt: str,
    questions: Sequence[Path] | None = None,
    annotations: Path | None = None,
    images: Path | None = None,
    reader: OpopeReader = "table",
) -> "OpopeTask":
    """One caption for the questions about each image, which come from where POPE's do.

    The options are those of `vlm-steer eval opope`. Captions of the embedded scenes are read by
    the names of their categories.

    Raises:
        ConfigError: options contradict each other, or one has no effect.
        DataError: a file cannot be used, or a question names no object.
    """
    from vlm_steer.tiny import CATEGORIES
    from vlm_steer_eval.benchmarks.opope import opope_task as task_of
    from vlm_steer_eval.benchmarks.vocabulary import ObjectVocabulary

    asked = pope_task(
        scenes=scenes,
        limit=limit,
        seed=seed,
        splits=splits,
        questions=questions,
        annotations=annotations,
        images=images,
    )
    is_embedded = not questions and annotations is None
    vocabulary = ObjectVocabulary.from_names(CATEGORIES) if is_embedded else None
    return task_of(asked.items, prompt=prompt, reader=reader, vocabulary=vocabulary)
