"""Raising the attention paid to the image (PAI, PAINT, VAF, GIFT)."""

import torch
from torch import Tensor

from vlm_steer.functional._numeric import is_open, upcast


def boost_scores(scores: Tensor, visual: Tensor, *, alpha: float) -> Tensor:
    """Amplifies the scores of the image columns in the direction of attention (PAI).

    `z_j + alpha * |z_j|` for j in the image, `z_j` elsewhere (arXiv 2407.21771, eq. 4): positive
    scores grow by `1 + alpha`, negative ones shrink by `1 - alpha`. Closed columns stay closed.

    Args:
        scores: pre-softmax scores of the steered rows, `[batch, heads, query, key]` float.
        visual: bool `[batch, key]`, columns to raise.
        alpha: strength, >= 0; 0 is identity, bitwise (authors: 0.2 to 0.6).

    Returns:
        New scores, shape and dtype of `scores`.
    """
    z = upcast(scores)
    columns = visual[:, None, None, :] & is_open(scores)
    return torch.where(columns, z + alpha * z.abs(), z).to(scores.dtype)
