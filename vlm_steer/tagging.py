"""Which words name objects, by a part-of-speech tagger or by what they are not."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm_steer.errors import ConfigError

__all__ = ["Tagger", "ends_word", "is_content_word", "last_word"]

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*$")
_PART_OF_WORD = re.compile(r"[\w'’-]")
_NOUNS = ("NOUN", "PROPN", "NN")

_LISTED = """
a about above across after against all along also although always am among an and another any are
around as at away back be because been before behind being below beneath beside besides between
beyond both but by can could did do does down during each either else even ever every few for from
front had has have having he her here hers him his how i if in inside into is it its itself just
less like many may me might mine more most much must my near neither next no nor not now of off
often on once one only onto or other others our out outside over own per perhaps rather s same
several shall she should since so some such t than that the their theirs them then there these
they this those three through to together too toward towards two under until up upon us very was
we well were what when where which while who whose will with within without would yet you your
yours appear appears appearing capture captures depict depicts display displayed displays feature
features includes including located placed positioned seem seems seen see shown show shows shot
stand stands taken visible area background bottom center centre corner detail details edge
foreground image left middle part photo picture position right scene side sides top view yes
"""
_FUNCTION_WORDS = frozenset(_LISTED.split())
"""English words that name nothing which a detector could find."""


def last_word(text: str) -> str:
    """The word with which a text ends, empty where it ends otherwise."""
    found = _WORD.search(text)
    return found.group() if found else ""


def ends_word(text: str, longer: str) -> bool:
    """Whether the last word of a text is whole, going by the same text with one more token."""
    if not longer.startswith(text):
        return False
    return not _PART_OF_WORD.match(longer[len(text) :])


def is_content_word(word: str) -> bool:
    """Whether a word may name an object, for being none of the words that never do."""
    return len(word) > 1 and word.casefold() not in _FUNCTION_WORDS


@dataclass(frozen=True, eq=False)
class Tagger:
    """A part-of-speech tagger: a token classification model of transformers.

    Attributes:
        model: The model, some of whose labels are those of nouns.
        tokenizer: Its tokenizer.
    """

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str | os.PathLike[str], device: torch.device | None = None) -> "Tagger":
        """Load one by folder or hub id.

        Raises:
            ConfigError: There is no such model, or none of its labels is that of nouns.
        """
        from transformers import AutoModelForTokenClassification, AutoTokenizer

        name = os.fspath(name)
        try:
            model = AutoModelForTokenClassification.from_pretrained(name).to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"no part-of-speech tagger could be loaded from {name!r} ({reason}). Give the "
                "folder or the hub id of a token classification model."
            ) from error
        tagger = cls(model, tokenizer)
        if not any(tagger.is_noun(label) for label in model.config.id2label.values()):
            raise ConfigError(
                f"{name!r} has the labels {', '.join(map(str, model.config.id2label.values()))}, "
                "none of which is that of nouns (NOUN, PROPN, NN, NNS, ...). Give a part-of-speech "
                "tagger."
            )
        return tagger

    @staticmethod
    def is_noun(label: str) -> bool:
        """Whether a label is that of nouns."""
        return label.rpartition("-")[2].upper().startswith(_NOUNS)

    def end_with_noun(self, texts: Sequence[str]) -> list[bool]:
        """Whether the last word of each text is a noun where it stands."""
        if not texts:
            return []
        tokens = self.tokenizer(
            list(texts),
            return_tensors="pt",
            padding=True,
            padding_side="right",
            return_special_tokens_mask=True,
        )
        is_word = tokens.pop("special_tokens_mask") == 0
        with torch.inference_mode():
            logits = self.model(**tokens.to(self.model.device)).logits
        place = torch.arange(is_word.shape[1])
        last = torch.where(is_word, place, 0).amax(dim=1)
        labels = logits.argmax(dim=-1).cpu().gather(1, last[:, None]).flatten().tolist()
        return [self.is_noun(self.model.config.id2label[label]) for label in labels]
