"""Where in a picture an object is, by a zero-shot object detector such as OWL or Grounding DINO."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm_steer.errors import UnsupportedModelError

__all__ = ["Locator", "load_zero_shot"]

_BRIGHTEST = 255


def load_zero_shot(name: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Load a zero-shot object detector of transformers and its processor.

    Args:
        name: Folder or hub id, such as ``google/owlv2-base-patch16-ensemble``.

    Raises:
        UnsupportedModelError: There is no such detector.
    """
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    load_processor: Any = AutoProcessor.from_pretrained
    try:
        model = AutoModelForZeroShotObjectDetection.from_pretrained(name).eval()
        processor = load_processor(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"no zero-shot object detector could be loaded from {os.fspath(name)!r} ({reason}). "
            "Give one that AutoModelForZeroShotObjectDetection accepts, such as "
            "google/owlv2-base-patch16-ensemble."
        ) from error
    return model, processor


@dataclass(frozen=True, eq=False)
class Locator:
    """A zero-shot object detector of transformers.

    Attributes:
        model: The detector, whose outputs have ``logits`` and ``pred_boxes``.
        processor: Its processor.
    """

    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str | os.PathLike[str], device: torch.device | None = None) -> "Locator":
        """Load one by folder or hub id.

        Raises:
            UnsupportedModelError: There is no such detector.
        """
        model, processor = load_zero_shot(name)
        return cls(model.to(device), processor)

    def find(self, picture: Tensor, name: str, *, threshold: float) -> Tensor:
        """Find an object.

        Args:
            picture: ``[channels, height, width]`` in [0, 1].
            name: What to look for.
            threshold: Score of a box below which it does not count, in [0, 1].

        Returns:
            ``[boxes, 4]`` left, top, right and bottom in [0, 1], the best first.
        """
        pixels = (picture.clamp(0, 1) * _BRIGHTEST).round().byte().permute(1, 2, 0).cpu().numpy()
        inputs = self.processor(
            images=Image.fromarray(pixels), text=[f"{name}."], return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode():
            output = self.model(**inputs)
        scores = output.logits[0].float().sigmoid().amax(dim=-1)
        scores, order = scores.sort(descending=True)
        kept = order[scores >= threshold]
        middle, size = output.pred_boxes[0, kept].float().chunk(2, dim=-1)
        boxes = torch.cat([middle - size / 2, middle + size / 2], dim=-1).cpu()
        if self.model.config.model_type == "owlv2":  # it pads pictures to squares
            height, width = picture.shape[-2:]
            boxes *= max(height, width) / torch.tensor([width, height, width, height])
        return boxes.clamp(0, 1)
