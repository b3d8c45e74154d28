"""From images and questions to what a model takes, and from what it returns to text."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from vlm_steer.errors import UnsupportedModelError

__all__ = ["decode_answers", "encode_prompts"]


def encode_prompts(
    processor: Any, images: Sequence[Image.Image], prompts: Sequence[str]
) -> Mapping[str, Tensor]:
    """Prepare one image and one question per row, padded on the left.

    The processor's chat template is used when it has one; otherwise the prompt is the image token
    followed by the question.

    Args:
        processor: What ``AutoProcessor.from_pretrained`` returned.
        images: One image per row.
        prompts: One question per row.

    Returns:
        Inputs for ``model.generate``, on the CPU.

    Raises:
        UnsupportedModelError: The processor takes no images.
    """
    if getattr(processor, "image_processor", None) is None:
        raise UnsupportedModelError(
            f"{type(processor).__name__} takes no images. Use a vision-language model."
        )
    options = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    encoded: Mapping[str, Tensor]
    if getattr(processor, "chat_template", None):
        encoded = processor.apply_chat_template(
            [_conversation(image, text) for image, text in zip(images, prompts, strict=True)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs=options,
        )
    else:
        token = getattr(processor, "image_token", None)
        texts = [f"{token}\n{text}" if token else text for text in prompts]
        encoded = processor(images=[[image] for image in images], text=texts, **options)
    return encoded


def decode_answers(processor: Any, output: Tensor, input_ids: Tensor) -> list[str]:
    """The generated text of every row, without the prompt and without special tokens.

    Args:
        processor: The model's processor.
        output: What ``generate`` returned, ``[rows, tokens]``. Most models repeat the prompt in
            front; some do not.
        input_ids: The prompt, ``[rows, prompt tokens]``.
    """
    n_prompt = input_ids.shape[1]
    prompt = input_ids.to(output.device)
    if output.shape[1] >= n_prompt and output[:, :n_prompt].equal(prompt):
        output = output[:, n_prompt:]
    texts: list[str] = processor.batch_decode(output, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _conversation(image: Image.Image, text: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]
