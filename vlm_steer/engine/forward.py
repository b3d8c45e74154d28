"""One forward pass: which methods act where in it, and the views that their hooks get."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from vlm_steer.engine.active import AttentionSite
from vlm_steer.engine.call import Call, Touch
from vlm_steer.engine.grid import grid_of
from vlm_steer.engine.hooks import At, Columns, Grid, PromptAt, Rows
from vlm_steer.engine.model import one_stream
from vlm_steer.engine.plan import Bound, Work
from vlm_steer.engine.streams import Stream
from vlm_steer.errors import UnsupportedModelError

Mask: TypeAlias = Tensor | BlockMask

__all__ = ["Acting", "EditedMask", "Forward", "Mask", "dense_rows", "extended", "fit"]


@dataclass(frozen=True, slots=True)
class Acting:
    """Methods with the streams they act on, at one attention site in one kind of pass.

    Attributes:
        replaces_rows: Every query row of the pass is rewritten, or looked at to be rewritten, by
            some method.
    """

    scores: tuple[tuple[Bound, Stream], ...]
    tally: tuple[tuple[Bound, Stream], ...]
    weights: tuple[tuple[Bound, Stream], ...]
    look: tuple[tuple[Bound, Stream], ...]
    choose: tuple[tuple[Bound, Stream], ...]
    observe: tuple[tuple[Bound, Stream], ...]
    replaces_rows: bool


class EditedMask(NamedTuple):
    """What the ``mask`` hooks made of an attention mask.

    Attributes:
        given: The model's own; holding it keeps its id its own.
        mask: The one to use.
        is_blind: ``[batch, rows]`` rows of cross-attention for which every column was closed;
            ``None`` in self-attention.
    """

    given: Mask | None
    mask: Mask | None
    is_blind: Tensor | None = None


@dataclass(eq=False)
class Forward:
    """One forward pass of the decoder under a call.

    Attributes:
        call: The generation it belongs to.
        streams: Streams in this pass, each with its rows of the batch.
        past: Positions already in the cache.
        length: Query rows of this pass.
        last: Layer after whose tally the pass ends, for one that is run for tallies alone.
    """

    call: Call
    streams: tuple[Stream, ...]
    past: int
    length: int
    last: int | None = None
    observed: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    _columns: dict[tuple[str, int, int, str, torch.device], Columns] = field(default_factory=dict)
    _row_kinds: dict[tuple[str, int, int, torch.device], Tensor] = field(default_factory=dict)
    _closed: dict[tuple[int, int, int], tuple[Mask, Tensor]] = field(default_factory=dict)
    _is_row: dict[tuple[str, Rows, int, int, torch.device], Tensor] = field(default_factory=dict)
    _carried: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    _positions: dict[str, Tensor] = field(default_factory=dict)
    _shared: dict[tuple[object, ...], dict[str, Any]] = field(default_factory=dict)
    masks: dict[tuple[object, ...], "EditedMask"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stream in self.streams:
            stream.taps.clear()

    @property
    def total(self) -> int:
        """Positions seen once this pass is done."""
        return self.past + self.length

    @property
    def prompt_rows(self) -> int:
        """How many of the query rows, the first ones, belong to the prompt."""
        return min(max(self.streams[0].layout.prompt_length - self.past, 0), self.length)

    @property
    def is_decoding(self) -> bool:
        """Whether every query row is a generated token."""
        return self.past >= self.streams[0].layout.prompt_length

    @property
    def sites(self) -> dict[nn.Module, AttentionSite]:
        """Attention modules of the model."""
        return self.call.plan.model.sites

    def work(self, site: AttentionSite) -> Work | None:
        """What to do at an attention site."""
        return self.call.plan.work.get(site)

    def acting(self, hook: str, bounds: Iterable[Bound]) -> list[tuple[Bound, Stream]]:
        """Methods with the streams of this pass that one of their hooks acts on."""
        return [(b, stream) for b in bounds for stream in self.streams if stream.in_scope(b, hook)]

    def acting_at(self, work: Work) -> Acting:
        """Who acts at an attention site; worked out once per generation for decoding steps."""
        if not self.is_decoding:
            return self._acting_at(work)
        known = self.call.acting_when_decoding
        key = (id(work), self.streams[0].name)
        if key not in known:
            known[key] = self._acting_at(work)
        return known[key]

    def _acting_at(self, work: Work) -> Acting:
        scores, weights = self.acting("scores", work.scores), self.acting("weights", work.weights)
        look = self.acting("look", work.look)
        choose = [
            (bound, stream)
            for bound, stream in self.acting("choose", work.choose)
            if self.call.step == 0 or not bound.method.chooses_once
        ]
        return Acting(
            scores=tuple(scores),
            tally=tuple(self.acting("tally", work.tally)),
            weights=tuple(weights),
            look=tuple(look),
            choose=tuple(choose),
            observe=tuple(self.acting("observe", work.observe)),
            replaces_rows=any(
                self.every_row_changes(b.method.rows, stream)
                for b, stream in scores + weights + look
            ),
        )

    def closed(self, mask: Mask, start: int, stop: int, n_keys: int) -> Tensor:
        """The part of an attention mask for a block of rows; layers share masks and results.

        Returns:
            ``[batch, 1, rows, key]`` bool, ``True`` where closed, or an additive float32 mask.
        """
        key = (id(mask), start, stop)
        if key not in self._closed:
            if isinstance(mask, BlockMask):
                block = dense_rows(mask, start, stop, n_keys)
            else:
                block = mask[:, :, start:stop, :n_keys]
            block = ~block if block.dtype == torch.bool else _in_float32(block)
            self._closed[key] = (mask, block)  # holding the mask keeps its id its own
        return self._closed[key][1]

    def first_row(self, acting: Iterable[tuple[Bound, Stream]]) -> int:
        """First query row that any of the methods may touch; ``length`` when none may."""
        starts = [self._start(bound.method.rows, stream) for bound, stream in acting]
        return min(starts, default=self.length)

    def _start(self, rows: Rows, stream: Stream) -> int:
        layout = stream.layout
        if rows == "last":
            first = layout.prompt_length - 1
        elif rows == "after_image":
            first = layout.first_after_image
        elif rows == "image" and (self.is_decoding or not layout.has_image):
            return self.length
        else:
            first = 0
        return min(max(first - self.past, 0), self.length)

    def columns(
        self,
        stream: Stream,
        n_keys: int,
        axis: Literal["self", "cross"],
        device: torch.device,
        total: int | None = None,
    ) -> Columns:
        """Key columns of a layer for one stream, on the device of that layer.

        Args:
            stream: The stream.
            n_keys: How many.
            axis: What their keys are.
            device: Where the layer is.
            total: Positions up to which they go, if not all.
        """
        total = self.total if total is None else total
        key = (stream.name, n_keys, total, axis, device)
        if key not in self._columns:
            if axis == "cross":
                rows = stream.layout.kinds.shape[0]
                kinds = stream.layout.kinds.new_full((rows, n_keys), Columns.IMAGE)
            else:
                kinds = stream.layout.keys(n_keys, total)
            self._columns[key] = Columns(kinds.to(device), axis)
        return self._columns[key]

    def is_row(
        self, stream: Stream, policy: Rows, start: int, stop: int, device: torch.device
    ) -> Tensor:
        """``[batch, rows]``: which of the rows ``start:stop`` a row policy allows to change."""
        key = (stream.name, policy, start, stop, device)
        if key not in self._is_row:
            self._is_row[key] = self._rows_allowed(stream, policy, start, stop, device)
        return self._is_row[key]

    def _rows_allowed(
        self, stream: Stream, policy: Rows, start: int, stop: int, device: torch.device
    ) -> Tensor:
        kinds = self.row_kinds(stream, start, stop, device)
        if policy == "all":
            return kinds != Columns.PADDING
        if policy == "image":
            return kinds == Columns.IMAGE
        if policy == "text":
            return (kinds != Columns.PADDING) & (kinds != Columns.IMAGE)
        if policy == "after_image":
            return kinds >= Columns.INSTRUCTION
        position = torch.arange(self.past + start, self.past + stop, device=kinds.device)
        return (position >= stream.layout.prompt_length - 1).expand(kinds.shape)

    def row_kinds(self, stream: Stream, start: int, stop: int, device: torch.device) -> Tensor:
        """``[batch, rows]`` kinds of the query rows ``start:stop``."""
        key = (stream.name, start, stop, device)
        if key not in self._row_kinds:
            kinds = stream.layout.upto(self.total)
            kinds = kinds[:, self.past + start : self.past + stop]
            self._row_kinds[key] = kinds.to(device)
        return self._row_kinds[key]

    def every_row_changes(self, policy: Rows, stream: Stream) -> bool:
        """Whether all rows of this pass are known to be open to change without looking."""
        if self.is_decoding:
            return policy != "image"
        return policy == "all" and not stream.layout.has_padding

    def at(
        self,
        bound: Bound,
        stream: Stream,
        layer: int,
        rows: tuple[int, int],
        columns: Columns,
        *,
        total: int | None = None,
        **more: Any,
    ) -> At:
        """The view for one hook call.

        Args:
            bound: The method.
            stream: The stream.
            layer: The layer.
            rows: First query row, and the one after the last.
            columns: The key columns.
            total: Positions up to which the columns go, if not all.
            **more: Further fields of the view.
        """
        total = self.total if total is None else total

        def once(name: str, make: Callable[[], Tensor]) -> Tensor:
            key = (bound.index, layer, name)
            if key not in stream.memo:
                stream.memo[key] = make()
            return stream.memo[key]

        marks = stream.marks.get((bound.index, layer))
        if marks is not None:
            marks = fit(marks, columns.kinds.shape[1], total)
        key = (bound.index, stream.name, rows, id(columns), total)
        if key not in self._shared:
            self._shared[key] = self._shared_by_layers(bound, stream, rows, columns, total)
        return At(
            layer=layer,
            marks=marks,
            chosen=self._chosen(bound, stream, columns.kinds.shape[1], total),
            once=once,
            tally=stream.tallies.get((bound.index, layer)),
            carried=self._carried.get((bound.index, stream.name)),
            **self._shared[key],
            **more,
        )

    def _shared_by_layers(
        self, bound: Bound, stream: Stream, rows: tuple[int, int], columns: Columns, total: int
    ) -> dict[str, Any]:
        """The fields of a view that are the same in every layer of this pass."""
        device = columns.kinds.device
        return {
            "n_layers": self.call.plan.model.n_layers,
            "step": self.call.step,
            "columns": columns,
            "is_row": self.is_row(stream, bound.method.rows, *rows, device),
            "row_kinds": self.row_kinds(stream, *rows, device),
            "plan": bound.constants,
            "prepared": stream.prepared.get(bound.index),
            "prompt": self._prompt(stream, device),
            "grid": self.grid(bound, stream),
            "on_rows": partial(self._on_rows, rows),
            "on_keys": partial(fit, n_keys=columns.kinds.shape[1], total=total),
            "is_own": partial(self._is_own, rows, columns, total),
            "to_logits": bound.to_logits,
            "prompt_rows": min(max(self.prompt_rows, rows[0]), rows[1]) - rows[0],
            "image_features": self._image_features(bound, stream, device),
        }

    def keep_chosen(self, bound: Bound, stream: Stream, layer: int, chosen: Tensor) -> None:
        """Remember ``[batch, ..., key]`` of a layer's ``choose`` hook, on the axis of positions."""
        missing = self.total - chosen.shape[-1]
        chosen = torch.nn.functional.pad(chosen, (max(missing, 0), 0))[..., : self.total]
        stream.chosen[bound.index, layer] = chosen

    def _chosen(self, bound: Bound, stream: Stream, n_keys: int, total: int) -> dict[int, Tensor]:
        return {
            layer: fit(chosen, n_keys or total, total)
            for (index, layer), chosen in stream.chosen.items()
            if index == bound.index
        }

    def _prompt(self, stream: Stream, device: torch.device) -> Columns:
        key = (stream.name, -1, -1, "prompt", device)
        if key not in self._columns:
            self._columns[key] = Columns(stream.layout.prompt.to(device))
        return self._columns[key]

    def _on_rows(self, rows: tuple[int, int], values: Tensor) -> Tensor:
        missing = max(self.total - values.shape[1], 0)
        values = torch.nn.functional.pad(values, (0, missing))
        return values[:, self.past + rows[0] : self.past + rows[1]]

    def _is_own(self, rows: tuple[int, int], columns: Columns, total: int) -> Tensor:
        n_keys, device = columns.kinds.shape[1], columns.kinds.device
        # A sliding window holds the last columns, a static cache has empty ones behind.
        first = self.past + rows[0] - max(total - n_keys, 0)
        row = torch.arange(first, first + rows[1] - rows[0], device=device)[:, None]
        if columns.axis == "cross":
            return torch.zeros((row.shape[0], n_keys), dtype=torch.bool, device=device)
        return torch.arange(n_keys, device=device)[None, :] == row

    def grid(self, bound: Bound, stream: Stream) -> Grid | None:
        """Where the image tokens of a stream's prompt lie, for methods that ask for it."""
        if not bound.method.needs_grid:
            return None
        if stream.grid is None:
            call = self.call
            stream.grid = grid_of(
                call.plan.model.geometry, stream.layout.prompt, call.grids, call.copies
            )
        return stream.grid

    def moved(self, kwargs: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
        """Arguments of the decoder with the position ids that methods ask for.

        Args:
            kwargs: The decoder's arguments.
            tokens: ``[batch, rows, ...]``, the argument that carries the tokens.
        """
        rows, length = tokens.shape[:2]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(self.past, self.past + length, device=tokens.device)[None]
        positions = positions.expand(rows, length).clone()
        for stream in self.streams:
            shift = self._shift(stream).to(positions.device)
            positions[stream.batch] += extended(shift, self.total)[:, self.past :]
        moved = {**kwargs, "position_ids": positions}
        if kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None:
            # Without either, positions that do not count up would be read as packed sequences.
            moved["attention_mask"] = torch.ones(
                (rows, length), dtype=torch.long, device=tokens.device
            )
        return moved

    def _shift(self, stream: Stream) -> Tensor:
        """``[batch, prompt]``: what methods add to the position of each token of the prompt."""
        if stream.shift is None:
            columns = Columns(stream.layout.prompt)
            is_token = ~columns.is_padding
            counted = (is_token.long().cumsum(dim=1) - 1).clamp(min=0)
            positions = counted
            for bound in self.call.plan.positions:
                if not stream.in_scope(bound, "positions"):
                    continue
                at = PromptAt(columns, self.grid(bound, stream), bound.constants)
                new = bound.method.positions(positions, at)
                for layer in bound.layers:
                    self.touch(bound, layer, Touch.of_rows(positions[..., None], new[..., None]))
                positions = new
            stream.shift = torch.where(is_token, positions - counted, 0)
            self._check_cache(stream, stream.shift)
        return stream.shift

    def _check_cache(self, stream: Stream, shift: Tensor) -> None:
        """Refuse to move tokens whose keys are in the cache already."""
        if self.past == 0:
            return
        before = shift.new_zeros(shift.shape[0], 1)
        if stream.shift_in_cache is not None:
            before = stream.shift_in_cache.to(shift.device)
        moved = extended(before, self.past) != extended(shift, self.past)
        if bool((moved & (stream.layout.upto(self.past) != Columns.PADDING)).any()):
            names = ", ".join(bound.method.name for bound in self.call.plan.positions)
            raise UnsupportedModelError(
                f"{names} would move tokens that are in the cache already, filled under other "
                "positions. Start the conversation anew, without past_key_values."
            )

    def positions(self, stream: Stream) -> Tensor:
        """``[batch, total]`` positions, up to one constant per row."""
        if stream.name not in self._positions:
            is_token = stream.layout.upto(self.total) != Columns.PADDING
            counted = (is_token.long().cumsum(dim=1) - 1).clamp(min=0)
            shift = self._shift(stream).to(counted.device)
            self._positions[stream.name] = counted + extended(shift, self.total)
        return self._positions[stream.name]

    def touch(self, bound: Bound, layer: int, amount: Tensor) -> None:
        """Add to the account of what a method changed."""
        touches = self.call.touches
        key = (bound.index, layer)
        if key in touches:
            rows, heads, mass = touches[key]
            amount = torch.stack(
                [rows + amount[0], torch.maximum(heads, amount[1]), mass + amount[2]]
            )
        touches[key] = amount

    def mark(self, layer: int, hidden: Tensor) -> None:
        """Let methods mark positions from a layer's input ``[batch, rows, hidden]``."""
        if self.is_decoding:
            return
        hidden = one_stream(hidden)
        for bound, stream in self.acting("marks", self.call.plan.marks.get(layer, ())):
            columns = self.no_columns(stream, hidden.device)
            at = self.at(bound, stream, layer, (0, self.length), columns)
            is_prompt = at.row_kinds
            is_prompt = (is_prompt != Columns.PADDING) & (is_prompt != Columns.GENERATED)
            new = bound.method.marks(hidden[stream.batch], at) & is_prompt
            old = stream.marks.get((bound.index, layer), new[:, :0])
            if old.shape[1] < self.past:
                old = torch.nn.functional.pad(old, (0, self.past - old.shape[1]))
            stream.marks[bound.index, layer] = torch.cat([old[:, : self.past], new], dim=1)

    def add_tally(self, bound: Bound, stream: Stream, layer: int, tally: Tensor) -> None:
        """Add a sum over rows ``[batch, ..., key]`` to that of the rows before this pass."""
        missing = max(self.total - tally.shape[-1], 0)  # columns that a window has dropped
        tally = torch.nn.functional.pad(tally, (missing, 0))[..., : self.total]
        if self.past > 0 and (old := stream.tallies.get((bound.index, layer))) is not None:
            grown = [new - had for new, had in zip(tally.shape, old.shape, strict=True)]
            padding = [n for axis in reversed(grown) for n in (0, axis)]
            tally = tally + torch.nn.functional.pad(old, padding)
        stream.tallies[bound.index, layer] = tally[..., : stream.layout.prompt_length]

    def tap(self, layer: int, hidden: Tensor) -> None:
        """Keep the last row of a layer's output ``[batch, rows, hidden]`` for every stream."""
        if layer in self.call.plan.taps:
            for stream in self.streams:
                # A copy: a view would keep the whole prompt's states alive.
                stream.taps[layer] = one_stream(hidden)[stream.batch, -1].clone()

    def carry(self, layer: int, hidden: Tensor) -> None:
        """Let methods hand on a state, given a layer's input ``[batch, rows, hidden]``."""
        hidden = one_stream(hidden)
        for bound, stream in self.acting("carry", self.call.plan.carry.get(layer, ())):
            key = (bound.index, stream.name)
            before = self._carried.get(key)
            if before is not None:
                before = before.to(hidden.device)
            columns = self.no_columns(stream, hidden.device)
            at = self.at(bound, stream, layer, (0, self.length), columns)
            self._carried[key] = bound.method.carry(hidden[stream.batch], before, at)

    def see_images(self, embeds: Tensor | None) -> None:
        """Keep the image tokens among the decoder's inputs ``[batch, rows, hidden]``."""
        if self.is_decoding:
            return
        for stream in self.streams:
            new = None
            if embeds is not None:
                is_image = Columns(stream.layout.prompt[:, self.past :]).is_image
                new = _packed(embeds[stream.batch], is_image.to(embeds.device))
            old = stream.image_features if self.past > 0 else None
            if old is None and bool(Columns(stream.layout.prompt[:, : self.past]).is_image.any()):
                raise UnsupportedModelError(
                    "a method needs the image's embeddings, but this generation continues a cache "
                    "that holds the image and was not filled under this steering. Start the "
                    "conversation under steering, or generate from the whole prompt."
                )
            parts = [part for part in (old, new) if part is not None and part.shape[1] > 0]
            stream.image_features = torch.cat(parts, dim=1) if parts else None

    def _image_features(self, bound: Bound, stream: Stream, device: torch.device) -> Tensor | None:
        if not bound.method.needs_image_features or stream.image_features is None:
            return None
        return stream.image_features.to(device)

    def edit(
        self,
        hook: Literal["hidden", "mlp", "embeds"],
        layer: int,
        bounds: Iterable[Bound],
        tensor: Tensor,
        given: Tensor | None = None,
    ) -> Tensor:
        """Apply ``hidden``, ``mlp`` or ``embeds`` hooks to ``[batch, rows, hidden]``.

        Some MLPs flatten batch and rows, and some residuals run in several streams,
        ``[batch, rows, n, hidden]``, which are edited one by one.

        Args:
            hook: Which.
            layer: Of which layer.
            bounds: The methods that have it there.
            tensor: Output of the layer or of its MLP.
            given: What the MLP was given.
        """
        if tensor.ndim == 2:
            flat = tensor.shape
            tensor = tensor.reshape(-1, self.length, flat[-1])
            if given is not None:
                given = given.reshape(*tensor.shape[:2], -1)
            return self.edit(hook, layer, bounds, tensor, given).reshape(flat)
        if tensor.ndim == 4:
            parts = [self.edit(hook, layer, bounds, part, given) for part in tensor.unbind(dim=2)]
            return torch.stack(parts, dim=2)
        for bound, stream in self.acting(hook, bounds):
            start = self.first_row([(bound, stream)])
            if start == self.length:
                continue
            columns = self.no_columns(stream, tensor.device)
            at = self.at(bound, stream, layer, (start, self.length), columns)
            if given is not None:
                at = replace(at, mlp_input=given[stream.batch, start:])
            old = tensor[stream.batch, start:]
            new = getattr(bound.method, hook)(old, at).to(tensor.dtype)
            if not self.every_row_changes(bound.method.rows, stream):
                new = torch.where(at.is_row[:, :, None], new, old)
            if self.call.is_measured:
                self.touch(bound, layer, Touch.of_rows(old, new))
            if new.shape == tensor.shape:
                tensor = new
            else:
                tensor = tensor.clone()
                tensor[stream.batch, start:] = new
        return tensor

    def no_columns(self, stream: Stream, device: torch.device) -> Columns:
        """Columns for hooks that do not look at keys."""
        return self.columns(stream, 0, "self", device)


def _in_float32(mask: Tensor) -> Tensor:
    """An additive mask whose closed columns are the most negative number of float32, too."""
    is_closed = mask <= torch.finfo(mask.dtype).min / 2
    return mask.float().masked_fill(is_closed, torch.finfo(torch.float32).min)


def extended(shift: Tensor, total: int) -> Tensor:
    """``[batch, total]``: a shift of prompt tokens, that of the last one for all after it."""
    missing = max(total - shift.shape[1], 0)
    return torch.cat([shift, shift[:, -1:].expand(-1, missing)], dim=1)[:, :total]


def dense_rows(mask: BlockMask, start: int, stop: int, n_keys: int) -> Tensor:
    """Some rows of a block mask, ``[batch, 1, rows, key]`` bool."""

    def shifted(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return mask.mask_mod(batch, head, row + start, column)

    device = str(mask.kv_num_blocks.device)
    return create_mask(shifted, mask.shape[0], 1, stop - start, n_keys, device=device)


def _packed(embeds: Tensor, chosen: Tensor) -> Tensor:
    """The chosen tokens of ``[batch, rows, hidden]``, moved to the front and padded with zeros."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    order = order[:, : int(chosen.sum(dim=1).max())]
    packed = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
    return packed.masked_fill(~chosen.gather(1, order)[..., None], 0)


def fit(values: Tensor, n_keys: int, total: int) -> Tensor:
    """Values ``[batch, ..., positions]`` on the key axis of a layer; zero at later positions."""
    missing = max(total, n_keys) - values.shape[-1]
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, missing))
    return values[..., total - n_keys : total] if n_keys <= total else values[..., :n_keys]
