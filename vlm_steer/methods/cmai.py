"""CMAI: text stops looking at image tokens that the text it reads does not look at."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Method, Rows
from vlm_steer.registry import register_method

__all__ = ["CMAI"]


@register_method("cmai")
@dataclass(frozen=True, kw_only=True)
class CMAI(Method):
    """Cross-modality attention inhibition (a reconstruction): text loses sight of stray tokens.

    With A the attention of a layer, averaged over its heads, the focus of a text row i on image
    token j gathers what the text that i reads looks at (after arXiv 2411.15453)::

        F_ij = sum_k A_ik * A_kj        k in the text

    In every text row behind the image, the image tokens with the lowest focus are closed to all
    heads before the softmax.

    Deviations: this is a reconstruction. The abstract says that text-to-image attention is
    aggregated by text-to-text attention and that pairs with low scores are inhibited; neither the
    formula nor code nor numbers were available. Unverified and ours are: the product above, the
    mean over heads, a fixed share of the image tokens per row instead of a threshold, and that
    all layers act. The paper trains its model with the inhibition, beside a compression of image
    tokens that is no part of this method. The text k is that of the prompt behind the image and,
    for a generated token, itself: what earlier generated tokens looked at is not kept.

    Cost: attention rows of the text after the image, twice, one row when decoding; the prompt
    text's attention is kept, text x prompt numbers per layer.

    Attributes:
        share: Part of the image tokens that a row sees which are closed to it, 0 to 1; 0 disables.
            Sensible 0.1 to 0.7.
        layers: Decoder layers.
        scope: Streams to act on.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("cmai")(share=0.5).share
        0.5

    Raises:
        ConfigError: ``share`` is outside its range.
        UnsupportedModelError: At attach, for models whose image is not in the token sequence.
    """

    paper: ClassVar[str] = "arXiv:2411.15453"
    rows: ClassVar[Rows] = "after_image"
    needs_image_tokens: ClassVar[bool] = True

    share: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.share <= 1, f"share is {self.share}; it must lie in [0, 1]")

    def is_neutral(self) -> bool:
        return self.share == 0

    def tally(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, text, key]``: the rows of the prompt's text, averaged over heads."""
        rows, n_text = at.on_rows(_places(at)), _n_text(at)
        own = rows[:, None] == torch.arange(1, n_text + 1, device=rows.device)[:, None]
        return own.to(weights.dtype) @ weights.mean(dim=1)

    def scores(self, scores: Tensor, at: At) -> Tensor:
        if at.tally is None:
            return scores
        weights = at.softmax(scores).mean(dim=1)
        places = at.on_keys(_places(at))[:, None].expand_as(weights)
        # Place 0 is for all that is no text of the prompt.
        gathered = weights.new_zeros((*weights.shape[:2], at.tally.shape[1] + 1))
        to_text = gathered.scatter_add(2, places, weights)[..., 1:]
        focus = F.focus_scores(to_text, at.on_keys(at.tally))
        own = (weights * at.is_own()).sum(dim=-1, keepdim=True)
        is_generated = at.row_kinds == at.columns.GENERATED
        focus = focus + torch.where(is_generated[..., None], own * weights, 0.0)
        seen = at.columns.is_image[:, None] & (weights > 0)
        closed = F.low_focus(focus, seen, share=self.share)
        return scores.masked_fill(closed[:, None], torch.finfo(scores.dtype).min)


def _places(at: At) -> Tensor:
    """``[batch, prompt]``: the number of each text token behind the image, from 1; 0 elsewhere."""
    is_text = at.prompt.is_instruction
    return at.once(f"places in {is_text.shape[1]}", lambda: is_text.long().cumsum(dim=1) * is_text)


def _n_text(at: At) -> int:
    """Text tokens behind the image in the row that has most."""
    n_prompt = at.prompt.kinds.shape[1]
    return int(at.once(f"text of {n_prompt}", lambda: at.prompt.is_instruction.sum(dim=1).amax()))
