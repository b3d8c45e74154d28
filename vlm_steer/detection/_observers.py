"""What is read off attention rows while a trace is recorded."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Columns, Method, Rows
from vlm_steer.engine.model import ModelInfo
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.methods.var import find_sink_dims

__all__ = ["Maps", "Masses", "Received", "image_runs"]

_SINK_TAU = 20.0  # the threshold of VAR, arXiv:2503.03321


@dataclass(frozen=True, kw_only=True)
class Masses(Method):
    """Attention mass per block of columns, entropy over the image, and mass on sinks."""

    name: ClassVar[str] = "trace_masses"
    rows: ClassVar[Rows] = "last"
    attends: ClassVar[Literal["self", "image", "both"]] = "both"
    observer: ClassVar[bool] = True
    observes_rows: ClassVar[bool] = True

    cue: int
    n_images: int

    def check(self, model: ModelInfo) -> None:
        layers = [site.layer for site in model.sites.values()]
        if len(set(layers)) < len(layers):
            raise UnsupportedModelError(
                f"traces hold one attention row per layer, but layers of {model.family} attend "
                "twice, to the text and to the image. Use a detector that reads logits only."
            )

    def resolve(self, model: ModelInfo) -> tuple[int, ...]:
        return model.remember(("sink_dims", _SINK_TAU), lambda: find_sink_dims(model, _SINK_TAU))

    def marks(self, hidden: Tensor, at: At) -> Tensor:
        marked = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if at.plan:
            marked = F.sink_tokens(hidden, sink_dims=at.plan, tau=_SINK_TAU)
        is_first = at.on_rows(_first(at.prompt).to(torch.int8)).bool()
        return marked | is_first

    def observe(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, heads, rows, key]`` -> ``[batch, rows, heads, blocks + 2]``."""
        n_blocks = self.n_images + 4
        is_block = torch.nn.functional.one_hot(self._block(at), n_blocks)
        is_block = is_block * ~at.columns.is_padding[..., None]
        masses = weights @ is_block[:, None].to(weights.dtype)
        is_image = at.columns.is_image[:, None, None]
        # By all image tokens, also those that a sliding window has dropped.
        n_image = is_image if at.columns.axis == "cross" else at.prompt.is_image[:, None, None]
        entropy = F.column_entropy(weights, is_image) / n_image.sum(-1).clamp(min=2).log()
        sinks = torch.zeros_like(entropy)
        if at.marks is not None and at.columns.axis == "self":
            sinks = (weights * at.marks[:, None, None]).sum(-1)
        seen = torch.cat([masses, entropy[..., None], sinks[..., None]], dim=-1)
        return seen.transpose(1, 2)

    def _block(self, at: At) -> Tensor:
        """``[batch, key]`` number of the block of each column; any number for padding."""
        if at.columns.axis == "cross":
            return torch.ones_like(at.columns.kinds, dtype=torch.long)
        prompt = at.once("blocks", lambda: _blocks(at.prompt, self.cue, self.n_images))
        generated = self.n_images + 3
        return torch.where(at.columns.is_generated, generated, at.on_keys(prompt))


@dataclass(frozen=True, kw_only=True)
class Maps(Method):
    """Attention to every image token, in half precision: there is a map per token, layer and head.

    What float16 cannot tell apart, a relative 1/2048 and below 6e-8, no picture shows.
    """

    name: ClassVar[str] = "trace_maps"
    rows: ClassVar[Rows] = "last"
    attends: ClassVar[Literal["self", "image", "both"]] = "image"
    observer: ClassVar[bool] = True
    observes_rows: ClassVar[bool] = True

    def observe(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, heads, rows, key]`` -> ``[batch, rows, heads, image_tokens]``."""
        if at.columns.axis == "cross":
            return weights.transpose(1, 2).half()
        number = at.once("image", lambda: _numbered(at.prompt.is_image))
        width = at.once("width", lambda: torch.zeros(int(number.max()) + 1, device=number.device))
        maps = weights.new_zeros(*weights.shape[:3], width.shape[0])
        index = at.on_keys(number)[:, None, None].expand_as(weights)
        return maps.scatter_add(-1, index, weights)[..., 1:].transpose(1, 2).half()


@dataclass(frozen=True, kw_only=True)
class Received(Method):
    """Attention that tokens receive and give themselves, summed over rows as they pass."""

    name: ClassVar[str] = "trace_received"
    rows: ClassVar[Rows] = "all"
    observer: ClassVar[bool] = True

    scope_of_rows: Literal["response", "sequence"]

    def tally(self, weights: Tensor, at: At) -> Tensor:
        """``[batch, heads, rows, key]`` -> ``[batch, 2 heads + 1, key]``."""
        is_column, is_row = ~at.columns.is_padding, at.is_row
        if self.scope_of_rows == "response":
            is_column = at.columns.is_generated
            is_row = at.row_kinds == Columns.GENERATED
        counted = weights * (is_row[:, :, None] & is_column[:, None, :])[:, None]
        own = (counted * at.is_own()).sum(2)
        seen = (counted > 0).any(1).sum(1)[:, None].to(counted.dtype)
        return torch.cat([counted.sum(2), own, seen], dim=1)


def _first(columns: Columns) -> Tensor:
    """``[batch, prompt]`` bool, the first token of each row."""
    return (~columns.is_padding).cumsum(1) == 1


def _numbered(chosen: Tensor) -> Tensor:
    """``[batch, prompt]`` int64, 1, 2, ... at the chosen tokens and 0 elsewhere."""
    return chosen.long().cumsum(1) * chosen


def image_runs(is_image: Tensor) -> Tensor:
    """``[batch, prompt]`` int64, 1, 2, ... by run of image tokens and 0 elsewhere."""
    before = torch.cat([torch.zeros_like(is_image[:, :1]), is_image[:, :-1]], dim=1)
    return (is_image & ~before).long().cumsum(1) * is_image


def _blocks(prompt: Columns, cue: int, n_images: int) -> Tensor:
    """``[batch, prompt]`` int64 number of the block of each prompt token."""
    blocks = image_runs(prompt.is_image)
    blocks = blocks.masked_fill(prompt.is_instruction, n_images + 1)
    return blocks.masked_fill(prompt.is_prompt_end(cue), n_images + 2)
