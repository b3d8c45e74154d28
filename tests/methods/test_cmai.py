"""CMAI where its effect is known in advance."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vlm_steer
from tests.contract.test_contract import assert_close, two_rows
from tests.families import zoo
from tests.methods.views import GENERATED, IMAGE, INSTRUCTION, SYSTEM, view
from vlm_steer.engine.hooks import At
from vlm_steer.errors import ConfigError
from vlm_steer.functional import focus_scores, low_focus
from vlm_steer.methods.cmai import CMAI

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

KINDS = [SYSTEM, IMAGE, IMAGE, IMAGE, INSTRUCTION, INSTRUCTION, INSTRUCTION]


def causal(n: int, heads: int = 2) -> Tensor:
    """Causal scores ``[1, heads, n, n]``."""
    closed = torch.ones(n, n, dtype=torch.bool).triu(1)
    return torch.randn(1, heads, n, n).masked_fill(closed, torch.finfo(torch.float32).min)


def closed_by(method: CMAI, scores: Tensor) -> Tensor:
    n = scores.shape[-1]
    tally = method.tally(scores.softmax(dim=-1), view(KINDS, rows=n))
    new = method.scores(scores, view(KINDS, rows=n, tally=tally))
    return (new != scores).any(dim=1)[0]


def test_a_row_loses_the_image_tokens_that_the_text_it_reads_looks_at_least() -> None:
    scores = causal(len(KINDS))
    weights = scores.softmax(dim=-1).mean(dim=1)[0]
    closed = closed_by(CMAI(share=0.5), scores)
    for row in (4, 5, 6):
        focus = [sum(weights[row, k] * weights[k, j] for k in (4, 5, 6)) for j in (1, 2, 3)]
        expected = torch.zeros(len(KINDS), dtype=torch.bool)
        expected[1 + int(torch.stack(focus).argmin())] = True  # int(0.5 * 3) = 1
        assert torch.equal(closed[row], expected)


def test_text_that_is_read_can_save_a_token_that_the_row_itself_ignores() -> None:
    scores = torch.zeros(1, 1, 7, 7).masked_fill(
        torch.ones(7, 7, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min
    )
    scores[..., 5, 1] = 8.0  # the row before the last looks at the first image token
    scores[..., 6, 5] = 8.0  # and the last row reads the one before it
    scores[..., 6, 1] = -1.0
    closed = closed_by(CMAI(share=0.67), scores)
    assert closed[6].nonzero().flatten().tolist() == [2, 3]


def test_the_tally_is_the_mean_attention_of_the_text_rows_whatever_the_blocks() -> None:
    weights = causal(len(KINDS)).softmax(dim=-1)
    method = CMAI()
    whole = method.tally(weights, view(KINDS, rows=7))
    torch.testing.assert_close(whole, weights.mean(dim=1)[:, 4:])
    parts = [
        method.tally(weights[:, :, rows], view(KINDS, on_rows=lambda v, r=rows: v[:, r]))
        for rows in (slice(0, 5), slice(5, 7))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_a_generated_token_counts_its_own_gaze() -> None:
    kinds = [*KINDS, GENERATED]
    tally = torch.zeros(1, 3, 8)
    scores = torch.zeros(1, 2, 1, 8)
    scores[..., 2] = -1.0
    at = view(
        kinds, tally=tally, on_keys=lambda v: torch.nn.functional.pad(v, (0, 8 - v.shape[-1]))
    )
    new = CMAI(share=0.34).scores(scores, at)
    assert (new != scores)[0, 0, 0].nonzero().flatten().tolist() == [2]


def test_columns_that_a_row_does_not_see_are_not_counted() -> None:
    focus = torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.5, 0.0]])
    seen = torch.tensor([[False, True, True, True, True, False]])
    assert low_focus(focus, seen, share=0.5).tolist() == [[False, False, True, False, True, False]]
    assert not low_focus(focus, seen, share=0.2).any()
    assert torch.equal(low_focus(focus, seen, share=1.0), seen)
    a, b = torch.rand(2, 3, 4), torch.rand(2, 4, 5)
    torch.testing.assert_close(focus_scores(a, b), torch.einsum("brk,bkj->brj", a, b))


def test_in_a_model_the_first_layer_closes_what_eager_attention_says() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    closed: list[Tensor] = []

    class Spy(CMAI):
        def scores(self, scores: Tensor, at: At) -> Tensor:
            new = super().scores(scores, at)
            closed.append((new != scores).any(dim=1) & at.is_row[..., None])
            return new

    with torch.no_grad():
        eager = zoo.load("llava", attn_implementation="eager").model
        weights = eager(**batch, output_attentions=True).attentions[0].mean(dim=1)
        with vlm_steer.steer(family.model, Spy(share=0.4, layers={"indices": [0]})) as steering:
            family.model(**batch)
            assert steering.effect()["cmai"]["layers"]
    is_image = family.expected_image_mask(batch)
    for row in range(2):
        text = torch.arange(int(is_image[row].nonzero().max()) + 1, is_image.shape[1])
        focus = weights[row][text][:, text] @ weights[row][text][:, is_image[row]]
        lowest = focus.argsort(dim=-1)[:, : int(0.4 * is_image[row].sum())]
        expected = torch.zeros_like(focus, dtype=torch.bool).scatter(1, lowest, True)
        assert torch.equal(closed[-1][row, -len(text) :, is_image[row]], expected)
        assert not closed[-1][row][:, ~is_image[row]].any()


def test_a_second_turn_on_a_kept_cache_equals_one_long_prompt() -> None:
    family = zoo.load("llava")
    first, second = family.inputs(n_text=5), family.inputs(n_text=6, seed=1)
    later = {name: second[name] for name in ("input_ids", "pixel_values")}
    whole = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], dim=1),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    with vlm_steer.steer(family.model, "cmai"), torch.no_grad():
        cache = DynamicCache(config=family.model.config.get_text_config())
        family.model(**first, past_key_values=cache)
        steered = family.model(**later, past_key_values=cache).logits
        expected = family.model(**whole).logits
    assert_close(steered[:, -1:], expected[:, -1:])


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share is"):
        CMAI(share=share)
