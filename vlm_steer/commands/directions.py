"""What ``vlm-steer build vti`` does once its options are read."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types

from vlm_steer import functional as F
from vlm_steer.calibration import weights_sample
from vlm_steer.directions import Directions
from vlm_steer.engine.model import inspect_model, unwrap
from vlm_steer.engine.pictures import with_masked_patches
from vlm_steer.engine.steer import last_hidden_states
from vlm_steer.engine.vision import vision_states
from vlm_steer.errors import DataError, UnsupportedModelError
from vlm_steer.generation import encode, halving, render_prompt
from vlm_steer.images import open_image

__all__ = ["Pair", "from_pairs", "read_pairs"]

_FIELDS = ("image", "question", "value", "h_value")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two captions of one image.

    Attributes:
        image: The image file.
        question: What the captions answer.
        correct: A caption of what is there.
        hallucinated: The same with something that is not.
    """

    image: Path
    question: str
    correct: str
    hallucinated: str


def read_pairs(path: Path, images: Path) -> list[Pair]:
    """Read JSON lines with ``image``, ``question``, ``value`` and ``h_value``.

    Args:
        path: The file, in the format of the pairs that the authors of VTI published.
        images: The folder that file names are relative to.

    Raises:
        DataError: The file is missing or empty, a line is wrong, or an image is missing.
    """
    if not path.is_file():
        raise DataError(f"pairs {path} do not exist.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"pairs {path} cannot be read: {error}.") from error
    pairs = [_pair(line, f"{path}:{n}", images) for n, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise DataError(f"pairs {path} is empty. Write one JSON object per line.")
    return pairs


def _pair(line: str, place: str, images: Path) -> Pair:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error}).") from None
    values = [_text(data, name, place) for name in _FIELDS]
    image, question, correct, hallucinated = values
    if not (images / image).is_file():
        raise DataError(f"{place}: image {images / image} does not exist.")
    return Pair(images / image, question, correct, hallucinated)


def _text(data: object, name: str, place: str) -> str:
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{place}: {name} is missing or no text. Every line needs {', '.join(_FIELDS)}."
        )
    return value


def from_pairs(
    model: Any,
    processor: Any,
    pairs: Sequence[Pair],
    *,
    form: Literal["mean", "mean_plus_component"],
    batch_size: int = 1,
    visual_trials: int = 0,
    mask_share: float = 0.99,
) -> Directions:
    """Directions from hallucinated to correct captions, at their last token.

    With ``visual_trials``, also those from the states of each image in the vision tower to their
    mean over that many random masks.

    Args:
        model: The model, every intervention on it is off meanwhile.
        processor: Its processor.
        pairs: The captions.
        form: See ``functional.steering_direction``.
        batch_size: Pairs at once; halved when memory runs out.
        visual_trials: Masks per image; 0 for no visual directions.
        mask_share: Share of the patches that a mask hides, above 0, at most 1.

    Raises:
        UnsupportedModelError: The vision tower cannot be looked into.
    """
    visual = None
    if visual_trials > 0:
        # A component per layer: those of different layers have nothing to do with each other.
        per_layer = _visual(model, processor, pairs, visual_trials, mask_share).unbind(dim=1)
        visual = torch.stack([F.steering_direction(layer, form=form) for layer in per_layer])
    with tqdm(total=len(pairs), unit="pair", disable=None) as bar:

        def work(batch: Sequence[Pair]) -> list[Tensor]:
            correct = _states(model, processor, batch, [pair.correct for pair in batch])
            wrong = _states(model, processor, batch, [pair.hallucinated for pair in batch])
            bar.update(len(batch))
            return list((correct - wrong).cpu())

        differences, _ = halving(work, pairs, batch_size, _tell)
    return Directions(
        vectors=F.steering_direction(torch.stack(differences), form=form),
        method="vti",
        family=str(unwrap(model).config.model_type),
        made_of={
            "model": str(unwrap(model).config.name_or_path),
            "pairs": len(pairs),
            "form": form,
            **({} if visual is None else {"visual_trials": visual_trials, "mask": mask_share}),
        },
        visual=visual,
        weights=weights_sample(inspect_model(model)),
    )


def _visual(model: Any, processor: Any, pairs: Sequence[Pair], trials: int, share: float) -> Tensor:
    """``[images, layers, hidden]``: states of masked images, mean over masks, minus the image's."""
    base = unwrap(model)
    info = inspect_model(base)
    layers = [layer for layer, _ in info.vision_layers]
    patch = getattr(getattr(base.config, "vision_config", None), "patch_size", None)
    if not layers or not isinstance(patch, int) or not hasattr(base, "get_image_features"):
        raise UnsupportedModelError(
            f"{info.family} does not tell the layers or the patches of its vision tower. Leave "
            "--visual-trials out."
        )
    generator = torch.Generator().manual_seed(0)
    images = list(dict.fromkeys(pair.image for pair in pairs))
    differences = []
    for image in tqdm(images, unit="image", disable=None):
        inputs = encode(processor, [render_prompt(processor, "")], [open_image(image)])
        given = dict(inputs.to(base.device, dtype=base.dtype))
        mean = torch.zeros(())
        for _ in range(trials):
            masked = with_masked_patches(given, patch, share=share, generator=generator)
            mean = mean + vision_states(base, layers, masked).cpu() / trials
        differences.append(mean - vision_states(base, layers, given).cpu())
    return torch.stack(differences)


def _states(model: Any, processor: Any, pairs: Sequence[Pair], captions: Sequence[str]) -> Tensor:
    """``[batch, layers, hidden]`` float32 at the last token of question and caption."""
    prompts = list(_with_captions(processor, pairs, captions))
    inputs = encode(processor, prompts, [open_image(pair.image) for pair in pairs])
    inputs = inputs.to(model.device, dtype=model.dtype)
    return last_hidden_states(model, inputs).float()


def _with_captions(processor: Any, pairs: Sequence[Pair], captions: Sequence[str]) -> Iterator[str]:
    for pair, caption in zip(pairs, captions, strict=True):
        prompt = render_prompt(processor, pair.question)
        yield prompt + caption if prompt[-1:].isspace() else f"{prompt} {caption}"


def _tell(size: int) -> None:
    logger.warning("out of memory: going on with --batch-size %d", size)
