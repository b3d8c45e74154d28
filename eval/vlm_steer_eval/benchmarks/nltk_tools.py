"""The installed nltk and its data, or an error that says how to get them."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vlm_steer.errors import ConfigError

__all__ = ["Nltk", "load_nltk"]


class Nltk(NamedTuple):
    """What the scorers use of nltk.

    Attributes:
        tokenise: text -> tokens.
        tag: tokens -> (token, Penn tag) pairs.
        lemma: (word, WordNet part of speech) -> lemma, remembered.
        wordnet: the corpus reader, for its part-of-speech letters.
    """

    tokenise: Callable[[str], list[str]]
    tag: Callable[[Sequence[str]], list[tuple[str, str]]]
    lemma: Callable[[str, str], str]
    wordnet: Any


def load_nltk(needed_by: str, instead: str) -> Nltk:
    """Load nltk and check that its data are there.

    Args:
        needed_by: what needs it, for the message.
        instead: what to do without it, for the message.

    Raises:
        ConfigError: nltk or its data are absent; the message says how to get them.
    """
    try:
        nltk = importlib.import_module("nltk")
        wordnet = importlib.import_module("nltk.corpus").wordnet
        lemmatizer = importlib.import_module("nltk.stem").WordNetLemmatizer()
    except ImportError as error:
        raise ConfigError(
            f"{needed_by} needs nltk, which is not installed; run `pip install vlm-steer[nltk]`, "
            f"or {instead}"
        ) from error
    cache: dict[tuple[str, str], str] = {}

    def lemma(word: str, part: str) -> str:
        if (word, part) not in cache:
            cache[word, part] = str(lemmatizer.lemmatize(word, pos=part))
        return cache[word, part]

    def tag(tokens: Sequence[str]) -> list[tuple[str, str]]:
        return list(nltk.pos_tag(list(tokens)))

    try:
        for word, _ in tag(nltk.word_tokenize("two dogs")):
            lemmatizer.lemmatize(word)
    except LookupError as error:
        raise ConfigError(
            f"{needed_by} needs the nltk data punkt_tab, averaged_perceptron_tagger_eng and "
            "wordnet, and at least one is absent; set NLTK_DATA to the folder that holds them, run "
            "`python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet`, or "
            f"{instead}"
        ) from error
    return Nltk(nltk.word_tokenize, tag, lemma, wordnet)
