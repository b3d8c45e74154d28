"""Contrast branches: the defects of published code, each held as a test."""

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import assert_close, generate, two_rows
from tests.families import zoo
from vlm_steer.engine.active import ACTIVE
from vlm_steer.engine.hooks import LogitsAt
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.methods._noise import noised_images
from vlm_steer.methods.vcd import VCD

pytestmark = pytest.mark.filterwarnings("ignore::vlm_steer.errors.SteerWarning")

FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "mllama", "instructblip"]


class Recording(VCD):
    """VCD that keeps what its negative stream said."""

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        self.seen.append(at.branches["noised"])  # type: ignore[attr-defined]
        return super().logits(logits, at)


def recording() -> Recording:
    method = Recording(alpha=0.5)
    object.__setattr__(method, "seen", [])
    return method


@pytest.mark.parametrize("backend", ["paired", "separate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_negative_stream_at_step_three_equals_a_full_forward_of_the_negative_inputs(
    name: str, backend: str
) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    method = recording()
    with vlm_steer.steer(family.model, method, backend=backend):
        output = family.model.generate(
            **batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
        )
    tokens = output.sequences[:, -4:]
    pixels = noised_images(
        batch["pixel_values"], _sizes(batch), step=method.noise_step, seed=method.seed
    )
    negative = {**batch, "pixel_values": pixels} | _longer(family, batch, tokens[:, :3])
    with torch.no_grad():
        expected = family.model(**negative, use_cache=False).logits[:, -1].float()
    assert_close(method.seen[3][:, None], expected[:, None])


def _sizes(batch: dict[str, Tensor]) -> tuple[int, ...] | None:
    grid = batch.get("image_grid_thw")
    return None if grid is None else tuple(grid.prod(-1).tolist())


def _longer(family: zoo.Family, batch: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Per-token inputs with generated tokens appended."""
    length = batch["input_ids"].shape[1]
    longer = {
        "input_ids": torch.cat([batch["input_ids"], tokens], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(tokens)], dim=1),
    }
    for name, value in batch.items():
        if name not in longer and value.ndim >= 2 and value.shape[1] == length:
            tail = value[:, -1:].expand(-1, tokens.shape[1], *value.shape[2:])
            if name in ("mm_token_type_ids", "token_type_ids"):
                tail = torch.zeros_like(tail)
            longer[name] = torch.cat([value, tail], dim=1)
    return longer


@pytest.mark.parametrize("name", FAMILIES)
def test_image_free_stream_equals_the_model_on_the_text_alone(name: str) -> None:
    if (name, 0) in zoo.UNSUPPORTED:
        pytest.skip(zoo.UNSUPPORTED[name, 0])
    family = zoo.load(name)
    row = family.inputs(n_text=5)
    is_image = row["input_ids"] == family.image_token_id
    seen: list[Tensor] = []

    class Text(vlm_steer.get_method("pai")):  # type: ignore[misc]
        def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
            seen.append(at.branches["text_only"])
            return super().logits(logits, at)  # type: ignore[no-any-return]

    with vlm_steer.steer(family.model, Text(alpha=0.0, gamma=2.0)):
        output = family.model.generate(
            **family.batch([row]), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
    ids = torch.cat([row["input_ids"][~is_image][None], output.sequences[:, -3:-1]], dim=1)
    with torch.no_grad():
        expected = family.model(input_ids=ids).logits[:, -1].float()
    assert_close(seen[2][:, None], expected[:, None])


def test_greedy_decoding_and_beams_are_not_ignored() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        base = family.model.generate(**batch, max_new_tokens=8, **options)
        with vlm_steer.steer(family.model, {"method": "vcd", "alpha": 3.0, "beta": 0.0}):
            steered = family.model.generate(**batch, max_new_tokens=8, **options)
        assert not torch.equal(base, steered)


def test_sampling_draws_from_the_contrasted_distribution() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    results = []
    for backend in ("paired", "separate"):
        torch.manual_seed(0)
        with vlm_steer.steer(family.model, "vcd", backend=backend):
            results.append(
                family.model.generate(
                    **batch, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=8
                )
            )
    assert torch.equal(*results)


def test_several_return_sequences_keep_their_own_branch() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    results = []
    for backend in ("paired", "separate"):
        torch.manual_seed(0)
        with vlm_steer.steer(family.model, "vcd", backend=backend):
            results.append(
                family.model.generate(
                    **batch, do_sample=True, num_return_sequences=3, max_new_tokens=6
                )
            )
    assert results[0].shape[0] == 6
    assert torch.equal(*results)


def test_noise_is_a_function_of_image_and_seed_alone() -> None:
    pixels = torch.randn(3, 3, 8, 8)
    together = noised_images(pixels, None, step=500, seed=1)
    torch.manual_seed(99)
    alone = noised_images(pixels[2:], None, step=500, seed=1)
    assert torch.equal(together[2:], alone)
    assert not torch.equal(alone, noised_images(pixels[2:], None, step=500, seed=2))


def test_all_zero_padding_images_stay_padding() -> None:
    pixels = torch.randn(1, 2, 3, 8, 8)
    pixels[0, 1] = 0
    noised = noised_images(pixels, None, step=500, seed=0)
    assert torch.equal(noised[0, 1], pixels[0, 1])
    assert not torch.equal(noised[0, 0], pixels[0, 0])


def test_users_cache_comes_back_with_users_rows_only() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    with vlm_steer.steer(family.model, "vcd", backend="paired"):
        output = family.model.generate(
            **batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
    assert output.past_key_values.layers[0].keys.shape[0] == 2
    assert "reorder_cache" not in vars(output.past_key_values)


def test_rope_offset_on_the_module_is_the_users_own_afterwards() -> None:
    family = zoo.load("qwen2_5_vl")
    batch = two_rows(family)
    generate(family, batch)
    expected = family.model.model.rope_deltas.clone()
    with vlm_steer.steer(family.model, "pai+vcd", backend="separate"):
        generate(family, batch)
    assert torch.equal(family.model.model.rope_deltas, expected)


def test_alpha_zero_with_the_mask_keeps_greedy_tokens() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    base = family.model.generate(**batch, max_new_tokens=6, do_sample=False)
    with vlm_steer.steer(family.model, {"method": "vcd", "alpha": 0.0, "beta": 0.2}):
        steered = family.model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(base, steered)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 4}])
def test_ways_of_generating_that_cannot_be_followed_are_refused_by_name(
    options: dict[str, int],
) -> None:
    family = zoo.load("llava")
    with (
        vlm_steer.steer(family.model, "vcd"),
        pytest.raises(UnsupportedModelError, match=next(iter(options))),
    ):
        family.model.generate(**family.batch([family.inputs()]), max_new_tokens=3, **options)
    assert ACTIVE.get() is None


def test_a_contrast_without_raw_pixels_says_what_to_pass() -> None:
    family = zoo.load("llava")
    batch = family.batch([family.inputs()])
    features = family.model.model.get_image_features(batch.pop("pixel_values"), return_dict=True)
    with (
        vlm_steer.steer(family.model, "vcd"),
        pytest.raises(UnsupportedModelError, match="pixel_values"),
    ):
        family.model.generate(**batch, mm_encoder_outputs={"image": features}, max_new_tokens=2)


LATE = {
    "icd": {"method": "icd", "disturbance_ids": [30, 40, 50]},
    "icd+vcd": ["vcd", {"method": "icd", "disturbance_ids": [30, 40, 50]}],
    "lqcd": {"method": "lqcd", "leading_ids": [31, 41], "tail": 1},
    "avisc": {"method": "avisc", "alpha": 1.0},
}
"""Contrasts whose prompt passes by itself: it is longer, or waits for the user's."""


def passes(family: zoo.Family) -> list[tuple[int, int]]:
    """Rows and tokens of every pass of the decoder from now on."""
    seen: list[tuple[int, int]] = []

    def count(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        embeds = kwargs.get("inputs_embeds")
        given = kwargs["input_ids"] if embeds is None else embeds
        seen.append((given.shape[0], given.shape[1]))

    family.model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    return seen


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, setting) for name in ("llava", "qwen2_5_vl") for setting in LATE]
    + [("gemma3", "avisc")],
)
def test_streams_go_on_in_one_batch_after_prompts_that_pass_one_by_one(
    name: str, setting: str
) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    with vlm_steer.steer(family.model, LATE[setting], backend="separate"):
        expected = generate(family, batch)
    seen = passes(family)
    with vlm_steer.steer(family.model, LATE[setting], backend="paired"):
        together = generate(family, batch)
    assert_close(together, expected)
    assert torch.equal(together.argmax(dim=-1), expected.argmax(dim=-1))
    n_streams = 3 if setting == "icd+vcd" else 2
    assert [rows for rows, _ in seen] == [2] * n_streams + [2 * n_streams] * 4


