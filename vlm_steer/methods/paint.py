"""PAINT: attend more to the image tokens that the vision encoder itself singles out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Method, Reference, Rows, Selector
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["PAINT"]


@register_method("paint")
@dataclass(frozen=True, kw_only=True)
class PAINT(Method):
    """Paying attention to informed tokens: raise scores of local and summary image tokens.

    Experimental: no result beyond one model and one benchmark is published. With u and w the
    attention of the vision encoder's class token to its patches in the first and in the
    penultimate layer, summed over heads (arXiv 2501.12206)::

        summary = image tokens with w > Q3 + 1.5 * (Q3 - Q1)
        local   = the local_ratio of the image tokens with the largest u, without summary tokens

    and, on the row that predicts the next token, before the softmax of the decoder::

        z_j := z_j + alpha * |z_j|    for local columns j
        z_j := z_j + beta * |z_j|     for summary columns j

    ``head_modulation: sensitivity`` multiplies both strengths, head by head and row by row, by the
    head's attention to the image relative to the mean of its layer. The abstract announces such a
    modulation by the visual sensitivity of heads without a formula, and the official code has none:
    this one is our reading.

    Deviations: from the official code, whose "spatial" tokens (off by default) are the largest of a
    sum that is 1 for every token, and are left out; it takes the image of the first sample for the
    whole batch; it adds PAI's guidance (preset ``paint_official``). Encoders without a class token
    use the mean attention over all patches; image tokens that cover several patches their mean; an
    image cut into tiles is judged tile by tile.

    Cost: one more encoding of the image; one attention row per layer.

    Attributes:
        alpha: Strength on local tokens, >= 0; 0 leaves them alone. Sensible 0.3 to 0.9.
        beta: Strength on summary tokens, >= 0; 0 leaves them alone. Sensible 0.1 to 0.9.
        local_ratio: Share of the image tokens taken as local, 0 to 1. Sensible 0.1 to 0.25.
        head_modulation: ``none`` (official code) or ``sensitivity``.
        layers: Decoder layers; the authors use 2 to 31 of 32.
        scope: Streams to act on.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("paint")(alpha=0.5).beta
        0.3

    Raises:
        ConfigError: A number is outside its range.
        UnsupportedModelError: At attach, when patches cannot be matched to image tokens.
    """

    paper: ClassVar[str] = "arXiv:2501.12206"
    rows: ClassVar[Rows] = "last"
    needs_image_tokens: ClassVar[bool] = True

    alpha: float = 0.7
    beta: float = 0.3
    local_ratio: float = 0.25
    head_modulation: Literal["none", "sensitivity"] = "none"
    layers: Selector = (0.0625, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            self.require(value >= 0, f"{name} is {value}; it must be at least 0")
        self.require(
            0 <= self.local_ratio <= 1,
            f"local_ratio is {self.local_ratio}; it must lie in [0, 1]",
        )

    def is_neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        if self.alpha == 0:
            ignored["local_ratio"] = "alpha is 0, so local tokens are left alone"
        if self.is_neutral():
            ignored["head_modulation"] = "alpha and beta are 0, so there is nothing to modulate"
        return ignored

    def check(self, model: "ModelInfo") -> None:
        reason = model.why_no_image_attention
        if reason is not None:
            raise UnsupportedModelError(
                f"paint looks at image tokens through the vision encoder, but {model.family} does "
                f"not allow it: {reason}. Use pai, which raises all image tokens."
            )

    def prepare(self, reference: Reference) -> Any:
        first, penultimate = reference.image_attention((0, -2))
        tokens = F.paint_tokens(first, penultimate, local_ratio=self.local_ratio)
        place = reference.on_image_tokens
        return F.InformedTokens(local=place(tokens.local), summary=place(tokens.summary))

    def scores(self, scores: Tensor, at: At) -> Tensor:
        if at.prepared is None:
            return scores
        image = at.columns.is_image
        local, summary = (at.on_keys(tokens.to(image.device)) & image for tokens in at.prepared)
        share: Tensor | float = 1.0
        if self.head_modulation == "sensitivity":
            share = F.visual_sensitivity(at.softmax(scores), image)[..., None]
        steered = F.boost_scores(scores, local, alpha=self.alpha * share)
        return F.boost_scores(steered, summary, alpha=self.beta * share)
