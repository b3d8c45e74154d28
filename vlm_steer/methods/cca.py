"""CCA: number and order image tokens from the border inwards."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Method, PromptAt, Rows
from vlm_steer.registry import register_method

__all__ = ["CCA"]


@register_method("cca")
@dataclass(frozen=True, kw_only=True)
class CCA(Method):
    """Concentric causal attention: image tokens are numbered by ring, and rings look outwards.

    With ring r(u) the distance of image token u to the border of its grid (arXiv 2410.15926,
    sec. 3.2), an image that starts at position p takes ceil(side / 2) positions::

        position(u) = p + r(u)
        u may see v of its image   if r(v) <= r(u)

    so that the centre sees the periphery, a ring sees itself in both directions, and the
    instruction stays near every image token. Text stays causal and counts on behind the rings.

    Experimental. The paper trains both stages of LLaVA with these positions and this mask and
    publishes no result without training; on a frozen model either part leaves what the model was
    trained on. Measure before use, each part apart.

    Deviations: none in square grids. The official code knows one image of 24 x 24 tokens and, in
    a batch, uses one sample's positions for all; here every row, image and tile has its own rings,
    and in a grid that is not square r is the distance to the nearest border.

    Cost: a materialised mask instead of the kernel's own causality, over the prompt only.

    Attributes:
        parts: What to apply: ``both``, ``positions`` or ``mask``.
        layers: Decoder layers with the concentric mask; positions are shared by all layers.
        scope: Streams to act on.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("cca")(parts="positions").parts
        'positions'

    Raises:
        UnsupportedModelError: At attach, for models whose image tokens have no known grid, and,
            unless ``parts`` is ``mask``, for models whose positions have several axes (M-RoPE).
    """

    paper: ClassVar[str] = "arXiv:2410.15926"
    rows: ClassVar[Rows] = "image"
    needs_image_tokens: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    parts: Literal["both", "positions", "mask"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.parts in ("both", "positions", "mask"),
            f"parts is {self.parts!r}; it must be both, positions or mask",
        )

    def overrides(self, hook: str) -> bool:
        if hook in ("positions", "mask"):
            return self.parts in ("both", hook)
        return super().overrides(hook)

    def positions(self, positions: Tensor, at: PromptAt) -> Tensor:
        if at.grid is None:
            return positions
        rings = at.grid.spread(F.concentric_rings)
        return F.concentric_positions(rings, at.grid.image, mask=~at.columns.is_padding)

    def mask(self, allowed: Tensor, at: At) -> Tensor:
        if at.grid is None:
            return allowed
        rings, images = at.grid.spread(F.concentric_rings), at.grid.image + 1
        rows = at.on_rows(rings), at.on_rows(images) - 1
        columns = at.on_keys(rings), at.on_keys(images) - 1
        return F.see_periphery(allowed, rows, columns)
