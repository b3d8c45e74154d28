"""Which forward is running in this thread's context; the one thing hooks and kernels look up."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from vlm_steer.engine.call import Forward

__all__ = ["ACTIVE", "AttentionSite", "Probe"]


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention module of the text decoder.

    Attributes:
        layer: Index of its decoder layer.
        axis: ``self`` when its keys are the decoder's own tokens, ``cross`` when they are image
            features on an axis of their own.
    """

    layer: int
    axis: Literal["self", "cross"]


@dataclass(eq=False)
class Probe:
    """A pass that steers nothing and collects head outputs of the last row."""

    sites: dict[nn.Module, AttentionSite]
    layers: frozenset[int]
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def see(self, site: AttentionSite, outputs: Tensor) -> None:
        """Keep the last row of head outputs ``[batch, rows, heads, head_dim]``."""
        if site.layer in self.layers:
            self.outputs[site.layer] = outputs[:, -1]


ACTIVE: ContextVar["Forward | Probe | None"] = ContextVar("vlm_steer_active", default=None)
