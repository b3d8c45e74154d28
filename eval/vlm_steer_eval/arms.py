"""The arms of a comparison: named sets of methods, the unsteered one always among them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_steer.config import Spec, dump, resolve
from vlm_steer.engine.hooks import Method
from vlm_steer.errors import ConfigError

__all__ = ["BASELINE", "Arm", "parse_arms"]

BASELINE = "none"
"""The unsteered arm, against which every other arm is compared."""

_SHAM = "sham:"


@dataclass(frozen=True)
class Arm:
    """One column of a comparison.

    Attributes:
        name: as the user wrote it.
        methods: the resolved methods, in order; empty for the unsteered arm.
    """

    name: str
    methods: tuple[Method, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain data."""
        return dump(self.methods)


def parse_arms(methods: str | Mapping[str, Spec]) -> list[Arm]:
    """Arms of `--methods`: a comma separates them, `+` composes, `none` is added in front.

    `sham:NAME` is the control of a method: as much change, in the wrong places.

    Args:
        methods: "none,var,var+vcd", or arm names with their specifications.

    Raises:
        ConfigError: an arm is named twice or resolves to no known method.
    """
    if isinstance(methods, str):
        names = [part.strip() for part in methods.split(",")]
        specs: dict[str, Spec] = {name: name for name in names}
        if len(specs) < len(names) or "" in specs:
            raise ConfigError(
                f"--methods {methods!r} names an arm twice or not at all; separate different arms "
                "by "
                "commas, such as none,var,var+vcd"
            )
    else:
        specs = dict(methods)
    arms = [Arm(BASELINE, ())]
    for name, spec in specs.items():
        if name != BASELINE:
            arms.append(Arm(name, resolve(_sham_of(spec))))
    return arms


def _sham_of(spec: Spec) -> Spec:
    if isinstance(spec, str) and spec.startswith(_SHAM):
        return {"method": "sham", "of": spec.removeprefix(_SHAM)}
    return spec
