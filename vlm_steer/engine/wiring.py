"""What is put on a model so that hooks run inside its forwards, and taken off again.

Every hook of torch here looks up which forward is running and does nothing outside one.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from vlm_steer.engine import attention
from vlm_steer.engine.active import ACTIVE
from vlm_steer.engine.call import Encoding
from vlm_steer.engine.forward import Forward
from vlm_steer.engine.inputs import token_tensor
from vlm_steer.engine.model import ModelInfo
from vlm_steer.engine.run import named_arguments

__all__ = ["hook_decoder", "hook_vision", "restore_attention", "switch_attention"]

_SWITCHED: dict[int, tuple[Any, str, int]] = {}


def switch_attention(configs: tuple[Any, ...]) -> None:
    """Point configurations at our attention name; two models may share a configuration."""
    keys = [attention.key_for(config._attn_implementation) for config in configs]
    for config, key in zip(configs, keys, strict=True):
        _, original, users = _SWITCHED.get(id(config), (config, config._attn_implementation, 0))
        _SWITCHED[id(config)] = (config, original, users + 1)
        config._attn_implementation_internal = key


def restore_attention(configs: tuple[Any, ...]) -> None:
    """Undo one ``switch_attention``."""
    for config in configs:
        _, original, users = _SWITCHED.pop(id(config))
        if users > 1:
            _SWITCHED[id(config)] = (config, original, users - 1)
        else:
            config._attn_implementation_internal = original


def hook_decoder(info: ModelInfo) -> list[RemovableHandle]:
    """Hook the text decoder, its layers and their MLPs."""
    handles = [
        info.decoder.register_forward_pre_hook(look, with_kwargs=True)
        for look in (_see_images, _move)
    ]
    first = info.layers[min(info.layers)]
    handles.append(first.register_forward_pre_hook(_embedder, with_kwargs=True))
    # In front of the hooks by which transformers collects hidden states, which it puts on once.
    for index, layer in info.layers.items():
        handles += [
            layer.register_forward_pre_hook(_marker(index), with_kwargs=True),
            layer.register_forward_hook(_editor("hidden", index), prepend=True),
            layer.register_forward_hook(_tapper(index)),
        ]
    for index, mlp in info.mlps.items():
        handles.append(mlp.register_forward_hook(_editor("mlp", index)))
    return handles


def hook_vision(info: ModelInfo, encoding: Callable[[], Encoding | None]) -> list[RemovableHandle]:
    """Hook the layers of the vision tower and their MLPs.

    Args:
        info: The model.
        encoding: Says under what images are being encoded in this context.
    """

    def editor(site: Literal["mlp", "residual"], layer: int) -> Callable[..., Any]:
        def edit(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            now = encoding()
            if now is None or not now.plan.vision:
                return None
            if isinstance(output, tuple):
                return (now.edit(site, layer, output[0]), *output[1:])
            return now.edit(site, layer, output)

        return edit

    # In front of the hooks by which transformers collects hidden states for the projector.
    handles = []
    for index, (layer, mlp) in enumerate(info.vision_layers):
        handles += [
            mlp.register_forward_hook(editor("mlp", index), prepend=True),
            layer.register_forward_hook(editor("residual", index), prepend=True),
        ]
    return handles


def _see_images(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A hook on the text decoder that keeps the embeddings of image tokens."""
    forward = ACTIVE.get()
    if isinstance(forward, Forward) and forward.call.plan.needs_image_features:
        forward.see_images(named_arguments(decoder, args, kwargs).get("inputs_embeds"))
    return None


def _move(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A hook on the text decoder that lets methods move the positions of tokens."""
    forward = ACTIVE.get()
    if not isinstance(forward, Forward) or not forward.call.plan.positions:
        return None
    kwargs = named_arguments(decoder, args, kwargs)
    return (), forward.moved(kwargs, token_tensor(kwargs))


def _embedder(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A hook on the first decoder layer's input that lets methods change embeddings."""
    forward = ACTIVE.get()
    if not isinstance(forward, Forward) or not forward.call.plan.embeds:
        return None
    bounds = forward.call.plan.embeds
    if args:
        return (forward.edit("embeds", 0, bounds, args[0]), *args[1:]), kwargs
    embeds = forward.edit("embeds", 0, bounds, kwargs["hidden_states"])
    return args, {**kwargs, "hidden_states": embeds}


def _marker(layer: int) -> Callable[..., None]:
    """A hook on a decoder layer's input that lets methods mark key columns and carry a state."""

    def mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = ACTIVE.get()
        if not isinstance(forward, Forward):
            return
        plan = forward.call.plan
        if layer in plan.marks or layer in plan.carry:
            hidden = args[0] if args else kwargs["hidden_states"]
            forward.mark(layer, hidden)
            forward.carry(layer, hidden)

    return mark


def _editor(hook: Literal["hidden", "mlp"], layer: int) -> Callable[..., Any]:
    """A hook on the output of a decoder layer or of its MLP."""

    def edit(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        forward = ACTIVE.get()
        if not isinstance(forward, Forward):
            return None
        bounds = getattr(forward.call.plan, hook).get(layer)
        if bounds is None:
            return None
        given = args[0] if args and hook == "mlp" else None
        if isinstance(output, tuple):
            return (forward.edit(hook, layer, bounds, output[0], given), *output[1:])
        return forward.edit(hook, layer, bounds, output, given)

    return edit


def _tapper(layer: int) -> Callable[..., None]:
    """A hook on a decoder layer that keeps the last row of its output, edits included."""

    def tap(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward = ACTIVE.get()
        if forward is not None:
            forward.tap(layer, output[0] if isinstance(output, tuple) else output)

    return tap
