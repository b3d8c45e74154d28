"""MetaToken: everything cheap about a word at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_steer.detection.base import OfTrace, Unit, pooled, register_detector
from vlm_steer.detection.trace import Trace

__all__ = ["MetaToken"]


@register_detector("meta_token")
@dataclass(frozen=True, kw_only=True)
class MetaToken(OfTrace):
    """Place, repetition, certainty and attention on the image of every head (MetaToken, 2024).

    Per unit: words before it and their logarithm, how often it was named before, its relative
    place; log-probability of its first token, mean over its tokens, over the text so far and over
    the whole text; entropy and margin; attention on the image of every layer and head.

    Place and repetition are among the features, so a good part of its score is what the controls
    have alone: look at the gain. The paper's variation ratio is left out, and its classifier is
    logistic regression or boosted trees; here it is the former.
    """

    paper: ClassVar[str] = "arXiv:2405.19186"
    must_be_fitted: ClassVar[bool] = True

    def of_units(self, trace: Trace, units: Sequence[Unit]) -> Tensor:
        """``[units, 10 + layers * heads]``."""
        if not units:
            return torch.zeros(0, 10 + trace.image_mass[0].numel(), dtype=torch.float64)
        word = torch.tensor([unit.word for unit in units], dtype=torch.float64)
        seen = torch.tensor([unit.occurrence for unit in units], dtype=torch.float64)
        place = torch.tensor([unit.tokens[0] / trace.n_tokens for unit in units]).double()
        count = torch.arange(1, trace.n_tokens + 1)
        so_far = (trace.logprob.cumsum(0) / count)[:, None]
        columns = [
            torch.stack([word, word.log1p(), seen, place], dim=1),
            pooled(trace.logprob[:, None], units, "first"),
            pooled(trace.logprob[:, None], units, "mean"),
            pooled(so_far, units, "first"),
            trace.logprob.double().mean().expand(len(units), 1),
            pooled(torch.stack([trace.entropy, trace.margin], dim=1), units, "first"),
            pooled(trace.image_mass.flatten(1), units, "first"),
        ]
        return torch.cat(columns, dim=1)
