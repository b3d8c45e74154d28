"""Steering one attention layer, as published code does it and as it is done here.

Both work on the same random queries, keys and values. Published code of VAR and PAI forces eager
attention, which writes the whole attention matrix, and VAR then walks over the heads in Python.
Here the stock kernel computes all rows, and only steered rows are computed again.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm_steer import functional as F
from vlm_steer.functional.fast import row_scores, weighted_values

__all__ = ["LayerCost", "measure_layer"]

_BLOCK = 64
_SYSTEM = 32
_TEXT = 32
_ALPHA = 0.5
_VAR = {"keep": 0.4, "max_sink_ratio": 1.0, "min_image_mass": 0.0}


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Times of one attention layer as ratios to the stock kernel on the same tensors.

    Attributes:
        method: Name of the method.
        phase: ``prefill`` or ``decode``.
        tokens: Key columns.
        published: Ratio of the way of the published code.
        here: Ratio of the way taken here.
    """

    method: str
    phase: str
    tokens: int
    published: float
    here: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's tensors: ``[1, heads, rows, head_dim]``, masks ``[1, keys]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_image: Tensor
    is_sink: Tensor

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    @property
    def first_text_row(self) -> int:
        """First row after the image."""
        return max(self.query.shape[2] - _TEXT, 0)

    def causal(self, start: int = 0) -> Tensor:
        """``[rows, keys]`` bool, ``True`` where closed, of the rows from ``start`` on."""
        rows, keys = self.query.shape[2], self.key.shape[2]
        row = torch.arange(keys - rows + start, keys)[:, None]
        return torch.arange(keys)[None, :] > row


def measure_layer(
    tokens: int,
    *,
    heads: int = 32,
    head_dim: int = 128,
    repeats: int = 5,
) -> list[LayerCost]:
    """Time VAR and PAI on one layer of random tensors, float32 on the CPU.

    Args:
        tokens: Length of the prompt, above 64; all but 64 tokens are image.
        heads: Attention heads.
        head_dim: Width of a head.
        repeats: Timings of each, every one beside one of the kernel; medians of the ratios are
            reported.
    """
    prompt = _layer(tokens, tokens, heads, head_dim)
    step = _layer(1, tokens, heads, head_dim)
    costs = []
    for phase, layer in (("prefill", prompt), ("decode", step)):
        for method, published, here in (
            ("pai", _pai_published, _pai_here),
            ("var", _var_published, _var_here),
        ):
            torch.testing.assert_close(published(layer), here(layer), rtol=1e-3, atol=1e-4)
            ratios = [_ratio(way, layer, repeats) for way in (published, here)]
            costs.append(LayerCost(method, phase, tokens, *ratios))
    return costs


def _layer(rows: int, keys: int, heads: int, head_dim: int) -> _Layer:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((1, heads, n, head_dim), generator=generator) for n in (rows, keys, keys)
    )
    column = torch.arange(keys)[None]
    is_image = (column >= _SYSTEM) & (column < keys - _TEXT)
    is_sink = (column == 0) | (column == _SYSTEM + 3)
    return _Layer(query, key, value, is_image, is_sink)


def _ratio(way: Callable[[_Layer], Tensor], layer: _Layer, repeats: int) -> float:
    """Median ratio to the stock kernel, each timing beside one of it."""
    pairs = [(_seconds(_stock, layer), _seconds(way, layer)) for _ in range(repeats + 1)]
    return statistics.median(mine / base for base, mine in pairs[1:])  # the first round warms up


def _seconds(work: Callable[[_Layer], Tensor], layer: _Layer) -> float:
    start = time.perf_counter()
    work(layer)
    return time.perf_counter() - start


def _stock(layer: _Layer) -> Tensor:
    is_prompt = layer.query.shape[2] > 1
    return scaled_dot_product_attention(layer.query, layer.key, layer.value, is_causal=is_prompt)


# -- the way of the published code ------------------------------------------------------------
def _all_scores(layer: _Layer) -> Tensor:
    scores = layer.query @ layer.key.transpose(-1, -2) * layer.scale
    return scores.masked_fill(layer.causal(), torch.finfo(scores.dtype).min)


def _pai_published(layer: _Layer) -> Tensor:
    scores = _all_scores(layer)
    image = layer.is_image[0]
    last = scores[:, :, -1, image]
    scores[:, :, -1, image] = last.abs() * _ALPHA + last
    return scores.softmax(dim=-1, dtype=torch.float32) @ layer.value


def _var_published(layer: _Layer) -> Tensor:
    weights = _all_scores(layer).softmax(dim=-1, dtype=torch.float32)
    rows = slice(layer.first_text_row, None)
    is_row = torch.ones((1, layer.query.shape[2] - layer.first_text_row), dtype=torch.bool)
    for head in range(weights.shape[1]):
        one = weights[:, head : head + 1, rows].clone()
        weights[:, head : head + 1, rows] = F.redistribute_sinks(
            one, layer.is_sink, layer.is_image, is_row, **_VAR
        )
    return weights @ layer.value


# -- the way taken here -----------------------------------------------------------------------
def _steered_rows(layer: _Layer, start: int, edit: Callable[[Tensor, bool], Tensor]) -> Tensor:
    outputs = _stock(layer) if layer.query.shape[2] > _BLOCK else None
    scores = row_scores(layer.query[:, :, start:], layer.key, scale=layer.scale)
    scores = edit(scores, False).masked_fill(layer.causal(start), torch.finfo(scores.dtype).min)
    rows = weighted_values(edit(scores.softmax(dim=-1), True), layer.value)
    if outputs is None:
        return rows
    outputs[:, :, start:] = rows
    return outputs


def _pai_here(layer: _Layer) -> Tensor:
    def edit(tensor: Tensor, is_weights: bool) -> Tensor:
        return tensor if is_weights else F.boost_scores(tensor, layer.is_image, alpha=_ALPHA)

    return _steered_rows(layer, layer.query.shape[2] - 1, edit)


def _var_here(layer: _Layer) -> Tensor:
    def edit(tensor: Tensor, is_weights: bool) -> Tensor:
        if not is_weights:
            return tensor
        is_row = torch.ones((1, tensor.shape[2]), dtype=torch.bool)
        return F.redistribute_sinks(tensor, layer.is_sink, layer.is_image, is_row, **_VAR)

    return _steered_rows(layer, layer.first_text_row, edit)
