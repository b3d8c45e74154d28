"""What methods with a stream that sees only some of the image tokens have in common."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Method, Rows, Selector
from vlm_steer.engine.model import ModelInfo
from vlm_steer.engine.selectors import select

__all__ = ["Pruned"]


@dataclass(frozen=True, kw_only=True)
class Pruned(Method):
    """Base of methods that close image columns in a branch of their own, chosen by attention.

    Attributes:
        keep: Image tokens that stay: a fraction of them, above 0 and below 1, or a number.
        layers: Decoder layers that see the chosen tokens only. The layer before the first of them
            chooses, so layer 0 always sees all.

    Class attributes:
        largest: Keep the most attended instead of the least attended tokens.
    """

    rows: ClassVar[Rows] = "all"
    needs_image_tokens: ClassVar[bool] = True
    largest: ClassVar[bool] = False

    keep: int | float = 0.174
    layers: Selector = (0.0625, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_count = isinstance(self.keep, int) and self.keep >= 1
        self.require(
            is_count or 0 < self.keep < 1,
            f"keep is {self.keep}; it must be a fraction above 0 and below 1, or a whole number of "
            "tokens from 1",
        )

    def ignored_options(self) -> dict[str, str]:
        return {"scope": f"{self.name} acts on a stream of its own"}

    def select_layers(self, model: ModelInfo) -> tuple[int, ...]:
        return tuple(layer for layer in select(self.layers, model.n_layers) if layer > 0)

    def layers_of(self, hook: str, layers: frozenset[int], model: ModelInfo) -> Iterable[int]:
        if hook != "choose":
            return layers
        before = [site.layer for site in model.sites.values() if site.layer < min(layers)]
        return before and (max(before),)

    def choose(self, weights: Tensor, at: At) -> Tensor:
        is_image = at.columns.is_image
        count: int | Tensor = int(self.keep)
        if isinstance(self.keep, float):
            count = (self.keep * is_image.sum(dim=-1)).round().clamp(min=1)
        return F.least_attended_tokens(weights, is_image, count=count, largest=self.largest)

    def mask(self, allowed: Tensor, at: At) -> Tensor:
        for chosen in at.chosen.values():
            is_open = ~at.columns.is_image | chosen.to(allowed.device)
            closed = allowed & is_open[:, None]
            # A row that would see nothing, such as an image token that begins the prompt, is kept.
            allowed = torch.where(closed.any(dim=-1, keepdim=True), closed, allowed)
        return allowed
