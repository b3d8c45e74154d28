"""Yes-bias: a constant preference for yes or no, as a control."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import LogitsAt, Method
from vlm_steer.registry import register_method

__all__ = ["YesBias"]


@register_method("yes_bias")
@dataclass(frozen=True, kw_only=True)
class YesBias(Method):
    """Control: say yes, or no, more often, whatever the image shows.

    With l the logits of the first answer token::

        l_x := l_x + bias / 2   for the first tokens of yes,
        l_x := l_x - bias / 2   for those of no

    so that log p(yes) - log p(no) moves by ``bias`` in every question. A method for yes-or-no
    questions helps for its reason only if it beats the bias that answers yes as often as it does.
    ``vlm_steer_eval.benchmarks.first_token.bias_for_yes_ratio`` finds that bias from the
    first-token margins of an unsteered run.

    Deviations: none, this control is ours.

    Cost: none.

    Attributes:
        bias: Added to the log-odds of yes; negative favours no, 0 disables. Sensible -3 to 3.
        yes: Spellings of yes. They need the processor that belongs to the model.
        no: Spellings of no.
        yes_ids: First tokens of yes, for use without a processor.
        no_ids: First tokens of no, for use without a processor.
        steps: ``first`` changes the first answer token, ``all`` every one.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("yes_bias")(bias=-0.5).steps
        'first'

    Raises:
        ConfigError: The bias is not finite, the words are missing or begin with the same tokens,
            or there is neither a processor nor ids.
    """

    paper: ClassVar[str] = ""

    bias: float = 1.0
    yes: tuple[str, ...] = ("yes", "Yes")
    no: tuple[str, ...] = ("no", "No")
    yes_ids: tuple[int, ...] | None = None
    no_ids: tuple[int, ...] | None = None
    steps: Literal["first", "all"] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(math.isfinite(self.bias), f"bias is {self.bias}; it must be finite")
        self.require(
            (self.yes_ids is None) == (self.no_ids is None),
            "yes_ids and no_ids go together; give both, or neither",
        )
        for name in ("yes", "no", "yes_ids", "no_ids"):
            self.require(getattr(self, name) != (), f"{name} is empty; list at least one")

    def is_neutral(self) -> bool:
        return self.bias == 0

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        if self.yes_ids is not None:
            ignored |= dict.fromkeys(("yes", "no"), "yes_ids and no_ids are given")
        if self.bias == 0:
            options = ("yes", "no", "yes_ids", "no_ids", "steps")
            ignored |= dict.fromkeys(options, "bias is 0, so nothing is changed")
        return ignored

    def first_words(self) -> dict[str, tuple[str, ...] | tuple[int, ...]]:
        return {
            "yes": self.yes if self.yes_ids is None else self.yes_ids,
            "no": self.no if self.no_ids is None else self.no_ids,
        }

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        if at.step > 0 and self.steps == "first":
            return logits
        return F.shift_odds(logits, at.first_ids["yes"], at.first_ids["no"], bias=self.bias)
