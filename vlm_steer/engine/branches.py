"""Extra streams beside the user's: built once, then fed the same new tokens.

A branch starts from its own prompt (a noised image, no image, ...) and then receives every token
that the user's stream receives. Two ways to run it give the same numbers:

``paired``    its rows are appended to the batch, so that one forward serves all streams;
``separate``  it has a cache of its own and runs a forward of its own after the user's.

``paired`` is taken wherever the arguments of all streams can be joined. Where only those over the
prompt cannot (it is longer, or waits for the user's), the caches are joined after them, so that one
forward serves all streams from the second token on.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from vlm_steer.engine import caches
from vlm_steer.engine.active import ACTIVE
from vlm_steer.engine.call import Call
from vlm_steer.engine.forward import Forward
from vlm_steer.engine.grid import grid_of
from vlm_steer.engine.hooks import Branch, Columns, Insertion
from vlm_steer.engine.inputs import (
    add_rows,
    last_tokens,
    mask_of,
    n_rows,
    n_tokens,
    one_token,
    patches_per_image,
    pixel_names,
    token_tensor,
    without_image,
)
from vlm_steer.engine.layout import Layout
from vlm_steer.engine.model import kept_module_state
from vlm_steer.engine.pictures import blanked, check_places, of_tokens, shapes_of
from vlm_steer.engine.plan import Bound
from vlm_steer.engine.prompts import edit_of, with_image_instruction, with_insertion
from vlm_steer.engine.streams import Stream
from vlm_steer.errors import UnsupportedModelError

__all__ = ["Backend", "Branches", "Source", "intercept", "is_capturing"]

Backend: TypeAlias = Literal["auto", "paired", "separate"]


class _Captured(BaseException):
    """Carries the arguments of a forward out of a generate() that must not run it."""

    def __init__(self, kwargs: dict[str, Any]):
        super().__init__()
        self.kwargs = kwargs


_CAPTURING: ContextVar[bool] = ContextVar("vlm_steer_capturing", default=False)


def is_capturing() -> bool:
    """Whether this context runs the model only to see what it would pass to its first forward."""
    return _CAPTURING.get()


def intercept(kwargs: dict[str, Any]) -> None:
    """Called before every forward of a model: ends a capturing generate()."""
    if _CAPTURING.get():
        raise _Captured(kwargs)


@dataclass(eq=False)
class Source:
    """Where the arguments of a generation came from, to derive those of its branches.

    Attributes:
        model: The model.
        generate: Its own ``generate``, without steering; ``None`` for a plain forward.
        raw: What the user passed to ``generate``; ``None`` for a plain forward.
    """

    model: PreTrainedModel
    generate: Callable[..., Any] | None = None
    raw: dict[str, Any] | None = None

    def whole_prompt(self, kwargs: Mapping[str, Any], past: int) -> dict[str, Any]:
        """Arguments of one forward over the whole prompt, with an empty cache of its own."""
        if past > 0:
            return self._capture({})
        cache = kwargs.get("past_key_values")
        fresh = self.empty_cache() if cache is None else copy.deepcopy(cache)
        return {**kwargs, "past_key_values": fresh, "use_cache": True}

    def with_pixels(
        self,
        kwargs: Mapping[str, Any],
        change: Callable[[Tensor, tuple[int, ...] | None], Tensor],
        past: int,
    ) -> dict[str, Any]:
        """The same for the user's prompt with other pixels."""
        given = self.given(kwargs)
        names = pixel_names(given)
        if not names:
            raise UnsupportedModelError(
                "a contrast with a changed image needs the raw pixels, but they were not passed "
                f"(given: {', '.join(sorted(k for k, v in given.items() if v is not None))}). "
                "Pass pixel_values, for a continued conversation those of all its images."
            )
        changed = {name: _changed(given[name], given, change) for name in names}
        return self.with_inputs(kwargs, changed, past)

    def given(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the user passed."""
        return kwargs if self.raw is None else self.raw

    def with_inputs(
        self, kwargs: Mapping[str, Any], changed: Mapping[str, Any], past: int
    ) -> dict[str, Any]:
        """Arguments of one forward over the whole prompt with some of the inputs replaced."""
        if self.raw is None:
            return {**self.whole_prompt(kwargs, past), **changed}
        return self._capture(changed)

    def token_ids(self, prompt: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
        """``[batch, tokens]`` ids of a prompt, or ``None`` where only embeddings are known."""
        for given in (prompt.get("input_ids"), (self.raw or {}).get("input_ids")):
            if isinstance(given, Tensor) and given.shape[1] == shape[1]:
                return given.repeat_interleave(shape[0] // given.shape[0], dim=0)
        return None

    def with_image_instruction(self, insertion: Insertion) -> dict[str, Any]:
        """The same for the user's prompt with other text for a Q-Former."""
        if self.raw is None or self.raw.get("qformer_input_ids") is None:
            raise UnsupportedModelError(
                "a contrast with another instruction for the Q-Former needs qformer_input_ids. "
                "Pass what the processor returns."
            )
        return self._capture(with_image_instruction(self.raw, insertion))

    def empty_cache(self) -> DynamicCache:
        """An empty cache that grows."""
        return DynamicCache(config=self._text_config())

    def _capture(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What ``generate`` would hand to its first forward for changed inputs.

        This runs the model's own preparation (image encoding, positions, caches), so that
        branches need no knowledge of model families.
        """
        if self.generate is None or self.raw is None:
            raise UnsupportedModelError(
                "a method that needs the whole prompt met a forward that continues a cache it has "
                "not seen from the start. Use generate(), or start the conversation under steering."
            )
        token = _CAPTURING.set(True)
        try:
            self.generate(**{**self.raw, **changes, "past_key_values": None, "use_cache": True})
        except _Captured as captured:
            prompt = captured.kwargs
        except (ValueError, RuntimeError) as error:
            raise UnsupportedModelError(
                "a method needs the whole prompt once more, but the model cannot build it from "
                f"what was passed to generate(): {error}. When continuing a conversation, pass "
                "the input_ids and pixel_values of all its turns."
            ) from error
        else:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}.generate() ran no forward that the engine knows."
            )
        finally:
            _CAPTURING.reset(token)
        if prompt.get("past_key_values") is None:
            prompt["past_key_values"] = self.empty_cache()
        return {**prompt, "use_cache": True}

    def _text_config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)


@dataclass(eq=False)
class _Running:
    """One running branch.

    Attributes:
        bound: The method that asked for it.
        branch: What it asked for.
        stream: Its layout and rows.
        prompt: Arguments of its first forward.
        mask: ``[batch, positions]`` padding mask of everything it has seen.
        has_padding: Whether that mask holds any padding.
        delta: What to add to the user's positions to get the branch's, ``[..., batch, 1]``.
        shares_prompt: Whether it goes on from a copy of the user's cache.
        empty_cache: Copy of its cache before the first forward, kept only when the user
            generates without a cache and the branch therefore starts over at every step.
    """

    bound: Bound
    branch: Branch
    stream: Stream
    prompt: dict[str, Any]
    mask: Tensor
    has_padding: bool
    delta: Tensor | None
    shares_prompt: bool = False
    empty_cache: Any = None

    def follow(self, kwargs: Mapping[str, Any], new: int) -> dict[str, Any]:
        """Arguments of this branch's forward over the last ``new`` tokens of the user's stream."""
        tokens = kwargs["input_ids"][:, -new:]
        self.mask = torch.cat([self.mask, self.mask.new_ones((self.mask.shape[0], new))], dim=1)
        step = last_tokens(kwargs, new, keep_cross_attention=not self.branch.drop_image)
        step |= {
            "input_ids": tokens,
            "past_key_values": self.prompt["past_key_values"],
            "attention_mask": self._mask_like(kwargs),
            "use_cache": True,
        }
        if (positions := self.positions(kwargs, new)) is not None:
            step["position_ids"] = positions
        return step

    def _mask_like(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        if kwargs.get("attention_mask") is None and not self.has_padding:
            return None
        return self.mask

    def positions(self, kwargs: Mapping[str, Any], new: int) -> Tensor | None:
        """Position ids of the last ``new`` tokens in this branch."""
        positions = kwargs.get("position_ids")
        if positions is None or self.delta is None:
            return None
        return positions[..., -new:] + self.delta  # type: ignore[no-any-return]

    def follow_choice(self, user: Stream) -> None:
        """Know what the method chose in the user's stream."""
        index = self.bound.index
        self.stream.chosen.update({k: v for k, v in user.chosen.items() if k[0] == index})

    def forget_prompt(self) -> None:
        """Let go of pixels and features once the cache holds what was made of them."""
        self.prompt = {"past_key_values": self.prompt["past_key_values"]}

    def reorder(self, beams: Tensor) -> None:
        """Follow a beam search that moves rows."""
        self.mask = self.mask.index_select(0, beams.to(self.mask.device))
        if self.delta is not None and self.delta.shape[-2] > 1:
            self.delta = self.delta.index_select(-2, beams.to(self.delta.device))


class Branches:
    """All branches of one generation."""

    def __init__(
        self,
        call: Call,
        source: Source,
        kwargs: Mapping[str, Any],
        past: int,
        backend: Backend = "auto",
    ):
        self.call = call
        self.source = source
        self.backend = backend
        self.is_paired = False
        self._has_started = False
        self._is_first = True
        self._rows = n_rows(kwargs)
        self._length = n_tokens(kwargs)
        self._padding = 0
        with kept_module_state(source.model):
            self._running = [
                self._build(bound, branch, kwargs, past)
                for bound in call.plan.bounds
                for branch in bound.branches
            ]

        # In a two-way prompt the tokens before the last have seen it, and with it what differs.
        is_one_way = not call.plan.model.has_two_way_prompts
        if past == 0 and self._goes_on(kwargs) and call.plan.leaves_prompt and is_one_way:
            for running in self._running:
                running.shares_prompt = running.branch.shares_prompt

    # -- starting ---------------------------------------------------------------------------
    def _build(
        self, bound: Bound, branch: Branch, kwargs: Mapping[str, Any], past: int
    ) -> _Running:
        kinds = self.call.positive.layout.prompt
        if branch.drop_image:
            is_kept = Columns(kinds).is_text
            prompt = without_image(self.source.whole_prompt(kwargs, past), is_kept)
            order = torch.argsort(is_kept.int(), dim=1, stable=True)[:, -n_tokens(prompt) :]
            kinds = kinds.gather(1, order) * prompt["attention_mask"].to(kinds.dtype)
        elif branch.pixels is not None:
            prompt = self.source.with_pixels(kwargs, branch.pixels, past)
        elif branch.shows is not None:
            shown = branch.shows(self.call.positive.prepared[bound.index])
            prompt = self._with_blanks(branch, shown, kwargs, past)
        elif branch.insert is not None:
            more = branch.inserts
            ids = None if more is None else more(self.call.positive.prepared[bound.index])
            prompt, kinds = self._with_text(branch.insert, ids, kwargs, past)
        else:
            prompt = self.source.whole_prompt(kwargs, past)
        mask = mask_of(prompt)
        if mask is None:
            tokens = token_tensor(prompt)
            mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        return _Running(
            bound=bound,
            branch=branch,
            stream=Stream(bound.branch_key(branch), Layout.from_kinds(kinds)),
            prompt=prompt,
            mask=mask,
            has_padding=not bool(mask.all()),
            delta=_position_delta(kwargs, prompt),
        )

    def _with_blanks(
        self, branch: Branch, shown: Tensor, kwargs: Mapping[str, Any], past: int
    ) -> dict[str, Any]:
        """The user's prompt with the pixels of some image tokens blanked."""
        call, model = self.call, self.call.plan.model
        kinds, given = call.positive.layout.prompt, self.source.given(kwargs)
        shapes = shapes_of(grid_of(model.geometry, kinds, call.grids, call.copies), call.copies)
        model.remember("places of pixels", lambda: check_places(model.model, given, shapes))
        is_blank = of_tokens(~shown.to(kinds.device), kinds, call.copies)
        changed = blanked(given, is_blank, shapes, branch.blank)
        return self.source.with_inputs(kwargs, changed, past)

    def _with_text(
        self, insertion: Insertion, more: Tensor | None, kwargs: Mapping[str, Any], past: int
    ) -> tuple[dict[str, Any], Tensor]:
        """A prompt with inserted text, and what its tokens are."""
        kinds = self.call.positive.layout.prompt
        if insertion.to_vision and self.call.plan.model.has_image_instruction:
            return self.source.with_image_instruction(insertion), kinds
        prompt = self.source.whole_prompt(kwargs, past)
        model = self.call.plan.model
        ids = self.source.token_ids(prompt, kinds.shape)
        edit = edit_of(insertion, kinds, ids, model.begin_token_ids, more)
        prompt = with_insertion(prompt, edit, model.model.get_input_embeddings())
        return {**prompt, "past_key_values": self.source.empty_cache()}, edit.kinds

    def streams(self) -> tuple[Stream, ...]:
        """The streams of the branches."""
        return tuple(running.stream for running in self._running)

    # -- one forward ------------------------------------------------------------------------
    def before(self, kwargs: dict[str, Any], past: int) -> dict[str, Any]:
        """Arguments for the user's forward: joined with the branches' when they are paired."""
        self._is_first = not self._has_started
        self._has_started = True
        if self._is_first:
            joined = self._try_to_pair(kwargs, past)
            self.is_paired = joined is not None
            return kwargs if joined is None else joined
        if not self.is_paired:
            return kwargs
        new = n_tokens(kwargs)
        parts = [kwargs, *(running.follow(kwargs, new) for running in self._running)]
        return self._join_step(parts)

    def _try_to_pair(self, kwargs: dict[str, Any], past: int) -> dict[str, Any] | None:
        waits = any(r.branch.after_user or r.shares_prompt for r in self._running)
        lacks_image = any(running.branch.drop_image for running in self._running)
        can_pair = (
            self.backend != "separate"
            and not waits
            and self.source.raw is not None
            and past == 0
            and kwargs.get("past_key_values") is not None
            and not (lacks_image and self.call.plan.model.has_cross_attention)
            # Images of all streams would be encoded together, and changed together.
            and not (self.call.plan.vision and pixel_names(kwargs))
        )
        joined = None
        if can_pair:
            prompts = [running.prompt for running in self._running]
            joined = add_rows([kwargs, *prompts])
        if joined is None:
            return None
        joined["past_key_values"] = kwargs["past_key_values"]
        length = n_tokens(kwargs)
        for index, running in enumerate(self._running, start=1):
            missing = length - n_tokens(running.prompt)
            running.has_padding |= missing > 0
            running.mask = torch.nn.functional.pad(running.mask, (missing, 0))
            running.stream.pad(missing)
            running.stream.batch = slice(index * self._rows, (index + 1) * self._rows)
            running.forget_prompt()
        self.call.positive.batch = slice(0, self._rows)
        return joined

    def _join_caches(self, kwargs: Mapping[str, Any]) -> None:
        """Let all streams go on in one batch, their prompts having passed one by one."""
        cache, streams = kwargs.get("past_key_values"), (self.call.positive, *self.streams())
        others = [running.prompt.get("past_key_values") for running in self._running]
        lengths = [stream.layout.prompt_length for stream in streams]
        missing = [max(lengths) - length for length in lengths]
        is_possible = (
            self._goes_on(kwargs)
            and lengths[0] == n_tokens(kwargs)
            and caches.can_join(cache, others, missing)
            and (not any(missing) or all(stream.can_be_padded for stream in streams))
        )
        if self.backend == "separate" or not is_possible:
            if self.backend == "paired":
                raise UnsupportedModelError(
                    "backend 'paired' was asked for, but this model's inputs cannot be joined "
                    "into one batch. Use backend 'auto' or 'separate'."
                )
            return
        caches.join(cache, others, missing)
        self._padding = missing[0]
        for index, (stream, more) in enumerate(zip(streams, missing, strict=True)):
            stream.pad(more)
            stream.batch = slice(index * self._rows, (index + 1) * self._rows)
        for running, more in zip(self._running, missing[1:], strict=True):
            running.mask = torch.nn.functional.pad(running.mask, (more, 0))
            running.has_padding |= more > 0
            running.prompt = {"past_key_values": cache}
        self.is_paired = True

    def _goes_on(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether this is a generation with a cache, whose rows know their positions."""
        return (
            self.source.raw is not None
            and kwargs.get("past_key_values") is not None
            and kwargs.get("position_ids") is not None
            and not self.call.plan.model.has_cross_attention
        )

    def _my_mask(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The user's padding mask, on the left of which a longer branch has put more padding."""
        mask: Tensor | None = kwargs.get("attention_mask")
        if self._padding == 0:
            return mask
        if mask is None:
            total = self._running[0].mask.shape[1] - self._padding
            mask = self._running[0].mask.new_ones((self._rows, total))
        return torch.nn.functional.pad(mask, (self._padding, 0))

    def _join_step(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        joined = dict(parts[0])
        joined["input_ids"] = torch.cat([part["input_ids"] for part in parts])
        if parts[0].get("position_ids") is not None:
            rows = self._rows
            positions = [part["position_ids"] for part in parts]
            positions = [p.expand(*p.shape[:-2], rows, p.shape[-1]) for p in positions]
            joined["position_ids"] = torch.cat(positions, dim=-2)
        masks = [self._my_mask(parts[0]), *(part.get("attention_mask") for part in parts[1:])]
        given = [mask for mask in masks if mask is not None]
        if given:
            unpadded = torch.ones_like(given[0])
            joined["attention_mask"] = torch.cat([unpadded if m is None else m for m in masks])
        for name, value in parts[0].items():
            if name not in ("input_ids", "position_ids", "attention_mask") and _has_rows(
                value, self._rows
            ):
                joined[name] = torch.cat([part[name] for part in parts])
        return joined

    def after(
        self, owner: nn.Module, kwargs: Mapping[str, Any], logits: Tensor, past: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of the user's stream and of each branch, ``[batch, vocabulary]`` each.

        Args:
            owner: The module that was run.
            kwargs: The arguments of the user's stream alone.
            logits: What the forward returned, ``[all rows, positions, vocabulary]``.
            past: Positions that were in the user's cache.
        """
        if self.is_paired:
            mine = logits[: self._rows]
            others = {
                running.stream.name: logits[running.stream.batch, -1] for running in self._running
            }
            return mine, others
        with kept_module_state(self.source.model):
            others = {
                running.stream.name: self._run(owner, running, kwargs, past)
                for running in self._running
            }
        if self._is_first:
            self._join_caches(kwargs)
        return logits, others

    def _run(
        self, owner: nn.Module, running: _Running, kwargs: Mapping[str, Any], past: int
    ) -> Tensor:
        if self._is_first:
            if running.branch.after_user:
                running.follow_choice(self.call.positive)
            # A logits processor has no cache of the user's, only an empty one like it.
            if running.shares_prompt and kwargs["past_key_values"].get_seq_length() == self._length:
                shared = caches.without_last(kwargs["past_key_values"])
                if shared is not None:
                    return self._run_last(owner, running, kwargs, shared)
            if kwargs.get("past_key_values") is None:
                running.empty_cache = copy.deepcopy(running.prompt["past_key_values"])
            logits = self._forward(owner, running, running.prompt, 0)
            if running.empty_cache is None:
                running.forget_prompt()
            return logits
        new = n_tokens(kwargs)
        if past > 0:
            length = running.mask.shape[1]
            return self._forward(owner, running, running.follow(kwargs, new), length)
        # Without a cache the user's forward starts over, and so does the branch: rows may have
        # been moved between steps by a beam search that had no cache to reorder.
        return self._start_over(owner, running, kwargs, new)

    def _run_last(
        self, owner: nn.Module, running: _Running, kwargs: Mapping[str, Any], cache: Any
    ) -> Tensor:
        """The last token of the prompt, which the cache holds but for that token."""
        step = last_tokens(kwargs, 1, keep_cross_attention=True)
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        step |= {
            name: kwargs[name][:, -1:],
            "position_ids": kwargs["position_ids"][..., -1:],
            "attention_mask": kwargs.get("attention_mask"),
            "past_key_values": cache,
            "use_cache": True,
        }
        if name == "inputs_embeds":
            step["input_ids"] = None
        running.prompt = {"past_key_values": cache}
        return self._forward(owner, running, step, self._length - 1)

    def _start_over(
        self, owner: nn.Module, running: _Running, kwargs: Mapping[str, Any], length: int
    ) -> Tensor:
        prompt_length = running.stream.layout.prompt_length
        running.prompt["past_key_values"] = copy.deepcopy(running.empty_cache)
        running.mask = running.mask[:, :prompt_length]
        self._forward(owner, running, running.prompt, 0)
        new = length - self._length
        step = running.follow(kwargs, new)
        if not running.bound.chooses_anew:
            return self._forward(owner, running, step, prompt_length)
        # Every token was generated under a choice of its own, so they are passed one by one.
        for index in range(new):
            past = prompt_length + index
            logits = self._forward(owner, running, one_token(step, index, past), past)
        return logits

    def _forward(
        self, owner: nn.Module, running: _Running, arguments: dict[str, Any], past: int
    ) -> Tensor:
        forward = Forward(self.call, (running.stream,), past, n_tokens(arguments))
        token = ACTIVE.set(forward)
        try:
            output = owner(**arguments)
        finally:
            ACTIVE.reset(token)
        logits: Tensor = output.logits[:, -1]
        return logits

    # -- following the user's cache -----------------------------------------------------------
    def reorder(self, beams: Tensor) -> Tensor:
        """Follow a beam search; returns the row order for the cache that was reordered."""
        for running in self._running:
            running.reorder(beams)
            if not self.is_paired:
                running.prompt["past_key_values"].reorder_cache(beams)
        if not self.is_paired:
            return beams
        return torch.cat([beams + self._rows * i for i in range(len(self._running) + 1)])

    def take_back(self, n: int) -> None:
        """Follow a search that forgets the last ``n`` tokens of the user's stream."""
        for running in self._running:
            running.mask = running.mask[:, :-n]
            if not self.is_paired and running.empty_cache is None:
                running.prompt["past_key_values"].crop(-n)

    def release(self, cache: Any) -> None:
        """Leave only the user's rows in the user's cache."""
        if self.is_paired and cache is not None:
            caches.split(cache, self._rows, self._padding)


def _changed(
    pixels: Any,
    given: Mapping[str, Any],
    change: Callable[[Tensor, tuple[int, ...] | None], Tensor],
) -> Any:
    if isinstance(pixels, list | tuple):
        return [_changed(image, given, change) for image in pixels]
    return change(pixels, patches_per_image(given, pixels))


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == rows


def _position_delta(kwargs: Mapping[str, Any], prompt: Mapping[str, Any]) -> Tensor | None:
    """What to add to the user's positions to get the branch's, ``[..., batch, 1]``."""
    mine, theirs = kwargs.get("position_ids"), prompt.get("position_ids")
    if mine is None or theirs is None:
        return None
    return theirs[..., -1:] - mine[..., -1:]  # type: ignore[no-any-return]
