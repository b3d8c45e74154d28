"""Scores of attention heads on disk, in the format of the retrieval-head detectors."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TypeAlias

from vlm_steer.errors import DataError

__all__ = ["Head", "read_head_scores", "write_head_scores"]

Head: TypeAlias = tuple[int, int]
"""Layer and head within it, from 0."""


def read_head_scores(path: str | os.PathLike[str]) -> dict[Head, float]:
    """The mean score of every head of a file, best first; ties by layer and head.

    Args:
        path: A JSON object from ``"layer-head"`` to a list of scores, one per trial. Files that
            detectors of retrieval heads publish have this format.

    Raises:
        DataError: There is no such file, or it holds something else.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise DataError(f"head scores {name} do not exist. Make them with vlm-steer build decore.")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{name} is not JSON ({error}).") from None
    if not isinstance(data, dict) or not data:
        raise DataError(f'{name} is no object from "layer-head" to a list of scores.')
    scores = dict(_entry(name, key, value) for key, value in data.items())
    return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))


def write_head_scores(path: str | os.PathLike[str], scores: Mapping[Head, Sequence[float]]) -> None:
    """Write what ``read_head_scores`` reads."""
    data = {f"{layer}-{head}": list(values) for (layer, head), values in scores.items()}
    Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")


def _entry(name: str, key: str, value: object) -> tuple[Head, float]:
    layer, _, head = key.partition("-")
    is_list = isinstance(value, list) and value and all(_is_number(v) for v in value)
    if not (layer.isdecimal() and head.isdecimal() and is_list and isinstance(value, list)):
        raise DataError(
            f'{name}: {key!r} is not "layer-head" with a list of finite scores, such as '
            '"14-3": [0.2, 0.4].'
        )
    return (int(layer), int(head)), fmean(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
