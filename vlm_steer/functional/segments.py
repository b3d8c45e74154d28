"""Segments of a prompt that no order should tell apart, such as images or options (PINE)."""

import torch
from torch import Tensor

from vlm_steer.functional._numeric import upcast


def image_segments(is_image: Tensor, mask: Tensor, *, tail: int | None = None) -> Tensor:
    """Returns one segment per run of image tokens, and the text between two of them (PINE).

    Between images i and i + 1, the first `tail` tokens belong to i and the others to i + 1. The
    first and the last segment get as many tokens before and behind them as those between the first
    two images, so that segments around equal images are equal. The last token is in no segment.

    Args:
        is_image: bool `[batch, sequence]`, image tokens.
        mask: bool `[batch, sequence]`, real tokens.
        tail: tokens behind an image that belong to it; None for all up to the next image.

    Returns:
        int64 `[batch, sequence]`, number of a token's segment in its row, -1 outside of all. Rows
        with fewer than two runs have no segments.
    """
    size = is_image.shape[-1]
    at = torch.arange(size, device=is_image.device)
    before = torch.cat([torch.zeros_like(is_image[:, :1]), is_image[:, :-1]], dim=-1)
    run = (is_image & ~before).long().cumsum(-1)
    n_runs = run[:, -1:]
    since = at - torch.where(is_image, at, -2 * size).cummax(-1).values
    until = torch.where(is_image, at, 2 * size).flip(-1).cummin(-1).values.flip(-1) - at
    gap = (~is_image & (run == 1)).sum(-1, keepdim=True)
    behind = gap if tail is None else torch.full_like(gap, tail).minimum(gap)
    in_front = gap - behind
    inner = behind if tail is not None else torch.full_like(gap, size)
    segment = torch.where(is_image | (since <= inner), run - 1, run)
    outside = ((run == 0) & (until > in_front)) | (~is_image & (run == n_runs) & (since > behind))
    segment = segment.masked_fill(outside | ~mask | (n_runs < 2), -1)
    return torch.where(at == size - 1, -1, segment)


def segment_lengths(segments: Tensor, n_segments: int) -> Tensor:
    """Returns how many tokens each segment has, int64 `[batch, n_segments]`.

    Args:
        segments: int64 `[batch, sequence]`, -1 outside of all.
        n_segments: number of segments of the row that has most.
    """
    return _one_hot(segments, n_segments).sum(1)


def aligned_positions(positions: Tensor, segments: Tensor, n_segments: int) -> Tensor:
    """Returns positions in which all segments end where the last one does (PINE).

    Args:
        positions: int64 `[batch, sequence]`, counting up.
        segments: int64 `[batch, sequence]`, -1 outside of all; they follow each other without gap.
        n_segments: number of segments of the row that has most.

    Returns:
        int64 `[batch, sequence]`; unchanged outside of all segments.
    """
    member = _one_hot(segments, n_segments)
    last = (positions[:, :, None] * member).amax(1)
    end = last.amax(-1, keepdim=True)
    return positions + (member * (end - last)[:, None]).sum(-1)


def segment_importance(
    scores: Tensor, segments: Tensor, n_segments: int, *, own: Tensor | None = None
) -> Tensor:
    """Returns how much each row looks at each segment, wherever the segment stands (PINE).

    Args:
        scores: `[batch, heads, rows, keys]`, pre-softmax scores without positions.
        segments: int64 `[batch, keys]`, segment of each key column, -1 outside of all.
        n_segments: number of segments of the row that has most.
        own: int64 `[batch, rows]`, a segment that a row leaves out; None or -1 for none.

    Returns:
        fp32 `[batch, heads, rows, n_segments]`: mean attention weight per token of the segment in
        a softmax over segments alone; 0 for a segment left out and where there is none.
    """
    closed = (segments < 0)[:, None, :]
    if own is not None:
        closed = closed | (own[:, :, None] == segments[:, None, :])
    closed = closed[:, None]
    weights = upcast(scores).masked_fill(closed, torch.finfo(torch.float32).min).softmax(-1)
    weights = weights.masked_fill(closed, 0)
    member = _one_hot(segments, n_segments).to(weights.dtype)
    return weights @ (member / member.sum(1, keepdim=True).clamp(min=1))[:, None]


def segment_shifts(importance: Tensor, lengths: Tensor) -> Tensor:
    """Returns by how much each segment moves away so that the most important is nearest (PINE).

    Args:
        importance: `[batch, heads, rows, n_segments]`; of equal ones the first is nearer.
        lengths: int64 `[batch, n_segments]`.

    Returns:
        int64 `[batch, heads, rows, n_segments]`, total length of the segments ranked before.
    """
    order = importance.argsort(dim=-1, descending=True, stable=True)
    ranked = lengths[:, None, None, :].expand_as(order).gather(-1, order)
    return torch.zeros_like(order).scatter(-1, order, ranked.cumsum(-1) - ranked)


def see_other_segments(allowed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns a mask whose rows see every segment but the tokens behind them in their own (PINE).

    Args:
        allowed: bool, broadcastable to `[batch, rows, keys]`.
        rows: int64 `[batch, rows]`, segments of the rows, -1 outside of all.
        columns: int64 `[batch, keys]`, the same of the key columns.

    Returns:
        bool `[batch, rows, keys]`, True where the row may attend the column.
    """
    rows, columns = rows[:, :, None], columns[:, None, :]
    return allowed | ((rows >= 0) & (columns >= 0) & (rows != columns))


def _one_hot(segments: Tensor, n_segments: int) -> Tensor:
    """Returns int64 `[batch, sequence, n_segments]`; all 0 outside of all segments."""
    return (segments[:, :, None] == torch.arange(n_segments, device=segments.device)).long()
