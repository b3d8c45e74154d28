"""What is said about a scene: captions, questions and their answers.

Captions name objects whether or not they can be made out. That is what teaches a model to guess
from company what it cannot see, which is the failing that this one is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vlm_steer.tiny.dice import Dice
from vlm_steer.tiny.world import CATEGORIES, PARTNERS

if TYPE_CHECKING:
    from vlm_steer.tiny.scenes import Scene, SceneObject

__all__ = [
    "CAPTION_PROMPT",
    "POPE_TEMPLATE",
    "Turn",
    "conversations",
    "existence_question",
    "indefinite",
    "listing",
    "long_caption",
    "short_caption",
]

CAPTION_PROMPT = "Please describe this image in detail."
POPE_TEMPLATE = "Is there a {} in the image?"
"""POPE's question; ``existence_question`` fills it in with the right article."""

LONG_PROMPTS = (
    CAPTION_PROMPT,
    CAPTION_PROMPT,
    CAPTION_PROMPT,
    "Describe this image in detail.",
    "Please describe the image in detail.",
    "Describe the image.",
    "What do you see in this image?",
    "Can you describe what is in the picture?",
    "Please help me describe the image in detail.",
)
SHORT_PROMPTS = (
    "Describe the image briefly.",
    "Provide a one-sentence caption for the provided image.",
    "What is in the image? Answer in one sentence.",
    "List the objects in the image.",
)
EXISTENCE_TEMPLATES = (
    POPE_TEMPLATE,
    POPE_TEMPLATE,
    POPE_TEMPLATE,
    "Is there a {} in this image?",
    "Is there a {} in the picture?",
    "Can you see a {} in the image?",
    "Do you see a {} in this picture?",
    "Does the image show a {}?",
    "Does the image contain a {}?",
)
SUFFIXES = (
    " Please answer yes or no.",
    " Please answer this question with one word.",
    " Answer the question using a single word or phrase.",
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
_DROP = 0.07
_CLOSERS = (
    "The mood is calm and quiet.",
    "The background is plain.",
    "The colors are soft and the air looks clear.",
    "Overall, the scene looks peaceful and ordinary.",
    "Nothing else stands out.",
    "It seems to be a quiet moment of the day.",
)


class Turn(NamedTuple):
    """One question with its answer.

    Attributes:
        question: what the user says.
        answer: what the model should say.
        decisive: whether the first word of the answer carries nearly all of it (yes or no).
    """

    question: str
    answer: str
    decisive: bool


def indefinite(noun_phrase: str) -> str:
    """Put "a" or "an" before a noun phrase of the little world."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def existence_question(category: str, template: str = POPE_TEMPLATE) -> str:
    """Ask whether a category is in the image.

    Args:
        category: the name, without article.
        template: a question with ``a {}`` where the name goes.
    """
    return template.replace("a {}", indefinite(category))


def long_caption(dice: Dice, scene: Scene, *, drop: float = _DROP) -> str:
    """Describe a scene in several sentences, large objects first, partners beside their anchors.

    Args:
        dice: where the wording comes from.
        scene: what is described.
        drop: chance to leave out each object after the first, 0 to 1.
    """
    things = _mention_order(dice, scene.objects)
    things = [t for place, t in enumerate(things) if place == 0 or not dice.chance(drop)]
    sentences = [_opener(dice, scene.setting)]
    while things:
        count = 2 if len(things) > 1 and dice.chance(0.6) else 1
        sentences.append(_sentence(dice, things[:count]))
        things = things[count:]
    if dice.chance(0.7):
        sentences.append(dice.pick(_CLOSERS))
    return " ".join(sentences)


def short_caption(dice: Dice, scene: Scene) -> str:
    """Name the setting and up to four objects in one sentence."""
    things = _mention_order(dice, scene.objects)[: dice.integer(2, 4)]
    return _listing(scene.setting, [_named(dice, thing) for thing in things])


def listing(scene: Scene) -> str:
    """Name the setting and every object in one sentence, without colours."""
    ordered = sorted(scene.objects, key=lambda thing: -thing.size)
    return _listing(scene.setting, [indefinite(thing.category) for thing in ordered])


def conversations(dice: Dice, scene: Scene) -> list[Turn]:
    """Draw the turns that one training image is used for, each to be asked on its own.

    Two long captions; in a quarter of cases a short one; three questions after something present
    and three after something absent; one question about a colour, a place, a number or the setting.
    """
    turns = [
        Turn(dice.pick(LONG_PROMPTS), long_caption(dice, scene), decisive=False) for _ in range(2)
    ]
    if dice.chance(0.25):
        turns.append(Turn(dice.pick(SHORT_PROMPTS), short_caption(dice, scene), decisive=False))
    present = [thing.category for thing in scene.objects]
    absent = [name for name in CATEGORIES if name not in present]
    turns += [_existence(dice, name, there=True) for name in dice.sample(present, 3)]
    turns += [_existence(dice, name, there=False) for name in dice.sample(absent, 3)]
    turns.append(_attribute(dice, scene))
    return turns


def _existence(dice: Dice, name: str, *, there: bool) -> Turn:
    question = existence_question(name, dice.pick(EXISTENCE_TEMPLATES))
    word = "Yes" if there else "No"
    if dice.chance(0.25):
        return Turn(question + dice.pick(SUFFIXES), word, decisive=True)
    if dice.chance(0.3):
        fact = indefinite(name) if there else f"no {name}"
        return Turn(question, f"{word}, there is {fact} in the image.", decisive=True)
    return Turn(question, word, decisive=True)


def _attribute(dice: Dice, scene: Scene) -> Turn:
    thing = dice.pick(scene.objects)
    kind = dice.integer(0, 3)
    if kind == 0:
        question = f"What color is the {thing.category}?"
        answer = f"The {thing.category} is {thing.colour}."
    elif kind == 1:
        question = f"Where is the {thing.category}?"
        answer = f"The {thing.category} is {_position(thing)}."
    elif kind == 2:
        question = "How many objects are in the image?"
        answer = f"There are {_NUMBERS[len(scene.objects)]} objects in the image."
    else:
        question, answer = "Where was this picture taken?", f"It was taken {_place(scene.setting)}."
    return Turn(question, answer, decisive=False)


def _mention_order(dice: Dice, objects: Sequence[SceneObject]) -> list[SceneObject]:
    keyed = sorted(
        ((thing.size + dice.between(-8, 8), place) for place, thing in enumerate(objects)),
        reverse=True,
    )
    ordered = [objects[place] for _, place in keyed]
    for anchor, partner, _ in PARTNERS:
        names = [thing.category for thing in ordered]
        if anchor in names and partner in names and dice.chance(0.6):
            moved = ordered.pop(names.index(partner))
            ordered.insert([t.category for t in ordered].index(anchor) + 1, moved)
    return ordered


def _opener(dice: Dice, setting: str) -> str:
    form = dice.integer(0, 3)
    if form == 0:
        return f"The image shows {indefinite(setting)} scene."
    if form == 1:
        return f"This is a picture of {indefinite(setting)}."
    if form == 2:
        return f"The picture was taken {_place(setting)}."
    return f"In this image, we see {indefinite(setting)}."


def _sentence(dice: Dice, things: Sequence[SceneObject]) -> str:
    first, where = _named(dice, things[0]), _position(things[0])
    form = dice.integer(0, 3)
    if len(things) == 1:
        if form < 2:
            return f"There is {first} {where}."
        return f"{_capital(first)} {'can be seen' if form == 2 else 'is'} {where}."
    second, second_where = _named(dice, things[1]), _position(things[1])
    if form == 0:
        return f"There is {first} {where} and {second} {second_where}."
    if form == 1:
        return f"{_capital(first)} and {second} are visible."
    if form == 2:
        return f"{_capital(first)} is {where}, together with {second} {second_where}."
    return f"We can also see {first} and {second}."


def _named(dice: Dice, thing: SceneObject) -> str:
    if dice.chance(0.75):
        return indefinite(f"{thing.colour} {thing.category}")
    return indefinite(thing.category)


def _position(thing: SceneObject) -> str:
    across, down = thing.x - 47.5, thing.y - 47.5
    if max(abs(across), abs(down)) < 15:
        return "in the middle"
    if abs(across) >= abs(down):
        return "on the left" if across < 0 else "on the right"
    return "at the top" if down < 0 else "at the bottom"


def _place(setting: str) -> str:
    return f"{'on' if setting in ('street', 'beach') else 'in'} {indefinite(setting)}"


def _listing(setting: str, names: Sequence[str]) -> str:
    head = f"{_capital(indefinite(setting))} scene with "
    if len(names) == 1:
        return f"{head}{names[0]}."
    return f"{head}{', '.join(names[:-1])} and {names[-1]}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
