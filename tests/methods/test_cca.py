"""CCA: rings on tiny models, where positions and mask are known in advance."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlm_steer
from tests.contract.test_contract import generate, two_rows
from tests.families import zoo
from vlm_steer import functional as F
from vlm_steer.errors import ConfigError, UnsupportedModelError

RINGS = F.concentric_rings(4, 4).flatten()


@pytest.fixture
def family() -> zoo.Family:
    return zoo.load("llava")


def watched(family: zoo.Family, batch: dict[str, Tensor], spec: Any) -> tuple[Tensor, Tensor]:
    """Position ids of the prompt, and the mask ``[batch, rows, key]`` of its first layer."""
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.setdefault("positions", kwargs["position_ids"])

    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def noted(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any) -> Any:
        if module.is_causal and "language_model" in spot[module]:
            seen.setdefault("mask", mask)
        return kernel(module, query, key, value, mask, **kw)

    spot = {module: name for name, module in family.model.named_modules()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", noted)
        with vlm_steer.steer(family.model, spec), torch.no_grad():
            decoder = family.model.get_decoder()
            handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
            family.model(**batch)
            handle.remove()
    return seen["positions"], seen["mask"][:, 0]


def test_positions_and_mask_are_those_of_the_functional_form(family: zoo.Family) -> None:
    batch = family.batch([family.inputs(n_text=5, images=2), family.inputs(n_text=9)])
    positions, mask = watched(family, batch, "cca")
    is_image = family.expected_image_mask(batch)
    real = batch["attention_mask"].bool()
    images = torch.where(is_image, (is_image.long().cumsum(1) - 1) // 16, -1)
    rings = torch.zeros_like(images)
    rings[is_image] = RINGS.repeat(3)
    expected = F.concentric_positions(rings, images, mask=real)
    # Without position_ids of its own, a plain forward counts padding: a constant per row.
    offset = (~real).sum(dim=1, keepdim=True)
    assert torch.equal((positions - offset)[real], expected[real])
    allowed = F.concentric_mask(rings, images, mask=real)
    assert torch.equal(mask[real], allowed[real])


def test_an_image_takes_as_many_positions_as_it_has_rings(family: zoo.Family) -> None:
    batch = family.batch([family.inputs(n_text=6)])
    positions, _ = watched(family, batch, "cca")
    assert positions[0].tolist() == [0, 1, 2, 3, *(4 + RINGS).tolist(), *range(6, 12)]


def test_the_two_parts_differ_and_make_up_the_whole(family: zoo.Family) -> None:
    batch = two_rows(family)
    results = []
    for parts in ("positions", "mask", "both"):
        with vlm_steer.steer(family.model, {"method": "cca", "parts": parts}):
            results.append(generate(family, batch))
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[2])


def test_models_with_several_position_axes_take_the_mask_alone() -> None:
    family = zoo.load("qwen2_5_vl")
    with pytest.raises(UnsupportedModelError, match="several axes"):
        vlm_steer.attach(family.model, "cca")
    batch = family.batch([family.inputs(size=(64, 64)), family.inputs(n_text=9)])
    base = generate(family, batch)
    with vlm_steer.steer(family.model, "cca_mask"):
        assert not torch.equal(generate(family, batch), base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": "rings"}, "parts must be both, positions or mask"),
        ({"parts": "positions", "layers": [0, 2]}, "layers has no effect here"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vlm_steer.steer(None, {"method": "cca", **options}).__enter__()
