"""Benchmark items from a data set of the HuggingFace hub, by a mapping of its columns."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.benchmarks.chair import Normaliser, TableNormaliser
from vlm_steer_eval.benchmarks.tasks import ChairTask, Item, PopeTask
from vlm_steer_eval.benchmarks.vocabulary import ObjectVocabulary
from vlm_steer_eval.files import image_key

from .images import BytesImage, ImageError, ImageSource, RowImage, UnusableImage
from .sources import CAPTION_PROMPT, subset

__all__ = ["hub_chair", "hub_pope", "parse_columns"]

POPE_COLUMNS = {"id": "question_id", "question": "question", "label": "answer", "image": "image"}
CHAIR_COLUMNS = {"id": "image_id", "image": "image", "objects": "objects"}
_OPTIONAL = {"name", "split"}


def parse_columns(text: str | None, defaults: Mapping[str, str]) -> dict[str, str]:
    """A mapping of roles to columns, written `role=column,role=column`, over the defaults.

    Raises:
        ConfigError: it is malformed, or names an unknown role.
    """
    columns = dict(defaults)
    known = [*defaults, *sorted(_OPTIONAL)]
    for part in filter(None, (text or "").split(",")):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or role not in known:
            raise ConfigError(
                f"--columns {part!r} is not role=column; the roles here are {', '.join(known)}"
            )
        columns[role] = column
    return columns


def hub_pope(
    dataset: str,
    split: str,
    *,
    columns: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    seed: int = 0,
    parser: str = "robust",
    suffix: str = "",
) -> PopeTask:
    """POPE from a data set with question, yes/no label and image columns.

    Args:
        dataset: hub id, or the folder of a local data set.
        split: its split, such as `test`.
        columns: `role=column,...` for the roles id, question, label, image, and optionally name
            (the image's name; rows with equal names are one cluster) and split (the POPE split).
        streaming: read row by row and stop behind the first `limit` images, which then are not
            chosen by hash; the data set is not stored.
        limit: number of images; None for all.
        seed: seed of their choice.
        parser: reading rule.
        suffix: appended to every question.

    Raises:
        ConfigError: the mapping names no such role or column, or there is no limit to streaming.
        DataError: the data set cannot be loaded, or a label is neither yes nor no.
    """
    roles = parse_columns(columns, POPE_COLUMNS)
    rows = _rows(dataset, split, roles, limit, streaming=streaming)
    return PopeTask(
        _chosen(_questions(rows, dataset, split, suffix), limit, seed, streaming), parser
    )


def _questions(
    rows: Iterable[Mapping[str, Any]], dataset: str, split: str, suffix: str
) -> Iterator[Item]:
    for row in rows:
        label = str(row["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise DataError(
                f"{dataset}, row {row['id']}: the label is {row['label']!r}, expected yes or no; "
                "choose the right column with --columns label=NAME"
            )
        part = str(row.get("split", split))
        yield Item(
            id=f"{part}/{row['id']}",
            image=row["image"],
            prompt=f"{row['question']}{suffix}",
            split=part,
            cluster=image_key(row["name"]) if "name" in row else _content(row["image"]),
            gold={"label": label},
        )


def _content(image: ImageSource) -> str:
    """Its digest, so that questions about one image are found; its name where it is unusable."""
    try:
        return image.digest()
    except ImageError:
        return image.name


def hub_chair(
    dataset: str,
    split: str,
    normaliser: Normaliser | None = None,
    *,
    columns: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    seed: int = 0,
    prompt: str = CAPTION_PROMPT,
) -> ChairTask:
    """CHAIR from a data set with an image column and a column of object names.

    Args:
        dataset: hub id, or the folder of a local data set.
        split: its split.
        normaliser: reads captions; the shipped table by default.
        columns: `role=column,...` for the roles id, image and objects.
        streaming: see `hub_pope`.
        limit: number of images; None for all.
        seed: seed of their choice.
        prompt: what the user says.

    Raises:
        ConfigError: the mapping names no such role or column, or there is no limit to streaming.
        DataError: the data set cannot be loaded.
    """
    roles = parse_columns(columns, CHAIR_COLUMNS)
    items = (
        Item(
            id=image_key(row["id"]),
            image=row["image"],
            prompt=prompt,
            split=split,
            cluster=image_key(row["id"]),
            gold={"objects": [str(name) for name in row["objects"]]},
        )
        for row in _rows(dataset, split, roles, limit, streaming=streaming)
    )
    reader = normaliser or TableNormaliser(ObjectVocabulary.coco())
    return ChairTask(_chosen(items, limit, seed, streaming), reader)


def _rows(
    dataset: str, split: str, roles: Mapping[str, str], limit: int | None, *, streaming: bool
) -> Iterator[dict[str, Any]]:
    """Role -> value; the value of `image` is an `ImageSource`, usable or not."""
    import datasets

    if streaming and limit is None:
        raise ConfigError("--streaming keeps what it reads in memory; say how much with --limit")
    try:
        table = datasets.load_dataset(dataset, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the data set {dataset!r} (split {split!r}) cannot be loaded: {reason} Check the name "
            "and the split, and the connection if it is on the hub"
        ) from error
    names = table.column_names or list(next(iter(table), {}))
    absent = [column for column in roles.values() if column not in names]
    if absent:
        raise ConfigError(
            f"{dataset} has no column {', '.join(absent)}; its columns are "
            f"{', '.join(names)}: map them with --columns role=column"
        )
    # Undecoded images keep their bytes, which the content hash needs.
    table = table.cast_column(roles["image"], datasets.Image(decode=False))
    texts = {role: column for role, column in roles.items() if role != "image"}
    cells = None if streaming else table.select_columns([roles["image"]])
    for index, row in enumerate(table if streaming else table.remove_columns([roles["image"]])):
        values = {role: row[column] for role, column in texts.items()}
        name = str(values.get("name", values["id"]))
        if cells is None:
            yield {**values, "image": _image(row[roles["image"]], name)}
        else:
            yield {**values, "image": RowImage(name, cells, index)}


def _image(cell: Any, name: str) -> ImageSource:
    try:
        return BytesImage.from_cell(cell, name)
    except ImageError as error:
        return UnusableImage(name, str(error))


def _chosen(items: Iterable[Item], limit: int | None, seed: int, streaming: bool) -> list[Item]:
    if streaming:
        return list(_first(items, limit))
    everything = list(items)
    kept = set(subset((item.cluster for item in everything), limit, seed))
    return [item for item in everything if item.cluster in kept]


def _first(items: Iterable[Item], limit: int | None) -> Iterator[Item]:
    """The items up to the first one about an image more than the limit."""
    seen: set[str] = set()
    for item in items:
        seen.add(item.cluster)
        if limit is not None and len(seen) > limit:
            return
        yield item
