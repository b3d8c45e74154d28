"""Pure operations on the keyword arguments of a model's forward.

Families differ in what they pass (token types, grids, tile counts, encoded images, ...). These
functions tell arguments apart by shape and by the words in their names, not by family: a tensor
whose first two dimensions are ``[batch, tokens]`` goes along with the tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "add_rows",
    "is_per_token",
    "is_place_mask",
    "last_tokens",
    "mask_of",
    "n_rows",
    "n_tokens",
    "one_token",
    "patches_per_image",
    "pixel_names",
    "place_mask",
    "token_tensor",
    "without_image",
]

_PIXELS = re.compile(r"pixel_values|(image|flattened|vision)_patches|images|image_inputs|frames")
_PLACES = re.compile(r"(image|images|vision|visual)_\w*(position|seq|token)\w*_mask")
_IMAGE_WORDS = (
    "pixel",
    "patch",
    "vision",
    "image",
    "video",
    "mm_encoder",
    "aspect_ratio",
    "cross_attention_mask",
    "qformer",
    "spatial",
    "tile",
)


def token_tensor(kwargs: Mapping[str, Any]) -> Tensor:
    """The argument that carries the tokens: embeddings where given, else ids."""
    embeds: Tensor | None = kwargs.get("inputs_embeds")
    ids: Tensor = kwargs["input_ids"] if embeds is None else embeds
    return ids


def n_tokens(kwargs: Mapping[str, Any]) -> int:
    """Query rows of this forward."""
    return token_tensor(kwargs).shape[1]


def n_rows(kwargs: Mapping[str, Any]) -> int:
    """Rows of the batch."""
    return token_tensor(kwargs).shape[0]


def pixel_names(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the arguments that hold raw pixels: one, or several views of the same images."""
    return tuple(
        name
        for name, value in kwargs.items()
        if _PIXELS.search(name) and all(_is_floating(v) for v in _as_list(value))
    )


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) and value else [value]


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def patches_per_image(kwargs: Mapping[str, Any], pixels: Tensor) -> tuple[int, ...] | None:
    """How many entries of a patchified pixel tensor belong to each image; ``None`` otherwise."""
    for name, grid in kwargs.items():
        if "grid" in name and isinstance(grid, Tensor) and grid.ndim == 2:
            sizes = tuple(int(size) for size in grid.prod(dim=-1).tolist())
            if sum(sizes) == pixels.shape[0]:
                return sizes
    return None


def is_place_mask(name: str) -> bool:
    """Whether an argument says which tokens are image tokens, going by its name."""
    return _PLACES.fullmatch(name) is not None


def place_mask(kwargs: Mapping[str, Any]) -> Tensor | None:
    """``[batch, tokens]`` bool, the image tokens, for models that are told so; else ``None``."""
    masks = [value for name, value in kwargs.items() if is_place_mask(name)]
    return next((m.bool() for m in masks if isinstance(m, Tensor) and m.ndim == 2), None)


def mask_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """The two-dimensional padding mask ``[batch, positions]``, or ``None``."""
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def is_per_token(name: str, value: Any, rows: int, tokens: int) -> bool:
    """Whether an argument has one entry per token, ``[batch, tokens, ...]``."""
    return (
        isinstance(value, Tensor)
        and name != "position_ids"
        and value.ndim >= 2
        and value.shape[0] == rows
        and value.shape[1] == tokens
    )


def without_image(kwargs: Mapping[str, Any], is_kept: Tensor) -> dict[str, Any]:
    """Remove positions from a prompt and close up, left-padding rows to the same length.

    Args:
        kwargs: Arguments of a forward over a whole prompt.
        is_kept: ``[batch, tokens]`` bool, ``False`` for image tokens and padding.

    Returns:
        Arguments of a forward over the remaining tokens, with positions counted anew and
        everything that belongs to images dropped.
    """
    rows, tokens = is_kept.shape
    length = int(is_kept.sum(dim=1).max())
    order = torch.argsort(is_kept.int(), dim=1, stable=True)[:, tokens - length :]
    mask = is_kept.gather(1, order)
    kept: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in ("attention_mask", "position_ids", "cache_position"):
            continue
        if _is_of_image(name):
            continue
        if is_per_token(name, value, rows, tokens):
            index = order.reshape(rows, length, *[1] * (value.ndim - 2))
            value = value.gather(1, index.expand(rows, length, *value.shape[2:]))
            kept[name] = _fill(name, value, mask)
        elif not isinstance(value, Tensor) or value.ndim == 0:
            kept[name] = value
    kept["attention_mask"] = mask.long()
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor):
        counted = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        kept["position_ids"] = counted.expand(*positions.shape[:-2], rows, length)
    return kept


def last_tokens(
    kwargs: Mapping[str, Any], new: int, *, keep_cross_attention: bool
) -> dict[str, Any]:
    """Arguments for a decoding step over the last ``new`` tokens, images left behind."""
    rows, tokens = n_rows(kwargs), n_tokens(kwargs)
    step: dict[str, Any] = {}
    for name, value in kwargs.items():
        is_cross_mask = "cross_attention" in name
        if name in ("inputs_embeds", "cache_position", "attention_mask", "position_ids"):
            continue
        if is_cross_mask and not keep_cross_attention:
            continue
        if is_per_token(name, value, rows, tokens):
            step[name] = value[:, -new:]
        elif is_cross_mask or not _is_of_image(name):
            step[name] = value
    return step


