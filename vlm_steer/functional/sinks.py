"""Attention sinks: finding them, and giving their attention mass away (VAR, ACT)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_steer.functional._numeric import column_groups, scale_groups, upcast

# The official VAR code adds this to every image column before forming the sink share.
_SHARE_SMOOTHING = 1e-6


class TransferScales(NamedTuple):
    """What a mass-preserving transfer multiplies its two column groups by.

    Attributes:
        source: factor of the columns that give, in (-inf, 1].
        target: factor of the columns that receive, >= 1.
    """

    source: Tensor
    target: Tensor


def sink_tokens(
    hidden_states: Tensor, *, sink_dims: Sequence[int], tau: float, eps: float = 1e-6
) -> Tensor:
    """Marks the tokens whose hidden state carries a massive activation (VAR, step 1).

    A token j is a sink when `max_{d in sink_dims} |x_j[d] / sqrt(mean(x_j^2) + eps)| > tau`
    (arXiv 2503.03321). The paper writes >= tau; the official code compares strictly,
    and so do we.

    Args:
        hidden_states: input of the decoder layer, `[batch, sequence, hidden]` float.
        sink_dims: hidden dimensions with massive activations of the language model, each in
            `[0, hidden)`.
        tau: threshold in units of the token's root mean square, > 0 (authors: 20).
        eps: added to the mean square, >= 0.

    Returns:
        bool `[batch, sequence]`. Padding positions are judged like any other: mask them.
    """
    x = upcast(hidden_states)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    dims = torch.as_tensor(list(sink_dims), device=x.device)
    return ((x.index_select(-1, dims) * scale).abs() > tau).any(-1)


def secondary_sinks(
    states: Tensor,
    first: Tensor,
    *,
    center: Tensor | None = None,
    received: Tensor | None = None,
    mask: Tensor | None = None,
    min_cosine: float = 0.8,
    min_received: float = 5.0,
) -> Tensor:
    """Marks the tokens that point where the first token points, without naming dimensions.

    Secondary sinks are born when the MLP of a middle layer writes a vector along the state of the
    primary sink, the first token, and die when a later one removes it. A token j is marked when::

        cos(x_j - c, x_first - c) > min_cosine   and   received_j > min_received / N

    with N the number of tokens. On the residual stream this says which tokens are sinks now, on
    the output of an MLP which become sinks there. The thresholds are ours, to be calibrated. The
    first token is marked as well.

    Args:
        states: residual stream, or output of an MLP, `[batch, sequence, hidden]` float.
        first: residual stream of the first token at this layer, `[hidden]` or `[batch, hidden]`.
        center: state of an ordinary token, `[hidden]` or `[batch, hidden]`, subtracted from both,
            since the states of many models share a large component; None subtracts nothing.
        received: mean attention received, `[batch, sequence]`, see `received_attention`; None
            leaves out the second condition.
        mask: bool `[batch, sequence]`, real tokens; the others are never marked.
        min_cosine: in [-1, 1].
        min_received: in units of an even share of the attention, >= 0.

    Returns:
        bool `[batch, sequence]`.
    """
    x, direction = upcast(states), upcast(first)
    if center is not None:
        x = x - _per_token(upcast(center))
        direction = direction - upcast(center)
    is_marked = torch.cosine_similarity(x, _per_token(direction), dim=-1) > min_cosine
    if mask is not None:
        is_marked = is_marked & mask
    if received is not None:
        n_tokens = states.shape[1] if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)
        is_marked = is_marked & (received > min_received / n_tokens)
    return is_marked


def _per_token(state: Tensor) -> Tensor:
    """`[hidden]` as it is, `[batch, hidden]` broadcast over tokens."""
    return state if state.dim() == 1 else state[:, None, :]


class SinkLifetimes(NamedTuple):
    """From which layer to which a token is a sink.

    Attributes:
        birth: int64 `[batch, sequence]`, first layer that marks the token; -1 where none does.
        death: int64 `[batch, sequence]`, last layer that marks it; -1 where none does.
    """

    birth: Tensor
    death: Tensor


def sink_lifetimes(marked: Tensor) -> SinkLifetimes:
    """Returns the first and the last layer at which tokens are marked as sinks.

    Args:
        marked: bool `[layers, batch, sequence]`, for example from `secondary_sinks`.
    """
    layers = torch.arange(len(marked), device=marked.device)[:, None, None]
    death = torch.where(marked, layers, -1).amax(0)
    birth = torch.where(marked, layers, len(marked)).amin(0)
    return SinkLifetimes(birth=torch.where(death < 0, -1, birth), death=death)


def transfer_scales(source_mass: Tensor, target_mass: Tensor, *, keep: float) -> TransferScales:
    """Returns the column factors that move `1 - keep` of one group's attention to another.

    The source columns keep the fraction `keep`; the target columns share what is freed in
    proportion to what they have, so each is multiplied by `1 + (1 - keep) * m_source / m_target`.
    Where the target has no mass, or one so small that the quotient could overflow, nothing moves:
    both factors are 1. These are the factors that `fast.merge_groups` takes as `mass_scale`.

    Args:
        source_mass: attention mass of the giving columns, any shape, >= 0.
        target_mass: attention mass of the receiving columns, same shape, >= 0.
        keep: fraction that the source retains, in [0, 1]; 1 gives factors of exactly 1.
    """
    cannot = target_mass < torch.finfo(target_mass.dtype).tiny
    ones = torch.ones_like(target_mass)
    # Filled before dividing: gradients of a quotient by 0 would be NaN wherever they are not used.
    gain = torch.addcdiv(ones, source_mass, target_mass.masked_fill(cannot, 1), value=1 - keep)
    return TransferScales(
        source=torch.where(cannot, ones, keep), target=torch.where(cannot, ones, gain)
    )


def sink_transfer_scales(
    sink_mass: Tensor,
    image_sink_mass: Tensor,
    image_mass: Tensor,
    *,
    n_image: Tensor,
    eligible: Tensor,
    keep: float,
    max_sink_ratio: float,
    min_image_mass: float,
) -> TransferScales:
    """Selects (head, row) pairs from three masses and returns their VAR factors (steps 2 and 3).

    All that VAR needs to know of a row is how much attention its sinks, its image sinks and its
    image columns receive, so a row never has to be materialised.

    Args:
        sink_mass: mass on all sinks, text and image, `[batch, heads, query]`.
        image_sink_mass: mass on the sinks inside the image, same shape.
        image_mass: mass on all image columns, same shape.
        n_image: number of image columns, int, broadcastable to the masses.
        eligible: bool broadcastable to the masses: rows that may be steered, False for every row
            of a sequence whose image holds no sink.
        keep: fraction of their mass that sinks retain, in [0, 1].
        max_sink_ratio: a head is image-centric when its sinks hold at most this share of the
            image mass, in [0, 1].
        min_image_mass: and when the image holds at least this mass, in [0, 1].

    Returns:
        Factors `[batch, heads, query]` of the sinks and of the image non-sinks; 1 where the pair
        is not selected.
    """
    most = max_sink_ratio * (image_mass + _SHARE_SMOOTHING * n_image)
    selected = eligible & (image_sink_mass <= most) & (image_mass >= min_image_mass)
    other_mass = torch.where(selected, image_mass - image_sink_mass, 0.0)
    return transfer_scales(sink_mass, other_mass, keep=keep)


def redistribute_sinks(
    weights: Tensor,
    sinks: Tensor,
    visual: Tensor,
    rows: Tensor,
    *,
    keep: float,
    max_sink_ratio: float,
    min_image_mass: float,
) -> Tensor:
    """Moves attention from the sinks to the image in image-centric heads (VAR, steps 2 and 3).

    On each selected (head, row), with `m_s` the mass of all sinks and `m_v` that of the image
    columns that are not sinks (arXiv 2503.03321)::

        A'_j = keep * A_j                            j a sink (text or image)
        A'_j = A_j * (1 + (1 - keep) * m_s / m_v)    j an image column, no sink
        A'_j = A_j                                   otherwise

    Row sums do not change. A row that attends to no sink inside the image is left alone.
    The paper states the fraction moved, `1 - keep`, and a lower bound on the non-sink share,
    `1 - max_sink_ratio`; the official code states what is kept and an upper bound, as here. A
    row whose image mass lies on sinks alone has nowhere to move it and is left alone, where the
    official code divides by zero.

    Args:
        weights: post-softmax attention, `[batch, heads, query, key]` float.
        sinks: bool `[batch, key]`, or `[batch, query, key]` where they differ from row to row.
        visual: bool `[batch, key]`.
        rows: bool `[batch, query]`, query rows that may be steered (text after the image).
        keep: fraction of their attention that sinks retain, in [0, 1]; 1 is identity, bitwise.
        max_sink_ratio: largest share of the image mass on sinks for a head to be selected, in
            [0, 1].
        min_image_mass: smallest image mass for a head to be selected, in [0, 1].

    Returns:
        New weights, shape and dtype of `weights`.
    """
    a = upcast(weights)
    sink = sinks[:, None] if sinks.dim() == 2 else sinks
    image = visual[:, None]
    groups = column_groups(sink, sink & image, image > sink, dtype=a.dtype)
    differs_by_row = sink.shape[1] > 1

    # Heads share their columns, so that one product serves all of them: a row of all heads, where
    # the columns of rows differ, or else all rows of all heads.
    def fold(per_head: Tensor) -> Tensor:
        return per_head.transpose(1, 2) if differs_by_row else per_head.flatten(1, 2)[:, None]

    def unfold(folded: Tensor) -> Tensor:
        return folded.transpose(1, 2) if differs_by_row else folded.reshape(*a.shape[:3], -1)

    sink_mass, image_sink_mass, other_mass = unfold(fold(a) @ groups).unbind(-1)
    scales = sink_transfer_scales(
        sink_mass,
        image_sink_mass,
        image_sink_mass + other_mass,
        n_image=visual.sum(-1)[:, None, None],
        eligible=rows[:, None, :] & (image_sink_mass.sum(1, keepdim=True) > 0),
        keep=keep,
        max_sink_ratio=max_sink_ratio,
        min_image_mass=min_image_mass,
    )
    factors = fold(torch.stack(scales, dim=-1))
    return unfold(scale_groups(fold(a), groups[..., ::2], factors)).to(weights.dtype)


def received_attention(weights: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Returns the attention each token receives on average from the rows that can see it.

    `sum_q A_qk / #{q >= k}`, the statistic behind ACT (arXiv 2406.15765) and LapEigvals
    (arXiv 2502.17598).

    Args:
        weights: square causal post-softmax attention, `[..., sequence, sequence]` float.
        mask: bool `[batch, sequence]`, real tokens; then `weights` is
            `[batch, heads, sequence, sequence]`, padding rows do not count and padding columns
            receive 0.

    Returns:
        fp32 `[..., sequence]` in [0, 1].
    """
    a = upcast(weights)
    if mask is None:
        size = weights.shape[-1]
        return a.sum(-2) / torch.arange(size, 0, -1, device=a.device)
    n_rows = mask.flip(-1).cumsum(-1).flip(-1).clamp(min=1)
    received = a.masked_fill(~mask[:, None, :, None], 0).sum(-2) / n_rows[:, None, :]
    return received.masked_fill(~mask[:, None, :], 0)


