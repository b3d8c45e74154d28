"""SPIN: suppress the heads that look at the image least."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Attends, Method, Rows
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["SPIN"]


@register_method("spin")
@dataclass(frozen=True, kw_only=True)
class SPIN(Method):
    """Image-guided head suppression: scale down the heads that attend to the image least.

    For the row that predicts the next token, in every layer and at every step, with s_i the
    attention of head i to the image and a_i its output (arXiv 2505.16411, section 4)::

        a_i := a_i               for the int(keep_ratio * heads) heads with the largest s_i
        a_i := suppress * a_i    for the others

    ``score`` says what s_i is: ``prob_mass``, the attention weights summed over the image, as the
    paper describes it, or ``logit_sum``, the scores before the softmax summed over the image, as
    the official code computes it. The two choose different heads, because scores ignore the
    normalisation of each head.

    Deviations of the official code: its ``logit_sum``; its gates of a batch all end up in the last
    sample, where here every sample has its own. A row that sees no image keeps all of its heads.
    The rows of the prompt before the last are never gated, as in the code.

    Cost: one attention row per layer, in decoding instead of the kernel's own.

    Attributes:
        keep_ratio: Share of the heads left alone, 0 to 1; 1 disables. Sensible 0.7 to 0.98.
        suppress: Factor on the other heads, 0 to 1; 1 disables, 0 removes them. Sensible 0 to 0.3.
        score: What ranks the heads, ``prob_mass`` (paper) or ``logit_sum`` (official code).
        layers: Decoder layers; the authors use all, or the first 20.
        scope: Streams to act on.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("spin")(keep_ratio=0.8).suppress
        0.08

    Raises:
        ConfigError: A number is outside its range.
        UnsupportedModelError: At attach, for ``prob_mass`` in models with cross-attention.
    """

    paper: ClassVar[str] = "arXiv:2505.16411"
    rows: ClassVar[Rows] = "last"
    attends: ClassVar[Attends] = "image"

    keep_ratio: float = 0.95
    suppress: float = 0.08
    score: Literal["prob_mass", "logit_sum"] = "prob_mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keep_ratio", "suppress"):
            value = getattr(self, name)
            self.require(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")

    def is_neutral(self) -> bool:
        return self.keep_ratio == 1 or self.suppress == 1

    def check(self, model: "ModelInfo") -> None:
        if self.score == "prob_mass" and model.has_cross_attention:
            raise UnsupportedModelError(
                f"spin with score: prob_mass ranks heads by their attention to the image, but "
                f"{model.family} sees it through cross-attention layers, in which every head "
                "gives the image all of it. Use score: logit_sum."
            )

    def look(self, scores: Tensor, weights: Tensor, at: At) -> Tensor:
        image = at.columns.is_image
        mass = (weights @ image.to(weights.dtype)[:, None, :, None])[..., 0].transpose(1, 2)
        if self.score == "prob_mass":
            gate = F.gate_heads(mass, keep_ratio=self.keep_ratio, suppress=self.suppress)
        else:
            gate = F.spin_gate(
                scores.transpose(1, 2).flatten(0, 1),
                image.repeat_interleave(scores.shape[2], dim=0),
                keep_ratio=self.keep_ratio,
                suppress=self.suppress,
            ).reshape(mass.shape)
        return torch.where(mass.sum(dim=-1, keepdim=True) > 0, gate, 1.0)

    def heads(self, outputs: Tensor, at: At) -> Tensor:
        if at.seen is None:
            return outputs
        return outputs * at.seen[..., None].to(outputs.dtype)
