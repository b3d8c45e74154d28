"""Logits processors of the harness: they read the first distribution, and sample per item."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

__all__ = ["LIMIT", "EndBias", "FirstTokenMargin", "SeededNoise"]

LIMIT = 1e4
"""Stands for an infinite margin: a plausibility cut may leave one side no probability at all."""


class FirstTokenMargin(LogitsProcessor):
    """Reads, and leaves alone, the first distribution."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self._first, self._second = first, second
        self._margin: Tensor | None = None

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """Keep the margin of the first step; returns the scores as they are."""
        if self._margin is None:
            logits = scores.float()
            first = logits[:, self._first.to(scores.device)].logsumexp(-1)
            second = logits[:, self._second.to(scores.device)].logsumexp(-1)
            self._margin = first - second
        return scores

    def values(self, rows: int) -> list[float | None]:
        """The margins, within ±`LIMIT`; None where both sides have probability zero."""
        if self._margin is None:
            return [None] * rows
        bounded = self._margin.clamp(-LIMIT, LIMIT).tolist()
        return [None if math.isnan(value) else value for value in bounded]


class EndBias(LogitsProcessor):
    """A constant preference for ending the answer, or for going on."""

    def __init__(self, ends: Sequence[int], bias: float) -> None:
        self._ends, self._bias = list(ends), bias

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """The scores `[rows, vocabulary]` with the bias added to the tokens that end."""
        biased = scores.clone()
        biased[:, self._ends] += self._bias
        return biased


class SeededNoise(LogitsProcessor):
    """Gumbel noise per row: the largest noisy score is a sample from the distribution.

    Each row draws from a generator of its own, so that an item's sample depends on its seed alone,
    not on the items beside it.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """The scores `[rows, vocabulary]` with each row's own noise, float32."""
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in enumerate(self._generators):
            noise[row].exponential_(generator=generator)
        return scores.float() - noise.log().to(scores.device)
