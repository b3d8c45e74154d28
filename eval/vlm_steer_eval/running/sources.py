"""Where benchmark items come from: the embedded scenes, local files, or a hub data set."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.benchmarks.chair import Normaliser, TableNormaliser
from vlm_steer_eval.benchmarks.objects import load_object_sets, objects_from_annotations
from vlm_steer_eval.benchmarks.pope_builder import (
    POPE_TEMPLATE,
    STRATEGIES,
    ImageObjects,
    ObjectStatistics,
    Strategy,
    build_pope,
    images_from_instances,
    object_statistics,
)
from vlm_steer_eval.benchmarks.questions import PopeQuestion, list_some, load_questions
from vlm_steer_eval.benchmarks.tasks import ChairTask, Item, PopeTask
from vlm_steer_eval.benchmarks.vocabulary import ObjectVocabulary
from vlm_steer_eval.files import image_key, read_json, read_rows, read_text

from .images import FileImage, ImageSource, SceneImage, UnusableImage

__all__ = [
    "CAPTION_PROMPT",
    "built_pope",
    "embedded_chair",
    "embedded_pope",
    "load_image_list",
    "local_chair",
    "local_pope",
    "require_folder",
    "subset",
]

CAPTION_PROMPT = "Please describe this image in detail."
"""The prompt of CHAIR in OPERA and its successors."""

_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def subset(clusters: Iterable[str], limit: int | None, seed: int = 0) -> list[str]:
    """At most `limit` distinct images, chosen by a seeded hash and independent of their order.

    A larger limit adds images to those of a smaller one.
    """
    distinct = sorted(set(clusters))
    if limit is None or limit >= len(distinct):
        return distinct
    ranked = sorted(distinct, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    return sorted(ranked[:limit])


def embedded_pope(
    scenes: str = "broken",
    *,
    splits: Sequence[Strategy] = STRATEGIES,
    limit: int | None = 100,
    seed: int = 0,
    parser: str = "robust",
) -> PopeTask:
    """POPE on the embedded scenes; frequencies and co-occurrences are those of the training scenes.

    Args:
        scenes: `iid`, `broken` or `validation`.
        splits: which of random, popular and adversarial.
        limit: number of scenes; None for all.
        seed: seed of the choice of scenes and of the objects asked.
        parser: reading rule.

    Raises:
        DataError: there is no such split of scenes.
    """
    from vlm_steer.tiny.scenes import annotations, training_annotations

    instances = annotations(scenes)
    ids = {str(image["file_name"]): int(image["id"]) for image in instances["images"]}
    images = images_from_instances(instances)
    chosen = set(subset([image.image for image in images], limit, seed))
    statistics = object_statistics(images_from_instances(training_annotations()))
    return PopeTask(
        _built_items(
            [image for image in images if image.image in chosen],
            {name: SceneImage(scenes, image_id) for name, image_id in ids.items()},
            splits,
            statistics,
            seed,
        ),
        parser,
    )


def embedded_chair(
    scenes: str = "broken", *, limit: int | None = 300, seed: int = 0, prompt: str = CAPTION_PROMPT
) -> ChairTask:
    """CHAIR on the embedded scenes, with their 24 category names and plurals as vocabulary.

    Args:
        scenes: `iid`, `broken` or `validation`.
        limit: number of scenes; None for all.
        seed: seed of the choice of scenes.
        prompt: what the user says.

    Raises:
        DataError: there is no such split of scenes.
    """
    from vlm_steer.tiny import CATEGORIES
    from vlm_steer.tiny.scenes import annotations

    instances = annotations(scenes)
    ids = {str(image["file_name"]): int(image["id"]) for image in instances["images"]}
    objects = {image.image: image.objects for image in images_from_instances(instances)}
    items = [
        Item(
            id=str(ids[name]),
            image=SceneImage(scenes, ids[name]),
            prompt=prompt,
            split=scenes,
            cluster=name,
            gold={"objects": objects[name]},
        )
        for name in subset(objects, limit, seed)
    ]
    return ChairTask(items, TableNormaliser(ObjectVocabulary.from_names(CATEGORIES)))


def local_pope(
    questions: Sequence[Path],
    images: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    parser: str = "robust",
    suffix: str = "",
) -> PopeTask:
    """POPE from question files and an image folder.

    Args:
        questions: POPE-format files; each is a split named by the end of its name, or by its rows'
            `category`. Of dialogues every turn is asked after the answers before it.
        images: folder of the images that the questions name.
        limit: number of images; None for all.
        seed: seed of their choice.
        parser: reading rule.
        suffix: appended to every question, such as " Please answer this question with one word."

    Raises:
        DataError: a file is malformed, or the folder does not exist.
    """
    require_folder(images)
    files = {path: load_questions(path, dialogues=True) for path in questions}
    chosen = set(subset((q.cluster for rows in files.values() for q in rows), limit, seed))
    names = _split_names(list(files))
    several = len(files) > 1
    items = [
        _question_item(question, names[path], images, suffix, several=several)
        for path, rows in files.items()
        for question in rows
        if question.cluster in chosen
    ]
    return PopeTask(items, parser)


def built_pope(
    annotations: Path,
    images: Path,
    *,
    splits: Sequence[Strategy] = STRATEGIES,
    limit: int | None = None,
    seed: int = 0,
    parser: str = "robust",
    suffix: str = "",
) -> PopeTask:
    """POPE built from a COCO-format instances file and an image folder.

    Frequencies and co-occurrences are those of the whole file, whatever the limit.

    Args:
        annotations: COCO-format instances file.
        images: folder of its images.
        splits: which of random, popular and adversarial.
        limit: number of images; None for all.
        seed: seed of the choice of images and of the objects asked.
        parser: reading rule.
        suffix: appended to every question.

    Raises:
        DataError: the file is malformed, or the folder does not exist.
    """
    require_folder(images)
    known = images_from_instances(read_json(annotations))
    chosen = set(subset([image.image for image in known], limit, seed))
    return PopeTask(
        _built_items(
            [image for image in known if image.image in chosen],
            {image.image: FileImage(images / image.image) for image in known},
            splits,
            object_statistics(known),
            seed,
            suffix,
        ),
        parser,
    )


def local_chair(
    images: Path,
    normaliser: Normaliser | None = None,
    *,
    annotations: Path | None = None,
    objects: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    prompt: str = CAPTION_PROMPT,
    listed: Path | None = None,
) -> ChairTask:
    """CHAIR on an image folder with local ground truth.

    Args:
        images: folder; its image files that have ground truth are captioned.
        normaliser: reads captions. By default the shipped table, or, for an instances file with
            other categories, the names of its categories and their plurals.
        annotations: folder of COCO annotations, or one COCO-format instances file.
        objects: object sets per image instead; see `load_object_sets`.
        limit: number of images; None for all.
        seed: seed of their choice.
        prompt: what the user says.
        listed: file of the only images to caption, see `load_image_list`.

    Raises:
        ConfigError: neither or both of `annotations` and `objects`.
        DataError: a file cannot be used, or no image has ground truth.
    """
    if (annotations is None) == (objects is None):
        raise ConfigError("eval chair with --images needs either --annotations or --objects")
    require_folder(images)
    files = {
        image_key(path.name): path
        for path in sorted(images.iterdir())
        if path.suffix.lower() in _IMAGE_SUFFIXES
    }
    reader = normaliser or TableNormaliser(ObjectVocabulary.coco())
    if objects is not None:
        truth = load_object_sets(objects)
    elif annotations is not None and annotations.is_dir():
        truth = objects_from_annotations(annotations, reader, files)
    elif annotations is not None:
        known = images_from_instances(read_json(annotations))
        truth = {image_key(image.image): frozenset(image.objects) for image in known}
        named = {name for image in known for name in image.objects}
        if normaliser is None and not named <= set(reader.vocabulary.names):
            reader = TableNormaliser(ObjectVocabulary.from_names(sorted(named)))
    usable = files.keys() & truth.keys()
    if listed is not None:
        wanted = load_image_list(listed)
        absent = [name for name in wanted if name not in usable]
        if absent:
            raise DataError(
                f"{len(absent)} of the {len(wanted)} images of {listed} ({list_some(absent)}) are "
                f"not in {images} or have no ground truth; complete them, or shorten the list"
            )
        usable = set(wanted)
    clusters = subset(usable, limit, seed)
    if not clusters:
        raise DataError(
            f"none of the {len(files)} images in {images} has ground truth in "
            f"{annotations or objects}; "
            "check that both name the same images"
        )
    items = [
        Item(
            id=cluster,
            image=FileImage(files[cluster]),
            prompt=prompt,
            split="all",
            cluster=cluster,
            gold={"objects": sorted(truth[cluster])},
        )
        for cluster in clusters
    ]
    return ChairTask(items, reader)


def load_image_list(path: Path) -> list[str]:
    """Image keys of a file: rows with `image_id` or `image`, or one id or file name per line.

    Raises:
        DataError: the file cannot be used, or names an image twice.
    """
    text = read_text(path).strip()
    if text.startswith(("{", "[{")):
        rows = [row.get("image_id", row.get("image")) for row in read_rows(path)]
        names = ["" if name is None else str(name) for name in rows]
    else:
        names = text.splitlines()
    keys = [image_key(name.strip()) for name in names if name.strip()]
    if not keys or len(set(keys)) < len(names):
        raise DataError(
            f"{path}: expected different images, one per row under image_id or image, or one id "
            "or file name per line"
        )
    return keys


def require_folder(folder: Path) -> None:
    """Raise `DataError` where images are to be found in what is no folder."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--images {folder} is a file; give the folder of the images")
    if not folder.is_dir():
        raise DataError(f"the image folder {folder} does not exist; check --images")


