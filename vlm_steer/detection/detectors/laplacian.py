"""LapEigvals and its siblings: spectra of attention read as a graph, from running sums."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer.detection.base import OfTrace, Unit, register_detector
from vlm_steer.detection.recording import Need
from vlm_steer.detection.trace import Trace
from vlm_steer.errors import ConfigError

__all__ = ["AttnEigvals", "AttnLogDet", "AttnScore", "LapEigvals"]


@dataclass(frozen=True, kw_only=True)
class _OfResponse(OfTrace):
    """Something about the attention of the whole text, the same for all its units.

    Recorded as sums over rows as they pass: ``2 * layers * heads * tokens`` numbers instead of a
    matrix per head. The text's own tokens attend to each other causally in every model, so the
    spectrum is right where prompts are not causal.
    """

    paper: ClassVar[str] = "arXiv:2502.17598"
    needs: ClassVar[tuple[Need, ...]] = ("received",)

    def of_units(self, trace: Trace, units: Sequence[Unit]) -> Tensor:
        """``[units, d]``, equal rows."""
        return self.of_text(trace).flatten().double().expand(len(units), -1).clone()

    def of_text(self, trace: Trace) -> Tensor:
        """What the text has as features."""
        raise NotImplementedError

    def own(self, trace: Trace) -> Tensor:
        """``[layers, heads, tokens]`` attention of each token to itself."""
        return self.require(trace.own, "received")

    def log_own(self, trace: Trace) -> Tensor:
        """``[layers, heads]`` mean logarithm of it; 0 for a text of one token."""
        own = self.own(trace)
        if own.shape[-1] == 0:
            return own.new_zeros(own.shape[:2])
        return own.clamp(min=torch.finfo(own.dtype).tiny).log().mean(-1)


@dataclass(frozen=True, kw_only=True)
class _TopEigenvalues(_OfResponse):
    """The largest eigenvalues of every head.

    Attributes:
        top_k: How many; shorter texts are filled up with zeros. The authors try 5 to 100.
    """

    must_be_fitted: ClassVar[bool] = True

    top_k: int = 10

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"{self.name}: top_k is {self.top_k}; it must be at least 1")

    def of_text(self, trace: Trace) -> Tensor:
        """``[layers, heads, top_k]``, descending."""
        values = self.eigenvalues(trace)
        missing = max(self.top_k - values.shape[-1], 0)
        found = values.topk(min(self.top_k, values.shape[-1]), dim=-1).values
        return torch.nn.functional.pad(found, (0, missing))

    def eigenvalues(self, trace: Trace) -> Tensor:
        """``[layers, heads, tokens]``."""
        raise NotImplementedError


@register_detector("lap_eigvals")
@dataclass(frozen=True, kw_only=True)
class LapEigvals(_TopEigenvalues):
    """Largest eigenvalues of the Laplacian of each head's attention (LapEigvals, EMNLP 2025).

    With d_i the mean attention that token i receives from the rows that see it, the Laplacian
    ``diag(d) - A`` of causal attention is triangular: its eigenvalues are ``d_i - A_ii``.

    Deviations: the authors take prompt and answer together, which is the scope ``sequence`` of
    ``trace_answers``; by default it is the answer alone.

    Attributes:
        top_k: Eigenvalues per head, >= 1; shorter texts are filled up with zeros.
    """

    def eigenvalues(self, trace: Trace) -> Tensor:
        """``[layers, heads, tokens]``."""
        received = self.require(trace.received, "received")
        n_rows = self.require(trace.n_rows, "received").clamp(min=1)
        return received / n_rows[:, None] - self.own(trace)


@register_detector("attn_eigvals")
@dataclass(frozen=True, kw_only=True)
class AttnEigvals(_TopEigenvalues):
    """Largest eigenvalues of the attention itself: what tokens give to themselves.

    Attributes:
        top_k: Eigenvalues per head, >= 1; shorter texts are filled up with zeros.
    """

    def eigenvalues(self, trace: Trace) -> Tensor:
        """``[layers, heads, tokens]``."""
        return self.own(trace)


@register_detector("attn_logdet")
@dataclass(frozen=True, kw_only=True)
class AttnLogDet(_OfResponse):
    """Mean log-determinant of each head's attention."""

    must_be_fitted: ClassVar[bool] = True

    def of_text(self, trace: Trace) -> Tensor:
        """``[layers, heads]``."""
        return self.log_own(trace)


@register_detector("attn_score")
@dataclass(frozen=True, kw_only=True)
class AttnScore(_OfResponse):
    """The log-determinants summed over heads, negative, without training (LLM-Check).

    Attributes:
        layer: ``mean`` over layers, or the index of one among those recorded.
    """

    layer: Literal["mean"] | int = "mean"

    def of_text(self, trace: Trace) -> Tensor:
        """One number."""
        scores = -self.log_own(trace).sum(1)
        if self.layer == "mean":
            return scores.mean()[None]
        if not 0 <= self.layer < len(scores):
            raise ConfigError(
                f"attn_score: layer is {self.layer}, but {len(scores)} layers were recorded"
            )
        return scores[self.layer][None]
