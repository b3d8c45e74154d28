"""Numeric conventions shared by the families: precision, masks, guarded ratios."""

from typing import Literal

import torch
from torch import Tensor


def upcast(tensor: Tensor) -> Tensor:
    """Returns `tensor` in the precision of our reductions: fp32, or fp64 where it is fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def is_open(scores: Tensor) -> Tensor:
    """Marks the scores that no mask has closed.

    Models close a column with `-inf` or with (a sum of) the most negative finite number, so
    everything below half of that number counts as closed.

    Args:
        scores: pre-softmax scores of any shape.

    Returns:
        bool, same shape: True where the column may be attended.
    """
    return scores > torch.finfo(scores.dtype).min / 2


def masked_sum(values: Tensor, mask: Tensor, *, keepdim: bool = False) -> Tensor:
    """Sums the last axis over the True columns of `mask`, whatever stands in the others."""
    return values.masked_fill(~mask, 0).sum(-1, keepdim=keepdim)


def column_groups(*masks: Tensor, dtype: torch.dtype) -> Tensor:
    """Stacks groups of columns so that `weights @ groups` sums over each of them.

    Args:
        *masks: bool, broadcastable to each other, `[batch, n, key]`, where n is the second axis of
            the weights, or 1.
        dtype: that of the weights, which have to be finite everywhere.

    Returns:
        0 or 1, `[batch, n, key, groups]`.
    """
    whole = torch.broadcast_tensors(*masks)  # type: ignore[no-untyped-call]
    return torch.stack(whole, dim=-1).to(dtype)


def scale_groups(weights: Tensor, groups: Tensor, factors: Tensor) -> Tensor:
    """Multiplies groups of columns by a factor each, in one product.

    Args:
        weights: `[batch, n, rows, key]` float; heads and rows may change places.
        groups: from `column_groups`, disjoint.
        factors: `[batch, n, rows, groups]`; 1 is identity, bitwise.
    """
    return torch.addcmul(weights, weights, (factors - 1) @ groups.transpose(-1, -2))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Averages the last axis over the True columns of `mask`; an empty set has mean 0."""
    return masked_sum(values, mask) / mask.sum(-1).clamp(min=1)


def safe_divide(numerator: Tensor, denominator: Tensor, *, otherwise: float) -> Tensor:
    """Divides, and returns `otherwise` where the denominator is 0."""
    is_zero = denominator == 0
    return torch.where(is_zero, otherwise, numerator / denominator.masked_fill(is_zero, 1))


def divergence_of(log_p: Tensor, log_q: Tensor, kind: Literal["kl_m", "jsd"]) -> Tensor:
    """Measures how far two distributions are apart, by their mean M.

    Args:
        log_p: log-probabilities, `[..., vocabulary]`.
        log_q: others that broadcast to them.
        kind: `jsd` for `1/2 [KL(p || M) + KL(q || M)]`, `kl_m` for `1/2 [KL(M || p) + KL(M || q)]`.

    Returns:
        `[...]`, >= 0.
    """
    p, q = log_p.exp(), log_q.exp()
    middle = (p + q) / 2
    # The vocabulary is large: one logarithm for both terms.
    log_middle = middle.clamp(min=torch.finfo(middle.dtype).tiny).log()
    if kind == "kl_m":
        return (middle * (2 * log_middle - log_p - log_q)).sum(-1) / 2
    return (_terms(p, log_p - log_middle) + _terms(q, log_q - log_middle)).sum(-1) / 2


def _terms(p: Tensor, log_ratio: Tensor) -> Tensor:
    """Terms of a Kullback-Leibler divergence; 0 where p is 0, whatever the ratio."""
    return torch.where(p > 0, p * log_ratio, 0.0)
