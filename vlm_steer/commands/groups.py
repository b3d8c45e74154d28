"""Options that go together: a command takes the group, and its fields become options.

Nothing heavy is imported here, so that help is instant.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, get_origin, get_type_hints

import typer

from vlm_steer.commands.options import Attn, DeviceMap, Dtype, Quantization, Revision

__all__ = ["Filler", "Loading", "spelled_out"]

Filler: TypeAlias = Callable[[typer.Context, dict[str, Any], Mapping[str, Any]], Mapping[str, Any]]
"""Changes what was given to a command, by name of the option, whose types come last; returns values
for fields of groups that are no options."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded; the annotation of a field is its option."""

    dtype: Dtype = "auto"
    device_map: DeviceMap = None
    quantization: Quantization = None
    revision: Revision = None
    attn: Attn = None

    def loading(self) -> dict[str, Any]:
        """Keyword arguments of ``vlm_steer.loading.load_model``."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Loading)}

    def load(self, model: str) -> tuple[Any, Any]:
        """Load a model and its processor.

        Raises:
            SteerError: See ``vlm_steer.loading.load_model``.
        """
        from vlm_steer.loading import load_model

        return load_model(model, **self.loading())


def spelled_out(
    fill: Filler | None = None, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that turns a parameter whose type is a group into the options of the group.

    Args:
        fill: Fills in what the user did not write.
        defaults: Defaults of options where they are not the group's own.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        groups, options = _parameters(function, defaults)
        types = {option.name: option.annotation for option in options}

        @functools.wraps(function)
        def command(ctx: typer.Context, **given: Any) -> None:
            more = fill(ctx, given, types) if fill is not None else {}
            made = {name: _made(group, given, more) for name, group in groups.items()}
            function(**made, **given)

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        spelled: Any = command
        spelled.__signature__ = inspect.Signature([context, *options])
        spelled.__annotations__ = {option.name: option.annotation for option in (context, *options)}
        # What inspect would follow back to the function with the groups.
        del spelled.__wrapped__
        return command

    return decorate


def _parameters(
    function: Callable[..., None], defaults: Mapping[str, Any]
) -> tuple[dict[str, type], list[inspect.Parameter]]:
    """The groups among the parameters, and all options."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type] = {}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            groups[parameter.name] = kind
            options += _fields(kind, defaults)
        else:
            options.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
    return groups, options


def _fields(group: type, defaults: Mapping[str, Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=defaults.get(
                field.name,
                inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            ),
        )
        for field in dataclasses.fields(group)
        if get_origin(hints[field.name]) is Annotated
    ]


def _made(group: type, given: dict[str, Any], more: Mapping[str, Any]) -> Any:
    """The group, its options taken out of what was given."""
    names = [field.name for field in dataclasses.fields(group)]
    values = {name: given.pop(name) for name in names if name in given}
    return group(**values, **{name: more[name] for name in names if name in more})
