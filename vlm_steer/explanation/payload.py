"""An explanation as plain data: what the page shows, and what ``to_json`` writes."""

import base64
import io
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm_steer.engine.geometry import Places
from vlm_steer.explanation.checks import Check
from vlm_steer.explanation.lens import Lens
from vlm_steer.explanation.result import Arm, ExplainResult
from vlm_steer.explanation.words import Word, differing

__all__ = ["SCHEMA", "check_payload", "payload"]

SCHEMA = "vlm_steer.explain/2"

_PLANS = ((6, 3), (6, 0), (4, 0), (3, 0), (2, 0), (1, 0))
"""Bands of layers and single heads to keep maps of, best first."""
_HEAD_NAMES = ("the head most on the image", "the second such head", "the third such head")
_MAP_BYTES, _HEAD_BYTES = 2_050_000, 650_000
"""Of all maps, and of the masses of single heads, before they are written as text, which takes a
third more."""
_PICTURE_SIDE = 900


def payload(result: ExplainResult) -> dict[str, Any]:
    """Everything about an explanation, JSON-ready.

    Maps are one byte per image token, in units of 1/255 of the largest value of the map (``tops``)
    with sinks left out; attention to sinks is kept beside them as little-endian float32. A
    log-probability of ``None`` is minus infinity: the word is ruled out.
    """
    notes: list[str] = []
    budget, n_heads = _budget(result, notes), _words_with_heads(result, notes)
    return {
        "schema": SCHEMA,
        "prompt": result.prompt,
        "images": _pictures(result.images),
        "places": None if result.places is None else [_boxes(one) for one in result.places],
        "why_no_map": result.why_no_map,
        "thresholds": dict(result.thresholds),
        "arms": [
            _arm(arm, other.words, budget, n_heads)
            for arm, other in zip(result.arms, reversed(result.arms), strict=True)
        ],
        "notes": notes,
        "provenance": dict(result.provenance),
    }


class _Budget(NamedTuple):
    """Maps that fit into the page: in bands of layers, of single heads, of how many words."""

    bands: int
    heads: int
    words: int


def _budget(result: ExplainResult, notes: list[str]) -> _Budget | None:
    if result.places is None:
        return None
    words = max((len(arm.words) for arm in result.arms), default=0)
    depth = len(result.arm.trace.map_layers)
    per_map = len(result.places[0].boxes) * len(result.arms)
    for most, heads in _PLANS:
        bands = min(most, depth)
        maps = heads + (bands + 1 if bands > 1 else 1)
        if per_map * maps * words <= _MAP_BYTES:
            if bands < min(_PLANS[0][0], depth):
                notes.append(f"to keep the page small, maps are averaged over {_in_bands(bands)}")
            return _Budget(bands, heads, words)
    fitting = _MAP_BYTES // per_map
    notes.append(f"to keep the page small, only the first {fitting} words have maps")
    return _Budget(1, 0, fitting)


