"""DeCoRe: contrast with the model without its retrieval heads."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Attends, Branch, LogitsAt, Method, Rows
from vlm_steer.engine.selectors import select
from vlm_steer.errors import ConfigError
from vlm_steer.heads import Head, read_head_scores
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["DeCoRe"]

_HOOKS = {"zero": "heads", "uniform": "scores"}


@register_method("decore")
@dataclass(frozen=True, kw_only=True)
class DeCoRe(Method):
    """Decoding by contrasting retrieval heads: subtract the model without the heads that look up.

    With p the next-token distribution and p_m that of the same model with its retrieval heads
    masked (arXiv 2410.18860)::

        alpha := entropy(p)
        log p := (1 + alpha) * log p - alpha * log p_m

    Heads are masked for the last prompt token and the generated ones; before them both streams
    share the prompt. They come from a file of head scores: those published for language models, or
    what ``vlm-steer build decore`` finds, the heads that attend most to the image.

    Deviations: the official code sets the query of a masked head to zero, which makes it attend
    evenly to all it sees rather than give nothing (``mask_by: uniform``, preset
    ``decore_official``); it decodes greedily, one row at a time. Where it scores given
    answers, it masks the heads for the whole prompt instead (``span: all``).

    Cost: one extra stream from the last prompt token on; with ``span: all``, beside methods that
    act on the prompt, or where a cache cannot be copied, one more pass over the prompt.

    Attributes:
        head_file: File of head scores, a JSON object from "layer-head" to a list of scores.
        n_heads: How many of the best heads to mask; a float is a share of all heads. Sensible
            0.01 to 0.1. The authors mask 10 to 100 of 1024.
        mask_by: What a masked head gives: nothing (``zero``) or the mean of all that it sees
            (``uniform``, official code).
        span: Mask heads for the last prompt token and the generated ones (``decode``), or for the
            whole prompt too (``all``).
        alpha: Strength of the contrast, >= 0; null for the entropy. The authors' fixed strength
            is 0.5.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token, like the authors.
        layers: Decoder layers whose heads may be masked.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("decore")(head_file="heads.json", n_heads=50).mask_by
        'zero'

    Raises:
        ConfigError: A number is outside its range, there are no heads, or they are not the
            model's.
        DataError: The file of head scores cannot be read.
    """

    paper: ClassVar[str] = "arXiv:2410.18860"
    attends: ClassVar[Attends] = "both"
    own: ClassVar[dict[str, str]] = {"heads": "masked", "scores": "masked"}

    head_file: str | None = None
    n_heads: int | float = 0.05
    mask_by: Literal["zero", "uniform"] = "zero"
    span: Literal["decode", "all"] = "decode"
    alpha: float | None = None
    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        is_share = isinstance(self.n_heads, float)
        self.require(
            0 < self.n_heads < 1 if is_share else self.n_heads >= 1,
            f"n_heads is {self.n_heads}; it must be a number of at least 1, or a share below 1",
        )
        self.require(
            self.alpha is None or (math.isfinite(self.alpha) and self.alpha >= 0),
            f"alpha is {self.alpha}; it must be at least 0, or null for the entropy",
        )
        self.require(0 <= self.beta <= 1, f"beta is {self.beta}; it must lie in [0, 1]")

    @property
    def rows(self) -> Rows:  # type: ignore[override]  # a class variable elsewhere
        """Rows in which heads are masked."""
        return "last" if self.span == "decode" else "all"

    def is_neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def ignored_options(self) -> dict[str, str]:
        ignored = {"scope": "heads are masked in a stream of its own"}
        if self.alpha == 0:
            why = "alpha is 0, so there is no contrast"
            options = ("head_file", "n_heads", "mask_by", "span", "layers")
            ignored |= dict.fromkeys(options, why)
        return ignored

    def overrides(self, hook: str) -> bool:
        if hook in _HOOKS.values() and (self.alpha == 0 or hook != _HOOKS[self.mask_by]):
            return False
        return super().overrides(hook)

    def select_layers(self, model: "ModelInfo") -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self._masked(model)}))

    def resolve(self, model: "ModelInfo") -> Any:
        n_heads = int(model.text_config.num_attention_heads)
        is_masked: dict[int, Tensor] = {}
        for layer, head in self._masked(model):
            row = is_masked.setdefault(layer, torch.zeros(n_heads, dtype=torch.bool))
            row[head] = True
        return is_masked

    def notes(self, plan: Any) -> tuple[str, ...]:
        heads = [f"{layer}-{int(h)}" for layer in sorted(plan) for h in plan[layer].nonzero()]
        return (f"masked heads: {', '.join(heads)}",)

    def branches(self) -> tuple[Branch, ...]:
        if self.alpha == 0:
            return ()
        return (Branch("masked", shares_prompt=self.span == "decode"),)

    def scores(self, scores: Tensor, at: At) -> Tensor:
        return scores.masked_fill(_mask(at, scores)[:, None, None], 0)

    def heads(self, outputs: Tensor, at: At) -> Tensor:
        return outputs.masked_fill(_mask(at, outputs)[:, None], 0)

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        if self.alpha == 0:
            return logits
        masked = at.branches["masked"]
        if self.alpha is None:
            return F.add_change(logits, at.raw, F.decore_logits(at.raw, masked).logits)
        contrasted = F.contrast_logits(at.raw, masked, alpha=self.alpha, beta=0.0)
        return F.add_change(logits, at.raw, contrasted)

    def plausible(self, at: LogitsAt) -> Tensor | None:
        return F.plausibility_mask(at.raw, beta=self.beta) if self.beta > 0 else None

    def _masked(self, model: "ModelInfo") -> list[Head]:
        """The heads to mask, best first."""
        if self.alpha == 0:
            return []
        if self.head_file is None:
            raise ConfigError(
                f"{self.name}: there are no heads to mask. Make a file of head scores with "
                "`vlm-steer build decore`, or take a published one, and give it: head_file: "
                "FILE.json."
            )
        scores = read_head_scores(self.head_file)
        size = (model.n_layers, int(model.text_config.num_attention_heads))
        outside = [head for head in scores if head[0] >= size[0] or head[1] >= size[1]]
        if outside:
            layer, head = outside[0]
            raise ConfigError(
                f"{self.name}: {self.head_file} has head {layer}-{head}, but this model has "
                f"{size[0]} layers of {size[1]} heads; it was made for another model."
            )
        layers = select(self.layers, model.n_layers)
        known = [head for head in scores if head[0] in layers]
        n = self.n_heads
        count = max(round(n * size[0] * size[1]), 1) if isinstance(n, float) else n
        self.require(
            len(known) >= count,
            f"{count} heads are to be masked, but {self.head_file} scores {len(known)} of these "
            "layers",
        )
        return known[:count]


def _mask(at: At, like: Tensor) -> Tensor:
    """``[heads]`` bool of the layer, on the device of a tensor."""
    return at.once("masked", lambda: at.plan[at.layer].to(like.device))
