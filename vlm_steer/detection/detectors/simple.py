"""Detectors that look at where a word stands and at how sure the model was of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_steer.detection.base import OfTrace, PerToken, Unit, register_detector
from vlm_steer.detection.trace import Trace

__all__ = ["Entropy", "Logprob", "Margin", "Occurrence", "Position"]


@register_detector("position")
@dataclass(frozen=True, kw_only=True)
class Position(OfTrace):
    """How many words come before: the control that every other detector is held against.

    Captions name what is plain to see first and what is guessed later, so the place alone tells a
    good part of the hallucinated words.
    """

    def of_units(self, trace: Trace, units: Sequence[Unit]) -> Tensor:  # noqa: ARG002
        """``[units, 1]``."""
        words = [float(unit.word) for unit in units]
        return torch.tensor(words, dtype=torch.float64)[:, None]


@register_detector("occurrence")
@dataclass(frozen=True, kw_only=True)
class Occurrence(OfTrace):
    """How often the object was named before, negative: what is repeated is mostly there."""

    def of_units(self, trace: Trace, units: Sequence[Unit]) -> Tensor:  # noqa: ARG002
        """``[units, 1]``."""
        seen = [-float(unit.occurrence) for unit in units]
        return torch.tensor(seen, dtype=torch.float64)[:, None]


@register_detector("logprob")
@dataclass(frozen=True, kw_only=True)
class Logprob(PerToken):
    """Negative log-probability of the word, nats.

    Attributes:
        pool: ``first`` token of the unit, or the ``mean`` over its tokens.
    """

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens, 1]``."""
        return -trace.logprob[:, None]


@register_detector("entropy")
@dataclass(frozen=True, kw_only=True)
class Entropy(PerToken):
    """Entropy of the distribution that the word was drawn from, nats.

    Attributes:
        pool: ``first`` token of the unit, or the ``mean`` over its tokens.
    """

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens, 1]``."""
        return trace.entropy[:, None]


@register_detector("margin")
@dataclass(frozen=True, kw_only=True)
class Margin(PerToken):
    """Negative gap between the two likeliest tokens, in nats of log-probability.

    Attributes:
        pool: ``first`` token of the unit, or the ``mean`` over its tokens.
    """

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens, 1]``."""
        return -trace.margin[:, None]
