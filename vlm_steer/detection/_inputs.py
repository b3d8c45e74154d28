"""What the tokens of prompts and answers are."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_steer.detection._observers import image_runs
from vlm_steer.detection.trace import TraceLayout
from vlm_steer.engine.grid import grid_of, grids_among
from vlm_steer.engine.hooks import Columns
from vlm_steer.engine.inputs import is_per_token, mask_of, place_mask
from vlm_steer.engine.layout import Layout, is_image_token
from vlm_steer.engine.model import ModelInfo
from vlm_steer.errors import ConfigError, UnsupportedModelError

__all__ = ["answer_cue", "prompt_layout", "trace_layouts", "with_answers"]

_MARKER = "\N{BLACK SQUARE}"


def answer_cue(processor: Any) -> int:
    """How many tokens a chat template puts at the end of a prompt to open the answer.

    At least 1, also for a processor without a template: some token has to be new for the first
    generated one.
    """
    if not getattr(processor, "chat_template", None):
        return 1
    message = [{"role": "user", "content": [{"type": "text", "text": _MARKER}]}]
    closed, opened = (
        processor.apply_chat_template(message, add_generation_prompt=wanted, tokenize=False)
        for wanted in (False, True)
    )
    tokenizer = getattr(processor, "tokenizer", processor)
    added = opened.removeprefix(closed) if opened.startswith(closed) else ""
    return max(len(tokenizer(added, add_special_tokens=False)["input_ids"]) if added else 0, 1)


def prompt_layout(info: ModelInfo, inputs: Mapping[str, Any]) -> Layout:
    """What the tokens of the prompts are."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ConfigError(
            "a trace needs input_ids, to tell image tokens from text. Pass what the processor "
            "returned."
        )
    places = place_mask(inputs)
    is_image = is_image_token(ids, info.image_token_ids) if places is None else places
    return Layout.from_image_mask(is_image, mask_of(inputs))


def trace_layouts(
    info: ModelInfo, layout: Layout, inputs: Mapping[str, Any], cue: int
) -> list[TraceLayout]:
    """The layout of every row, padding left out."""
    prompt = Columns(layout.prompt.cpu())
    try:
        grids: Any = grid_of(info.geometry, prompt.kinds, grids_among(inputs), 1).shapes
        grids = grids if not info.geometry.unknown else [None] * len(prompt.kinds)
    except UnsupportedModelError:
        grids = [None] * len(prompt.kinds)
    layouts = []
    for kinds, grid in zip(prompt.kinds, grids, strict=True):
        kept = kinds[kinds != Columns.PADDING]
        number = image_runs(kept[None] == Columns.IMAGE)[0]
        images = []
        for image in range(1, int(number.max()) + 1):
            where = (number == image).nonzero().flatten()
            images.append((int(where[0]), int(where[-1]) + 1))
        layouts.append(TraceLayout(kept, tuple(images), grid, cue))
    return layouts


def with_answers(
    inputs: Mapping[str, Any], answers: Sequence[Tensor], info: ModelInfo
) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a forward over prompts and answers; answers padded on the right.

    Returns:
        The arguments, and ``[batch, answer]`` bool, the tokens of the answers.
    """
    ids = inputs["input_ids"]
    rows, tokens = ids.shape
    width = max(len(answer) for answer in answers)
    added = ids[:, -1:].repeat(1, width)
    is_answer = torch.zeros_like(added, dtype=torch.bool)
    for row, answer in enumerate(answers):
        added[row, : len(answer)] = answer.to(ids)
        is_answer[row, : len(answer)] = True
    mask = mask_of(inputs)
    mask = torch.ones_like(ids) if mask is None else mask
    whole: dict[str, Any] = {}
    for name, value in inputs.items():
        if is_per_token(name, value, rows, tokens):
            last = value[:, -1:]
            filler = last if "cross" in name else torch.zeros_like(last)
            value = torch.cat([value, filler.expand(-1, width, *value.shape[2:])], dim=1)
        whole[name] = value
    whole["input_ids"] = torch.cat([ids, added], dim=1)
    whole["attention_mask"] = torch.cat([mask, is_answer.to(mask)], dim=1)
    arguments = inspect.signature(info.model.forward).parameters
    if info.positions == "rotary" and "position_ids" in arguments:
        counted = whole["attention_mask"].long().cumsum(1) - 1
        whole["position_ids"] = counted.clamp(min=0)
    return whole, is_answer
