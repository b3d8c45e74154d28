"""DoLa: contrast with the early layer that differs most."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import LogitsAt, Selector
from vlm_steer.methods._early import EarlyLayers
from vlm_steer.registry import register_method

__all__ = ["DoLa"]


@register_method("dola")
@dataclass(frozen=True, kw_only=True)
class DoLa(EarlyLayers):
    """Decoding by contrasting layers: subtract what an early layer would have said.

    With p the next-token distribution of the last layer and q_j that of layer j, read off with
    the model's own output head (arXiv 2309.03883, eqs. 1 to 5)::

        m := argmax_j JSD(p || q_j)
        l := log p - log q_m,   kept where p >= relative_top * max(p)

    The layer is chosen anew for every row and every token.

    Deviations of the official code and of its port in transformers: they swap the arguments of
    the divergence, KL(M || p) + KL(M || q) instead of KL(p || M) + KL(q || M) (``divergence:
    kl_m``, preset ``dola_official``); they choose one layer for a whole batch, and the former
    also rules tokens out by the first row alone. Both take every second layer, and count the
    embeddings as a layer, which is not offered here. Like them this leaves out the final norm
    unless ``norm`` asks for it.

    On vision-language models DoLa has been reported to be neutral or harmful.

    Cost: the output head on the early layers' last row.

    Attributes:
        relative_top: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.2.
        divergence: ``jsd`` (paper) or ``kl_m`` (official code).
        norm: Apply the model's final norm to the early layers.
        layers: Early layers to choose from, among all but the last. The authors use the lower
            half for long answers and the upper half for short ones.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("dola")(layers=(0.5, None)).divergence
        'jsd'

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2309.03883"

    relative_top: float = 0.1
    divergence: Literal["jsd", "kl_m"] = "jsd"
    norm: bool = False
    layers: Selector = (0.0, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            0 <= self.relative_top <= 1,
            f"relative_top is {self.relative_top}; it must lie in [0, 1]",
        )

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        contrasted = F.dola_logits(
            at.raw,
            at.early_logits(normed=self.norm),
            relative_top=self.relative_top,
            divergence=self.divergence,
        )
        return F.add_change(logits, at.raw, contrasted)
