"""State of one generation, which is dropped with it; nothing is kept on modules or classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vlm_steer.engine.hooks import VisionAt
from vlm_steer.engine.plan import Plan
from vlm_steer.engine.streams import Stream

if TYPE_CHECKING:
    from vlm_steer.engine.forward import Acting

__all__ = ["Call", "Encoding", "Touch"]

_MEASURED_STEPS = 2


@dataclass(eq=False)
class Call:
    """One generation under one plan.

    Attributes:
        plan: What acts where.
        positive: The user's own stream.
        grids: The image grids that the user's processor passed along, by argument.
        copies: Consecutive rows that stem from one row of the user's, as beams do.
        step: Forwards done so far.
        records: Per observer, one tensor per step, ``[batch, layers, ...]``.
        touches: Per method and layer, what was changed, see ``Touch``.
        moved: Per method, probability mass moved between next tokens by its logits hooks.
        seen: What the ``observe`` hook of a searching method saw in the last pass, by layer.
        changes: Per searching method, how many choices it made otherwise.
        vision: Per method, states that it changed in the vision tower.
        traced: ``[sequences, tokens]``, the row in which each token of a search was predicted.
    """

    plan: Plan
    positive: Stream
    grids: Mapping[str, Tensor] = field(default_factory=dict)
    copies: int = 1
    step: int = 0
    records: dict[str, list[Tensor]] = field(default_factory=dict)
    touches: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    moved: dict[int, Tensor] = field(default_factory=dict)
    seen: dict[int, Tensor] = field(default_factory=dict)
    changes: dict[int, Tensor] = field(default_factory=dict)
    vision: dict[int, Tensor] = field(default_factory=dict)
    traced: Tensor | None = None
    acting_when_decoding: dict[tuple[int, str], "Acting"] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """Whether effects are being measured: the prompt and the first decoding step are."""
        return self.step < _MEASURED_STEPS


@dataclass(frozen=True, slots=True)
class Encoding:
    """Images being encoded under a plan.

    Attributes:
        plan: What acts where.
        is_positive: Whether they are the user's own, not a branch's.
        changed: Per method, states that it changed.
    """

    plan: Plan
    is_positive: bool
    changed: dict[int, Tensor]

    def edit(self, site: Literal["mlp", "residual"], layer: int, states: Tensor) -> Tensor:
        """Apply ``vision`` hooks to ``[..., hidden]``."""
        for bound in self.plan.vision:
            scope = bound.method.scope
            if scope != "all" and (scope == "positive") != self.is_positive:
                continue
            at = VisionAt(layer, site, bound.constants)
            new = bound.method.vision(states, at).to(states.dtype)
            count = (new != states).any(dim=-1).sum()
            self.changed[bound.index] = count + self.changed.get(bound.index, 0)
            states = new
        return states


class Touch:
    """What one method changed at one layer: ``[rows, heads, mass]`` sums over a forward."""

    @staticmethod
    def of_weights(before: Tensor, after: Tensor) -> Tensor:
        """From attention weights ``[batch, heads, rows, key]``."""
        mass = torch.linalg.vector_norm(after - before, ord=1, dim=-1) / 2
        moved = mass > 1e-7
        return torch.stack(
            [moved.any(dim=1).sum(), moved.any(dim=2).sum(dim=1).float().mean(), mass.sum()]
        ).float()

    @staticmethod
    def of_heads(before: Tensor, after: Tensor) -> Tensor:
        """From head outputs ``[batch, rows, heads, head_dim]``; they move no attention mass."""
        moved = (after != before).any(dim=-1)
        return torch.stack(
            [
                moved.any(dim=2).sum(),
                moved.any(dim=1).sum(dim=1).float().mean(),
                moved.new_zeros(()),
            ]
        ).float()

    @staticmethod
    def of_rows(before: Tensor, after: Tensor) -> Tensor:
        """From hidden states or boolean masks ``[batch, rows, ...]``."""
        rows = (after != before).any(dim=-1).sum()
        zero = rows.new_zeros(())
        return torch.stack([rows, zero, zero]).float()
