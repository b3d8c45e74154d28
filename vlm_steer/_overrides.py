"""Changing single options of resolved methods, as ``--set`` on the command line does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_steer._options import check_values, option_names, refuse_ignored
from vlm_steer._yaml import Place, parse_yaml
from vlm_steer.registry import did_you_mean

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = ["apply_overrides"]


@dataclass(frozen=True, slots=True)
class _Override:
    """One ``method.option=value`` and the position of its method."""

    text: str
    index: int
    option: str
    value: object

    @property
    def place(self) -> Place:
        return Place(f"--set {self.text}")


def apply_overrides(methods: "Sequence[Method]", overrides: Sequence[str]) -> "tuple[Method, ...]":
    """Change single options of resolved methods, as ``--set`` does.

    Args:
        methods: What ``resolve`` returned.
        overrides: ``method.option=value``, or ``option=value`` where only one of the methods has
            that option. Values are YAML 1.2, so ``pai.layers=[2, null]`` works.

    Raises:
        ConfigError: An override does not parse, matches no method or several, or sets an option
            twice or to a wrong value.
    """
    parsed = [_parse(text, methods) for text in overrides]
    return tuple(
        _changed(method, [override for override in parsed if override.index == index])
        for index, method in enumerate(methods)
    )


def _parse(text: str, methods: "Sequence[Method]") -> _Override:
    place = Place(f"--set {text}")
    target, equals, raw = text.partition("=")
    owner, dot, option = target.strip().rpartition(".")
    if not equals or not option or (dot and not owner):
        raise place.error("is not method.option=value. Write for example var.keep=0.5.")
    value, _ = parse_yaml(raw, place.source, with_lines=False)
    return _Override(text, _find(owner, option, methods, place), option, value)


def _find(owner: str, option: str, methods: "Sequence[Method]", place: Place) -> int:
    """Index of the one method that an override is about."""
    if not methods:
        raise place.error("no method is in use whose option could be set.")
    in_use = ", ".join(method.name for method in methods)
    owned = [i for i, method in enumerate(methods) if owner in ("", method.name)]
    if not owned:
        hint = did_you_mean(owner, [method.name for method in methods])
        raise place.error(f"{owner!r} is not among the methods in use ({in_use}).{hint}")
    matches = [i for i in owned if option in option_names(type(methods[i]))]
    if not matches:
        known = {name for i in owned for name in option_names(type(methods[i]))}
        hint = did_you_mean(option, known)
        raise place.error(f"unknown option {option!r} for {owner or in_use}.{hint}")
    if len(matches) > 1:
        todo = (
            "Change it in the file" if owner else f"Write {methods[matches[0]].name}.{option}=..."
        )
        raise place.error(f"several methods in use have {option} ({in_use}). {todo}.")
    return matches[0]


def _changed(method: "Method", overrides: Sequence[_Override]) -> "Method":
    """The method with all of its overrides at once, since ranges may depend on each other."""
    values: dict[str, Any] = {}
    for override in overrides:
        if override.option in values:
            raise override.place.error(f"{override.option} is set twice. Keep one of them.")
        values |= check_values(type(method), {override.option: override.value}, override.place)
    if not values:
        return method
    place = Place(" ".join(f"--set {override.text}" for override in overrides))
    with place.blamed():
        changed = method.replace(**values)
    refuse_ignored(changed, values, place)
    return changed
