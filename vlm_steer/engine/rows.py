"""Attention rows computed again, in blocks, for the methods that steer them or look at them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_steer.engine.call import Touch
from vlm_steer.engine.forward import Forward, Mask, fit
from vlm_steer.engine.hooks import At
from vlm_steer.engine.model import KNOWN_SCORE_OPTIONS, eager_function
from vlm_steer.engine.plan import Bound, Work
from vlm_steer.engine.rotary import Rotation
from vlm_steer.engine.streams import Stream
from vlm_steer.errors import UnsupportedModelError
from vlm_steer.functional.fast import row_scores, weighted_values

__all__ = ["Rows", "Seen", "put"]

_BLOCK = 64
_PER_HEAD = ("s_aux", "sinks", "position_bias")


class Seen:
    """What the ``look`` hooks of one attention call returned, block of rows by block of rows."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, str], list[Tensor]] = {}

    def add(self, bound: Bound, stream: Stream, block: Tensor) -> None:
        """Keep ``[batch, rows, ...]`` of the next block of rows."""
        self._blocks.setdefault((bound.index, stream.name), []).append(block)

    def by(self, bound: Bound, stream: Stream) -> Tensor | None:
        """``[batch, rows, ...]`` of all rows that the method acts on."""
        blocks = self._blocks.get((bound.index, stream.name))
        return None if blocks is None else torch.cat(blocks, dim=1)


