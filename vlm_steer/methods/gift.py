"""GIFT: follow the gaze of the question, and weigh the image by it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Columns, Method, Reference, Rows, Selector
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["GIFT"]


class _Prepared(NamedTuple):
    """What the pass before generation found, ``[batch, prompt]`` each."""

    saliency: Tensor
    question: Tensor


@register_method("gift")
@dataclass(frozen=True, kw_only=True)
class GIFT(Method):
    """Gaze-shift-guided fusion: weigh the image by where attention moves as the question is read.

    A pass over the prompt gives h_j, how much the attention to image token j rises from one
    question token to the next, averaged over the half of the heads in which it rises most, clamped
    and scaled to [0, 1] (arXiv 2510.22067). In every row that predicts a token::

        a_j := a_j * exp(alpha * h_j)    image tokens, half of the heads by image attention
        a_j := a_j * c                   the question, half of the heads by question attention

    where c is the factor by which the first line raised the image attention of its heads; rows are
    normalised again.

    Deviations of the official code: it follows the gaze at content words alone, which a tagger of
    English finds; ours at every token of the question, as that code has no answer for questions
    without content words. It takes the image to be one unbroken span and the batch to be one row.

    Cost: one more pass over the prompt per generation, up to the gaze layer; then one attention row
    per layer and token.

    Attributes:
        alpha: Strength, >= 0; 0 disables. The authors use 5 for LLaVA-1.5 and 4 for Qwen2-VL.
        gaze_layer: Layer in which the gaze is followed, as an index or as a fraction of the depth
            below 1. The authors use 11 of 32, 10 of 40 and 14 of 28.
        skip_first: Tokens after the image that are template, not question, >= 0. The authors skip
            2 in LLaVA's template and 1 in Qwen's.
        skip_last: The same at the end of the prompt. The authors skip 5.
        layers: Decoder layers to steer. The authors use 12 to 22 of 32.
        scope: Streams to steer.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("gift")(alpha=4.0).alpha
        4.0

    Raises:
        ConfigError: A number is outside its range.
        UnsupportedModelError: At attach, for models whose image is not in the token sequence.
    """

    paper: ClassVar[str] = "arXiv:2510.22067"
    needs_image_tokens: ClassVar[bool] = True

    alpha: float = 5.0
    gaze_layer: int | float = 0.35
    skip_first: int = 2
    skip_last: int = 5
    layers: Selector = (0.375, 0.71875)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "gaze_layer", "skip_first", "skip_last"):
            value = getattr(self, name)
            self.require(value >= 0, f"{name} is {value}; it must be 0 or more")
        self.require(
            isinstance(self.gaze_layer, int) or self.gaze_layer < 1,
            f"gaze_layer is {self.gaze_layer}; write an index, or a fraction below 1",
        )

    def is_neutral(self) -> bool:
        return self.alpha == 0

    def resolve(self, model: "ModelInfo") -> int:
        layer = self.gaze_layer
        index = layer if isinstance(layer, int) else int(layer * model.n_layers)
        self.require(
            index < model.n_layers,
            f"gaze_layer is {index}, but this model has {model.n_layers} layers (0 to "
            f"{model.n_layers - 1})",
        )
        return index

    def notes(self, plan: Any) -> tuple[str, ...]:
        return (f"gaze followed in layer {plan}",)

    def prepare(self, reference: Reference) -> _Prepared:
        columns = reference.columns
        question = self._question(columns)
        (rises,) = reference.tallies(_Gaze(layers={"indices": [reference.plan]}, of=self)).values()
        question = question.to(rises.device)
        saliency = torch.ones_like(rises[:, 0])
        for row, is_image in enumerate(columns.is_image.to(rises.device)):
            if is_image.any() and question[row].any():
                shift = rises[row][:, is_image]
                top = shift.sum(dim=-1).topk(max(len(shift) // 2, 1)).indices
                saliency[row, is_image] = F.gift_saliency(
                    shift[top][None, :, None], alpha=self.alpha
                )
        return _Prepared(saliency, question)

    def weights(self, weights: Tensor, at: At) -> Tensor:
        if at.prepared is None:
            return weights
        device, rows = weights.device, weights.shape[2]
        saliency = at.on_keys(at.prepared.saliency.to(device))
        # Tokens that came after that pass have no saliency of their own.
        saliency = saliency.where(saliency > 0, 1.0)
        question = at.on_keys(at.prepared.question.to(device))
        of_rows = (saliency, at.columns.is_image, question & ~at.columns.is_image)
        fused = F.gift_fuse(
            weights.transpose(1, 2).flatten(0, 1),
            *(columns.repeat_interleave(rows, dim=0) for columns in of_rows),
        )
        return fused.reshape(-1, rows, *fused.shape[1:]).transpose(1, 2)

    def _question(self, columns: Columns) -> Tensor:
        """``[batch, key]``: the question, or the whole instruction where nothing else is left."""
        is_instruction = columns.is_instruction
        place = is_instruction.long().cumsum(dim=1)
        left = is_instruction.flip(1).long().cumsum(dim=1).flip(1)
        question = is_instruction & (place > self.skip_first) & (left > self.skip_last)
        return torch.where(question.any(dim=1, keepdim=True), question, is_instruction)


@dataclass(frozen=True, kw_only=True)
class _Gaze(Method):
    """How much the attention to each column rises from one question row to the next, summed."""

    rows: ClassVar[Rows] = "after_image"
    observer: ClassVar[bool] = True

    of: GIFT

    def tally(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, heads, key]``."""
        before = torch.cat([at.row_before, weights[:, :, :-1]], dim=2)  # type: ignore[list-item]
        is_row = at.on_rows(self.of._question(at.columns))
        return ((weights - before).relu() * is_row[:, None, :, None]).sum(dim=2)


_Gaze.name = "gift"
