"""Detectors that look at where attention goes while a word is predicted."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer.detection.base import PerToken, Pool, register_detector
from vlm_steer.detection.trace import Trace
from vlm_steer.engine.selectors import Selector, select
from vlm_steer.errors import ConfigError

__all__ = ["SVAR", "ImageEntropy", "LookbackRatio", "SinkMass"]

_PARTS = ("context", "system", "image", "instruction")


def chosen_layers(trace: Trace, layers: Selector) -> list[int]:
    """Places on the axis of recorded layers of the layers selected among them."""
    wanted = set(select(layers, max(trace.layers) + 1))
    return [place for place, layer in enumerate(trace.layers) if layer in wanted]


@register_detector("lookback_ratio")
@dataclass(frozen=True, kw_only=True)
class LookbackRatio(PerToken):
    """How much each head looks back at the prompt rather than at the new text (2407.07071).

    With mean attention weights a over the columns of a part of the prompt and over the new text,
    which is the answer's cue and what was generated::

        ratio = a_part / (a_part + a_new)

    One feature per part, layer and head, in this order. The parts ``system``, ``image`` and
    ``instruction`` split the context of the paper, which is the part ``context``.

    Deviations: the paper has one part and labels 1 what is factual; risks here point the other
    way. Its classifier is ``parts: [context]`` fitted without scaling and with strength 1.

    Attributes:
        parts: Parts of the prompt.
        pool: ``mean`` over the tokens of a unit (the paper's), or its ``first`` one.
    """

    paper: ClassVar[str] = "arXiv:2407.07071"
    must_be_fitted: ClassVar[bool] = True

    parts: tuple[Literal["context", "system", "image", "instruction"], ...] = (
        "system",
        "image",
        "instruction",
    )
    pool: Pool = "mean"

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(
                f"lookback_ratio: parts are {list(self.parts)}; name some of {', '.join(_PARTS)}, "
                "each once."
            )

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens, parts * layers * heads]``."""
        return torch.stack([self.ratios(trace, part) for part in self.parts], dim=1).flatten(1)

    def ratios(self, trace: Trace, part: str) -> Tensor:
        """``[tokens, layers, heads]`` ratio of one part."""
        blocks, sizes = trace.layout.blocks, trace.layout.sizes(trace.n_tokens)
        old = {
            "context": [i for i, name in enumerate(blocks) if name not in ("cue", "generated")],
            "image": [i for i, name in enumerate(blocks) if name.startswith("image")],
        }.get(part, [i for i, name in enumerate(blocks) if name == part])

        def mean(chosen: list[int]) -> Tensor:
            size = sizes[:, chosen].sum(1).clamp(min=1)
            return trace.masses[..., chosen].sum(-1) / size[:, None, None]

        on_old, on_new = mean(old), mean([blocks.index("cue"), blocks.index("generated")])
        return on_old / (on_old + on_new).clamp(min=torch.finfo(on_old.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class _PerHead(PerToken):
    """A number per layer and head, averaged or one by one.

    Attributes:
        layers: Decoder layers.
        heads: ``mean`` for one risk over layers and heads; ``each`` for one feature per layer and
            head, which have to be fitted.
        pool: ``first`` token of a unit, or the ``mean`` over its tokens.
    """

    layers: Selector = "all"
    heads: Literal["mean", "each"] = "mean"

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens, 1]`` or ``[tokens, layers * heads]``."""
        values = self.of_heads(trace)[:, chosen_layers(trace, self.layers)].flatten(1)
        return values.mean(1, keepdim=True) if self.heads == "mean" else values

    def of_heads(self, trace: Trace) -> Tensor:
        """``[tokens, layers, heads]``."""
        raise NotImplementedError


@register_detector("svar")
@dataclass(frozen=True, kw_only=True)
class SVAR(_PerHead):
    """Attention on the image in middle layers, negative (Devils in the Middle Layers, CVPR 2025).

    The row is the one that predicts the first token of the word. The authors sum over layers 5 to
    18 of 32 and average over heads; this is the mean over both, which ranks alike. Their learnt
    version is ``heads: each``.

    Attributes:
        layers: Decoder layers; the authors' as fractions of depth by default.
        heads: ``mean``, or ``each``.
        pool: ``first`` (the authors'), or ``mean``.
    """

    paper: ClassVar[str] = "arXiv:2411.16724"

    layers: Selector = (5 / 32, 19 / 32)

    def of_heads(self, trace: Trace) -> Tensor:
        """``[tokens, layers, heads]``."""
        return -trace.image_mass


@register_detector("image_entropy")
@dataclass(frozen=True, kw_only=True)
class ImageEntropy(_PerHead):
    """How evenly attention on the image is spread, 0 to 1: a word that is there has a place.

    Attributes:
        layers: Decoder layers.
        heads: ``mean``, or ``each``.
        pool: ``first``, or ``mean``.
    """

    def of_heads(self, trace: Trace) -> Tensor:
        """``[tokens, layers, heads]``."""
        return trace.image_entropy


@register_detector("sink_mass")
@dataclass(frozen=True, kw_only=True)
class SinkMass(_PerHead):
    """Attention parked on the first token and on tokens with massive activations.

    Attributes:
        layers: Decoder layers.
        heads: ``mean``, or ``each``.
        pool: ``first``, or ``mean``.
    """

    def of_heads(self, trace: Trace) -> Tensor:
        """``[tokens, layers, heads]``."""
        return trace.sink_mass
