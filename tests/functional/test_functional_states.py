"""What must hold for shifts of hidden states, chosen tokens and probes."""

import pytest
import torch
from functional_examples import FRACTIONS, SEEDS, attentions, few, generator, random_mask
from hypothesis import given
from hypothesis import strategies as st

from vlm_steer.functional import (
    blind_tokens,
    column_entropy,
    laplacian_eigenvalues,
    least_attended_tokens,
    lookback_ratio,
    paint_tokens,
    steering_direction,
    summed_visual_attention_ratio,
    vsv_shift,
    vti_shift,
)

SHIFTS = pytest.mark.parametrize("shift", [vti_shift, vsv_shift])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def states(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


@SHIFTS
@few
@given(seed=SEEDS, strength=st.floats(0, 3))
def test_shifts_turn_without_changing_the_length(shift, seed: int, strength: float) -> None:
    x, d = states(seed, 2, 4, 8), states(seed + 1, 8)
    turned = shift(x, d, strength=strength)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    before, after = (torch.cosine_similarity(y, d, dim=-1) for y in (x, turned))
    assert (after >= before - 1e-5).all()


@SHIFTS
@few
@given(seed=SEEDS, first=st.floats(0, 1), second=st.floats(0, 1))
def test_stronger_shifts_turn_further(shift, seed: int, first: float, second: float) -> None:
    x, d = states(seed, 2, 4, 8), states(seed + 1, 8)
    near, far = (
        torch.cosine_similarity(shift(x, d, strength=s), d, dim=-1) for s in sorted((first, second))
    )
    assert (far >= near - 1e-5).all()


@SHIFTS
@few
@given(seed=SEEDS, dtype=DTYPES)
def test_shifts_of_no_strength_are_the_identity(shift, seed: int, dtype: torch.dtype) -> None:
    x = states(seed, 2, 4, 8).to(dtype)
    assert torch.equal(shift(x, states(seed, 8).to(dtype), strength=0.0), x)


@SHIFTS
def test_shifts_take_one_direction_per_sample_and_ignore_its_length(shift) -> None:
    x, d = states(0, 2, 4, 8), states(1, 2, 1, 8)
    together = shift(x, d, strength=0.7)
    for row in range(2):
        alone = shift(x[row : row + 1], 5 * d[row, 0], strength=0.7)
        torch.testing.assert_close(together[row : row + 1], alone)


@SHIFTS
def test_shifts_survive_zero_states_and_zero_directions(shift) -> None:
    zero = torch.zeros(1, 1, 8)
    assert torch.equal(shift(zero, states(0, 8), strength=0.5), zero)
    x = states(0, 1, 1, 8)
    torch.testing.assert_close(shift(x, torch.zeros(8), strength=0.5), x)


def test_vista_pushes_opposed_states_harder() -> None:
    d = torch.tensor([1.0, 0.0])
    x = torch.tensor([[[0.6, 0.8], [-0.6, 0.8]]])
    turned = vsv_shift(x, d, strength=0.1)
    added = [0.6 + 0.1, -0.6 + 0.1 * 1.6]
    expected = torch.nn.functional.normalize(
        torch.tensor([[[added[0], 0.8], [added[1], 0.8]]]), dim=-1
    )
    torch.testing.assert_close(turned, expected)


def test_the_direction_is_the_mean_plus_one_component_of_the_centred_pairs() -> None:
    axis = torch.zeros(3, 4)
    axis[1, 2] = 1.0
    mean = states(0, 3, 4)
    pairs = mean + torch.tensor([-2.0, -1.0, 3.0])[:, None, None] * axis
    torch.testing.assert_close(steering_direction(pairs), mean)
    with_component = steering_direction(pairs, form="mean_plus_component")
    torch.testing.assert_close(with_component, mean + axis)
    single = steering_direction(pairs[:1], form="mean_plus_component")
    torch.testing.assert_close(single, pairs[0])


@few
@given(SEEDS, FRACTIONS)
def test_local_and_summary_tokens_are_disjoint(seed: int, ratio: float) -> None:
    first, last = states(seed, 2, 2, 3, 40).softmax(-1).unbind()
    last = last + 5 * random_mask(seed, 2, 1, 40, share=0.05)
    found = paint_tokens(first, last, local_ratio=ratio)
    assert not (found.local & found.summary).any()
    assert (found.local.sum(-1) <= int(ratio * 40)).all()
    total = last.sum(1)
    outside = total.masked_fill(found.summary, -torch.inf).amax(-1)
    inside = total.masked_fill(~found.summary, torch.inf).amin(-1)
    assert (outside < inside).all()


@few
@given(SEEDS, st.floats(0.05, 1), st.floats(-1, 2))
def test_blind_tokens_are_image_tokens_above_the_threshold(
    seed: int, gamma: float, lam: float
) -> None:
    made = attentions(seed)
    weights = torch.stack([made.weights[:, :, -1], made.weights[:, :, -2]], dim=1)
    visual = made.prompt.visual
    blind = blind_tokens(weights, visual, gamma=gamma, lam=lam)
    assert not (blind & ~visual).any()
    stricter = blind_tokens(weights, visual, gamma=gamma, lam=lam + 0.5)
    assert not (stricter & ~blind).any()
    order = blind_tokens(weights.flip(1), visual, gamma=gamma, lam=lam)
    assert torch.equal(order, blind)


def test_blind_tokens_use_the_fewest_layers_that_reach_the_share() -> None:
    weights = torch.zeros(1, 3, 1, 5)
    weights[0, 0, 0] = torch.tensor([0.0, 0.6, 0.1, 0.1, 0.1])
    weights[0, 1, 0] = torch.tensor([0.6, 0.0, 0.3, 0.1, 0.0])
    weights[0, 2, 0] = torch.tensor([0.9, 0.0, 0.0, 0.0, 0.1])
    visual = torch.tensor([[False, True, True, True, True]])
    one = blind_tokens(weights, visual, gamma=0.5, lam=1.0)
    assert one.tolist() == [[False, True, False, False, False]]
    both = blind_tokens(weights, visual, gamma=0.9, lam=0.0)
    assert both.tolist() == [[False, True, True, False, False]]


@few
@given(SEEDS, st.integers(0, 20))
def test_least_attended_tokens_are_the_lowest_of_the_image(seed: int, count: int) -> None:
    made = attentions(seed)
    row, visual = made.weights[:, :, -1], made.prompt.visual
    chosen = least_attended_tokens(row, visual, count=count)
    assert torch.equal(chosen.sum(-1), visual.sum(-1).clamp(max=count))
    assert not (chosen & ~visual).any()
    attention = row.mean(1)
    highest = attention.masked_fill(~chosen, -1).amax(-1)
    lowest_left = attention.masked_fill(~visual | chosen, 2).amin(-1)
    assert (highest <= lowest_left).all()


@few
@given(SEEDS)
def test_the_lookback_ratio_is_a_ratio_of_means(seed: int) -> None:
    made = attentions(seed)
    row, context, new = made.weights[:, :, -1], made.prompt.visual, made.prompt.after_image
    ratio = lookback_ratio(row, context, new)
    assert ((ratio >= 0) & (ratio <= 1)).all()
    torch.testing.assert_close(ratio + lookback_ratio(row, new, context), torch.ones_like(ratio))
    even = lookback_ratio(torch.full_like(row, 0.1), context, new)
    torch.testing.assert_close(even, torch.full_like(even, 0.5))


def test_the_entropy_over_columns_is_that_of_their_shares() -> None:
    row = torch.tensor([[0.1, 0.1, 0.5, 0.3], [0.0, 0.0, 1.0, 0.0]])
    some = torch.tensor([True, True, False, False])
    expected = torch.tensor([2.0, 1.0]).log()
    torch.testing.assert_close(column_entropy(row, some), expected)
    full = torch.distributions.Categorical(probs=row).entropy()
    torch.testing.assert_close(column_entropy(row, torch.ones_like(some)), full)


def test_the_lookback_ratio_of_empty_sets_is_defined() -> None:
    row = torch.full((1, 2, 4), 0.25)
    some = torch.tensor([[True, True, False, False]])
    none = torch.zeros_like(some)
    assert lookback_ratio(row, some, none).tolist() == [[1.0, 1.0]]
    assert lookback_ratio(row, none, some).tolist() == [[0.0, 0.0]]
    assert lookback_ratio(row, none, none).tolist() == [[0.0, 0.0]]


@few
@given(SEEDS)
def test_svar_adds_up_over_layers(seed: int) -> None:
    weights, visual = states(seed, 5, 3, 9).softmax(-1), random_mask(seed, 9)
    whole = summed_visual_attention_ratio(weights, visual, first_layer=0, last_layer=4)
    parts = [
        summed_visual_attention_ratio(weights, visual, first_layer=a, last_layer=b)
        for a, b in ((0, 1), (2, 4))
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    everything = torch.ones(9, dtype=torch.bool)
    full = summed_visual_attention_ratio(weights, everything, first_layer=1, last_layer=3)
    torch.testing.assert_close(full, torch.tensor([3.0]))


@few
@given(SEEDS)
def test_laplacian_eigenvalues_are_those_of_the_matrix(seed: int) -> None:
    size = 10
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    scores = states(seed, 2, 3, size, size).double().masked_fill(~causal, -torch.inf)
    weights = scores.softmax(-1)
    seen = torch.arange(size, 0, -1)
    laplacian = torch.diag_embed(weights.sum(-2) / seen) - weights
    expected = torch.linalg.eigvals(laplacian).real.sort(-1, descending=True).values
    found = laplacian_eigenvalues(weights, top_k=4)
    torch.testing.assert_close(found, expected[..., :4], rtol=0, atol=1e-8)
