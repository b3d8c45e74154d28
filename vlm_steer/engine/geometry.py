"""Where each image token lies in the picture that a user gave, in the picture's own pixels.

Processors stretch, crop, pad, tile and cut into patches, and families differ in which of it they
do. Nothing of that is assumed: the processor prepares a black and a white picture and two ramps,
all of the user's size, and what comes out says of every value which point of the picture it shows,
and whether it shows the picture at all. Where a prompt has several pictures, one of them changes
and the others stay, so values that show another one change as little as padding does.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm_steer.engine.grid import Geometry, grid_of, grids_among
from vlm_steer.engine.hooks import Columns
from vlm_steer.engine.inputs import pixel_names
from vlm_steer.engine.layout import is_image_token
from vlm_steer.engine.model import ModelInfo
from vlm_steer.errors import UnsupportedModelError

__all__ = ["Places", "Prepare", "place_tokens"]

Prepare = Callable[[Image.Image], Mapping[str, Any]]
"""From a picture to what the model is given for a prompt about it, ``input_ids`` included.

Where the prompt has several pictures, the others have to be the same each time.
"""

_BRIGHTEST = 255
_STRAY = 0.35
"""Largest distance of a patch from its place in an even grid, in patches."""
_SIZE_NAMES = ("spatial_shapes", "image_sizes")
"""Arguments that give the height and width of every row of pixels."""
_PLACES_NAME = "image_position_ids"
"""The argument that gives the column and line of every patch, -1 for padding."""
_SLIVER = 0.05
"""Share of a token's width or height below which it shows padding: the measured edge of the picture
is this inexact where the processor blends it with padding."""


@dataclass(frozen=True, eq=False, slots=True)
class Places:
    """The places of image tokens in one picture; of its keys, where it is seen across.

    Attributes:
        boxes: ``[tokens, 4]`` float64, all image tokens of the prompt: left, top, right and bottom
            edge in pixels of the picture, cut at its borders; NaN for tokens that show none of it,
            such as padding, newlines and those of other pictures.
        size: Width and height of the picture.
    """

    boxes: Tensor
    size: tuple[int, int]

    @property
    def has_place(self) -> Tensor:
        """``[tokens]`` bool."""
        return ~self.boxes.isnan().any(dim=1)

    def spread(self, values: Tensor) -> Tensor:
        """Lay one value per token over the picture, evenly over each token's box.

        Where boxes overlap, as those of tiles and of the whole picture do, they add up; the sum
        over the picture is that of the values of all tokens with a place.

        Args:
            values: ``[tokens]``, such as attention.

        Returns:
            ``[height, width]`` float32, values per pixel.
        """
        kept = self.has_place.to(values.device)
        boxes = self.boxes.to(values.device)[kept]
        width, height = self.size
        columns = _coverage(boxes[:, 0], boxes[:, 2], width)
        rows = _coverage(boxes[:, 1], boxes[:, 3], height)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return rows.T @ (columns * (values[kept].double() / area).float()[:, None])


def _coverage(start: Tensor, end: Tensor, length: int) -> Tensor:
    """``[boxes, length]`` float32: how much of each pixel lies between the edges of each box."""
    edge = torch.arange(length, device=start.device, dtype=start.dtype)
    return (
        (torch.minimum(end[:, None], edge + 1) - torch.maximum(start[:, None], edge))
        .clamp(min=0)
        .float()
    )


def place_tokens(
    info: ModelInfo, prepare: Prepare, size: tuple[int, int], *, image: int = 0
) -> Places:
    """Find the places of the image tokens of a picture, or of its keys in cross-attention layers.

    Args:
        info: The model.
        prepare: The model's processor, with the prompt that goes with the picture.
        size: Width and height of the picture in pixels.
        image: Which of the prompt's pictures it is.

    Raises:
        UnsupportedModelError: The image tokens have no places, or these cannot be told.
    """
    view = _View.of(prepare, size)
    count = int(is_image_token(view.inputs["input_ids"], info.image_token_ids).sum())
    if info.has_cross_attention:
        boxes = _cross_boxes(info.model, view)
        count = len(boxes)
    elif hasattr(info.model.config, "image_grid_pinpoints"):
        boxes = _packed_boxes(info.model, view)
    else:
        boxes = _grid_boxes(info.geometry, view, count, image)
    if len(boxes) != count:
        raise _placeless(f"{len(boxes)} places were found for {count} image tokens")
    places = Places(_cut(boxes, size), size)
    if not bool(places.has_place.any()):
        raise _placeless("no image token shows any of the picture")
    return places


class _View(NamedTuple):
    """What the values of a pixel tensor show.

    Attributes:
        x: Abscissa in pixels of the picture, of the shape of the tensor.
        y: Ordinate.
        is_inside: Which values show the picture, and not padding.
        is_filler: Which values are 0 for a black and for a white picture, as those of tiles are
            that only fill a stack up.
        inputs: What the processor returned for one of the test pictures.
        size: Of the picture, width and height.
    """

    x: Tensor
    y: Tensor
    is_inside: Tensor
    is_filler: Tensor
    inputs: Mapping[str, Any]
    size: tuple[int, int]

    @classmethod
    def of(cls, prepare: Prepare, size: tuple[int, int]) -> "_View":
        width, height = size
        ramp_x = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
        ramp_y = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
        shades = (np.zeros((height, width)), np.ones((height, width)), ramp_x, ramp_y)
        prepared = [prepare(_grey(shade)) for shade in shades]
        inputs = prepared[0]
        names = pixel_names(inputs)
        name = "pixel_values" if "pixel_values" in names else next(iter(names), None)
        if name is None or not all(isinstance(given[name], Tensor) for given in prepared):
            raise _placeless("its processor returns no tensor of pixels")
        low, high, x, y = (given[name].double().cpu() for given in prepared)
        span = high - low
        is_inside = span.abs() > 0.25 * span.abs().max()
        span = span.where(is_inside, torch.ones_like(span))
        x, y = (x - low) / span * width, (y - low) / span * height
        return cls(x, y, is_inside, (low == 0) & (high == 0), inputs, size)

    def each(self, change: Callable[[Tensor], Tensor]) -> "_View":
        """The same of some of the values, or of all in another shape."""
        x, y, is_inside, is_filler = map(change, self[:4])
        return self._replace(x=x, y=y, is_inside=is_inside, is_filler=is_filler)

    def reshaped(self, shape: Sequence[int]) -> "_View":
        """The same values in another shape."""
        return self.each(lambda part: part.reshape(shape))


def _grey(shade: Any) -> Image.Image:
    return Image.fromarray((shade * _BRIGHTEST).round().astype(np.uint8)).convert("RGB")


def _grid_boxes(geometry: Geometry, view: _View, count: int, image: int) -> Tensor:
    """``[count, 4]`` boxes of tokens that fill grids line by line."""
    if geometry.unknown:
        # Where the model tells nothing, what the processor returned may.
        shapes = None
        if not geometry.is_run:
            if (boxes := _told_boxes(view, count)) is not None:
                return boxes
            shapes = _square_cells(view, count) or _patch_cells(view, count)
        if shapes is None:
            raise _placeless(geometry.unknown)
    else:
        kinds = torch.full((1, count), Columns.IMAGE)
        shapes = grid_of(geometry, kinds, grids_among(view.inputs), 1).shapes[0]
    tiles = _tiles(view)
    if tiles is not None and len(tiles.x) == len(shapes):
        return torch.cat([_tile_boxes(tiles, i, shape) for i, shape in enumerate(shapes)])
    if not image < len(shapes):
        raise _placeless(f"its {len(shapes)} grids of patches are not those of its pictures")
    own = _patch_boxes(view, shapes[image])
    return torch.cat(
        [own if i == image else _nowhere(math.prod(shape)) for i, shape in enumerate(shapes)]
    )


def _nowhere(count: int) -> Tensor:
    """``[count, 4]`` boxes of tokens without a place."""
    return torch.full((count, 4), math.nan, dtype=torch.float64)


def _told_boxes(view: _View, count: int) -> Tensor | None:
    """Boxes of tokens where the processor tells the size of every row of its pixels.

    A row is a picture or a tile of one, padded to the size of the largest.
    """
    sizes = _told_sizes(view.inputs)
    if sizes is None or sizes.shape != (len(view.x), 2) or view.x.ndim not in (3, 4):
        return None
    merge = math.isqrt(int(sizes.prod(dim=1).sum()) // max(count, 1))
    if merge == 0 or bool((sizes % merge).any()):
        return None
    if int(sizes.prod(dim=1).sum()) != merge**2 * count:
        return None
    rows = [view.each(itemgetter(slice(i, i + 1))) for i in range(len(sizes))]
    shapes = (sizes // merge).tolist()
    return torch.cat([_row_boxes(*of) for of in zip(rows, sizes.tolist(), shapes, strict=True)])


def _told_sizes(inputs: Mapping[str, Any]) -> Tensor | None:
    """``[rows, 2]`` heights and widths, in patches or in pixels."""
    for name in _SIZE_NAMES:
        sizes = inputs.get(name)
        if isinstance(sizes, Tensor):
            return sizes.long().cpu()
    places = inputs.get(_PLACES_NAME)
    if not (isinstance(places, Tensor) and places.ndim == 3):
        return None
    return (places.amax(dim=1) + 1).flip(-1).long().cpu()


def _row_boxes(row: _View, size: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Boxes of the tokens of one row of pixels; none has a place if it shows another picture."""
    rows, columns = shape
    if not bool(row.is_inside.any()):
        return _nowhere(rows * columns)
    if row.x.ndim == 3:
        return _patch_boxes(row, (rows, columns))
    height, width = size
    return _tile_boxes(row.each(lambda part: part[..., :height, :width]), 0, (rows, columns))


