"""The finished texts of a beam search that is run by a method."""

import torch
from torch import Tensor

from vlm_steer.engine.hooks import Asked, Found

__all__ = ["NO_TEXT", "FinishedBeams"]

NO_TEXT = -1e9  # as in the beam search of transformers: a score for what is no text


class FinishedBeams:
    """The best finished texts of every prompt.

    Args:
        prompts: Prompts.
        beams: Texts kept per prompt.
        asked: How the user asked to decode.
        device: Of the rows.
    """

    def __init__(self, prompts: int, beams: int, asked: Asked, device: torch.device):
        self._asked = asked
        self._beams = beams
        self._scores = torch.full((prompts, beams), NO_TEXT, device=device)
        self._ids = torch.zeros((prompts, beams, 0), dtype=torch.long, device=device)
        self._trace = torch.zeros((prompts, beams, 0), dtype=torch.long, device=device)

    def add(self, scores: Tensor, is_new: Tensor, ids: Tensor, trace: Tensor) -> None:
        """Take texts in where they are better than those known.

        Args:
            scores: ``[prompts, texts]`` sums of log-probabilities.
            is_new: ``[prompts, texts]`` bool, finished just now.
            ids: ``[prompts, texts, tokens]`` generated tokens.
            trace: ``[prompts, texts, tokens]`` where each of them was predicted.
        """
        length = ids.shape[-1]
        scores = scores / length**self._asked.length_penalty
        both = torch.cat([self._scores, scores.masked_fill(~is_new, NO_TEXT)], dim=1)
        self._scores, best = both.topk(self._beams, dim=1)
        self._ids = _chosen(_widened(self._ids, length), ids, best)
        self._trace = _chosen(_widened(self._trace, length), trace, best)

    def are_final(self, scores: Tensor, length: int) -> Tensor:
        """``[prompts]`` bool, whether no running text can become better than those kept.

        Args:
            scores: ``[prompts, beams]`` sums of log-probabilities of the running texts.
            length: Their generated tokens.
        """
        is_full = self._scores[:, -1] > NO_TEXT / 2
        if self._asked.early_stopping is True:
            return is_full
        if self._asked.early_stopping == "never":
            return torch.zeros_like(is_full)
        best = scores.amax(dim=1) / max(length, 1) ** self._asked.length_penalty
        is_better: Tensor = best >= self._scores[:, -1]
        return is_full & ~is_better

    def forget(self, prompt: int, length: int) -> None:
        """Drop the texts of a prompt that are longer than this."""
        is_longer = (self._trace[prompt] >= 0).sum(dim=-1) > length
        self._scores[prompt] = self._scores[prompt].masked_fill(is_longer, NO_TEXT)
        self._scores, order = self._scores.sort(dim=1, descending=True)
        self._ids, self._trace = _gathered(self._ids, order), _gathered(self._trace, order)

    def found(self, prompt: Tensor, pad: int) -> Found:
        """The texts to return.

        Args:
            prompt: ``[prompts, tokens]`` ids of the prompts.
            pad: Id that fills up shorter texts.
        """
        n, order = self._asked.num_return_sequences, self._scores.argsort(dim=1, descending=True)
        order = order[:, :n]
        trace = _gathered(self._trace, order).flatten(0, 1)
        ids = _gathered(self._ids, order).flatten(0, 1).masked_fill(trace < 0, pad)
        length = int((trace >= 0).sum(dim=1).amax())
        ids = torch.cat([prompt.repeat_interleave(n, dim=0), ids[:, :length]], dim=1)
        return Found(ids, trace[:, :length], self._scores.gather(1, order).flatten())


def _gathered(values: Tensor, order: Tensor) -> Tensor:
    """Entries ``[prompts, chosen, tokens]`` of ``[prompts, texts, tokens]``."""
    return values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))


def _widened(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, max(length - values.shape[-1], 0)), value=-1)


def _chosen(old: Tensor, new: Tensor, best: Tensor) -> Tensor:
    return _gathered(torch.cat([old, _widened(new, old.shape[-1])], dim=1), best)
