"""A search space: a steering in whose options some values are ranges.

===================================  =========================================================
written in place of a value          means
===================================  =========================================================
``{min: 0.1, max: 1.0}``             any number between, both ends included
``{min: 0.1, max: 1.0, step: 0.1}``  one of these ten
``{min: 0.01, max: 1, log: true}``   any number between, evenly in its logarithm
``{choices: [all, [2, null]]}``      one of the listed values
===================================  =========================================================

A range may stand anywhere inside a value, such as ``layers: [{min: 0, max: 0.5}, null]``.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from vlm_steer._yaml import Place
from vlm_steer.config import resolve_data
from vlm_steer.errors import ConfigError
from vlm_steer.registry import get_method

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = ["Choices", "Numbers", "Parameter", "Space", "read_space"]

_KEYS = frozenset({"min", "max", "log", "step", "choices"})
_DIGITS = 4
"""Significant digits of a suggested number, so that the winner can be read."""

Path: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Numbers:
    """A range of numbers.

    Attributes:
        name: what the study calls it, such as ``pai.alpha``.
        path: where it stands below ``methods``.
        low: smallest value.
        high: largest value.
        step: distance of the values; None for all.
        log: whether to search evenly in the logarithm.
        whole: whether values are whole numbers.
    """

    name: str
    path: Path
    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Any) -> float | int:
        """Ask an Optuna trial for a value."""
        if self.whole:
            step = int(self.step or 1)
            return int(
                trial.suggest_int(self.name, int(self.low), int(self.high), step=step, log=self.log)
            )
        value = trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)
        rounded = round(value, 10) if self.step else float(f"{value:.{_DIGITS}g}")
        return min(max(rounded, self.low), self.high)

    def ends(self) -> tuple[Any, ...]:
        """The values between which all others lie."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def start(self, default: object) -> Any:
        """What the study knows the default by; the middle where the range excludes it."""
        value = (self.low + self.high) / 2
        if isinstance(default, int | float) and self.low <= default <= self.high:
            value = default
        if self.step:
            value = self.low + round((value - self.low) / self.step) * self.step
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Choices:
    """A list of values.

    Attributes:
        name: what the study calls it.
        path: where it stands below ``methods``.
        values: plain data.
    """

    name: str
    path: Path
    values: tuple[Any, ...]

    def suggest(self, trial: Any) -> Any:
        """Ask an Optuna trial for a value."""
        return json.loads(trial.suggest_categorical(self.name, list(map(_key, self.values))))

    def ends(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    def start(self, default: object) -> str:
        """What the study knows the default by; the first value where the list lacks it."""
        return _key(default if default in self.values else self.values[0])


Parameter: TypeAlias = Numbers | Choices


@dataclass(frozen=True)
class Space:
    """What may be searched.

    Attributes:
        written: the list under ``methods``, ranges included.
        parameters: the ranges in it.
        place: where it was written.
    """

    written: Sequence[Any]
    parameters: tuple[Parameter, ...]
    place: Place

    def suggest(self, trial: Any) -> "tuple[Method, ...]":
        """The methods that an Optuna trial proposes.

        Raises:
            ConfigError: the values do not go together.
        """
        return self.methods({p.name: p.suggest(trial) for p in self.parameters})

    def methods(self, values: Mapping[str, Any]) -> "tuple[Method, ...]":
        """The methods with these values in place of the ranges.

        Raises:
            ConfigError: an option is unknown, or a value is out of range.
        """
        by_path = {p.path: values[p.name] for p in self.parameters}
        return resolve_data({"methods": _filled(self.written, (), by_path)}, self.place)

    def corners(self) -> "Iterator[tuple[Method, ...]]":
        """Steerings that between them hold the ends of every range, one range moved at a time."""
        first = {p.name: p.ends()[0] for p in self.parameters}
        yield self.methods(first)
        for parameter in self.parameters:
            for value in parameter.ends()[1:]:
                yield self.methods({**first, parameter.name: value})

    def start(self) -> dict[str, Any]:
        """The point to begin with, as Optuna names it: the defaults, where the ranges hold them."""
        return {p.name: p.start(self._default(p.path)) for p in self.parameters}

    def _default(self, path: Path) -> object:
        index, option, *rest = path
        method = get_method(self.written[int(index)]["method"])
        known = {f.name: f.default for f in dataclasses.fields(method)}
        return None if rest else known.get(str(option))


def read_space(methods: object, place: Place) -> Space:
    """Read the list under ``methods`` and check every range against the methods' options.

    Args:
        methods: plain data.
        place: where the file's top lies, for messages.

    Raises:
        ConfigError: a range is malformed or nothing is to be searched, an option is unknown, or an
            end of a range is no value of its option.
    """
    inside = place["methods"]
    listed = [methods] if isinstance(methods, str | Mapping) else methods
    if not isinstance(listed, Sequence):
        raise inside.error("methods must be a list of methods, some of whose options are ranges.")
    names = _names(listed)
    parameters = tuple(
        parameter
        for index, entry in enumerate(listed)
        if isinstance(entry, Mapping)
        for option, value in entry.items()
        if option != "method"
        for parameter in _parameters(
            value, (index, option), f"{names[index]}.{option}", inside[index][option]
        )
    )
    space = Space(listed, tuple(_typed(p, listed, inside) for p in parameters), place)
    if not parameters:
        resolve_data({"methods": listed}, place)
        raise inside.error(
            "there is nothing to search: no option is a range. Write for example "
            "alpha: {min: 0.1, max: 1.0}, or alpha: {choices: [0.1, 0.5]}."
        )
    for _ in space.corners():
        pass
    return space


def _names(listed: Sequence[Any]) -> list[str]:
    """A name per method; repeated ones are numbered."""
    plain = [str(e.get("method", "?")) if isinstance(e, Mapping) else str(e) for e in listed]
    return [
        name if plain.count(name) == 1 else f"{name}#{plain[:index].count(name) + 1}"
        for index, name in enumerate(plain)
    ]


def _parameters(value: object, path: Path, name: str, place: Place) -> Iterator[Parameter]:
    if isinstance(value, Mapping):
        if _KEYS & value.keys():
            yield _parameter(value, path, name, place)
            return
        for key, inner in value.items():
            yield from _parameters(inner, (*path, key), f"{name}.{key}", place[key])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, inner in enumerate(value):
            yield from _parameters(inner, (*path, index), f"{name}[{index}]", place[index])


def _parameter(value: Mapping[str, Any], path: Path, name: str, place: Place) -> Parameter:
    def wrong(why: str) -> ConfigError:
        return place.error(f"{name}: {why}")

    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise wrong(f"{unknown[0]!r} does not belong to a range, which has {_listed(_KEYS)}.")
    if "choices" in value:
        if len(value) > 1:
            raise wrong("choices stand alone; remove the other keys.")
        return _choices(value["choices"], path, name, place)
    if not {"min", "max"} <= value.keys():
        raise wrong("a range has min and max, or choices.")
    low, high, step, log = value["min"], value["max"], value.get("step"), value.get("log", False)
    for key in ("min", "max", "step"):
        number = value.get(key, 0)
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise wrong(f"{key} must be a number, not {json.dumps(number, default=str)}.")
    if not isinstance(log, bool):
        raise wrong("log must be true or false.")
    if low >= high:
        raise wrong(f"min {low} must lie below max {high}; write one value if nothing varies.")
    if step is not None and (step <= 0 or abs((high - low) / step % 1 - 0.5) < 0.5 - 1e-9):
        raise wrong(f"step {step} must be above 0 and lead from {low} to {high} in whole steps.")
    if log and (low <= 0 or step is not None):
        raise wrong("a logarithmic range has a min above 0 and no step.")
    whole = all(isinstance(value.get(key, 0), int) for key in ("min", "max", "step"))
    return Numbers(name, path, low, high, step, log, whole)


def _choices(values: object, path: Path, name: str, place: Place) -> Choices:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise place.error(f"{name}: choices must be a list.")
    if len({_key(value) for value in values}) < max(2, len(values)):
        raise place.error(f"{name}: choices must be at least two values, all different.")
    return Choices(name, path, tuple(values))


def _typed(parameter: Parameter, listed: Sequence[Any], place: Place) -> Parameter:
    """Search an option that is a plain number continuously, however its ends are written."""
    if isinstance(parameter, Choices) or not parameter.whole or len(parameter.path) > 2:
        return parameter
    index, option = parameter.path
    with place[index].blamed():
        method = get_method(str(listed[int(index)].get("method")))
    hint = typing.get_type_hints(method).get(str(option))
    whole = int in _members(hint)
    return dataclasses.replace(parameter, whole=whole)


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _filled(value: Any, path: Path, values: Mapping[Path, Any]) -> Any:
    if path in values:
        return values[path]
    if isinstance(value, Mapping):
        return {key: _filled(inner, (*path, key), values) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_filled(inner, (*path, index), values) for index, inner in enumerate(value)]
    return value


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=list)


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
