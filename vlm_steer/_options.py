"""The options of a method: what they are, and whether a written value is one.

Types are checked here, where text becomes Python; ranges are checked by the method itself, so that
Python users meet the same errors.
"""

import dataclasses
import inspect
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from vlm_steer._yaml import Place, parse_yaml
from vlm_steer.errors import ConfigError, without_effect
from vlm_steer.registry import did_you_mean

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = [
    "Option",
    "build",
    "check_fields",
    "check_values",
    "describe",
    "option_names",
    "plain",
    "refuse_ignored",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option of a method.

    Attributes:
        name: How it is written.
        type: What may be written, in words.
        default: The value when nothing is written, as plain data; ``None`` also when required.
        required: Whether it has to be written.
        doc: Meaning and range, from the docstring of the class.
    """

    name: str
    type: str
    default: object
    required: bool
    doc: str


def describe(cls: "type[Method]") -> tuple[Option, ...]:
    """The options of a method class, its own before those that every method has."""
    docs, hints, own = _docs(cls), _hints(cls), inspect.get_annotations(cls)
    fields = _fields(cls)
    # Read off an instance, since a method may complete its defaults in __post_init__.
    has_defaults = not any(_is_required(field) for field in fields)
    defaults: object = cls() if has_defaults else cls
    return tuple(
        Option(
            name=field.name,
            type=_in_words(hints[field.name]),
            default=plain(getattr(defaults, field.name, None), field.name),
            required=_is_required(field),
            doc=docs.get(field.name, ""),
        )
        for field in sorted(fields, key=lambda field: field.name not in own)
    )


def option_names(cls: "type[Method]") -> tuple[str, ...]:
    """Names of the options of a method class."""
    return tuple(field.name for field in _fields(cls))


def build(cls: "type[Method]", written: Mapping[str, object], place: Place) -> "Method":
    """Make a method from what was written.

    Args:
        cls: A registered method class.
        written: Its options as plain data.
        place: Where they were written.

    Raises:
        ConfigError: An option is unknown, missing, of the wrong type, out of range or ignored.
    """
    values = check_values(cls, written, place)
    missing = [f.name for f in _fields(cls) if _is_required(f) and f.name not in values]
    if missing:
        raise place.error(
            f"{cls.name} needs {', '.join(missing)}. Write {missing[0]}: "
            f"{_in_words(_hints(cls)[missing[0]])}."
        )
    with _blaming_option(place, written):
        method = cls(**values)
    refuse_ignored(method, written, place)
    return method


def check_values(
    cls: "type[Method]", written: Mapping[str, object], place: Place
) -> dict[str, Any]:
    """Check names and types of written options and return their Python values."""
    unused = _unused(cls)
    for name in written:
        if name in unused:
            raise _without_effect(cls.name, name, unused[name], place)
    return check_fields(cls, option_names(cls), written, place, cls.name)


def check_fields(
    cls: type, names: Sequence[str], written: Mapping[str, object], place: Place, owner: str
) -> dict[str, Any]:
    """Check what is written for fields of a dataclass and return the Python values.

    Args:
        cls: The dataclass.
        names: Those of its fields that may be written.
        written: Plain data.
        place: Where it was written.
        owner: What messages call the dataclass.

    Raises:
        ConfigError: A name is unknown, or a value is of the wrong type.
    """
    for name in written:
        if name not in names:
            raise place[name].error(
                f"unknown option {name!r} for {owner}.{did_you_mean(str(name), names)} "
                f"It has {', '.join(sorted(names))}."
            )
    hints = _hints(cls)
    return {
        name: _check(hints[name], f"{owner}: {name}", value, place[name])
        for name, value in written.items()
    }


def refuse_ignored(method: "Method", written: Mapping[str, object], place: Place) -> None:
    """Raise ConfigError when a written option has no effect under the others."""
    for name, reason in method.ignored_options().items():
        if name in written:
            raise _without_effect(method.name, name, reason, place)


def plain(value: object, name: str) -> Any:
    """A value as JSON-able data: tuples become lists, paths text, dataclasses mappings.

    Raises:
        ConfigError: The value of the option ``name`` cannot be written to a file.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, name) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item, name) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), name) for f in dataclasses.fields(value)}
    raise ConfigError(
        f"option {name!r} holds a {type(value).__name__}, which cannot be written to a file. "
        "Use numbers, text, lists and mappings."
    )


