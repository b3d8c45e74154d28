"""The metrics of every benchmark, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from .amber import AMBER_METRICS
from .beaf import BEAF_METRICS
from .chair import CHAIR_METRICS
from .hallusionbench import HALLUSION_METRICS
from .metrics import MetricSet
from .mme import MME_METRICS
from .mmhal import MMHAL_METRICS
from .opope import OPOPE_METRICS
from .pope import POPE_METRICS

__all__ = ["BENCHMARKS", "BINARY"]

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
    }
)

BINARY: Mapping[str, tuple[str, tuple[str, ...], bool]] = MappingProxyType(
    {
        "pope": ("accuracy", ("TP", "TN"), True),
        "opope": ("accuracy", ("TP", "TN"), True),
        "beaf": ("accuracy", ("TP", "TN"), True),
        "chair": ("CHAIRs", ("hallucinating",), False),
    }
)
"""Benchmark -> the metric that is a share of units, its columns, and whether more is better."""
