"""The fast forms against dense attention, in fp64."""

import pytest
import torch
from functional_examples import FRACTIONS, SEEDS, Attention, attentions, few, generator, random_mask
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm_steer.errors import ConfigError
from vlm_steer.functional import (
    act_calibrate,
    attention_sinks,
    boost_scores,
    gift_fuse,
    grouped_attention,
    grouped_values,
    merge_groups,
    received_attention,
    redistribute_sinks,
    row_scores,
    scale_scores,
    sink_transfer_scales,
    spin_gate,
    transfer_scales,
    weighted_values,
)

EXACT = {"rtol": 0.0, "atol": 1e-12}
BATCH, KV_HEADS, SHARED, ROWS, KEYS, WIDTH = 2, 2, 2, 3, 14, 5
SCALE = WIDTH**-0.5


def vectors(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def qkv(seed: int, *, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    return (
        2 * vectors(seed, BATCH, KV_HEADS * SHARED, rows, WIDTH),
        2 * vectors(seed + 1, BATCH, KV_HEADS, KEYS, WIDTH),
        vectors(seed + 2, BATCH, KV_HEADS, KEYS, WIDTH + 1),
    )


def repeated(per_kv_head: Tensor) -> Tensor:
    return per_kv_head.repeat_interleave(SHARED, dim=1)


def dense(q: Tensor, k: Tensor) -> Tensor:
    return q @ repeated(k).transpose(-1, -2) * SCALE


def partition(seed: int, *shape: int, groups: int) -> list[Tensor]:
    label = torch.randint(0, groups, shape, generator=generator(seed))
    return [label == group for group in range(groups)]


@few
@given(SEEDS)
def test_row_scores_equal_those_of_repeated_keys(seed: int) -> None:
    q, k, _ = qkv(seed)
    torch.testing.assert_close(row_scores(q, k, scale=SCALE), dense(q, k), **EXACT)


@few
@given(SEEDS)
def test_weighted_values_equal_those_of_repeated_values(seed: int) -> None:
    q, k, v = qkv(seed)
    weights = dense(q, k).softmax(-1)
    torch.testing.assert_close(weighted_values(weights, v), weights @ repeated(v), **EXACT)


def test_row_scores_of_half_precision_are_computed_in_fp32() -> None:
    q, k, v = (tensor.bfloat16() for tensor in qkv(0))
    scores = row_scores(q, k, scale=SCALE)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), dense(q.double(), k.double()), rtol=0, atol=1e-5)
    assert weighted_values(scores.softmax(-1).bfloat16(), v).dtype == torch.float32


def test_heads_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 query heads cannot share 2"):
        row_scores(torch.zeros(1, 3, 1, 4), torch.zeros(1, 2, 5, 4), scale=1.0)


@few
@given(SEEDS, st.integers(1, 4))
def test_merged_groups_equal_one_softmax(seed: int, groups: int) -> None:
    q, k, v = qkv(seed)
    masks = partition(seed, BATCH, KEYS, groups=groups)
    parts = grouped_attention(q, k, v, *masks, scale=SCALE)
    weights = dense(q, k).softmax(-1)
    merged = merge_groups(parts.outputs, parts.lse)
    torch.testing.assert_close(merged, weights @ repeated(v), **EXACT)
    for mask, mass in zip(masks, parts.mass, strict=True):
        torch.testing.assert_close(mass, (weights * mask[:, None, None, :]).sum(-1), **EXACT)


@few
@given(SEEDS)
def test_groups_may_differ_by_head_and_row_and_leave_columns_closed(seed: int) -> None:
    q, k, v = qkv(seed)
    first, second, _ = partition(seed, BATCH, KV_HEADS * SHARED, ROWS, KEYS, groups=3)
    bias = vectors(seed + 3, 1, 1, ROWS, KEYS)
    parts = grouped_attention(q, k, v, first, second, scale=SCALE, bias=bias)
    scores = (dense(q, k) + bias).masked_fill(~(first | second), -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0) @ repeated(v)
    torch.testing.assert_close(merge_groups(parts.outputs, parts.lse), expected, **EXACT)


