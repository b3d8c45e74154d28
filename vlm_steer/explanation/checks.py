"""The causal question about a word: is it less likely once nothing may read what it looked at?"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no types
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_steer.detection._inputs import with_answers
from vlm_steer.detection.recording import trace_generation
from vlm_steer.detection.trace import Trace
from vlm_steer.engine.hooks import Method
from vlm_steer.engine.model import inspect_model, kept_module_state
from vlm_steer.engine.steer import steer
from vlm_steer.explanation.words import Word
from vlm_steer.methods.knockout import Knockout

__all__ = ["Check", "LogprobsWithout", "check_words", "dictate", "dictated", "read_again"]

LogprobsWithout = Callable[[Sequence[int], int], Tensor]
"""``f(image_tokens, n)``: log-probabilities of the first n tokens with those tokens cut off."""


@dataclass(frozen=True, slots=True)
class Check:
    """What becomes of a word's log-probability when image tokens are cut off from all others.

    Minus infinity means that the word is ruled out: a method with a plausibility mask leaves it no
    probability there.

    Attributes:
        cells: Numbers of the image tokens that the word attended to most, sinks left out.
        logprob: Log-probability of the word as it was generated, summed over its tokens.
        without_cells: The same with ``cells`` cut off.
        without_others: With as many other image tokens, drawn at random: the control.
        without_image: With all image tokens cut off.
    """

    cells: tuple[int, ...]
    logprob: float
    without_cells: float
    without_others: float
    without_image: float

    @property
    def effect(self) -> float:
        """How much more the word lost with its own cells than with others, in nats.

        Infinite where only one of the two rules it out; NaN where both do, which compares nothing.
        """
        return self.without_others - self.without_cells


def check_words(
    without: LogprobsWithout,
    logprob: Tensor,
    words: Sequence[Word],
    attention: Sequence[Tensor],
    *,
    is_open: Tensor,
    share: float,
    seed: int,
) -> list[Check]:
    """Cut off what each word attended to, and see what becomes of its log-probability.

    Args:
        without: Runs the model over the same text with image tokens cut off.
        logprob: ``[tokens]`` log-probabilities as generated.
        words: The words to check.
        attention: Per word ``[image_tokens]`` what it attended to.
        is_open: ``[image_tokens]`` bool, the image tokens to choose from: no sinks.
        share: How many of them to cut off, as a fraction.
        seed: Of the control.
    """
    if not words:
        return []
    generator = torch.Generator().manual_seed(seed)
    everything = range(len(is_open))
    blind = without(everything, max(word.tokens[1] for word in words))
    open_tokens = is_open.nonzero().flatten()
    count = max(1, min(round(share * len(open_tokens)), len(open_tokens) // 2))
    checks = []
    progress = tqdm(words, desc="knockout checks", unit="word", disable=None)
    for word, weights in zip(progress, attention, strict=True):
        order = open_tokens[weights[open_tokens].argsort(descending=True)]
        cells, rest = order[:count], order[count:]
        others = rest[torch.randperm(len(rest), generator=generator)[:count]]
        n = word.tokens[1]
        span = slice(*word.tokens)
        checks.append(
            Check(
                cells=tuple(sorted(cells.tolist())),
                logprob=float(logprob[span].sum()),
                without_cells=float(without(cells.tolist(), n)[span].sum()),
                without_others=float(without(others.tolist(), n)[span].sum()),
                without_image=float(blind[span].sum()),
            )
        )
    return checks


def read_again(model: Any, inputs: Mapping[str, Any], ids: Tensor) -> LogprobsWithout:
    """How the unsteered model would have rated a text without image tokens: one pass each."""
    info = inspect_model(model)
    arguments = inspect.signature(info.model.forward).parameters

    def without(image_tokens: Sequence[int], n: int) -> Tensor:
        whole, _ = with_answers(inputs, [ids[:n]], info)
        kept = {"logits_to_keep": n + 1} if "logits_to_keep" in arguments else {}
        with (
            steer(model, _cut(image_tokens)),
            torch.inference_mode(),
            kept_module_state(info.model),
        ):
            logits = info.model(**whole, **kept, use_cache=False).logits[:, -n - 1 : -1]
        logprob: Tensor = logits[0].float().log_softmax(-1).cpu().gather(1, ids[:n, None])[:, 0]
        return logprob

    return without


def dictated(
    model: Any, processor: Any, inputs: Mapping[str, Any], ids: Tensor, methods: Sequence[Method]
) -> LogprobsWithout:
    """The same for a steered model.

    The text is written again token by token, so that methods act on it as they did.
    """

    def without(image_tokens: Sequence[int], n: int) -> Tensor:
        steering = (*methods, _cut(image_tokens))
        return dictate(model, processor, inputs, ids[:n], steering).logprob

    return without


def dictate(
    model: Any, processor: Any, inputs: Mapping[str, Any], ids: Tensor, methods: Sequence[Method]
) -> Trace:
    """Let a model write a text that is there already, token by token."""
    (trace,) = trace_generation(
        model,
        processor,
        inputs,
        methods=tuple(methods),
        max_new_tokens=len(ids),
        do_sample=False,
        num_beams=1,
        logits_processor=LogitsProcessorList([_Dictated(ids)]),
    )
    return trace


@dataclass(frozen=True, kw_only=True)
class _Cut(Knockout):
    """A knockout under a name of its own, so that it goes together with one of the user's."""

    name: ClassVar[str] = "knockout_check"


def _cut(image_tokens: Sequence[int]) -> Method:
    return _Cut(
        queries=("system", "image", "instruction", "generated"),
        image_tokens=tuple(image_tokens),
        scope="all",
    )


class _Dictated(LogitsProcessor):
    """Leaves no choice but the next token of a text."""

    def __init__(self, ids: Tensor):
        self._ids = iter(ids.tolist())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        dictated = torch.full_like(scores, -torch.inf)
        dictated[:, next(self._ids)] = 0
        return dictated
