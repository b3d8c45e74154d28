"""VHR: reinforce the heads that react to the image."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Attends, Method, Reference, Rows, Selector
from vlm_steer.registry import register_method

__all__ = ["VHR"]


@register_method("vhr")
@dataclass(frozen=True, kw_only=True)
class VHR(Method):
    """Vision-aware head reinforcement: amplify heads whose output changes with the image.

    With a_i the output of head i at the last prompt row (arXiv 2412.13949, eqs. 4 to 7)::

        VHD_i = || a_i(image, text) - a_i(text) ||
        a_i  := alpha * a_i    where VHD_i > median over the heads of the layer, in every row

    Heads are chosen layer by layer during the pass over the prompt, with earlier layers already
    reinforced, and stay fixed for the generation. Heads whose VHD and text-only norm are both
    unusually large are left out (``drop_outliers``).

    Deviations: the official code was not available; the text-only pass runs unreinforced, which
    the paper leaves open. A public port squares the distance (``distance: l2sq``), which changes
    the outlier test alone. In cross-attention layers, which a text-only pass skips, the text-only
    output counts as zero.

    Cost: one text-only forward per generation; a product per head afterwards.

    Attributes:
        alpha: Factor on the selected heads, > 0; 1 disables. The authors use 2; 4 degenerates.
        distance: ``l2`` (paper) or ``l2sq``.
        drop_outliers: Leave out heads that are large without the image too (paper).
        layers: Decoder layers; the authors use layer 1 and the last 14 of 32.
        scope: Streams to reinforce.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("vhr")(alpha=1.5).alpha
        1.5

    Raises:
        ConfigError: A number is outside its range.
    """

    paper: ClassVar[str] = "arXiv:2412.13949"
    rows: ClassVar[Rows] = "all"
    attends: ClassVar[Attends] = "both"

    alpha: float = 2.0
    distance: Literal["l2", "l2sq"] = "l2"
    drop_outliers: bool = True
    layers: Selector = field(
        default_factory=lambda: {"union": [{"indices": [1]}, {"last": 0.4375}]}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            math.isfinite(self.alpha) and self.alpha > 0,
            f"alpha is {self.alpha}; it must be above 0",
        )

    def is_neutral(self) -> bool:
        return self.alpha == 1

    def ignored_options(self) -> dict[str, str]:
        if self.drop_outliers:
            return {}
        return {"distance": "drop_outliers is false, and ranks do not depend on the distance"}

    def prepare(self, reference: Reference) -> Any:
        return reference.head_outputs_without_image(reference.layers)

    def heads(self, outputs: Tensor, at: At) -> Tensor:
        if at.prepared is None:
            return outputs
        gain = at.once("gain", lambda: self._gain(outputs[:, -1], at.prepared.get(at.layer)))
        return outputs * gain[:, None, :, None].to(outputs.dtype)

    def _gain(self, with_image: Tensor, text_only: Tensor | None) -> Tensor:
        """``[batch, heads]`` factors from head outputs ``[batch, heads, head_dim]``."""
        if text_only is None:
            text_only = torch.zeros_like(with_image)
        heads = F.vision_aware_heads(
            with_image, text_only, distance=self.distance, drop_outliers=self.drop_outliers
        )
        return torch.where(heads.selected, self.alpha, 1.0)
