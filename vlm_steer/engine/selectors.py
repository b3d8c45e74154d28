"""Which layers, heads or columns an intervention acts on, written as plain data.

A selector is plain YAML so that it survives configuration files, hashes and reports:

==========================  ==========================================================
written                     means
==========================  ==========================================================
``all``                     every index
``[9, 14]``                 9, 10, 11, 12, 13 (half-open)
``[2, null]``               from 2 to the end
``[0.25, 0.5]``             the same, as fractions of the depth (rounded to the nearest)
``{indices: [1, 18]}``      exactly these
``{last: 14}``              the last 14; a float is a fraction of the depth, rounded up
``{union: [.., ..]}``       everything that any of the listed selectors matches
==========================  ==========================================================

A selector that asks for something outside the model is an error, never a silent clip.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from vlm_steer.errors import ConfigError

__all__ = ["Selector", "check_selector", "select"]

Selector: TypeAlias = Literal["all"] | tuple[int | float, int | float | None] | dict[str, Any]


def select(selector: Selector, size: int, what: str = "layers") -> tuple[int, ...]:
    """Resolve a selector against a model.

    Args:
        selector: One of the forms in the module docstring.
        size: How many there are to choose from.
        what: What is being selected, for the error message.

    Returns:
        Sorted, distinct indices in ``[0, size)``.

    Raises:
        ConfigError: The selector is malformed, empty, or reaches outside ``[0, size)``.
    """
    check_selector(selector, what)
    chosen = tuple(sorted(set(_indices(selector, size))))
    if not chosen or chosen[0] < 0 or chosen[-1] >= size:
        raise ConfigError(
            f"{what} {_show(selector)} reach outside this model, which has {size} {what} "
            f"(0 to {size - 1}). Write indices inside that range, or fractions of the depth."
        )
    return chosen


def check_selector(selector: Selector, what: str = "layers") -> None:
    """Raise ConfigError unless the selector is one of the documented forms."""
    if selector == "all":
        return
    if isinstance(selector, Mapping):
        _check_mapping(selector, what)
        return
    if isinstance(selector, Sequence) and not isinstance(selector, str) and len(selector) == 2:
        start, stop = selector
        if _is_number(start) and (stop is None or _is_number(stop)):
            return
    raise ConfigError(
        f"{what}: {_show(selector)} is not a selector. Write all, [start, stop], "
        "{indices: [..]}, {last: n} or {union: [..]}."
    )


def _check_mapping(selector: Mapping[str, Any], what: str) -> None:
    if len(selector) == 1:
        ((kind, value),) = selector.items()
        if kind == "indices" and _is_list(value) and all(_is_index(v) for v in value):
            return
        if kind == "last" and _is_number(value) and value > 0:
            return
        if kind == "union" and _is_list(value) and value:
            for part in value:
                check_selector(part, what)
            return
    raise ConfigError(
        f"{what}: {_show(selector)} is not a selector. Write exactly one of "
        "{indices: [..]}, {last: n} or {union: [..]}."
    )


def _indices(selector: Selector, size: int) -> list[int]:
    if selector == "all":
        return list(range(size))
    if isinstance(selector, Mapping):
        ((kind, value),) = selector.items()
        if kind == "indices":
            return [int(v) for v in value]
        if kind == "last":
            count = math.ceil(value * size) if isinstance(value, float) else value
            return list(range(size - count, size))
        return [index for part in value for index in _indices(part, size)]
    start, stop = selector
    return list(range(_edge(start, size), size if stop is None else _edge(stop, size)))


def _edge(edge: int | float, size: int) -> int:
    return round(edge * size) if isinstance(edge, float) else edge


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _show(selector: object) -> str:
    return (
        str(selector).replace("None", "null").replace("'", "").replace("(", "[").replace(")", "]")
    )
