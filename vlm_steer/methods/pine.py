"""PINE: images or options in any order give the same answer."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import At, Columns, Method, PromptAt, Rows
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["PINE"]


@register_method("pine")
@dataclass(frozen=True, kw_only=True)
class PINE(Method):
    """Position-invariant inference: segments see each other, and each reader orders them itself.

    A prompt is a prefix, N segments (images with the text around them, or given spans) and a
    suffix. Within a forward, per layer and head (arXiv 2407.01100, sec. 3)::

        all segments end at one position, behind which the suffix counts on
        a row of segment a sees the prefix, every other segment, and a up to itself
        a reader ranks segments j by the mean weight it gives to j's tokens when all stand at one
            position; it reads segment j moved back by the total length of those ranked before j

    The readers are every suffix or generated row by itself, and all rows of a segment together,
    which rank their own segment first. The order in which segments were written thereby has no
    influence, up to rounding, on anything after them.

    Experimental for vision-language models: the paper measures text models.

    Deviations: none known in the arithmetic. The official code takes one prompt at a time and
    keeps a copy of the keys turned for every head and row; here queries are turned instead, which
    gives the same scores, and batches, padding and beams work.

    Cost: high. Every row behind the prefix is computed again, with one product per segment and one
    for the ranking; three or more segments take one more pass over their own rows.

    Attributes:
        segments: What must have no order: ``images``, or a list of token ranges
            ``[start, stop]``, counted from the end of the prompt, so negative; each starts where
            the one before it stops.
        tail: Text tokens behind an image that belong to it, the others up to the next image belong
            to that one; null gives all of them to the image before. Set it so that what surrounds
            each image is equal: 1 for ``<start> image <end>``.
        scope: Streams to act on.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("pine")(segments=((-9, -6), (-6, -3))).segments
        ((-9, -6), (-6, -3))

    Raises:
        ConfigError: Ranges are fewer than two, not negative, or leave gaps.
        UnsupportedModelError: At attach, for models without plain rotary positions in all layers
            (M-RoPE, sliding windows, layers without attention), with bidirectional prompts, or, for
            images, whose images are no unbroken runs of tokens.
    """

    paper: ClassVar[str] = "arXiv:2407.01100"
    rows: ClassVar[Rows] = "all"
    needs_rotation: ClassVar[bool] = True

    segments: Literal["images"] | tuple[tuple[int, int], ...] = "images"
    tail: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.segments == "images" or _is_chain(self.segments),
            f"segments is {self.segments!r}; it must be images, or two or more [start, stop] below "
            "0, each starting where the last one stops",
        )
        self.require(
            self.tail is None or self.tail >= 0, f"tail is {self.tail}; it must be at least 0"
        )

    def ignored_options(self) -> dict[str, str]:
        ignored = {"layers": "it orders segments in all layers, which share their positions"}
        if self.segments != "images":
            ignored["tail"] = "segments are token ranges"
        return ignored

    def check(self, model: "ModelInfo") -> None:
        reason = _why_not(model)
        if reason is None and self.segments == "images" and not model.has_image_runs:
            reason = (
                "its images are no unbroken runs of image tokens; list the segments as token ranges"
            )
        if reason is not None:
            raise UnsupportedModelError(
                f"{self.name} cannot make {model.family} blind to the order of segments: {reason}."
            )

    def positions(self, positions: Tensor, at: PromptAt) -> Tensor:
        segments = self._segments(at.columns)
        n_segments = int(segments.max()) + 1
        if n_segments < 2:
            return positions
        return F.aligned_positions(positions, segments, n_segments)

    def mask(self, allowed: Tensor, at: At) -> Tensor:
        if not at.prompt_rows:
            return allowed
        places = _Places(self, at)
        return F.see_other_segments(allowed, places.rows, places.keys)

    def scores(self, scores: Tensor, at: At) -> Tensor:
        places = _Places(self, at)
        if places.n_segments < 2:
            return scores
        importance = F.segment_importance(at.unplaced(), places.keys, places.n_segments)
        if at.prompt_rows:
            own = places.rows[:, None, :, None]
            importance = torch.where(own >= 0, self._as_segments(places, at), importance)
        shifts = F.segment_shifts(importance, places.lengths)
        reads = (places.rows >= 0) | places.is_behind
        for number, shift in enumerate(shifts.unbind(-1)):
            is_read = reads[:, None, :, None] & (places.keys == number)[:, None, None, :]
            scores = torch.where(is_read, at.placed(shift), scores)
        return scores

    def _as_segments(self, places: "_Places", at: At) -> Tensor:
        """Importance for the rows of segments, ``[batch, heads, rows, segments]``."""
        numbers = torch.arange(places.n_segments, device=places.rows.device)
        own = places.rows.clamp(min=0)
        if places.n_segments == 2:  # its own first, the other second: nothing to weigh
            seen = torch.zeros((1, 1, 1, 1), device=own.device)
        else:
            every = at.once("importance", lambda: at.sum_over_rows(self._of_segments))
            index = own[:, None, :, None].expand(-1, every.shape[1], -1, every.shape[3])
            seen = every.gather(2, index)
        return torch.where((own[..., None] == numbers)[:, None], math.inf, seen)

    def _of_segments(self, at: At) -> Tensor:
        """What the rows at hand add to ``[batch, heads, reading segment, segment]``."""
        places = _Places(self, at)
        seen = F.segment_importance(at.unplaced(), places.keys, places.n_segments, own=places.rows)
        numbers = torch.arange(places.n_segments, device=seen.device)
        member = (places.rows[:, None] == numbers[:, None]).to(seen.dtype)
        return member[:, None] @ seen

    def _segments(self, prompt: Columns) -> Tensor:
        """``[batch, prompt]`` number of each token's segment, -1 outside of all."""
        is_token = ~prompt.is_padding
        if self.segments == "images":
            return F.image_segments(prompt.is_image, is_token, tail=self.tail)
        segments = torch.full(is_token.shape, -1, device=is_token.device)
        for number, (start, stop) in enumerate(self.segments):
            segments[:, start:stop] = number
        return segments.masked_fill(~is_token, -1)


