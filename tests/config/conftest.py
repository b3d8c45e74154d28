"""Two methods that exist only while these tests run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pytest
from torch import Tensor

from vlm_steer import registry
from vlm_steer.engine.hooks import At, Method, Selector


@dataclass(frozen=True, kw_only=True)
class Lens(Method):
    """Look closer.

    Attributes:
        layers: Where to look.
        power: How much closer, in [0, 10];
            0 disables.
        focus (float): Distance in metres; only used when ``manual``.
        manual: Whether the focus is set by hand.
        mode: What to look through.
        dots: Which dots.
        count: How many.
    """

    layers: Selector = (2, None)
    power: float = 0.5
    focus: float = 1.5
    manual: bool = False
    mode: Literal["glass", "water"] = "glass"
    dots: tuple[int, ...] | None = None
    count: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.power <= 10, f"power must lie in [0, 10], not {self.power}")

    def ignored_options(self) -> dict[str, str]:
        return {} if self.manual else {"focus": "the focus is automatic (manual: false)"}

    def heads(self, outputs: Tensor, at: At) -> Tensor:
        return self.power * outputs


@dataclass(frozen=True, kw_only=True)
class Tilt(Method):
    """Tilt the head.

    Attributes:
        degrees: How far.
        power: How hard.
    """

    degrees: int
    power: float = 1.0


@pytest.fixture
def methods() -> Iterator[None]:
    """A registry that holds ``lens`` and ``tilt`` and nothing else."""
    registry.list_methods()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_methods", {"lens": Lens, "tilt": Tilt})
        patch.setattr(Lens, "name", "lens")
        patch.setattr(Tilt, "name", "tilt")
        yield
    registry._discovered.set()
