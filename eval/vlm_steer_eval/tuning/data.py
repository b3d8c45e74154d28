"""What a study tunes on, and what it confirms on: never the same images, never a test split first.

A source is described by the options of `vlm-steer eval chair` and `vlm-steer eval pope`.
"""

import dataclasses
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from vlm_steer._options import check_fields, plain
from vlm_steer._yaml import Place
from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.benchmarks.tasks import Item, Task
from vlm_steer_eval.choices import NormaliserName, ParserName, ScenesName
from vlm_steer_eval.commands.origins import chair_task, pope_task
from vlm_steer_eval.running.genlog import content_key
from vlm_steer_eval.running.images import ImageSource
from vlm_steer_eval.running.runner import check_images
from vlm_steer_eval.running.sources import CAPTION_PROMPT, subset

__all__ = ["EMBEDDED", "Material", "Sources", "gather", "limited", "read_sources"]

EMBEDDED = "tiny"
"""The embedded scenes as data: `validation` to tune on, `broken` to confirm on."""

_FRACTIONS = (0.25, 0.5, 1.0)
_FEWEST_FOR_PARTS = 8

Split: TypeAlias = Literal["random", "popular", "adversarial"]


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What both benchmarks read."""

    origins: ClassVar[tuple[str, ...]]

    scenes: ScenesName | None = None
    annotations: Path | None = None
    images: Path | None = None
    dataset: str | None = None
    dataset_split: str | None = None
    columns: str | None = None
    max_new_tokens: int

    def origin(self) -> str:
        """The one option that says where the data come from.

        Raises:
            ConfigError: there is none, or more than one.
        """
        given = [name for name in self.origins if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"expected one of {', '.join(self.origins)}, found {' and '.join(given) or 'none'}."
            )
        return given[0]

    def task(self, limit: int, seed: int) -> Task:
        """The benchmark on at most so many images."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Everything that says where items come from."""
        names = (f.name for f in dataclasses.fields(self) if f.name != "max_new_tokens")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ChairData(_Data):
    """Where captions are asked for."""

    origins = ("scenes", "annotations", "objects", "dataset")

    objects: Path | None = None
    prompt: str = CAPTION_PROMPT
    normaliser: NormaliserName = "table"
    synonyms: Path | None = None
    max_new_tokens: int = 512

    def task(self, limit: int, seed: int) -> Task:
        """See the base class."""
        return chair_task(**self.options(), limit=limit, seed=seed)


@dataclass(frozen=True, kw_only=True)
class PopeData(_Data):
    """Where yes/no questions come from."""

    origins = ("scenes", "questions", "annotations", "dataset")

    questions: tuple[Path, ...] = ()
    splits: tuple[Split, ...] = ("random", "popular", "adversarial")
    suffix: str = ""
    parser: ParserName = "robust"
    max_new_tokens: int = 16

    def task(self, limit: int, seed: int) -> Task:
        """See the base class."""
        return pope_task(**self.options(), limit=limit, seed=seed)


Sources: TypeAlias = Mapping[str, ChairData | PopeData]
"""Benchmark -> where its items come from."""

_KINDS: Mapping[str, type[ChairData] | type[PopeData]] = {"chair": ChairData, "pope": PopeData}
_EMBEDDED_TOKENS = {"chair": 96, "pope": 4}


@dataclass(frozen=True)
class Material:
    """The data of a study.

    Attributes:
        parts: benchmark -> its tuning images in parts that are run one after the other, so that a
            hopeless setting can be given up early.
        held_out: benchmark -> the images that confirm the choice.
        tokens: benchmark -> longest answer.
        sources: benchmark -> how the data were described.
        left_out: items whose image cannot be read, and held-out items that are tuned on.
        digest: a hash of every tuning item, its image included.
    """

    parts: Mapping[str, Sequence[Task]]
    held_out: Mapping[str, Task]
    tokens: Mapping[str, int]
    sources: Mapping[str, Any]
    digest: str
    left_out: Sequence[str] = field(default=())

    @property
    def n_images(self) -> dict[str, int]:
        """Images of each purpose; one that serves two benchmarks counts twice."""
        tuning = [task for tasks in self.parts.values() for task in tasks]
        return {
            "tuning": sum(len({i.cluster for i in task.items}) for task in tuning),
            "held_out": sum(len({i.cluster for i in t.items}) for t in self.held_out.values()),
        }


def read_sources(
    written: object, benchmarks: Sequence[str], place: Place, *, tuning: bool
) -> "dict[str, ChairData | PopeData]":
    """Read the section `data` or `held_out`.

    Args:
        written: `tiny`, or the options of each benchmark.
        benchmarks: those that the goals need.
        place: where the section lies.
        tuning: whether test splits are refused.

    Raises:
        ConfigError: a benchmark is missing or needless, an option is wrong, or a test split is
            tuned on.
    """
    if written == EMBEDDED:
        scenes = "validation" if tuning else "broken"
        written = {
            name: {"scenes": scenes, "max_new_tokens": _EMBEDDED_TOKENS[name]}
            for name in benchmarks
        }
    if not isinstance(written, Mapping):
        raise place.error(
            f"the data must be {EMBEDDED}, or the options of each of {', '.join(benchmarks)}."
        )
    for name in written:
        if name not in benchmarks:
            raise place[name].error(
                f"no objective or constraint is about {name!r}; the goals need "
                f"{', '.join(benchmarks)}."
            )
    sources = {}
    for name in benchmarks:
        if not isinstance(written.get(name), Mapping):
            raise place.error(f"the options of {name} are missing, which the goals need.")
        inside, kind = place[name], _KINDS[name]
        fields = [f.name for f in dataclasses.fields(kind)]
        source = kind(**check_fields(kind, fields, written[name], inside, name))
        with inside.blamed():
            _check(source, tuning=tuning)
        sources[name] = source
    return sources


