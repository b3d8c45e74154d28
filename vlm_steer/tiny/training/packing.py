"""Several conversations about one image in one row, none of which sees the others.

Every row starts with a prefix (the image), followed by independent segments. A block-causal mask
lets a token see the prefix and its own segment, and positions restart after the prefix, so that
each segment is computed as if it stood alone. In an ordinary multi-turn row later answers would
copy the caption instead of looking.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Batch", "Segment", "attention_bias", "pack"]

_PADDING = -1


class Segment(NamedTuple):
    """Token ids of one question and answer.

    Attributes:
        question: ids that are given.
        answer: ids that are learnt, the end of the text among them.
        weights: weight of each answer token in the loss.
    """

    question: list[int]
    answer: list[int]
    weights: list[float]


class Batch(NamedTuple):
    """Packed rows.

    Attributes:
        input_ids: ``[rows, length]`` long.
        segments: ``[rows, length]`` long; 0 is the prefix, -1 padding.
        positions: ``[rows, length]`` long.
        targets: ``[rows, length]`` long: the id that follows each token in its segment.
        weights: ``[rows, length]`` float: weight of that prediction, 0 where nothing is learnt.
    """

    input_ids: Tensor
    segments: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor


def pack(prefix: Sequence[int], rows: Sequence[Sequence[Segment]], padding_id: int) -> Batch:
    """Put a prefix and its segments into each row, padded on the right to the longest."""
    lengths = [len(prefix) + sum(len(s.question) + len(s.answer) for s in row) for row in rows]
    shape = (len(rows), max(lengths))
    input_ids = torch.full(shape, padding_id)
    segments = torch.full(shape, _PADDING)
    positions, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    weights = torch.zeros(shape)
    start = len(prefix)
    input_ids[:, :start] = torch.tensor(prefix)
    segments[:, :start] = 0
    positions[:, :start] = torch.arange(start)
    for row, members in enumerate(rows):
        left = start
        for number, segment in enumerate(members, start=1):
            ids = torch.tensor(segment.question + segment.answer)
            right = left + len(ids)
            answer = left + len(segment.question)
            input_ids[row, left:right] = ids
            segments[row, left:right] = number
            positions[row, left:right] = torch.arange(start, start + len(ids))
            targets[row, left : right - 1] = ids[1:]
            weights[row, answer - 1 : right - 1] = torch.tensor(segment.weights)
            left = right
    return Batch(input_ids, segments, positions, targets, weights)


def attention_bias(segments: Tensor) -> Tensor:
    """Return the additive mask ``[rows, 1, length, length]`` of packed rows, 0 or the least float.

    A padding token sees itself and the prefix, so that no row of the softmax is empty.
    """
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    visible = causal & ((query == key) | (key == 0))
    bias = torch.zeros(visible.shape, device=segments.device)
    return bias.masked_fill(~visible, torch.finfo(bias.dtype).min)[:, None]
