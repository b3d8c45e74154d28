"""Numeric conventions shared by the families: precision, masks, guarded ratios."""

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


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Averages the last axis over the True columns of `mask`; an empty set has mean 0."""
    return masked_sum(values, mask) / mask.sum(-1).clamp(min=1)


def safe_divide(numerator: Tensor, denominator: Tensor, *, otherwise: float) -> Tensor:
    """Divides, and returns `otherwise` where the denominator is 0."""
    is_zero = denominator == 0
    return torch.where(is_zero, otherwise, numerator / denominator.masked_fill(is_zero, 1))
