"""What methods that shift hidden states along a vector have in common."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlm_steer.engine.hooks import At, Method, Rows

__all__ = ["Shift"]

_HOOKS = {"mlp": "mlp", "residual": "hidden"}


@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    """Base of methods that shift the states of every position, in one place per layer.

    Attributes:
        site: What is shifted: the output of each MLP (``mlp``) or the residual stream after each
            layer (``residual``).
    """

    rows: ClassVar[Rows] = "all"

    site: Literal["mlp", "residual"] = "mlp"

    def overrides(self, hook: str) -> bool:
        acts = hook not in _HOOKS.values() or hook == _HOOKS[self.site]
        return acts and super().overrides(hook)

    def mlp(self, output: Tensor, at: At) -> Tensor:
        return self.shift(output, at)

    def hidden(self, hidden: Tensor, at: At) -> Tensor:
        return self.shift(hidden, at)

    def shift(self, states: Tensor, at: At) -> Tensor:
        """``[batch, rows, hidden]`` states at the site; same shape back."""
        raise NotImplementedError
