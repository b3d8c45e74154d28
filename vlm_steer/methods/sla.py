"""SLA: mix the logits of late middle layers into the final ones."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import LogitsAt, Selector
from vlm_steer.methods._early import EarlyLayers
from vlm_steer.registry import register_method

__all__ = ["SLA"]


@register_method("sla")
@dataclass(frozen=True, kw_only=True)
class SLA(EarlyLayers):
    """Self-logits augmentation: mix in the mean logits of the layers before the last.

    With l the final logits and l_j those of layer j, read off with the model's own output head
    (arXiv 2502.03628)::

        l := gamma * mean_j(l_j) + (1 - gamma) * l

    It is one half of VISTA (``vista``); this is that half alone.

    Deviations: none known. Like the official code it leaves out the final norm unless ``norm``
    asks for it, so the early logits have the scale of the residual stream.

    Cost: the output head on one row more, the mean of the early layers' (on one per early layer in
    models with a soft cap).

    Attributes:
        gamma: Weight of the early layers, 0 to 1; 0 disables. Sensible 0.1 to 0.4.
        norm: Apply the model's final norm to the early layers.
        layers: Early layers to mix in, among all but the last. The authors use 25 to 30 of 32.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("sla")(gamma=0.2).norm
        False

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2502.03628"

    gamma: float = 0.3
    norm: bool = False
    layers: Selector = (0.8, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.gamma <= 1, f"gamma is {self.gamma}; it must lie in [0, 1]")

    def is_neutral(self) -> bool:
        return self.gamma == 0

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        early = at.early_logits(normed=self.norm, mean=True)
        return F.add_change(logits, at.raw, F.early_logit_mix(at.raw, early, gamma=self.gamma))
