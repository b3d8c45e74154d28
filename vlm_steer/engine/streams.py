"""What is known of one stream of a generation: the user's own, or a branch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm_steer.engine.hooks import Grid
from vlm_steer.engine.layout import Layout
from vlm_steer.engine.plan import Bound

__all__ = ["Stream", "states_after"]


@dataclass(eq=False)
class Stream:
    """One stream of a generation: the user's own (``positive``) or a branch."""

    name: str
    layout: Layout
    batch: slice = field(default_factory=lambda: slice(None))
    marks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    tallies: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    memo: dict[tuple[int, int, str], Tensor] = field(default_factory=dict)
    prepared: dict[int, Any] = field(default_factory=dict)
    chosen: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    taps: dict[int, Tensor] = field(default_factory=dict)
    grid: Grid | None = None
    shift: Tensor | None = None
    image_features: Tensor | None = None
    shift_in_cache: Tensor | None = None

    def inherit(self, earlier: "Stream", *, same_methods: bool = True) -> None:
        """Take over what was learnt about the tokens that an earlier generation put in a cache.

        Args:
            earlier: The stream of that generation.
            same_methods: Whether its methods are those of this one, in the same order.
        """
        if same_methods:
            self.marks.update(earlier.marks)
            self.tallies.update(earlier.tallies)
        self.image_features = earlier.image_features
        self.shift_in_cache = earlier.shift

    def tapped(self, layers: Iterable[int]) -> Tensor:
        """States of the last row after each of the layers, ``[batch, layers, hidden]``."""
        return states_after(self.taps, layers)

    @property
    def can_be_padded(self) -> bool:
        """Whether nothing is known yet of single positions of its prompt."""
        known = (self.marks, self.tallies, self.memo, self.prepared, self.chosen)
        found = (self.grid, self.shift, self.image_features, self.shift_in_cache)
        return not any(known) and all(thing is None for thing in found)

    def pad(self, missing: int) -> None:
        """Put padding in front of its prompt."""
        if missing > 0:
            kinds = torch.nn.functional.pad(self.layout.prompt, (missing, 0))
            self.layout = Layout.from_kinds(kinds)

    def select(self, rows: Tensor) -> None:
        """Make other rows of the batch of a prompt, as its cache does."""
        self.layout = Layout.from_kinds(self.layout.prompt[rows.to(self.layout.kinds.device)])
        self.marks = {key: marks[rows.to(marks.device)] for key, marks in self.marks.items()}

    @property
    def is_positive(self) -> bool:
        """Whether this is the user's own stream."""
        return self.name == "positive"

    def in_scope(self, bound: Bound, hook: str) -> bool:
        """Whether a hook of a method acts on this stream."""
        if (own := bound.method.own.get(hook)) is not None:
            return self.name == bound.key(own)
        scope = bound.method.scope
        return scope == "all" or (scope == "positive") == self.is_positive


def states_after(taps: Mapping[int, Tensor], layers: Iterable[int]) -> Tensor:
    """``[batch, layers, hidden]`` from ``[batch, hidden]`` after every layer that ran.

    A layer that did not run, such as a cross-attention layer without an image, left the residual
    stream as the layer before it did.
    """
    states = [taps[max(ran for ran in taps if ran <= layer)] for layer in layers]
    return torch.stack([state.to(states[0].device) for state in states], dim=1)