def _square_cells(view: _View, count: int) -> Sequence[tuple[int, int]] | None:
    """The one grid of square cells that a single tile can be cut into."""
    tiles = _tiles(view)
    if tiles is None or len(tiles.x) != 1:
        return None
    height, width = tiles.x.shape[-2:]
    rows = round(math.sqrt(count * height / width))
    columns = count // max(rows, 1)
    is_grid = rows * columns == count and height * columns == width * rows
    return [(rows, columns)] if is_grid else None


def _tiles(view: _View) -> _View | None:
    """The view as ``[tiles, 3, height, width]``, or ``None`` when it is no stack of pictures."""
    shape = tuple(view.x.shape)
    if len(shape) == 5 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 4 or shape[1] != 3:
        return None
    return view.reshaped(shape)


class _Line(NamedTuple):
    """``place = start + step * index``; NaN where nothing is shown."""

    start: float
    step: float

    def edges(self, cells: int, cell: float = 1.0) -> Tensor:
        """``[cells + 1]`` places of the edges of cells."""
        index = torch.arange(cells + 1, dtype=torch.float64) * cell
        return self.start + self.step * index


def _line(index: Tensor, place: Tensor) -> _Line:
    """The least-squares line through points."""
    if len(index) < 2:
        return _Line(math.nan, math.nan)
    centred = index - index.mean()
    step = float((centred * place).sum() / centred.square().sum())
    return _Line(float(place.mean()) - step * float(index.mean()), step)


