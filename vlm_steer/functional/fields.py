"""Looking closer at a part of an image, and contrasting what several fields of view say (HALC)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlm_steer.functional._numeric import divergence_of, masked_mean, safe_divide, upcast

_SMALLEST = 0.8  # share by which the first field may shrink


class AttendedBox(NamedTuple):
    """Where attention lies.

    Attributes:
        image: int64 `[batch]`, number of the image that gets most of it.
        box: fp32 `[batch, 4]`, left, top, right and bottom in that image, in [0, 1].
    """

    image: Tensor
    box: Tensor


def attended_box(
    attention: Tensor, image: Tensor, across: Tensor, down: Tensor, cell: Tensor
) -> AttendedBox:
    """Finds the box that holds the attention to an image, by its mean and spread.

    In the image with the most attention, what exceeds its mean is taken for weight w; the box
    reaches sqrt(3) standard deviations of w from its centre to each side, so that a box which is
    attended evenly comes out as itself, and at least half a cell.

    Args:
        attention: `[batch, tokens]` float, >= 0.
        image: int64 `[batch, tokens]`, number of the image a token belongs to; -1 for text.
        across: `[batch, tokens]` float, centre of the token from left to right, in [0, 1].
        down: the same from top to bottom.
        cell: `[batch, tokens, 2]` float, width and height of the token.
    """
    values = upcast(attention).masked_fill(image < 0, 0)
    known = image.clamp(min=0)
    totals = values.new_zeros(len(values), int(known.max()) + 1).scatter_add(1, known, values)
    best = totals.argmax(-1)
    here = image == best[:, None]
    excess = (values - masked_mean(values, here)[:, None]).clamp(min=0) * here
    weight = safe_divide(excess, excess.sum(-1, keepdim=True), otherwise=0.0)
    # Attention without any peak is everywhere.
    is_flat = (excess.sum(-1, keepdim=True) == 0) & here
    weight = weight + is_flat / here.sum(-1, keepdim=True).clamp(min=1)
    places = torch.stack([across, down], dim=-1).float()
    centre = (weight[..., None] * places).sum(1)
    spread = (weight[..., None] * (places - centre[:, None]).square()).sum(1)
    least = (cell * here[..., None]).amax(1) / 2
    reach = torch.maximum((3 * spread).sqrt(), least)
    return AttendedBox(best, torch.cat([centre - reach, centre + reach], dim=-1).clamp(0, 1))


def fields_of_view(boxes: Tensor, *, count: int, growth: float) -> Tensor:
    """Makes smaller and larger fields of view from a box (HALC).

    The first is smaller by `growth` times its width and height (0.8 at most), the second is the
    box, and every other is larger than the one before by that share, cut at the borders of the
    image (official code of arXiv 2403.00425).

    Args:
        boxes: `[batch, 4]` float, left, top, right and bottom in [0, 1].
        count: fields, >= 2.
        growth: share of the side by which fields grow, > 0 (authors: 0.6).

    Returns:
        `[batch, count, 4]` in [0, 1].
    """
    fields = [_grown(boxes, -min(growth, _SMALLEST)), boxes]
    for _ in range(count - 2):
        fields.append(_grown(fields[-1], growth))
    return torch.stack(fields[:count], dim=1)


def _grown(boxes: Tensor, share: float) -> Tensor:
    more = (boxes[:, 2:] - boxes[:, :2]) * share / 2
    return torch.cat([boxes[:, :2] - more, boxes[:, 2:] + more], dim=1).clamp(0, 1)


def focal_contrasts(
    logits: Tensor,
    *,
    candidates: int,
    weight: float,
    divergence: Literal["kl_m", "jsd"] = "jsd",
) -> Tensor:
    """Contrasts the pairs of fields of view that differ most, both ways (HALC).

    With f_a, f_b the logits of the fields a < b of the pairs with the largest divergence:
    `f_b - weight * f_a` and `f_a - weight * f_b`, pair after pair (arXiv 2403.00425). The paper's
    Jensen-Shannon divergence is `jsd`; the official code swaps the arguments (`kl_m`).

    Args:
        logits: of the same token under each field, `[batch, fields, vocabulary]` float.
        candidates: contrasts to return, even, at most twice the number of pairs.
        weight: of the other field, >= 0 (authors: 0.05).
        divergence: what "differ most" means.

    Returns:
        fp32 `[batch, candidates, vocabulary]`. A token that the other field excludes (`-inf`) keeps
        the logit of the first.
    """
    values = upcast(logits)
    first, second = torch.triu_indices(values.shape[1], values.shape[1], 1, device=values.device)
    log_p = values.log_softmax(-1)
    # One pair at a time: all of them at once would hold the vocabulary six times.
    distance = torch.stack(
        [
            divergence_of(log_p[:, a], log_p[:, b], divergence)
            for a, b in zip(first.tolist(), second.tolist(), strict=True)
        ],
        dim=1,
    )
    best = distance.topk(candidates // 2, dim=-1).indices
    ways = torch.stack([second[best], first[best]], dim=-1).flatten(1)
    others = torch.stack([first[best], second[best]], dim=-1).flatten(1)
    rows = torch.arange(len(values), device=values.device)[:, None]
    other = values[rows, others]
    return values[rows, ways] - weight * other.masked_fill(other == -torch.inf, 0)
