"""The arms of a comparison: named sets of methods, the unsteered one always among them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_steer.config import Spec, dump, resolve
from vlm_steer.engine.hooks import Method
from vlm_steer.errors import ConfigError
from vlm_steer.registry import list_methods

from .generation import Settings

__all__ = [
    "BASELINE",
    "Arm",
    "control_kind",
    "controls_among",
    "is_tested",
    "is_trivial",
    "parse_arms",
    "trivial_arms",
    "with_controls",
]

BASELINE = "none"
"""The unsteered arm, against which every other arm is compared."""

_SHAM, _MASK, _TRIVIAL = "sham:", "mask:", "trivial:"
_SHARED_CONTROLS = ("plausibility_mask", "yes_bias")
_DECODING = {
    "temperature": float,
    "top_p": float,
    "num_beams": int,
    "min_new_tokens": int,
    "max_new_tokens": int,
    "end_bias": float,
}
"""What a trivial baseline may set, and how its number is read."""


@dataclass(frozen=True)
class Arm:
    """One column of a comparison.

    Attributes:
        name: as the user wrote it.
        methods: the resolved methods, in order; empty for the unsteered arm.
        decoding: fields of `Settings` in which it departs from the run, for a trivial baseline.
    """

    name: str
    methods: tuple[Method, ...]
    decoding: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain data."""
        return dump(self.methods)

    def settings(self, common: Settings) -> Settings:
        """How this arm generates, given how the run does.

        Raises:
            ConfigError: the two contradict each other.
        """
        try:
            return replace(common, **self.decoding)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from error


def parse_arms(methods: "str | Mapping[str, Spec] | Sequence[Arm]") -> list[Arm]:
    """Arms of `--methods`: a comma separates them, `+` composes, `none` is added in front.

    `sham:NAME` is the control of a method: as much change, in the wrong places. `mask:NAME` is that
    of a contrastive method: its plausibility mask alone. `trivial:SETTING=VALUE` is the unsteered
    model decoded otherwise, such as `trivial:num_beams=5`.

    Args:
        methods: "none,var,var+vcd", arm names with their specifications, or arms as they are.

    Raises:
        ConfigError: an arm is named twice or resolves to no known method.
    """
    if isinstance(methods, str):
        names = [part.strip() for part in methods.split(",")]
        specs: dict[str, Spec] = {name: name for name in names}
        if len(specs) < len(names) or "" in specs:
            raise ConfigError(
                f"--methods {methods!r} names an arm twice or not at all; separate different arms "
                "by commas, such as none,var,var+vcd"
            )
    elif isinstance(methods, Mapping):
        specs = dict(methods)
    else:
        return list(methods)
    arms = [Arm(BASELINE, ())]
    for name, spec in specs.items():
        if name != BASELINE:
            decoding = _decoding(name) if spec == name else {}
            arms.append(Arm(name, () if decoding else resolve(_control_of(spec)), decoding))
    return arms


