"""Attention knockout: cut the view of some tokens on others, to see what flows there."""

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

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
        layers: Decoder layers with the cut. Windows of about a fifth of the depth, moved over it,
            show where information flows.
        scope: Streams with the cut.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("knockout")(queries=("last",), layers=(0.5, 0.7)).keys
        ('image',)

    Raises:
        ConfigError: A kind is named twice.
        UnsupportedModelError: At attach, for image queries where images are no tokens of the
            decoder.
    """

    paper: ClassVar[str] = "arXiv:2304.14767"
    rows: ClassVar[Rows] = "all"
    attends: ClassVar[Attends] = "both"

    queries: tuple[Query, ...] = ("instruction", "generated")
    keys: tuple[Key, ...] = ("image",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("queries", "keys"):
            kinds = getattr(self, name)
            self.require(len(set(kinds)) == len(kinds), f"{name} {list(kinds)} names a kind twice")

    def is_neutral(self) -> bool:
        return not self.queries or not self.keys

    def ignored_options(self) -> dict[str, str]:
        if not self.queries:
            return {"keys": "queries is empty, so no token loses its view"}
        return {} if self.keys else {"queries": "keys is empty, so nothing is cut off"}

    def check(self, model: "ModelInfo") -> None:
        if "image" in self.queries and model.has_cross_attention:
            raise UnsupportedModelError(
                f"knockout with image among its queries needs image tokens in the decoder, but "
                f"{model.family} keeps its image in the keys of cross-attention layers, which see "
                "nothing themselves. Remove image from queries."
            )

    def mask(self, allowed: Tensor, at: At) -> Tensor:
        rows = _are_any(Columns(at.row_kinds), self.queries)
        return F.knockout_mask(allowed, rows, _are_any(at.columns, self.keys), own=at.is_own())


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