@pytest.mark.parametrize("setting", ["icd", "avisc"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2, "top_p": 0.9},
    ],
)
def test_joined_streams_follow_beams_and_sampling(setting: str, options: dict[str, object]) -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    results = []
    for backend in ("paired", "separate"):
        torch.manual_seed(0)
        with vlm_steer.steer(family.model, LATE[setting], backend=backend):
            results.append(family.model.generate(**batch, max_new_tokens=6, **options))
    assert torch.equal(*results)


def test_a_cache_that_a_longer_branch_has_padded_comes_back_as_it_was() -> None:
    family = zoo.load("llava")
    batch = two_rows(family)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    with vlm_steer.steer(family.model, LATE["icd"], backend="paired"):
        cache = family.model.generate(**batch, **options).past_key_values
    with vlm_steer.steer(family.model, LATE["icd"], backend="separate"):
        expected = family.model.generate(**batch, **options).past_key_values
    for layer, of_separate in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, of_separate.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values, of_separate.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("llava", [{"method": "gift", "alpha": 2.0, "layers": "all"}]),  # knows single positions
        ("gemma3", []),  # has windows, in which padding would take up room
    ],
)
def test_a_longer_branch_stays_separate_where_padding_would_be_in_the_way(
    name: str, beside: list[object]
) -> None:
    family = zoo.load(name)
    batch = two_rows(family)
    spec = [*beside, LATE["icd"]]
    seen = passes(family)
    with vlm_steer.steer(family.model, spec):
        generate(family, batch)
    assert {rows for rows, _ in seen} == {2}
    with (
        vlm_steer.steer(family.model, spec, backend="paired"),
        pytest.raises(UnsupportedModelError, match="cannot be joined"),
    ):
        generate(family, batch)
