"""The words of a generated text, and which of them another text does not have."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_steer.detection.trace import Span, Trace

__all__ = ["Word", "differing", "split_words"]

# Scripts without spaces between words are cut character by character.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’-][^\W{_UNSPACED}]+)*")


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a generated text.

    Attributes:
        text: The word as written.
        span: Its characters in the text, half-open.
        tokens: The tokens that write it, half-open; two words may share one.
    """

    text: str
    span: Span
    tokens: Span


def split_words(trace: Trace) -> tuple[Word, ...]:
    """The words of a trace, in order; punctuation stands between them."""
    words = (
        Word(found.group(), found.span(), trace.tokens_of(found.span()))
        for found in _WORD.finditer(trace.text)
    )
    return tuple(word for word in words if word.tokens[0] < word.tokens[1])


def differing(words: Sequence[Word], others: Sequence[Word]) -> tuple[bool, ...]:
    """Which words are not in the other text at the corresponding place, whatever their case."""
    matcher = difflib.SequenceMatcher(
        a=[word.text.casefold() for word in words],
        b=[word.text.casefold() for word in others],
        autojunk=False,
    )
    differs = [True] * len(words)
    for start, _, length in matcher.get_matching_blocks():
        differs[start : start + length] = [False] * length
    return tuple(differs)
