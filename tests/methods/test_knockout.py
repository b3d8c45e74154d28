"""Attention knockout where its effect is known in advance."""

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.families import zoo
from tests.methods.views import GENERATED, IMAGE, INSTRUCTION, SYSTEM, view
from vlm_steer.errors import ConfigError, UnsupportedModelError
from vlm_steer.methods.knockout import Knockout

KINDS = [SYSTEM, IMAGE, IMAGE, INSTRUCTION, INSTRUCTION, GENERATED, GENERATED]
CAUSAL = torch.ones(1, 7, 7, dtype=torch.bool).tril()
# Mllama's tokens before the image attend to it as well.
IMAGE_GONE = {"method": "knockout", "queries": ["system", "instruction", "generated"]}


@pytest.mark.parametrize(
    ("queries", "keys", "closed"),
    [
        (("instruction",), ("image",), {(3, 1), (3, 2), (4, 1), (4, 2)}),
        (("last",), ("system",), {(4, 0), (5, 0), (6, 0)}),
        (("image",), ("image",), {(2, 1)}),
        (("generated",), ("instruction", "generated"), {(5, 3), (5, 4), (6, 3), (6, 4), (6, 5)}),
        (("system",), ("image",), set()),
    ],
)
def test_exactly_the_named_views_are_cut(
    queries: tuple[str, ...], keys: tuple[str, ...], closed: set[tuple[int, int]]
) -> None:
    method = Knockout(queries=queries, keys=keys)  # type: ignore[arg-type]
    cut = CAUSAL & ~method.mask(CAUSAL, view(KINDS, rows=7))
    assert {(i, j) for _, i, j in cut.nonzero().tolist()} == closed


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "mllama"])
def test_an_answer_cut_off_from_the_image_does_not_depend_on_it(name: str) -> None:
    family = zoo.load(name)
    batch = family.batch([family.inputs(n_text=5), family.inputs(n_text=9, seed=1)])
    other = {**batch, "pixel_values": batch["pixel_values"].flip(-1)}

    def logits(inputs: dict[str, Tensor]) -> Tensor:
        output = family.model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits)

    assert not torch.equal(logits(batch), logits(other))
    with vlm_steer.steer(family.model, IMAGE_GONE):
        assert torch.equal(logits(batch), logits(other))
        assert logits(batch).isfinite().all()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_image_tokens_are_cut_one_by_one_or_all_together(name: str) -> None:
    family = zoo.load(name)
    batch = family.batch([family.inputs(n_text=5), family.inputs(n_text=9, seed=1)])
    count = int(family.expected_image_mask(batch)[0].sum())

    def logits(**options: object) -> Tensor:
        spec = {"method": "knockout", "queries": ["image", "instruction", "generated"], **options}
        with vlm_steer.steer(family.model, spec):
            output = family.model.generate(
                **batch,
                max_new_tokens=3,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return torch.stack(output.logits)

    whole = logits()
    assert torch.equal(logits(image_tokens=list(range(count))), whole)
    first, last = logits(image_tokens=[0]), logits(image_tokens=[count - 1])
    assert not torch.equal(first, last)
    assert not torch.equal(first, whole)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_static_cache_and_a_dynamic_one_are_cut_alike(implementation: str) -> None:
    family = zoo.load("llava", attn_implementation=implementation)
    batch = family.batch([family.inputs(n_text=5), family.inputs(n_text=9, seed=1)])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    spec = {"method": "knockout", "queries": ["generated"], "keys": ["generated", "image"]}
    with vlm_steer.steer(family.model, spec):
        results = [
            family.model.generate(**batch, **options, **cache, return_dict_in_generate=True)
            for cache in ({}, {"cache_implementation": "static", "disable_compile": True})
        ]
    dynamic, static = (torch.stack(result.logits) for result in results)
    torch.testing.assert_close(dynamic, static, rtol=1e-4, atol=1e-4)


def test_an_option_without_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match="keys has no effect"):
        Knockout(queries=(), keys=("image",))
    with pytest.raises(ConfigError, match="queries has no effect"):
        Knockout(queries=("last",), keys=())


def test_a_kind_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="names a kind twice"):
        Knockout(queries=("last", "last"))
    with pytest.raises(ConfigError, match="queries"):
        vlm_steer.config.resolve({"method": "knockout", "queries": ["lats"]})


def test_numbers_of_image_tokens_need_image_keys_and_count_from_zero() -> None:
    with pytest.raises(ConfigError, match="image_tokens has no effect"):
        Knockout(keys=("generated",), image_tokens=(0,))
    with pytest.raises(ConfigError, match=r"image_tokens \[-1\] are negative"):
        Knockout(image_tokens=(-1, 2))


def test_single_image_tokens_are_refused_where_the_decoder_has_none() -> None:
    spec = {"method": "knockout", "queries": ["instruction"], "image_tokens": [0]}
    with pytest.raises(UnsupportedModelError, match="keeps its image in the keys of cross"):
        vlm_steer.attach(zoo.load("mllama").model, spec)
