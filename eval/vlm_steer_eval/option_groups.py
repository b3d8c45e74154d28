"""Options that go together: a command takes the group, and its fields become options.

A preset, where the command has one, fills in what the user did not write. Nothing heavy is imported
here, so that help is instant.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from vlm_steer.commands.options import (
    Attn,
    BatchSize,
    DeviceMap,
    Dtype,
    ModelName,
    Quantization,
    Revision,
    Seed,
)

from .command_options import (
    Beams,
    Controls,
    Images,
    Methods,
    OutputFolder,
    PresetName,
    Resamples,
    SkipBadImages,
    Temperature,
    Tokens,
    TopP,
    Unanswered,
)
from .presets import AppliedPreset, apply_preset

if TYPE_CHECKING:
    from .arms import Arm
    from .generation import Settings

__all__ = ["AnswerOptions", "RunOptions", "ScoreOptions", "spelled_out"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every command that runs a benchmark takes; the field's annotation is the option."""

    output: OutputFolder
    model: ModelName = "tiny"
    methods: Methods = "none"
    controls: Controls = False
    preset: PresetName = None
    limit: Images = None
    max_new_tokens: Tokens = 512
    num_beams: Beams = 1
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Seed = 0
    resamples: Resamples = 10_000
    batch_size: BatchSize = 16
    dtype: Dtype = "auto"
    device_map: DeviceMap = None
    quantization: Quantization = None
    revision: Revision = None
    attn: Attn = None
    skip_bad_images: SkipBadImages = False
    applied: AppliedPreset | None = None

    def arms(self) -> "list[Arm]":
        """What to compare.

        Raises:
            ConfigError: a method is unknown.
        """
        from .arms import parse_arms, with_controls

        arms = parse_arms(self.methods)
        return with_controls(arms) if self.controls else arms

    def settings(self) -> "Settings":
        """How to generate.

        Raises:
            ConfigError: the options contradict each other.
        """
        from .generation import Settings

        return Settings(
            self.max_new_tokens, self.num_beams, self.temperature, self.top_p, self.seed
        )


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What every command that scores files takes."""

    output: OutputFolder
    resamples: Resamples = 10_000
    seed: Seed = 0

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the scoring functions."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"n_resamples": values.pop("resamples"), **values}


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(ScoreOptions):
    """The same where questions can be without an answer."""

    missing: Unanswered = "error"


def spelled_out(
    benchmark: str = "", **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that turns a parameter whose type is a group into the options of the group.

    Args:
        benchmark: whose presets the command knows.
        defaults: defaults of options where they are not the group's own.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        groups, options = _parameters(function, defaults)

        @functools.wraps(function)
        def command(ctx: typer.Context, **given: Any) -> None:
            applied = None
            if given.get("preset") is not None:
                written = {name for name in given if _is_written(ctx, name)}
                types = {option.name: option.annotation for option in options}
                applied = apply_preset(given["preset"], benchmark, given, written, types)
            made = {name: _made(group, given, applied) for name, group in groups.items()}
            function(**made, **given)

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        spelled: Any = command
        spelled.__signature__ = inspect.Signature([context, *options])
        spelled.__annotations__ = {option.name: option.annotation for option in (context, *options)}
        # What inspect would follow back to the function with the groups.
        del spelled.__wrapped__
        return command

    return decorate


def _is_written(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


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


def _made(group: type, given: dict[str, Any], applied: AppliedPreset | None) -> Any:
    """The group, its options taken out of what was given."""
    names = [field.name for field in dataclasses.fields(group)]
    values = {name: given.pop(name) for name in names if name in given}
    if "applied" in names:
        values["applied"] = applied
    return group(**values)
