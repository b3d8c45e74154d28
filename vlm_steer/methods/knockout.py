"""Attention knockout: cut the view of some tokens on others, to see what flows there."""

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Attends, Columns, Method, Rows
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["Knockout"]

Query: TypeAlias = Literal["system", "image", "instruction", "generated", "last"]
Key: TypeAlias = Literal["system", "image", "instruction", "generated"]


@register_method("knockout")
@dataclass(frozen=True, kw_only=True)
class Knockout(Method):
    """Attention knockout: some tokens may not see some others; for analysis, not against errors.

    In the layers chosen, with ``queries`` the tokens that lose their view and ``keys`` what they
    lose (arXiv 2304.14767, section 4)::

        row i does not attend to column j    for i in queries and j in keys, i != j

    What the answer loses is what flowed from ``keys`` to ``queries`` in those layers. The default
    cuts all text behind the image off from the image.

    In models that see the image through cross-attention, rows that lose the image get nothing from
    those layers: zeros, as if they had no image. Mllama's tokens before the image see it there too;
    name ``system`` among the queries to cut them off as well.

    Deviations: a token always sees itself. Information that has moved to other tokens in layers
    before those chosen is not cut; neither is the MLP of a cross-attention layer.

    Cost: a materialised mask instead of the kernel's own causality, in the layers chosen.

    Attributes:
        queries: Kinds of tokens that lose their view: ``system`` (before the image), ``image``,
            ``instruction`` (behind the image), ``generated``, ``last`` (those that predict a
            token: the last of the prompt and all generated ones). Empty disables.
        keys: Kinds of tokens that they lose: ``system``, ``image``, ``instruction``,
            ``generated``. Empty disables.
        image_tokens: Which of the image tokens they lose, counted from 0 over the prompt, all
            images together; ``None`` for all of them. Numbers that a prompt does not have are
            nothing there.
        layers: Decoder layers with the cut. Windows of about a fifth of the depth, moved over it,
            show where information flows.
        scope: Streams with the cut.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("knockout")(queries=("last",), layers=(0.5, 0.7)).keys
        ('image',)

    Raises:
        ConfigError: A kind is named twice, or a number of an image token is negative.
        UnsupportedModelError: At attach, for image queries or ``image_tokens`` where images are no
            tokens of the decoder.
    """

    paper: ClassVar[str] = "arXiv:2304.14767"
    rows: ClassVar[Rows] = "all"
    attends: ClassVar[Attends] = "both"

    queries: tuple[Query, ...] = ("instruction", "generated")
    keys: tuple[Key, ...] = ("image",)
    image_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("queries", "keys"):
            kinds = getattr(self, name)
            self.require(len(set(kinds)) == len(kinds), f"{name} {list(kinds)} names a kind twice")
        negative = [number for number in self.image_tokens or () if number < 0]
        self.require(not negative, f"image_tokens {negative} are negative; they count from 0")

    def is_neutral(self) -> bool:
        return not self.queries or not self.keys

    def ignored_options(self) -> dict[str, str]:
        if not self.queries:
            reason = "queries is empty, so no token loses its view"
            return {"keys": reason, "image_tokens": reason}
        if not self.keys:
            reason = "keys is empty, so nothing is cut off"
            return {"queries": reason, "image_tokens": reason}
        if "image" not in self.keys:
            return {"image_tokens": "keys has no image"}
        return {}

    def check(self, model: "ModelInfo") -> None:
        if not model.has_cross_attention:
            return
        why = (
            f"needs image tokens in the decoder, but {model.family} keeps its image in the keys of "
            "cross-attention layers"
        )
        if "image" in self.queries:
            raise UnsupportedModelError(
                f"knockout with image among its queries {why}, which see nothing themselves. "
                "Remove image from queries."
            )
        if self.image_tokens is not None:
            raise UnsupportedModelError(
                f"knockout of some image tokens {why}. Remove image_tokens, which cuts off all."
            )

    def mask(self, allowed: Tensor, at: At) -> Tensor:
        rows = _are_any(Columns(at.row_kinds), self.queries)
        columns = _are_any(at.columns, self.keys)
        if self.image_tokens is not None and "image" in self.keys:
            columns &= ~at.columns.is_image | at.on_keys(self._chosen(at.prompt.is_image))
        return F.knockout_mask(allowed, rows, columns, own=at.is_own())

    def _chosen(self, is_image: Tensor) -> Tensor:
        """``[batch, prompt]`` bool: the image tokens with the numbers given."""
        numbers = is_image.long().cumsum(dim=1) - 1
        given = torch.tensor(self.image_tokens, dtype=torch.long, device=numbers.device)
        return is_image & torch.isin(numbers, given)


def _are_any(tokens: Columns, kinds: tuple[Query, ...]) -> Tensor:
    """``[batch, tokens]`` bool: tokens of any of the kinds."""
    return reduce(Tensor.logical_or, (_are(tokens, kind) for kind in kinds))


def _are(tokens: Columns, kind: Query) -> Tensor:
    if kind == "last":
        return tokens.is_generated | tokens.is_prompt_end(1)
    masks = {
        "system": tokens.is_system,
        "image": tokens.is_image,
        "instruction": tokens.is_instruction,
        "generated": tokens.is_generated,
    }
    return masks[kind]
