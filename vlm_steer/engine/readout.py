"""How a model turns hidden states into next-token logits: final norm, output head, scale, cap.

Nothing is taken on trust. One short text-only pass shows which modules run between the last layer
and the end of the decoder, and what they give must be the logits that the model itself returns.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from vlm_steer.errors import UnsupportedModelError

__all__ = ["Readout", "find_readout"]

_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAP = "final_logit_softcapping"


@dataclass(frozen=True, eq=False, slots=True)
class Readout:
    """From hidden states to logits, as the model does it after its last layer.

    Attributes:
        norms: What runs after the last layer, in order; usually one norm.
        head: The output head.
        scale: Factor on its result.
        cap: Bound of a soft cap ``cap * tanh(logits / cap)``, or ``None``.
    """

    norms: tuple[nn.Module, ...]
    head: nn.Module
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor, *, normed: bool = True, mean: bool = False) -> Tensor:
        """``[..., hidden]`` in the model's dtype -> ``[..., vocabulary]`` float32.

        Args:
            hidden: Outputs of decoder layers.
            normed: Apply the final norm; some published methods leave it out.
            mean: Give the mean over the layers of ``[batch, layers, hidden]``.
        """
        for norm in self.norms if normed else ():
            hidden = norm(hidden)
        if mean and self.cap is None:  # the head is linear
            hidden = hidden.float().mean(dim=1, keepdim=True).to(hidden.dtype)
        logits: Tensor = self.head(hidden).float()
        if self.scale != 1:  # the vocabulary is large
            logits = logits * self.scale
        if self.cap is None:
            return logits
        logits = torch.tanh(logits / self.cap) * self.cap
        return logits.mean(dim=1, keepdim=True) if mean else logits


def find_readout(
    owner: nn.Module, decoder: nn.Module, layers: Mapping[int, nn.Module], ids: Tensor
) -> Readout:
    """Find out how a model reads its logits off, and verify it.

    Args:
        owner: The module that returns logits.
        decoder: Its text decoder.
        layers: Decoder layers by index.
        ids: ``[1, tokens]`` of a text-only prompt.

    Raises:
        UnsupportedModelError: The logits cannot be reproduced from the last layer's output.
    """
    head: nn.Module | None = owner.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise UnsupportedModelError(f"{type(owner).__name__} has no output head.")
    trail = _Trail()
    with ExitStack() as hooks:
        for layer in layers.values():
            hooks.callback(layer.register_forward_hook(trail.restart).remove)
        for module in _beside_layers(decoder, layers, head):
            hooks.callback(module.register_forward_hook(trail.follow).remove)
        try:
            logits: Tensor = owner(input_ids=ids, use_cache=False).logits
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{type(owner).__name__} could not run a prompt without an image, which shows how "
                f"it reads its logits off its last layer: {error}"
            ) from error
    hidden = trail.hidden
    if hidden is not None and hidden.ndim == 3:
        hidden = hidden[:, -logits.shape[1] :]
        for scale, cap in _scales_and_caps(getattr(decoder, "config", owner.config)):
            readout = Readout(tuple(trail.modules), head, scale, cap)
            if _agrees(readout(hidden), logits):
                return readout
    raise UnsupportedModelError(
        f"the logits of {type(owner).__name__} are not its final norm and output head applied to "
        "the output of its last layer, so early layers cannot be read. Use a method without early "
        "layers."
    )


class _Trail:
    """Follows one pass from the output of the last layer that ran."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.modules: list[nn.Module] = []

    def restart(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.hidden = output[0] if isinstance(output, tuple) else output
        self.modules.clear()

    def follow(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.hidden is not None and isinstance(output, Tensor):
            self.modules.append(module)


def _beside_layers(
    decoder: nn.Module, layers: Mapping[int, nn.Module], head: nn.Module
) -> list[nn.Module]:
    """Modules of the decoder that hold no layers, beside those that do; some hold the head."""
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    holding = [
        module
        for module in decoder.modules()
        if id(module) not in inside and any(id(child) in inside for child in module.modules())
    ]
    held = {id(module) for module in holding} | inside | {id(head)}
    return [child for module in holding for child in module.children() if id(child) not in held]


def _scales_and_caps(config: Any) -> Iterator[tuple[float, float | None]]:
    """What a configuration names; not every model applies all that its text configuration names."""

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) and value else None

    factors = [factor for name in _FACTORS if (factor := number(name)) is not None]
    scales = dict.fromkeys([*factors, *(1 / factor for factor in factors), 1.0])
    return product(scales, dict.fromkeys((number(_CAP), None)))


def _agrees(actual: Tensor, logits: Tensor) -> bool:
    """Whether logits are those of the model, up to the rounding of its dtype."""
    expected = logits.float()
    tolerance = 1e-3 if logits.dtype == torch.float32 else 5e-2
    return actual.shape == expected.shape and bool(
        (actual - expected).abs().max() <= tolerance * expected.abs().max()
    )