def one_token(step: Mapping[str, Any], index: int, past: int) -> dict[str, Any]:
    """Arguments for one of the tokens of a decoding step, ``past`` positions being before it."""
    rows, tokens = n_rows(step), n_tokens(step)
    one: dict[str, Any] = {}
    for name, value in step.items():
        if name == "position_ids" and value is not None:
            value = value[..., index : index + 1]
        elif name == "attention_mask" and value is not None:
            value = value[:, : past + 1]
        elif is_per_token(name, value, rows, tokens):
            value = value[:, index : index + 1]
        one[name] = value
    return one


def add_rows(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Join the arguments of several forwards into one forward with more rows.

    Shorter prompts are left-padded to the length of the first.

    Args:
        parts: Arguments of each forward, the first one's prompt being the longest.

    Returns:
        The joined arguments, or ``None`` when these arguments cannot be joined.
    """
    rows, length = n_rows(parts[0]), n_tokens(parts[0])
    if any(n_tokens(part) > length or n_rows(part) != rows for part in parts):
        return None
    if any(part.get(name) for part in parts for name in _PER_LAYER_OUTPUTS):
        return None
    joined: dict[str, Any] = dict(parts[0])
    for name, first in parts[0].items():
        values = [part.get(name) for part in parts]
        if name == "mm_encoder_outputs":
            merged = _join_encoded([value for value in values if value])
            if merged is None:
                return None
            joined[name] = merged
        elif name == "attention_mask":
            joined[name] = _join_masks(parts, length)
        elif isinstance(first, Tensor):
            tensor = _join_tensors(name, values, [n_tokens(part) for part in parts], rows, length)
            if tensor is None:
                return None
            joined[name] = tensor
    if "attention_mask" not in joined:
        joined["attention_mask"] = _join_masks(parts, length)
    return joined


def _is_of_image(name: str) -> bool:
    return any(word in name for word in _IMAGE_WORDS)


def _fill(name: str, value: Tensor, is_token: Tensor) -> Tensor:
    """Make padding slots harmless: no image token, no image type."""
    if value.is_floating_point():
        return value
    filler = value[:, -1:] if name == "input_ids" else torch.zeros_like(value[:, -1:])
    is_token = is_token.reshape(*is_token.shape, *[1] * (value.ndim - 2))
    return torch.where(is_token, value, filler)


def _left_pad(name: str, value: Tensor, missing: int) -> Tensor:
    """Pad ``[batch, tokens, ...]`` on the left; token ids with an id that is surely text."""
    if missing == 0:
        return value
    filler = value[:, -1:] if name == "input_ids" else torch.zeros_like(value[:, -1:])
    return torch.cat([filler.expand(-1, missing, *value.shape[2:]), value], dim=1)


_PER_LAYER_OUTPUTS = ("output_hidden_states", "output_attentions")


def _join_masks(parts: Sequence[Mapping[str, Any]], length: int) -> Tensor | None:
    masks = []
    for part in parts:
        mask = mask_of(part)
        if mask is None:
            if part.get("attention_mask") is not None:
                return None
            mask = torch.ones(
                (n_rows(part), n_tokens(part)), dtype=torch.long, device=token_tensor(part).device
            )
        masks.append(torch.nn.functional.pad(mask, (length - mask.shape[1], 0)))
    if all(mask_of(part) is None and n_tokens(part) == length for part in parts):
        return None
    return torch.cat(masks)


def _join_tensors(
    name: str, values: Sequence[Any], lengths: Sequence[int], rows: int, length: int
) -> Tensor | None:
    """Join one tensor argument along the rows; ``None`` when a part lacks it."""
    if not all(isinstance(value, Tensor) for value in values):
        present = [value for value in values if isinstance(value, Tensor)]
        is_image = _is_of_image(name)
        return present[0] if is_image and len(present) == 1 else None
    if name == "position_ids":
        padded = [torch.nn.functional.pad(value, (length - value.shape[-1], 0)) for value in values]
        padded = [value.expand(*value.shape[:-2], rows, length) for value in padded]
        return torch.cat(padded, dim=-2)
    if name == "cache_position":
        return values[0]  # type: ignore[no-any-return]
    if all(is_per_token(name, v, rows, n) for v, n in zip(values, lengths, strict=True)):
        values = [_left_pad(name, v, length - v.shape[1]) for v in values]
    if len({value.shape[1:] for value in values}) > 1:
        return None
    return torch.cat(list(values))


def _join_encoded(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Join encoded images (``mm_encoder_outputs``) of several forwards, images in row order."""
    joined: dict[str, Any] = {}
    for modality in dict.fromkeys(name for part in parts for name in part):
        outputs = [part[modality] for part in parts if part.get(modality) is not None]
        if not outputs:
            continue
        fields = {
            name
            for output in outputs
            for name, value in output.items()
            if value is not None and name not in ("hidden_states", "attentions")
        }
        if "pooler_output" in fields:
            fields.discard("last_hidden_state")  # what the pooled features were made of
        if not fields <= {"pooler_output", "last_hidden_state", "deepstack_features"}:
            return None
        merged = {
            name: _join_features([output[name] for output in outputs], name == "deepstack_features")
            for name in fields
        }
        joined[modality] = type(outputs[0])(**merged)
    return joined


def _join_features(values: Sequence[Any], is_per_layer: bool) -> Any:
    """Join image features: a tensor, one entry per image, or per layer either of these."""
    if is_per_layer:
        return [_join_layer(layer) for layer in zip(*values, strict=True)]
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return [feature for value in values for feature in value]


def _join_layer(values: Sequence[Any]) -> Any:
    """Join the features for one decoder layer, with its index in front in some families."""
    if isinstance(values[0], tuple) and isinstance(values[0][0], int):
        return values[0][0], _join_features([features for _, features in values], False)
    return _join_features(values, False)
