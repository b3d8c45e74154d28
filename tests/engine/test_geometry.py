"""Where image tokens lie in the picture that the user gave."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.families import zoo
from vlm_steer.engine.geometry import Places, _View, place_tokens
from vlm_steer.engine.model import inspect_model
from vlm_steer.errors import UnsupportedModelError


def padded() -> zoo.Look:
    """The original LLaVA: padded to a square."""
    process = zoo.processor(
        "LlavaImageProcessorPil", do_pad=True, size={"shortest_edge": 32}, crop_size=zoo.SQUARE
    )
    return zoo.fixed(process, 16)


def panned() -> zoo.Look:
    """Gemma 3 with crops beside the whole picture."""
    process = zoo.processor(
        "Gemma3ImageProcessorPil",
        size=zoo.SQUARE,
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=8,
        pan_and_scan_max_num_crops=3,
        pan_and_scan_min_ratio_to_activate=1.2,
    )

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], zoo.Inputs]:
        pixels = process(pictures)["pixel_values"]
        return [[zoo.START, *[zoo.IMAGE] * 4, zoo.END] for _ in pixels], {"pixel_values": pixels}

    return look


def halved() -> zoo.Look:
    """LFM2-VL with tiles: both halves of a picture, and the whole."""
    plain = zoo.load("lfm2_vl").recipe.look

    def look(pictures: zoo.Pictures) -> tuple[list[list[int]], zoo.Inputs]:
        parts = []
        for whole in pictures:
            middle = whole.width // 2
            parts += [
                whole.crop((0, 0, middle, whole.height)),
                whole.crop((middle, 0, whole.width, whole.height)),
                whole,
            ]
        return plain(parts)

    return look


class Case(NamedTuple):
    """A processor, and how the values of its tensors belong to tokens."""

    family: str
    tokens: str
    look: Callable[[], zoo.Look] | None = None


CASES = {
    "crop": Case("llava", "cells 4"),
    "pad": Case("llava", "cells 4", padded),
    "stretch": Case("paligemma", "cells 4"),
    "pool": Case("gemma3", "cells 2"),
    "pan and scan": Case("gemma3", "cells 2", panned),
    "tiles and thumbnail": Case("internvl", "cells 2"),
    "split rows": Case("idefics3", "cells 2"),
    "split rows again": Case("smolvlm", "cells 2"),
    "tiles with newlines": Case("llava_next", "packed"),
    "stretched tiles with newlines": Case("llava_onevision", "packed"),
    "any size": Case("mistral3", "cells of 16"),
    "merged patches": Case("qwen2_vl", "patches"),
    "merged patches in windows": Case("qwen2_5_vl", "patches"),
    "patches as pictures": Case("kimi_k25", "patches"),
    "pooled lines of patches": Case("lfm2_vl", "lines 2"),
    "tiles of patches": Case("lfm2_vl", "lines 2", halved),
    "tiles seen across": Case("mllama", "across 2"),
    "patches with places": Case("gemma4", "lines 2"),
}


@functools.cache
def loaded(case: str) -> tuple[zoo.Family, zoo.Look]:
    family = zoo.load(CASES[case].family)
    make = CASES[case].look
    return family, make() if make else family.recipe.look


def prepare(look: zoo.Look, *images: Image.Image) -> zoo.Inputs:
    blocks, tensors = look(list(images))
    ids = [zoo.BOS, *(token for block in blocks for token in block), zoo.FIRST_TEXT]
    return {"input_ids": torch.tensor([ids]), **tensors}


def places_of(case: str, size: tuple[int, int]) -> Places:
    family, look = loaded(case)
    return place_tokens(inspect_model(family.model), functools.partial(prepare, look), size)


def sums(case: str, inputs: zoo.Inputs, pixels: Tensor) -> Tensor:
    """``[tokens]``: values of the pixel tensor added up token by token, as the model reads it."""
    family, _ = loaded(case)
    kind, _, number = CASES[case].tokens.rpartition(" ")
    if kind == "" and number == "patches":
        grid = inputs["image_grid_thw"].prod().item()
        return pixels.reshape(grid // 4, -1).sum(dim=1)
    if kind == "lines":
        cells = pixels.sum(dim=2).reshape(-1, 1, 4, 4)
        return torch.nn.functional.avg_pool2d(cells, 4 // int(number)).flatten()
    pixels = pixels.reshape(-1, *pixels.shape[-3:]).sum(dim=1)
    side = 4 if number == "packed" else int(number)
    if kind == "cells of":
        kernel = (side, side)
    else:
        kernel = (pixels.shape[-2] // side, pixels.shape[-1] // side)
    cells = torch.nn.functional.avg_pool2d(pixels[:, None], kernel, divisor_override=1).flatten(1)
    if kind == "across":
        return torch.nn.functional.pad(cells, (1, 0)).flatten()  # the class tokens
    if number != "packed":
        return cells.flatten()
    inner = family.model.model
    options = {"vision_feature_select_strategy": "full"} if "next" in CASES[case].family else {}
    newline = torch.zeros(1)
    packed, _ = inner.pack_image_features(
        [cells[..., None]], inputs["image_sizes"], image_newline=newline, **options
    )
    return packed[0][:, 0]


def picture(size: tuple[int, int], square: tuple[int, int, int, int] | None) -> Image.Image:
    image = Image.new("RGB", size, "black")
    if square:
        image.paste("white", square)
    return image


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=4)
@given(data=st.data())
def test_a_bright_square_lies_in_the_boxes_of_the_tokens_that_see_it(
    case: str, data: st.DataObject
) -> None:
    width, height = data.draw(st.tuples(st.integers(40, 200), st.integers(40, 200)))
    side = data.draw(st.integers(min(width, height) // 4, min(width, height) // 2))
    left = data.draw(st.integers(0, width - side))
    top = data.draw(st.integers(0, height - side))
    square = (left, top, left + side, top + side)
    _, look = loaded(case)
    dark, bright, full = (
        prepare(look, picture((width, height), box))
        for box in (None, square, (0, 0, width, height))
    )
    low = dark["pixel_values"].double()
    seen = sums(case, bright, bright["pixel_values"].double() - low)
    most = sums(case, full, full["pixel_values"].double() - low)
    places = places_of(case, (width, height))
    shows = most > 1e-3 * most.max()
    # A line of pixels at the border of padding is a blend of both, and may have no place.
    assert places.has_place[most > 0.2 * most.max()].all()
    assert not places.has_place[most == 0].any()
    kept = shows & places.has_place
    share = seen[kept] / most[kept]
    boxes = places.boxes[kept]
    corners = torch.tensor(square, dtype=torch.float64)
    overlap = torch.minimum(boxes[:, 2:], corners[2:]) - torch.maximum(boxes[:, :2], corners[:2])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    inside = overlap.clamp(min=0).prod(dim=1) / area
    whole = area > 0.5 * area.max()  # slivers at the border of padding are all blur
    assert (share - inside)[whole].abs().max() < 0.2
    assert (share - inside)[whole].abs().mean() < 0.05


def several(case: str, sizes: Sequence[tuple[int, int]]) -> list[Places]:
    """Where the tokens of several pictures in one prompt lie, picture by picture."""
    family, look = loaded(case)
    others = [picture(size, (0, 0, *size)) for size in sizes]

    def prepare_with(image: Image.Image, at: int) -> zoo.Inputs:
        return prepare(look, *others[:at], image, *others[at + 1 :])

    return [
        place_tokens(
            inspect_model(family.model), functools.partial(prepare_with, at=i), size, image=i
        )
        for i, size in enumerate(sizes)
    ]


SIZES = {
    "any size": "image_sizes",
    "pooled lines of patches": "spatial_shapes",
    "patches with places": "image_position_ids",
}
"""Cases whose grids the processor tells, and by which argument."""


@pytest.mark.parametrize("case", CASES)
def test_each_of_several_pictures_has_its_own_tokens(case: str) -> None:
    sizes = [(90, 60), (50, 70)]
    found = several(case, sizes)
    assert not (found[0].has_place & found[1].has_place).any()
    for places, size in zip(found, sizes, strict=True):
        mine = places.boxes[places.has_place]
        if case == "stretched tiles with newlines":  # several pictures are padded, and not tiled
            widest = (mine[:, 2:] - mine[:, :2]).max().item()
            assert widest == pytest.approx(max(size) / 4, rel=0.1)
            continue
        alone = places_of(case, size)
        expected = alone.boxes[alone.has_place]
        torch.testing.assert_close(mine, expected, rtol=0, atol=0.51)


@pytest.mark.parametrize("case", SIZES)
def test_without_its_size_one_picture_has_places_and_several_have_none(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = places_of(case, (90, 60))
    family, look = loaded(case)

    def unsaid(pictures: zoo.Pictures) -> tuple[list[list[int]], zoo.Inputs]:
        blocks, tensors = look(pictures)
        return blocks, {name: tensors[name] for name in tensors if name != SIZES[case]}

    monkeypatch.setattr(f"{__name__}.loaded", lambda _: (family, unsaid))
    torch.testing.assert_close(places_of(case, (90, 60)).boxes, expected.boxes)
    with pytest.raises(UnsupportedModelError, match="no fixed grid of patches"):
        several(case, [(90, 60), (50, 70)])


def test_a_tenth_of_a_pixel_beside_padding_is_no_place() -> None:
    places = places_of("tiles seen across", (43, 56))
    boxes = places.boxes[places.has_place]
    assert (boxes[:, 2:] - boxes[:, :2]).min() > 1


@pytest.mark.parametrize("case", ["pad", "split rows", "tiles with newlines", "merged patches"])
def test_a_heat_map_keeps_the_mass_of_the_tokens_and_shows_only_the_picture(case: str) -> None:
    places = places_of(case, (90, 60))
    values = torch.rand(len(places.boxes))
    heat = places.spread(values)
    assert heat.shape == (60, 90)
    assert float(heat.sum()) == pytest.approx(float(values[places.has_place].sum()), rel=1e-4)
    assert (heat >= 0).all()


def test_a_centre_crop_leaves_the_sides_of_the_picture_unseen() -> None:
    heat = places_of("crop", (120, 40)).spread(torch.ones(16))
    seen = heat.sum(dim=0) > 0
    assert 38 <= int(seen.sum()) <= 42
    assert not seen[:38].any()
    assert not seen[-38:].any()


def test_padding_has_no_place() -> None:
    places = places_of("pad", (120, 40))
    assert places.has_place.reshape(4, 4).any(dim=1).tolist() == [False, True, True, False]


def test_newlines_between_tiles_have_no_place() -> None:
    places = places_of("tiles with newlines", (48, 32))
    nowhere = (~places.has_place).nonzero().flatten().tolist()
    rows = len(nowhere)
    columns = (len(places.boxes) - 16) // rows
    assert nowhere == [16 + columns * (row + 1) - 1 for row in range(rows)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("instructblip", "learned queries"),
        ("hunyuan_vl", "newline"),
    ],
)
def test_models_whose_tokens_have_no_place_say_why(name: str, reason: str) -> None:
    family = zoo.load(name)
    with pytest.raises(UnsupportedModelError, match=f"cannot be placed.*{reason}"):
        place_tokens(
            inspect_model(family.model), functools.partial(prepare, family.recipe.look), (48, 32)
        )


@pytest.mark.parametrize(
    "name",
    [
        *("CLIP", "Ernie4_5_VLMoe", "GlmImage", "Glm5Next", "Janus"),
        *("Mllama", "Ovis2", "PaddleOCRVL", "Pixtral", "Siglip2", "VideoLlama3"),
    ],
)
def test_every_value_shows_the_point_that_is_said_of_it(name: str) -> None:
    """With the processors as they come, whatever shape they return."""
    process = zoo.processor(f"{name}ImageProcessorPil")
    size, square, blur = (150, 100), (60, 30, 110, 80), 4
    view = _View.of(process, size)
    low, seen, high = (
        process(picture(size, box))["pixel_values"].double()
        for box in (None, square, (0, 0, *size))
    )
    is_bright = (seen - low) / (high - low).where(view.is_inside, torch.ones(())) > 0.5
    edges = [
        *(view.x - square[0], square[2] - view.x),
        *(view.y - square[1], square[3] - view.y),
    ]
    depth = torch.stack(edges).amin(dim=0)
    assert is_bright[view.is_inside & (depth > blur)].all()
    assert not is_bright[view.is_inside & (depth < -blur)].any()
    assert (view.is_inside & (depth > blur)).any()


def test_the_embedded_model_is_placed_through_its_own_processor() -> None:
    import vlm_steer
    from vlm_steer.generation import encode, render_prompt

    model, processor = vlm_steer.load_tiny()
    prompt = render_prompt(processor, "What is here?")
    size = (96, 80)
    places = place_tokens(
        inspect_model(model), lambda image: encode(processor, [prompt], [image]), size
    )
    side = math.isqrt(len(places.boxes))
    assert side**2 == len(places.boxes)
    pitch = (places.boxes[1, 0] - places.boxes[0, 0]).item()
    np.testing.assert_allclose(places.boxes[side, 1] - places.boxes[0, 1], pitch, rtol=0.25)
