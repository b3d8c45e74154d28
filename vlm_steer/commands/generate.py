"""What ``vlm-steer generate`` does once its options are read."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm

from vlm_steer.engine.steer import steer
from vlm_steer.errors import SteerError
from vlm_steer.prompting import decode_answers, encode_prompts

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


@dataclass
class Answers:
    """What one arm answered.

    Attributes:
        texts: One answer per image.
        effects: ``effect()`` of every batch.
    """

    texts: list[str] = field(default_factory=list)
    effects: list[dict[str, Any]] = field(default_factory=list)


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
    answers = Answers()
    torch.manual_seed(decoding.seed)
    with steer(model, methods, processor=processor) as steering:

        def run(batch: Sequence[Image.Image]) -> None:
            inputs = encode_prompts(processor, batch, [prompt] * len(batch)).to(model.device)
            with torch.inference_mode():
                output = model.generate(**inputs, **decoding.options())
            answers.texts += decode_answers(processor, output, inputs["input_ids"])
            answers.effects.append(steering.effect())

        _in_batches(images, batch_size, run)
    return answers


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


def _in_batches(
    items: Sequence[Image.Image], size: int, run: Callable[[Sequence[Image.Image]], None]
) -> None:
    """Call ``run`` on batches in order, halving their size when memory runs out."""
    done = 0
    with tqdm(total=len(items), disable=None if len(items) > 1 else True, unit="image") as bar:
        while done < len(items):
            batch = items[done : done + size]
            try:
                run(batch)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise SteerError(
                        "one image does not fit into memory. Try --dtype bfloat16, "
                        "--quantization 4bit or fewer --max-new-tokens."
                    ) from None
                size = max(1, len(batch) // 2)
                logger.warning("out of memory: going on with --batch-size %d", size)
                torch.cuda.empty_cache()
                continue
            done += len(batch)
            bar.update(len(batch))