def _built_items(
    images: Sequence[ImageObjects],
    sources: Mapping[str, Any],
    splits: Sequence[Strategy],
    statistics: ObjectStatistics,
    seed: int,
    suffix: str = "",
) -> list[Item]:
    return [
        Item(
            id=f"{split}/{question.image}/{question.asked}",
            image=sources[question.image],
            prompt=question.text + suffix,
            split=split,
            cluster=image_key(question.image),
            gold={"label": question.label, "asked": question.asked},
        )
        for split in splits
        for question in build_pope(
            images, split, statistics=statistics, seed=seed, template=POPE_TEMPLATE
        )
    ]


def _question_item(
    question: PopeQuestion, file: str, images: Path, suffix: str, *, several: bool
) -> Item:
    """One question; dialogues of several files are split by file, those of one file by turn."""
    is_dialogue = bool(question.after) or question.category.startswith("turn ")
    split = file if is_dialogue and several else question.category or file
    prefix = file if is_dialogue else split
    return Item(
        id=f"{prefix}/{question.id}",
        image=_question_image(question, images),
        prompt=question.text + suffix,
        split=split,
        cluster=question.cluster,
        gold={"label": question.label},
        after=f"{prefix}/{question.after}" if question.after else None,
    )


def _question_image(question: PopeQuestion, images: Path) -> ImageSource:
    if not question.image:
        return UnusableImage("", f"question {question.id} names no image; complete the file")
    # POPEv2 writes "/images/1.jpg" for what lies in the folder.
    inside = images / question.image.lstrip("/")
    outside = Path(question.image)
    return FileImage(outside if outside.is_file() and not inside.is_file() else inside)


def _split_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A short name per file where the short names differ, else the whole stem, else the path."""
    for name in (lambda p: p.stem.rpartition("_")[2], lambda p: p.stem, str):
        names = {path: name(path) for path in paths}
        if len(set(names.values())) == len(paths):
            return names
    raise DataError("the same question file was given twice; give every file once")
