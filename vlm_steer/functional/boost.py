"""Raising the attention paid to the image (PAI, PAINT, VAF, GIFT)."""

import torch
from torch import Tensor

from vlm_steer.errors import DataError
from vlm_steer.functional._numeric import is_open, masked_sum, safe_divide, upcast

_BEYOND_SCORES = 1e30


def boost_scores(scores: Tensor, visual: Tensor, *, alpha: float | Tensor) -> Tensor:
    """Amplifies the scores of the image columns in the direction of attention (PAI).

    `z_j + alpha * |z_j|` for j in the image, `z_j` elsewhere (arXiv 2407.21771): positive
    scores grow by `1 + alpha`, negative ones shrink by `1 - alpha`. Closed columns stay closed.

    Args:
        scores: pre-softmax scores of the steered rows, `[batch, heads, query, key]` float.
        visual: bool `[batch, key]`, columns to raise.
        alpha: strength, a number or broadcastable to the scores; 0 is identity, bitwise (authors:
            0.2 to 0.6). Below 0 the columns lose.

    Returns:
        New scores, shape and dtype of `scores`.
    """
    return _raised(scores, _of_open(scores).abs(), visual, alpha)


def scale_scores(scores: Tensor, columns: Tensor, *, factor: float) -> Tensor:
    """Multiplies the scores of some columns, whatever their sign (VAF).

    `factor * z_j` for the columns given (arXiv 2503.13107): 1.15 on the image, 0.95 on the system
    prompt in the official code. A negative score moves away from zero when `factor > 1`, so the
    image can lose attention; `boost_scores` with `alpha = factor - 1` is the form that cannot.
    Equivalent to scaling the key vectors of these columns. Closed columns stay closed.

    Args:
        scores: pre-softmax scores of the steered rows, `[batch, heads, query, key]` float.
        columns: bool `[batch, key]`.
        factor: >= 0; 1 is identity, bitwise.

    Returns:
        New scores, shape and dtype of `scores`.
    """
    return _raised(scores, _of_open(scores), columns, factor - 1)


def _raised(scores: Tensor, amount: Tensor, columns: Tensor, share: float | Tensor) -> Tensor:
    """Adds a share of an amount to the scores of some columns, `[batch, key]`."""
    shares = columns[:, None, None, :].to(amount.dtype) * share
    return torch.addcmul(upcast(scores), amount, shares).to(scores.dtype)


def _of_open(scores: Tensor) -> Tensor:
    """Returns the scores in full precision, those that a mask has closed small enough to stay so.

    Added to a closed score, a share of what this returns does not open it, nor make it NaN.
    """
    if torch.finfo(scores.dtype).max > _BEYOND_SCORES:
        return upcast(scores).clamp(min=-_BEYOND_SCORES)
    return upcast(scores).masked_fill(~is_open(scores), 0)


def gift_saliency(gaze_shift: Tensor, *, alpha: float) -> Tensor:
    """Turns the gaze shifts of the question words into one multiplier per image token (GIFT).

    The mean h over layers, heads and rows is clamped to its mean +- 3 standard deviations
    (unbiased), scaled to [0, 1] and exponentiated: `exp(alpha * h)` (arXiv 2510.22067). A
    constant map, where the official code divides by zero, gives ones.

    Args:
        gaze_shift: rises of attention between consecutive question rows,
            `[layers, heads, rows, image_tokens]` float, >= 0, without empty axes.
        alpha: strength, >= 0; 0 gives ones (authors: 4 to 5).

    Returns:
        fp32 `[image_tokens]` in `[1, exp(alpha)]`.

    Raises:
        DataError: an axis is empty, as when a question has no content word.
    """
    if gaze_shift.numel() == 0:
        raise DataError(
            f"gaze shifts of shape {tuple(gaze_shift.shape)} hold nothing to average; "
            "pass at least one layer, head, question row and image token"
        )
    saliency = upcast(gaze_shift).mean((0, 1, 2))
    spread = 3 * (saliency.std() if saliency.numel() > 1 else torch.zeros_like(saliency[0]))
    center = saliency.mean()
    clamped = saliency.clamp(center - spread, center + spread)
    lowest = clamped.amin()
    return (alpha * safe_divide(clamped - lowest, clamped.amax() - lowest, otherwise=0.0)).exp()


def gift_fuse(weights: Tensor, saliency: Tensor, visual: Tensor, query_tokens: Tensor) -> Tensor:
    """Weighs the image by its saliency and lets the question keep pace (GIFT).

    On one row: the upper half of the heads by image mass get `A_j * saliency_j` on the image;
    with c the factor by which this raises their joint image mass, the upper half of the heads by
    question mass get `A_j * c` on the question; every row is then brought back to its former sum
    (arXiv 2510.22067). With an odd number of heads the half is rounded down, as in the official
    code, which divides each row by its new sum instead: the same for rows that sum to one.

    Args:
        weights: post-softmax attention of one query row, `[batch, heads, key]` float.
        saliency: multipliers, `[batch, key]`, > 0; read at image columns only. Ones there give
            the identity, bitwise.
        visual: bool `[batch, key]`.
        query_tokens: bool `[batch, key]`, the user's question; disjoint from `visual`.

    Returns:
        New weights, shape and dtype of `weights`.
    """
    a = upcast(weights)
    image, question = visual[:, None, :], query_tokens[:, None, :]
    image_heads = _upper_half(masked_sum(a, image))
    gain = torch.where(image_heads & image, upcast(saliency)[:, None, :], 1.0)
    boosted = a * gain
    before = masked_sum(a, image_heads & image).sum(-1)
    after = masked_sum(boosted, image_heads & image).sum(-1)
    pace = safe_divide(after, before, otherwise=1.0)[:, None, None]
    question_heads = _upper_half(masked_sum(a, question))
    fused = torch.where(question_heads & question, boosted * pace, boosted)
    restore = safe_divide(a.sum(-1, keepdim=True), fused.sum(-1, keepdim=True), otherwise=1.0)
    return (fused * restore).to(weights.dtype)


def _upper_half(mass: Tensor) -> Tensor:
    """Marks the `heads // 2` largest of `[batch, heads]`, as `[batch, heads, 1]`."""
    top = mass.topk(mass.shape[-1] // 2, dim=-1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, top, True).unsqueeze(-1)
