"""Guided decoding: write chunk by chunk, each time the candidate that a detector trusts most."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vlm_steer import functional as F
from vlm_steer.engine.hooks import Asked, At, Decoding, Found, Method, Rows, SearchSetup
from vlm_steer.methods._guides import LookbackGuide, fitted_guide
from vlm_steer.registry import register_method

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["GuidedDecoding"]


@register_method("guided_decoding")
@dataclass(frozen=True, kw_only=True)
class GuidedDecoding(Method):
    """Guided decoding: sample several next chunks, keep the one that a detector trusts most.

    From the text so far, ``n_candidates`` chunks of ``chunk_size`` tokens are sampled; with x_c the
    mean over chunk c of what the detector reads, the text goes on with (arXiv 2407.07071, sec. 4)::

        argmax_c trust(x_c)

    and with the first of several that are equal. The paper's detector is a classifier of lookback
    ratios, fitted for one model: the folder of a fitted ``lookback_ratio`` detector. Two more are
    fitted to nothing: ``lookback`` trusts what looks back at the prompt most, on average over all
    heads, and ``log_probability`` what the model finds likeliest. The weights of published
    classifiers have both signs, so ``lookback`` is no copy of them.

    ``generate(do_sample=True)`` samples by its own options and torch's random state. Without it
    candidates are drawn at ``temperature`` and ``top_p`` below with the numbers of ``seed``, so
    that the text depends on the prompt alone. Beam search is refused; sequences stream chunk by
    chunk.

    Deviations of the official code: it ignores temperature, ``top_p`` and the length limit, draws
    candidates one after the other, and takes an end token for one only where there is one id of
    it. Here they are rows of one batch.

    Cost: ``n_candidates`` rows per sequence, as many as a beam search of that width has, from the
    prompt on; to read lookback ratios one attention row per layer and token.

    Attributes:
        detector: ``lookback``, ``log_probability``, or the folder of a fitted detector.
        n_candidates: Chunks to choose from, >= 1; 1 turns the choice off. Sensible 4 to 8.
        chunk_size: Tokens per chunk, >= 1. Sensible 4 to 16.
        temperature: Of the candidates when ``generate`` does not sample, > 0.
        top_p: Nucleus of the candidates when ``generate`` does not sample, in (0, 1].
        seed: Seed of the candidates when ``generate`` does not sample.
        layers: Decoder layers whose lookback ratios are read.
        scope: Streams to act on; the text is one, so ``positive`` is the only one with meaning.

    Example:
        >>> import vlm_steer
        >>> vlm_steer.get_method("guided_decoding")(chunk_size=4).n_candidates
        8

    Raises:
        ConfigError: A number is outside its range, the detector reads something else or was fitted
            on another model, or ``generate`` is asked for beams.
        DataError: The detector cannot be read.
    """

    paper: ClassVar[str] = "arXiv:2407.07071"
    rows: ClassVar[Rows] = "last"

    detector: str = "lookback"
    n_candidates: int = 8
    chunk_size: int = 8
    temperature: float = 0.9
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_candidates", "chunk_size"):
            value = getattr(self, name)
            self.require(value >= 1, f"{name} is {value}; it must be at least 1")
        self.require(self.temperature > 0, f"temperature is {self.temperature}; it must be above 0")
        self.require(
            0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1"
        )

    def is_neutral(self) -> bool:
        return self.n_candidates == 1

    def ignored_options(self) -> dict[str, str]:
        ignored = {"scope": "there is one text to choose chunks of"}
        if self.detector == "log_probability":
            ignored["layers"] = "log-probabilities are read, not layers"
        elif self.detector != "lookback":
            ignored["layers"] = "a fitted detector reads the layers that it was fitted on"
        return ignored

    def overrides(self, hook: str) -> bool:
        if hook == "observe":
            return self.detector != "log_probability"
        return super().overrides(hook)

    def resolve(self, model: "ModelInfo") -> LookbackGuide | None:
        if self.detector == "log_probability":
            return None
        if self.detector == "lookback":
            return LookbackGuide()
        return fitted_guide(self.detector, model)

    def observe(self, weights: Tensor, at: At) -> Tensor:
        guide: LookbackGuide = at.plan
        return guide.ratios(weights, at)

    def search_setup(self, asked: Asked) -> SearchSetup:
        self.require(
            asked.num_beams == 1,
            f"num_beams is {asked.num_beams}, but candidates are sampled. Generate with "
            "num_beams=1, or without guided_decoding",
        )
        rows = self.n_candidates * asked.num_return_sequences
        own = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return SearchSetup(rows=rows, sampling=None if asked.samples else own, streams=True)

    def search(self, decoding: Decoding) -> Found:
        rows = torch.arange(decoding.ids.shape[0], device=decoding.ids.device)
        first = rows[:: self.n_candidates]
        generator = None
        if not decoding.asked.samples:
            generator = torch.Generator().manual_seed(self.seed)
        lengths = torch.zeros_like(rows)
        while not decoding.is_finished:
            trust, written = self._chunk(decoding, generator)
            best = F.first_lowest(-trust.view(-1, self.n_candidates))
            winners = (first + best).repeat_interleave(self.n_candidates)
            decoding.count_changes(best > 0)
            decoding.reorder(winners)
            lengths = lengths + written[winners]
            decoding.commit(first, int(lengths.amax()))
        # A candidate that lost may have gone on longer than the winners.
        length = int(lengths.amax())
        ids = decoding.ids[first, : decoding.prompt_length + length]
        return Found(ids, decoding.trace[first, :length])

    def _chunk(
        self, decoding: Decoding, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Write one chunk in every row; ``[rows]`` trust in it, and tokens written."""
        read, is_written = [], []
        for _ in range(self.chunk_size):
            tokens = self._draw(decoding, generator)
            read.append(self._read(decoding, tokens))
            is_written.append(~decoding.is_done)
            decoding.append(tokens)
            if decoding.is_finished:
                break
        # What is behind the end of a text has no say.
        is_counted = torch.stack(is_written, dim=-1)
        written = is_counted.sum(dim=-1)
        found = torch.stack(read, dim=-1)
        lead = [-1] + [1] * (found.ndim - 2)
        total = found.masked_fill(~is_counted.view(*lead, is_counted.shape[1]), 0).sum(dim=-1)
        mean = total / written.clamp(min=1).view(lead)
        guide: LookbackGuide | None = decoding.plan
        return mean if guide is None else guide.trust(mean), written

    def _draw(self, decoding: Decoding, generator: torch.Generator | None) -> Tensor:
        scores = decoding.scores
        if generator is None:
            return torch.multinomial(scores.softmax(dim=-1), 1).squeeze(1)
        rows = self.n_candidates * decoding.asked.num_return_sequences
        waiting = torch.empty(rows, scores.shape[1]).exponential_(generator=generator)
        waiting = waiting.repeat(scores.shape[0] // rows, 1).to(scores.device)
        return F.draw_tokens(scores, waiting)

    def _read(self, decoding: Decoding, tokens: Tensor) -> Tensor:
        """``[rows, ...]`` what the detector reads of the tokens about to be written."""
        if decoding.plan is None:
            return decoding.logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
        seen = [decoding.seen[layer].to(tokens.device) for layer in sorted(decoding.seen)]
        return torch.stack(seen, dim=2)
