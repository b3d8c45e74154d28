"""What a method sees that takes the place of the loop which turns scores into tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from vlm_steer.engine.views import Grid

__all__ = ["Asked", "Decoding", "Found", "SearchSetup"]


@dataclass(frozen=True, slots=True)
class Asked:
    """How the user asked ``generate`` to decode.

    Attributes:
        samples: Whether tokens are to be sampled.
        num_beams: Width of a beam search, 1 for none.
        num_return_sequences: Sequences to return per prompt.
        length_penalty: Exponent of the length by which beams divide their scores.
        early_stopping: When a beam search stops, as ``generate`` understands it.
    """

    samples: bool
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str


@dataclass(frozen=True, slots=True)
class SearchSetup:
    """What a search needs of ``generate``.

    Attributes:
        rows: Rows of the batch per prompt.
        sampling: Sampling options that hold instead of the user's, such as ``temperature``;
            scores then come out warped by them. ``None`` keeps the user's.
        streams: Whether tokens become final as the search goes on, so that they can be streamed.
        takes_back: Whether the search calls ``Decoding.take_back``.
    """

    rows: int
    sampling: Mapping[str, float] | None = None
    streams: bool = False
    takes_back: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        ids: ``[sequences, tokens]`` the texts to return, padded behind their end.
        trace: ``[sequences, new tokens]``, of each ``Decoding.trace``; -1 behind the end.
        scores: ``[sequences]``, where the search compares whole texts.
    """

    ids: Tensor
    trace: Tensor
    scores: Tensor | None = None


class Decoding(Protocol):
    """A running generation, in the hands of ``Method.search``.

    A prompt has ``SearchSetup.rows`` rows, which follow each other. Rows of one prompt may take
    each other's place; every row has a cache of its own, and what other methods keep of it moves
    along.

    Attributes:
        asked: How the user asked to decode.
        ids: ``[rows, tokens]`` prompt and generated tokens.
        prompt_length: Tokens of the prompt in ``ids``.
        scores: ``[rows, vocabulary]`` float32 of the next token: after every method and after
            the processors and warpers of ``generate``. As in transformers, processors are given
            logits, or log-probabilities where nothing is sampled.
        logits: The same before processors and warpers.
        seen: What the method's own ``observe`` hook returned in the last pass, by layer.
        is_done: ``[rows]`` bool, rows that a stopping criterion has ended.
        is_finished: Whether every row is done.
        trace: ``[rows, passes]``, the row in which each token of a row, and the next one, was
            predicted.
        pad: Id that fills up texts behind their end.
        plan: What ``Method.resolve`` returned for this model.
        grid: Where the image tokens of each row's prompt lie; for methods with ``needs_grid``.
    """

    asked: Asked
    ids: Tensor
    prompt_length: int
    scores: Tensor
    logits: Tensor
    is_done: Tensor
    is_finished: bool
    trace: Tensor
    plan: Any

    @property
    def seen(self) -> Mapping[int, Tensor]:
        """See above."""

    @property
    def pad(self) -> int:
        """See above."""

    @property
    def grid(self) -> Grid:
        """See above."""

    def decoded(self, texts: Sequence[Tensor] | Tensor) -> list[str]:
        """Texts of token ids, special tokens left out. For methods with ``needs_processor``."""

    def pictures(self) -> tuple[tuple[Tensor, ...], ...]:
        """Per row, its images (or tiles) ``[channels, height, width]`` in [0, 1].

        For methods with ``needs_grid`` and ``needs_processor``.
        """

    def closer(self, rows: Tensor, image: Tensor, boxes: Tensor) -> Tensor:
        """Logits of the last token of ``ids`` under other fields of view.

        Every intervention is off. For methods with ``needs_grid``.

        Args:
            rows: ``[rows]`` int64, those that look.
            image: ``[rows]`` int64, the image of its own at which each of them looks.
            boxes: ``[rows, fields, 4]`` left, top, right and bottom in it, in [0, 1].

        Returns:
            ``[rows, fields, vocabulary]`` float32.
        """

    def append(self, tokens: Tensor) -> None:
        """Put ``[rows]`` tokens at the end and, unless all rows are done, run the model on them.

        Rows that were done get padding instead.
        """

    def reorder(self, rows: Tensor) -> None:
        """Let every row go on as one of the same prompt, ``[rows]`` int64."""

    def take_back(self, n: int) -> None:
        """Forget the last ``n`` tokens; scores and ``seen`` are those of the next ``append``.

        Rows that had ended before stay ended.
        """

    def commit(self, rows: Tensor, length: int) -> None:
        """Declare final what these rows hold, one per text to return; it is streamed.

        Args:
            rows: ``[texts]`` int64.
            length: Tokens of the longest of them, without the prompt.
        """

    def count_changes(self, changes: Tensor) -> None:
        """Account for ``[...]`` bool choices, ``True`` where the search changed the outcome."""
