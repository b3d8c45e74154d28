"""Which words of a caption name which objects."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from vlm_steer.errors import DataError

__all__ = ["ObjectVocabulary", "plural", "read_synonyms"]

Phrase = tuple[str, ...]

_IRREGULAR = MappingProxyType(
    {
        "calf": "calves",
        "child": "children",
        "goose": "geese",
        "grandchild": "grandchildren",
        "knife": "knives",
        "loaf": "loaves",
        "mouse": "mice",
        "ox": "oxen",
        "person": "people",
        "pocketknife": "pocketknives",
        "shelf": "shelves",
        "thief": "thieves",
        "wolf": "wolves",
    }
)
_INVARIANT = frozenset(
    {"aircraft", "bison", "broccoli", "buffalo", "cattle", "children", "fish", "geese", "luggage"}
    | {
        "men",
        "mice",
        "oxen",
        "people",
        "scissors",
        "sheep",
        "skis",
        "watercraft",
        "waterfowl",
        "women",
    }
)


def plural(phrase: str) -> str:
    """The plural of an English noun or noun phrase; the last word is inflected.

    >>> plural("wine glass"), plural("policeman"), plural("puppy"), plural("sheep")
    ('wine glasses', 'policemen', 'puppies', 'sheep')
    """
    *head, word = phrase.split(" ")
    return " ".join([*head, _plural_word(word)])


def _plural_word(word: str) -> str:
    if word in _INVARIANT:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("man") and word not in {"human", "german", "doberman"}:
        return word[:-3] + "men"
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + ("zes" if re.search(r"[^z]iz$", word) else "es")
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + "s"


def read_synonyms(path: Path) -> list[list[str]]:
    """The lines of a CHAIR synonyms file: an object's name, then its synonyms, unstripped.

    Raises:
        DataError: the file is missing, is not text, or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the synonyms file {path} cannot be read ({error}); give a text file with one "
            "object per line: its name, then its synonyms, separated by ', '"
        ) from error
    rows = [line.strip().split(", ") for line in lines if line.strip()]
    if not rows:
        raise DataError(f"the synonyms file {path} is empty; expected one object per line")
    return rows


@dataclass(frozen=True)
class ObjectVocabulary:
    """A closed vocabulary of object surfaces.

    Attributes:
        surfaces: phrase of lower-case words -> object name.
        ignored: phrases that name no object although a part of them would ("train track").
        qualifiers: word -> objects before which it is no mention of its own ("baby" elephant).
        colours: words that name an object only where no content word follows ("an orange cat").
        function_words: words that may follow a colour word used as a noun.
    """

    surfaces: Mapping[Phrase, str]
    ignored: frozenset[Phrase] = frozenset()
    qualifiers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    colours: frozenset[str] = frozenset()
    function_words: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """Object names in order of first appearance."""
        return tuple(dict.fromkeys(self.surfaces.values()))

    @cached_property
    def lengths(self) -> Mapping[str, tuple[int, ...]]:
        """First word -> numbers of words of the phrases that start with it, longest first."""
        found: dict[str, set[int]] = {}
        for phrase in (*self.surfaces, *self.ignored):
            found.setdefault(phrase[0], set()).add(len(phrase))
        return {word: tuple(sorted(sizes, reverse=True)) for word, sizes in found.items()}

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "ObjectVocabulary":
        """Object names and their plurals, nothing else."""
        return cls.from_groups([name] for name in names)

    @classmethod
    def from_synonyms(cls, path: Path) -> "ObjectVocabulary":
        """The surfaces of a CHAIR synonyms file with plurals by rule; spaces and case are forgiven.

        What no synonyms file says (phrases that name no object, qualifiers, colours) is taken from
        the shipped COCO table.
        """
        shipped = cls.coco()
        derived = cls.from_groups(read_synonyms(path))
        return cls(
            derived.surfaces,
            shipped.ignored,
            shipped.qualifiers,
            shipped.colours,
            shipped.function_words,
        )

    @classmethod
    def from_groups(cls, groups: Iterable[Iterable[str]]) -> "ObjectVocabulary":
        """Groups of synonyms, the object's name first, with plurals by rule."""
        surfaces: dict[Phrase, str] = {}
        for group in groups:
            members = [" ".join(member.lower().split()) for member in group]
            for member in members:
                for form in (member, plural(member)):
                    surfaces.setdefault(tuple(form.split(" ")), members[0])
        return cls(surfaces)

    @classmethod
    def coco(cls) -> "ObjectVocabulary":
        """The shipped, hand-reviewed table of the 80 COCO categories."""
        text = (
            resources.files("vlm_steer_eval").joinpath("data/coco_objects.json").read_text("utf-8")
        )
        table = json.loads(text)
        surfaces = {
            tuple(surface.split(" ")): name
            for name, forms in table["surfaces"].items()
            for surface in forms
        }
        return cls(
            surfaces,
            frozenset(tuple(phrase.split(" ")) for phrase in table["ignored"]),
            {word: frozenset(names) for word, names in table["qualifiers"].items()},
            frozenset(table["colours"]),
            frozenset(table["function_words"]),
        )
