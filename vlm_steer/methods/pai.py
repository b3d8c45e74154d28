"""PAI: attend more to the image, and contrast with the text alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Attends, Branch, LogitsAt, Method, Rows, Selector
from vlm_steer.registry import register_method

__all__ = ["PAI"]


@register_method("pai")
@dataclass(frozen=True, kw_only=True)
class PAI(Method):
    """Paying more attention to the image, with guidance away from the text-only prediction.

    Two parts (arXiv 2407.21771). Scores of image columns on the predicting row, before the
    softmax, grow in their own direction (eq. 4)::

        z_j := z_j + alpha * |z_j|        for image columns j

    and next-token log-probabilities move away from those of the same prompt without its image
    (eq. 7), keeping only tokens that are plausible with the image::

        l := gamma * l_image - (gamma - 1) * l_text,   kept where l_image >= log(beta) + max

    Deviations of the official code: with guidance on, its first generated token is never steered
    (``steer_first_token: false`` reproduces this; the paper knows no such exception), its
    text-only cache does not follow beam search, and its README uses ``gamma`` 1.1 where its
    command line defaults to 2. The text-only stream is not steered, as in the code.

    Cost: one attention row per layer; guidance adds one text-only stream. ``gamma: 1`` turns
    guidance off.

    Attributes:
        alpha: Strength on image columns, >= 0; 0 disables. Sensible 0.1 to 0.7, repetition above.
        gamma: Guidance strength, >= 1; 1 disables. Sensible 1.05 to 2.
        beta: Plausibility threshold of the guidance, 0 to 1; 0 keeps every token.
        steer_first_token: Boost attention for the first generated token too.
        layers: Decoder layers to boost; the authors use 2 to 31 of 32.
        scope: Streams whose attention is boosted.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("pai")(alpha=0.5, gamma=1.0).alpha
        0.5

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2407.21771"
    rows: ClassVar[Rows] = "last"
    attends: ClassVar[Attends] = "image"

    alpha: float = 0.2
    gamma: float = 1.1
    beta: float = 0.1
    steer_first_token: bool = True
    layers: Selector = (0.0625, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.alpha >= 0, f"alpha is {self.alpha}; it must be at least 0")
        self.require(self.gamma >= 1, f"gamma is {self.gamma}; it must be at least 1")
        self.require(0 <= self.beta <= 1, f"beta is {self.beta}; it must lie in [0, 1]")

    def is_neutral(self) -> bool:
        return self.alpha == 0 and self.gamma == 1

    def ignored_options(self) -> dict[str, str]:
        ignored = {}
        if self.gamma == 1:
            ignored["beta"] = "gamma is 1, so there is no guidance"
        if self.alpha == 0:
            ignored["steer_first_token"] = "alpha is 0, so no token is steered"
        return ignored

    def overrides(self, hook: str) -> bool:
        if hook == "scores":
            return self.alpha > 0
        if hook in ("logits", "plausible"):
            return self.gamma > 1
        return super().overrides(hook)

    def branches(self) -> tuple[Branch, ...]:
        return (Branch("text_only", drop_image=True),) if self.gamma > 1 else ()

    def scores(self, scores: Tensor, at: At) -> Tensor:
        if at.step == 0 and not self.steer_first_token:
            return scores
        return F.boost_scores(scores, at.columns.is_image, alpha=self.alpha)

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        with_image = at.raw.log_softmax(dim=-1)
        text_only = at.branches["text_only"].log_softmax(dim=-1)
        return logits.log_softmax(dim=-1) + (self.gamma - 1) * (with_image - text_only)

    def plausible(self, at: LogitsAt) -> Tensor | None:
        return F.plausibility_mask(at.raw, beta=self.beta) if self.beta > 0 else None
