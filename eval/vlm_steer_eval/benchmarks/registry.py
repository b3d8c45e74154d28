"""The metrics of every benchmark, by name."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from vlm_steer_eval.statistics.metrics import MetricSet

from .amber import AMBER_METRICS
from .beaf import BEAF_METRICS
from .chair import CHAIR_METRICS
from .hallusionbench import HALLUSION_METRICS
from .mme import MME_METRICS
from .mmhal import MMHAL_METRICS
from .mmvp import MMVP_METRICS
from .opope import OPOPE_METRICS
from .pope import POPE_METRICS
from .sycophancy import SYCOPHANCY_METRICS

__all__ = ["BENCHMARKS", "BINARY", "discordant"]

BENCHMARKS: Mapping[str, MetricSet] = MappingProxyType(
    {
        "pope": POPE_METRICS,
        "chair": CHAIR_METRICS,
        "amber": AMBER_METRICS,
        "mme": MME_METRICS,
        "hallusionbench": HALLUSION_METRICS,
        "opope": OPOPE_METRICS,
        "beaf": BEAF_METRICS,
        "mmhal": MMHAL_METRICS,
        "mmvp": MMVP_METRICS,
        "sycophancy": SYCOPHANCY_METRICS,
    }
)

BINARY: Mapping[str, tuple[str, tuple[str, ...], bool]] = MappingProxyType(
    {
        "pope": ("accuracy", ("TP", "TN"), True),
        "opope": ("accuracy", ("TP", "TN"), True),
        "beaf": ("accuracy", ("TP", "TN"), True),
        "mmvp": ("pair_accuracy", ("right_pairs",), True),
        "chair": ("CHAIRs", ("hallucinating",), False),
    }
)
"""Benchmark -> the metric that is a share of units, its columns, and whether more is better."""


def discordant(
    benchmark: str, before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> tuple[int, int]:
    """Units that only the first arm, and that only the second arm, has by the `BINARY` metric.

    Args:
        benchmark: a key of `BINARY`.
        before: rows of counts.
        after: rows of the same units.
    """
    _, columns, _ = BINARY[benchmark]
    indices = [BENCHMARKS[benchmark].columns.index(column) for column in columns]
    first, second = (np.asarray(rows)[:, indices].any(1) for rows in (before, after))
    return int((first & ~second).sum()), int((second & ~first).sum())
