"""Flag and drop: captions without the sentences that a detector finds risky."""

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from vlm_steer.detection import Unit
from vlm_steer_eval.benchmarks.chair import CHAIR_METRICS, Normaliser, score_caption
from vlm_steer_eval.statistics.metrics import Floats, summarise

from .data import Collected

__all__ = ["DROPPED", "drop_curve", "without_risky_sentences"]

DROPPED = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of mentions that are flagged, the riskiest first."""

_SENTENCE = re.compile(r"[^.!?]*(?:[.!?]+|$)\s*")


def without_risky_sentences(text: str, units: Sequence[Unit], is_flagged: Sequence[bool]) -> str:
    """A text without the sentences that hold a flagged unit."""
    flagged = [unit.span for unit, bad in zip(units, is_flagged, strict=True) if bad]
    kept = [
        sentence.group()
        for sentence in _SENTENCE.finditer(text)
        if not any(a < sentence.end() and b > sentence.start() for a, b in flagged)
    ]
    return "".join(kept)


def drop_curve(
    risk: Floats,
    data: Collected,
    truth: Mapping[str, Set[str]],
    normaliser: Normaliser,
    *,
    shares: Sequence[float] = DROPPED,
    n_resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """CHAIR of captions whose riskiest mentions were dropped, sentence and all.

    Args:
        risk: `[n]` of the units of `data`, labelled or not.
        data: mentions, with the texts they are in.
        truth: item id -> objects of its image.
        normaliser: reads the captions.
        shares: shares of mentions to flag, in [0, 1].
        n_resamples: bootstrap resamples, > 0.
        seed: of these.

    Returns:
        Per share: `flagged`, and the metrics of CHAIR with intervals clustered by image.
    """
    members: dict[str, list[int]] = {item: [] for item in data.texts}
    for index, item in enumerate(data.item):
        members[item].append(index)
    order = np.argsort(np.argsort(-risk, kind="stable"), kind="stable")
    curve = []
    for share in shares:
        is_flagged = order < round(share * len(risk))
        rows = []
        for item, indices in members.items():
            units = [data.units[i] for i in indices]
            text = without_risky_sentences(data.texts[item], units, is_flagged[indices].tolist())
            rows.append(score_caption(normaliser.read(text), truth[item]).counts())
        metrics = summarise(CHAIR_METRICS, rows, list(members), n_resamples=n_resamples, seed=seed)
        curve.append({"flagged": share, **metrics})
    return curve
