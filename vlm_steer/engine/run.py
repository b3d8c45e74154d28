"""One generation under steering, seen from the forwards of the model that returns logits."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_steer.engine.active import ACTIVE, Enough, Probe
from vlm_steer.engine.branches import Backend, Branches, Source
from vlm_steer.engine.call import Call
from vlm_steer.engine.describe import write
from vlm_steer.engine.forward import Forward
from vlm_steer.engine.grid import grid_of, grids_among
from vlm_steer.engine.hooks import Columns, LogitsAt, Method, Reference, Writing, Written
from vlm_steer.engine.inputs import (
    mask_of,
    n_rows,
    n_tokens,
    pixel_names,
    place_mask,
    without_image,
)
from vlm_steer.engine.layout import Layout, is_image_token
from vlm_steer.engine.model import kept_module_state
from vlm_steer.engine.pictures import pictures_by_row
from vlm_steer.engine.plan import Bound, Plan, make_plan
from vlm_steer.engine.prompts import questions_in
from vlm_steer.engine.streams import Stream, states_after
from vlm_steer.engine.vision import image_attention
from vlm_steer.errors import UnsupportedModelError

__all__ = ["Run", "named_arguments"]


@dataclass(frozen=True, slots=True)
class _Entered:
    """The outermost forward that is being followed in this context."""

    run: "Run"
    owner: nn.Module


_ENTERED: ContextVar[_Entered | None] = ContextVar("vlm_steer_entered", default=None)


def named_arguments(
    owner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a forward by name."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(owner.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


class Run:
    """Follows the forwards of one generation: layout, streams, branches, records.

    Args:
        plan: What acts where.
        source: Where the user's inputs came from.
        backend: How branches run.
        earlier: The run that filled the cache this generation continues, if any.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        backend: Backend = "auto",
        earlier: "Run | None" = None,
    ):
        self.plan = plan
        self.source = source
        self.backend = backend
        self._earlier = None if earlier is None else earlier.call
        self.call: Call | None = None
        self.branches: Branches | None = None
        self._tokens: tuple[Token[Forward | Probe | None], Token[_Entered | None]] | None = None
        self._mine: dict[str, Any] = {}
        self._past = 0
        self._cache: Any = None
        self.vision: dict[int, Tensor] = {}
        self.enclosing: Token[Run | None] | None = None

    @staticmethod
    def inside(owner: nn.Module) -> "Run | None":
        """The run whose forward of this very module is ending in this context."""
        entered = _ENTERED.get()
        return entered.run if entered is not None and entered.owner is owner else None

    # -- before and after a forward -----------------------------------------------------------
    def before(self, owner: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Enter a forward; returns the arguments to run it with."""
        cache = kwargs.get("past_key_values")
        self._past = 0 if cache is None else int(cache.get_seq_length())
        self._mine = kwargs
        if self.call is None:
            self.call = self._open(owner, kwargs)
            self._watch(cache)
        elif self._past > 0 and n_tokens(kwargs) > 1 and self.source.raw is None:
            self.call = self._next_turn(self.call, kwargs)
        if self.branches is not None:
            kwargs = self.branches.before(kwargs, self._past)
        streams: tuple[Stream, ...] = (self.call.positive,)
        if self.branches is not None and self.branches.is_paired:
            streams += self.branches.streams()
        forward = Forward(self.call, streams, self._past, n_tokens(kwargs))
        self._tokens = (ACTIVE.set(forward), _ENTERED.set(_Entered(self, owner)))
        return kwargs

    def after(self, owner: nn.Module, output: Any) -> Any:
        """Leave a forward; returns its output with the user's rows and the steered logits."""
        forward = self.leave()
        if not isinstance(forward, Forward) or output is None or self.call is None:
            return output
        self._record(forward)
        if self.plan.acts_on_logits:
            output = self._with_logits(owner, output)
        self.call.step += 1
        return output

    def beside(self, owner: nn.Module, kwargs: dict[str, Any], logits: Tensor, past: int) -> Tensor:
        """Combined logits ``[batch, vocabulary]`` of a step whose forward is not followed.

        Args:
            owner: The module that returns logits.
            kwargs: What it was given.
            logits: What it said of the next token.
            past: Positions that were in its cache.
        """
        if self.call is None:
            self.call = self._open(owner, kwargs)
        others: dict[str, Tensor] = {}
        streams: tuple[Stream, ...] = ()
        if self.branches is not None:
            self.branches.before(kwargs, past)
            _, others = self.branches.after(owner, kwargs, logits, past)
            streams = self.branches.streams()
        combined = _combine(self.call, logits, others, {s.name: s for s in streams})
        self.call.step += 1
        return combined

    def take_back(self, n: int) -> None:
        """Follow a search that forgets the last ``n`` generated tokens."""
        if self.call is None:
            return
        self.call.step -= n
        for records in self.call.records.values():
            del records[self.call.step :]
        if self.branches is not None:
            self.branches.take_back(n)

    def leave(self) -> Forward | Probe | None:
        """Take this thread out of the forward, whatever happened in it."""
        forward = ACTIVE.get()
        if self._tokens is not None:
            active, entered = self._tokens
            self._tokens = None
            ACTIVE.reset(active)
            _ENTERED.reset(entered)
        return forward

    def close(self) -> None:
        """End the generation: give the user's cache back as the user knows it."""
        if self._cache is None:
            return
        vars(self._cache).pop("reorder_cache", None)
        if self.branches is not None:
            self.branches.release(self._cache)
        self._cache = None

    # -- opening ------------------------------------------------------------------------------
    def _open(self, owner: nn.Module, kwargs: dict[str, Any]) -> Call:
        raw = kwargs if self.source.raw is None else self.source.raw
        given = raw.get("input_ids", raw.get("inputs", raw.get("inputs_embeds")))
        copies = n_rows(kwargs) // given.shape[0] if isinstance(given, Tensor) else 1
        positive = Stream("positive", self._layout(kwargs))
        call = Call(self.plan, positive, grids_among(raw), max(copies, 1), vision=self.vision)
        if self._earlier is not None:
            self._inherit(call.positive, self._earlier)
        has_image = call.positive.layout.has_image
        if has_image:
            for bound in self.plan.with_hook("prepare"):
                call.positive.prepared[bound.index] = self._prepare(call, owner, kwargs, bound)
        if self.plan.has_branches and has_image:
            self.branches = Branches(call, self.source, kwargs, self._past, self.backend)
            for stream in self.branches.streams():
                stream.prepared.update(call.positive.prepared)
        return call

    def _inherit(self, stream: Stream, earlier: Call) -> None:
        """Take over what an earlier generation learnt about the tokens in its cache."""
        is_same = _kept_for(earlier.plan) == _kept_for(self.plan)
        stream.inherit(earlier.positive, same_methods=is_same)

    def _layout(self, kwargs: dict[str, Any]) -> Layout:
        rows, length = n_rows(kwargs), n_tokens(kwargs)
        ids, mask = kwargs.get("input_ids"), mask_of(kwargs)
        raw = self.source.raw
        if raw is not None:
            given = raw.get("input_ids", raw.get("inputs"))
            if isinstance(given, Tensor) and given.shape[1] == self._past + length:
                ids = _repeat_to(given, rows)
                mask = mask if mask is not None else _repeat_to(raw.get("attention_mask"), rows)
        if ids is None or ids.shape[1] != self._past + length:
            raise UnsupportedModelError(
                f"cannot tell which of {self._past + length} positions are image tokens: token ids "
                f"for {0 if ids is None else ids.shape[1]} positions were passed. Pass the "
                "input_ids of the whole conversation, also when continuing a cache."
            )
        if mask is not None and mask.shape[1] != ids.shape[1]:
            mask = mask[:, -ids.shape[1] :]
        places = place_mask(kwargs if raw is None else raw)
        if places is not None and places.shape[1] == ids.shape[1]:
            is_image = _repeat_to(places, rows)
        else:
            is_image = is_image_token(ids, self.plan.model.image_token_ids)
        return Layout.from_image_mask(is_image, mask)

    def _next_turn(self, call: Call, kwargs: dict[str, Any]) -> Call:
        """A plain forward that puts several new tokens behind a cache: the prompt grows."""
        if self.branches is not None and pixel_names(kwargs):
            raise UnsupportedModelError(
                "a contrast cannot take a new image in the middle of a cache. Use generate() with "
                "the input_ids and pixel_values of the whole conversation."
            )
        before = call.positive.layout
        kinds = before.upto(self._past).clone()
        added = self._added(kwargs).prompt
        if before.has_image:
            kinds[kinds == Columns.GENERATED] = Columns.INSTRUCTION
            added = torch.where(added == Columns.SYSTEM, Columns.INSTRUCTION, added)
        else:
            kinds[kinds == Columns.GENERATED] = Columns.SYSTEM
        layout = Layout.from_kinds(torch.cat([kinds, added.to(kinds.dtype)], dim=1))
        stream = Stream("positive", layout)
        stream.inherit(call.positive)
        stream.prepared = call.positive.prepared
        stream.memo = dict(call.positive.memo)
        return Call(self.plan, stream, grids_among(kwargs))

    def _added(self, kwargs: dict[str, Any]) -> Layout:
        """Layout of the new tokens of a later turn."""
        is_image = place_mask(kwargs)
        if is_image is None:
            is_image = is_image_token(kwargs["input_ids"], self.plan.model.image_token_ids)
        return Layout.from_image_mask(is_image, None)

    def _prepare(self, call: Call, owner: nn.Module, kwargs: dict[str, Any], bound: Bound) -> Any:
        layers = tuple(sorted(bound.layers))
        columns = Columns(call.positive.layout.prompt)

        def run(seen_by: Probe | Forward, prompt: Mapping[str, Any]) -> None:
            token = ACTIVE.set(seen_by)
            try:
                with suppress(Enough), kept_module_state(self.source.model), torch.no_grad():
                    owner(**{**prompt, "use_cache": False, "past_key_values": None})
            finally:
                ACTIVE.reset(token)

        def head_outputs_without_image(layers: tuple[int, ...]) -> dict[int, Tensor]:
            probe = Probe(self.plan.model.sites, frozenset(layers))
            run(probe, without_image(self.source.whole_prompt(kwargs, self._past), columns.is_text))
            return probe.outputs

        def seen_by_encoder(layers: tuple[int, ...]) -> tuple[Tensor, ...]:
            with kept_module_state(self.source.model):
                return image_attention(self.source.model, self.source.given(kwargs), layers)

        def hidden_states(with_image: bool) -> Tensor:
            # All layers, since one that is skipped leaves the state of the layer before it.
            probe = Probe(taps=frozenset(self.plan.model.layers))
            prompt = self.source.whole_prompt(kwargs, self._past)
            run(probe, prompt if with_image else without_image(prompt, columns.is_text))
            return states_after(probe.states, layers)

        def tallies(method: Method) -> dict[int, Tensor]:
            stream = Stream("positive", call.positive.layout)
            other = Call(make_plan((method,), self.plan.model), stream)
            prompt = self.source.whole_prompt(kwargs, self._past)
            last = max(site.layer for site in other.plan.work)
            run(Forward(other, (stream,), 0, n_tokens(prompt), last), prompt)
            return {layer: tally for (_, layer), tally in stream.tallies.items()}

        grid = partial(grid_of, self.plan.model.geometry, columns.kinds, call.grids, call.copies)

        def pictures() -> tuple[tuple[Tensor, ...], ...]:
            given = self.source.given(kwargs)
            return pictures_by_row(given, grid(), call.copies, self.plan.processor)

        def questions() -> tuple[str, ...]:
            ids = self.source.token_ids(kwargs, columns.kinds.shape)
            return questions_in(ids, columns, self.plan.processor)

        def written(writing: Writing) -> Written:
            return write(self.source, bound, self.plan.model, kwargs, columns.kinds, writing)

        reference = Reference(
            head_outputs_without_image=head_outputs_without_image,
            image_attention=seen_by_encoder,
            on_image_tokens=partial(_on_image_tokens, columns),
            hidden_states=hidden_states,
            tallies=tallies,
            written=written,
            pictures=pictures,
            questions=questions,
            grid=grid,
            columns=columns,
            layers=layers,
            plan=bound.constants,
            first_ids=bound.first_ids,
        )
        return bound.method.prepare(reference)

    def _watch(self, cache: Any) -> None:
        """Follow beam reordering of the user's cache for as long as the generation runs."""
        if self.branches is None or cache is None:
            return
        branches, reorder = self.branches, type(cache).reorder_cache

        def reorder_cache(beams: Tensor) -> None:
            reorder(cache, branches.reorder(beams))

        cache.reorder_cache = reorder_cache
        self._cache = cache

    # -- closing ------------------------------------------------------------------------------
    def _record(self, forward: Forward) -> None:
        call = forward.call
        search = self.plan.search
        if search is not None:
            call.seen = forward.observed.pop(search.method.name, {})
        for name, layers in forward.observed.items():
            seen = [layers[layer] for layer in sorted(layers)]
            stacked = torch.stack([record.to(seen[0].device) for record in seen], dim=1)
            call.records.setdefault(name, []).append(stacked)

    def _with_logits(self, owner: nn.Module, output: Any) -> Any:
        call = self.call
        if call is None or not hasattr(output, "logits"):
            raise UnsupportedModelError(
                "a method acts on logits, but the model returned none. Call it with "
                "return_dict=True."
            )
        logits: Tensor = output.logits
        others: dict[str, Tensor] = {}
        if self.branches is not None:
            logits, others = self.branches.after(owner, self._mine, logits, self._past)
        streams = () if self.branches is None else self.branches.streams()
        steered = _combine(call, logits[:, -1], others, {s.name: s for s in streams})
        output.logits = (
            steered[:, None]
            if logits.shape[1] == 1
            else torch.cat([logits[:, :-1], steered[:, None]], dim=1)
        )
        return output


def _kept_for(plan: Plan) -> list[tuple[str, dict[int, tuple[int, ...]]]]:
    """For whom marks and tallies of a conversation are kept: methods and their own heads."""
    return [
        (
            bound.method.name,
            {
                i: heads
                for i in bound.layers
                if (heads := bound.method.own_heads(i, bound.constants))
            },
        )
        for bound in plan.bounds
    ]


def _combine(
    call: Call, logits: Tensor, others: Mapping[str, Tensor], streams: Mapping[str, Stream]
) -> Tensor:
    """Run the ``logits`` and ``plausible`` hooks on ``[batch, vocabulary]``, in order."""
    raw = logits.float()
    current, keep = raw, None
    for bound in call.plan.bounds:
        acts = bound.method.overrides("logits") or bound.method.overrides("plausible")
        if not acts or (bound.branches and not others):
            continue
        at = LogitsAt(
            raw=raw,
            branches={b.name: others[bound.branch_key(b)].float() for b in bound.branches},
            step=call.step,
            plan=bound.constants,
            prepared=call.positive.prepared.get(bound.index),
            tapped=_tapped(bound, call.positive, streams) if bound.taps else {},
            to_logits=bound.to_logits,
            first_ids=bound.first_ids,
        )
        new = bound.method.logits(current, at)
        kept = bound.method.plausible(at)
        if kept is not None:
            keep = kept if keep is None else keep & kept
        # At every step: a method may wait for a step at which the model is unsure.
        call.moved[bound.index] = _moved(call, bound, current, new, kept)
        current = new
    if keep is not None:
        left = raw.masked_fill(current == -torch.inf, -torch.inf)
        best = torch.zeros_like(keep).scatter_(1, left.argmax(dim=1, keepdim=True), True)
        current = current.masked_fill(~(keep | best), -torch.inf)
    return current.to(logits.dtype)


def _tapped(
    bound: Bound, positive: Stream, streams: Mapping[str, Stream]
) -> dict[str | None, Tensor]:
    """States of the layers that a method taps, ``[batch, taps, hidden]`` per stream of its own."""
    mine: dict[str | None, Stream] = {None: positive}
    mine |= {branch.name: streams[bound.branch_key(branch)] for branch in bound.branches}
    return {name: stream.tapped(bound.taps) for name, stream in mine.items()}


def _moved(call: Call, bound: Bound, before: Tensor, after: Tensor, kept: Tensor | None) -> Tensor:
    if kept is not None:
        after = after.masked_fill(~kept, torch.finfo(after.dtype).min)
    moved = (after.softmax(dim=-1) - before.softmax(dim=-1)).abs().sum(dim=-1).mean() / 2
    return call.moved.get(bound.index, torch.zeros_like(moved)) + moved


def _on_image_tokens(columns: Columns, values: Tensor) -> Tensor:
    """``[images, tokens]`` at the image tokens of a prompt, whose rows may be repeated as beams."""
    is_image = columns.is_image
    rows, found = is_image.shape[0], int(is_image.sum())
    copies = found // values.numel() if values.numel() else 0
    if copies == 0 or copies * values.numel() != found or rows % copies:
        raise UnsupportedModelError(
            f"the images passed make {values.numel()} image tokens, but the prompt holds {found}. "
            "Pass the pixel_values of all images, for a continued conversation those of all turns."
        )
    is_image = is_image[::copies]
    placed = values.new_zeros(is_image.shape, device=is_image.device)
    placed[is_image] = values.flatten().to(is_image.device)
    return placed.repeat_interleave(copies, dim=0)


def _repeat_to(tensor: Any, rows: int) -> Any:
    """Repeat rows as ``generate`` does for beams and several return sequences."""
    if not isinstance(tensor, Tensor) or tensor.shape[0] == rows:
        return tensor
    return tensor.repeat_interleave(rows // tensor.shape[0], dim=0)
