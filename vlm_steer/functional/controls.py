"""Changes that mean nothing: of a given size in the wrong places, or the same for every image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_steer.functional._numeric import safe_divide, upcast

__all__ = ["move_to_columns", "shift_odds", "shuffle_columns"]


def shuffle_columns(values: Tensor, columns: Tensor, seats: Tensor) -> Tensor:
    """Deals the values of some columns out to the same columns in another order.

    Args:
        values: `[batch, ..., key]` of any type.
        columns: bool `[batch, key]`; the columns that take part. The others keep their values.
        seats: `[batch, key]` float, the order: the first column gets the value of the column with
            the smallest seat.

    Returns:
        As `values`; in each row the values of the columns are permuted.
    """
    last = torch.finfo(seats.dtype).max
    position = torch.arange(columns.shape[1], device=columns.device).expand(columns.shape)
    taken = seats.masked_fill(~columns, last).argsort(dim=1, stable=True)
    filled = (~columns).int().argsort(dim=1, stable=True)
    source = position.scatter(1, filled, taken)
    source = torch.where(columns, source, position)
    shape = (columns.shape[0], *(1,) * (values.ndim - 2), columns.shape[1])
    return values.gather(-1, source.reshape(shape).expand_as(values))


def move_to_columns(weights: Tensor, columns: Tensor, mass: Tensor) -> Tensor:
    """Moves attention mass to some columns, in proportion to what they have.

    Mixes each row with itself restricted to the columns, so far that `mass` changes place::

        A' = (1 - c) A + c A[columns] / sum(A[columns]),   c = mass / (1 - sum(A[columns]))

    Args:
        weights: post-softmax attention, `[batch, heads, query, key]` float.
        columns: bool `[batch, key]`.
        mass: how much to move, broadcastable to `[batch, heads, query, 1]`, in [0, 1]; cut to
            what the other columns hold.

    Returns:
        As `weights`, rows summing to what they did; a row with nothing on the columns is left
        alone.
    """
    a = upcast(weights)
    kept = a * columns[:, None, None, :]
    held = kept.sum(dim=-1, keepdim=True)
    share = safe_divide(mass, a.sum(dim=-1, keepdim=True) - held, otherwise=0.0).clamp(0, 1)
    share = torch.where(held > 0, share, 0.0)
    target = safe_divide(kept, held, otherwise=0.0) * a.sum(dim=-1, keepdim=True)
    return (a + share * (target - a)).to(weights.dtype)


def shift_odds(
    logits: Tensor, raised: Sequence[int], lowered: Sequence[int], *, bias: float
) -> Tensor:
    """Moves the log-odds between two groups of tokens by a constant.

    Half of the bias is added to the logits of one group and half taken off those of the other.

    Args:
        logits: `[..., vocabulary]` float.
        raised: ids of the tokens that gain.
        lowered: ids of those that lose; no id is in both.
        bias: by how much `log p(raised) - log p(lowered)` grows; 0 is identity, bitwise.

    Returns:
        Logits, shape and dtype of `logits`.
    """
    if bias == 0:
        return logits
    shift = torch.zeros(logits.shape[-1], device=logits.device)
    shift[list(raised)] = bias / 2
    shift[list(lowered)] = -bias / 2
    return (upcast(logits) + shift).to(logits.dtype)
