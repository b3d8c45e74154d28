"""Where each image token lies in its image.

A model's tokens keep the order of the image's patches in two cases that can be told from the
model itself: every tile has one fixed square grid (its vision tower learned one position per
patch), or the processor passes the grid of every image along (``image_grid_thw``). Elsewhere
there is no grid, and a method that needs one is refused.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm_steer.engine.hooks import Columns, Grid
from vlm_steer.errors import UnsupportedModelError

__all__ = ["Geometry", "geometry_of", "grid_of", "grids_among"]

_SHRINKING = ("downsample_factor", "scale_factor", "spatial_merge_size", "hidden_stride")
_GROWING = ("downsample_ratio", "pixel_shuffle_ratio")
_GRID_NAMES = ("image_grid_thw", "video_grid_thw")


@dataclass(frozen=True, slots=True)
class Geometry:
    """How image tokens of a model are laid out.

    Attributes:
        side: Tokens along each side of the one square grid that every tile has; ``None`` when
            the inputs say the grid of every image.
        unknown: Why there is no grid; empty when there is one.
        is_run: Whether the tokens of an image, or of one tile, follow each other; ``False`` where
            the model does not tell.
    """

    side: int | None = None
    unknown: str = ""
    is_run: bool = True


def geometry_of(model: PreTrainedModel) -> Geometry:
    """Read the layout of image tokens off a model."""
    leaves = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    if "image_newline" in leaves:
        return Geometry(unknown="it joins the tiles of an image with newline tokens")
    if any("query" in leaf or "latents" in leaf for leaf in leaves):
        return Geometry(unknown="its image tokens are learned queries, which have no place")
    if "image_grid_thw" in inspect.signature(model.forward).parameters:
        return Geometry()
    config = model.config
    patches = _patches_per_side(model)
    if patches is None:
        return Geometry(unknown="its vision tower has no fixed grid of patches", is_run=False)
    if getattr(config, "vision_feature_select_strategy", None) == "full" and _has_class_token(
        model, patches
    ):
        return Geometry(unknown="it keeps the class token among the image tokens")
    pooled = getattr(config, "mm_tokens_per_image", None)
    side = math.isqrt(pooled) if isinstance(pooled, int) else round(patches / _shrink(config))
    return Geometry(side=side)


def _patches_per_side(model: PreTrainedModel) -> int | None:
    vision = getattr(model.config, "vision_config", None)
    size, patch = (_one(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    if size is None or patch is None or not _position_tables(model, (size // patch) ** 2):
        return None
    return size // patch


def _position_tables(model: PreTrainedModel, count: int) -> list[Tensor]:
    """Learned positions of ``count`` patches, with or without a class token."""
    return [
        table
        for name, table in model.named_parameters()
        if "position" in name and {count, count + 1} & set(table.shape[:-1])
    ]


def _has_class_token(model: PreTrainedModel, patches: int) -> bool:
    return any(patches**2 + 1 in t.shape[:-1] for t in _position_tables(model, patches**2))


def _one(value: Any) -> int | None:
    """A side length that configurations write once or, equal, twice."""
    values = set(value) if isinstance(value, Sequence) else {value}
    side = values.pop() if len(values) == 1 else None
    return side if isinstance(side, int) and side > 0 else None


def _shrink(config: Any) -> float:
    """Patches that become one token, along each side."""
    configs = (config, config.vision_config)
    for part in configs:
        for name in _SHRINKING:
            if isinstance(value := getattr(part, name, None), int):
                return value
        for name in _GROWING:
            if isinstance(value := getattr(part, name, None), float):
                return 1 / value
    return 1


def grids_among(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The image grids that a processor passed along, by argument."""
    return {name: inputs[name] for name in _GRID_NAMES if isinstance(inputs.get(name), Tensor)}


def grid_of(geometry: Geometry, kinds: Tensor, grids: Mapping[str, Tensor], copies: int) -> Grid:
    """Number the images of a prompt and find their shapes.

    Args:
        geometry: Of the model.
        kinds: ``[batch, prompt]`` codes of ``Columns``.
        grids: From ``grids_among``; read only when the geometry leaves the sizes open.
        copies: Consecutive rows that stem from one row of the inputs, as beams do.

    Raises:
        UnsupportedModelError: The image tokens of the prompt do not fit the geometry.
    """
    is_image = kinds == Columns.IMAGE
    counts = is_image.sum(dim=1).tolist()
    if geometry.side is None:
        shapes = _shapes_from_inputs(counts, grids, copies)
    else:
        shapes = [_tiles(count, geometry.side) for count in counts]
    image = torch.full_like(kinds, -1, dtype=torch.long)
    sizes = [height * width for row in shapes for height, width in row]
    numbers = torch.tensor([i for row in shapes for i in range(len(row))], dtype=torch.long)
    image[is_image] = numbers.repeat_interleave(torch.tensor(sizes, dtype=torch.long)).to(
        kinds.device
    )
    return Grid(image, tuple(map(tuple, shapes)))


def _tiles(count: int, side: int) -> list[tuple[int, int]]:
    tiles, rest = divmod(count, side * side)
    if rest:
        raise _misfit(f"{count} image tokens in a row are no whole number of {side} x {side} grids")
    return [(side, side)] * tiles


def _shapes_from_inputs(
    counts: Sequence[int], grids: Mapping[str, Tensor], copies: int
) -> list[list[tuple[int, int]]]:
    """Shapes of the images of every row; beams repeat rows ``copies`` times, but not grids."""
    tokens = sum(counts) // copies
    if tokens == 0:
        return [[] for _ in counts]
    if len(grids) != 1:
        raise _misfit(f"{len(grids)} of {' and '.join(_GRID_NAMES)} were passed, not one")
    grid = next(iter(grids.values()))
    merge = max(math.isqrt(int(grid.prod(dim=-1).sum()) // tokens), 1)
    images = iter(grid.tolist())
    shapes: list[list[tuple[int, int]]] = []
    for count in counts[::copies]:
        row: list[tuple[int, int]] = []
        while (missing := count - sum(height * width for height, width in row)) > 0:
            frames, height, width = next(images, (1, 0, 0))
            if height * width == 0:
                break
            row += [(height // merge, width // merge)] * frames
        if missing:
            raise _misfit(f"{count} image tokens in a row do not fit {' or '.join(grids)}")
        shapes += [row] * copies
    return shapes


def _misfit(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot tell where image tokens lie in their images: {what}. Use a method that needs no "
        "image grid."
    )
