"""Which pixels of a picture make which image token: pictures with some tokens blanked.

Tokens lie in their picture as ``vlm_steer.engine.grid`` says. That their pixels lie there too is
not taken on trust: with the attention of the vision tower silenced, a token depends on its own
pixels alone, so changing the pixels of some tokens must change these tokens and no others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlm_steer.engine.inputs import patches_per_image, pixel_names
from vlm_steer.engine.views import Branch, Columns, Grid
from vlm_steer.engine.vision import encoded
from vlm_steer.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = [
    "blanked",
    "check_places",
    "enlarged_parts",
    "of_tokens",
    "pictures_by_row",
    "shapes_of",
    "with_blank",
    "with_masked_patches",
]

_COLOURS = 3
_SEED = 0
_UNCHANGED = 1e-4  # of the largest change


def of_tokens(values: Tensor, kinds: Tensor, copies: int) -> Tensor:
    """``[image tokens]`` in the order of the user's pixels, from ``[batch, prompt]``.

    Args:
        values: One value per prompt token.
        kinds: ``[batch, prompt]`` codes of ``Columns``.
        copies: Consecutive rows that stem from one row of the user's, as beams do.
    """
    return values[::copies][kinds[::copies] == Columns.IMAGE]


def shapes_of(grid: Grid, copies: int) -> list[tuple[int, int]]:
    """Height and width in tokens of every picture, in the order of the user's pixels."""
    return [shape for row in grid.shapes[::copies] for shape in row]


def blanked(
    given: Mapping[str, Any],
    is_blank: Tensor,
    shapes: Sequence[tuple[int, int]],
    value: Sequence[float],
) -> dict[str, Tensor]:
    """The user's pixels, those of some image tokens replaced.

    Args:
        given: What the user passed, with ``pixel_values``.
        is_blank: ``[image tokens]`` bool.
        shapes: From ``shapes_of``.
        value: What to put there, one number per channel.

    Raises:
        UnsupportedModelError: There are no pixels, or they do not fit the tokens.
    """
    pixels = _pixels(given)
    mask = _on_pixels(given, pixels, is_blank.to(pixels.device), shapes)
    return {"pixel_values": torch.where(mask, _fill(value, pixels), pixels)}


def enlarged_parts(
    given: Mapping[str, Any], shapes: Sequence[tuple[int, int]], boxes: Tensor
) -> Tensor:
    """The user's pixels, a part of each picture enlarged to the size of the whole.

    Args:
        given: What the user passed, with ``pixel_values``.
        shapes: From ``shapes_of``.
        boxes: ``[pictures, 4]`` left, top, right and bottom in [0, 1]; the whole leaves a picture
            as it is.

    Raises:
        UnsupportedModelError: There are no pixels, or they do not fit the tokens.
    """
    pixels = _pixels(given)
    boxes = boxes.to(pixels.device, torch.float32)
    whole = boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    is_part = (boxes != whole).any(dim=1)
    if not bool(is_part.any()):
        return pixels
    changed = pixels.clone()
    if (sizes := patches_per_image(given, pixels)) is not None:
        merge = _merge(sum(sizes), shapes)
        parts = torch.split(changed, [height * width * merge**2 for height, width in shapes])
        for index in is_part.nonzero().flatten().tolist():
            frames, side = _frames_and_side(parts[index], _COLOURS)
            picture = _picture(parts[index], shapes[index], merge, frames, side)
            enlarged = _enlarged_part(picture[None], boxes[index : index + 1])[0]
            parts[index].copy_(_as_patches(enlarged, shapes[index], merge, frames, side))
        return changed
    flat = changed.flatten(0, -4)
    places = torch.tensor(_places(flat, shapes), device=pixels.device)[is_part]
    flat[places] = _enlarged_part(flat[places], boxes[is_part])
    return flat.reshape(pixels.shape)


