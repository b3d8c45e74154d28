"""What ``vlm-steer build decore`` does once its options are read."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types

from vlm_steer.engine.hooks import At, Attends, Method
from vlm_steer.engine.model import inspect_model
from vlm_steer.engine.steer import steer
from vlm_steer.errors import DataError, UnsupportedModelError
from vlm_steer.generation import encode, halving, render_prompt, without_prompt
from vlm_steer.heads import Head
from vlm_steer.images import open_image

__all__ = ["image_files", "visual_heads"]

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _LooksAtImage(Method):
    """Which heads attend most to an image token, as a retrieval head does to what it copies."""

    name: ClassVar[str] = "looks_at_image"
    observer: ClassVar[bool] = True
    attends: ClassVar[Attends] = "self"

    def observe(self, weights: Tensor, at: At) -> Tensor:
        return at.columns.is_image.gather(1, weights.argmax(dim=-1)).float()


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Image files, and those in folders, in order.

    Raises:
        DataError: There are none, or a path does not exist.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"image {path} does not exist.")
        inside = sorted(p for p in path.iterdir()) if path.is_dir() else [path]
        files += [p for p in inside if not path.is_dir() or p.suffix.lower() in _SUFFIXES]
    if not files:
        raise DataError(f"there are no images in {', '.join(map(str, paths))}.")
    return files


def visual_heads(
    model: Any,
    processor: Any,
    files: Sequence[Path],
    prompt: str,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 1,
) -> dict[Head, list[float]]:
    """How often each head attends most to an image token while the model answers greedily.

    The score of a head on one image is the share of generated tokens for which the key that it
    attends to most is an image token: the copy test of retrieval heads, with a region of pixels
    for a needle.

    Args:
        model: The model, every intervention on it is off meanwhile.
        processor: Its processor.
        files: The images.
        prompt: What to ask about each.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Images at once; halved when memory runs out.

    Returns:
        Head to one score per image.

    Raises:
        UnsupportedModelError: The model keeps its image in cross-attention layers.
    """
    info = inspect_model(model)
    if info.has_cross_attention:
        raise UnsupportedModelError(
            "this model keeps its image in cross-attention layers, whose heads see nothing else: "
            "there is nothing to detect. Use a published file of head scores."
        )
    whole = render_prompt(processor, prompt)
    with steer(model, _LooksAtImage()) as steering, tqdm(total=len(files), disable=None) as bar:

        def work(batch: Sequence[Path]) -> list[Tensor]:
            inputs = encode(processor, [whole] * len(batch), [open_image(file) for file in batch])
            inputs = inputs.to(model.device, dtype=model.dtype)
            with torch.inference_mode():
                output = model.generate(
                    **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
                )
            seen = steering.records(output)[_LooksAtImage.name].float().cpu()
            new = without_prompt(output, inputs["input_ids"]).cpu()
            bar.update(len(batch))
            lengths = _lengths(new, model)
            return [row[:n].mean(dim=0) for row, n in zip(seen, lengths, strict=True)]

        per_image, _ = halving(work, files, batch_size, _tell)
    scores = torch.stack(per_image, dim=-1)
    layers = sorted({site.layer for site in info.sites.values()})  # a hybrid has others too
    return {
        (layer, head): values.tolist()
        for layer, of_layer in zip(layers, scores, strict=True)
        for head, values in enumerate(of_layer)
    }


def _lengths(new: Tensor, model: Any) -> list[int]:
    """Tokens of each answer ``[rows, tokens]``, the one that ended it included."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    has_ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype)).int().cumsum(dim=1) > 0
    lengths: list[int] = (new.shape[1] - (has_ended.sum(dim=1) - 1).clamp(min=0)).tolist()
    return lengths


def _tell(size: int) -> None:
    logger.warning("out of memory: going on with --batch-size %d", size)
