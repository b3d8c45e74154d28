"""VAR: move attention from sinks to the image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Method, Rows
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["VAR"]

_BOS_TO_MEDIAN = 100.0
_STANDS_OUT = 3.0


class FirstToken(NamedTuple):
    """The primary sink of a model, at the input of every layer.

    Attributes:
        states: ``[layers, hidden]`` float32 states of the first token of a text-only prompt.
        others: ``[layers, hidden]`` float32 mean states of the tokens after it.
        stands_out: Largest ratio over layers of its norm to the median norm of the others.
    """

    states: Tensor
    others: Tensor
    stands_out: float


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

    ``sinks: secondary`` finds sinks without dimensions, for models whose massive ones are unknown:
    tokens whose hidden state, less that of an ordinary token, points where that of the first token
    points, and which a row gives more than ``min_received`` times an even share of its attention.

    Deviations of the official code: its option ``p`` keeps 0.6 of the sinks' weight where the
    paper moves 0.6 (preset ``var_official``); its ``rho`` bounds the sinks' share where the paper
    bounds the rest's; it steers the last layer, which the paper spares (``skip_last``), and spares
    the first two, which the paper does not; it tests the sink dimensions of the 7B model on every
    model, and keeps the sinks of the first image for the whole data set, which is not offered.
    ``sinks: secondary`` is ours, after work on secondary attention sinks.

    Cost: attention rows of the text after the image, one row when decoding; no extra pass.

    Attributes:
        keep: Fraction of their attention that sinks keep, 0 to 1; 1 disables. The paper moves
            0.6, hence 0.4.
        max_sink_ratio: Largest share of a head's image attention on sinks, 0 to 1; 1 minus the
            paper's rho, which is 0.8 for general tasks and 0.5 against hallucination.
        min_image_mass: Smallest attention to the image of a steered head, 0 to 1.
        sinks: How sinks are found: by massive ``dimensions`` (paper), or as ``secondary`` sinks, by
            their likeness to the first token.
        tau: Threshold on the normalised sink dimensions, > 0. Sensible 15 to 40.
        sink_dims: Hidden dimensions that mark sinks, or ``auto`` to find them in the model.
            LLaMA-2-7B and Vicuna-7B: 1415 and 2533; 13B: 2100 and 4743.
        min_cosine: For secondary sinks, smallest cosine with the first token, -1 to 1. Sensible
            0.7 to 0.95.
        min_received: For secondary sinks, smallest attention of a row, averaged over heads, in
            units of an even share, >= 0. Sensible 2 to 10.
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
    sinks: Literal["dimensions", "secondary"] = "dimensions"
    tau: float = 20.0
    sink_dims: Literal["auto"] | tuple[int, ...] = "auto"
    min_cosine: float = 0.8
    min_received: float = 5.0
    skip_last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keep", "max_sink_ratio", "min_image_mass"):
            value = getattr(self, name)
            self.require(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")
        self.require(self.tau > 0, f"tau is {self.tau}; it must be above 0")
        if self.sink_dims != "auto":
            self.require(len(self.sink_dims) > 0, "sink_dims is empty; write auto or dimensions")
        self.require(
            -1 <= self.min_cosine <= 1, f"min_cosine is {self.min_cosine}; it must lie in [-1, 1]"
        )
        self.require(
            self.min_received >= 0, f"min_received is {self.min_received}; it must be at least 0"
        )

    def is_neutral(self) -> bool:
        return self.keep == 1

    def ignored_options(self) -> dict[str, str]:
        names, how = ("min_cosine", "min_received"), "dimensions"
        if self.sinks == "secondary":
            names, how = ("tau", "sink_dims"), "likeness to the first token"
        return dict.fromkeys(names, f"sinks is {self.sinks}, which finds sinks by {how}")

    def select_layers(self, model: "ModelInfo") -> tuple[int, ...]:
        layers = super().select_layers(model)
        return tuple(i for i in layers if not (self.skip_last and i == model.n_layers - 1))

    def resolve(self, model: "ModelInfo") -> "tuple[int, ...] | FirstToken":
        if self.sinks == "secondary":
            return model.remember("first_token", lambda: find_first_token(model))
        if self.sink_dims == "auto":
            return model.remember(("sink_dims", self.tau), lambda: find_sink_dims(model, self.tau))
        width = model.text_config.hidden_size
        self.require(
            all(0 <= d < width for d in self.sink_dims),
            f"sink_dims {list(self.sink_dims)} reach outside the hidden size {width}",
        )
        return self.sink_dims

    def notes(self, plan: Any) -> tuple[str, ...]:
        if isinstance(plan, FirstToken):
            return (f"the first token is up to {plan.stands_out:.1f} times as long as others",)
        return (f"sink dimensions {list(plan)}",) if plan else ()

    def warnings(self, plan: Any) -> tuple[str, ...]:
        if isinstance(plan, FirstToken):
            if plan.stands_out > _STANDS_OUT:
                return ()
            return ("the first token is like others here, so likeness to it marks no sinks",)
        if plan:
            return ()
        return (
            f"no sink dimensions found (no activation of the first token exceeds tau = {self.tau}; "
            "none can exceed the square root of the hidden size), so nothing will be redistributed",
        )

    def marks(self, hidden: Tensor, at: At) -> Tensor:
        if isinstance(at.plan, FirstToken):
            first, other = (states[at.layer].to(hidden.device) for states in at.plan[:2])
            return F.secondary_sinks(hidden, first, center=other, min_cosine=self.min_cosine)
        if not at.plan:
            return torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return F.sink_tokens(hidden, sink_dims=at.plan, tau=self.tau)

    def weights(self, weights: Tensor, at: At) -> Tensor:
        if at.marks is None:
            return weights
        is_image = at.columns.is_image
        sinks = at.marks[:, None, :]
        if self.sinks == "secondary":
            n_seen = (weights > 0).any(dim=1).sum(dim=-1, keepdim=True)
            sinks = sinks & (weights.mean(dim=1) * n_seen > self.min_received)
        return F.redistribute_sinks(
            weights,
            sinks,
            is_image,
            at.is_row,
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


def find_first_token(model: "ModelInfo") -> FirstToken:
    """States of the first token of a text-only prompt, and how far it stands out."""
    states = torch.stack([state[0].float() for state in model.text_only_hidden_states(32)[:-1]])
    norms = states.norm(dim=-1)
    ratio = norms[:, 0] / norms[:, 1:].median(dim=1).values
    return FirstToken(states[:, 0], states[:, 1:].mean(dim=1), float(ratio.max()))
