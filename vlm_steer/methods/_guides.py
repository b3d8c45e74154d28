"""What guided decoding reads of a token, and how far it trusts that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.calibration import model_identity
from vlm_steer.engine.hooks import At, Columns
from vlm_steer.errors import ConfigError

if TYPE_CHECKING:
    from vlm_steer.detection import FittedDetector
    from vlm_steer.engine.model import ModelInfo

__all__ = ["LookbackGuide", "fitted_guide"]

_PARTS: Mapping[str, Callable[[Columns], Tensor]] = {
    "context": lambda columns: ~(columns.is_padding | columns.is_generated),
    "system": lambda columns: columns.is_system,
    "image": lambda columns: columns.is_image,
    "instruction": lambda columns: columns.is_instruction,
}


@dataclass(frozen=True)
class LookbackGuide:
    """Lookback ratios, and what a detector makes of them.

    Attributes:
        parts: Parts of the prompt that heads look back at.
        cue: Trailing prompt tokens that count as new.
        detector: Fitted weights; ``None`` trusts high ratios, whatever the head.
    """

    parts: tuple[str, ...] = ("context",)
    cue: int = 1
    detector: "FittedDetector | None" = None

    def ratios(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, heads, key]`` weights of the predicting row -> ``[batch, parts, heads]``."""
        columns = at.columns
        is_cue = columns.is_prompt_end(self.cue)
        new = columns.is_generated | is_cue
        found = [F.lookback_ratio(weights, _PARTS[p](columns) & ~is_cue, new) for p in self.parts]
        return torch.stack(found, dim=1)

    def trust(self, ratios: Tensor) -> Tensor:
        """``[rows]`` from ``[rows, parts, layers, heads]`` means over a chunk."""
        if self.detector is None:
            return ratios.mean(dim=(1, 2, 3))
        risk = self.detector.raw(ratios.flatten(1).double().cpu())
        return -risk.to(ratios.device)


def fitted_guide(path: str, model: "ModelInfo") -> LookbackGuide:
    """The guide that a saved detector of lookback ratios is.

    Raises:
        ConfigError: The detector reads something else, or was fitted on another model.
        DataError: There is no detector, or it is damaged.
    """
    from vlm_steer.detection import FittedDetector  # it imports methods

    fitted = FittedDetector.from_pretrained(path)
    options = fitted.detector.options()
    if fitted.detector.name != "lookback_ratio" or options["pool"] != "mean":
        raise ConfigError(
            f"guided_decoding: {path} is a detector {fitted.detector.name} of {options}; it takes "
            "a fitted lookback_ratio with pool: mean, as it judges chunks by their mean."
        )
    if fitted.residual is not None:
        raise ConfigError(
            f"guided_decoding: {path} was fitted with --position residualize and asks how many "
            "words come before, which chunks of tokens do not tell. Fit it with none or ipw."
        )
    differing = fitted.differing(model_identity(model))
    if differing:
        raise ConfigError(
            f"guided_decoding: {path} was fitted on another model: {', '.join(differing)}. Fit a "
            "detector on this one."
        )
    parts = tuple(options["parts"])
    return LookbackGuide(parts, int(fitted.made_for.get("cue", 1)), fitted)
