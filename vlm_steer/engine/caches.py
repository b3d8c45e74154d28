"""Caches of several streams made one, and taken apart again.

Only caches that hold plain keys and values of every position are touched; those of recurrent
layers, static ones and quantised ones are left alone.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vlm_steer.errors import SteerError

__all__ = ["can_join", "join", "split", "take_rows", "without_last"]


def without_last(cache: Any) -> Any | None:
    """A copy of a cache without its last position, or ``None`` where that cannot be made."""
    if not _is_plain(cache) or any(_has_dropped(layer) for layer in cache.layers):
        return None
    shorter = copy.deepcopy(cache)
    vars(shorter).pop("reorder_cache", None)  # that of the user's follows other rows
    shorter.crop(-1)
    return shorter


def can_join(cache: Any, others: Sequence[Any], missing: Sequence[int]) -> bool:
    """Whether the rows of other caches can be appended to a cache.

    Args:
        cache: The cache.
        others: The other caches.
        missing: Of each of them, the first one included, how many positions it is shorter than the
            longest.
    """
    caches = (cache, *others)
    if not all(_is_plain(one) for one in caches):
        return False
    if any(missing) and any(layer.is_sliding for layer in cache.layers):
        return False
    shapes = [
        [
            None if layer.keys is None else (*layer.keys.shape[:2], layer.keys.shape[2] + more)
            for layer in one.layers
        ]
        for one, more in zip(caches, missing, strict=True)
    ]
    return all(shape == shapes[0] for shape in shapes)


def join(cache: Any, others: Sequence[Any], missing: Sequence[int]) -> None:
    """Append the rows of other caches to a cache, all padded on the left to the longest."""
    for layer, *of_others in zip(cache.layers, *(one.layers for one in others), strict=True):
        if layer.keys is None:
            continue
        parts = (layer, *of_others)
        layer.keys = _stacked([part.keys for part in parts], missing)
        layer.values = _stacked([part.values for part in parts], missing)


def split(cache: Any, rows: int, padding: int) -> None:
    """Leave the first rows of a cache, without their padding."""
    cache.reorder_cache(torch.arange(rows))  # not every layer can select rows
    if padding == 0:
        return
    for layer in cache.layers:
        if layer.keys is not None:
            layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]


def take_rows(cache: Any, rows: Tensor) -> None:
    """Turn a cache into one of other rows, ``[new rows]`` int64, each of which continues one.

    The row of a cache that has no other is not copied: what comes next is appended to a copy.

    Raises:
        SteerError: The cache has fewer rows.
    """
    if not _is_plain(cache):
        cache.reorder_cache(rows)  # not every layer can select rows
        return
    known = min(
        (layer.keys.shape[0] for layer in cache.layers if layer.keys is not None), default=0
    )
    if bool(((rows < 0) | (rows >= known)).any()):
        raise SteerError(
            f"fork(): rows {rows.tolist()} were asked for, but the cache has {known}. Pass, for "
            "each new row, the int64 index of the row it continues."
        )
    if known > 1:
        cache.reorder_cache(rows)
        return
    for layer in cache.layers:
        if layer.keys is not None:
            layer.keys = layer.keys.expand(len(rows), -1, -1, -1)
            layer.values = layer.values.expand(len(rows), -1, -1, -1)


def _stacked(parts: Sequence[Tensor], missing: Sequence[int]) -> Tensor:
    padded = [
        functional.pad(part, (0, 0, more, 0)) for part, more in zip(parts, missing, strict=True)
    ]
    return torch.cat(padded)


def _is_plain(cache: Any) -> bool:
    """Whether a cache holds the keys and values of all positions, each layer in two tensors."""
    layers = getattr(cache, "layers", [])
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return bool(layers) and all(type(layer) in plain for layer in layers)


def _has_dropped(layer: Any) -> bool:
    """Whether a sliding window has dropped positions, which are missing once it moves back."""
    is_sliding = isinstance(layer, DynamicSlidingWindowLayer)
    return is_sliding and layer.get_seq_length() >= layer.get_max_length() - 1
