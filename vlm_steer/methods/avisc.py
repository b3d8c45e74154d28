"""AvisC: contrast with a stream that sees the blind tokens only."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Branch, Columns, Rows
from vlm_steer.methods._contrast import Contrast
from vlm_steer.registry import register_method

__all__ = ["AvisC"]


@register_method("avisc")
@dataclass(frozen=True, kw_only=True)
class AvisC(Contrast):
    """Attentional vision calibration: subtract what tokens say that draw attention to no purpose.

    The layers that hold the share ``gamma`` of the attention that the last prompt row pays to the
    image are averaged. Image tokens that receive at least ``lam`` standard deviations more than
    the mean are blind. A second stream reads the prompt with all other image tokens blanked; with
    n its logits (arXiv 2405.17820)::

        l := (1 + alpha) * l - alpha * n,   kept where l >= log(beta) + max(l)

    Deviations: the paper words the choice of blind tokens per generated token; the official code
    chooses once, for the first, and so do we. The code acts under sampling only, whenever it is
    imported, knows two fixed places of image tokens, and its scripts use other numbers per task.
    Features that Qwen3-VL adds in later layers are left in both streams.

    Cost: one extra stream over the same encoded image, and one attention row per layer for the
    prompt.

    Attributes:
        alpha: Strength of the contrast, >= 0. Sensible 1 to 3; the authors use 2.5 for LLaVA and
            3 for InstructBLIP.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.5.
        gamma: Share of the image attention that the averaged layers hold, above 0, at most 1.
            Sensible 0.3 to 0.7.
        lam: Standard deviations above the mean that make a token blind. Sensible 0 to 2.
        blank: What replaces the other image tokens: ``zeros`` or ``ones``.
        layers: Decoder layers to choose from.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("avisc")(lam=0.5).lam
        0.5

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2405.17820"
    rows: ClassVar[Rows] = "image"
    needs_image_tokens: ClassVar[bool] = True
    branch: ClassVar[str] = "blind"
    own: ClassVar[dict[str, str]] = {"embeds": "blind"}
    chooses_once: ClassVar[bool] = True

    alpha: float = 2.5
    gamma: float = 0.5
    lam: float = 1.0
    blank: Literal["zeros", "ones"] = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            0 < self.gamma <= 1, f"gamma is {self.gamma}; it must be above 0 and at most 1"
        )

    def ignored_options(self) -> dict[str, str]:
        ignored = {"scope": f"{self.name} reads the user's stream and acts on one of its own"}
        if self.alpha == 0:
            why = "alpha is 0, so there is no contrast"
            ignored |= dict.fromkeys(("gamma", "lam", "blank", "layers"), why)
        return ignored

    def branches(self) -> tuple[Branch, ...]:
        return (Branch(self.branch, after_user=True),) if self.alpha > 0 else ()

    def choose(self, weights: Tensor, at: At) -> Tensor:  # noqa: ARG002
        return weights.mean(dim=1, keepdim=True)

    def embeds(self, embeds: Tensor, at: At) -> Tensor:
        per_layer = [weights.to(embeds.device) for _, weights in sorted(at.chosen.items())]
        is_image = at.row_kinds == Columns.IMAGE
        is_blind = F.blind_tokens(
            torch.stack(per_layer, dim=1), is_image, gamma=self.gamma, lam=self.lam
        )
        value = 0.0 if self.blank == "zeros" else 1.0
        return embeds.masked_fill((is_image & ~is_blind)[:, :, None], value)