def test_empty_groups_and_closed_rows_give_zero_and_not_nan() -> None:
    q, k, v = qkv(0)
    nothing = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    parts = grouped_attention(q, k, v, nothing, ~nothing, scale=SCALE)
    assert torch.equal(parts.outputs[0], torch.zeros_like(parts.outputs[0]))
    assert torch.equal(parts.mass[0], torch.zeros_like(parts.mass[0]))
    assert (parts.lse[0] == -torch.inf).all()
    expected = dense(q, k).softmax(-1) @ repeated(v)
    torch.testing.assert_close(merge_groups(parts.outputs, parts.lse), expected, **EXACT)
    unread = [torch.full_like(parts.outputs[0], torch.nan), parts.outputs[1]]
    torch.testing.assert_close(merge_groups(unread, parts.lse), expected, **EXACT)
    closed = grouped_attention(q, k, v, nothing, scale=SCALE)
    assert torch.equal(merge_groups(closed.outputs, closed.lse), torch.zeros_like(expected))


@few
@given(SEEDS)
def test_scaling_masses_is_scaling_weights(seed: int) -> None:
    q, k, v = qkv(seed)
    masks = partition(seed, BATCH, KEYS, groups=2)
    parts = grouped_attention(q, k, v, *masks, scale=SCALE)
    factor = vectors(seed + 3, BATCH, KV_HEADS * SHARED, ROWS).abs()
    column = torch.where(masks[0][:, None, None, :], factor[..., None], 0.25)
    scaled = dense(q, k).softmax(-1) * column
    plain = merge_groups(parts.outputs, parts.lse, [factor, 0.25])
    torch.testing.assert_close(plain, scaled @ repeated(v), **EXACT)
    normal = merge_groups(parts.outputs, parts.lse, [factor, 0.25], renormalize=True)
    expected = scaled / scaled.sum(-1, keepdim=True) @ repeated(v)
    torch.testing.assert_close(normal, expected, **EXACT)


@few
@given(SEEDS)
def test_scaling_a_column_is_adding_the_logarithm_to_its_score(seed: int) -> None:
    q, k, v = qkv(seed)
    masks = partition(seed, BATCH, KEYS, groups=2)
    parts = grouped_attention(q, k, v, *masks, scale=SCALE)
    bias = torch.where(masks[0], torch.tensor(3.0).double().log(), 0.0)[:, None, None, :]
    expected = (dense(q, k) + bias).softmax(-1) @ repeated(v)
    merged = merge_groups(parts.outputs, parts.lse, [3.0, 1.0], renormalize=True)
    torch.testing.assert_close(merged, expected, **EXACT)


def test_unequal_numbers_of_groups_are_refused() -> None:
    outputs, lse = [torch.zeros(1, 1, 1, 2)], [torch.zeros(1, 1, 1)]
    with pytest.raises(ConfigError, match="1 outputs, 1 log-sum-exps and 2 factors"):
        merge_groups(outputs, lse, [1.0, 1.0])
    with pytest.raises(ConfigError, match="0 outputs"):
        merge_groups([], [])
    with pytest.raises(ConfigError, match="no column group"):
        grouped_values(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2))


def example(seed: int) -> tuple[Attention, Tensor, Tensor]:
    made = attentions(seed, heads=KV_HEADS * SHARED, size=KEYS, dtype=torch.float64)
    values = vectors(seed + 2, BATCH, KV_HEADS, KEYS, WIDTH)
    return made, values, made.scores > -torch.inf


@few
@given(SEEDS, FRACTIONS, FRACTIONS, st.floats(0, 0.5))
def test_var_needs_three_groups_and_their_masses(
    seed: int, keep: float, max_sink_ratio: float, min_image_mass: float
) -> None:
    made, v, opened = example(seed)
    visual, rows = made.prompt.visual, made.prompt.after_image
    sinks = random_mask(seed, BATCH, KEYS) & made.prompt.real
    options = {"keep": keep, "max_sink_ratio": max_sink_ratio, "min_image_mass": min_image_mass}
    full = redistribute_sinks(made.weights, sinks, visual, rows, **options)

    def columns(mask: Tensor) -> Tensor:
        return mask[:, None, None, :] & opened

    groups = (sinks & visual, sinks & ~visual, visual & ~sinks, ~(visual | sinks))
    parts = grouped_values(made.scores, v, *(columns(group) for group in groups))
    image_sinks, text_sinks, image, _ = parts.mass
    scales = sink_transfer_scales(
        image_sinks + text_sinks,
        image_sinks,
        image_sinks + image,
        n_image=visual.sum(-1)[:, None, None],
        eligible=(rows & (sinks & visual).any(-1, keepdim=True))[:, None, :],
        **options,
    )
    factors = [scales.source, scales.source, scales.target, 1.0]
    merged = merge_groups(parts.outputs, parts.lse, factors)
    torch.testing.assert_close(merged, full @ repeated(v), **EXACT)


