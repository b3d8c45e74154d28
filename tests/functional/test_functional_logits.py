"""What must hold for every transform of logits, whatever the input."""

import math

import pytest
import torch
from functional_examples import FRACTIONS, SEEDS, few, generator, random_logits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm_steer.errors import ConfigError
from vlm_steer.functional import (
    add_change,
    contrast_logits,
    deco_logits,
    decore_logits,
    diffusion_noise,
    dola_logits,
    draw_tokens,
    early_logit_mix,
    first_lowest,
    guidance_logits,
    m3id_logits,
    opera_penalty,
    plausibility_mask,
    vdgd_logits,
)

VOCAB = 23
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
STRENGTHS = st.floats(0, 4, allow_subnormal=False)


def pair(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(random_logits(seed + i, 3, VOCAB).to(dtype) for i in range(2))


CONTRASTS = pytest.mark.parametrize(
    "contrast",
    [
        lambda p, n, a: contrast_logits(p, n, alpha=a, beta=0.1),
        lambda p, n, a: contrast_logits(p, n, alpha=a, beta=0.1, form="add"),
        lambda p, n, a: guidance_logits(p, n, gamma=1.5 + a, beta=0.1),
        lambda p, n, a: m3id_logits(p, n, step=3, lam=a / 4),
        lambda p, n, _: decore_logits(p, n).logits,
    ],
    ids=["vcd", "agla", "guidance", "m3id", "decore"],
)


@few
@given(SEEDS, FRACTIONS)
def test_the_plausibility_mask_compares_probabilities(seed: int, beta: float) -> None:
    logits = random_logits(seed, 3, VOCAB).double()
    p = logits.softmax(-1)
    kept = plausibility_mask(logits, beta=beta)
    margin = p - beta * p.amax(-1, keepdim=True)
    clear = margin.abs() > 1e-9
    assert torch.equal(kept[clear], (margin >= 0)[clear])
    assert kept.gather(-1, logits.argmax(-1, keepdim=True)).all()


@few
@given(SEEDS, FRACTIONS, FRACTIONS)
def test_a_larger_beta_keeps_fewer_tokens(seed: int, first: float, second: float) -> None:
    logits = random_logits(seed, 3, VOCAB)
    loose, strict = (plausibility_mask(logits, beta=b) for b in sorted((first, second)))
    assert not (strict & ~loose).any()


@few
@given(SEEDS, DTYPES)
def test_neutral_contrasts_are_the_identity(seed: int, dtype: torch.dtype) -> None:
    positive, negative = pair(seed, dtype)
    for form in ("subtract", "add"):
        same = contrast_logits(positive, negative, alpha=0.0, beta=0.0, form=form)
        assert torch.equal(same, positive)
    log_p = positive.float().log_softmax(-1).to(dtype)
    assert torch.equal(guidance_logits(positive, negative, gamma=1.0, beta=0.5), log_p)
    assert torch.equal(m3id_logits(positive, negative, step=9, lam=0.0), log_p)
    early = negative.unsqueeze(1)
    assert torch.equal(early_logit_mix(positive, early, gamma=0.0), positive)
    candidates = deco_logits(positive, early, alpha=0.0, top_p=0.9, top_k=VOCAB)
    kept = candidates > -torch.inf
    assert torch.equal(candidates[kept], positive[kept])


@few
@given(SEEDS, STRENGTHS)
def test_a_contrast_with_itself_changes_no_choice(seed: int, alpha: float) -> None:
    positive, _ = pair(seed)
    log_p = positive.log_softmax(-1)
    plain = contrast_logits(positive, positive, alpha=alpha, beta=0.0)
    torch.testing.assert_close(plain, positive, rtol=1e-4, atol=1e-4)
    guided = guidance_logits(positive, positive, gamma=1 + alpha, beta=0.0)
    torch.testing.assert_close(guided, log_p, rtol=1e-4, atol=1e-4)
    aware = m3id_logits(positive, positive, step=5, lam=alpha / 4)
    torch.testing.assert_close(aware, log_p, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decore_logits(positive, positive).logits, log_p)


@CONTRASTS
@few
@given(seed=SEEDS, alpha=STRENGTHS, dtype=DTYPES)
def test_excluded_tokens_give_no_nan(contrast, seed: int, alpha: float, dtype) -> None:
    positive, negative = pair(seed, dtype)
    positive[:, 4:7] = -torch.inf
    negative[:, 6:9] = -torch.inf
    result = contrast(positive, negative, alpha)
    assert result.dtype == dtype
    assert not result.isnan().any()
    assert (result[:, 4:7] == -torch.inf).all()
    assert (result < torch.inf).all()
    assert result.isfinite().any(-1).all()


@few
@given(SEEDS, STRENGTHS)
def test_a_token_that_the_negative_excludes_is_left_to_the_positive(
    seed: int, alpha: float
) -> None:
    positive, negative = pair(seed)
    negative[:, 5] = -torch.inf
    result = contrast_logits(positive, negative, alpha=alpha, beta=0.0)
    torch.testing.assert_close(result[:, 5], positive[:, 5], rtol=1e-5, atol=1e-5)


@few
@given(SEEDS, STRENGTHS, STRENGTHS)
def test_a_stronger_contrast_moves_further_from_the_negative(
    seed: int, first: float, second: float
) -> None:
    weak, strong = sorted((first, second))
    positive, negative = pair(seed)
    favoured = positive > negative
    less, more = (contrast_logits(positive, negative, alpha=a, beta=0.0) for a in (weak, strong))
    assert (more[favoured] >= less[favoured] - 1e-5).all()
    assert (more[~favoured] <= less[~favoured] + 1e-5).all()


def test_guidance_is_the_contrast_of_log_probabilities() -> None:
    positive, negative = (logits.log_softmax(-1) for logits in pair(0))
    guided = guidance_logits(positive, negative, gamma=1.7, beta=0.1)
    contrasted = contrast_logits(positive, negative, alpha=0.7, beta=0.1)
    assert torch.equal(guided == -torch.inf, contrasted == -torch.inf)
    kept = guided > -torch.inf
    torch.testing.assert_close(guided[kept], contrasted[kept])


def test_the_weight_of_m3id_grows_with_the_step_up_to_its_bound() -> None:
    positive, negative = (logits.log_softmax(-1) for logits in pair(0))
    weights = []
    for step in (1, 10, 40, 125):
        shifted = m3id_logits(positive, negative, step=step, lam=0.02)
        weights.append(((shifted - positive) / (positive - negative)).median().item())
    assert weights == pytest.approx([0.020201, 0.221403, 1.225541, math.exp(2.5) - 1], rel=1e-3)
    bounded = m3id_logits(positive, negative, step=125, lam=0.02, max_weight=2.0)
    torch.testing.assert_close(bounded, positive + 2 * (positive - negative))


def test_decore_weighs_by_entropy() -> None:
    even = torch.zeros(1, VOCAB)
    sure = torch.zeros(1, VOCAB)
    sure[0, 2] = 200.0
    alpha = decore_logits(torch.cat([even, sure]), random_logits(0, 2, VOCAB)).alpha
    torch.testing.assert_close(alpha, torch.tensor([math.log(VOCAB), 0.0]))


@few
@given(SEEDS, st.integers(0, 999))
def test_noise_keeps_the_variance_of_standardised_pixels(seed: int, step: int) -> None:
    pixels, noise = torch.randn(2, 4000, generator=generator(seed)).unbind()
    assert diffusion_noise(pixels, noise, step=step).var().item() == pytest.approx(1, abs=0.15)


def test_noise_follows_the_published_schedule() -> None:
    one, zero = torch.ones(1), torch.zeros(1)
    published = {100: 0.9983, 200: 0.9939, 300: 0.9810, 500: 0.8630, 800: 0.4670, 999: 0.2850}
    kept = {step: diffusion_noise(one, zero, step=step).item() for step in published}
    assert kept == pytest.approx(published, abs=6e-5)


@pytest.mark.parametrize("step", [-1, 1000])
def test_noise_outside_the_schedule_is_refused(step: int) -> None:
    with pytest.raises(ConfigError, match=f"noise step {step} is outside"):
        diffusion_noise(torch.zeros(1), torch.zeros(1), step=step)


@few
@given(SEEDS, st.sampled_from(["kl_m", "jsd"]))
def test_dola_contrasts_the_layer_that_differs_most(seed: int, divergence) -> None:
    final, early = random_logits(seed, 3, VOCAB), random_logits(seed + 1, 3, 4, VOCAB)
    early = final.unsqueeze(1) + 0.01 * early
    early[:, 2] = random_logits(seed + 2, 3, VOCAB)
    result = dola_logits(final, early, relative_top=0.1, divergence=divergence)
    expected = final.log_softmax(-1) - early[:, 2].log_softmax(-1)
    kept = plausibility_mask(final, beta=0.1)
    assert torch.equal(result > -torch.inf, kept)
    torch.testing.assert_close(result[kept], expected[kept])
    order = torch.tensor([1, 3, 0, 2])
    moved = dola_logits(final, early[:, order], relative_top=0.1, divergence=divergence)
    torch.testing.assert_close(moved, result)


def relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def test_dola_measures_the_divergence_it_is_asked_for() -> None:
    seeds = range(40)
    final = torch.cat([random_logits(seed, 1, VOCAB) for seed in seeds]).double()
    early = torch.cat([random_logits(seed + 1, 1, 6, VOCAB) for seed in seeds]).double()
    p, q = final.softmax(-1).unsqueeze(1), early.softmax(-1)
    middle = (p + q) / 2
    chosen = {
        "kl_m": relative_entropy(middle, p) + relative_entropy(middle, q),
        "jsd": relative_entropy(p, middle) + relative_entropy(q, middle),
    }
    layers = {kind: distance.argmax(-1) for kind, distance in chosen.items()}
    assert not torch.equal(layers["kl_m"], layers["jsd"])
    for kind, layer in layers.items():
        picked = early[torch.arange(len(seeds)), layer]
        expected = final.log_softmax(-1) - picked.log_softmax(-1)
        result = dola_logits(final, early, relative_top=0.0, divergence=kind)
        torch.testing.assert_close(result, expected)


def test_dola_survives_probabilities_that_underflow() -> None:
    final = torch.zeros(1, VOCAB)
    final[0, 0] = 500.0
    early = torch.zeros(1, 2, VOCAB)
    early[0, 1, 1] = 500.0
    for divergence in ("kl_m", "jsd"):
        assert not dola_logits(final, early, relative_top=0.1, divergence=divergence).isnan().any()


@few
@given(SEEDS, st.floats(0.05, 1), st.integers(1, 40))
def test_deco_keeps_the_best_token_and_at_most_top_k(seed: int, top_p: float, top_k: int) -> None:
    final, early = random_logits(seed, 3, VOCAB), random_logits(seed + 1, 3, 4, VOCAB)
    result = deco_logits(final, early, alpha=0.6, top_p=top_p, top_k=top_k)
    kept = result > -torch.inf
    assert kept.gather(-1, final.argmax(-1, keepdim=True)).all()
    assert (kept.sum(-1) <= top_k).all()
    p = final.softmax(-1)
    short = kept.sum(-1) < min(top_k, VOCAB)
    assert ((p * kept).sum(-1)[short] >= top_p - 1e-6).all()


@few
@given(SEEDS, FRACTIONS)
def test_the_mix_of_equal_layers_changes_nothing(seed: int, gamma: float) -> None:
    final = random_logits(seed, 3, VOCAB)
    early = final.unsqueeze(1).expand(3, 5, VOCAB)
    torch.testing.assert_close(early_logit_mix(final, early, gamma=gamma), final)


def over_trust(column: int, *, size: int, response: int) -> Tensor:
    """Causal rows that spread evenly, but give 0.6 to one column of the response."""
    weights = torch.ones(size, size).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    start = size - response
    weights[start + column :] *= 0.4
    weights[start + column :, start + column] += 0.6
    return weights[None, None]


@few
@given(st.integers(0, 8), st.floats(0.1, 10))
def test_opera_finds_the_summary_token_whatever_the_scale_of_its_rows(
    column: int, factor: float
) -> None:
    weights = over_trust(column, size=20, response=12)
    visual = torch.arange(20)[None] < 4
    found = opera_penalty(weights, visual, scale=50.0, response_start=8)
    again = opera_penalty(factor * weights, visual, scale=50.0, response_start=8)
    assert found.anchor.tolist() == [column]
    assert found.penalty.item() > 0
    torch.testing.assert_close(again.penalty, found.penalty, rtol=1e-3, atol=0)


def test_opera_rewards_the_image_in_short_responses_only_in_the_code_form() -> None:
    weights = over_trust(2, size=14, response=6)
    visual = torch.arange(14)[None] < 4
    code = opera_penalty(weights, visual, scale=50.0, response_start=8)
    paper = opera_penalty(weights, visual, scale=50.0, response_start=8, bonus_length=0)
    torch.testing.assert_close(code.penalty, -weights[..., -1, :4].sum(-1))
    assert (paper.penalty > 0).all()


@pytest.mark.parametrize(("response", "is_bonus"), [(10, True), (11, False)])
def test_opera_rewards_the_image_up_to_the_tenth_token(response: int, is_bonus: bool) -> None:
    weights = over_trust(2, size=8 + response, response=response)
    visual = torch.arange(8 + response)[None] < 4
    found = opera_penalty(weights, visual, scale=50.0, response_start=8)
    assert (found.penalty.item() < 0) == is_bonus


def test_opera_survives_padding_rows_without_mass() -> None:
    weights = over_trust(2, size=20, response=12)
    weights[..., :3, :] = 0
    visual = torch.arange(20)[None] == 4
    assert opera_penalty(weights, visual, scale=50.0, response_start=8).penalty.isfinite().all()


@few
@given(SEEDS, st.floats(0.05, 1), st.sampled_from(["min", "mean", "sum"]))
def test_vdgd_ranks_the_nucleus_by_the_description(seed: int, top_p: float, reduce) -> None:
    logits = random_logits(seed, 2, VOCAB)
    described = random_logits(seed + 1, 2, 5, VOCAB).log_softmax(-1)
    scores = vdgd_logits(logits, described, top_p=top_p, temperature=0.5, reduce=reduce)
    expected = {"min": described.amax(1), "mean": described.mean(1), "sum": described.sum(1)}
    kept = scores > -torch.inf
    torch.testing.assert_close(scores[kept], expected[reduce][kept])
    assert kept.gather(-1, logits.argmax(-1, keepdim=True)).all()
    p = (logits / 0.5).softmax(-1)
    assert ((p * kept).sum(-1) >= top_p - 1e-5).all()
    weakest = p.masked_fill(~kept, 2).amin(-1, keepdim=True)
    assert (p.masked_fill(kept, 0) <= weakest).all()


@few
@given(SEEDS)
def test_contrasts_add_up_in_any_order(seed: int) -> None:
    raw, first, second = (random_logits(seed + i, 2, 12) for i in range(3))
    one = contrast_logits(raw, first, alpha=0.5, beta=0)
    other = contrast_logits(raw, second, alpha=2.0, beta=0)
    there = add_change(add_change(raw, raw, one), raw, other)
    back = add_change(add_change(raw, raw, other), raw, one)
    torch.testing.assert_close(there, back)
    torch.testing.assert_close(there, 3.5 * raw - 0.5 * first - 2 * second, atol=1e-4, rtol=1e-4)


def test_a_token_excluded_by_the_raw_logits_or_a_contrast_stays_excluded() -> None:
    raw = torch.tensor([[0.0, 1.0, -torch.inf]])
    changed = torch.tensor([[-torch.inf, 2.0, 3.0]])
    added = add_change(raw + 1, raw, changed)
    assert added.tolist() == [[-torch.inf, 3.0, -torch.inf]]


@few
@given(SEEDS)
def test_a_token_is_drawn_as_often_as_it_is_likely_and_never_when_ruled_out(seed: int) -> None:
    scores = random_logits(seed, 1, 5)
    scores[0, 2] = -torch.inf
    waiting = torch.empty(4000, 5).exponential_(generator=generator(seed))
    counts = draw_tokens(scores.expand(4000, -1), waiting).bincount(minlength=5)
    assert counts[2] == 0
    torch.testing.assert_close(counts / 4000, scores[0].softmax(-1), rtol=0, atol=0.04)


def test_of_equally_low_values_the_first_is_taken() -> None:
    values = torch.tensor([[3.0, 1.0, 1.0], [2.0, 2.0 - 1e-9, 2.0], [1.0, 0.5, 0.0]])
    assert first_lowest(values).tolist() == [1, 0, 2]
