"""Random inputs shared by the property tests: small, seeded, with masks of every kind."""

from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 2**31 - 1)
FRACTIONS = st.floats(0, 1, allow_subnormal=False)

few = settings(max_examples=25, deadline=None, derandomize=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Prompt(NamedTuple):
    """Left-padded prompts: padding, text, image, text."""

    real: Tensor  # [batch, sequence]
    visual: Tensor
    after_image: Tensor


class Attention(NamedTuple):
    scores: Tensor  # [batch, heads, sequence, sequence], -inf where closed
    weights: Tensor
    prompt: Prompt


def prompts(seed: int, *, batch: int = 2, size: int = 14) -> Prompt:
    draw = generator(seed)
    n_pad = torch.randint(0, 3, (batch, 1), generator=draw)
    begin = n_pad + torch.randint(1, 4, (batch, 1), generator=draw)
    end = begin + torch.randint(2, 5, (batch, 1), generator=draw)
    position = torch.arange(size)
    return Prompt(
        real=position >= n_pad,
        visual=(position >= begin) & (position < end),
        after_image=position >= end,
    )


def attentions(
    seed: int, *, batch: int = 2, heads: int = 4, size: int = 14, dtype: torch.dtype = torch.float32
) -> Attention:
    prompt = prompts(seed, batch=batch, size=size)
    scores = 3 * torch.randn(batch, heads, size, size, generator=generator(seed + 1), dtype=dtype)
    causal = torch.ones(size, size, dtype=torch.bool).tril() & prompt.real[:, None, :]
    closed = ~(causal | torch.eye(size, dtype=torch.bool))[:, None]
    scores = scores.masked_fill(closed, -torch.inf)
    return Attention(scores=scores, weights=scores.softmax(-1), prompt=prompt)


def random_mask(seed: int, *shape: int, share: float = 0.3) -> Tensor:
    return torch.rand(*shape, generator=generator(seed)) < share


def random_logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=generator(seed))
