"""What is particular about a word's attention, beyond what every word of the answer shows."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vlm_steer.errors import ConfigError

__all__ = ["FEWEST_WORDS", "Beyond", "excess"]

Beyond: TypeAlias = Literal["nothing", "mean", "position"]
"""What is subtracted from attention: nothing, the mean over all words, or what the place of the
word in the answer predicts."""

FEWEST_WORDS = 3
"""Two words lie on a line, whatever they attended to."""


def excess(maps: Tensor, word: int, beyond: Beyond) -> Tensor:
    """``[image_tokens]`` attention of one word beyond what is expected of it, >= 0.

    Args:
        maps: ``[words, image_tokens]`` attention of all words of the answer, in order.
        word: Number of the word.
        beyond: ``mean`` expects the mean over all words; ``position`` expects, for each image token
            by itself, what the least-squares line through all words says at the word's place.

    Raises:
        ConfigError: There are fewer than three words.
    """
    if beyond == "nothing":
        return maps[word]
    if len(maps) < FEWEST_WORDS:
        raise ConfigError(
            f"attention beyond the {beyond} compares words, and the answer has {len(maps)}; "
            f"{FEWEST_WORDS} are the fewest. Leave beyond out."
        )
    mean = maps.mean(dim=0)
    if beyond == "mean":
        return (maps[word] - mean).clamp(min=0)
    place = torch.arange(len(maps), dtype=maps.dtype)
    place = place - place.mean()
    slope = (place @ (maps - mean)) / place.square().sum()
    return (maps[word] - mean - slope * place[word]).clamp(min=0)
