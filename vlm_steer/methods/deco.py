"""DeCo: let an early layer that is sure of a plausible token have its say."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import LogitsAt, Selector
from vlm_steer.methods._early import EarlyLayers
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["DeCo"]


@register_method("deco")
@dataclass(frozen=True, kw_only=True)
class DeCo(EarlyLayers):
    """Dynamic correction decoding: add the logits of the early layer that is surest.

    With l the final logits, C their candidate tokens, and l_j the logits of layer j after the
    final norm (arXiv 2410.11779)::

        m, w := argmax_j, max_j  max_{x in C} softmax(l_j)_x
        l    := l + alpha * w * l_m,   kept on C

    C are the ``top_k`` likeliest tokens, cut where their probabilities reach ``top_p``. Layer and
    weight are chosen for every row and every token.

    Deviations: none known. The official code takes one row at a time, and its absolute layers are
    those of a model of 32 (preset ``deco_llava``).

    Cost: the output head on the early layers' last row.

    Attributes:
        alpha: Strength, >= 0; 0 leaves only the candidates. Sensible 0.3 to 0.8.
        top_p: Share of probability at which candidates end, above 0 to 1; 1 does not cut.
        top_k: Most candidates, >= 1; null for no limit.
        layers: Early layers to choose from, among all but the last. Sensible between 0.6 and 0.9
            of the depth.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("deco")(alpha=0.4).top_k
        20

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2410.11779"

    alpha: float = 0.6
    top_p: float = 0.9
    top_k: int | None = 20
    layers: Selector = (0.61, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            math.isfinite(self.alpha) and self.alpha >= 0,
            f"alpha is {self.alpha}; it must be at least 0",
        )
        self.require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0, at most 1")
        self.require(
            self.top_k is None or self.top_k >= 1,
            f"top_k is {self.top_k}; it must be at least 1, or null for no limit",
        )

    def is_neutral(self) -> bool:
        return self.alpha == 0 and self.top_p == 1 and self.top_k is None

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        if self.alpha == 0:
            ignored["layers"] = "alpha is 0, so no early layer is read"
        return ignored

    def select_taps(self, model: "ModelInfo") -> tuple[int, ...]:
        return super().select_taps(model) if self.alpha > 0 else ()

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        # Rounded probabilities may reach 1 before the last token does.
        top_p = self.top_p if self.top_p < 1 else math.inf
        top_k = at.raw.shape[-1] if self.top_k is None else self.top_k
        if self.alpha == 0:
            candidates = F.deco_candidates(at.raw, top_p=top_p, top_k=top_k)
            return logits.masked_fill(~candidates, -math.inf)
        corrected = F.deco_logits(
            at.raw, at.early_logits(), alpha=self.alpha, top_p=top_p, top_k=top_k
        )
        return F.add_change(logits, at.raw, corrected)
