"""Choosing image tokens by the attention they receive (PAINT, AvisC, SID, CMAI)."""

from typing import NamedTuple

import torch
from torch import Tensor

from vlm_steer.functional._numeric import masked_mean, masked_sum, safe_divide, upcast


class InformedTokens(NamedTuple):
    """Image tokens that the vision encoder itself singles out; the two sets are disjoint.

    Attributes:
        local: bool `[batch, tokens]`, tokens with detail.
        summary: bool `[batch, tokens]`, tokens that gather global information.
    """

    local: Tensor
    summary: Tensor


def paint_tokens(
    cls_attention_first: Tensor, cls_attention_penultimate: Tensor, *, local_ratio: float
) -> InformedTokens:
    """Picks local and summary tokens from the vision encoder's attention (PAINT).

    With u, w the sums over heads of the attention of the class token to the patches in the first
    and the penultimate vision layer (official code of arXiv 2501.12206): summary tokens are the
    upper Tukey outliers `w > Q3 + 1.5 * (Q3 - Q1)`; local tokens are the `int(local_ratio * N)`
    largest by u that are no summary tokens.

    Args:
        cls_attention_first: class-to-patch attention of the first vision layer,
            `[batch, heads, patches]` float.
        cls_attention_penultimate: the same of the last vision layer but one.
        local_ratio: fraction of patches taken as local, in [0, 1].
    """
    first = upcast(cls_attention_first).sum(1)
    penultimate = upcast(cls_attention_penultimate).sum(1)
    low = penultimate.quantile(0.25, dim=-1, keepdim=True)
    high = penultimate.quantile(0.75, dim=-1, keepdim=True)
    summary = penultimate > high + 1.5 * (high - low)
    top = first.topk(int(local_ratio * first.shape[-1]), dim=-1).indices
    local = torch.zeros_like(summary).scatter(-1, top, True)
    return InformedTokens(local=local & ~summary, summary=summary)


def token_relevance(states: Tensor, gradient: Tensor) -> Tensor:
    """How much each token speaks for a score (Grad-CAM without averaging over tokens).

    `relu(sum_d gradient_d * state_d)`, the product of activation and gradient summed over the
    features of a token, as AGLA (arXiv 2406.12718) takes it of attention maps.

    Args:
        states: activations, `[..., tokens, hidden]` float.
        gradient: of the score, in the same shape.

    Returns:
        fp32 `[..., tokens]`, >= 0.
    """
    return (upcast(states) * upcast(gradient)).sum(-1).relu()


def blind_tokens(weights: Tensor, visual: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Marks the image tokens that draw attention whatever the question (AvisC).

    Layers are ranked by their share of the attention to the image; the fewest whose shares reach
    `gamma` are averaged, over heads too; a token is blind when it receives at least
    `mean + lam * std` (unbiased, over image tokens) (arXiv 2405.17820). The official code keeps
    one layer more when the shares hit `gamma` exactly, and so do we.

    Args:
        weights: post-softmax rows of the last prompt token, `[batch, layers, heads, key]` float.
        visual: bool `[batch, key]`, with two or more True per row.
        gamma: share of the image attention that the chosen layers hold, in (0, 1].
        lam: standard deviations above the mean, real.

    Returns:
        bool `[batch, key]`, True at blind image tokens.
    """
    per_layer = upcast(weights).mean(2)
    mass = masked_sum(per_layer, visual[:, None, :])
    share = safe_divide(mass, mass.sum(-1, keepdim=True), otherwise=0.0)
    ordered, order = share.sort(dim=-1, descending=True)
    n_layers = (ordered.cumsum(-1) < gamma).sum(-1, keepdim=True) + 1
    is_chosen = torch.arange(share.shape[-1], device=share.device) < n_layers
    chosen = torch.zeros_like(is_chosen).scatter(-1, order, is_chosen)
    received = masked_mean(per_layer.transpose(1, 2), chosen[:, None, :])
    n_image = visual.sum(-1, keepdim=True)
    mean = masked_sum(received, visual, keepdim=True) / n_image.clamp(min=1)
    variance = masked_sum((received - mean).square(), visual, keepdim=True)
    std = (variance / (n_image - 1).clamp(min=1)).sqrt()
    return visual & (received >= mean + lam * std)


def least_attended_tokens(
    weights: Tensor, visual: Tensor, *, count: int | Tensor, largest: bool = False
) -> Tensor:
    """Marks the image tokens that one query row attends least, on average over heads (SID).

    The negative stream of arXiv 2408.02032 sees these alone from an early layer on.

    Args:
        weights: post-softmax row of the last token, `[batch, heads, key]` float.
        visual: bool `[batch, key]`.
        count: how many to keep, >= 0, or one number per row, `[batch]`; a row with fewer image
            tokens keeps them all.
        largest: mark those it attends most instead.

    Returns:
        bool `[batch, key]`, True at the chosen image tokens.
    """
    attention = upcast(weights).mean(1)
    attention = (-attention if largest else attention).masked_fill(~visual, torch.inf)
    rank = attention.argsort(dim=-1, stable=True).argsort(dim=-1)
    limit = count[:, None] if isinstance(count, Tensor) else count
    return (rank < limit) & visual


def focus_scores(text_to_text: Tensor, text_to_image: Tensor) -> Tensor:
    """Returns how much each text token looks at the image through the text it reads (CMAI).

    `F_ij = sum_k A_ik * A_kj` with k over text tokens and j over image tokens (arXiv 2411.15453).

    Args:
        text_to_text: post-softmax attention of text rows to text tokens, `[..., query, text]`
            float.
        text_to_image: that of the text tokens to image columns, `[..., text, key]` float.

    Returns:
        fp32 `[..., query, key]`, >= 0.
    """
    return upcast(text_to_text) @ upcast(text_to_image)


def low_focus(focus: Tensor, seen: Tensor, *, share: float) -> Tensor:
    """Marks, row by row, the share of the columns with the lowest focus (CMAI).

    Args:
        focus: `[..., key]` float, see `focus_scores`.
        seen: bool `[..., key]`, image columns that the row sees; the others are never marked.
        share: in [0, 1]; `int(share * seen)` columns of a row are marked, of equals the first.

    Returns:
        bool `[..., key]`.
    """
    order = upcast(focus).masked_fill(~seen, torch.inf).argsort(dim=-1, stable=True)
    rank = torch.zeros_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    count = (share * seen.sum(-1, keepdim=True)).floor()
    return seen & (rank < count)