def _without_effect(method: str, option: str, reason: str, place: Place) -> ConfigError:
    return place[option].error(without_effect(method, option, reason))


def _check(hint: Any, name: str, value: object, place: Place) -> Any:
    try:
        # Strict JSON mode: lists may become tuples and integers floats, but true is not a number,
        # "0.5" is not one either, and neither NaN nor infinity exists.
        text = json.dumps(value, allow_nan=False, default=os.fspath)
        return TypeAdapter(hint).validate_json(text, strict=True, extra="forbid")
    except (TypeError, ValueError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else None
        if problem is not None and problem["type"] == "value_error":
            raise place.error(f"{name}: {problem['ctx']['error']}") from None
        raise place.error(
            f"{name} must be {_in_words(hint)}, not {_shown(value)}.{_unquote(value)}"
        ) from None


@contextmanager
def _blaming_option(place: Place, written: Mapping[str, object]) -> Iterator[None]:
    """Put the line of the option that a message is about in front of it."""
    try:
        yield
    except ConfigError as error:
        words = re.findall(r"\w+", str(error))
        named = min((name for name in written if name in words), key=words.index, default=None)
        raise (place if named is None else place[named]).error(str(error)) from None


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _fields(cls: "type[Method]") -> list[dataclasses.Field[Any]]:
    """The fields that are options, without those of ``Method`` that mean nothing to the class."""
    unused = _unused(cls)
    return [field for field in dataclasses.fields(cls) if field.init and field.name not in unused]


def _unused(cls: "type[Method]") -> dict[str, str]:
    """Fields of ``Method`` that have no effect on a class whatever its options, with the reason."""
    from vlm_steer.engine.hooks import Method

    if any(_is_required(field) for field in dataclasses.fields(cls)):
        return {}
    below = cls.__mro__[: cls.__mro__.index(Method)]
    redefined = {name for base in below for name in inspect.get_annotations(base)}
    common = {field.name for field in dataclasses.fields(Method)} - redefined
    return {name: why for name, why in cls().ignored_options().items() if name in common}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _docs(cls: type) -> dict[str, str]:
    """Option documentation from the ``Attributes:`` sections of a class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= _attributes_section(inspect.cleandoc(base.__doc__ or ""))
    return docs


def _attributes_section(docstring: str) -> dict[str, str]:
    section = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    entries: dict[str, str] = {}
    name = ""
    for line in section[1].splitlines() if section else ():
        head = re.match(r" {4}(\w+)(?: \(.*?\))?:(.*)", line)
        if head:
            name, line = head[1], head[2]
        entries[name] = f"{entries.get(name, '')} {line.strip()}".strip()
    return entries


def _in_words(hint: Any) -> str:
    """What may be written for a type, in words."""
    from vlm_steer.engine.selectors import Selector

    if hint == Selector:
        return "all, [start, stop], {indices: [..]}, {last: n} or {union: [..]}"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _in_words(arguments[0])
    if origin is Literal:
        return _either([str(argument) for argument in arguments])
    if origin in (typing.Union, types.UnionType):
        parts = [argument for argument in arguments if not (argument is int and float in arguments)]
        return _either([_in_words(argument) for argument in parts])
    if origin is tuple and Ellipsis not in arguments:
        return f"[{', '.join(_in_words(argument) for argument in arguments)}]"
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return f"a list (each {_in_words(arguments[0])})" if arguments else "a list"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with {', '.join(f.name for f in dataclasses.fields(hint))}"
    if isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        return "a mapping"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _either(parts: list[str]) -> str:
    parts = list(dict.fromkeys(parts))
    return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return f"the text {text}" if isinstance(value, str) else text


def _unquote(value: object) -> str:
    """A hint for a number or a truth value that was written as text."""
    if not isinstance(value, str):
        return ""
    try:
        inner, _ = parse_yaml(value, "")
    except ConfigError:
        return ""
    return " Remove the quotes." if isinstance(inner, bool | int | float) else ""
