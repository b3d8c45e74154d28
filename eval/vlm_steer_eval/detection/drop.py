"""Flag and drop: captions without the sentences that a detector finds risky."""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from vlm_steer.detection import Unit
from vlm_steer_eval.benchmarks.chair import CHAIR_METRICS, Normaliser, score_caption
from vlm_steer_eval.statistics.frontier import Axes, frontier
from vlm_steer_eval.statistics.metrics import Floats, summarise

from .data import Collected

__all__ = ["DROPPED", "Dropping", "cut_short", "drop_curves", "without_risky_sentences"]

DROPPED = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of mentions that are flagged, the riskiest first."""

Shorten: TypeAlias = Callable[[str, Sequence[Unit], Sequence[bool]], str]

_DRAWS = 20

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


def cut_short(text: str, units: Sequence[Unit], is_flagged: Sequence[bool]) -> str:
    """A text up to its first flagged unit: what asking for fewer words leaves of it."""
    ends = [unit.span[0] for unit, bad in zip(units, is_flagged, strict=True) if bad]
    return text[: min(ends)].rstrip() if ends else text


@dataclass(frozen=True, eq=False)
class Dropping:
    """Captions that can lose their riskiest parts, and what CHAIR says of the rest.

    Attributes:
        data: mentions, labelled or not, with the texts they are in.
        truth: item id -> objects of its image.
        normaliser: reads the captions.
    """

    data: Collected
    truth: Mapping[str, Set[str]]
    normaliser: Normaliser

    def counts(
        self, risk: Floats, share: float, shorten: Shorten = without_risky_sentences
    ) -> list[list[float]]:
        """One row of `CHAIR_METRICS.columns` per caption.

        Args:
            risk: `[n]` of the units of `data`.
            share: of mentions to flag, the riskiest first, in [0, 1].
            shorten: what a caption loses where a mention is flagged.
        """
        order = np.argsort(np.argsort(-risk, kind="stable"), kind="stable")
        is_flagged = order < round(share * len(risk))
        rows = []
        for item, indices in self._members.items():
            units = [self.data.units[i] for i in indices]
            text = shorten(self.data.texts[item], units, is_flagged[indices].tolist())
            score = score_caption(self.normaliser.read(text), self.truth[item])
            rows.append([float(count) for count in score.counts()])
        return rows

    @cached_property
    def _members(self) -> Mapping[str, list[int]]:
        members: dict[str, list[int]] = {item: [] for item in self.data.texts}
        for index, item in enumerate(self.data.item):
            members[item].append(index)
        return members

    def trivial(
        self, shares: Sequence[float], *, seed: int = 0
    ) -> dict[str, list[list[list[float]]]]:
        """Rows of `counts` per share, for what needs no detector.

        `position` flags the last mentions, `random` any (the mean of 20 draws), and `cut short`
        ends captions before the last ones.
        """
        word = self.data.words.numpy()
        generator = np.random.default_rng(seed)
        drawn = [generator.random(len(word)) for _ in range(_DRAWS)]
        return {
            "position": [self.counts(word, share) for share in shares],
            "random": [
                np.mean([self.counts(risk, share) for risk in drawn], axis=0).tolist()
                for share in shares
            ],
            "cut short": [self.counts(word, share, cut_short) for share in shares],
        }


def drop_curves(
    risks: Mapping[str, Floats],
    dropping: Dropping,
    *,
    shares: Sequence[float] = DROPPED,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """CHAIR of captions whose riskiest mentions were dropped, beside what needs no detector.

    Args:
        risks: detector -> `[n]` of the units.
        dropping: the captions.
        shares: shares of mentions to flag, in (0, 1].
        n_resamples: bootstrap resamples, > 0.
        seed: of these, and of dropping at random.

    Returns:
        `whole`: the metrics of CHAIR with intervals clustered by image; `trivial` and `detectors`:
        name -> per share `flagged` and these metrics, and for detectors `against_trivial`, the
        verdict of `frontier` on that point.
    """
    curves = {
        name: [dropping.counts(risk, share) for share in shares] for name, risk in risks.items()
    }
    trivial = dropping.trivial(shares, seed=seed)
    whole = dropping.counts(np.zeros(len(dropping.data.units)), 0.0)
    items = list(dropping.data.texts)
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    verdicts = frontier(
        CHAIR_METRICS,
        Axes("Recall", "CHAIRi"),
        {"whole": whole, **_points(trivial, shares)},
        _points(curves, shares),
        items,
        **options,
    )["verdicts"]

    def shown(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
        return summarise(CHAIR_METRICS, rows, items, **options)

    return {
        "whole": shown(whole),
        "trivial": {
            name: [
                {"flagged": share, **shown(rows)} for share, rows in zip(shares, curve, strict=True)
            ]
            for name, curve in trivial.items()
        },
        "detectors": {
            name: [
                {"flagged": share, **shown(rows), "against_trivial": verdicts[_point(name, share)]}
                for share, rows in zip(shares, curve, strict=True)
            ]
            for name, curve in curves.items()
        },
    }


def _points(
    curves: Mapping[str, Sequence[list[list[float]]]], shares: Sequence[float]
) -> dict[str, list[list[float]]]:
    return {
        _point(name, share): rows
        for name, curve in curves.items()
        for share, rows in zip(shares, curve, strict=True)
    }


def _point(name: str, share: float) -> str:
    return f"{name} at {share}"
