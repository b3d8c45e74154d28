"""M3ID: hold on to the image as the text grows."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import Branch, LogitsAt, Method
from vlm_steer.registry import register_method

__all__ = ["M3ID"]


@register_method("m3id")
@dataclass(frozen=True, kw_only=True)
class M3ID(Method):
    """Multi-modal mutual information decoding: amplify what the image adds, more at every token.

    With lc and lu the log-probabilities with and without the image and t the number of the token,
    counted from 1 (arXiv 2403.14003)::

        g  := exp(-lam * t)
        lc := lc + (1 - g) / g * (lc - lu)    where max(lc) < log(confidence)

    Where the model is sure of its next token already, nothing is corrected.

    Deviations: there is no official code. The only public port, in the repository of AvisC, has
    no such gate and rules out implausible tokens instead (preset ``m3id_avisc``); on yes-or-no
    questions, where t is 1 and the weight 0.02, that mask does nearly all of the work. The weight
    grows without bound, 11 at token 125 with ``lam`` 0.02; ``max_weight`` bounds it.

    Cost: one extra stream, without the image.

    Attributes:
        lam: Rate per token at which the image is forgotten, >= 0; 0 disables. Sensible 0.01 to
            0.03.
        confidence: Tokens are corrected only where the best probability lies below this, 0 to 1;
            1 corrects everywhere. Sensible 0.2 to 0.5.
        max_weight: Upper bound of the weight, > 0; null for none. Sensible 1 to 2.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0 to 0.1.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("m3id")(lam=0.03).lam
        0.03

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2403.14003"

    lam: float = 0.02
    confidence: float = 0.3
    max_weight: float | None = None
    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.lam >= 0, f"lam is {self.lam}; it must be at least 0")
        self.require(
            0 < self.confidence <= 1,
            f"confidence is {self.confidence}; it must be above 0 and at most 1",
        )
        self.require(
            self.max_weight is None or self.max_weight > 0,
            f"max_weight is {self.max_weight}; it must be above 0, or null for no bound",
        )
        self.require(0 <= self.beta <= 1, f"beta is {self.beta}; it must lie in [0, 1]")

    def is_neutral(self) -> bool:
        return self.lam == 0 and self.beta == 0

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        if self.lam == 0:
            why = "lam is 0, so nothing is corrected"
            ignored |= dict.fromkeys(("confidence", "max_weight"), why)
        return ignored

    def branches(self) -> tuple[Branch, ...]:
        return (Branch("text_only", drop_image=True),) if self.lam > 0 else ()

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        if self.lam == 0:
            return logits
        corrected = F.m3id_logits(
            at.raw,
            at.branches["text_only"],
            step=at.step + 1,
            lam=self.lam,
            max_weight=self.max_weight,
        )
        new = F.add_change(logits, at.raw, corrected)
        if self.confidence == 1:
            return new
        best = at.raw.log_softmax(dim=-1).amax(dim=-1, keepdim=True)
        return torch.where(best < math.log(self.confidence), new, logits)

    def plausible(self, at: LogitsAt) -> Tensor | None:
        return F.plausibility_mask(at.raw, beta=self.beta) if self.beta > 0 else None