def _check(source: ChairData | PopeData, *, tuning: bool) -> None:
    origin = source.origin()
    if origin in ("annotations", "objects", "questions") and source.images is None:
        raise ConfigError(f"{origin} needs images, the folder of the images.")
    if source.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {source.max_new_tokens}; it must be at least 1.")
    if source.dataset and not source.dataset_split:
        raise ConfigError("dataset needs dataset_split, the name of the split.")
    if not tuning:
        return
    if source.scenes not in (None, "validation"):
        raise ConfigError(
            f"the scenes {source.scenes!r} are a test split, and what is tuned on them cannot be "
            "tested on them. Write validation."
        )
    if source.dataset_split and "test" in source.dataset_split.lower():
        raise ConfigError(
            f"{source.dataset_split!r} is a test split, and what is tuned on it cannot be tested "
            "on it. Name another split under data; this one may stand under held_out."
        )


def limited(sources: Sources, max_new_tokens: int | None) -> Sources:
    """The sources with another longest answer; None changes nothing."""
    if max_new_tokens is None:
        return sources
    return {
        name: dataclasses.replace(source, max_new_tokens=max_new_tokens)
        for name, source in sources.items()
    }


def gather(
    tuning: Sources,
    held_out: Sources | None,
    *,
    n_images: int,
    n_held_out: int,
    seed: int,
) -> Material:
    """Build the tasks of a study.

    Args:
        tuning: where to tune, from `read_sources`.
        held_out: where to confirm; None takes other images of the same source.
        n_images: images to tune on, per benchmark.
        n_held_out: images to confirm on, per benchmark.
        seed: seed of the choice of images.

    Raises:
        DataError: data cannot be used, an image is given for both purposes, or none are left to
            confirm on.
    """
    parts: dict[str, list[Task]] = {}
    confirming: dict[str, Task] = {}
    left_out: list[str] = []
    digests: dict[ImageSource, str] = {}
    for name, source in tuning.items():
        if held_out is None:
            everything = source.task(n_images + n_held_out, seed)
            chosen = set(subset((item.cluster for item in everything.items), n_images, seed))
            task = _only(everything, [i for i in everything.items if i.cluster in chosen])
            rest = _only(everything, [i for i in everything.items if i.cluster not in chosen])
        else:
            task, rest = source.task(n_images, seed), held_out[name].task(n_held_out, seed)
        usable = _usable(task, digests, left_out)
        if not usable.items:
            raise DataError(f"none of the {len(task.items)} items of {name} has a usable image")
        parts[name] = _parts(usable, seed)
        confirming[name] = rest
    tuned_on = set(digests.values())
    content = {
        name: [_identity(item, digests) for task in tasks for item in task.items]
        for name, tasks in parts.items()
    }
    for name, task in confirming.items():
        usable = _usable(task, digests, left_out)
        fresh = [item for item in usable.items if digests[item.image] not in tuned_on]
        n_shared = len(usable.items) - len(fresh)
        if n_shared and held_out is not None:
            raise DataError(
                f"{n_shared} of the {len(usable.items)} held-out items of {name} show an image "
                "that is tuned on; give other images under held_out"
            )
        left_out += [item.id for item in usable.items if item not in fresh]
        if not fresh:
            raise DataError(
                f"no image of {name} is left to confirm the choice on; lower images, or give "
                "others under held_out"
            )
        confirming[name] = _only(task, fresh)
    return Material(
        parts,
        confirming,
        {name: source.max_new_tokens for name, source in tuning.items()},
        {
            "data": {name: _plain(source) for name, source in tuning.items()},
            "held_out": {name: _plain(source) for name, source in (held_out or tuning).items()},
        },
        content_key(content),
        left_out,
    )


def _only(task: Task, items: Sequence[Item]) -> Task:
    return dataclasses.replace(task, items=items)  # type: ignore[type-var]


def _usable(task: Task, digests: dict[ImageSource, str], left_out: list[str]) -> Task:
    by_item, failures = check_images(task.items)
    left_out += [failure["item"] for failure in failures]
    usable = [item for item in task.items if item.id in by_item]
    digests.update((item.image, by_item[item.id]) for item in usable)
    return _only(task, usable)


def _parts(task: Task, seed: int) -> list[Task]:
    """The task in parts of whole images: a quarter, another quarter, the other half."""
    clusters = {item.cluster for item in task.items}
    if len(clusters) < _FEWEST_FOR_PARTS:
        return [task]
    parts, before = [], set[str]()
    for fraction in _FRACTIONS:
        upto = set(subset(clusters, round(fraction * len(clusters)), seed))
        parts.append(_only(task, [i for i in task.items if i.cluster in upto - before]))
        before = upto
    return parts


def _identity(item: Item, digests: Mapping[ImageSource, str]) -> dict[str, Any]:
    gold = {
        key: sorted(value) if isinstance(value, Set) else value for key, value in item.gold.items()
    }
    return {"item": item.id, "prompt": item.prompt, "gold": gold, "image": digests[item.image]}


def _plain(source: ChairData | PopeData) -> dict[str, Any]:
    """What was said of a source, without what was left open."""
    said = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    return {
        name: [str(v) for v in value] if isinstance(value, tuple) else plain(value, name)
        for name, value in said.items()
        if value not in (None, ())
    }
