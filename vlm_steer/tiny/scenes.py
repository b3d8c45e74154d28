"""Scenes of the little world: drawn on demand, with ground truth in COCO format.

A scene is a pure function of its split and its index. Composition, placement and annotations use
stable arithmetic only; the pixels add numpy's Gaussian noise and are therefore tied to its release.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_steer.errors import DataError
from vlm_steer.tiny.dice import Dice
from vlm_steer.tiny.icons import BODY, DETAIL, EXTENT, RESOLUTION, icon
from vlm_steer.tiny.world import CATEGORIES, COLOURS, Rule, compose, compose_broad

__all__ = [
    "CATEGORIES",
    "IMAGE_SIZE",
    "SCENES_PER_SPLIT",
    "SPLITS",
    "TRAINING_SCENES",
    "Scene",
    "SceneObject",
    "annotations",
    "footprints",
    "image",
    "reference_captions",
    "render",
    "scene",
    "training_annotations",
]

SPLITS = ("iid", "broken", "validation")
"""``iid``: the prior is right; ``broken``: it is wrong; ``validation``: even indices follow the
first rule, odd ones the second."""

SCENES_PER_SPLIT = 1500
TRAINING_SCENES = 4000
"""How many training scenes the training annotations describe; training itself draws many more."""

IMAGE_SIZE = 96
"""Width and height of every image, in pixels."""

# The last two are for training: `broad` has no company at all, `train` follows the iid rule.
_FIRST_IMAGE_ID = {
    "iid": 100_000,
    "broken": 200_000,
    "validation": 300_000,
    "train": 1_000_000,
    "broad": 900_000_000,
}
_SMALLEST, _LARGEST = 13, 38
_PLACEMENTS = 6
_TILT_DEGREES = 30
_TRIG_STEPS = 1024  # sines are rounded to this grid, so that no libm can move a pixel
_GROUND = {
    "kitchen": ((226, 214, 196), (168, 140, 112)),
    "office": ((206, 212, 222), (132, 136, 148)),
    "street": ((176, 200, 224), (112, 112, 116)),
    "beach": ((150, 206, 236), (228, 208, 160)),
    "park": ((172, 214, 240), (112, 164, 92)),
}

Canvas = NDArray[np.float32]


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene.

    Attributes:
        category: its name, one of ``CATEGORIES``.
        colour: its colour word.
        x: centre, pixels from the left edge.
        y: centre, pixels from the top edge.
        size: side of the square in which the upright silhouette is drawn, pixels.
        tilt: rotation in degrees, -30 to 30.
        flipped: whether it is mirrored left to right.
        opacity: how much it covers what lies behind, 0.4 to 1.
    """

    category: str
    colour: str
    x: int
    y: int
    size: int
    tilt: int
    flipped: bool
    opacity: float


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image and its annotations.

    Attributes:
        split: the stream that it belongs to.
        index: its place in the stream, from 0.
        rule: whether the usual company was kept (``iid``) or taken away (``broken``).
        setting: kitchen, office, street, beach or park.
        objects: in painting order; later ones cover earlier ones.
    """

    split: str
    index: int
    rule: Rule
    setting: str
    objects: tuple[SceneObject, ...]

    @property
    def image_id(self) -> int:
        """The COCO image id, unique across splits."""
        return _FIRST_IMAGE_ID[self.split] + self.index


class Footprint(NamedTuple):
    """Where an object falls.

    Attributes:
        body: how much of each pixel the object covers, ``[height, width]``, in quarters, 0 to 4.
        detail: how much of it is dark, likewise.
        rows: the rows of the image that the window takes.
        columns: its columns.
    """

    body: NDArray[np.uint8]
    detail: NDArray[np.uint8]
    rows: slice
    columns: slice


def scene(split: str, index: int) -> Scene:
    """Return a scene, always the same one for the same arguments.

    Args:
        split: one of ``SPLITS``, or ``train`` / ``broad`` for the two training streams.
        index: 0 to ``SCENES_PER_SPLIT`` - 1; the training streams do not end.

    Raises:
        DataError: the split or the index does not exist.
    """
    _check(split, index)
    dice = Dice("vlm_steer.tiny", split, index)
    rule: Rule = "iid"
    if split == "broken" or (split == "validation" and index % 2 == 1):
        rule = "broken"
    setting, names = compose_broad(dice) if split == "broad" else compose(dice, rule)
    placed: list[SceneObject] = []
    for name in names:
        placed.append(_place(dice, name, placed))
    return Scene(split, index, rule, setting, tuple(placed))


def render(scene: Scene) -> Image.Image:
    """Paint a scene.

    Returns:
        An RGB image of ``IMAGE_SIZE`` x ``IMAGE_SIZE`` pixels.
    """
    return Image.fromarray(paint(scene))


def paint(scene: Scene) -> NDArray[np.uint8]:
    """Paint a scene into an array ``[IMAGE_SIZE, IMAGE_SIZE, 3]``, 0 to 255."""
    dice = Dice("vlm_steer.tiny", scene.split, scene.index, "paint")
    canvas = _background(dice, scene.setting)
    for thing, footprint in zip(scene.objects, footprints(scene), strict=True):
        colour = np.array(COLOURS[thing.colour], dtype=np.float32)
        region = canvas[footprint.rows, footprint.columns]
        for coverage, shade in ((footprint.body, 1.0), (footprint.detail, 0.45)):
            alpha = (coverage * np.float32(thing.opacity / 4))[:, :, None]
            region += alpha * (colour * shade + 24 * (1 - shade) - region)
    sigma = dice.between(4, 18)
    generator = np.random.default_rng([scene.image_id, IMAGE_SIZE])
    canvas += np.float32(sigma) * generator.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def visible_masks(scene: Scene) -> NDArray[np.bool_]:
    """Return which pixels show which object, ``[objects, IMAGE_SIZE, IMAGE_SIZE]`` boolean.

    A pixel shows the last object that covers at least half of it.
    """
    masks = np.zeros((len(scene.objects), IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    for position, footprint in enumerate(footprints(scene)):
        covered = footprint.body >= 2
        region = (footprint.rows, footprint.columns)
        masks[(slice(0, position), *region)] &= ~covered
        masks[(position, *region)] = covered
    return masks


def footprints(scene: Scene) -> Iterator[Footprint]:
    """Yield where each object of a scene falls, in painting order."""
    for thing in scene.objects:
        yield _footprint(thing)


@lru_cache(maxsize=len(SPLITS))
def annotations(split: str) -> dict[str, Any]:
    """Return the ground truth of a split in COCO's instances format.

    Boxes are ``[left, top, width, height]`` in pixels and areas count visible pixels. An object of
    which nothing is visible has no annotation. Every image also records its ``rule`` and
    ``setting``; every annotation its ``colour``. The dictionary is shared: copy before changing.

    Args:
        split: one of ``SPLITS``.

    Raises:
        DataError: there is no such split.
    """
    _check(split, 0)
    if split not in SPLITS:
        raise _unknown_split(split)
    return _coco(split, SCENES_PER_SPLIT)


@lru_cache(maxsize=1)
def training_annotations() -> dict[str, Any]:
    """Return the ground truth of the first ``TRAINING_SCENES`` training scenes, in COCO's format.

    POPE's popular and adversarial questions take their frequencies and co-occurrences from here:
    they are what the model could learn. The dictionary is shared: copy before changing.
    """
    return _coco("train", TRAINING_SCENES)


def image(split: str, image_id: int) -> Image.Image:
    """Paint the image that ``annotations(split)`` lists under this id.

    Raises:
        DataError: the split has no such image.
    """
    _check(split, 0)
    return render(scene(split, image_id - _FIRST_IMAGE_ID[split]))


@lru_cache(maxsize=len(SPLITS))
def reference_captions(split: str) -> dict[str, Any]:
    """Return true captions of a split in COCO's captions format, two for each image.

    They name visible objects only, each of them: the first caption in sentences, the second as
    a plain list. The dictionary is shared: copy before changing.

    Args:
        split: one of ``SPLITS``.

    Raises:
        DataError: there is no such split.
    """
    from vlm_steer.tiny.language import listing, long_caption

    truth = annotations(split)
    captions: list[dict[str, Any]] = []
    for entry in truth["images"]:
        seen = scene(split, entry["id"] - _FIRST_IMAGE_ID[split])
        is_visible = np.asarray(visible_masks(seen).any(axis=(1, 2)))
        visible = Scene(
            seen.split,
            seen.index,
            seen.rule,
            seen.setting,
            tuple(thing for thing, shown in zip(seen.objects, is_visible, strict=True) if shown),
        )
        dice = Dice("vlm_steer.tiny", split, seen.index, "reference")
        for caption in (long_caption(dice, visible, drop=0.0), listing(visible)):
            captions.append({"id": len(captions) + 1, "image_id": entry["id"], "caption": caption})
    return {"images": truth["images"], "annotations": captions}


def _check(split: str, index: int) -> None:
    if split not in _FIRST_IMAGE_ID:
        raise _unknown_split(split)
    if index < 0 or (split in SPLITS and index >= SCENES_PER_SPLIT):
        raise DataError(
            f"no scene {index} in split {split!r}, which has {SCENES_PER_SPLIT}: "
            f"image ids run from {_FIRST_IMAGE_ID[split]} "
            f"to {_FIRST_IMAGE_ID[split] + SCENES_PER_SPLIT - 1}"
        )


def _unknown_split(split: str) -> DataError:
    return DataError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")


def _place(dice: Dice, category: str, placed: list[SceneObject]) -> SceneObject:
    size = round(_SMALLEST * (_LARGEST / _SMALLEST) ** dice.fraction())
    best: tuple[float, int, int] | None = None
    for _ in range(_PLACEMENTS):
        x = dice.integer(size // 2 + 1, IMAGE_SIZE - size // 2 - 2)
        y = dice.integer(size // 2 + 1, IMAGE_SIZE - size // 2 - 2)
        overlap = sum(_overlap(x, y, size, other) for other in placed)
        if best is None or overlap < best[0]:
            best = (overlap, x, y)
        if overlap == 0:
            break
    assert best is not None
    return SceneObject(
        category=category,
        colour=dice.pick(tuple(COLOURS)),
        x=best[1],
        y=best[2],
        size=size,
        tilt=dice.integer(-_TILT_DEGREES, _TILT_DEGREES),
        flipped=dice.chance(0.5),
        opacity=dice.between(0.4, 1.0) if dice.chance(0.5) else 1.0,
    )


def _overlap(x: int, y: int, size: int, other: SceneObject) -> float:
    """Shared area of two upright squares over the area of the smaller one."""
    reach = (size + other.size) / 2
    width = min(reach - abs(x - other.x), size, other.size)
    height = min(reach - abs(y - other.y), size, other.size)
    return max(width, 0.0) * max(height, 0.0) / min(size, other.size) ** 2


@lru_cache(maxsize=512)  # painting and masking a scene ask for the same ones
def _footprint(thing: SceneObject) -> Footprint:
    reach = math.ceil(0.7 * thing.size)
    top, left = max(thing.y - reach, 0), max(thing.x - reach, 0)
    bottom, right = min(thing.y + reach, IMAGE_SIZE), min(thing.x + reach, IMAGE_SIZE)
    # Two samples per pixel and direction, at its quarters; cells count from the mask's corner.
    down = (np.arange(2 * top, 2 * bottom) + 0.5) / 2 - thing.y
    across = (np.arange(2 * left, 2 * right) + 0.5) / 2 - thing.x
    cosine, sine = _turn(thing.tilt)
    mirror = -1.0 if thing.flipped else 1.0
    scale, origin = RESOLUTION / thing.size, EXTENT * RESOLUTION / 2
    along, over = mirror * cosine * scale * across, mirror * sine * scale * down
    column = (along + origin)[None, :] + over[:, None]
    row = (-sine * scale * across + origin)[None, :] + (cosine * scale * down)[:, None]
    mask = icon(thing.category)
    cells = mask.ravel().take(row.astype(np.int32) * mask.shape[1] + column.astype(np.int32))
    summed = cells[::2, ::2] + cells[1::2, ::2] + cells[::2, 1::2] + cells[1::2, 1::2]
    return Footprint(
        summed % DETAIL // BODY, summed // DETAIL, slice(top, bottom), slice(left, right)
    )


def _turn(tilt: int) -> tuple[float, float]:
    radians = math.radians(tilt)
    return (
        round(math.cos(radians) * _TRIG_STEPS) / _TRIG_STEPS,
        round(math.sin(radians) * _TRIG_STEPS) / _TRIG_STEPS,
    )


def _background(dice: Dice, setting: str) -> Canvas:
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    horizon = dice.integer(IMAGE_SIZE * 3 // 10, IMAGE_SIZE * 7 // 10)
    upper, lower = _GROUND[setting]
    for colour, rows in ((upper, slice(0, horizon)), (lower, slice(horizon, None))):
        canvas[rows] = [channel + dice.between(-22, 22) for channel in colour]
    for _ in range(dice.integer(0, 5)):
        _scribble(dice, canvas)
    return canvas


def _scribble(dice: Dice, canvas: Canvas) -> None:
    """Add a faint shape that is no object."""
    x, y = dice.integer(0, IMAGE_SIZE - 1), dice.integer(0, IMAGE_SIZE - 1)
    half_width, half_height = dice.integer(3, 14), dice.integer(3, 14)
    rows = slice(max(y - half_height, 0), y + half_height + 1)
    columns = slice(max(x - half_width, 0), x + half_width + 1)
    grid = np.arange(IMAGE_SIZE)
    dx = (grid[None, columns] - x) / half_width
    dy = (grid[rows, None] - y) / half_height
    oval = dice.chance(0.5)
    inside = (dx**2 + dy**2 <= 1) if oval else np.ones((dy.size, dx.size), dtype=bool)
    colour = np.array(COLOURS[dice.pick(tuple(COLOURS))], dtype=np.float32)
    alpha = (inside * np.float32(dice.between(0.15, 0.5)))[:, :, None]
    canvas[rows, columns] += alpha * (colour - canvas[rows, columns])


def _coco(split: str, count: int) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for index in range(count):
        drawn = scene(split, index)
        images.append(
            {
                "id": drawn.image_id,
                "file_name": f"{split}_{index:06d}.png",
                "width": IMAGE_SIZE,
                "height": IMAGE_SIZE,
                "rule": drawn.rule,
                "setting": drawn.setting,
            }
        )
        for thing, mask in zip(drawn.objects, visible_masks(drawn), strict=True):
            if mask.any():
                found.append(_annotation(len(found) + 1, drawn.image_id, thing, mask))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)]
    return {"images": images, "annotations": found, "categories": categories}


def _annotation(
    number: int, image_id: int, thing: SceneObject, mask: NDArray[np.bool_]
) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORIES.index(thing.category) + 1,
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "colour": thing.colour,
    }
