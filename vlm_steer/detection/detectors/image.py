"""Detectors that ask what the image itself says: read as words, or taken away."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_steer.detection.base import OfTrace, PerToken, Unit, register_detector
from vlm_steer.detection.recording import Need
from vlm_steer.detection.trace import Trace
from vlm_steer.engine.selectors import Selector

from .attention import chosen_layers

__all__ = ["LogitLens", "VisualDependence"]


@register_detector("logit_lens")
@dataclass(frozen=True, kw_only=True)
class LogitLens(OfTrace):
    """Whether any image token, read as a word in any layer, says this word (vl-interp, ICLR 2025).

    The risk is one minus the largest probability over image tokens, layers and the word's tokens.

    Deviations: the official code keeps the 50 likeliest words and makes their probabilities sum to
    1, so most words tie at exactly 0, and reads all layers but the last without the model's final
    norm; here the whole vocabulary counts and the norm is applied everywhere. It looks up the
    canonical name of the object, here it is the word as written.

    Cost: the output head on every image token in every layer, once per text.

    Attributes:
        layers: Decoder layers to read.
    """

    paper: ClassVar[str] = "arXiv:2410.02762"
    needs: ClassVar[tuple[Need, ...]] = ("lens",)

    layers: Selector = "all"

    def of_units(self, trace: Trace, units: Sequence[Unit]) -> Tensor:
        """``[units, 1]``."""
        lens = self.require(trace.lens, "lens")[:, chosen_layers(trace, self.layers)]
        best = [float(lens[slice(*unit.tokens)].amax()) for unit in units]
        return 1 - torch.tensor(best, dtype=torch.float64)[:, None]


@register_detector("visual_dependence")
@dataclass(frozen=True, kw_only=True)
class VisualDependence(PerToken):
    """How little the image raised the log-probability of the word, nats.

    ``log p(word | text) - log p(word | image, text)``, what contrastive decoders amplify.

    Cost: one more pass over the text, without the image.

    Attributes:
        pool: ``first`` token of the unit, or the ``mean`` over its tokens.
    """

    needs: ClassVar[tuple[Need, ...]] = ("blind",)

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens, 1]``."""
        blind = self.require(trace.blind, "blind")
        return (blind - trace.logprob)[:, None]