def trivial_arms(settings: Settings) -> list[Arm]:
    """Ways to say less or more that need no method, as arms beside the run's own settings.

    Temperature, beams, a minimum length and a bias towards or against the end. Ends after so many
    words or sentences need no arms: `compare` cuts the baseline's captions.
    """
    quarter = max(1, settings.max_new_tokens // 4)
    names = ["end_bias=-2", "end_bias=2", "end_bias=4"]
    names += [f"min_new_tokens={quarter}"]
    if settings.num_beams == 1:
        names += [f"temperature={t}" for t in (0.5, 1) if t != settings.temperature]
    if settings.temperature == 0:
        names += [f"num_beams={n}" for n in (1, 5) if n != settings.num_beams]
    return [Arm(f"{_TRIVIAL}{name}", (), _decoding(f"{_TRIVIAL}{name}")) for name in names]


def is_trivial(name: str) -> bool:
    """Whether an arm, `ARM` or `FOLDER/ARM`, is called a trivial baseline."""
    return name.rpartition("/")[2].startswith(_TRIVIAL)


def control_kind(name: str) -> str | None:
    """What kind of control an arm, `ARM` or `FOLDER/ARM`, is by its name; None for no control.

    `sham` and `mask` for those of one method, else the name of a control that all methods share.
    """
    for _, own in _splits(name):
        if own.startswith((_SHAM, _MASK)):
            return own.partition(":")[0]
        if own in _SHARED_CONTROLS:
            return own
    return None


def is_tested(name: str) -> bool:
    """Whether an arm is a method under test: neither a control nor a trivial baseline."""
    return not is_trivial(name) and control_kind(name) is None


def _splits(name: str) -> list[tuple[str, str]]:
    """The folder in front of an arm, if any, and the arm, whose name may be a path itself."""
    parts = name.split("/")
    return [("/".join(parts[:n]), "/".join(parts[n:])) for n in range(len(parts))]


def _decoding(name: str) -> dict[str, Any]:
    """What the name of a trivial baseline sets; empty for other arms."""
    if not name.startswith(_TRIVIAL):
        return {}
    key, _, value = name.removeprefix(_TRIVIAL).partition("=")
    try:
        return {key: _DECODING[key](value)}
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{name}: a trivial baseline is {_TRIVIAL}SETTING=VALUE, with one of "
            f"{', '.join(_DECODING)} and a number, such as trivial:num_beams=5"
        ) from error


def with_controls(arms: Sequence[Arm]) -> list[Arm]:
    """Each arm followed by those of its controls that exist.

    A method on attention, heads or states gets its sham, a method with a plausibility mask that
    mask alone. Arms of several methods have no controls.
    """
    names = {arm.name for arm in arms}
    result: list[Arm] = []
    for arm in arms:
        result.append(arm)
        if len(arm.methods) == 1 and is_tested(arm.name):
            made = [(_SHAM, _sham(arm.methods[0])), (_MASK, _mask(arm.methods[0]))]
            result += [
                Arm(f"{prefix}{arm.name}", methods)
                for prefix, methods in made
                if methods and f"{prefix}{arm.name}" not in names
            ]
    return result


def controls_among(name: str, arms: Iterable[str]) -> list[str]:
    """The arms that are controls of an arm: its own, and those that every method shares.

    Args:
        name: an arm, `ARM` or `FOLDER/ARM`.
        arms: all of them.
    """
    if not is_tested(name):
        return []
    wanted = {
        f"{folder}/{control}" if folder else control
        for folder, own in _splits(name)
        for control in (f"{_SHAM}{own}", f"{_MASK}{own}")
    }
    return [o for o in arms if o in wanted or o.rpartition("/")[2] in _SHARED_CONTROLS]


def _control_of(spec: Spec) -> Spec:
    if isinstance(spec, str) and spec.startswith(_SHAM):
        return {"method": "sham", "of": spec.removeprefix(_SHAM)}
    if isinstance(spec, str) and spec.startswith(_MASK):
        of = resolve(spec.removeprefix(_MASK))
        masks = _mask(of[0]) if len(of) == 1 else ()
        if not masks:
            raise ConfigError(
                f"{spec}: there is no such control; it takes one method that has a plausibility "
                "mask, such as vcd"
            )
        return masks
    return spec


def _sham(method: Method) -> tuple[Method, ...]:
    (written,) = dump([method])["methods"]
    try:
        return resolve({"method": "sham", "of": written})
    except ConfigError:  # of logits and branches there is no sham
        return ()


def _mask(method: Method) -> tuple[Method, ...]:
    beta = getattr(method, "beta", None)
    is_masking = method.overrides("plausible") and isinstance(beta, float) and beta > 0
    if not is_masking or "plausibility_mask" not in list_methods():
        return ()
    return resolve({"method": "plausibility_mask", "beta": beta})
