"""The search of OPERA over all prompts of a batch at once."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import Decoding, Found
from vlm_steer.methods._beams import NO_TEXT, FinishedBeams

if TYPE_CHECKING:
    from vlm_steer.methods.opera import OPERA

__all__ = ["Search"]


class Search:
    """One search. A beam has one row per candidate; tokens are counted from the prompt's end.

    Rows hold, per token, what it takes to go on from there: the score up to it, the column that
    was strongest, the attention of its row. A prompt that others wait for repeats what it holds
    until it is as long again as it was.
    """

    def __init__(self, method: "OPERA", decoding: Decoding, beams: int):
        self.method, self.decoding = method, decoding
        rows, device = decoding.ids.shape[0], decoding.ids.device
        self.shape = (rows // (beams * method.n_candidates), beams, method.n_candidates)
        self.identity = torch.arange(rows, device=device)
        self.length = 0
        self.finished = FinishedBeams(self.shape[0], beams, decoding.asked, device)
        self.is_over = torch.zeros(self.shape[0], dtype=torch.bool, device=device)
        self.has_offer = torch.zeros_like(self.is_over)
        self.resumes_at = torch.zeros(self.shape[0], dtype=torch.long, device=device)
        self.base = torch.zeros(self.shape[:2], device=device)
        self.base[:, 1:] = NO_TEXT  # all beams are the same yet
        self.offered = torch.zeros(self.shape, device=device)
        self.texts = torch.zeros((rows, 0), dtype=torch.long, device=device)
        self.sums = torch.zeros((rows, 0), device=device)
        self.anchors = torch.zeros((rows, 0), dtype=torch.long, device=device)
        self.attention = torch.zeros((rows, 0, 2), device=device)
        self.tried: dict[tuple[int, int], list[Tensor]] = {}

    def run(self) -> Found:
        """Search to the end."""
        decoding = self.decoding
        while True:
            is_deciding = self._is_active() & self.has_offer
            if self.length > 0 and bool(is_deciding.any()):
                places = self._decide(is_deciding)
                if places:
                    self._take_back(places)
                    continue
            if decoding.is_finished or bool(self.is_over.all()):
                break
            self._append(self._next_tokens())
        prompts = decoding.ids[:: self.shape[1] * self.shape[2], : decoding.prompt_length]
        return self.finished.found(prompts, decoding.pad)

    def _is_active(self) -> Tensor:
        """``[prompts]`` bool, neither over nor waiting for others."""
        return (self.resumes_at <= self.length) & ~self.is_over

    # -- tokens -------------------------------------------------------------------------------
    def _next_tokens(self) -> Tensor:
        """``[rows]``: the likeliest tokens of active prompts, what the others hold."""
        n_candidates = self.shape[2]
        scores = self.decoding.scores.view(*self.shape, -1)[:, :, 0]
        for (prompt, place), followed in self.tried.items():
            if place == self.length:
                scores = scores.clone()
                scores[prompt] = _without(scores[prompt], torch.cat(followed))
        values, tokens = scores.topk(n_candidates, dim=-1)
        values = values.clamp(min=NO_TEXT)  # of tokens that a processor or a method has ruled out
        is_active = self._is_active()
        self.offered = torch.where(is_active[:, None, None], values, self.offered)
        self.has_offer = self.has_offer | is_active
        if self.texts.shape[1] <= self.length:
            return tokens.flatten()
        is_held = ~is_active.repeat_interleave(self.shape[1] * n_candidates)
        return torch.where(is_held, self.texts[:, self.length], tokens.flatten())

    def _append(self, tokens: Tensor) -> None:
        self.decoding.append(tokens)
        self.length += 1
        missing = max(self.length - self.texts.shape[1], 0)
        pad = torch.nn.functional.pad
        self.texts = pad(self.texts, (0, missing))
        self.sums = pad(self.sums, (0, missing))
        self.anchors = pad(self.anchors, (0, missing), value=-1)
        self.attention = pad(self.attention, (0, missing, 0, missing))
        self.texts[:, self.length - 1] = tokens
        if not self.decoding.is_finished:
            (seen,) = self.decoding.seen.values()
            seen = seen.to(tokens.device)
            self.attention[:, self.length - 1, : seen.shape[1]] = seen

    # -- choosing -----------------------------------------------------------------------------
    def _decide(self, is_deciding: Tensor) -> dict[int, int]:
        """Choose among candidates, unless prompts have to be taken back: where, by prompt."""
        penalty = torch.zeros(self.shape, device=self.base.device)
        if not self.decoding.is_finished:
            penalty, anchors = self._penalty()
            places = self._places(anchors, is_deciding)
            if places:
                return places
            repeated = anchors.repeat_interleave(self.shape[2], dim=1).flatten()
            is_row = is_deciding.repeat_interleave(self.shape[1] * self.shape[2])
            self._write(self.anchors, repeated, is_row)
        penalised = self.offered - self.method.weight * penalty
        totals, plain = (
            (self.base[..., None] + scores.log_softmax(dim=-1)).flatten(1)
            for scores in (penalised, self.offered)
        )
        self.decoding.count_changes((totals.argmax(1) != plain.argmax(1)) & is_deciding)
        self._choose(totals, is_deciding)
        return {}

    def _penalty(self) -> tuple[Tensor, Tensor]:
        """``[prompts, beams, candidates]`` penalties, ``[prompts, beams]`` strongest columns."""
        first = max(self.length - self.method.window, 0)
        block = self.attention[:, first : self.length, : 2 + self.length]
        image, text = block[..., :1], block[..., 2 + first :]
        rest = block[..., 1 : 2 + first].sum(dim=-1, keepdim=True)
        rows = torch.cat([image, rest, text], dim=-1)
        weights = torch.nn.functional.pad(rows, (0, 0, 2, 0))
        weights = weights.view(-1, self.shape[2], *weights.shape[1:])
        is_image = torch.arange(weights.shape[-1], device=weights.device) == 0
        found = F.opera_penalty(
            weights,
            is_image.expand(weights.shape[0], -1),
            scale=self.method.scale,
            response_start=2,
            bonus_length=self.method.bonus_length,
        )
        anchors = found.anchor.view(self.shape).mode(dim=-1).values + first
        return found.penalty.view(self.shape), anchors

    def _choose(self, totals: Tensor, is_deciding: Tensor) -> None:
        """Keep the best of ``[prompts, rows of a prompt]`` scores as beams, or as finished."""
        decoding, beams = self.decoding, self.shape[1]
        is_end = decoding.is_done.view(totals.shape)
        is_best = torch.zeros_like(is_end).scatter(1, totals.topk(beams, dim=1).indices, True)
        texts, trace = (
            values[:, : self.length].view(*totals.shape, -1)
            for values in (self.texts, decoding.trace)
        )
        self.finished.add(totals, is_end & is_best & is_deciding[:, None], texts, trace)
        running = totals.masked_fill(is_end, NO_TEXT).topk(beams, dim=1)
        is_row = is_deciding.repeat_interleave(totals.shape[1])
        self._write(self.sums, totals.flatten(), is_row)
        self.base = torch.where(is_deciding[:, None], running.values, self.base)
        first = self.identity.view(totals.shape)[:, :1]
        chosen = (first + running.indices).repeat_interleave(self.shape[2], dim=1).flatten()
        self._reorder(torch.where(is_row, chosen, self.identity))
        self.is_over |= is_deciding & self.finished.are_final(self.base, self.length)

    def _write(self, table: Tensor, values: Tensor, is_row: Tensor) -> None:
        """Put ``[rows]`` values of some rows at the last token."""
        last = table[:, self.length - 1]
        table[:, self.length - 1] = torch.where(is_row, values, last)

    def _reorder(self, rows: Tensor) -> None:
        self.decoding.reorder(rows)
        self.texts, self.sums = self.texts[rows], self.sums[rows]
        self.anchors, self.attention = self.anchors[rows], self.attention[rows]

    # -- taking back --------------------------------------------------------------------------
    def _places(self, anchors: Tensor, is_deciding: Tensor) -> dict[int, int]:
        """How many tokens prompts keep that have leaned on one column too often."""
        method = self.method
        if method.rollbacks == 0:
            return {}
        place = anchors.mode(dim=-1).values
        before = self.anchors[:, : self.length - 1].view(*self.shape, -1)[:, :, 0]
        times = (before == place[:, None, None]).sum(dim=-1) + (anchors == place[:, None])
        is_leaning = ((times > method.threshold) | (self.base < NO_TEXT / 2)).all(dim=1)
        is_leaning &= is_deciding & (place >= method.bonus_length)
        places = {}
        for prompt in is_leaning.nonzero().flatten().tolist():
            behind = int(place[prompt]) + 1
            for kept in (behind, behind - 1):
                is_left = len(self.tried.get((prompt, kept), ())) < method.rollbacks
                if is_left and 1 <= kept < self.length:
                    places[prompt] = kept
                    break
        return places

    def _take_back(self, places: dict[int, int]) -> None:
        """Take prompts back to so many tokens; the others wait and repeat theirs."""
        size = self.shape[1] * self.shape[2]
        is_taken_back = torch.zeros_like(self.is_over)
        self.resumes_at = self.resumes_at.clamp(min=self.length)
        for prompt, kept in places.items():
            rows = slice(prompt * size, (prompt + 1) * size)
            self.tried.setdefault((prompt, kept), []).append(self.texts[rows, kept])
            for (other, place), followed in self.tried.items():
                if other == prompt and place > kept:  # the text that they followed is gone
                    followed[:] = [tokens[:0] for tokens in followed]
            self.resumes_at[prompt] = kept
            self.has_offer[prompt] = False
            texts = self.texts[rows].view(*self.shape[1:], -1)[:, 0, :kept]
            is_same = (texts[:, None] == texts[None]).all(dim=-1)
            is_double = is_same.tril(diagonal=-1).any(dim=-1)
            base = self.sums[rows].view(*self.shape[1:], -1)[:, 0, kept - 1]
            self.base[prompt] = base.masked_fill(is_double, NO_TEXT)
            is_taken_back[prompt] = True
            self.finished.forget(prompt, kept)
        self.decoding.count_changes(is_taken_back)
        kept = min(places.values())
        self.decoding.take_back(self.length - kept + 1)
        self.length = kept - 1
        self._append(self.texts[:, kept - 1])


def _without(scores: Tensor, tokens: Tensor) -> Tensor:
    """Rule tokens out of ``[beams, vocabulary]``, except for beams that have no others."""
    left = scores.index_fill(1, tokens, -torch.inf)
    return torch.where(left.isfinite().any(dim=1, keepdim=True), left, scores)
