"""Sums over the attention of a prompt, made before any of it is changed."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import generate, two_rows
from tests.families import zoo
from vlm_steer.engine import rows
from vlm_steer.engine.hooks import At, Method, Rows

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")


@dataclass(frozen=True, kw_only=True)
class Rises(Method):
    """Sums the weights, and by how much they rise from row to row; changes nothing."""

    rows: ClassVar[Rows] = "all"
    seen: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def tally(self, weights: Tensor, at: At) -> Tensor:
        previous = torch.cat([at.row_before, weights[:, :, :-1]], dim=2)
        rises = (weights - previous).relu()
        is_row = at.is_row[:, None, :, None]
        return torch.stack([(weights * is_row).sum(dim=2), (rises * is_row).sum(dim=2)], dim=1)

    def weights(self, weights: Tensor, at: At) -> Tensor:
        self.seen.append((at.layer, at.tally, at.on_keys(at.tally)))
        return weights


Rises.name = "rises"


@pytest.mark.parametrize("block", [3, 64])
def test_a_tally_is_the_sum_over_the_prompt_whatever_the_blocks(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_BLOCK", block)
    batch = two_rows(zoo.load("llava"))
    with torch.no_grad():
        eager = zoo.load("llava", attn_implementation="eager").model
        attentions = eager(**batch, output_attentions=True).attentions
    method = Rises()
    family = zoo.load("llava")
    with torch.no_grad(), vlm_steer.steer(family.model, method):
        family.model(**batch)
    is_row = batch["attention_mask"].bool()[:, None, :, None]
    for layer, tally, on_keys in method.seen:
        weights = attentions[layer]
        before = torch.cat([torch.zeros_like(weights[:, :, :1]), weights[:, :, :-1]], dim=2)
        rises = (weights - before).relu()
        expected = [(part * is_row).sum(dim=2) for part in (weights, rises)]
        torch.testing.assert_close(tally, torch.stack(expected, dim=1), atol=1e-5, rtol=1e-4)
        assert torch.equal(on_keys, tally)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_tally_stays_that_of_the_prompt_while_tokens_are_generated(use_cache: bool) -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    method = Rises(layers={"indices": [1]})
    with vlm_steer.steer(family.model, method):
        generate(family, batch, use_cache=use_cache)
    first, last = method.seen[0], method.seen[-1]
    # The first row rises from a row of padding, whose weights mean nothing.
    torch.testing.assert_close(last[1][:, 0], first[1][:, 0], atol=1e-5, rtol=1e-4)
    assert last[2].shape[-1] > last[1].shape[-1]
    assert (last[2][..., last[1].shape[-1] :] == 0).all()