class Rows:
    """Recomputes the rows of one attention call that methods steer or look at."""

    def __init__(
        self,
        forward: Forward,
        work: Work,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Mask | None,
        options: dict[str, Any],
    ):
        _refuse_unknown(options, module)
        # A single row takes less time for all heads than the kernel's pass and some heads again.
        self.heads = _own_heads(work, options) if query.shape[2] > 1 else None
        self.block = _BLOCK
        if self.heads is not None:
            self.block = _BLOCK * query.shape[1] // len(self.heads)
            of_keys = [head * key.shape[1] // query.shape[1] for head in self.heads]
            query, key, value = query[:, self.heads], key[:, of_keys], value[:, of_keys]
        self.forward, self.work = forward, work
        self.query, self.key, self.value = query, key, value
        self.attention_mask, self.options = attention_mask, options
        scaling = options.get("scaling")
        self.scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.layer, self.axis = work.site.layer, work.site.axis
        self.n_keys = key.shape[2]
        self.acting = forward.acting_at(work)
        self.seen = Seen()
        self._unplaced_keys: dict[str, Tensor] = {}
        # Who returns something per column for every row gets all columns with every row.
        takes_all = self.acting.look or any(b.method.observes_rows for b, _ in self.acting.observe)
        self._is_causal = attention_mask is None and self.axis == "self" and not takes_all

    @property
    def are_all_replaced(self) -> bool:
        """Whether the rows steered are all there is, so that the kernel's pass can be skipped."""
        return self.acting.replaces_rows and self.heads is None

    def recomputed(self) -> Tensor:
        """``[batch, rows, heads, value_dim]`` of a pass in which every row is steered."""
        length, blocks = self.query.shape[2], []
        for start in range(0, length, self.block):
            rows = (start, min(start + self.block, length))
            weights = self._weights(*rows)
            self._observe_rows(weights, rows)
            blocks.append(self._outputs(weights))
        self._observe(weights[:, :, -1])
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def steer(self, outputs: Tensor) -> None:
        """Write the steered rows into ``outputs`` ``[batch, rows, heads, value_dim]``."""
        length = self.query.shape[2]
        writers = self.acting.scores + self.acting.weights
        watching = tuple((b, s) for b, s in self.acting.observe if b.method.observes_rows)
        first = self.forward.first_row(writers + self.acting.look + watching)
        for start in range(first, length, self.block):
            rows = (start, min(start + self.block, length))
            weights = self._weights(*rows)
            self._observe_rows(weights, rows)
            if writers:
                is_changed = self._is_changed(rows)[:, :, None, None]
                heads = slice(None) if self.heads is None else self.heads
                block = outputs[:, slice(*rows)]
                # Under autocast the kernel's outputs are narrower than the queries.
                new = self._outputs(weights).to(outputs.dtype)
                block[:, :, heads] = torch.where(is_changed, new, block[:, :, heads])
            if rows[1] == length:
                self._observe(weights[:, :, -1])
        if first == length and (self.acting.observe or self.acting.choose):
            self._observe(self._weights(length - 1, length)[:, :, -1])

    def _outputs(self, weights: Tensor) -> Tensor:
        """``[batch, rows, heads, value_dim]`` in the model's dtype."""
        value = self.value[:, :, : weights.shape[-1]]
        outputs = weighted_values(weights.to(value.dtype), value)
        return outputs.transpose(1, 2).to(self.query.dtype)

    def tally(self) -> None:
        """Let methods sum over the attention of the prompt's rows before any of it is changed."""
        if not self.acting.tally:
            return
        totals: dict[tuple[Bound, Stream], Tensor] = {}
        before, stop = None, self.forward.prompt_rows
        # One row more, so that the first one that counts has a row before it.
        first = max(self.forward.first_row(self.acting.tally) - 1, 0)
        for start in range(first, stop, self.block):
            rows = (start, min(start + self.block, stop))
            closed = self._closed(*rows)
            scores = self._hooked_scores(*rows, closed, tallies=True)
            weights = self._softmax(scores, closed, slice(None), rows)
            if self._has_sink:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            before = torch.zeros_like(weights[:, :, :1]) if before is None else before
            before = _padded(before, weights.shape[-1])
            for bound, stream in self.acting.tally:
                at = self._at(bound, stream, rows, row_before=before[stream.batch])
                part = _padded(bound.method.tally(weights[stream.batch], at), self.n_keys)
                known = totals.get((bound, stream))
                totals[bound, stream] = part if known is None else known + part
            before = weights[:, :, -1:]
        for (bound, stream), total in totals.items():
            self.forward.add_tally(bound, stream, self.layer, total)

    def _hooked_scores(
        self, start: int, stop: int, closed: Tensor | None, *, tallies: bool = False
    ) -> Tensor:
        """``[batch, heads, rows, key]`` float32 scores after their hooks, before the mask.

        While a tally is being made, hooks find none: not that of an earlier pass either.
        """
        rows = (start, stop)
        n_keys = self._n_seen(stop)
        scores = self._scores(self.query[:, :, start:stop], self.key[:, :, :n_keys])
        if (bias := self.options.get("position_bias")) is not None:
            scores = scores + bias[:, :, start:stop, :n_keys].float()
        for bound, stream in self.acting.scores:
            old = scores[stream.batch]
            at = self._scores_at(bound, stream, rows, closed)
            at = replace(at, tally=None) if tallies else at
            new = self._keep_other_rows(bound, stream, rows, old, bound.method.scores(old, at))
            if self.forward.call.is_measured and not tallies:
                before, after = (self._softmax(s, closed, stream.batch, rows) for s in (old, new))
                self.forward.touch(bound, self.layer, Touch.of_weights(before, after))
            scores = put(scores, stream.batch, new)
        return scores

    def _weights(self, start: int, stop: int) -> Tensor:
        """``[batch, heads, rows, key]`` float32 attention weights after every hook."""
        rows = (start, stop)
        closed = self._closed(start, stop)
        measured = self.forward.call.is_measured
        scores = self._hooked_scores(start, stop, closed)
        weights = self._softmax(scores, closed, slice(None), rows)
        # What a sink that is no token takes stays out of the hooks' reach: their rows sum to 1.
        has_sink = bool(self.acting.weights) and self._has_sink
        mass = weights.sum(dim=-1, keepdim=True) if has_sink else None
        weights = weights if mass is None else weights / mass
        for bound, stream in self.acting.weights:
            old = weights[stream.batch]
            new = self._keep_other_rows(
                bound, stream, rows, old, bound.method.weights(old, self._at(bound, stream, rows))
            )
            if measured:
                self.forward.touch(bound, self.layer, Touch.of_weights(old, new))
            weights = put(weights, stream.batch, new)
        weights = weights if mass is None else weights * mass
        if self.acting.look:
            self._look(self._masked(scores, closed, slice(None)), weights, rows)
        return weights

    def _look(self, scores: Tensor, weights: Tensor, rows: tuple[int, int]) -> None:
        """Show ``[batch, heads, rows, key]`` of a block of rows to the ``look`` hooks."""
        for bound, stream in self.acting.look:
            start = max(rows[0], self.forward.first_row([(bound, stream)]))
            if start < rows[1]:
                at = self._at(bound, stream, (start, rows[1]))
                block = (stream.batch, slice(None), slice(start - rows[0], None))
                self.seen.add(bound, stream, bound.method.look(scores[block], weights[block], at))

    def _closed(self, start: int, stop: int) -> Tensor | None:
        """What stops rows from seeing columns: bool (``True`` is closed), additive, or nothing."""
        mask = self.attention_mask
        if mask is not None:
            return self.forward.closed(mask, start, stop, self.n_keys)
        if self.query.shape[2] == 1 or self.axis == "cross":
            return None
        offset = self.n_keys - self.query.shape[2]
        row = torch.arange(start, stop, device=self.query.device)[:, None] + offset
        return torch.arange(self._n_seen(stop), device=self.query.device)[None, :] > row

    def _n_seen(self, stop: int) -> int:
        """How many of the key columns come before a row, which are all it can see of them."""
        return self.n_keys - (self.query.shape[2] - stop) if self._is_causal else self.n_keys

    def _masked(self, scores: Tensor, closed: Tensor | None, batch: slice) -> Tensor:
        if closed is None:
            return scores
        if closed.ndim == 4 and closed.shape[0] > 1:
            closed = closed[batch]
        if closed.dtype == torch.bool:
            return scores.masked_fill(closed, torch.finfo(scores.dtype).min)
        return scores + closed

    def _softmax(
        self, scores: Tensor, closed: Tensor | None, batch: slice, rows: tuple[int, int]
    ) -> Tensor:
        scores = self._masked(scores, closed, batch)
        extra = self._sink_scores(batch, rows)
        if extra is None:
            return scores.softmax(dim=-1)
        extra = extra.float().expand(*scores.shape[:3], 1)
        return torch.cat([scores, extra], dim=-1).softmax(dim=-1)[..., :-1]

    @property
    def _has_sink(self) -> bool:
        return any(self.options.get(name) is not None for name in ("s_aux", "sinks"))

    def _sink_scores(self, batch: slice, rows: tuple[int, int]) -> Tensor | None:
        """Scores of an attention sink that is no token: per head, or per row and head."""
        if (per_head := self.options.get("s_aux")) is not None:
            return per_head.reshape(1, -1, 1, 1)  # type: ignore[no-any-return]
        per_row = self.options.get("sinks")
        return None if per_row is None else per_row[batch, :, slice(*rows)]

    def _at(self, bound: Bound, stream: Stream, rows: tuple[int, int], **more: Any) -> At:
        n_keys = self._n_seen(rows[1])
        total = self.forward.total - (self.n_keys - n_keys)
        columns = self.forward.columns(stream, n_keys, self.axis, self.query.device, total)
        return self.forward.at(bound, stream, self.layer, rows, columns, total=total, **more)

    def _scores_at(
        self, bound: Bound, stream: Stream, rows: tuple[int, int], closed: Tensor | None
    ) -> At:
        """The view of a ``scores`` hook."""
        softmax = partial(self._softmax, closed=closed, batch=stream.batch, rows=rows)
        if bound.rotation is None:
            return self._at(bound, stream, rows, softmax=softmax)
        return self._at(
            bound,
            stream,
            rows,
            softmax=softmax,
            unplaced=partial(self._unplaced, bound.rotation, stream, rows),
            placed=partial(self._placed, bound.rotation, stream, rows),
            sum_over_rows=partial(self._sum_over_rows, bound, stream),
        )

    def _placed(
        self, rotation: Rotation, stream: Stream, rows: tuple[int, int], shift: Tensor
    ) -> Tensor:
        """``[batch, heads, rows, key]`` scores of rows that stand further right."""
        query = self.query[stream.batch, :, slice(*rows)]
        key = self.key[stream.batch, :, : self._n_seen(rows[1])]
        return self._scores(rotation.turn(self.layer, query, shift), key)

    def _unplaced(self, rotation: Rotation, stream: Stream, rows: tuple[int, int]) -> Tensor:
        """``[batch, heads, rows, key]`` scores of tokens that all stand at one position."""
        forward = self.forward
        positions = forward.positions(stream).to(self.query.device)
        here = positions[:, forward.past + rows[0] : forward.past + rows[1]]
        query = self.query[stream.batch, :, slice(*rows)]
        query = rotation.turn(self.layer, query, -here[:, None])
        if stream.name not in self._unplaced_keys:
            there = fit(positions, self.n_keys, forward.total)
            key = rotation.turn(self.layer, self.key[stream.batch], -there[:, None])
            self._unplaced_keys[stream.name] = key
        return self._scores(query, self._unplaced_keys[stream.name][:, :, : self._n_seen(rows[1])])

    def _sum_over_rows(self, bound: Bound, stream: Stream, f: Callable[[At], Tensor]) -> Tensor:
        length = self.query.shape[2]
        blocks = ((s, min(s + self.block, length)) for s in range(0, length, self.block))
        return torch.stack(
            [f(self._scores_at(bound, stream, rows, self._closed(*rows))) for rows in blocks]
        ).sum(dim=0)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        scores = row_scores(query, key, scale=self.scale)
        cap = self.options.get("softcap")
        return scores if cap is None else torch.tanh(scores / cap) * cap

    def _keep_other_rows(
        self, bound: Bound, stream: Stream, rows: tuple[int, int], old: Tensor, new: Tensor
    ) -> Tensor:
        if self.forward.every_row_changes(bound.method.rows, stream):
            return new
        is_row = self.forward.is_row(stream, bound.method.rows, *rows, self.query.device)
        return torch.where(is_row[:, None, :, None], new, old)

    def _is_changed(self, rows: tuple[int, int]) -> Tensor:
        """``[batch, rows]``: rows that any method may change."""
        is_changed = torch.zeros(
            (self.query.shape[0], rows[1] - rows[0]), dtype=torch.bool, device=self.query.device
        )
        for bound, stream in self.acting.scores + self.acting.weights:
            is_changed[stream.batch] |= self.forward.is_row(
                stream, bound.method.rows, *rows, self.query.device
            )
        return is_changed

    def _observe(self, weights: Tensor) -> None:
        """Hand the weights ``[batch, heads, key]`` of the predicting row to who asked for them."""
        length = self.query.shape[2]
        for bound, stream in self.acting.choose:
            at = self._at(bound, stream, (length - 1, length))
            chosen = bound.method.choose(weights[stream.batch], at)
            self.forward.keep_chosen(bound, stream, self.layer, chosen)
        for bound, stream in self.acting.observe:
            if bound.method.observes_rows:
                continue
            at = self._at(bound, stream, (length - 1, length))
            seen = bound.method.observe(weights[stream.batch], at)
            self.forward.observed.setdefault(bound.method.name, {})[self.layer] = seen

    def _observe_rows(self, weights: Tensor, rows: tuple[int, int]) -> None:
        """Hand ``[batch, heads, rows, key]`` of a block of rows to who watches all of them."""
        for bound, stream in self.acting.observe:
            start = max(rows[0], self.forward.first_row([(bound, stream)]))
            if not bound.method.observes_rows or start >= rows[1]:
                continue
            at = self._at(bound, stream, (start, rows[1]))
            block = weights[stream.batch, :, start - rows[0] :]
            seen = bound.method.observe(block, at)
            known = self.forward.observed.setdefault(bound.method.name, {})
            before = known.get(self.layer)
            known[self.layer] = seen if before is None else torch.cat([before, seen], dim=1)


def _own_heads(work: Work, options: dict[str, Any]) -> list[int] | None:
    """The heads to compute rows of; ``None`` for all."""
    hooks = (work.scores, work.tally, work.weights, work.look, work.choose, work.observe)
    bounds = {bound for hook in hooks for bound in hook}
    if len(bounds) > 1 or any(options.get(name) is not None for name in _PER_HEAD):
        return None
    (bound,) = bounds
    heads = bound.method.own_heads(work.site.layer, bound.constants)
    return None if heads is None else list(heads)


def _padded(values: Tensor, n_keys: int) -> Tensor:
    """``[..., key]`` with zeros for the columns behind."""
    return torch.nn.functional.pad(values, (0, n_keys - values.shape[-1]))


def put(tensor: Tensor, batch: slice, part: Tensor) -> Tensor:
    """Replace a slice of the batch; the common case of the whole batch copies nothing."""
    if part.shape[0] == tensor.shape[0]:
        return part
    tensor = tensor.clone()
    tensor[batch] = part
    return tensor


def _refuse_unknown(options: dict[str, Any], module: nn.Module) -> None:
    """An option that would change the scores and that we would drop must not pass silently.

    What the eager function beside the module takes was looked at when attaching.
    """
    for name, value in options.items():
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and name not in KNOWN_SCORE_OPTIONS
            and eager_function(type(module)) is None
        ):
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name!r} to its attention, whose meaning the "
                "engine does not know; steering attention rows would drop it. Use a method that "
                "acts on heads, hidden states or logits."
            )
