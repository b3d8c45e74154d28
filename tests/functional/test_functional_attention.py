"""What must hold for every attention transform, whatever the input."""

import pytest
import torch
from functional_examples import (
    FRACTIONS,
    SEEDS,
    attentions,
    few,
    generator,
    prompts,
    random_mask,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm_steer.errors import DataError
from vlm_steer.functional import (
    act_calibrate,
    attention_sinks,
    boost_scores,
    concentric_mask,
    concentric_positions,
    concentric_rings,
    gift_fuse,
    gift_saliency,
    memvr_retrace,
    modality_mutual_mask,
    received_attention,
    redistribute_sinks,
    retrace_uncertainty,
    scale_scores,
    sink_tokens,
    spin_gate,
    spread_sinks,
    transfer_scales,
    vision_aware_heads,
)

HEADS, SIZE = 4, 14
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ORDER = torch.tensor([2, 0, 3, 1])


def var(weights: Tensor, seed: int, *, keep: float) -> Tensor:
    prompt = prompts(seed)
    sinks = random_mask(seed, 2, SIZE) & prompt.real
    return redistribute_sinks(
        weights,
        sinks,
        prompt.visual,
        prompt.after_image,
        keep=keep,
        max_sink_ratio=0.6,
        min_image_mass=0.1,
    )


def act(weights: Tensor, seed: int, *, keep: float) -> Tensor:
    everything = range(weights.shape[1])
    return act_calibrate(weights, heads=everything, beta=keep, theta=0.08, mask=prompts(seed).real)


TRANSFERS = pytest.mark.parametrize("transfer", [var, act])


@TRANSFERS
@few
@given(seed=SEEDS, keep=FRACTIONS)
def test_transfers_conserve_the_mass_of_every_row(transfer, seed: int, keep: float) -> None:
    weights = attentions(seed).weights
    moved = transfer(weights, seed, keep=keep)
    torch.testing.assert_close(moved.sum(-1), torch.ones_like(moved[..., 0]))
    assert (moved >= 0).all()
    assert (moved[weights == 0] == 0).all()


@TRANSFERS
@few
@given(seed=SEEDS, dtype=DTYPES)
def test_keeping_everything_is_the_identity(transfer, seed: int, dtype: torch.dtype) -> None:
    weights = attentions(seed).weights.to(dtype)
    assert torch.equal(transfer(weights, seed, keep=1.0), weights)


@TRANSFERS
@few
@given(seed=SEEDS, low=FRACTIONS, high=FRACTIONS)
def test_sinks_lose_more_the_less_they_keep(transfer, seed: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    weights = attentions(seed).weights
    loses = transfer(weights, seed, keep=0.0) < weights
    less, more = (transfer(weights, seed, keep=keep) for keep in (low, high))
    tolerance = 1e-6
    assert (less[loses] <= more[loses] + tolerance).all()
    assert (less[~loses] >= more[~loses] - tolerance).all()


@TRANSFERS
@few
@given(seed=SEEDS)
def test_heads_do_not_see_each_other(transfer, seed: int) -> None:
    weights = attentions(seed).weights
    moved = transfer(weights, seed, keep=0.3)
    assert torch.equal(transfer(weights[:, ORDER], seed, keep=0.3), moved[:, ORDER])


@few
@given(SEEDS)
def test_var_equals_its_definition_written_as_a_loop(seed: int) -> None:
    made = attentions(seed, dtype=torch.float64)
    prompt = made.prompt
    sinks = random_mask(seed, 2, SIZE) & prompt.real
    expected = made.weights.clone()
    for b in range(2):
        image = prompt.visual[b]
        if not (sinks[b] & image).any():
            continue
        for h in range(HEADS):
            for i in prompt.after_image[b].nonzero().flatten().tolist():
                row = made.weights[b, h, i]
                mass = row[image].sum()
                share = row[image & sinks[b]].sum() / (row[image] + 1e-6).sum()
                if share > 0.6 or mass < 0.1 or not (image & ~sinks[b]).any():
                    continue
                new = row.clone()
                new[sinks[b]] *= 0.3
                free = image & ~sinks[b]
                new[free] += 0.7 * row[sinks[b]].sum() * row[free] / row[free].sum()
                expected[b, h, i] = new
    torch.testing.assert_close(var(made.weights, seed, keep=0.3), expected, rtol=0, atol=1e-12)


def test_var_changes_selected_rows_and_no_others() -> None:
    changed = [
        (var(attentions(seed).weights, seed, keep=0.2) != attentions(seed).weights)
        for seed in range(20)
    ]
    rows = torch.stack([difference.any(-1).any(1) for difference in changed])
    allowed = torch.stack([prompts(seed).after_image for seed in range(20)])
    assert rows.any()
    assert not (rows & ~allowed).any()


def test_var_without_an_image_sink_is_the_identity() -> None:
    made = attentions(0)
    text_sink = ~made.prompt.visual & made.prompt.real
    steered = redistribute_sinks(
        made.weights,
        text_sink,
        made.prompt.visual,
        made.prompt.after_image,
        keep=0.0,
        max_sink_ratio=1.0,
        min_image_mass=0.0,
    )
    assert torch.equal(steered, made.weights)


def test_var_leaves_an_image_of_nothing_but_sinks_alone() -> None:
    made = attentions(0)
    steered = redistribute_sinks(
        made.weights,
        made.prompt.visual,
        made.prompt.visual,
        made.prompt.after_image,
        keep=0.0,
        max_sink_ratio=1.0,
        min_image_mass=0.0,
    )
    assert torch.equal(steered, made.weights)


def test_a_transfer_without_a_target_moves_nothing() -> None:
    scales = transfer_scales(torch.tensor([0.4, 0.4]), torch.tensor([0.0, 0.2]), keep=0.5)
    assert scales.source.tolist() == [1.0, 0.5]
    assert scales.target.tolist() == [1.0, 2.0]


def test_a_target_with_hardly_any_mass_receives_nothing_rather_than_nan() -> None:
    weights = torch.tensor([[[[0.6, 8e-40, 0.4, 0.0]]]])
    sinks, targets = (torch.tensor([[[i in chosen for i in range(4)]]]) for chosen in ({0}, {1, 3}))
    assert torch.equal(spread_sinks(weights, sinks, targets, keep=0.4), weights)


def test_gradients_pass_through_a_transfer_where_some_rows_are_left_alone() -> None:
    scores = torch.randn(1, 2, 3, 6, requires_grad=True)
    steered = redistribute_sinks(
        scores.softmax(dim=-1),
        torch.tensor([[True, False, True, False, False, False]]),
        torch.tensor([[False, False, True, True, True, False]]),
        torch.tensor([[True, True, False]]),
        keep=0.4,
        max_sink_ratio=0.9,
        min_image_mass=0.0,
    )
    steered.square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_act_spares_the_first_sink_and_the_heads_not_listed() -> None:
    received = torch.tensor([[0.5, 0.05, 0.3, 0.2, 0.01]])
    assert attention_sinks(received, theta=0.1).tolist() == [[False, False, True, True, False]]
    weights = attentions(3).weights
    steered = act_calibrate(weights, heads=[1], beta=0.1, theta=0.05)
    assert torch.equal(steered[:, [0, 2, 3]], weights[:, [0, 2, 3]])
    assert not torch.equal(steered[:, 1], weights[:, 1])


def test_received_attention_averages_over_the_rows_that_can_see() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
    expected = torch.tensor([1.7 / 3, 0.7 / 2, 0.6])
    torch.testing.assert_close(received_attention(weights), expected)


@few
@given(SEEDS, st.floats(0, 2), DTYPES)
def test_score_transforms_keep_closed_columns_closed(
    seed: int, strength: float, dtype: torch.dtype
) -> None:
    made = attentions(seed)
    everything = torch.ones_like(made.prompt.visual)
    closed = made.scores == -torch.inf
    for fill in (-torch.inf, torch.finfo(dtype).min):
        scores = made.scores.to(dtype).masked_fill(closed, fill)
        for steered in (
            boost_scores(scores, everything, alpha=strength),
            scale_scores(scores, everything, factor=strength),
        ):
            assert steered.dtype == dtype
            assert (steered[closed] == fill).all()
            assert not steered.isnan().any()


@few
@given(SEEDS, DTYPES)
def test_neutral_score_transforms_are_the_identity(seed: int, dtype: torch.dtype) -> None:
    made = attentions(seed)
    scores = made.scores.to(dtype)
    assert torch.equal(boost_scores(scores, made.prompt.visual, alpha=0.0), scores)
    assert torch.equal(scale_scores(scores, made.prompt.visual, factor=1.0), scores)


@few
@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
def test_a_stronger_boost_gives_the_image_more_attention(
    seed: int, first: float, second: float
) -> None:
    weaker, stronger = sorted((first, second))
    made = attentions(seed)

    def image_mass(alpha: float) -> Tensor:
        weights = boost_scores(made.scores, made.prompt.visual, alpha=alpha).softmax(-1)
        return (weights * made.prompt.visual[:, None, None, :]).sum(-1)

    assert (image_mass(weaker) <= image_mass(stronger) + 1e-6).all()


def test_scaling_can_take_attention_from_the_image_where_boosting_cannot() -> None:
    scores = torch.tensor([[[[-2.0, 1.0]]]])
    visual = torch.tensor([[True, False]])
    plain = scores.softmax(-1)[..., 0]
    assert (scale_scores(scores, visual, factor=1.5).softmax(-1)[..., 0] < plain).all()
    assert (boost_scores(scores, visual, alpha=0.5).softmax(-1)[..., 0] > plain).all()


@few
@given(SEEDS, DTYPES)
def test_gift_with_an_even_saliency_of_one_is_the_identity(seed: int, dtype: torch.dtype) -> None:
    made = attentions(seed)
    weights = made.weights[:, :, -1].to(dtype)
    ones = torch.ones(2, SIZE, dtype=dtype)
    fused = gift_fuse(weights, ones, made.prompt.visual, made.prompt.after_image)
    assert torch.equal(fused, weights)


@few
@given(SEEDS)
def test_gift_conserves_mass_and_moves_it_to_the_image(seed: int) -> None:
    made = attentions(seed)
    weights = made.weights[:, :, -1]
    saliency = 1 + 50 * torch.rand(2, SIZE, generator=generator(seed))
    visual, question = made.prompt.visual, made.prompt.after_image
    fused = gift_fuse(weights, saliency, visual, question)
    torch.testing.assert_close(fused.sum(-1), torch.ones(2, HEADS))
    image = visual[:, None, :]
    top = (weights * image).sum(-1).topk(HEADS // 2).indices
    before, after = ((a * image).sum(-1).gather(-1, top).sum() for a in (weights, fused))
    assert after >= before - 1e-6
    order = gift_fuse(weights[:, ORDER], saliency, visual, question)
    torch.testing.assert_close(order, fused[:, ORDER])


def test_gift_with_one_head_has_no_half_to_boost() -> None:
    made = attentions(0, heads=1)
    weights = made.weights[:, :, -1]
    saliency = torch.full((2, SIZE), 9.0)
    fused = gift_fuse(weights, saliency, made.prompt.visual, made.prompt.after_image)
    assert torch.equal(fused, weights)


@few
@given(SEEDS, st.floats(0, 5))
def test_gift_saliency_lies_between_one_and_its_maximum(seed: int, alpha: float) -> None:
    shift = torch.rand(2, 3, 4, 9, generator=generator(seed))
    saliency = gift_saliency(shift, alpha=alpha)
    assert saliency.amin() == 1
    torch.testing.assert_close(saliency.amax(), torch.tensor(alpha).exp())


def test_gift_saliency_without_contrast_is_one_and_without_words_an_error() -> None:
    assert torch.equal(gift_saliency(torch.ones(1, 2, 3, 4), alpha=5.0), torch.ones(4))
    assert torch.equal(gift_saliency(torch.ones(1, 2, 3, 1), alpha=5.0), torch.ones(1))
    with pytest.raises(DataError, match=r"\(1, 2, 0, 4\) hold nothing"):
        gift_saliency(torch.ones(1, 2, 0, 4), alpha=5.0)


@few
@given(SEEDS, FRACTIONS, FRACTIONS)
def test_spin_keeps_the_stated_number_of_heads(seed: int, ratio: float, suppress: float) -> None:
    made = attentions(seed)
    scores = made.scores[:, :, -1]
    gate = spin_gate(scores, made.prompt.visual, keep_ratio=ratio, suppress=suppress)
    kept = int(ratio * HEADS)
    expected = sorted([1.0] * kept + [suppress] * (HEADS - kept))
    for row in gate.sort(-1).values:
        torch.testing.assert_close(row, torch.tensor(expected))
    moved = spin_gate(scores[:, ORDER], made.prompt.visual, keep_ratio=ratio, suppress=suppress)
    assert torch.equal(moved, gate[:, ORDER])


def test_spin_counts_nothing_for_a_closed_image_column() -> None:
    scores = torch.tensor([[[-torch.inf, 1.0, 5.0], [-torch.inf, 2.0, 0.0]]])
    visual = torch.tensor([[True, True, False]])
    assert spin_gate(scores, visual, keep_ratio=0.5, suppress=0.1).tolist() == [
        pytest.approx([0.1, 1.0])
    ]


@few
@given(SEEDS, st.sampled_from(["l2", "l2sq"]))
def test_at_most_half_of_the_heads_are_vision_aware(seed: int, distance) -> None:
    image, text = torch.randn(2, 2, 8, 5, generator=generator(seed)).unbind()
    found = vision_aware_heads(image, text, distance=distance)
    assert (found.selected.sum(-1) <= 4).all()
    order = torch.randperm(8, generator=generator(seed))
    moved = vision_aware_heads(image[:, order], text[:, order], distance=distance)
    assert torch.equal(moved.selected, found.selected[:, order])
    torch.testing.assert_close(moved.divergence, found.divergence[:, order])


def test_vision_aware_heads_drop_negative_outliers_only_when_asked() -> None:
    image = torch.zeros(1, 8, 2)
    text = torch.arange(8.0)[None, :, None].expand(1, 8, 2) * 0.1
    text = text.clone()
    text[0, 3] = 20.0
    dropped = vision_aware_heads(image, text)
    kept = vision_aware_heads(image, text, drop_outliers=False)
    assert dropped.divergence[0, 3] == 0
    assert not dropped.selected[0, 3]
    assert kept.selected[0, 3]


@few
@given(SEEDS)
def test_sink_tokens_do_not_depend_on_the_length_of_the_state(seed: int) -> None:
    states = torch.randn(2, 6, 32, generator=generator(seed))
    states[:, 1, 7] = -400.0
    found = sink_tokens(states, sink_dims=[7, 3], tau=4.0)
    assert found[:, 1].all()
    assert torch.equal(sink_tokens(64 * states, sink_dims=[3, 7], tau=4.0), found)


@few
@given(SEEDS, FRACTIONS, DTYPES)
def test_memvr_mixes_and_is_neutral_at_zero(seed: int, ratio: float, dtype: torch.dtype) -> None:
    x, out = torch.randn(2, 2, 5, 8, generator=generator(seed)).to(dtype).unbind()
    memory = torch.randn(2, 6, 8, generator=generator(seed)).to(dtype)
    assert torch.equal(memvr_retrace(x, out, memory, ratio=0.0), out)
    mixed = memvr_retrace(x, out, memory, ratio=ratio)
    assert mixed.dtype == dtype
    assert mixed.isfinite().all()


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_memvr_reads_padded_images_and_preserves_the_mean_size(activation) -> None:
    x, out = torch.randn(2, 2, 5, 8, generator=generator(0)).unbind()
    memory = torch.randn(2, 6, 8, generator=generator(1))
    padded = torch.cat([memory, torch.zeros(2, 3, 8)], dim=1)
    full = memvr_retrace(x, out, memory, ratio=1.0, activation=activation)
    again = memvr_retrace(x, out, padded, ratio=1.0, activation=activation)
    torch.testing.assert_close(full, again)
    torch.testing.assert_close(full.abs().mean((1, 2)), out.abs().mean((1, 2)))


def test_memvr_without_an_image_only_weakens() -> None:
    x, out = torch.randn(2, 1, 5, 8, generator=generator(0)).unbind()
    torch.testing.assert_close(memvr_retrace(x, out, torch.zeros(6, 8), ratio=0.25), 0.75 * out)


def test_uncertainty_runs_from_sure_to_even() -> None:
    logits = torch.zeros(2, 20)
    logits[0, 3] = 100.0
    torch.testing.assert_close(retrace_uncertainty(logits), torch.tensor([0.0, 1.0]))


@few
@given(SEEDS)
def test_the_mutual_mask_opens_the_question_to_the_image_and_nothing_else(seed: int) -> None:
    prompt = prompts(seed)
    allowed = modality_mutual_mask(prompt.visual, prompt.after_image, mask=prompt.real)
    causal = torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
    extra = allowed & ~causal
    assert torch.equal(extra, prompt.visual[:, :, None] & prompt.after_image[:, None, :])
    padding = ~prompt.real[:, None, :] & ~torch.eye(SIZE, dtype=torch.bool)
    assert not (allowed & padding).any()
    assert allowed.any(-1).all()


@few
@given(st.integers(1, 9), st.integers(1, 9))
def test_rings_are_distances_to_the_border(height: int, width: int) -> None:
    rings = concentric_rings(height, width)
    for i in range(height):
        for j in range(width):
            assert rings[i, j] == min(i, j, height - 1 - i, width - 1 - j)


def two_images() -> tuple[Tensor, Tensor, Tensor]:
    """Padding, text, a 3 x 3 image, text, a 2 x 2 image, text."""
    first, second = concentric_rings(3, 3).flatten(), concentric_rings(2, 2).flatten()
    zero = torch.zeros(2, dtype=torch.long)
    rings = torch.cat([zero, zero, first, zero, second, zero])
    images = torch.cat([zero - 1, zero - 1, first * 0, zero - 1, second * 0 + 1, zero - 1])
    real = torch.arange(rings.numel()) >= 2
    return rings[None], images[None], real[None]


def test_concentric_positions_shorten_each_image_to_its_rings() -> None:
    rings, images, real = two_images()
    positions = concentric_positions(rings, images, mask=real)
    image = [2, 2, 2, 2, 3, 2, 2, 2, 2]
    assert positions.tolist() == [[0, 0, 0, 1, *image, 4, 5, 6, 6, 6, 6, 7, 8]]
    bare = concentric_positions(rings[:, 2:], images[:, 2:])
    assert torch.equal(bare, positions[:, 2:])


def test_concentric_mask_looks_inwards_within_one_image_only() -> None:
    rings, images, real = two_images()
    allowed = concentric_mask(rings, images, mask=real)[0]
    center, corner = 8, 4
    assert allowed[center, corner + 8]  # the centre sees the last border cell, which is later
    assert not allowed[corner, center]
    assert allowed[corner, corner + 8]
    second = slice(15, 19)
    assert allowed[second, second].all()
    assert allowed[second, corner : corner + 9].all()
    assert not allowed[corner : corner + 9, second].any()
    text = images[0] < 0
    causal = torch.ones_like(allowed).tril()
    assert torch.equal(allowed[text & real[0]], (causal & real)[text & real[0]])
    assert allowed.any(-1).all()