def _tile_boxes(tiles: _View, number: int, shape: tuple[int, int]) -> Tensor:
    """``[height * width, 4]`` boxes of the cells of one tile."""
    inside = tiles.is_inside[number]
    width, height = tiles.size
    across = _axis(tiles.x[number], inside, (0, 1), width)
    down = _axis(tiles.y[number], inside, (0, 2), height)
    pixel_rows, pixel_columns = inside.shape[-2:]
    rows, columns = shape
    return _boxes(
        across.edges(columns, pixel_columns / columns), down.edges(rows, pixel_rows / rows)
    )


def _axis(place: Tensor, inside: Tensor, others: tuple[int, int], length: int) -> _Line:
    """Places along one axis of a tile, by the index of pixel edges."""
    n_inside = inside.sum(dim=others)
    mean = (place * inside).sum(dim=others) / n_inside
    centres = torch.arange(len(mean), dtype=torch.float64) + 0.5
    # Beyond the centres of the outermost pixels, an enlarged ramp is flat.
    is_sloped = (mean > 0.55) & (mean < length - 0.55) & (n_inside > 0)
    return _line(centres[is_sloped], mean[is_sloped])


def _boxes(x: Tensor, y: Tensor) -> Tensor:
    """Boxes between edges, line by line."""
    left, right = x[:-1], x[1:]
    rows, columns = len(y) - 1, len(x) - 1
    return torch.stack(
        [
            left.expand(rows, columns),
            y[:-1, None].expand(rows, columns),
            right.expand(rows, columns),
            y[1:, None].expand(rows, columns),
        ],
        dim=-1,
    ).reshape(-1, 4)


