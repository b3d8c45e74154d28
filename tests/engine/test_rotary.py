"""Scores at other positions, by way of the model's own rotary embedding."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import assert_close, generate, two_rows
from tests.families import zoo
from vlm_steer.engine.hooks import At, Method, PromptAt, Rows
from vlm_steer.engine.model import inspect_model
from vlm_steer.errors import SteerError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

ROTARY = ["llava", "idefics3", "paligemma", "mistral3", "mllama"]


@dataclass(frozen=True, kw_only=True)
class Stay(Method):
    """Scores placed anew where they stand already."""

    rows: ClassVar[Rows] = "all"
    needs_rotation: ClassVar[bool] = True

    def scores(self, scores: Tensor, at: At) -> Tensor:
        return at.placed(torch.zeros(scores.shape[:3], dtype=torch.long))


@dataclass(frozen=True, kw_only=True)
class Rebuild(Method):
    """Scores of tokens far apart, rebuilt from those of tokens at one position."""

    rows: ClassVar[Rows] = "all"
    needs_rotation: ClassVar[bool] = True
    factor: int = 3

    def positions(self, positions: Tensor, at: PromptAt) -> Tensor:
        return positions * self.factor


@dataclass(frozen=True, kw_only=True)
class Forget(Rebuild):
    """No positions at all, in whatever order the tokens were put."""

    def scores(self, scores: Tensor, at: At) -> Tensor:
        return at.unplaced()


@dataclass(frozen=True, kw_only=True)
class Count(Method):
    """Adds up rows over all blocks of a pass."""

    rows: ClassVar[Rows] = "all"
    needs_rotation: ClassVar[bool] = True

    def scores(self, scores: Tensor, at: At) -> Tensor:
        rows = at.sum_over_rows(lambda block: (block.row_kinds != 0).sum(dim=1).float())
        seen.append(rows)
        return scores


seen: list[Tensor] = []
for _cls in (Stay, Rebuild, Forget, Count):
    _cls.name = _cls.__name__.lower()


@pytest.mark.parametrize("name", ROTARY)
def test_rows_that_stay_where_they_are_keep_their_scores(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    base = generate(family, batch)
    with vlm_steer.steer(family.model, Stay()):
        assert_close(generate(family, batch), base, tolerance=1e-5)


@pytest.mark.parametrize("name", ["llava", "idefics3", "mistral3"])
def test_scores_without_positions_forget_where_tokens_were_put(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    results = []
    for factor in (1, 3):
        with vlm_steer.steer(family.model, Forget(factor=factor)):
            results.append(generate(family, batch))
            assert_close(generate(family, batch, use_cache=False), results[-1])
    assert_close(results[1], results[0])
    with vlm_steer.steer(family.model, Rebuild()):
        assert not torch.allclose(generate(family, batch), results[0], atol=1e-2)


def test_a_sum_over_rows_meets_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_steer.engine.rows._BLOCK", 7)
    family = zoo.load("llava")
    batch = two_rows(family)
    seen.clear()
    with vlm_steer.steer(family.model, Count()), torch.no_grad():
        family.model(**batch)
    assert len(seen) == 4 * -(-batch["input_ids"].shape[1] // 7)
    expected = batch["attention_mask"].sum(dim=1).float()
    assert all(torch.equal(rows, expected) for rows in seen)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen2_vl", "several axes"),
        ("gemma3", "rotary embeddings, not one"),
        ("aya_vision", "layer 3 does not turn"),
        ("llama4", "does not know"),
    ],
)
def test_models_whose_rotation_cannot_be_verified_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        vlm_steer.attach(zoo.load(name).model, Stay())


def test_frequencies_that_change_with_the_length_are_refused() -> None:
    family = zoo.load("llava")
    (embedding,) = [m for m in family.model.get_decoder().modules() if hasattr(m, "rope_type")]
    embedding.rope_type = "dynamic"
    with pytest.raises(UnsupportedModelError, match="change with the length"):
        vlm_steer.attach(family.model, Stay())


def test_verifying_leaves_no_trace_on_the_model() -> None:
    family = zoo.load("llava")
    configs = inspect_model(family.model).configs
    before = [config._attn_implementation for config in configs]
    batch = two_rows(family)
    base = generate(family, batch)
    assert inspect_model(family.model).rotation is inspect_model(family.model).rotation
    assert [config._attn_implementation for config in configs] == before
    assert torch.equal(generate(family, batch), base)


def test_half_precision_is_verified_and_turned() -> None:
    family = zoo.load("llava", dtype=torch.bfloat16)
    with vlm_steer.steer(family.model, Stay()):
        assert generate(family, two_rows(family)).isfinite().any(dim=-1).all()


def test_other_methods_are_told_that_they_did_not_ask() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unasked(Method):
        def scores(self, scores: Tensor, at: At) -> Any:
            return at.unplaced()

    family = zoo.load("llava")
    with (
        vlm_steer.steer(family.model, Unasked()),
        pytest.raises(SteerError, match="needs_rotation"),
    ):
        generate(family, two_rows(family))


def test_tokens_in_a_cache_are_not_moved_afterwards() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    more = torch.tensor([[30, 31], [32, 33]])
    with torch.no_grad():
        cache = family.model(**batch, use_cache=True).past_key_values
        ids = torch.cat([batch["input_ids"], more], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
        with (
            vlm_steer.steer(family.model, Rebuild()),
            pytest.raises(UnsupportedModelError, match="in the cache already"),
        ):
            family.model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
