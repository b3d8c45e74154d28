"""VISTA: steer along what the image adds, and let the layers before the last have their say."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, LogitsAt, Reference, Selector
from vlm_steer.engine.selectors import check_selector, select
from vlm_steer.methods._shift import Shift
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["VISTA"]


@register_method("vista")
@dataclass(frozen=True, kw_only=True)
class VISTA(Shift):
    """Visual information steering: shift states towards what the image adds to this prompt.

    With h_l the state after layer l at the last prompt token, with the image and without it, x
    what a layer writes at any position, l the final logits and l_j those of layer j
    (arXiv 2502.03628, sections 4.1 and 4.2)::

        v_l := h_l(image, text) - h_l(text)
        x   := |x| * unit(unit(x) + strength * (1 + max(0, cos(x, -v_l))) * unit(v_l))
        l   := gamma * mean_j(l_j) + (1 - gamma) * l

    The vector is that of each prompt, found in two unsteered passes; states keep their length, and
    are turned the more the further they point away. The third line, self-logits augmentation, is
    also a method by itself (``sla``).

    Deviations: like the official code, this shifts the outputs of the MLPs and scales with the
    cosine; ``site: residual`` shifts the latent states that the paper writes of. The official
    code adds 1 to the first coordinate of the first layer's vector, the remains of a principal
    component of a single sample, and casts states to float16; neither is done here. It takes one
    prompt at a time, and its absolute layers are those of a model of 32 (preset
    ``vista_llava``).

    Cost: two passes over the prompt, one of them without the image; a few vector operations per
    layer, and the output head on one row more, the mean of the early layers' (on one per early
    layer in models with a soft cap).

    Attributes:
        strength: Strength of the shift, >= 0; 0 leaves only the mix. Sensible 0.01 for yes-or-no
            questions to 0.2 for captions.
        gamma: Weight of the early layers' logits, 0 to 1; 0 leaves only the shift. Sensible 0.1
            to 0.4.
        norm: Apply the model's final norm to the early layers.
        early: Early layers whose logits are mixed in, among all but the last. The authors use 25
            to 30 of 32.
        site: What is shifted: ``mlp`` (official code) or ``residual``.
        layers: Decoder layers in which to shift.
        scope: Streams to shift.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("vista")(strength=0.1).gamma
        0.3

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2502.03628"

    strength: float = 0.17
    gamma: float = 0.3
    norm: bool = False
    early: Selector = field(default=(0.8, None))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_selector(self.early, "early")
        self.require(
            math.isfinite(self.strength) and self.strength >= 0,
            f"strength is {self.strength}; it must be at least 0",
        )
        self.require(0 <= self.gamma <= 1, f"gamma is {self.gamma}; it must lie in [0, 1]")

    def is_neutral(self) -> bool:
        return self.strength == 0 and self.gamma == 0

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        if self.strength == 0:
            why = "strength is 0, so nothing is shifted"
            ignored |= dict.fromkeys(("site", "layers", "scope"), why)
        if self.gamma == 0:
            why = "gamma is 0, so no early layer is read"
            ignored |= dict.fromkeys(("norm", "early"), why)
        return ignored

    def overrides(self, hook: str) -> bool:
        if hook in ("prepare", "mlp", "hidden") and self.strength == 0:
            return False
        if hook in ("logits", "select_taps") and self.gamma == 0:
            return False
        return super().overrides(hook)

    def select_taps(self, model: "ModelInfo") -> tuple[int, ...]:
        if self.gamma == 0:
            return ()
        return select(self.early, model.n_layers - 1, "layers before the last")

    def prepare(self, reference: Reference) -> Any:
        with_image = reference.hidden_states(True).float()
        vectors = with_image - reference.hidden_states(False).float()
        return dict(zip(reference.layers, vectors.unbind(dim=1), strict=True))

    def shift(self, states: Tensor, at: At) -> Tensor:
        if at.prepared is None:
            return states

        def vector() -> Tensor:
            found: Tensor = at.prepared[at.layer][:, None].to(states.device)
            return found

        return F.vsv_shift(states, at.once("vector", vector), strength=self.strength)

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        early = at.early_logits(normed=self.norm, mean=True)
        return F.add_change(logits, at.raw, F.early_logit_mix(at.raw, early, gamma=self.gamma))
