"""ONLY: one layer of a second stream leans on the text, and helps or hinders."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Branch, LogitsAt, Method, Rows, Selector
from vlm_steer.registry import register_method

__all__ = ["ONLY"]


@register_method("only")
@dataclass(frozen=True, kw_only=True)
class ONLY(Method):
    """One-layer intervention: weigh the prediction against that of heads that read the text.

    In one layer of a second stream, heads whose ratio of text to image entropy lies below the
    average of the layer are switched off in the predicting row. With l the logits and n those of
    that stream, p and q their probabilities (Wan et al., ICCV 2025)::

        l := l + help * n                          where sum |p - q| < threshold
        l := (1 + alpha) * l - alpha * n           elsewhere

    Where both agree, the second stream supports the first; where they do not, it is subtracted.

    Deviations of the official code: it has no second stream; it takes the attention output of
    that layer, over the heads left, straight to the MLP of the last layer with a fifth of its
    residual, which costs nearly nothing. Here later layers follow the change, so n is what the
    model itself makes of it. The code also drops the columns of text and of image that draw more
    than a standard deviation above the mean, and the first token, from the attention of the second
    prediction; its default ``threshold`` is 0.1. It acts under sampling only.

    Cost: one extra stream over the same encoded image, and one attention row in one layer.

    Attributes:
        alpha: Strength of the contrast where the streams disagree, >= 0. Sensible 0.5 to 2.
        help: Weight of the second stream where they agree, >= 0. Sensible 1 to 3.
        threshold: Distance up to which they agree, 0 to 2. Sensible 0.1 to 0.5.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.5.
        layers: Decoder layers in which heads are switched off; the authors use one, the first.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("only")(threshold=0.3).threshold
        0.3

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "https://github.com/zifuwan/ONLY"
    rows: ClassVar[Rows] = "last"
    needs_image_tokens: ClassVar[bool] = True
    own: ClassVar[Mapping[str, str]] = {"look": "textual", "heads": "textual"}

    alpha: float = 1.0
    help: float = 3.0
    threshold: float = 0.2
    beta: float = 0.1
    layers: Selector = field(default_factory=lambda: {"indices": [0]})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, top in (("alpha", None), ("help", None), ("threshold", 2), ("beta", 1)):
            value = getattr(self, name)
            expected = "at least 0" if top is None else f"in [0, {top}]"
            is_right = value >= 0 and (top is None or value <= top)
            self.require(is_right, f"{name} is {value}; it must be {expected}")

    def is_neutral(self) -> bool:
        return self.alpha == 0 and self.help == 0 and self.beta == 0

    def ignored_options(self) -> dict[str, str]:
        ignored = {"scope": f"{self.name} acts on a stream of its own"}
        if self.alpha == 0 and self.help == 0:
            why = "alpha and help are 0, so nothing is combined"
            ignored |= dict.fromkeys(("threshold", "layers"), why)
        return ignored

    def branches(self) -> tuple[Branch, ...]:
        return (Branch("textual"),) if self.alpha > 0 or self.help > 0 else ()

    def look(self, scores: Tensor, weights: Tensor, at: At) -> Tensor:  # noqa: ARG002
        ratio = F.text_visual_entropy(weights, at.columns.is_text, at.columns.is_image)
        return (ratio >= ratio.mean(dim=1, keepdim=True)).transpose(1, 2)

    def heads(self, outputs: Tensor, at: At) -> Tensor:
        if at.seen is None:
            return outputs
        return outputs * at.seen[..., None].to(outputs.dtype)

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        if "textual" not in at.branches:
            return logits
        other = at.branches["textual"]
        distance = (at.raw.softmax(dim=-1) - other.softmax(dim=-1)).abs().sum(-1, keepdim=True)
        agreed = F.contrast_logits(at.raw, other, alpha=self.help, beta=0.0, form="add")
        contrasted = F.contrast_logits(at.raw, other, alpha=self.alpha, beta=0.0)
        changed = torch.where(distance < self.threshold, agreed, contrasted)
        return F.add_change(logits, at.raw, changed)

    def plausible(self, at: LogitsAt) -> Tensor | None:
        return F.plausibility_mask(at.raw, beta=self.beta) if self.beta > 0 else None
