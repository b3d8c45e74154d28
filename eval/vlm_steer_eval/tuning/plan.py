"""A tuning file: a steering with ranges under `methods`, and what to do with them under `tune`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_steer._options import check_fields
from vlm_steer._yaml import Place, read_yaml
from vlm_steer.config import VERSION, find_preset
from vlm_steer.registry import did_you_mean
from vlm_steer_eval.running.generation import Settings

from .data import EMBEDDED, Sources, read_sources
from .goals import Goals, read_goals
from .space import Space, read_space
from .study import SamplerName

__all__ = ["COMPROMISE", "Options", "Plan", "read_plan"]

COMPROMISE = "compromise"
"""Choose the point whose objectives, each scaled to 0-1 over the front, have the largest sum."""

_SECTIONS = ("version", "methods", "tune")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The section `tune`.

    Attributes:
        objectives: metric -> `min` or `max`.
        constraints: metric -> bound.
        data: what to tune on.
        held_out: what to confirm on; other images of the same source by default.
        model: folder or hub name.
        trials: settings to try, >= 1.
        images: images to tune on, per benchmark, >= 2.
        held_out_images: images to confirm on, per benchmark, >= 2.
        sampler: `tpe`, `nsga2` or `random`.
        prune: give up hopeless settings before all images are seen.
        choose: `compromise`, or the objective that decides among the front.
        seed: seed of the search, of the choice of images and of sampled answers.
        num_beams: as for `vlm-steer eval`.
        temperature: as for `vlm-steer eval`.
        top_p: as for `vlm-steer eval`.
    """

    objectives: dict[str, Any]
    constraints: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: Any = EMBEDDED
    held_out: Any = None
    model: str = "tiny"
    trials: int = 24
    images: int = 60
    held_out_images: int = 200
    sampler: SamplerName = "tpe"
    prune: bool = True
    choose: str = COMPROMISE
    seed: int = 0
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def generation(self) -> dict[str, Any]:
        """How to generate, but for the length of answers."""
        names = ("num_beams", "temperature", "top_p", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Plan:
    """A tuning file, read and checked.

    Attributes:
        path: the file.
        options: the section `tune`.
        space: what is searched.
        goals: what for.
        tuning: where to tune.
        held_out: where to confirm; None for other images of the same source.
    """

    path: Path
    options: Options
    space: Space
    goals: Goals
    tuning: Sources
    held_out: Sources | None


def read_plan(path: Path, **overrides: Any) -> Plan:
    """Read a tuning file; a name without a folder is also looked for among those of the package.

    Args:
        path: the file.
        overrides: options to use instead of what is written, where not None.

    Raises:
        ConfigError: something in it is wrong; the message starts with `file:line:`.
    """
    data, place = read_yaml(_found(path))
    if not isinstance(data, Mapping) or not {"methods", "tune"} <= data.keys():
        raise place.error(
            "a tuning file has methods:, some of whose options are ranges, and tune:, with the "
            "objectives."
        )
    for key in data:
        if key not in _SECTIONS:
            raise place[key].error(f"unknown key {key!r}.{did_you_mean(str(key), _SECTIONS)}")
    if data.get("version", VERSION) != VERSION:
        raise place["version"].error(f"this vlm_steer reads version: {VERSION}.")
    space = read_space(data["methods"], place)
    inside = place["tune"]
    options = _options(data["tune"], inside, overrides)
    goals = read_goals(options.objectives, options.constraints, inside)
    _check(options, goals, inside)
    tuning = read_sources(options.data, goals.benchmarks, inside["data"], tuning=True)
    held_out = (
        EMBEDDED if options.held_out is None and options.data == EMBEDDED else options.held_out
    )
    return Plan(
        path,
        options,
        space,
        goals,
        tuning,
        None
        if held_out is None
        else read_sources(held_out, goals.benchmarks, inside["held_out"], tuning=False),
    )


def _found(path: Path) -> Path:
    if path.exists() or path.parent != Path():
        return path
    packaged = find_preset("pai").parent / "tune" / path.name
    return packaged if packaged.is_file() else path


def _options(written: object, place: Place, overrides: Mapping[str, Any]) -> Options:
    if not isinstance(written, Mapping):
        raise place.error("tune is a mapping with objectives:, data: and more.")
    names = [field.name for field in dataclasses.fields(Options)]
    values = check_fields(Options, names, written, place, "tune")
    if "objectives" not in values:
        raise place.error(
            "the objectives are missing. Write for example objectives: {chair_i: min, recall: max}."
        )
    given = {name: value for name, value in overrides.items() if value is not None}
    return Options(**{**values, **given})


def _check(options: Options, goals: Goals, place: Place) -> None:
    for name, least in (("trials", 1), ("images", 2), ("held_out_images", 2)):
        if getattr(options, name) < least:
            raise place[name].error(
                f"{name} is {getattr(options, name)}; it must be at least {least}."
            )
    deciders = [COMPROMISE, *(objective.metric for objective in goals.objectives)]
    if options.choose not in deciders:
        raise place["choose"].error(
            f"choose is {options.choose!r}; it must be one of {', '.join(deciders)}."
        )
    with place.blamed():
        Settings(**options.generation)
