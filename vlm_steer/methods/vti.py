"""VTI: steer along a direction from hallucinated to correct captions."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.directions import Directions
from vlm_steer.engine.hooks import At
from vlm_steer.methods._shift import Shift
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["VTI"]


@register_method("vti")
@dataclass(frozen=True, kw_only=True)
class VTI(Shift):
    """Visual and textual intervention: shift states along directions found beforehand.

    With d_l the direction of layer l, a summary of how the states of correct and hallucinated
    captions of the same images differ at their last token, and x what a layer writes at any
    position (arXiv 2410.15778)::

        x := |x| * unit(unit(x) + 0.1 * strength * unit(d_l))

    ``vlm-steer build vti`` makes the directions of a model from pairs of captions; the file says
    what it was made of and on, and another model refuses it.

    Deviations: this is the textual half; the visual half, which shifts the vision tower along a
    direction per image position, is not offered. Like the official code this shifts the outputs
    of the MLPs and has the factor 0.1; ``site: residual`` shifts the latent states that the paper
    writes of. The official code casts states to float16.

    Cost: a few vector operations per layer.

    Attributes:
        directions: The safetensors file of the directions.
        strength: Strength of the shift, >= 0; 0 disables. Sensible 0.4 to 1.
        site: What is shifted: ``mlp`` (official code) or ``residual``.
        layers: Decoder layers in which to shift.
        scope: Streams to shift.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("vti")(directions="directions.safetensors").strength
        0.9

    Raises:
        ConfigError: A number is outside its range, there are no directions, or they were made for
            another model.
        DataError: The file of the directions cannot be read.
    """

    paper: ClassVar[str] = "arXiv:2410.15778"

    directions: str | None = None
    strength: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            math.isfinite(self.strength) and self.strength >= 0,
            f"strength is {self.strength}; it must be at least 0",
        )

    def is_neutral(self) -> bool:
        return self.strength == 0

    def ignored_options(self) -> dict[str, str]:
        if self.strength > 0:
            return super().ignored_options()
        why = "strength is 0, so nothing is shifted"
        return dict.fromkeys(("directions", "site", "layers", "scope"), why)

    def resolve(self, model: "ModelInfo") -> Any:
        if self.directions is None:
            self.require(
                False,
                "there are no directions. Make them with `vlm-steer build vti` and give the file: "
                "directions: FILE.safetensors.",
            )
        directions = Directions.load(str(self.directions))
        directions.check(self.name, model)
        return directions

    def notes(self, plan: Any) -> tuple[str, ...]:
        made_of = ", ".join(f"{name} {value}" for name, value in plan.made_of.items())
        return (f"directions of {self.directions}: {made_of}",)

    def shift(self, states: Tensor, at: At) -> Tensor:
        direction = at.once("direction", lambda: at.plan.vectors[at.layer].to(states.device))
        return F.vti_shift(states, direction, strength=self.strength)
