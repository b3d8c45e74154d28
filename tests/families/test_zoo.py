"""The tiny families behave as the contract tests assume, before anything steers them."""

from __future__ import annotations

import functools
import socket

import pytest
import torch
from torch import Tensor

from tests.families import zoo
from tests.families.zoo import Family, Inputs

NEW = 4


@functools.cache
def loaded(name: str) -> Family:
    return zoo.load(name)


@pytest.fixture(params=zoo.FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return loaded(request.param)


@torch.no_grad()
def last_logits(family: Family, inputs: Inputs) -> Tensor:
    logits: Tensor = family.model(**inputs).logits
    return logits[:, -1].float()


def generated(family: Family, inputs: Inputs, **options: object) -> Tensor:
    out: Tensor = family.model.generate(**inputs, do_sample=False, max_new_tokens=NEW, **options)
    return out[:, inputs["input_ids"].shape[1] :]


def image_counts(name: str) -> list[int]:
    return [count for count in (0, 1, 2) if (name, count) not in zoo.UNSUPPORTED]


def test_network_is_blocked() -> None:
    with pytest.raises(RuntimeError, match="offline"):
        socket.create_connection(("127.0.0.1", 9), timeout=0.1)


def test_load_reads_the_saved_weights_into_fresh_models(family: Family) -> None:
    again = zoo.load(family.name)
    assert (family.directory / "model.safetensors").is_file()
    assert again.directory == family.directory
    assert again.model is not family.model
    assert again.config is not family.config
    state = family.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.model.state_dict().items())
    inputs = family.inputs()
    assert torch.equal(last_logits(again, inputs), last_logits(family, inputs))


def test_decoder_has_the_advertised_shape(family: Family) -> None:
    config = family.config.get_text_config()
    assert (config.num_hidden_layers, config.hidden_size) == (zoo.LAYERS, zoo.HIDDEN)
    assert (config.num_attention_heads, config.num_key_value_heads) == (zoo.HEADS, zoo.KEY_HEADS)
    assert len(family.model.get_decoder().layers) == zoo.LAYERS


def test_logits_are_finite_and_diverse(family: Family) -> None:
    logits = last_logits(family, family.inputs())
    assert logits.isfinite().all()
    assert 1.0 < float(logits.std()) < 10.0


def test_pixels_change_the_answer(family: Family) -> None:
    inputs = family.inputs()
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    difference = last_logits(family, other) - last_logits(family, inputs)
    assert float(difference.abs().max()) > 1e-2


def test_seed_changes_text_and_pixels_but_not_the_layout(family: Family) -> None:
    first, same, other = family.inputs(seed=3), family.inputs(seed=3), family.inputs(seed=4)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert first.keys() == other.keys()
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    masks = [family.expected_image_mask(inputs) for inputs in (first, other)]
    assert torch.equal(*masks)


def test_image_mask_agrees_with_the_features_the_model_scatters(family: Family) -> None:
    for count in image_counts(family.name):
        inputs = family.inputs(images=count)
        tokens = int(family.expected_image_mask(inputs).sum())
        if family.name == "mllama":
            assert tokens == 0
            assert family.cross_keys(inputs) == count * 4 * 5  # tiles of 2 x 2 patches + class
        else:
            assert (tokens > 0) == (count > 0)
            assert family.cross_keys(inputs) == 0
        assert last_logits(family, inputs).isfinite().all()


def test_cross_keys_are_what_the_cache_holds() -> None:
    family = loaded("mllama")
    inputs = family.inputs(images=2)
    with torch.no_grad():
        cache = family.model(**inputs, use_cache=True).past_key_values
    assert cache.layers[1].keys.shape[2] == family.cross_keys(inputs)
    assert cache.layers[0].keys.shape[2] == inputs["input_ids"].shape[1]


def test_unsupported_image_counts_are_refused_by_name() -> None:
    for name, count in zoo.UNSUPPORTED:
        with pytest.raises(zoo.Unsupported, match=name):
            loaded(name).inputs(images=count)


def test_left_padded_batch_equals_single_rows(family: Family) -> None:
    rows = [
        family.inputs(),
        family.inputs(n_text=9, seed=1, size=(72, 32)),
        family.inputs(n_text=2, seed=2, size=(40, 90)),
    ]
    batch = family.batch(rows)
    assert not batch["attention_mask"].all()
    logits = last_logits(family, batch)
    tokens = generated(family, batch)
    for row, inputs in enumerate(rows):
        torch.testing.assert_close(logits[row], last_logits(family, inputs)[0], atol=1e-4, rtol=0)
        assert torch.equal(tokens[row], generated(family, inputs)[0])


@pytest.mark.parametrize("name", [n for n in zoo.FAMILIES if len(image_counts(n)) > 1])
def test_rows_with_different_image_counts_share_a_batch_unless_listed(name: str) -> None:
    family = loaded(name)
    rows = [family.inputs(n_text=5 + n, seed=n, images=n) for n in image_counts(name)]
    logits = last_logits(family, family.batch(rows))
    single = torch.cat([last_logits(family, inputs) for inputs in rows])
    equal = torch.allclose(logits, single, atol=1e-4, rtol=0)
    assert equal == (name not in zoo.UNEQUAL_MIXED)


def test_generate_writes_text_only_and_never_stops_early(family: Family) -> None:
    tokens = generated(family, family.inputs())
    assert tokens.shape == (1, NEW)
    assert (tokens >= zoo.FIRST_TEXT).all()


def test_two_beams_of_a_batch_equal_two_beams_of_each_row(family: Family) -> None:
    rows = [family.inputs(), family.inputs(n_text=9, seed=1)]
    tokens = generated(family, family.batch(rows), num_beams=2)
    for row, inputs in enumerate(rows):
        assert torch.equal(tokens[row], generated(family, inputs, num_beams=2)[0])


def test_bfloat16_forward_is_finite_and_close(family: Family) -> None:
    half = zoo.load(family.name, torch.bfloat16)
    inputs = half.inputs()
    assert inputs["pixel_values"].dtype == torch.bfloat16
    difference = last_logits(half, inputs) - last_logits(family, family.inputs())
    assert difference.isfinite().all()
    assert float(difference.abs().mean()) < 0.5  # of logits with deviation 3