def _words_with_heads(result: ExplainResult, notes: list[str]) -> int:
    """How many words of each answer fit with the mass of every head on the image."""
    per_word = sum(arm.trace.masses[0, :, :, 0].numel() for arm in result.arms)
    words = max((len(arm.words) for arm in result.arms), default=0)
    fitting = min(words, _HEAD_BYTES // per_word)
    if fitting < words:
        notes.append(f"to keep the page small, heads are shown for the first {fitting} words")
    return fitting


def _in_bands(bands: int) -> str:
    return "all layers" if bands == 1 else f"{bands} bands of layers"


def _arm(arm: Arm, others: Sequence[Word], budget: _Budget | None, n_heads: int) -> dict[str, Any]:
    trace = arm.trace
    with_heads = arm.words[:n_heads]
    heads = torch.stack(
        [trace.image_mass[slice(*w.tokens)].mean(dim=0) for w in with_heads] or [torch.zeros(0)]
    )
    data: dict[str, Any] = {
        "name": arm.name,
        "text": trace.text,
        "tokens": [
            {"start": start, "end": end, "logprob": logprob}
            for (start, end), logprob in zip(
                trace.spans, _finite(trace.logprob.tolist()), strict=True
            )
        ],
        "blocks": list(trace.layout.blocks),
        "masses": _rounded(trace.masses.mean(dim=(1, 2))),
        "words": [
            {
                "start": word.span[0],
                "end": word.span[1],
                "tokens": list(word.tokens),
                "logprob": _finite([float(trace.logprob[slice(*word.tokens)].sum())])[0],
                "differs": differs,
            }
            for word, differs in zip(arm.words, differing(arm.words, others), strict=True)
        ],
        "risk": {name: _finite(values) for name, values in arm.risk.items()},
        "position": _finite(arm.position),
        "layers": list(trace.layers),
        "n_heads": trace.masses.shape[2],
        "heads": _bytes(heads.flatten(1) if with_heads else heads[None]),
        "lens": None if arm.lens is None else _lens(arm.lens, arm.words),
        "why_no_lens": arm.why_no_lens,
        "checks": {str(number): check_payload(check) for number, check in arm.checks.items()},
    }
    return data | {"maps": None if budget is None else _maps(arm, budget)}


def _lens(lens: Lens, words: Sequence[Word]) -> dict[str, Any]:
    """Per word, its first token's log-probability at every layer, and what is likeliest there."""
    first = [word.tokens[0] for word in words]
    best = lens.best[first]
    names = {token: number for number, token in enumerate(sorted(lens.names))}
    return {
        "layers": list(lens.layers),
        "logprob": [
            [round(value, 3) for value in row]
            for row in lens.logprob[first].clamp(min=-99).tolist()
        ],
        "best": [[names[token] for token in row] for row in best.tolist()],
        "names": [lens.names[token] for token in names],
    }


def _maps(arm: Arm, budget: _Budget) -> dict[str, Any]:
    """Maps of the words: over all layers and heads, in bands of layers, of single heads."""
    trace = arm.trace
    depth = len(trace.map_layers)
    bands = [(0, depth)]
    if budget.bands > 1:
        edges = np.linspace(0, depth, budget.bands + 1).round().astype(int).tolist()
        bands += itertools.pairwise(edges)
    names = ["all layers", *(_layers(trace.map_layers[slice(*band)]) for band in bands[1:])]
    names += _HEAD_NAMES[: budget.heads]
    words = arm.words[: budget.words] if trace.maps is not None else ()
    maps = torch.zeros(len(words), len(names), len(arm.sinks))
    for rows, word in zip(maps, words, strict=True):
        by_head = cast("Tensor", trace.maps)[slice(*word.tokens)].float().mean(dim=0)
        for row, band in zip(rows, bands, strict=False):
            row.copy_(by_head[slice(*band)].mean(dim=(0, 1)))
        heads = by_head.flatten(0, 1)
        rows[len(bands) :] = heads[heads.sum(dim=1).topk(budget.heads).indices]
    sinks = arm.sinks.nonzero().flatten()
    at_sinks = maps[..., sinks].numpy().astype("<f4").tobytes()
    maps[..., sinks] = 0
    return {
        "bands": names,
        "n_words": len(words),
        **_bytes(maps.flatten(0, 1)),
        "sinks": sinks.tolist(),
        "sink_values": base64.b64encode(at_sinks).decode("ascii"),
    }


def _layers(layers: Sequence[int]) -> str:
    first, last = layers[0], layers[-1]
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _bytes(rows: Tensor) -> dict[str, Any]:
    """Rows in units of 1/255 of their largest value."""
    tops = rows.amax(dim=1).clamp(min=1e-12) if rows.numel() else rows.new_zeros(len(rows))
    units = (rows / tops[:, None] * 255).round().clamp(0, 255).to(torch.uint8)
    return {
        "tops": [float(f"{top:.6g}") for top in tops.tolist()],
        "data": base64.b64encode(units.numpy().tobytes()).decode("ascii"),
    }


def check_payload(check: Check) -> dict[str, Any]:
    """A check as plain data."""
    names = ("logprob", "without_cells", "without_others", "without_image")
    return {"cells": list(check.cells)} | {
        name: _finite([getattr(check, name)])[0] for name in names
    }


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]


def _finite(values: Sequence[float]) -> list[float | None]:
    """Numbers that JSON has; ``None`` for those it has not."""
    return [round(float(v), 5) if np.isfinite(v) else None for v in values]


def _boxes(places: Places) -> list[list[float] | None]:
    return [
        [round(edge, 2) for edge in box] if has_place else None
        for box, has_place in zip(places.boxes.tolist(), places.has_place.tolist(), strict=True)
    ]


def _pictures(images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """The pictures, the smaller the more there are; ``width`` and ``height`` are the originals'."""
    side = round(_PICTURE_SIDE / len(images) ** 0.5)
    return [_picture(image, side) for image in images]


def _picture(image: Image.Image, side: int) -> dict[str, Any]:
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85, optimize=True)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"source": source, "width": image.width, "height": image.height}
