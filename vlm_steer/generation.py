"""From images and questions to what a model takes, and from what it returns to text."""

import gc
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from vlm_steer.errors import SteerError

__all__ = ["answer_ids", "encode", "halving", "render_prompt", "without_prompt"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Pictures: TypeAlias = Image.Image | Sequence[Image.Image]
"""The image of a prompt, or its images in order."""


def render_prompt(
    processor: Any, text: str, history: Sequence[tuple[str, str]] = (), *, n_images: int = 1
) -> str:
    """The whole prompt of a question about an image, about several, or about none.

    Args:
        processor: What ``AutoProcessor.from_pretrained`` returned. Its chat template is used when
            it has one; otherwise the prompt is its image token, then the question.
        text: The question.
        history: Questions and answers before it; the image stands in front of the first.
        n_images: How many images stand there; 0 for none.
    """
    turns = [*(turn for pair in history for turn in pair), text]
    if getattr(processor, "chat_template", None):
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": turn}]}
            for role, turn in zip(cycle(("user", "assistant")), turns, strict=False)
        ]
        messages[0]["content"][:0] = [{"type": "image"}] * n_images
        prompt: str = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return prompt
    token = getattr(processor, "image_token", None)
    return "\n".join([*[token] * n_images, *turns] if token else turns)


def encode(
    processor: Any, prompts: Sequence[str], images: Sequence[Pictures] | None
) -> BatchFeature:
    """Prepare prompts with their images, or without any, padded on the left; on the CPU.

    Args:
        processor: The model's processor.
        prompts: Whole prompts, as ``render_prompt`` returns them.
        images: Per prompt its image, or several; None for prompts without images.
    """
    bos = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
    # Some chat templates write the token that the tokenizer would add.
    is_written = isinstance(bos, str) and all(prompt.startswith(bos) for prompt in prompts)
    inputs: BatchFeature = processor(
        images=None if images is None else [_listed(given) for given in images],
        text=list(prompts),
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **({"add_special_tokens": False} if is_written else {}),
    )
    return inputs


def _listed(given: Pictures) -> list[Image.Image]:
    return [given] if isinstance(given, Image.Image) else list(given)


def without_prompt(output: Tensor, input_ids: Tensor) -> Tensor:
    """The generated part of what ``generate`` returned, ``[rows, tokens]``.

    Most models repeat the prompt in front; those that are fed embeddings do not.
    """
    n_prompt = input_ids.shape[1]
    repeated = output.shape[1] >= n_prompt and output[:, :n_prompt].equal(
        input_ids.to(output.device)
    )
    return output[:, n_prompt:] if repeated else output


def answer_ids(model: Any, output: Tensor, input_ids: Tensor) -> list[Tensor]:
    """What was generated for each row, ``[tokens]`` each, up to its end token, which is kept.

    Args:
        model: The model, which names its end tokens.
        output: What ``generate`` returned, one or several sequences per prompt.
        input_ids: ``[prompts, tokens]`` of the prompts.
    """
    ends = model.generation_config.eos_token_id
    known = torch.tensor([] if ends is None else ends, device=output.device).reshape(-1)
    copies = len(output) // len(input_ids)
    answers = without_prompt(output, input_ids.repeat_interleave(copies, dim=0))
    is_end = torch.isin(answers, known).int().cumsum(1)
    return [
        row[: int((end == 0).sum()) + 1].cpu() for row, end in zip(answers, is_end, strict=True)
    ]


def halving(
    work: Callable[[Sequence[Item]], Sequence[Result]],
    items: Sequence[Item],
    size: int,
    on_halved: Callable[[int], None],
) -> tuple[list[Result], int]:
    """Run ``work`` on batches in order, halving their size whenever memory runs out.

    Args:
        work: Takes a batch and returns one result per item.
        items: What to work on.
        size: Size of a batch to begin with, > 0.
        on_halved: Told every new size.

    Returns:
        The results in order, and the size that fitted.

    Raises:
        SteerError: Memory runs out on a single item.
    """
    results: list[Result] = []
    while len(results) < len(items):
        batch = items[len(results) : len(results) + size]
        try:
            results += work(batch)
            continue
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise SteerError(
                    "out of memory with a single item. Lower --max-new-tokens or --num-beams, or "
                    "load with --dtype bfloat16, --quantization 4bit or --device-map auto."
                ) from error
        # Only here, since inside the handler the traceback keeps the failed tensors alive.
        size = max(1, len(batch) // 2)
        gc.collect()
        torch.cuda.empty_cache()
        on_halved(size)
    return results, size