def _patch_boxes(view: _View, shape: tuple[int, int]) -> Tensor:
    """Boxes of tokens that stand for patches, or for squares of patches, of one grid."""
    rows, columns = shape
    x, y = _patch_centres(view)
    merge = math.isqrt(len(x) // (rows * columns))
    if merge**2 * rows * columns != len(x):
        raise _placeless(f"{len(x)} patches do not fill a grid of {rows} x {columns} tokens")
    for order in (_merged, _line_by_line):
        across, down = (order(part, rows, columns, merge) for part in (x, y))
        found = _even_grid(across, down, merge, view.size)
        if found is not None:
            return found
    raise _placeless("its patches do not follow each other line by line")


def _patch_centres(view: _View) -> tuple[Tensor, Tensor]:
    """``[patches]`` abscissas and ordinates; padding, and other pictures, left out."""
    first = 2 if view.x.ndim == 3 else 1
    flat = (-1, math.prod(view.x.shape[first:]))
    is_patch = view.is_inside.reshape(flat).any(dim=1)
    x, y = (part.reshape(flat)[is_patch].mean(dim=1) for part in (view.x, view.y))
    return x, y


def _patch_cells(view: _View, count: int) -> Sequence[tuple[int, int]] | None:
    """The grid of tokens that patches which come line by line can be pooled to."""
    if _tiles(view) is not None:
        return None
    x, _ = _patch_centres(view)
    ends = (x.diff() < 0).nonzero().flatten()
    columns = int(ends[0]) + 1 if len(ends) else len(x)
    rows, merge = len(x) // max(columns, 1), math.isqrt(len(x) // max(count, 1))
    is_grid = rows * columns == len(x) and merge**2 * count == len(x) > 0
    if not is_grid or rows % merge or columns % merge:
        return None
    return [(rows // merge, columns // merge)]


def _merged(places: Tensor, rows: int, columns: int, merge: int) -> Tensor:
    """``[rows * merge, columns * merge]`` from patches that come square by square."""
    squares = places.reshape(rows, columns, merge, merge)
    return squares.transpose(1, 2).reshape(rows * merge, columns * merge)


def _line_by_line(places: Tensor, rows: int, columns: int, merge: int) -> Tensor:
    """The same from patches that come line by line."""
    return places.reshape(rows * merge, columns * merge)


def _even_grid(x: Tensor, y: Tensor, merge: int, size: tuple[int, int]) -> Tensor | None:
    """Boxes of squares of ``merge`` patches, if the patches lie in an even grid."""
    rows, columns = x.shape
    across, down = _steps(x.T, size[0]), _steps(y, size[1])
    for line, places in ((across, x.T), (down, y)):
        even = line.start + line.step * (torch.arange(len(places)) + 0.5)
        if float((places - even[:, None]).abs().max()) > _STRAY * abs(line.step):
            return None
    return _boxes(across.edges(columns // merge, merge), down.edges(rows // merge, merge))


def _steps(places: Tensor, length: int) -> _Line:
    """Places along the first axis, by the index of patch edges; a single patch shows all."""
    if len(places) == 1:
        return _Line(0.0, float(length))
    centres = torch.arange(len(places), dtype=torch.float64) + 0.5
    return _line(centres, places.mean(dim=1))


def _packed_boxes(model: Any, view: _View) -> Tensor:
    """Boxes of tokens that the model itself arranges from tiles, with newlines among them."""
    shape = tuple(view.x.shape)
    shape = (1, *shape) if len(shape) == 4 else shape
    if len(shape) != 5 or not isinstance(view.inputs.get("image_sizes"), Tensor):
        raise _placeless("its processor does not say how it tiles pictures")
    side = int(_vision(model, "image_size")) // int(_vision(model, "patch_size"))
    stacks = view.reshaped(shape)
    pack = [m for m in model.modules() if hasattr(m, "pack_image_features")][-1].pack_image_features
    options = {
        "image_features": [_stack_boxes(stacks, i, side) for i in range(shape[0])],
        "image_sizes": view.inputs["image_sizes"],
        "vision_feature_select_strategy": "full",
        "image_newline": torch.full((4,), math.nan, dtype=torch.float64),
        "vision_aspect_ratio": getattr(model.config, "vision_aspect_ratio", None),
    }
    known = inspect.signature(pack).parameters
    packed, _ = pack(**{name: value for name, value in options.items() if name in known})
    parts = ((image[: side * side], image[side * side :]) for image in packed)
    return torch.cat([torch.cat([base, _widened(grid)]) for base, grid in parts])


def _stack_boxes(stacks: _View, number: int, side: int) -> Tensor:
    """``[tiles, side * side, 4]`` boxes of one picture's tiles, without those that fill up."""
    tiles = stacks.reshaped((-1, *stacks.x.shape[2:]))
    first = number * stacks.x.shape[1]
    n_tiles = int((~stacks.is_filler[number]).flatten(1).any(dim=1).sum())
    return torch.stack([_tile_boxes(tiles, first + i, (side, side)) for i in range(n_tiles)])


def _cross_boxes(model: Any, view: _View) -> Tensor:
    """Boxes of the keys of cross-attention layers: tile by tile, a class token and its patches."""
    if view.x.ndim != 6 or len(view.x) != 1:
        raise _placeless("the image is seen through cross-attention, and not in tiles")
    tiles = view.reshaped((-1, *view.x.shape[3:]))
    side = int(_vision(model, "image_size")) // int(_vision(model, "patch_size"))
    parts = [_tile_boxes(tiles, i, (side, side)) for i in range(len(tiles.x))]
    return torch.cat([torch.cat([_nowhere(1), part]) for part in parts])


def _vision(model: Any, name: str) -> Any:
    return getattr(model.config.vision_config, name)


def _widened(boxes: Tensor) -> Tensor:
    """Boxes that touch again after the model has averaged neighbours into fewer tokens."""
    x = (boxes[:, 0] + boxes[:, 2]) / 2
    pitch = x.diff()
    pitch = pitch[pitch > 0]  # within a line; not across newlines, which are NaN
    if len(pitch) == 0:
        return boxes
    width = (boxes[:, 2] - boxes[:, 0]).nanmedian()
    grown = (pitch.median() / width - 1).clamp(min=0) / 2
    sizes = (boxes[:, 2:] - boxes[:, :2]) * grown
    return torch.cat([boxes[:, :2] - sizes, boxes[:, 2:] + sizes], dim=1)


def _cut(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes cut at the borders of the picture; NaN where no more than a sliver is left."""
    limit = torch.tensor([*size, *size], dtype=boxes.dtype)
    cut = torch.minimum(boxes.clamp(min=0), limit)
    left = (cut[:, 2:] - cut[:, :2]) / (boxes[:, 2:] - boxes[:, :2])
    is_left = (left > _SLIVER).all(dim=1)
    return cut.where(is_left[:, None], torch.full_like(cut, math.nan))


def _placeless(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the image tokens of this model cannot be placed in the picture: {reason}."
    )
