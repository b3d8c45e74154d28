"""Exact attention on a few rows, without repeated keys and without full attention matrices.

The rows a method steers are few, the keys are many. These helpers never repeat key-value heads
for grouped queries: the query heads that share a key-value head become rows of one product. All
of them compute and return fp32 (fp64 for fp64 inputs): the caller casts the final head output to
the model dtype once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_steer.errors import ConfigError
from vlm_steer.functional._numeric import upcast


class GroupedAttention(NamedTuple):
    """Attention of the same rows over disjoint groups of columns, one entry per group.

    Attributes:
        outputs: softmax over the group's columns alone times their values,
            `[batch, heads, rows, value_dim]`; 0 for an empty group.
        lse: log of the sum of the exponentiated scores of the group, `[batch, heads, rows]`;
            `-inf` for an empty group.
        mass: share of the group in the softmax over all groups, `[batch, heads, rows]` in [0, 1].
    """

    outputs: list[Tensor]
    lse: list[Tensor]
    mass: list[Tensor]


def row_scores(q_rows: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """Returns the scaled scores of a few query rows, for grouped queries too.

    Args:
        q_rows: `[batch, heads, rows, head_dim]` float.
        k: `[batch, kv_heads, keys, head_dim]`, where `kv_heads` divides `heads`; query head h
            reads key-value head `h // (heads / kv_heads)`, as in transformers.
        scale: factor of the dot products, usually `head_dim ** -0.5`.

    Returns:
        fp32 `[batch, heads, rows, keys]`, without any mask.

    Raises:
        ConfigError: `kv_heads` does not divide `heads`.
    """
    if _stays_narrow(k):
        query = _fold_heads(q_rows.to(k.dtype), kv_heads=k.shape[1])
        scores = (query @ k.transpose(-1, -2)).float() * scale
    else:
        query = _fold_heads(upcast(q_rows), kv_heads=k.shape[1])
        scores = (query * scale) @ upcast(k).transpose(-1, -2)
    return scores.reshape(*q_rows.shape[:-1], k.shape[-2])


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """Returns the head outputs that given attention weights produce, for grouped queries too.

    Args:
        weights: `[batch, heads, rows, keys]` float; need not sum to one.
        v: `[batch, kv_heads, keys, value_dim]`, where `kv_heads` divides `heads`.

    Returns:
        fp32 `[batch, heads, rows, value_dim]`.

    Raises:
        ConfigError: `kv_heads` does not divide `heads`.
    """
    if _stays_narrow(v):
        outputs = (_fold_heads(weights.to(v.dtype), kv_heads=v.shape[1]) @ v).float()
    else:
        outputs = _fold_heads(upcast(weights), kv_heads=v.shape[1]) @ upcast(v)
    return outputs.reshape(*weights.shape[:-1], v.shape[-1])


def _stays_narrow(cached: Tensor) -> bool:
    """Whether to multiply half-precision keys or values as they are.

    An accelerator accumulates such products in fp32 anyway, and a copy of the whole cache in
    fp32 would cost more memory traffic than the attention itself.
    """
    return cached.device.type != "cpu" and cached.dtype in (torch.bfloat16, torch.float16)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *groups: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> GroupedAttention:
    """Attends a few query rows to disjoint groups of columns, each with its own softmax.

    `merge_groups` puts the groups together again, with other masses if wanted. A column in no
    group is closed, so causality and padding are part of the groups.

    Args:
        q: `[batch, heads, rows, head_dim]` float.
        k: `[batch, kv_heads, keys, head_dim]`.
        v: `[batch, kv_heads, keys, value_dim]`.
        *groups: bool, each `[batch, keys]` or broadcastable to `[batch, heads, rows, keys]`;
            disjoint.
        scale: factor of the dot products.
        bias: added to the scaled scores, broadcastable to `[batch, heads, rows, keys]`.

    Returns:
        One output, log-sum-exp and mass per group, in the order given.

    Raises:
        ConfigError: no group was given, or `kv_heads` does not divide `heads`.
    """
    scores = row_scores(q, k, scale=scale)
    return grouped_values(scores if bias is None else scores + bias, v, *groups)


def grouped_values(scores: Tensor, v: Tensor, *groups: Tensor) -> GroupedAttention:
    """Does what `grouped_attention` does, from scores that are already there.

    Args:
        scores: pre-softmax scores, `[batch, heads, rows, keys]` float.
        v: `[batch, kv_heads, keys, value_dim]`.
        *groups: bool, each `[batch, keys]` or broadcastable to `scores`; disjoint.

    Returns:
        One output, log-sum-exp and mass per group, in the order given.

    Raises:
        ConfigError: no group was given, or `kv_heads` does not divide `heads`.
    """
    if not groups:
        raise ConfigError("no column group was given; pass at least one boolean mask")
    z = upcast(scores)
    batch, heads, rows, keys = z.shape
    columns = torch.stack([_as_columns(group).expand_as(z) for group in groups], dim=2)
    per_group = z.unsqueeze(2).masked_fill(~columns, -math.inf)
    lse = per_group.logsumexp(-1)
    weights = (per_group - _finite(lse).unsqueeze(-1)).exp()
    outputs = weighted_values(weights.reshape(batch, heads, -1, keys), v)
    outputs = outputs.reshape(batch, heads, len(groups), rows, v.shape[-1])
    mass = (lse - _finite(lse.logsumexp(2, keepdim=True))).exp()
    return GroupedAttention(
        outputs=list(outputs.unbind(2)), lse=list(lse.unbind(2)), mass=list(mass.unbind(2))
    )


def merge_groups(
    outputs: Sequence[Tensor],
    lse: Sequence[Tensor],
    mass_scale: Sequence[Tensor | float] | None = None,
    *,
    renormalize: bool = False,
) -> Tensor:
    """Merges attention over disjoint column groups into attention over all of them, exactly.

    With `m_g = exp(lse_g - logsumexp(lse))` the result is `sum_g c_g * m_g * o_g`. Multiplying
    every post-softmax weight of a group by c_g is the same thing, so the closed forms of VAR and
    ACT are three and two groups with factors from `sink_transfer_scales` and `transfer_scales`.
    Any kernel that returns a log-sum-exp can supply the groups.

    Args:
        outputs: per group, `[batch, heads, query, value_dim]` float. The values of a group whose
            log-sum-exp is `-inf` (an empty one) are not read.
        lse: per group, natural log, `[batch, heads, query]`.
        mass_scale: per group, factor c_g >= 0 of its mass, a number or broadcastable to the
            log-sum-exps; None means 1 everywhere.
        renormalize: divide by `sum_g c_g * m_g`. Needless where the factors preserve the mass.

    Returns:
        fp32 `[batch, heads, query, value_dim]`; 0 for a row without any open column.

    Raises:
        ConfigError: the numbers of outputs, log-sum-exps and factors differ.
    """
    lengths = {len(outputs), len(lse), len(outputs if mass_scale is None else mass_scale)}
    if len(lengths) != 1 or not outputs:
        raise ConfigError(
            f"{len(outputs)} outputs, {len(lse)} log-sum-exps and "
            f"{'no' if mass_scale is None else len(mass_scale)} factors were given; "
            "pass one of each per group"
        )
    logs = torch.stack([upcast(group) for group in lse])
    mass = (logs - _finite(logs.logsumexp(0))).exp()
    if mass_scale is not None:
        mass = torch.stack([m * c for m, c in zip(mass, mass_scale, strict=True)])
    if renormalize:
        total = mass.sum(0)
        mass = mass / torch.where(total > 0, total, 1.0)
    values = torch.stack([upcast(output) for output in outputs])
    values = values.masked_fill((logs == -math.inf).unsqueeze(-1), 0)
    return (mass.unsqueeze(-1) * values).sum(0)


def _fold_heads(per_head: Tensor, *, kv_heads: int) -> Tensor:
    """Makes the query heads that share a key-value head rows of one matrix."""
    batch, heads, rows, width = per_head.shape
    if heads % kv_heads:
        raise ConfigError(
            f"{heads} query heads cannot share {kv_heads} key-value heads; "
            "pass key-value heads whose number divides that of the query heads"
        )
    return per_head.reshape(batch, kv_heads, heads // kv_heads * rows, width)


def _as_columns(mask: Tensor) -> Tensor:
    return mask[:, None, None, :] if mask.dim() == 2 else mask


def _finite(lse: Tensor) -> Tensor:
    """Replaces the `-inf` of empty sets, so that subtracting it leaves `-inf` and not NaN."""
    return lse.masked_fill(lse == -math.inf, 0)
