"""Lookback ratio: how much each head looks back at the prompt, per generated token."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Method, Rows
from vlm_steer.registry import register_method

__all__ = ["LookbackRatio"]


@register_method("lookback_ratio")
@dataclass(frozen=True, kw_only=True)
class LookbackRatio(Method):
    """Lookback ratio of every head at every generated token; an observer that changes nothing.

    With mean attention weights over the context and over the new text (arXiv 2407.07071, eq. 1)::

        ratio = a_context / (a_context + a_new)

    The row is the one that predicts the token. ``records()["lookback_ratio"]`` is
    ``[sequences, tokens, layers, heads]``. The ratio alone is no detector: fitted heads are, and
    a token's position explains much of what they see.

    Deviations: the paper leaves the first token undefined, since nothing is new yet; the official
    code counts the prompt's answer cue as new, as does ``cue``.

    Cost: one attention row per layer and token; outputs are untouched.

    Attributes:
        cue: Trailing prompt tokens (such as "ASSISTANT:") that count as new, >= 0.
        layers: Decoder layers to record.
        scope: Stream to record.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("lookback_ratio")(cue=3).cue
        3

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2407.07071"
    rows: ClassVar[Rows] = "last"
    observer: ClassVar[bool] = True

    cue: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.cue >= 0, f"cue is {self.cue}; it must be at least 0")

    def observe(self, weights: Tensor, at: At) -> Tensor:
        columns = at.columns
        is_cue = columns.is_prompt_end(self.cue)
        context = ~(columns.is_padding | columns.is_generated | is_cue)
        return F.lookback_ratio(weights, context, columns.is_generated | is_cue)
