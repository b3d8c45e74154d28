"""What ``vlm-steer generate`` does once its options are read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types

from vlm_steer.engine.steer import steer
from vlm_steer.generation import encode, halving, render_prompt, without_prompt

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = ["Answers", "Decoding", "answer", "summarise"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to generate.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        num_beams: Width of beam search; 1 is greedy decoding or sampling.
        temperature: Above 0 samples at that temperature; ``None`` and 0 do not sample.
        seed: Seed of the sampling.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    temperature: float | None = None
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``, which take precedence over the model's own."""
        sampled = bool(self.temperature)
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": sampled,
            "temperature": self.temperature if sampled else None,
            "top_p": None,
            "top_k": None,
        }


@dataclass(frozen=True, slots=True)
class Answers:
    """What one arm answered.

    Attributes:
        texts: One answer per image.
        effects: ``effect()`` of every batch.
    """

    texts: list[str]
    effects: list[dict[str, Any]]


def answer(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    prompt: str,
    *,
    methods: "Sequence[Method]",
    decoding: Decoding,
    batch_size: int,
) -> Answers:
    """Ask the same question about every image.

    Raises:
        SteerError: Not even one row fits into memory, or the steering refuses.
    """
    effects: list[dict[str, Any]] = []
    whole_prompt = render_prompt(processor, prompt)
    torch.manual_seed(decoding.seed)
    with (
        steer(model, methods, processor=processor) as steering,
        tqdm(total=len(images), unit="image", disable=None if len(images) > 1 else True) as bar,
    ):

        def work(batch: Sequence[Image.Image]) -> list[str]:
            inputs = encode(processor, [whole_prompt] * len(batch), batch)
            inputs = inputs.to(model.device, dtype=model.dtype)
            with torch.inference_mode():
                output = model.generate(**inputs, **decoding.options())
            effects.append(steering.effect())
            bar.update(len(batch))
            new = without_prompt(output, inputs["input_ids"])
            return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]

        texts, _ = halving(work, images, batch_size, _tell)
    return Answers(texts, effects)


def summarise(effect: Mapping[str, Any]) -> list[str]:
    """One line per method about what it changed, from ``effect()``."""
    return [f"{name}: {_changed(seen)}" for name, seen in effect.items()]


def _changed(seen: Mapping[str, Any]) -> str:
    layers = [touch for touch in seen["layers"].values() if touch["rows"] > 0]
    parts = []
    if layers:
        heads = sum(touch["heads"] for touch in layers) / len(layers)
        mass = sum(touch["mass"] for touch in layers)
        parts.append(f"{len(layers)} layers, {heads:.1f} heads each, attention moved {mass:.3g}")
    if seen["probability_moved"] is not None:
        parts.append(f"next-token probability moved {seen['probability_moved']:.3g}")
    return "; ".join(parts) or "changed nothing"


def _tell(size: int) -> None:
    logger.warning("out of memory: going on with --batch-size %d", size)
