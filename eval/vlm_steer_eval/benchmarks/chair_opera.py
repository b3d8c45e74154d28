"""The CHAIR text rule of OPERA, PAI, VISTA, SPIN, SID and lmms-eval, defects included.

Tokens are tagged and lemmatised with NLTK, a fixed list of word pairs is merged, and whatever then
stands in the synonyms file is a mention. The rule needs nltk and its data.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_steer.errors import DataError
from vlm_steer_eval.files import read_text

from .chair import Mention, Reading
from .nltk_tools import load_nltk
from .vocabulary import ObjectVocabulary, read_synonyms

__all__ = ["OperaNormaliser", "load_lemmas", "load_opera_normaliser"]

Lemmatise = Callable[[Sequence[str]], list[str]]

_PAIRS = """
air plane, baseball bat, baseball glove, bow tie, cell phone, fire hydrant, hair drier, home plate,
hot dog, laptop computer, mobile phone, motor bike, motor cycle, parking meter, potted plant,
sports ball, stop light, stop sign, street light, suit case, teddy bear, tennis racket,
traffic light, traffic signal, train track, wine glass
"""
_ANIMALS = "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, animal, cub"


def _merged_pairs() -> dict[tuple[str, ...], str]:
    """Word pairs that become one word, from the published rule."""
    pairs: dict[tuple[str, ...], str] = {}
    for pair in _PAIRS.replace("\n", " ").strip().split(", "):
        pairs[tuple(pair.split(" "))] = pair
    for animal in _ANIMALS.split(", "):
        pairs[("baby", animal)] = pairs[("adult", animal)] = animal
    pairs[("passenger", "jet")] = "jet"
    pairs[("passenger", "train")] = "train"
    pairs[("bow", "tie")] = "tie"
    pairs[("toilet", "seat")] = "toilet"
    pairs[("wine", "glas")] = "wine glass"
    return pairs


@dataclass(frozen=True)
class OperaNormaliser:
    """NLTK tokens, tags and lemmas against the raw lines of a synonyms file.

    Attributes:
        synonyms: surface -> object. Surfaces keep the stray spaces and capitals of the file and so
            never match, as published.
        lemmatise: tokens -> lemmas.
        tokenise: text -> tokens.
    """

    synonyms: dict[str, str]
    tokenise: Callable[[str], list[str]]
    lemmatise: Lemmatise
    name: str = "opera"

    @property
    def vocabulary(self) -> ObjectVocabulary:
        """The synonyms as a vocabulary."""
        return ObjectVocabulary(
            {tuple(key.split(" ")): name for key, name in self.synonyms.items()}
        )

    def read(self, caption: str) -> Reading:
        """Read one caption."""
        lowered = caption.lower()
        tokens = self.tokenise(lowered)
        words, starts = _merge(self.lemmatise(tokens))
        kept = words
        if "toilet" in words and "seat" in words:
            kept = [word for word in words if word != "seat"]
        spans = _spans(lowered, tokens) if len(lowered) == len(caption) else [None] * len(tokens)
        ends = [*starts[1:], len(tokens)]
        # Where the word stands in the caption: dropping "seat" shifts the published indices.
        origin = [index for index, word in enumerate(words) if word in kept]
        mentions = [
            Mention(
                word,
                self.synonyms[word],
                _joined(spans, starts[at], ends[at]),
                starts[index],
                index,
            )
            for index, (word, at) in enumerate(zip(kept, origin, strict=True))
            if word in self.synonyms
        ]
        return Reading(tuple(mentions), tuple(words))


def load_opera_normaliser(synonyms: Path, lemmas: Path | None = None) -> OperaNormaliser:
    """Build the normaliser from a synonyms file and the installed nltk.

    Args:
        synonyms: the synonyms file of CHAIR.
        lemmas: a table to use instead of nltk's tagger and lemmatiser, see `load_lemmas`. With the
            singulars of another tool it is the CHAIR of that tool, such as the original one.

    Raises:
        ConfigError: nltk or its data are absent; the message says how to get them.
        DataError: a file cannot be used.
    """
    rows = read_synonyms(synonyms)
    table = {surface: row[0] for row in rows for surface in row}
    nltk = load_nltk("--normaliser opera", "use --normaliser table")
    if lemmas is not None:
        known = load_lemmas(lemmas)
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
        return OperaNormaliser(
            table,
            nltk.tokenise,
            lambda tokens: [known.get(token, token) for token in tokens],
            f"opera, lemmas {digest}",
        )
    wordnet = nltk.wordnet
    parts = {"J": wordnet.ADJ, "V": wordnet.VERB, "R": wordnet.ADV}

    def lemmatise(tokens: Sequence[str]) -> list[str]:
        return [
            nltk.lemma(word, parts.get(tag[:1], wordnet.NOUN)) for word, tag in nltk.tag(tokens)
        ]

    return OperaNormaliser(table, nltk.tokenise, lemmatise)


def load_lemmas(path: Path) -> dict[str, str]:
    """Word -> lemma, from lines with a word, a tab and its lemma; other words stay as they are.

    Raises:
        DataError: the file cannot be read, or a line is malformed or contradicts another.
    """
    lemmas: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        word, lemma = (part.strip() for part in line.lower().partition("\t")[::2])
        if not word or not lemma or lemmas.get(word, lemma) != lemma:
            raise DataError(
                f"{path}, line {number}: expected a word, a tab and its only lemma, found {line!r}"
            )
        lemmas[word] = lemma
    return lemmas


def _merge(lemmas: Sequence[str]) -> tuple[list[str], list[int]]:
    words: list[str] = []
    starts: list[int] = []
    position = 0
    while position < len(lemmas):
        starts.append(position)
        pair = tuple(lemmas[position : position + 2])
        merged = _MERGED.get(pair)
        words.append(lemmas[position] if merged is None else merged)
        position += 1 if merged is None else 2
    return words, starts


def _spans(text: str, tokens: Sequence[str]) -> list[tuple[int, int] | None]:
    spans: list[tuple[int, int] | None] = []
    cursor = 0
    for token in tokens:
        found = text.find(token, cursor)
        if found < 0:
            spans.append(None)
            continue
        cursor = found + len(token)
        spans.append((found, cursor))
    return spans


def _joined(
    spans: Sequence[tuple[int, int] | None], start: int, end: int
) -> tuple[int, int] | None:
    first, last = spans[start], spans[end - 1]
    return None if first is None or last is None else (first[0], last[1])


_MERGED = _merged_pairs()
