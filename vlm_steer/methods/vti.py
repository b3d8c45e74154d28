"""VTI: steer along a direction from hallucinated to correct captions."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.directions import Directions
from vlm_steer.engine.hooks import At, VisionAt
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

    The layers of the vision tower are shifted in the same way by ``visual_alpha``, along how the
    states of images whose patches are masked at random, on average over many masks, differ from
    those of the images themselves.

    ``vlm-steer build vti`` makes the directions of a model from pairs of captions and their
    images; the file says what it was made of and on, and another model refuses it.

    Deviations: the official code has a visual direction per position of its one grid of patches;
    ours is their mean, so that images of any size have one. Like it this shifts the outputs of the
    MLPs and has the factor 0.1; ``site: residual`` shifts the latent states that the paper writes
    of. The official code finds the textual directions on the model that it already steers
    visually, asks about every image the last question of the file, and casts states to float16.

    Cost: a few vector operations per layer.

    Attributes:
        directions: The safetensors file of the directions.
        strength: Strength of the shift in the language model, >= 0; 0 disables. Sensible 0.4 to 1.
        visual_alpha: Strength of the shift in the vision tower, >= 0; 0 disables. Sensible 0.4 to
            1; the authors use 0.9.
        site: What is shifted: ``mlp`` (official code) or ``residual``.
        layers: Decoder layers in which to shift; the vision tower is shifted in all.
        scope: Streams to shift. A stream that takes the user's images over encoded takes them as
            they are.

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
    visual_alpha: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("strength", "visual_alpha"):
            value = getattr(self, name)
            self.require(
                math.isfinite(value) and value >= 0, f"{name} is {value}; it must be at least 0"
            )

    def is_neutral(self) -> bool:
        return self.strength == 0 and self.visual_alpha == 0

    def ignored_options(self) -> dict[str, str]:
        if self.strength > 0:
            return super().ignored_options()
        if self.visual_alpha > 0:
            return {"layers": "strength is 0, so no decoder layer is shifted"}
        why = "strength and visual_alpha are 0, so nothing is shifted"
        return dict.fromkeys(("directions", "site", "layers", "scope"), why)

    def overrides(self, hook: str) -> bool:
        if hook == "vision" and self.visual_alpha == 0:
            return False
        if hook in ("mlp", "hidden") and self.strength == 0:
            return False
        return super().overrides(hook)

    def resolve(self, model: "ModelInfo") -> Any:
        if self.directions is None:
            self.require(
                False,
                "there are no directions. Make them with `vlm-steer build vti` and give the file: "
                "directions: FILE.safetensors.",
            )
        directions = Directions.load(str(self.directions))
        directions.check(self.name, model)
        if self.visual_alpha > 0:
            directions.check_visual(self.name, model)
        return directions

    def notes(self, plan: Any) -> tuple[str, ...]:
        made_of = ", ".join(f"{name} {value}" for name, value in plan.made_of.items())
        return (f"directions of {self.directions}: {made_of}",)

    def vision(self, states: Tensor, at: VisionAt) -> Tensor:
        if at.site != self.site:
            return states
        direction = at.plan.visual[at.layer]
        self.require(
            states.shape[-1] == direction.shape[-1],
            f"{self.directions} has visual directions of {direction.shape[-1]} features, but the "
            f"vision tower has {states.shape[-1]}. Make them anew with `vlm-steer build vti`",
        )
        return F.vti_shift(states, direction.to(states.device), strength=self.visual_alpha)

    def shift(self, states: Tensor, at: At) -> Tensor:
        direction = at.once("direction", lambda: at.plan.vectors[at.layer].to(states.device))
        return F.vti_shift(states, direction, strength=self.strength)
