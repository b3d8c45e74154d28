"""Turning queries and keys to other positions, as the model's own rotary embedding would.

Rotations add up: a query turned by ``s`` meets a key as if it stood ``s`` positions further right.
So scores at other positions need neither the states before the rotation nor a second set of keys.
Nothing is taken on trust: a short text-only prompt, run at two places, has to show that every
layer's queries and keys turn as the embedding says.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlm_steer.engine.active import ACTIVE, Probe
from vlm_steer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["Rotation", "find_rotation"]

_GROWING = ("dynamic", "longrope")
_DISTANCE = 7


@dataclass(frozen=True, eq=False, slots=True)
class Rotation:
    """The rotary embedding of a decoder.

    Attributes:
        embedding: Gives cosines and sines of positions.
        apply: By layer, how its attention turns states by them.
    """

    embedding: nn.Module
    apply: Mapping[int, Callable[..., tuple[Tensor, Tensor]]]

    def turn(self, layer: int, states: Tensor, by: Tensor) -> Tensor:
        """Move queries or keys that carry their position already.

        Args:
            layer: Index of the decoder layer.
            states: ``[batch, heads, tokens, head_dim]``.
            by: ``[batch, heads or 1, tokens]`` int64, positions to the right; may be negative.

        Returns:
            float32 ``[batch, heads, tokens, head_dim]``.
        """
        heads = states.shape[1] // by.shape[1]
        flat = states.float().reshape(states.shape[0], heads, -1, states.shape[-1])
        cosines, sines = self.embedding(flat, by.reshape(by.shape[0], -1))
        turned, _ = self.apply[layer](flat, flat, cosines, sines)
        # Some embeddings (YaRN) scale what they turn; these states were scaled before.
        turned = turned / getattr(self.embedding, "attention_scaling", 1.0)
        return turned.reshape(states.shape)


def find_rotation(model: "ModelInfo") -> Rotation:
    """Find out how a decoder turns queries and keys, and verify it.

    Raises:
        UnsupportedModelError: Its layers do not all turn alike, or in a way unknown here.
    """
    embeddings = [m for m in model.decoder.modules() if "inv_freq" in m._buffers]
    if model.positions == "multi-axis":
        raise _unknown(model, "its positions have several axes (M-RoPE)")
    if len(embeddings) != 1:
        raise _unknown(model, f"it has {len(embeddings)} rotary embeddings, not one")
    if getattr(embeddings[0], "rope_type", "default") in _GROWING:
        raise _unknown(model, "its rotary frequencies change with the length of the sequence")
    apply = {site.layer: _apply_beside(module) for module, site in model.sites.items()}
    if any(site.axis == "self" and apply[site.layer] is None for site in model.sites.values()):
        raise _unknown(model, "its attention turns by a function that the engine does not know")
    rotation = Rotation(embeddings[0], {k: v for k, v in apply.items() if v is not None})
    here, there = _states_at(model, 0), _states_at(model, _DISTANCE)
    for layer, pair in here.items():
        if layer not in there or not all(
            _agrees(rotation, layer, old, new, model)
            for old, new in zip(pair, there[layer], strict=True)
        ):
            raise _unknown(model, f"layer {layer} does not turn by its rotary embedding")
    return rotation


def _apply_beside(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def _states_at(model: "ModelInfo", place: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Queries and keys by layer of a short text-only prompt that starts at a position."""
    from vlm_steer.engine.attention import routed

    ids = model.text_only_prompt(8)
    sites = {module: site for module, site in model.sites.items() if site.axis == "self"}
    probe = Probe(sites=sites, is_watching=True)
    token = ACTIVE.set(probe)
    try:
        with torch.no_grad(), routed(model.configs):
            model.decoder(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(place, place + ids.shape[1], device=ids.device)[None],
                use_cache=False,
            )
    finally:
        ACTIVE.reset(token)
    return probe.inputs


def _agrees(rotation: Rotation, layer: int, old: Tensor, new: Tensor, model: "ModelInfo") -> bool:
    by = torch.full((1, 1, old.shape[2]), _DISTANCE, device=old.device)
    try:
        turned = rotation.turn(layer, old, by)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unknown(model, f"layer {layer} turns its states otherwise ({error})") from error
    tolerance = 1e-3 if new.dtype == torch.float32 else 5e-2
    return bool((turned - new.float()).abs().max() <= tolerance * new.float().abs().max())


def _unknown(model: "ModelInfo", reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"tokens of {model.family} cannot be placed anew in each head and row: {reason}. Use a "
        "method that keeps the order of tokens."
    )
