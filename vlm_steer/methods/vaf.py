"""VAF: amplify the image where it is fused with the text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Attends, Method, Rows, Selector
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["VAF"]


@register_method("vaf")
@dataclass(frozen=True, kw_only=True)
class VAF(Method):
    """Visual amplification fusion: raise image scores, lower system-prompt scores in middle layers.

    On rows after the image, before the softmax, in the layers where image and text are fused
    (arXiv 2503.13107)::

        z_j := z_j + alpha * z_j      for image columns j
        z_j := z_j - beta * z_j       for columns j of the system prompt

    ``magnitude: true`` adds ``alpha * |z_j|`` and subtracts ``beta * |z_j|`` instead. A score below
    zero moves away from zero under the published rule, so that an image column can lose attention;
    with the magnitude it cannot. ``head_share`` restricts both rules to the heads that look at the
    image most, row by row.

    Deviations: ``alpha`` and ``beta`` are those of the official scripts, as the values reported for
    the paper differ from each other. The paper restricts the rule to some heads of a layer without
    saying how in the official code, which acts on all; ``head_share: 0.5`` is a reading of it.
    The official code fixes the system prompt at 35 tokens and the image at 576. A prompt without an
    image is left alone; in cross-attention every key is an image column.

    Cost: attention rows of the text after the image in the layers chosen, one row when decoding.

    Attributes:
        alpha: Strength on image columns, >= 0; 0 leaves them alone. Sensible 0.05 to 0.3.
        beta: Strength on system columns, 0 to 1; 0 leaves them alone. Sensible 0.05 to 0.15.
        magnitude: Add and subtract magnitudes, which raises and lowers whatever the sign.
        head_share: Share of the heads acted on, above 0 and at most 1; 1 takes all.
        layers: Decoder layers; the authors use 9 to 14 of 32.
        scope: Streams to act on.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("vaf")(alpha=0.2).alpha
        0.2

    Raises:
        ConfigError: A number is outside its range.
        UnsupportedModelError: At attach, for ``head_share`` below 1 in models with cross-attention.
    """

    paper: ClassVar[str] = "arXiv:2503.13107"
    rows: ClassVar[Rows] = "after_image"
    attends: ClassVar[Attends] = "both"

    alpha: float = 0.15
    beta: float = 0.05
    magnitude: bool = False
    head_share: float = 1.0
    layers: Selector = (0.28125, 0.46875)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.alpha >= 0, f"alpha is {self.alpha}; it must be at least 0")
        self.require(0 <= self.beta <= 1, f"beta is {self.beta}; it must lie in [0, 1]")
        self.require(
            0 < self.head_share <= 1, f"head_share is {self.head_share}; it must lie in (0, 1]"
        )

    def is_neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def check(self, model: "ModelInfo") -> None:
        if self.head_share < 1 and model.has_cross_attention:
            raise UnsupportedModelError(
                f"vaf with head_share {self.head_share} ranks heads by their attention to the "
                f"image, but {model.family} has cross-attention layers, in which every head gives "
                "the image all of it. Use head_share: 1."
            )

    def scores(self, scores: Tensor, at: At) -> Tensor:
        image = at.columns.is_image
        system = at.columns.is_system & image.any(dim=1, keepdim=True)
        if self.magnitude:
            steered = F.boost_scores(scores, image, alpha=self.alpha)
            steered = F.boost_scores(steered, system, alpha=-self.beta)
        else:
            steered = F.scale_scores(scores, image, factor=1 + self.alpha)
            steered = F.scale_scores(steered, system, factor=1 - self.beta)
        if self.head_share == 1:
            return steered
        heads = F.image_heads(at.softmax(scores), image, share=self.head_share)
        return torch.where(heads[..., None], steered, scores)
