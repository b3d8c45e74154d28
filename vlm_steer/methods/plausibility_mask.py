"""Plausibility mask: the threshold of contrastive methods without their contrast, as a control."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import LogitsAt, Method
from vlm_steer.registry import register_method

__all__ = ["PlausibilityMask"]


@register_method("plausibility_mask")
@dataclass(frozen=True, kw_only=True)
class PlausibilityMask(Method):
    """Control: rule out unlikely tokens, as contrastive methods do beside their contrast.

    With p the next-token distribution, tokens are kept where (contrastive decoding,
    arXiv 2210.15097)::

        p >= beta * max(p)

    Under sampling this alone removes the tail from which many wrong answers are drawn; a contrast
    helps for its reason only if it beats the mask with its own ``beta``. Under greedy decoding it
    changes no answer.

    Deviations: none; published comparisons leave this control out.

    Cost: none.

    Attributes:
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.5.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("plausibility_mask")(beta=0.2).beta
        0.2

    Raises:
        ConfigError: The number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2210.15097"

    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.beta <= 1, f"beta is {self.beta}; it must lie in [0, 1]")

    def is_neutral(self) -> bool:
        return self.beta == 0

    def plausible(self, at: LogitsAt) -> Tensor | None:
        return F.plausibility_mask(at.raw, beta=self.beta)
