"""What the vision encoder of a model attends to, image token by image token.

The encoder runs once more, unsteered and unchanged, while a torch function mode listens to its
attention. Scores of patches become scores of image tokens where every image token stands for one
patch, or for one cell of a square grid over the patches.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlm_steer.engine.active import ACTIVE, Probe
from vlm_steer.engine.inputs import pixel_names
from vlm_steer.errors import UnsupportedModelError

__all__ = ["encoded", "image_attention", "vision_states", "why_no_image_attention"]

_BLOCK = 64
# Other arguments of an image encoder say how its patches are rearranged (tiles, grids, queries).
_PLAIN_ARGUMENTS = frozenset(
    {
        "pixel_values",
        "pixel_attention_mask",
        "interpolate_pos_encoding",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "kwargs",
    }
)


def why_no_image_attention(model: Any) -> str | None:
    """Why ``image_attention`` cannot work for a model, or ``None`` when it should."""
    encode = _encoder(model)
    if encode is None:
        return "it has no function that encodes images into tokens of the decoder"
    rearranged = sorted(set(inspect.signature(encode).parameters) - _PLAIN_ARGUMENTS)
    if rearranged:
        return (
            f"its image tokens depend on {', '.join(rearranged)}, so which patch an image token "
            "stands for is not known"
        )
    return None


def image_attention(
    model: Any, given: Mapping[str, Any], layers: Sequence[int]
) -> tuple[Tensor, ...]:
    """Attention that image tokens receive inside the vision encoder.

    From the class token where the encoder has one, else on average from all patches; where an
    image token covers several patches, their mean.

    Args:
        model: The vision-language model.
        given: What the user passed to it, pixels included.
        layers: Encoder layers, negative ones counted from the last.

    Returns:
        Per layer ``[images, heads, tokens]`` float32, images (or tiles) in the order in which
        their tokens fill the prompt.

    Raises:
        UnsupportedModelError: Patches cannot be matched to image tokens.
    """
    if (reason := why_no_image_attention(model)) is not None:
        raise UnsupportedModelError(f"{type(model).__name__}: {reason}. Use another method.")
    if pixel_names(given) != ("pixel_values",):
        raise UnsupportedModelError(
            "a method looks at the image through the vision encoder and needs pixel_values, which "
            "were not passed. Pass them, for a continued conversation those of all its images."
        )
    with _Listener() as heard:
        features = encoded(model, given)
    received = heard.received
    if not received or not all(-len(received) <= layer < len(received) for layer in layers):
        raise UnsupportedModelError(
            f"{type(model).__name__}: the vision encoder showed {len(received)} layers of "
            "attention, too few for this method. Load the model with "
            "attn_implementation='sdpa' or 'eager'."
        )
    tokens = features.shape[0] // received[0].shape[0]
    return tuple(_pooled(received[layer], tokens) for layer in layers)


def encoded(model: Any, given: Mapping[str, Any]) -> Tensor:
    """The image tokens of a prompt as its vision side makes them, ``[tokens, hidden]`` float32.

    Every intervention is off meanwhile.

    Args:
        model: A vision-language model with ``get_image_features``.
        given: What the user passed to it, pixels included.
    """
    encode = model.get_image_features
    names = set(inspect.signature(encode).parameters) & set(given)
    token = ACTIVE.set(Probe())
    try:
        with torch.no_grad():
            output = encode(**{name: given[name] for name in names})
    finally:
        ACTIVE.reset(token)
    features = getattr(output, "pooler_output", output)
    parts = [features] if isinstance(features, Tensor) else features
    return torch.cat([part.flatten(0, -2) for part in parts]).float()


def _encoder(model: Any) -> Callable[..., Any] | None:
    encode: Callable[..., Any] | None = getattr(model, "get_image_features", None)
    return encode


def vision_states(model: Any, layers: Sequence[nn.Module], given: Mapping[str, Any]) -> Tensor:
    """States after every layer of the vision tower, mean over patches.

    Args:
        model: A vision-language model with ``get_image_features``.
        layers: The layers of its vision tower.
        given: What the user would pass to it, pixels included.

    Returns:
        ``[layers, hidden]`` float32, every intervention off.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        seen.append(states.float().flatten(0, -2).mean(dim=0))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        encoded(model, given)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([state.to(seen[0].device) for state in seen])


class _Listener(TorchFunctionMode):
    """Keeps what the patches receive in every self-attention over them."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[Tensor] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is functional.scaled_dot_product_attention:
            query, key = args[0], args[1]
            if query.shape[-2] == key.shape[-2] and self._fits(key.shape[-2]):
                mask, scale = kwargs.get("attn_mask"), kwargs.get("scale")
                self.received.append(_received_by_patches(query, key, mask, scale))
        elif function is functional.softmax:
            is_square = result.ndim == 4 and result.shape[-1] == result.shape[-2]
            if is_square and self._fits(result.shape[-1]):
                self.received.append(_without_class_token(result.float()))
        return result

    def _fits(self, n_keys: int) -> bool:
        """Whether an attention is over the patches, as the first one was."""
        n_patches = math.isqrt(n_keys) ** 2
        known = self.received[0].shape[-1] if self.received else n_patches
        return n_keys - n_patches in (0, 1) and n_patches == known


def _received_by_patches(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """``[images, heads, patches]`` from ``[images, heads, tokens, head_dim]``, blocks of rows."""
    n_keys = key.shape[-2]
    has_class_token = math.isqrt(n_keys) ** 2 != n_keys
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    total = query.new_zeros((*query.shape[:2], n_keys), dtype=torch.float32)
    n_rows = 1 if has_class_token else n_keys
    for start in range(0, n_rows, _BLOCK):
        rows = slice(start, min(start + _BLOCK, n_rows))
        scores = query[..., rows, :].float() @ key.float().transpose(-1, -2) * scale
        if mask is not None:
            block = mask[..., rows, :] if mask.shape[-2] > 1 else mask
            scores = (
                scores.masked_fill(~block, torch.finfo(scores.dtype).min)
                if block.dtype == torch.bool
                else scores + block.float()
            )
        total = total + scores.softmax(dim=-1).sum(dim=-2)
    total = total / n_rows
    return total[..., 1:] if has_class_token else total


def _without_class_token(weights: Tensor) -> Tensor:
    """The same from attention weights ``[images, heads, tokens, tokens]``."""
    n_keys = weights.shape[-1]
    has_class_token = math.isqrt(n_keys) ** 2 != n_keys
    return weights[..., 0, 1:] if has_class_token else weights.mean(dim=-2)


def _pooled(received: Tensor, tokens: int) -> Tensor:
    """``[images, heads, tokens]``: means over the cells of a square grid of patches."""
    side = math.isqrt(received.shape[-1])
    cells = math.isqrt(tokens)
    if tokens == 0 or cells * cells != tokens or side % cells:
        raise UnsupportedModelError(
            f"{tokens} image tokens do not form a grid over {side} x {side} patches, so which "
            "patch an image token stands for is not known. Use another method."
        )
    width = side // cells
    grid = received.reshape(*received.shape[:-1], cells, width, cells, width)
    return grid.mean(dim=(-3, -1)).flatten(-2)
