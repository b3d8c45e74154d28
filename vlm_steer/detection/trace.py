"""What a model did while it wrote a text: one object for every detector, plot and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlm_steer.engine.hooks import Columns

__all__ = ["Span", "Trace", "TraceLayout", "char_spans"]

Span: TypeAlias = tuple[int, int]
"""Half-open."""


@dataclass(frozen=True, eq=False)
class TraceLayout:
    """What the tokens of a prompt are, padding left out.

    Attributes:
        kinds: ``[prompt]`` int8 codes of ``vlm_steer.engine.hooks.Columns``.
        images: Where each run of image tokens lies in the prompt, half-open; a tile between text
            tokens is a run of its own.
        grid: Height and width in tokens of each image or tile, in order, line by line; ``None``
            where the model does not tell.
        cue: Trailing prompt tokens that open the answer, such as "ASSISTANT:"; 1 or more.
    """

    kinds: Tensor
    images: tuple[Span, ...]
    grid: tuple[Span, ...] | None
    cue: int

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return self.kinds.shape[0]

    @property
    def image_columns(self) -> Tensor:
        """``[image_tokens]`` int64, positions of the image tokens in the prompt."""
        return (self.kinds == Columns.IMAGE).nonzero().flatten()

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks of columns: system, one per image, instruction, cue, generated."""
        images = [f"image_{i}" for i in range(len(self.images))]
        return ("system", *images, "instruction", "cue", "generated")

    def sizes(self, n_tokens: int) -> Tensor:
        """How many columns of each block the row that predicts each token sees.

        Args:
            n_tokens: Generated tokens, T.

        Returns:
            ``[T, blocks]`` int64.
        """
        body = self.kinds[: self.prompt_length - self.cue]
        counts = [int((body == Columns.SYSTEM).sum())]
        counts += [stop - start for start, stop in self.images]
        counts += [int((body == Columns.INSTRUCTION).sum()), self.cue, 0]
        sizes = torch.tensor(counts).expand(n_tokens, -1).clone()
        sizes[:, -1] = torch.arange(n_tokens)
        return sizes


@dataclass(frozen=True, eq=False)
class Trace:
    """One generated text as the model saw it; T generated tokens, the end token included.

    Everything about token t is read off the row that predicts it: the last prompt token for t = 0.
    That row sees itself. All tensors are on the CPU, in float32 unless said otherwise.

    Attributes:
        text: The generated text, without special tokens.
        ids: ``[T]`` int64 token ids.
        spans: Characters of ``text`` that each token writes, half-open; empty for special tokens
            and for those that end inside a character, whose last token writes it.
        logprob: ``[T]`` natural logarithm of the probability of each token, <= 0.
        entropy: ``[T]`` entropy of the next-token distribution, nats.
        margin: ``[T]`` log-probability of the likeliest token minus that of the second.
        layout: What the tokens of the prompt are.
        layers: Decoder layers that were recorded, one per entry of the axis ``layers`` below.
        masses: ``[T, layers, heads, blocks]`` attention mass per block of ``layout.blocks``.
        image_entropy: ``[T, layers, heads]`` entropy of the attention over image tokens, made to
            sum to 1, over the logarithm of their number: 0 to 1.
        sink_mass: ``[T, layers, heads]`` attention mass on the first token of the prompt and on
            tokens with massive activations.
        map_layers: Decoder layers of ``maps``.
        maps: ``[T, map_layers, heads, image_tokens]`` float16 attention to each image token of
            ``layout.image_columns``; ``None`` unless asked for.
        sinks: ``[layers, prompt]`` bool, the columns that ``sink_mass`` sums over.
        received: ``[layers, heads, n]`` attention that each token of the sequence received, summed
            over its own row and the later ones that see it; ``None`` unless asked for. The tokens
            are those generated but the last, which nothing follows, and under the scope
            ``sequence`` those of the prompt before them.
        own: ``[layers, heads, n]`` attention of each of these tokens to itself.
        n_rows: ``[layers, n]`` rows that each sum of ``received`` runs over.
        lens: ``[T, layers]`` largest probability that any image token, read off that layer by the
            model's output head, gives to this token's id; ``None`` unless asked for.
        blind: ``[T]`` log-probability of each token without the image; ``None`` unless asked for.
    """

    text: str
    ids: Tensor
    spans: tuple[Span, ...]
    logprob: Tensor
    entropy: Tensor
    margin: Tensor
    layout: TraceLayout
    layers: tuple[int, ...]
    masses: Tensor
    image_entropy: Tensor
    sink_mass: Tensor
    sinks: Tensor
    map_layers: tuple[int, ...] = ()
    maps: Tensor | None = None
    received: Tensor | None = None
    own: Tensor | None = None
    n_rows: Tensor | None = None
    lens: Tensor | None = None
    blind: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Generated tokens, T."""
        return self.ids.shape[0]

    @property
    def image_mass(self) -> Tensor:
        """``[T, layers, heads]`` attention mass on all images together."""
        return self.masses[..., 1 : 1 + len(self.layout.images)].sum(-1)

    def tokens_of(self, span: Span) -> Span:
        """The tokens that write some of the characters ``span`` of ``text``, half-open.

        A token of a space and a word counts only where it writes more than white space of them.
        """
        start, stop = span
        while start < stop and self.text[start].isspace():
            start += 1
        touching = [i for i, (a, b) in enumerate(self.spans) if a < stop and b > start]
        return (touching[0], touching[-1] + 1) if touching else (0, 0)


def char_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
    """The text of generated tokens, and which of its characters each token writes.

    Nothing is tokenised again: a token writes what the decoded text grows by.

    Args:
        tokenizer: The tokenizer of the model.
        ids: The generated tokens.
    """

    def decoded(n: int) -> str:
        text: str = tokenizer.decode(
            ids[:n], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    text = decoded(len(ids))
    ends = [0]
    for n in range(1, len(ids) + 1):
        start = decoded(n)
        # What ends inside a character, or is rewritten by what follows, is not settled yet.
        settled = n == len(ids) or (not start.endswith("\ufffd") and text.startswith(start))
        ends.append(max(len(start), ends[-1]) if settled else ends[-1])
    return text, tuple(pairwise(ends))
