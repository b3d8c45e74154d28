"""What methods that contrast the user's stream with one of their own have in common."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import LogitsAt, Method

__all__ = ["Contrast"]


@dataclass(frozen=True, kw_only=True)
class Contrast(Method):
    """Base of methods that contrast logits l with those of one branch, n.

    Attributes:
        alpha: Strength of the contrast, >= 0; 0 leaves only the threshold. Sensible 0.25 to 2.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.5.

    Class attributes:
        branch: Name of the branch.
        form: Whether the branch is subtracted, ``(1 + alpha) * l - alpha * n``, or added.
    """

    branch: ClassVar[str]
    form: ClassVar[Literal["subtract", "add"]] = "subtract"

    alpha: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.alpha >= 0, f"alpha is {self.alpha}; it must be at least 0")
        self.require(0 <= self.beta <= 1, f"beta is {self.beta}; it must lie in [0, 1]")

    def is_neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def contrasted(self, at: LogitsAt) -> Tensor:
        """``[batch, vocabulary]`` contrasted logits, no token ruled out."""
        return F.contrast_logits(
            at.raw, at.branches[self.branch], alpha=self.alpha, beta=0.0, form=self.form
        )

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        if self.alpha == 0:
            return logits
        return F.add_change(logits, at.raw, self.contrasted(at))

    def plausible(self, at: LogitsAt) -> Tensor | None:
        return F.plausibility_mask(at.raw, beta=self.beta) if self.beta > 0 else None