def attention_sinks(received: Tensor, *, theta: float | Tensor) -> Tensor:
    """Marks the tokens that receive more than `theta`, except the first such token (ACT).

    The exception is the beginning-of-sequence token, a sink that the model needs.

    Args:
        received: mean attention received, `[..., sequence]` float, see `received_attention`.
        theta: threshold in [0, 1] (official code: 0.1; paper: 5 / sequence length), a number or
            broadcastable to `received`.

    Returns:
        bool, shape of `received`.
    """
    over = received > theta
    return over & (over.cumsum(-1) > 1)


def act_calibrate(
    weights: Tensor,
    *,
    heads: Sequence[int],
    beta: float,
    theta: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Takes attention from the sinks in mid-sequence and spreads it over the other tokens (ACT).

    In each listed head, with S the sinks of `attention_sinks` and m_S, m_N the mass of a row on
    them and on all other columns (arXiv 2406.15765)::

        A'_j = beta * A_j                          j in S
        A'_j = A_j * (1 + (1 - beta) * m_S / m_N)  otherwise

    Row sums do not change; the first row, which sees itself alone, stays as it is. The official
    code applies this to single decoded rows too and breaks their sums; square prefill weights
    are required here.

    Args:
        weights: square causal post-softmax attention, `[batch, heads, sequence, sequence]` float.
        heads: indices of the heads to calibrate, each in `[0, heads)`; the others are copied.
        beta: fraction of their attention that sinks retain, in [0, 1]; 1 is identity, bitwise.
        theta: mean received attention above which a token is a sink, in [0, 1].
        mask: bool `[batch, sequence]`, real tokens; rows of padding are left alone.

    Returns:
        New weights, shape and dtype of `weights`.
    """
    index = torch.as_tensor(list(heads), dtype=torch.long, device=weights.device)
    a = upcast(weights.index_select(1, index))
    sinks = attention_sinks(received_attention(a, mask=mask), theta=theta)
    spread = spread_sinks(a, sinks, ~sinks, keep=beta)
    if mask is not None:
        spread = torch.where(mask[:, None, :, None], spread, a)
    return weights.index_copy(1, index, spread.to(weights.dtype))


def spread_sinks(weights: Tensor, sinks: Tensor, targets: Tensor, *, keep: float) -> Tensor:
    """Moves attention from sinks to other columns, in proportion to what these have (ACT, step 2).

    With m_S and m_T the mass of a row on the sinks S and on the targets T (arXiv 2406.15765)::

        A'_j = keep * A_j                          j in S
        A'_j = A_j * (1 + (1 - keep) * m_S / m_T)  j in T
        A'_j = A_j                                 otherwise

    Row sums do not change. A row that sees no target stays as it is.

    Args:
        weights: post-softmax attention of any rows, `[batch, heads, query, key]` float.
        sinks: bool, broadcastable to `[batch, heads, key]`.
        targets: bool, same; disjoint from `sinks`. The paper: every other column.
        keep: fraction of their attention that sinks retain, in [0, 1]; 1 is identity, bitwise.

    Returns:
        New weights, shape and dtype of `weights`.
    """
    a = upcast(weights)
    groups = column_groups(sinks, targets, dtype=a.dtype)
    scales = transfer_scales(*(a @ groups).unbind(-1), keep=keep)
    return scale_groups(a, groups, torch.stack(scales, dim=-1)).to(weights.dtype)
