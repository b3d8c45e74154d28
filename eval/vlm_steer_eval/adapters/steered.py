"""A model that stays steered and answers conversations, whoever asks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vlm_steer
from vlm_steer.config import SUFFIXES
from vlm_steer.errors import ConfigError, DataError
from vlm_steer.generation import without_prompt
from vlm_steer.images import open_image
from vlm_steer.loading import load_model

__all__ = ["Message", "SteeredModel", "file_hash"]

Message = Mapping[str, Any]
"""`role` and `content`, a list of `{"type": "text", "text": ...}` and `{"type": "image", "image":
path or picture}`, as chat templates of transformers take it."""


class SteeredModel:
    """A model that is steered until it is closed.

    Args:
        model: `tiny`, a folder or a hub id.
        steer: what to steer, in any form that `vlm_steer.steer` takes; None for nothing.
        options: further options of `vlm_steer.loading.load_model`.

    Raises:
        ConfigError: the specification is wrong.
        UnsupportedModelError: there is no such model, or it cannot be steered as asked.
    """

    def __init__(self, model: str, steer: Any = None, **options: Any) -> None:
        self.model, self.processor = load_model(model, **options)
        self.handle = vlm_steer.attach(self.model, steer, processor=self.processor)

    def close(self) -> None:
        """Stop steering; the model is what it was."""
        self.handle.detach()

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        num_beams: int = 1,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Answer the last turn of every conversation, without sampling.

        Args:
            conversations: see `Message`.
            max_new_tokens: longest answer, > 0.
            num_beams: beams, >= 1.
            stop: texts before which an answer is cut off.

        Raises:
            DataError: an image cannot be used.
        """
        pictures = [[_picture(part) for part in _images(c)] for c in conversations]
        if len({bool(images) for images in pictures}) > 1:  # processors take all or none
            return [
                self.answer([c], max_new_tokens=max_new_tokens, num_beams=num_beams, stop=stop)[0]
                for c in conversations
            ]
        inputs = self._inputs(conversations, pictures)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
            )
        answers = without_prompt(output, inputs["input_ids"])
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [_cut(text.strip(), stop) for text in texts]

    def _inputs(
        self, conversations: Sequence[Sequence[Message]], pictures: list[list[Image.Image]]
    ) -> Any:
        texts = [
            self.processor.apply_chat_template(
                [dict(message) for message in conversation],
                add_generation_prompt=True,
                tokenize=False,
            )
            for conversation in conversations
        ]
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        # Some chat templates write the token that the tokenizer would add.
        is_written = isinstance(bos, str) and all(text.startswith(bos) for text in texts)
        inputs = self.processor(
            images=pictures if pictures[0] else None,
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **({"add_special_tokens": False} if is_written else {}),
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)


def file_hash(steer: str | None) -> str | None:
    """The first twelve digits of the SHA-256 of a configuration file; None for anything else.

    Raises:
        ConfigError: the file cannot be read.
    """
    import hashlib

    if steer is None or not steer.endswith(SUFFIXES):
        return None
    try:
        return hashlib.sha256(Path(steer).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ConfigError(f"{steer} cannot be read ({error.strerror}); check the path") from error


def _images(conversation: Sequence[Message]) -> list[Any]:
    return [
        part["image"]
        for message in conversation
        for part in message["content"]
        if part["type"] == "image"
    ]


def _picture(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, (str, Path)):
        return open_image(Path(source))
    raise DataError(f"an image is a path or a picture, not {type(source).__name__}")


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [text.find(word) for word in stop if word and word in text]
    return text[: min(ends)].rstrip() if ends else text
