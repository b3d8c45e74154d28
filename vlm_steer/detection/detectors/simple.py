"""Detectors that look at where a word stands and at how sure the model was of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_steer.detection.base import Detector, Evidence, Pool, Unit, pooled, register_detector
from vlm_steer.detection.trace import Trace

__all__ = ["Entropy", "Logprob", "Margin", "Occurrence", "Position"]


@register_detector("position")
@dataclass(frozen=True, kw_only=True)
class Position(Detector):
    """How many words come before: the control that every other detector is held against.

    Captions name what is plain to see first and what is guessed later, so the place alone tells a
    good part of the hallucinated words.
    """

    def features(
        self,
        trace: Trace,  # noqa: ARG002
        units: Sequence[Unit],
        evidence: Evidence | None = None,  # noqa: ARG002
    ) -> Tensor:
        """``[units, 1]``."""
        words = [float(unit.word) for unit in units]
        return torch.tensor(words, dtype=torch.float64)[:, None]


@register_detector("occurrence")
@dataclass(frozen=True, kw_only=True)
class Occurrence(Detector):
    """How often the object was named before, negative: what is repeated is mostly there."""

    def features(
        self,
        trace: Trace,  # noqa: ARG002
        units: Sequence[Unit],
        evidence: Evidence | None = None,  # noqa: ARG002
    ) -> Tensor:
        """``[units, 1]``."""
        seen = [-float(unit.occurrence) for unit in units]
        return torch.tensor(seen, dtype=torch.float64)[:, None]


@dataclass(frozen=True, kw_only=True)
class _OfLogits(Detector):
    """Something about the next-token distribution.

    Attributes:
        pool: ``first`` token of the unit, or the ``mean`` over its tokens.
    """

    pool: Pool = "first"

    def features(
        self,
        trace: Trace,
        units: Sequence[Unit],
        evidence: Evidence | None = None,  # noqa: ARG002
    ) -> Tensor:
        """``[units, 1]``."""
        return pooled(self.of_token(trace)[:, None], units, self.pool)

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens]``."""
        raise NotImplementedError


@register_detector("logprob")
@dataclass(frozen=True, kw_only=True)
class Logprob(_OfLogits):
    """Negative log-probability of the word, nats."""

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens]``."""
        return -trace.logprob


@register_detector("entropy")
@dataclass(frozen=True, kw_only=True)
class Entropy(_OfLogits):
    """Entropy of the distribution that the word was drawn from, nats."""

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens]``."""
        return trace.entropy


@register_detector("margin")
@dataclass(frozen=True, kw_only=True)
class Margin(_OfLogits):
    """Negative gap between the two likeliest tokens, in nats of log-probability."""

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens]``."""
        return -trace.margin
