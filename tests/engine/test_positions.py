"""The ``positions`` hook: moved prompts, and generated tokens that go on from them."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vlm_steer
from tests.contract.test_contract import assert_close, generate, two_rows
from tests.families import zoo
from vlm_steer.engine.hooks import LogitsAt, Method, PromptAt
from vlm_steer.errors import ConfigError, UnsupportedModelError

ROTARY = ["llava", "gemma3", "internvl", "instructblip"]


@dataclass(frozen=True, kw_only=True)
class Stretch(Method):
    """Twice the distance between any two tokens."""

    factor: int = 2
    offset: int = 0

    def positions(self, positions: Tensor, at: PromptAt) -> Tensor:
        return positions * self.factor + self.offset


Stretch.name = "stretch"


def decoder_positions(family: zoo.Family, batch: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The position ids that the text decoder gets in every forward of a generation."""
    seen = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"].clone())

    handle = family.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    generate(family, batch, **options)
    handle.remove()
    return seen


def test_generated_tokens_count_on_from_the_last_prompt_position() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    with vlm_steer.steer(family.model, Stretch(offset=3)):
        prompt, *steps = decoder_positions(family, batch)
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    is_token = batch["attention_mask"].bool()
    assert torch.equal(prompt[is_token], (counted * 2 + 3)[is_token])
    last = prompt[:, -1]
    for n, step in enumerate(steps, start=1):
        assert torch.equal(step[:, 0], last + n)


def beams_agree(family: zoo.Family, batch: dict[str, torch.Tensor]) -> bool:
    """Whether beams with and without a cache end in equal scores; not so in all of transformers."""
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "output_scores": True}
    cached, fresh = (
        family.model.generate(
            **batch, **options, use_cache=use_cache, return_dict_in_generate=True
        ).sequences_scores
        for use_cache in (True, False)
    )
    return torch.allclose(cached, fresh, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ROTARY)
def test_positions_act_equally_cached_padded_and_in_beams(name: str) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    base = generate(family, batch)
    base_beams_agree = name != "instructblip" and beams_agree(family, batch)
    with vlm_steer.steer(family.model, Stretch()) as steering:
        steered = generate(family, batch)
        effect = steering.effect()["stretch"]["layers"]
        alone = generate(family, family.batch([family.inputs(n_text=5, seed=0)]))
        assert_close(steered[:1], alone)
        assert set(effect) == {0, 1, 2, 3}
        with torch.no_grad():
            plain = family.model(**batch).logits[:, -1].float()
        assert_close(plain[:, None], steered[:, :1])
        if name != "instructblip":  # transformers loses its image without a cache
            assert_close(steered, generate(family, batch, use_cache=False))
            if base_beams_agree:
                assert beams_agree(family, batch)
    assert not torch.equal(steered, base)
    assert torch.equal(generate(family, batch), base)


def test_a_common_offset_changes_nothing_because_only_distances_count() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    base = generate(family, batch)
    with vlm_steer.steer(family.model, Stretch(factor=1, offset=11)):
        assert_close(generate(family, batch), base)


def test_a_forward_without_mask_or_cache_is_not_read_as_packed_sequences() -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs()])
    bare = {k: v for k, v in batch.items() if k != "attention_mask"}
    with vlm_steer.steer(family.model, Stretch()), torch.no_grad():
        expected = family.model(**batch).logits
        actual = family.model(**bare, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_second_turn_behind_a_cache_keeps_counting() -> None:
    family = zoo.load("llava")
    first = family.batch([family.inputs()])
    more = torch.tensor([[40, 41, 42]])
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with vlm_steer.steer(family.model, Stretch(factor=3)):
        cache = DynamicCache(config=family.model.config.get_text_config())
        turn = family.model.generate(**first, past_key_values=cache, max_new_tokens=1, **options)
        ids = torch.cat([turn.sequences, more], dim=1)
        whole = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": first["pixel_values"],
        }
        expected = family.model.generate(**whole, max_new_tokens=3, **options)
        rest = {k: v for k, v in whole.items() if k != "pixel_values"}
        again = family.model.generate(**rest, past_key_values=cache, max_new_tokens=3, **options)
    assert_close(torch.stack(again.logits, dim=1), torch.stack(expected.logits, dim=1))


@pytest.mark.parametrize("backend", ["paired", "separate"])
def test_branches_move_by_scope(backend: str) -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    outputs = []
    for scope in ("positive", "negative", "all"):
        with vlm_steer.steer(family.model, [Stretch(scope=scope), "vcd"], backend=backend):
            outputs.append(generate(family, batch))
        with vlm_steer.steer(family.model, [Stretch(scope=scope), "vcd"], backend="separate"):
            assert_close(outputs[-1], generate(family, batch))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("qwen2_5_vl", "several axes"), ("qwen3_vl", "several axes"), ("blip-2", "no rotary")],
)
def test_positions_that_cannot_be_moved_are_refused_at_attach(name: str, reason: str) -> None:
    family = zoo.load(name)
    with pytest.raises(UnsupportedModelError, match=reason):
        vlm_steer.attach(family.model, Stretch())
    assert "generate" not in vars(family.model)


def test_layers_mean_nothing_to_a_method_that_only_moves_positions() -> None:
    with pytest.raises(ConfigError, match="layers has no effect here: stretch acts on positions"):
        Stretch(layers=(0, 2))


@dataclass(frozen=True, kw_only=True)
class Nothing(Method):
    """Neither positions nor layers: as before, both common options mean nothing."""

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        return logits


def test_methods_on_logits_alone_still_have_no_scope() -> None:
    assert set(Nothing().ignored_options()) == {"layers", "scope"}
