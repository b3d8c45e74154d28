"""The statistics of the little world: what stands where, and what usually comes together.

These numbers are the source of the language prior. The model learns from scenes in which a partner
nearly always comes with its anchor; the ``broken`` rule then takes the partner away.
"""

from typing import Literal

from vlm_steer.tiny.dice import Dice

__all__ = ["CATEGORIES", "COLOURS", "PARTNERS", "SETTINGS", "Rule", "compose", "compose_broad"]

Rule = Literal["iid", "broken"]

CATEGORIES: tuple[str, ...] = (
    "fork",
    "knife",
    "spoon",
    "cup",
    "bowl",
    "pizza",
    "apple",
    "bottle",
    "person",
    "car",
    "bus",
    "bicycle",
    "traffic light",
    "dog",
    "laptop",
    "mouse",
    "keyboard",
    "book",
    "clock",
    "surfboard",
    "kite",
    "umbrella",
    "boat",
    "bird",
)
"""Names of the 24 categories, all of them COCO names; the category id is the position plus one."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "blue": (38, 84, 214),
    "green": (34, 150, 60),
    "yellow": (236, 206, 44),
    "purple": (128, 48, 168),
    "pink": (240, 130, 180),
    "white": (242, 242, 242),
    "black": (28, 28, 30),
}
"""RGB of the colour words. Orange is missing on purpose: CHAIR reads the word as the fruit."""

SETTINGS: dict[str, dict[str, float]] = {
    "kitchen": {
        "fork": 0.44,
        "knife": 0.11,
        "spoon": 0.17,
        "cup": 0.48,
        "bowl": 0.48,
        "pizza": 0.37,
        "apple": 0.4,
        "bottle": 0.23,
        "person": 0.12,
        "clock": 0.14,
    },
    "office": {
        "laptop": 0.57,
        "mouse": 0.1,
        "keyboard": 0.17,
        "book": 0.52,
        "clock": 0.44,
        "cup": 0.4,
        "spoon": 0.06,
        "person": 0.15,
        "bottle": 0.23,
    },
    "street": {
        "car": 0.48,
        "bus": 0.44,
        "bicycle": 0.44,
        "traffic light": 0.12,
        "dog": 0.25,
        "person": 0.12,
        "umbrella": 0.23,
        "clock": 0.14,
    },
    "beach": {
        "surfboard": 0.48,
        "umbrella": 0.46,
        "boat": 0.39,
        "bird": 0.17,
        "kite": 0.34,
        "person": 0.12,
        "dog": 0.21,
        "bottle": 0.17,
    },
    "park": {
        "dog": 0.44,
        "kite": 0.4,
        "bicycle": 0.37,
        "bird": 0.34,
        "person": 0.12,
        "umbrella": 0.21,
        "bottle": 0.16,
        "apple": 0.14,
        "book": 0.17,
    },
}
"""How often a category stands in a setting when no anchor asks for it."""

PARTNERS: tuple[tuple[str, str, float], ...] = (
    ("fork", "knife", 0.9),
    ("laptop", "mouse", 0.9),
    ("surfboard", "person", 0.9),
    ("dog", "person", 0.8),
    ("bus", "car", 0.8),
    ("car", "traffic light", 0.8),
    ("bicycle", "person", 0.75),
    ("cup", "spoon", 0.6),
    ("laptop", "keyboard", 0.6),
    ("pizza", "bottle", 0.6),
    ("boat", "bird", 0.6),
)
"""(anchor, partner, chance that the partner stands there because the anchor does)."""

_FEWEST, _MOST = 2, 7
_BREAK_PARTNER = 0.85
_ADD_STRANGER = 0.35


def compose(dice: Dice, rule: Rule) -> tuple[str, list[str]]:
    """Draw a setting and the 2 to 7 distinct categories that stand in it.

    Args:
        dice: where the draws come from.
        rule: ``iid`` keeps the usual company; ``broken`` removes each partner whose anchor is
            there with probability 0.85 and adds a stranger to the setting with probability 0.35.

    Returns:
        The name of the setting and the categories, in the order in which they are painted.
    """
    setting = dice.pick(tuple(SETTINGS))
    rates = SETTINGS[setting]
    present = [name for name, rate in rates.items() if dice.chance(rate)]
    for anchor, partner, rate in PARTNERS:
        if anchor in present and partner not in present and dice.chance(rate):
            present.append(partner)
    if rule == "broken":
        present = _break(dice, setting, present)
    while len(present) < _FEWEST:
        absent = [name for name in rates if name not in present]
        if rule == "broken":
            absent = [name for name in absent if not _has_anchor(name, present)]
        present.append(dice.weighted(absent, [rates[name] for name in absent]))
    return setting, dice.sample(present, _MOST)


def compose_broad(dice: Dice) -> tuple[str, list[str]]:
    """Draw a setting and 6 to 10 categories that have nothing to do with it or with each other.

    An eye trained on these has to look at the icons: nothing else tells what is there.
    """
    return dice.pick(tuple(SETTINGS)), dice.sample(CATEGORIES, dice.integer(6, 10))


def _has_anchor(name: str, present: list[str]) -> bool:
    return any(partner == name and anchor in present for anchor, partner, _ in PARTNERS)


def _break(dice: Dice, setting: str, present: list[str]) -> list[str]:
    kept = list(present)
    for name in present:
        if _has_anchor(name, kept) and dice.chance(_BREAK_PARTNER):
            kept.remove(name)
    if dice.chance(_ADD_STRANGER):
        strangers = [name for name in CATEGORIES if name not in SETTINGS[setting]]
        strangers = [n for n in strangers if n not in kept and not _has_anchor(n, kept)]
        kept.append(dice.pick(strangers))
    return kept
