"""Where image tokens lie in their image."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import vlm_steer
from tests.contract.test_contract import generate
from tests.families import zoo
from vlm_steer.engine.grid import geometry_of, grid_of, grids_among
from vlm_steer.engine.hooks import At, Columns, Method, Rows
from vlm_steer.engine.layout import Layout
from vlm_steer.errors import UnsupportedModelError

SIDES = {"llava": 4, "internvl": 2, "idefics3": 2, "paligemma": 4, "gemma3": 2, "aya_vision": 2}
UNKNOWN = {
    "llava_next": "newline",
    "llava_onevision": "newline",
    "mistral3": "no fixed grid",
    "instructblip": "learned queries",
}


def kinds_of(family: zoo.Family, batch: dict[str, Tensor]) -> Tensor:
    ids = (family.image_token_id,)
    return Layout.from_ids(batch["input_ids"], batch["attention_mask"], ids).prompt


@pytest.mark.parametrize("name", SIDES)
def test_the_side_of_a_tile_is_read_off_the_model(name: str) -> None:
    family = zoo.load(name)
    geometry = geometry_of(family.model)
    assert geometry.side == SIDES[name]
    batch = family.batch([family.inputs(images=1), family.inputs(n_text=9, images=2)])
    grid = grid_of(geometry, kinds_of(family, batch), {}, 1)
    assert torch.equal(grid.image >= 0, family.expected_image_mask(batch))
    assert len(grid.shapes[1]) == 2 * len(grid.shapes[0])
    counts = grid.image[1][grid.image[1] >= 0].bincount()
    assert counts.tolist() == [SIDES[name] ** 2] * len(grid.shapes[1])


@pytest.mark.parametrize("name", UNKNOWN)
def test_models_without_a_grid_say_why(name: str) -> None:
    assert UNKNOWN[name] in geometry_of(zoo.load(name).model).unknown


def test_a_kept_class_token_has_no_place_in_a_grid() -> None:
    family = zoo.load("llava")
    family.model.config.vision_feature_select_strategy = "full"
    assert "class token" in geometry_of(family.model).unknown


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_grids_that_the_processor_passes_along_are_followed(name: str) -> None:
    family = zoo.load(name)
    rows = [
        family.inputs(images=2, size=(32, 64)),
        family.inputs(images=0, n_text=20),
        family.inputs(images=1, size=(48, 32)),
    ]
    batch = family.batch(rows)
    grid = grid_of(geometry_of(family.model), kinds_of(family, batch), grids_among(batch), 1)
    sizes = [(h // 2, w // 2) for _, h, w in batch["image_grid_thw"].tolist()]
    assert grid.shapes == ((sizes[0], sizes[1]), (), (sizes[2],))
    assert sizes[0] != sizes[2]
    beams = kinds_of(family, batch).repeat_interleave(3, dim=0)
    repeated = grid_of(geometry_of(family.model), beams, grids_among(batch), 3)
    assert torch.equal(repeated.image, grid.image.repeat_interleave(3, dim=0))
    assert repeated.shapes[3:6] == ((), (), ())


def test_frames_of_a_video_are_images_of_their_own() -> None:
    family = zoo.load("qwen2_vl")
    kinds = torch.tensor([[Columns.SYSTEM, *[Columns.IMAGE] * 12, Columns.INSTRUCTION]])
    grids = {"video_grid_thw": torch.tensor([[2, 4, 6]])}
    grid = grid_of(geometry_of(family.model), kinds, grids, 1)
    assert grid.shapes == (((2, 3), (2, 3)),)
    assert grid.image[0].tolist() == [-1, *[0] * 6, *[1] * 6, -1]


@pytest.mark.parametrize(
    ("name", "count", "grids"),
    [
        ("llava", 17, {}),
        ("qwen2_vl", 6, {}),
        ("qwen2_vl", 7, {"image_grid_thw": torch.tensor([[1, 4, 6]])}),
        ("qwen2_vl", 12, {"image_grid_thw": torch.tensor([[1, 4, 6]])}),
    ],
)
def test_tokens_that_do_not_fit_are_an_error(
    name: str, count: int, grids: dict[str, Tensor]
) -> None:
    kinds = torch.full((1, count), Columns.IMAGE)
    with pytest.raises(UnsupportedModelError, match="cannot tell where image tokens lie"):
        grid_of(geometry_of(zoo.load(name).model), kinds, grids, 1)


def test_spread_puts_a_table_on_the_tokens_of_every_image() -> None:
    family = zoo.load("qwen2_vl")
    batch = family.batch([family.inputs(images=2, size=(32, 64)), family.inputs(images=1)])
    grid = grid_of(geometry_of(family.model), kinds_of(family, batch), grids_among(batch), 1)
    numbers = grid.spread(lambda height, width: torch.arange(height * width).reshape(height, width))
    for row in range(2):
        for image, (height, width) in enumerate(grid.shapes[row]):
            cells = numbers[row][grid.image[row] == image]
            assert cells.tolist() == list(range(height * width))
    assert (numbers[grid.image < 0] == 0).all()


@dataclass(frozen=True, kw_only=True)
class Halves(Method):
    """Rows see only the first half of every image, by way of rows and keys of the grid."""

    rows: ClassVar[Rows] = "text"
    needs_grid: ClassVar[bool] = True

    def mask(self, allowed: Tensor, at: At) -> Tensor:
        assert at.grid is not None
        is_late = at.grid.spread(lambda h, w: torch.arange(h * w).reshape(h, w) >= h * w // 2)
        hidden = at.on_keys(is_late)
        assert hidden.shape == at.columns.kinds.shape
        assert at.on_rows(is_late).shape == at.row_kinds.shape
        assert not (hidden.bool() & ~at.columns.is_image).any()
        return allowed & ~hidden.bool()[:, None]


Halves.name = "halves"


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl"])
def test_hooks_see_the_grid_on_rows_and_keys_in_prompt_and_decoding(name: str) -> None:
    family = zoo.load(name)
    batch = family.batch([family.inputs(), family.inputs(n_text=9)])
    base = generate(family, batch)
    with vlm_steer.steer(family.model, Halves()):
        steered = generate(family, batch, max_new_tokens=14)
        beams = family.model.generate(**batch, num_beams=2, max_new_tokens=3, do_sample=False)
    assert not torch.equal(steered[:, :5], base)
    assert beams.shape[0] == 2


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_method_that_needs_a_grid_is_refused_where_none_is_known(name: str) -> None:
    family = zoo.load(name)
    with pytest.raises(UnsupportedModelError, match=UNKNOWN[name]):
        vlm_steer.attach(family.model, Halves())
