"""Choosing heads: vision-aware ones (VHR, VAF, PAINT) and ones to suppress (SPIN)."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlm_steer.functional._numeric import is_open, masked_sum, safe_divide, upcast


class VisionAwareHeads(NamedTuple):
    """How much each head of a layer reacts to the image.

    Attributes:
        divergence: fp32 `[batch, heads]`, 0 for negative outliers.
        selected: bool `[batch, heads]`, divergence above the median of the layer.
    """

    divergence: Tensor
    selected: Tensor


def vision_aware_heads(
    with_image: Tensor,
    text_only: Tensor,
    *,
    distance: Literal["l2", "l2sq"] = "l2",
    drop_outliers: bool = True,
) -> VisionAwareHeads:
    """Selects the heads of one layer whose output changes most with the image (VHR).

    With a_i the output of head i before the output projection (arXiv 2412.13949)::

        VHD_i = || a_i(image, text) - a_i(text) ||_2,   TA_i = || a_i(text) ||_2^2
        VHD_i := 0  where  VHD_i > mean + std  and  TA_i > mean + std   (negative outliers)
        selected_i = VHD_i > median(VHD)

    Means and standard deviations (unbiased) run over the heads of the layer, the median is the
    lower one. Public ports use the squared distance (`distance="l2sq"`), which can only change
    the outliers: the median test knows ranks alone.

    Args:
        with_image: head outputs at the last prompt row, `[batch, heads, head_dim]` float.
        text_only: the same from a pass without the image.
        distance: `l2` (paper) or its square.
        drop_outliers: zero the negative outliers (paper).
    """
    image, text = upcast(with_image), upcast(text_only)
    divergence = (image - text).square().sum(-1)
    if distance == "l2":
        divergence = divergence.sqrt()
    if drop_outliers:
        outlier = _is_high(divergence) & _is_high(text.square().sum(-1))
        divergence = divergence.masked_fill(outlier, 0)
    median = divergence.median(-1, keepdim=True).values
    return VisionAwareHeads(divergence=divergence, selected=divergence > median)


def _is_high(values: Tensor) -> Tensor:
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True)


def spin_gate(scores: Tensor, visual: Tensor, *, keep_ratio: float, suppress: float) -> Tensor:
    """Returns a gate that suppresses the heads least guided by the image (SPIN).

    Heads are ranked by `s_h = sum_{j in image} z_{h,j}`; the first `int(keep_ratio * heads)` get
    gate 1, the others `suppress` (arXiv 2505.16411). The paper speaks of attention to the image,
    the official code sums the raw scores, as here; pass post-softmax weights as `scores` for the
    wording of the paper. Image columns closed by a mask count nothing.

    Args:
        scores: pre-softmax scores of one query row, `[batch, heads, key]` float.
        visual: bool `[batch, key]`.
        keep_ratio: fraction of heads left alone, in [0, 1].
        suppress: factor of the others, in [0, 1]; 1 gives a gate of ones.

    Returns:
        Factors of the head outputs before the output projection, `[batch, heads]`, dtype of
        `scores`.
    """
    columns = visual[:, None, :] & is_open(scores)
    guided = masked_sum(upcast(scores), columns)
    return gate_heads(guided, keep_ratio=keep_ratio, suppress=suppress).to(scores.dtype)


def gate_heads(guided: Tensor, *, keep_ratio: float, suppress: float) -> Tensor:
    """Returns the gate of `spin_gate` from how much the image guides each head.

    Args:
        guided: `[..., heads]` float.
        keep_ratio: fraction of heads left alone, in [0, 1]: the first `int(keep_ratio * heads)`.
        suppress: factor of the others, in [0, 1].

    Returns:
        Factors, shape and dtype of `guided`.
    """
    kept = guided.topk(int(keep_ratio * guided.shape[-1]), dim=-1).indices
    return torch.full_like(guided, suppress).scatter_(-1, kept, 1.0)


def image_heads(weights: Tensor, visual: Tensor, *, share: float) -> Tensor:
    """Marks, for every row, the heads that attend to the image most.

    The first `ceil(share * heads)` by attention mass on the image; of equal heads the lower index
    wins.

    Args:
        weights: post-softmax attention, `[batch, heads, query, key]` float.
        visual: bool `[batch, key]`.
        share: fraction of heads to mark, in (0, 1]; 1 marks all.

    Returns:
        bool `[batch, heads, query]`.
    """
    mass = masked_sum(upcast(weights), visual[:, None, None, :])
    n_marked = math.ceil(share * mass.shape[1])
    order = mass.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, order[:, :n_marked], True)


def visual_sensitivity(weights: Tensor, visual: Tensor) -> Tensor:
    """Returns how much each head attends to the image, relative to the heads of its layer (PAINT).

    `m_h / mean_h(m_h)` with m_h the attention mass of head h on the image; 1 for every head of a
    row that sees no image. The mean over heads is 1, so a strength multiplied by it is dealt out
    anew and not raised. Our reading of the abstract of arXiv 2501.12206.

    Args:
        weights: post-softmax attention, `[batch, heads, query, key]` float.
        visual: bool `[batch, key]`.

    Returns:
        fp32 `[batch, heads, query]`, >= 0.
    """
    mass = masked_sum(upcast(weights), visual[:, None, None, :])
    return safe_divide(mass, mass.mean(1, keepdim=True), otherwise=1.0)


def text_visual_entropy(weights: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """Returns how widely each head spreads over the text, relative to the image (ONLY).

    `H(text) / H(image)` with H the entropy of the attention to these columns, taken as a
    distribution of its own (ICCV 2025). A head that attends to one image token alone, or to none,
    has an entropy of 0 there; the ratio then stays finite, and large.

    Args:
        weights: post-softmax rows, `[batch, heads, query, key]` float.
        text: bool `[batch, key]`.
        visual: bool `[batch, key]`.

    Returns:
        fp32 `[batch, heads, query]`.
    """
    attention = upcast(weights)
    spread = [_entropy(attention, columns[:, None, None, :]) for columns in (text, visual)]
    return spread[0] / spread[1].clamp(min=1e-6)


def _entropy(attention: Tensor, columns: Tensor) -> Tensor:
    mass = masked_sum(attention, columns, keepdim=True)
    inside = safe_divide(attention * columns, mass, otherwise=0.0)
    entropy: Tensor = torch.special.entr(inside).sum(-1)
    return entropy
