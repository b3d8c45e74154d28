"""Random draws that come out the same on every machine and in every release of Python.

Only ``random.Random.random`` and string seeding are used: Python promises both to be stable,
and promises nothing of the kind for ``shuffle`` or ``choice``.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Dice"]

Item = TypeVar("Item")


class Dice:
    """A stream of draws named by its key.

    Args:
        *key: what the stream belongs to, for instance a split and an index. Equal keys give equal
            streams; the global random state is neither read nor changed.
    """

    def __init__(self, *key: str | int) -> None:
        self._random = random.Random("/".join(str(part) for part in key)).random

    def fraction(self) -> float:
        """Draw a number in [0, 1)."""
        return self._random()

    def between(self, low: float, high: float) -> float:
        """Draw a number in [low, high)."""
        return low + (high - low) * self._random()

    def integer(self, low: int, high: int) -> int:
        """Draw an integer in [low, high], both ends included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """Come out true with this probability."""
        return self._random() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """Draw one item, all equally likely."""
        return items[int(self._random() * len(items))]

    def weighted(self, items: Sequence[Item], weights: Sequence[float]) -> Item:
        """Draw one item with probabilities in proportion to ``weights``."""
        level = self._random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            level -= weight
            if level < 0:
                return item
        return items[-1]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Return the items in a random order."""
        keyed = sorted((self._random(), position) for position in range(len(items)))
        return [items[position] for _, position in keyed]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """Draw ``count`` items without replacement, fewer if there are not as many."""
        return self.shuffled(items)[:count]
