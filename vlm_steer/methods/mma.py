"""MMA: let image tokens see the question."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_steer.engine.hooks import At, Method, Rows
from vlm_steer.registry import register_method

__all__ = ["MMA"]


@register_method("mma")
@dataclass(frozen=True, kw_only=True)
class MMA(Method):
    """Modality-mutual attention: image rows may attend to the question that follows them.

    Causal attention, plus (arXiv 2503.02597, eq. 2)::

        image row i may see column j   if j is an instruction token

    The paper trains a model with this mask. Opening it in a frozen model takes the model out of
    its training distribution, and no training-free result is published: measure before use.
    Prompt keys of the image then depend on the question, so a prefix cache cannot be shared
    between questions.

    Deviations of the official code: it stops before the answer cue (``<|assistant|>``), which
    ``exclude_last`` reproduces for a template whose cue has that many tokens; it breaks on a
    second image, where here every image's rows see all instruction tokens.

    Cost: a materialised mask instead of the kernel's own causality, over the prompt only.

    Attributes:
        exclude_last: Trailing prompt tokens that image rows still do not see, >= 0.
        layers: Decoder layers with the opened mask.
        scope: Streams with the opened mask.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("mma")(layers=(0, 4)).layers
        (0, 4)

    Raises:
        ConfigError: A number is outside its range.
        UnsupportedModelError: At attach, for models whose image is not in the token sequence.
    """

    paper: ClassVar[str] = "arXiv:2503.02597"
    rows: ClassVar[Rows] = "image"
    needs_image_tokens: ClassVar[bool] = True

    exclude_last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.exclude_last >= 0, f"exclude_last is {self.exclude_last}; it must be at least 0"
        )

    def mask(self, allowed: Tensor, at: At) -> Tensor:
        question = at.columns.is_instruction
        if self.exclude_last:
            question = question & ~at.columns.is_prompt_end(self.exclude_last)
        return allowed | question[:, None, :]
