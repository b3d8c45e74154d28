"""Which objects each image holds: the ground truth of CHAIR."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlm_steer.errors import DataError
from vlm_steer_eval.files import image_key, read_json

from .chair import Normaliser
from .vocabulary import ObjectVocabulary

__all__ = ["load_object_sets", "objects_from_annotations"]

ObjectSets = dict[str, frozenset[str]]

_CAPTION_YEARS = {"2014": ("2014",), "2017": ("2017", "2014")}


def load_object_sets(path: Path) -> ObjectSets:
    """Object sets from a JSON file `{"names": [...], "objects": {image_id: [indices into names]}}`.

    Returns:
        Image key (see `image_key`) -> object names.

    Raises:
        DataError: the file is missing or has another shape.
    """
    table = read_json(path)
    try:
        names = [str(name) for name in table["names"]]
        return {
            image_key(image): frozenset(names[index] for index in indices)
            for image, indices in table["objects"].items()
        }
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            f"{path} is not an object-set file ({error!r}); expected "
            '{"names": [names], "objects": {image_id: [indices into names]}}'
        ) from error


def objects_from_annotations(
    folder: Path, normaliser: Normaliser, images: Collection[str]
) -> ObjectSets:
    """Object sets as CHAIR defines them: annotated instances and what the reference captions name.

    Args:
        folder: holds `instances_SET.json` and the matching `captions_SET.json` for train2014,
            val2014, train2017 or val2017. The 2017 instances may come with 2014 captions, which
            describe the same images.
        normaliser: reads the reference captions.
        images: image keys to collect; others are skipped, since reading captions is the slow part.

    Returns:
        Image key -> object names, for those of `images` that the annotations know.

    Raises:
        DataError: a needed file is missing or malformed, or a category is not in the vocabulary.
    """
    wanted = set(images)
    sets: dict[str, set[str]] = {}
    for path in _annotation_files(folder):
        table = read_json(path)
        try:
            for image in table["images"]:
                if image_key(image["id"]) in wanted:
                    sets.setdefault(image_key(image["id"]), set())
            if path.name.startswith("instances"):
                _add_instances(sets, table, wanted, _categories(table, normaliser.vocabulary, path))
            else:
                _add_captions(sets, table, wanted, normaliser)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a COCO annotation file (at {error}); give the unpacked "
                "COCO annotations"
            ) from error
    return {image: frozenset(names) for image, names in sets.items()}


def _annotation_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"the annotations folder {folder} does not exist; check the path")
    candidates = [
        folder / f"instances_{part}{year}.json"
        for part in ("train", "val")
        for year in _CAPTION_YEARS
    ]
    files = [path for path in candidates if path.is_file()]
    if not files:
        raise DataError(
            f"the annotations folder {folder} holds no instances_val2014.json (nor train2014, "
            "val2017, train2017); unpack the COCO annotations there, or give --objects instead"
        )
    captions = dict.fromkeys(_captions_beside(path) for path in files)
    # Images move between train and val from 2014 to 2017, so every 2014 caption file is needed
    # then.
    if any(path.stem.endswith("2017") for path in files):
        captions.update(dict.fromkeys(sorted(folder.glob("captions_*2014.json"))))
    return files + list(captions)


def _captions_beside(instances: Path) -> Path:
    part, year = instances.stem.removeprefix("instances_")[:-4], instances.stem[-4:]
    candidates = [
        instances.with_name(f"captions_{part}{other}.json") for other in _CAPTION_YEARS[year]
    ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{instances.parent} holds {instances.name} but no {candidates[0].name}; CHAIR's ground "
        "truth needs the reference captions too: unpack them there, or give --objects instead"
    )


def _categories(
    table: Mapping[str, Any], vocabulary: ObjectVocabulary, path: Path
) -> dict[Any, str]:
    named: dict[Any, str] = {}
    for category in table["categories"]:
        name = str(category["name"])
        known = vocabulary.surfaces.get(tuple(name.split(" ")))
        if known is None:
            raise DataError(
                f"{path}: the category {name!r} is not in the vocabulary; give a --synonyms file "
                "that has a line for it"
            )
        named[category["id"]] = known
    return named


def _add_instances(
    sets: dict[str, set[str]],
    table: Mapping[str, Any],
    wanted: set[str],
    categories: Mapping[Any, str],
) -> None:
    for annotation in table["annotations"]:
        image = image_key(annotation["image_id"])
        if image in wanted:
            sets.setdefault(image, set()).add(categories[annotation["category_id"]])


def _add_captions(
    sets: dict[str, set[str]], table: Mapping[str, Any], wanted: set[str], normaliser: Normaliser
) -> None:
    for annotation in table["annotations"]:
        image = image_key(annotation["image_id"])
        if image in wanted:
            mentions = normaliser.read(annotation["caption"]).mentions
            sets.setdefault(image, set()).update(mention.object for mention in mentions)