@few
@given(SEEDS, FRACTIONS)
def test_act_needs_two_groups_and_their_masses(seed: int, beta: float) -> None:
    made, v, opened = example(seed)
    mask, every = made.prompt.real, range(KV_HEADS * SHARED)
    full = act_calibrate(made.weights, heads=every, beta=beta, theta=0.1, mask=mask)
    received = received_attention(made.weights, mask=mask)
    sinks = attention_sinks(received, theta=0.1)[:, :, None, :]
    parts = grouped_values(made.scores, v, sinks & opened, ~sinks & opened)
    scales = transfer_scales(*parts.mass, keep=beta)
    real = mask[:, None, :]
    factors = [torch.where(real, factor, 1.0) for factor in scales]
    merged = merge_groups(parts.outputs, parts.lse, factors)
    torch.testing.assert_close(merged, full @ repeated(v), **EXACT)


@few
@given(SEEDS, st.floats(0.1, 2))
def test_scaling_scores_is_scaling_keys(seed: int, factor: float) -> None:
    q, k, _ = qkv(seed)
    columns = random_mask(seed, BATCH, KEYS)
    steered = scale_scores(dense(q, k), columns, factor=factor)
    keys = torch.where(columns[:, None, :, None], factor * k, k)
    torch.testing.assert_close(row_scores(q, keys, scale=SCALE), steered, **EXACT)


@few
@given(SEEDS)
def test_spin_needs_the_sum_of_the_image_keys_alone(seed: int) -> None:
    q, k, _ = qkv(seed, rows=1)
    visual = random_mask(seed, BATCH, KEYS) | (torch.arange(KEYS) == 3)
    gate = spin_gate(dense(q, k)[:, :, 0], visual, keep_ratio=0.5, suppress=0.1)
    summed = (k * visual[:, None, :, None]).sum(2, keepdim=True)
    ranking = row_scores(q, summed, scale=SCALE)[:, :, 0]
    everything = torch.ones(BATCH, 1, dtype=torch.bool)
    assert torch.equal(spin_gate(ranking, everything, keep_ratio=0.5, suppress=0.1), gate)


@few
@given(SEEDS, st.floats(0, 5))
def test_gift_is_a_bias_on_the_scores(seed: int, alpha: float) -> None:
    made, _, _ = example(seed)
    weights, scores = made.weights[:, :, -1], made.scores[:, :, -1]
    visual, question = made.prompt.visual, made.prompt.after_image
    saliency = (alpha * torch.rand(BATCH, KEYS, generator=generator(seed)).double()).exp()
    fused = gift_fuse(weights, saliency, visual, question)
    # The ratio to the untouched columns tells the factor of every column.
    other = (~visual & ~question & made.prompt.real)[:, None, :]
    reference = (fused * other).sum(-1, keepdim=True) / (weights * other).sum(-1, keepdim=True)
    factor = torch.where(weights > 0, fused / weights / reference, 1.0)
    torch.testing.assert_close((scores + factor.log()).softmax(-1), fused, **EXACT)


@few
@given(SEEDS, st.floats(0, 1))
def test_a_boost_of_one_row_is_the_boost_of_all_rows_read_there(seed: int, alpha: float) -> None:
    made, _, _ = example(seed)
    whole = boost_scores(made.scores, made.prompt.visual, alpha=alpha)
    row = boost_scores(made.scores[:, :, -1:], made.prompt.visual, alpha=alpha)
    assert torch.equal(whole[:, :, -1:], row)
