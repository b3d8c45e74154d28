"""One pass for what questions about one image have in common.

A prompt is a prefix that ends with the image and a question. Questions about one image have equal
prefixes, so the prefix is computed once and its cache continued by every question. Whether the
methods allow that is the engine's knowledge (`Plan.prefix`); whether the prompts do is found out
here, and everything in doubt is generated from whole prompts.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from vlm_steer.engine.steer import Steering
from vlm_steer.generation import encode

__all__ = ["SharedPrompts", "share_prompts"]

_KNOWN = frozenset(
    {"input_ids", "attention_mask", "pixel_values", "image_sizes", "pixel_attention_mask"}
)
"""What prompts may consist of; anything else might depend on the question."""


@dataclass(frozen=True)
class SharedPrompts:
    """A batch of prompts whose prefixes wait to be computed.

    Attributes:
        prefix: inputs of one forward, one row per image.
        rows: `[prompts]`, the image of every prompt.
        input_ids: `[prompts, length]`, whole prompts, padded in front of prefix and question.
        attention_mask: the same shape, 0 for padding.
    """

    prefix: Mapping[str, Tensor]
    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor

    def inputs(self, steering: Steering, num_beams: int) -> dict[str, Any]:
        """Compute the prefixes; returns what `generate` continues from."""
        model = steering.plan.model.model
        prefix: dict[str, Any] = {n: value.to(model.device) for n, value in self.prefix.items()}
        if "pixel_values" in prefix:
            prefix["pixel_values"] = prefix["pixel_values"].to(model.dtype)
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            prefix["logits_to_keep"] = 1  # nobody reads them
        cache = steering.prefill(**prefix)
        rows = self.rows.repeat_interleave(num_beams).to(model.device)
        steering.fork(cache, rows)
        return {
            "input_ids": self.input_ids.to(model.device),
            "attention_mask": self.attention_mask.to(model.device),
            "past_key_values": cache,
        }


def share_prompts(
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    digests: Sequence[str],
    image_token_ids: Sequence[int],
) -> SharedPrompts | None:
    """Split prompts into prefixes, one per image, and questions.

    Args:
        processor: the model's processor.
        prompts: whole prompts.
        images: one image per prompt.
        digests: the content of each image; equal ones share a prefix.
        image_token_ids: ids that stand for image features.

    Returns:
        None where nothing can be shared: no image occurs twice, the text in front of the image
        differs, or the prompts cannot be split at their last image token.
    """
    order = list(dict.fromkeys(digests))
    if len(order) == len(digests):
        return None
    first = [digests.index(digest) for digest in order]
    encoded = encode(processor, [prompts[i] for i in first], [images[i] for i in first])
    if not set(encoded) <= _KNOWN or "attention_mask" not in encoded:
        return None
    splits = [
        _split(ids[mask.bool()], image_token_ids)
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    texts = _questions(processor, prompts)
    if texts is None or any(split is None for split in splits):
        return None
    tails = _tokenise(processor, texts)
    known = [split for split in splits if split is not None]
    # The questions that were encoded whole show whether tokenising them alone is the same.
    if any(tails[i] != tail.tolist() for i, (_, tail) in zip(first, known, strict=True)):
        return None
    heads = [prompt[: len(prompt) - len(text)] for prompt, text in zip(prompts, texts, strict=True)]
    rows = [order.index(digest) for digest in digests]
    if any(heads[i] != heads[first[row]] for i, row in enumerate(rows)):
        return None
    pixels = {name: value for name, value in encoded.items() if name not in _SEQUENCE}
    ids, mask = _padded([head for head, _ in known])
    prefix = {"input_ids": ids, "attention_mask": mask, **pixels}
    question_ids, question_mask = _padded([torch.tensor(tail) for tail in tails])
    index = torch.tensor(rows)
    return SharedPrompts(
        prefix,
        index,
        torch.cat([ids[index], question_ids], dim=1),
        torch.cat([mask[index], question_mask], dim=1),
    )


_SEQUENCE = ("input_ids", "attention_mask")


def _split(ids: Tensor, image_token_ids: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """The tokens up to the last image token, and those behind it; None where either is missing."""
    found = torch.isin(ids, torch.tensor(list(image_token_ids))).nonzero()
    if not len(found) or int(found.max()) + 1 == len(ids):
        return None
    end = int(found.max()) + 1
    return ids[:end], ids[end:]


def _questions(processor: Any, prompts: Sequence[str]) -> list[str] | None:
    """The text behind the last image placeholder; None where a prompt shows none."""
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str) or any(token not in prompt for prompt in prompts):
        return None
    return [prompt.rpartition(token)[2] for prompt in prompts]


def _tokenise(processor: Any, texts: Sequence[str]) -> list[list[int]]:
    encoded = processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [list(row) for row in encoded]


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows as one batch, padded on the left with zeros, and its mask."""
    longest = max(map(len, rows))
    ids = torch.stack([pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return ids, mask
