"""What methods that read logits off early layers have in common."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_steer.engine.hooks import Method, Selector
from vlm_steer.engine.selectors import select

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["EarlyLayers"]


@dataclass(frozen=True, kw_only=True)
class EarlyLayers(Method):
    """Base of methods that compare the last layer's logits with those of earlier ones.

    Attributes:
        layers: Early layers to read, chosen among all but the last, whose logits are the final
            ones; fractions count in these.
    """

    layers: Selector = "all"

    def select_layers(self, model: "ModelInfo") -> tuple[int, ...]:
        return select(self.layers, model.n_layers - 1, "layers before the last")

    def select_taps(self, model: "ModelInfo") -> tuple[int, ...]:
        return self.select_layers(model)