def _enlarged_part(pictures: Tensor, boxes: Tensor) -> Tensor:
    """``[pictures, channels, height, width]`` of parts of such pictures."""
    size, centre = boxes[:, 2:] - boxes[:, :2], boxes[:, 2:] + boxes[:, :2] - 1
    maps = torch.cat([torch.diag_embed(size), centre[:, :, None]], dim=2)
    grid = functional.affine_grid(maps, list(pictures.shape), align_corners=False)
    seen = functional.grid_sample(
        pictures.float(), grid, padding_mode="border", align_corners=False
    )
    return seen.to(pictures.dtype)


def check_places(model: Any, given: Mapping[str, Any], shapes: Sequence[tuple[int, int]]) -> None:
    """Make sure that pixels lie where the grid says, by encoding the user's images twice.

    Args:
        model: The vision-language model.
        given: What the user passed, with ``pixel_values``.
        shapes: From ``shapes_of``.

    Raises:
        UnsupportedModelError: They do not, or it cannot be told.
    """
    pixels = _pixels(given)
    total = sum(height * width for height, width in shapes)
    generator = torch.Generator().manual_seed(_SEED)
    is_moved = torch.rand(total, generator=generator).to(pixels.device) < 0.5
    mask = _on_pixels(given, pixels, is_moved, shapes)
    moved = pixels + mask.to(pixels.dtype)
    try:
        with _Silenced() as silenced:
            before = encoded(model, given)
            after = encoded(model, {**given, "pixel_values": moved})
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unverified(model, f": {error}") from error
    change = (after - before).abs().amax(dim=-1)
    is_changed = change > _UNCHANGED * change.max()
    if not silenced.has_acted or not torch.equal(is_changed, is_moved.to(is_changed.device)):
        raise _unverified(model, "")


def with_blank(branch: Branch, method: str, model: "ModelInfo", processor: Any) -> Branch:
    """The branch with black as numbers.

    Raises:
        ConfigError: The processor does not tell what black is.
        UnsupportedModelError: The model's image encoder cannot be called by itself.
    """
    if branch.shows is None:
        return branch
    if getattr(model.model, "get_image_features", None) is None:
        raise UnsupportedModelError(
            f"{method} blanks parts of the image, but {model.family} has no function that encodes "
            "images by themselves, with which to verify where they are. Use a method that changes "
            "the whole image, such as vcd."
        )
    if branch.blank:
        return branch
    known = _normalisation(processor)
    if known is None:
        raise ConfigError(
            f"{method} blanks pixels with black, and the model's processor is needed to tell what "
            "black is. Pass processor=... to steer() or attach(), or choose blank: mean."
        )
    return replace(branch, blank=tuple(-m / s for m, s in zip(*known, strict=True)))


def _normalisation(processor: Any) -> tuple[list[float], list[float]] | None:
    """What a processor takes off each channel, and then divides it by."""
    images = getattr(processor, "image_processor", processor)
    mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    if mean is None or std is None:
        return None
    if getattr(images, "do_normalize", None) is False:
        return [0.0] * len(mean), [1.0] * len(std)
    return list(mean), list(std)


def pictures_by_row(
    given: Mapping[str, Any], grid: Grid, copies: int, processor: Any
) -> tuple[tuple[Tensor, ...], ...]:
    """Per row of the batch, its pictures ``[channels, height, width]`` in [0, 1].

    Args:
        given: What the user passed, with ``pixel_values``.
        grid: Where the image tokens of the prompt lie.
        copies: Consecutive rows that stem from one row of the user's, as beams do.
        processor: The model's.

    Raises:
        UnsupportedModelError: The processor does not tell how it normalised them.
    """
    known = _normalisation(processor)
    if known is None:
        raise UnsupportedModelError(
            f"{type(processor).__name__} has no image_mean and image_std, by which a method would "
            "tell what the picture looks like. Use a method that does not look at it."
        )
    pictures = iter(_pictures(given, shapes_of(grid, copies), *known))
    rows = [tuple(next(pictures) for _ in row) for row in grid.shapes[::copies]]
    return tuple(row for row in rows for _ in range(copies))


