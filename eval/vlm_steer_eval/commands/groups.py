"""Options that several commands take together.

A preset, where the command has one, fills in what the user did not write. Nothing heavy is imported
here, so that help is instant.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from vlm_steer.commands import groups
from vlm_steer.commands.options import BatchSize, ModelName, Seed
from vlm_steer_eval.running.presets import AppliedPreset, apply_preset

from .options import (
    Beams,
    Controls,
    Deterministic,
    Images,
    Methods,
    OutputFolder,
    PresetName,
    Repeat,
    Resamples,
    Rescore,
    RunOutput,
    SkipBadImages,
    Temperature,
    Tokens,
    TopP,
    TrivialBaselines,
    Unanswered,
    refuse_run,
)

if TYPE_CHECKING:
    from vlm_steer_eval.running.arms import Arm
    from vlm_steer_eval.running.generation import Settings

__all__ = ["AnswerOptions", "RunOptions", "ScoreOptions", "spelled_out"]


@dataclass(frozen=True, kw_only=True)
class RunOptions(groups.Loading):
    """What every command that runs a benchmark takes; the field's annotation is the option."""

    output: RunOutput
    model: ModelName = "tiny"
    methods: Methods = "none"
    controls: Controls = False
    trivial: TrivialBaselines = False
    deterministic: Deterministic = False
    preset: PresetName = None
    limit: Images = None
    max_new_tokens: Tokens = 512
    num_beams: Beams = 1
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Seed = 0
    resamples: Resamples = 10_000
    batch_size: BatchSize = 16
    skip_bad_images: SkipBadImages = False
    repeat: Repeat = None
    rescore: Rescore = None
    applied: AppliedPreset | None = None

    def arms(self) -> "list[Arm]":
        """What to compare.

        Raises:
            ConfigError: a method is unknown, or an arm contradicts the settings.
        """
        from vlm_steer_eval.running.arms import parse_arms, trivial_arms, with_controls

        arms = parse_arms(self.methods)
        arms = with_controls(arms) if self.controls else arms
        settings, names = self.settings(), {arm.name for arm in arms}
        if self.trivial:
            arms += [arm for arm in trivial_arms(settings) if arm.name not in names]
        for arm in arms:
            arm.settings(settings)
        return arms

    def settings(self) -> "Settings":
        """How to generate.

        Raises:
            ConfigError: the options contradict each other.
        """
        from vlm_steer_eval.running.generation import Settings

        return Settings(
            self.max_new_tokens,
            self.num_beams,
            self.temperature,
            self.top_p,
            self.seed,
            deterministic=self.deterministic,
        )


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What every command that scores files takes."""

    output: OutputFolder
    resamples: Resamples = 10_000
    seed: Seed = 0

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the scoring functions.

        Raises:
            ConfigError: the folder is that of a run.
        """
        refuse_run(self.output, "run.json")
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

    def fill(ctx: typer.Context, given: dict[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
        if given.get("preset") is None:
            return {}
        written = {name for name in given if _is_written(ctx, name)}
        return {"applied": apply_preset(given["preset"], benchmark, given, written, types)}

    return groups.spelled_out(fill, **defaults)


def _is_written(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
