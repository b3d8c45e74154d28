"""Which forward is running in this thread's context; the one thing hooks and kernels look up."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from vlm_steer.engine.forward import Forward

__all__ = ["ACTIVE", "AttentionSite", "Enough", "Probe"]


class Enough(BaseException):
    """Ends a pass before generation that has told all that was asked."""


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
    """A pass that steers nothing and collects head outputs or hidden states of the last row.

    It can also watch all queries and keys.

    Attributes:
        sites: Attention modules whose head outputs to collect.
        layers: Layers at which to collect them.
        taps: Layers whose output to collect.
        outputs: The head outputs collected, ``[batch, heads, head_dim]`` by layer.
        states: The layers' outputs collected, ``[batch, hidden]`` by layer.
        is_watching: Whether to collect queries and keys.
        inputs: Those collected, ``[batch, heads, tokens, head_dim]`` by layer.
    """

    sites: dict[nn.Module, AttentionSite] = field(default_factory=dict)
    layers: frozenset[int] = frozenset()
    taps: frozenset[int] = frozenset()
    outputs: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    is_watching: bool = False
    inputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def watch(self, site: AttentionSite, query: Tensor, key: Tensor) -> None:
        """Keep queries and keys as the attention function gets them."""
        if self.is_watching:
            self.inputs[site.layer] = (query, key)

    def see(self, site: AttentionSite, outputs: Tensor) -> None:
        """Keep the last row of head outputs ``[batch, rows, heads, head_dim]``."""
        if site.layer in self.layers:
            self.outputs[site.layer] = outputs[:, -1]

    def tap(self, layer: int, hidden: Tensor) -> None:
        """Keep the last row of a layer's output ``[batch, rows, hidden]``."""
        if layer in self.taps:
            self.states[layer] = hidden[:, -1].clone()


ACTIVE: ContextVar["Forward | Probe | None"] = ContextVar("vlm_steer_active", default=None)