def _pictures(
    given: Mapping[str, Any],
    shapes: Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Tensor]:
    pixels = _pixels(given)
    if (sizes := patches_per_image(given, pixels)) is None:
        tiles = _tiles(pixels, shapes)
    else:
        tiles = _from_patches(pixels, sum(sizes), shapes, len(mean))
    scale, offset = (_per_channel(numbers, pixels)[:, None, None] for numbers in (std, mean))
    return [(tile * scale + offset).float().clamp(0, 1) for tile in tiles]


class _Silenced(TorchFunctionMode):
    """Lets every attention give nothing."""

    has_acted = False

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (functional.scaled_dot_product_attention, functional.softmax):
            self.has_acted = True
            return torch.zeros_like(result)
        return result


def with_masked_patches(
    given: Mapping[str, Any], patch: int, *, share: float, generator: torch.Generator
) -> dict[str, Any]:
    """The user's inputs, a random share of the patches of each image replaced by its mean colour.

    Args:
        given: What the user passed, with ``pixel_values``.
        patch: Pixels along each side of a patch.
        share: Of the patches, in [0, 1].
        generator: Draws which, on the CPU.
    """
    pixels = _pixels(given)
    sizes = patches_per_image(given, pixels)
    if sizes is not None:
        is_masked = _drawn((pixels.shape[0],), share, generator).to(pixels.device)
        by_channel = pixels.reshape(pixels.shape[0], _COLOURS, -1)
        parts = torch.split(by_channel, list(sizes))
        mean = torch.cat([p.mean(dim=(0, 2), keepdim=True).expand(len(p), -1, -1) for p in parts])
        masked = torch.where(is_masked[:, None, None], mean, by_channel).reshape(pixels.shape)
    else:
        height, width = pixels.shape[-2:]
        cells = _drawn((height // patch, width // patch), share, generator)
        is_masked = _enlarged(cells, height, width).to(pixels.device)
        masked = torch.where(is_masked, pixels.mean(dim=(-2, -1), keepdim=True), pixels)
    return {**given, "pixel_values": masked}


def _drawn(shape: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    """Bool, ``True`` for a share of the cells."""
    order = torch.rand(math.prod(shape), generator=generator).argsort().argsort()
    return (order < round(share * len(order))).reshape(shape)


def _pixels(given: Mapping[str, Any]) -> Tensor:
    pixels = given.get("pixel_values")
    if pixel_names(given) != ("pixel_values",) or not isinstance(pixels, Tensor):
        raise UnsupportedModelError(
            "a contrast that blanks parts of the image needs pixel_values as one tensor, which was "
            f"not passed (given: {', '.join(pixel_names(given)) or 'no pixels'}). Pass what the "
            "processor returns, for a continued conversation the pixels of all its images."
        )
    return pixels


def _on_pixels(
    given: Mapping[str, Any],
    pixels: Tensor,
    values: Tensor,
    shapes: Sequence[tuple[int, int]],
) -> Tensor:
    """``[image tokens]`` bool -> bool that broadcasts to the pixels."""
    if patches_per_image(given, pixels) is not None:
        # The processor lists the patches of a token one after the other.
        per_token, rest = divmod(pixels.shape[0], max(len(values), 1))
        if rest:
            raise _misfit(f"{pixels.shape[0]} patches make {len(values)} image tokens")
        mask = values.repeat_interleave(per_token)
        return mask.reshape(-1, *[1] * (pixels.ndim - 1))
    flat = pixels.flatten(0, -4)
    mask = torch.zeros_like(flat[:, :1], dtype=torch.bool)
    parts = torch.split(values, [height * width for height, width in shapes])
    for tile, part, shape in zip(_places(flat, shapes), parts, shapes, strict=True):
        mask[tile, 0] = _enlarged(part.reshape(shape), *pixels.shape[-2:])
    return mask.reshape(*pixels.shape[:-3], 1, *pixels.shape[-2:])


def _places(tiles: Tensor, shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Numbers of the tiles that are no padding, which models recognise by being all zero."""
    found: list[int] = tiles.flatten(1).any(dim=1).nonzero().flatten().tolist()
    if len(found) != len(shapes):
        raise _misfit(f"{len(found)} pictures or tiles fill {len(shapes)} places in the prompt")
    return found


def _tiles(pixels: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    flat = pixels.flatten(0, -4)
    return [flat[tile] for tile in _places(flat, shapes)]


def _enlarged(cells: Tensor, height: int, width: int) -> Tensor:
    """``[height, width]`` from one value per cell; pixels behind the last cell go with it."""
    rows = torch.arange(height, device=cells.device) // (height // cells.shape[0])
    columns = torch.arange(width, device=cells.device) // (width // cells.shape[1])
    rows, columns = rows.clamp(max=cells.shape[0] - 1), columns.clamp(max=cells.shape[1] - 1)
    return cells[rows][:, columns]


def _from_patches(
    pixels: Tensor, n_patches: int, shapes: Sequence[tuple[int, int]], channels: int
) -> list[Tensor]:
    """Pictures from rows of patches ``[patches, channels * frames * side * side]``."""
    merge = _merge(n_patches, shapes)
    parts = torch.split(pixels, [height * width * merge**2 for height, width in shapes])
    return [
        _picture(part, shape, merge, *_frames_and_side(part, channels))
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _merge(n_patches: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Patches that become one token, along each side."""
    return math.isqrt(n_patches // max(sum(height * width for height, width in shapes), 1))


def _frames_and_side(part: Tensor, channels: int) -> tuple[int, int]:
    """A patch holds one or two frames of square pieces; a still image repeats its frame."""
    frames = 2 if math.isqrt(part.shape[1] // channels) ** 2 * channels < part.shape[1] else 1
    return frames, math.isqrt(part.shape[1] // (channels * frames))


def _picture(part: Tensor, shape: tuple[int, int], merge: int, frames: int, side: int) -> Tensor:
    """``[channels, height, width]`` from the patches of one picture."""
    height, width = shape
    grid = part.reshape(height, width, merge, merge, -1, frames, side, side)[..., 0, :, :]
    picture = grid.permute(4, 0, 2, 5, 1, 3, 6)
    return picture.reshape(-1, height * merge * side, width * merge * side)


def _as_patches(
    picture: Tensor, shape: tuple[int, int], merge: int, frames: int, side: int
) -> Tensor:
    """The patches of one picture, each of its frames the same."""
    height, width = shape
    grid = picture.reshape(-1, height, merge, side, width, merge, side).permute(1, 4, 2, 5, 0, 3, 6)
    repeated = grid[..., None, :, :].expand(*grid.shape[:5], frames, side, side)
    return repeated.reshape(height * width * merge**2, -1)


def _fill(value: Sequence[float], pixels: Tensor) -> Tensor:
    """One number per channel, in the shape of pixels or of the patches of a row."""
    channels = _per_channel(value, pixels)
    # A tile that is zero throughout would be taken for padding.
    channels = torch.where(channels == 0, torch.finfo(pixels.dtype).tiny, channels)
    if pixels.ndim == 2:
        return channels.repeat_interleave(pixels.shape[1] // len(value))
    return channels[:, None, None]


def _per_channel(value: Sequence[float], pixels: Tensor) -> Tensor:
    return torch.tensor(value, dtype=pixels.dtype, device=pixels.device)


def _unverified(model: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "cannot blank parts of the image: which pixels make which image token could not be "
        f"verified in {type(model).__name__}{why}. Load it with attn_implementation='sdpa' or "
        "'eager', or use a method that changes the whole image, such as vcd."
    )


def _misfit(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot tell which pixels make which image token: {what}. Pass what the processor "
        "returns, or use a method that changes the whole image, such as vcd."
    )
