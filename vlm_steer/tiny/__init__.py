"""A small LLaVA of our own, with a world to look at: hallucination without a download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlm_steer.tiny.language import CAPTION_PROMPT, POPE_TEMPLATE, existence_question
from vlm_steer.tiny.world import CATEGORIES

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = [
    "CAPTION_PROMPT",
    "CATEGORIES",
    "POPE_TEMPLATE",
    "SHIPPED_SEED",
    "existence_question",
    "load_tiny",
    "model_dir",
]

SHIPPED_SEED = 0
"""The seed of the training run whose weights are in the package."""


def model_dir() -> Path:
    """Return the folder of the shipped model, an ordinary HuggingFace model directory.

    ``AutoProcessor`` and ``AutoModelForImageTextToText`` load it like any other.
    """
    return Path(__file__).parent / "weights"


def load_tiny(
    seed: int = SHIPPED_SEED, *, dtype: torch.dtype | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the embedded model and its processor, in evaluation mode, on the CPU.

    Args:
        seed: seed of the training run; only ``SHIPPED_SEED`` is in the package.
        dtype: floating-point type of the weights in memory; float32 unless told otherwise. The
            file holds bfloat16, from which float32 follows exactly.

    Returns:
        The model and the processor. The processor prepares both images and text.

    Raises:
        ConfigError: there are no weights for this seed in the package.
    """
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

    from vlm_steer.errors import ConfigError

    if seed != SHIPPED_SEED:
        raise ConfigError(
            f"no weights for seed {seed}: the package holds those of seed {SHIPPED_SEED}; train "
            f"others with `python -m vlm_steer.tiny.train --output DIR --seed {seed}` and load "
            "DIR/model with from_pretrained"
        )
    directory = model_dir()
    model = LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=dtype or torch.float32, local_files_only=True
    )
    processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]  # untyped upstream
        directory, local_files_only=True
    )
    if not isinstance(processor, LlavaProcessor):
        raise ConfigError(
            f"the processor in {directory} loaded as {type(processor).__name__}, expected "
            "LlavaProcessor: reinstall the package"
        )
    model.eval()  # type: ignore[no-untyped-call]  # untyped upstream
    return model, processor
