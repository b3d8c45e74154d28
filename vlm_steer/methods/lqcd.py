"""LQCD: contrast with the prediction under a leading question."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm_steer.engine.hooks import Branch, Insertion
from vlm_steer.methods._contrast import Contrast
from vlm_steer.registry import register_method

__all__ = ["LQCD"]


@register_method("lqcd")
@dataclass(frozen=True, kw_only=True)
class LQCD(Contrast):
    """Leading query contrastive decoding: subtract what a leading question makes the model say.

    With l the logits for the user's question, which should be neutral, and n those for the same
    question with a leading remark (arXiv 2408.11261v1)::

        l := (1 + alpha) * l - alpha * n,   kept where l >= log(beta) + max(l)

    What the remark adds to the probability of a token, its sycophancy, is taken off.

    Deviations: there is no official code, and ``alpha`` and ``beta`` are not certain to be those
    of the paper. The second version of the paper first has a language model rewrite the question
    into a neutral one and scales ``alpha`` by the sentiment of the question; both are left to the
    caller.

    Cost: one extra stream; images are encoded once.

    Attributes:
        alpha: Strength of the contrast, >= 0. Sensible 0.25 to 2.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.5.
        leading: The remark. It needs the processor that belongs to the model.
        leading_ids: The same as token ids, for use without a processor.
        where: ``end`` adds it behind the question, ``instruction`` in front of it, behind the
            image.
        tail: For ``end``, the number of prompt tokens behind the question, such as those of
            ``ASSISTANT:``; null measures the chat template of the processor.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("lqcd")(alpha=0.5).alpha
        0.5

    Raises:
        ConfigError: A number is outside its range, or there is neither a processor nor ids.
    """

    paper: ClassVar[str] = "arXiv:2408.11261"
    branch: ClassVar[str] = "leading"

    leading: str = "It seems like there isn't."
    leading_ids: tuple[int, ...] | None = None
    where: Literal["end", "instruction"] = "end"
    tail: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.leading.strip()), "leading is empty; write a leading remark")
        self.require(
            self.leading_ids is None or len(self.leading_ids) > 0,
            "leading_ids is empty; list token ids, or use leading",
        )
        self.require(
            self.tail is None or self.tail >= 0, f"tail is {self.tail}; it must be at least 0"
        )

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        if self.leading_ids is not None:
            ignored["leading"] = "leading_ids are given"
        if self.where != "end":
            ignored["tail"] = "where is not end"
        if self.alpha == 0:
            why = "alpha is 0, so there is no contrast"
            ignored |= dict.fromkeys(("leading", "leading_ids", "where", "tail"), why)
        return ignored

    def branches(self) -> tuple[Branch, ...]:
        if self.alpha == 0:
            return ()
        text = self.leading if self.leading_ids is None else self.leading_ids
        return (Branch(self.branch, insert=Insertion(text, where=self.where, tail=self.tail)),)
