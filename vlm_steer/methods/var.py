"""VAR: move attention from sinks to the image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Method, Rows
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["VAR"]

_BOS_TO_MEDIAN = 100.0


@register_method("var")
@dataclass(frozen=True, kw_only=True)
class VAR(Method):
    """Visual attention redistribution: take attention from sink tokens, give it to the image.

    A token is a sink of a layer when its hidden state is huge in the model's sink dimensions
    (arXiv 2503.03321, section 3)::

        max over d in D of | x[d] / rms(x) |  >  tau

    Text rows after the image then move, in image-centric heads, part of the weight of all sinks
    to the image tokens that are no sinks, in proportion (section 5)::

        a_j := keep * a_j                                      for sinks j
        a_j := a_j * (1 + (1 - keep) * m_sinks / m_image)      for other image tokens j

    where a head is image-centric when its image mass is at least ``min_image_mass`` and at most
    ``max_sink_ratio`` of that mass lies on sinks.

    Deviations of the official code: its option ``p`` keeps 0.6 of the sinks' weight where the
    paper moves 0.6 (preset ``var_official``); its ``rho`` bounds the sinks' share where the paper
    bounds the rest's; it steers the last layer, which the paper spares (``skip_last``), and spares
    the first two, which the paper does not; it tests the sink dimensions of the 7B model on every
    model, and keeps the sinks of the first image for the whole data set, which is not offered.

    Cost: attention rows of the text after the image, one row when decoding; no extra pass.

    Attributes:
        keep: Fraction of their attention that sinks keep, 0 to 1; 1 disables. The paper moves
            0.6, hence 0.4.
        max_sink_ratio: Largest share of a head's image attention on sinks, 0 to 1; 1 minus the
            paper's rho, which is 0.8 for general tasks and 0.5 against hallucination.
        min_image_mass: Smallest attention to the image of a steered head, 0 to 1.
        tau: Threshold on the normalised sink dimensions, > 0. Sensible 15 to 40.
        sink_dims: Hidden dimensions that mark sinks, or ``auto`` to find them in the model.
            LLaMA-2-7B and Vicuna-7B: 1415 and 2533; 13B: 2100 and 4743.
        skip_last: Spare the last layer (paper).
        layers: Decoder layers.
        scope: Streams to steer.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("var")(keep=0.6).keep
        0.6

    Raises:
        ConfigError: A number is outside its range.
        UnsupportedModelError: At attach, for models whose image is not in the token sequence.
    """

    paper: ClassVar[str] = "arXiv:2503.03321"
    rows: ClassVar[Rows] = "after_image"
    needs_image_tokens: ClassVar[bool] = True

    keep: float = 0.4
    max_sink_ratio: float = 0.5
    min_image_mass: float = 0.2
    tau: float = 20.0
    sink_dims: Literal["auto"] | tuple[int, ...] = "auto"
    skip_last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keep", "max_sink_ratio", "min_image_mass"):
            value = getattr(self, name)
            self.require(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")
        self.require(self.tau > 0, f"tau is {self.tau}; it must be above 0")
        if self.sink_dims != "auto":
            self.require(len(self.sink_dims) > 0, "sink_dims is empty; write auto or dimensions")

    def is_neutral(self) -> bool:
        return self.keep == 1

    def select_layers(self, model: "ModelInfo") -> tuple[int, ...]:
        layers = super().select_layers(model)
        return tuple(i for i in layers if not (self.skip_last and i == model.n_layers - 1))

    def resolve(self, model: "ModelInfo") -> tuple[int, ...]:
        if self.sink_dims == "auto":
            return model.remember(("sink_dims", self.tau), lambda: find_sink_dims(model, self.tau))
        width = model.text_config.hidden_size
        self.require(
            all(0 <= d < width for d in self.sink_dims),
            f"sink_dims {list(self.sink_dims)} reach outside the hidden size {width}",
        )
        return self.sink_dims

    def notes(self, plan: Any) -> tuple[str, ...]:
        return (f"sink dimensions {list(plan)}",) if plan else ()

    def warnings(self, plan: Any) -> tuple[str, ...]:
        if plan:
            return ()
        return (
            f"no sink dimensions found (no activation of the first token exceeds tau = {self.tau}),"
            " so nothing will be redistributed",
        )

    def marks(self, hidden: Tensor, at: At) -> Tensor:
        if not at.plan:
            return torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return F.sink_tokens(hidden, sink_dims=at.plan, tau=self.tau)

    def weights(self, weights: Tensor, at: At) -> Tensor:
        if at.marks is None:
            return weights
        is_image = at.columns.is_image
        # A row that sees no image sink is left alone, whether its window has dropped the sink's
        # column or only masks it.
        sees_sink = (weights * (at.marks & is_image)[:, None, None, :]).sum(dim=(1, 3)) > 0
        return F.redistribute_sinks(
            weights,
            at.marks,
            is_image,
            at.is_row & sees_sink,
            keep=self.keep,
            max_sink_ratio=self.max_sink_ratio,
            min_image_mass=self.min_image_mass,
        )


def find_sink_dims(model: "ModelInfo", tau: float) -> tuple[int, ...]:
    """Dimensions with massive activations at the first token of a text-only prompt.

    A dimension counts when, over the middle layers, the median of its magnitude at the first
    token, in units of the token's root mean square, exceeds ``tau`` and 100 times the median over
    all dimensions.

    Returns:
        Sorted dimensions; empty for a model without massive activations.
    """
    states = model.text_only_hidden_states(n_tokens=32)
    first = torch.stack([state[0, 0].float() for state in states])
    middle = first[min(3, len(first) // 4) : -1]
    scaled = (middle / middle.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt()).abs()
    typical = scaled.median(dim=0).values
    is_sink = (typical > tau) & (typical > _BOS_TO_MEDIAN * typical.median())
    return tuple(int(d) for d in is_sink.nonzero().flatten())
