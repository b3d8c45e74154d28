"""Families with every kind of geometry, explained through and through."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BatchFeature

import vlm_steer
from tests.families import zoo

PICTURE = Image.linear_gradient("L").resize((60, 44)).convert("RGB")


class Processor:
    """What a processor does, for a family whose tokens have no text of their own."""

    chat_template = None
    image_token = ""

    def __init__(self, family: zoo.Family):
        self.family = family

    def __call__(
        self, images: Sequence[Sequence[Image.Image]], text: Sequence[str], **_: Any
    ) -> BatchFeature:
        recipe = self.family.recipe
        blocks, tensors = recipe.look(list(images[0]))
        image = [token for block in blocks for token in block]
        words = [zoo.FIRST_TEXT + len(word) for word in text[0].split()]
        ids = torch.tensor([[zoo.BOS, *image, *words]])
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tensors}
        return BatchFeature(row | recipe.companions(ids[0], tensors))

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(f"t{token}" for token in ids)

    @property
    def tokenizer(self) -> "Processor":
        return self


def explained(name: str, *more: Image.Image) -> vlm_steer.explanation.ExplainResult:
    family = zoo.load(name)
    return vlm_steer.explain(
        family.model,
        Processor(family),
        [PICTURE, *more],
        "what is here",
        methods={"method": "knockout", "queries": ["instruction"], "keys": ["instruction"]},
        detectors=("entropy",),
        checks=1,
        max_new_tokens=4,
    )


@pytest.mark.parametrize(
    "name", ["llava_next", "qwen2_5_vl", "internvl", "idefics3", "gemma3", "mistral3"]
)
def test_every_kind_of_geometry_gets_heat_maps_and_checks(name: str) -> None:
    result = explained(name)
    for number, word in enumerate(result.words):
        heat = result.heatmap(number, sinks=True)
        assert heat.shape == (44, 60)
        seen = result.arm.attention(word.tokens, sinks=True)[result.places[0].has_place]
        assert float(heat.sum()) == pytest.approx(float(seen.sum()), rel=1e-4)
    for arm in result.arms:
        (check,) = arm.checks.values()
        assert check.without_image != check.logprob


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_5_vl", "idefics3"])
def test_several_pictures_have_heat_maps_of_their_own(name: str) -> None:
    result = explained(name, PICTURE.resize((40, 52)))
    first, second = (result.heatmap(0, sinks=True, image=image) for image in range(2))
    assert (first.shape, second.shape) == ((44, 60), (52, 40))
    seen = result.arm.attention(result.words[0].tokens, sinks=True)
    is_placed = result.places[0].has_place | result.places[1].has_place
    assert float(first.sum() + second.sum()) == pytest.approx(
        float(seen[is_placed].sum()), rel=1e-4
    )


def test_keys_of_cross_attention_have_heat_maps_but_no_checks() -> None:
    result = explained("mllama")
    assert float(result.heatmap(0).sum()) > 0
    assert not result.arm.checks
    assert "not made for this word" in result.to_html()


def test_a_family_without_places_is_explained_without_heat_maps() -> None:
    result = explained("instructblip")
    assert result.places is None
    assert "learned queries" in result.why_no_map
    assert result.head_map(0).shape == (zoo.LAYERS, zoo.HEADS)
    assert "There is no heat map" in result.to_html()
