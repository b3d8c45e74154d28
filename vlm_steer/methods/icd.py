"""ICD: contrast with the prediction under a disturbed instruction."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlm_steer.engine.hooks import Branch, Insertion, LogitsAt
from vlm_steer.methods._contrast import Contrast
from vlm_steer.registry import register_method

__all__ = ["ICD"]

# One of the five disturbances of the official code (arXiv 2403.18715).
_CONFUSED = (
    "You are a confused objects detector to provide a fuzzy overview or impression of the image."
)


@register_method("icd")
@dataclass(frozen=True, kw_only=True)
class ICD(Contrast):
    """Instruction contrastive decoding: subtract what a disturbed instruction makes the model say.

    With l the logits for the user's instruction and n those for the same with a disturbance in
    front of it (arXiv 2403.18715)::

        l := (1 + alpha) * l - alpha * n,   kept where l >= log(beta) + max(l)

    In models whose Q-Former reads an instruction of its own, the disturbance goes there and the
    prompt of the language model stays as it is, as in the paper.

    Deviations of the official code: for LLaVA it replaces the system message, without saying so
    in the paper (``where: system``, preset ``icd_official``); with the version of transformers
    that it asks for it changes nothing at all, since it patches a function that is no longer
    there; it acts under sampling only. Together with VCD it adds up both contrasted logits, which
    doubles their scale (``combine: sum``, preset ``icd_vcd``); the default here is
    ``(1 + a1 + a2) * l - a1 * n1 - a2 * n2``.

    Cost: one extra stream; images are encoded once, except by a Q-Former.

    Attributes:
        alpha: Strength of the contrast, >= 0. Sensible 0.25 to 2.
        beta: Plausibility threshold, 0 to 1; 0 keeps every token. Sensible 0.05 to 0.5.
        disturbance: What is added to the instruction. It needs the processor that belongs to the
            model; the choice should not be made on the test set.
        disturbance_ids: The same as token ids, for use without a processor; those of the Q-Former
            in models that have one.
        where: ``instruction`` adds it in front of the question, behind the image; ``start`` in
            front of the prompt; ``system`` in place of all text before the image, or of the
            instruction of a Q-Former.
        combine: How the contrast joins those listed before it: ``convex``, or ``sum`` of the
            contrasted logits.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("icd")(where="system").where
        'system'

    Raises:
        ConfigError: A number is outside its range, or there is neither a processor nor ids.
    """

    paper: ClassVar[str] = "arXiv:2403.18715"
    branch: ClassVar[str] = "disturbed"

    disturbance: str = _CONFUSED
    disturbance_ids: tuple[int, ...] | None = None
    where: Literal["instruction", "start", "system"] = "instruction"
    combine: Literal["convex", "sum"] = "convex"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            bool(self.disturbance.strip()), "disturbance is empty; write what to add to the prompt"
        )
        self.require(
            self.disturbance_ids is None or len(self.disturbance_ids) > 0,
            "disturbance_ids is empty; list token ids, or use disturbance",
        )

    def ignored_options(self) -> dict[str, str]:
        ignored = super().ignored_options()
        if self.disturbance_ids is not None:
            ignored["disturbance"] = "disturbance_ids are given"
        if self.alpha == 0:
            why = "alpha is 0, so there is no contrast"
            options = ("disturbance", "disturbance_ids", "where", "combine")
            ignored |= dict.fromkeys(options, why)
        return ignored

    def branches(self) -> tuple[Branch, ...]:
        if self.alpha == 0:
            return ()
        text = self.disturbance if self.disturbance_ids is None else self.disturbance_ids
        return (Branch(self.branch, insert=Insertion(text, where=self.where, to_vision=True)),)

    def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
        # Before any other method has acted there is nothing to sum with.
        if self.combine == "sum" and self.alpha > 0 and logits is not at.raw:
            return logits + self.contrasted(at)
        return super().logits(logits, at)