class _Places:
    """Which segments the rows and columns at hand belong to.

    Attributes:
        rows: ``[batch, rows]`` int64, -1 outside of all segments.
        keys: ``[batch, key]`` int64.
        is_behind: ``[batch, rows]`` bool, rows behind the last segment.
        lengths: ``[batch, segments]`` int64.
        n_segments: Segments of the row of the batch that has most.
    """

    def __init__(self, method: PINE, at: At):
        numbers = at.once("segments", lambda: method._segments(at.prompt) + 1)
        self.lengths = at.once(
            "lengths", lambda: F.segment_lengths(numbers - 1, int(numbers.max()))
        )
        self.n_segments = self.lengths.shape[1]
        self.rows, self.keys = at.on_rows(numbers) - 1, at.on_keys(numbers) - 1
        to_come = numbers.flip(-1).cummax(-1).values.flip(-1)
        self.is_behind = (at.on_rows(to_come) == 0) & (self.lengths.sum(-1, keepdim=True) > 0)


def _is_chain(spans: str | tuple[tuple[int, int], ...]) -> bool:
    """Whether token ranges follow each other before the end of the prompt."""
    if isinstance(spans, str):
        return False
    ends = [start for start, _ in spans[1:]]
    return (
        len(spans) >= 2
        and all(start < stop < 0 for start, stop in spans)
        and ends == [stop for _, stop in spans[:-1]]
    )


def _why_not(model: "ModelInfo") -> str | None:
    if model.has_windows:
        return "some of its layers see a window of the sequence only"
    if not model.is_all_attention:
        return "some of its layers read the sequence in order, without attention"
    if model.has_two_way_prompts:
        return "tokens of its prompt see each other in both directions already"
    return None
