"""What a setting scores on the tuning images, part by part."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from vlm_steer.config import dump
from vlm_steer.engine.hooks import Method
from vlm_steer_eval.benchmarks.registry import BENCHMARKS
from vlm_steer_eval.benchmarks.tasks import Task
from vlm_steer_eval.running.arms import BASELINE, Arm
from vlm_steer_eval.running.generation import Settings
from vlm_steer_eval.running.runner import run_arms
from vlm_steer_eval.running.runs import Cost, read_costs
from vlm_steer_eval.statistics.metrics import compare, summarise
from vlm_steer_eval.statistics.resampling import cluster_totals

from .data import Material
from .goals import COSTS, METRICS, Goals

__all__ = [
    "Counts",
    "Meter",
    "Score",
    "cost_ratio",
    "difference",
    "judged",
    "per_token",
    "restricted",
    "setting_key",
    "summary",
]

Counts: TypeAlias = dict[str, dict[str, list[float]]]
"""Benchmark -> image -> the sums of its answers' counts."""

_TUNED = "tuned"


@dataclass
class Score:
    """What is known of a setting.

    Attributes:
        counts: what the metrics are computed from.
        spent: cost -> what generating took per token; None where it is not known.
        notes: what the steering had to say.
    """

    counts: Counts = field(default_factory=dict)
    spent: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"counts": self.counts, "spent": self.spent}


class Meter:
    """A model on the material of a study.

    Args:
        model: an image-text-to-text model.
        processor: its processor.
        model_name: what the user calls it.
        material: the data.
        generation: settings, but for the length of answers.
        batch_size: items per batch.
        folder: where answers are logged, one folder per setting.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        model_name: str,
        material: Material,
        generation: Mapping[str, Any],
        batch_size: int,
        folder: Path,
    ) -> None:
        self.model = model
        self.processor = processor
        self.model_name = model_name
        self.material = material
        self.batch_size = batch_size
        self.settings = {
            name: Settings(max_new_tokens=tokens, **generation)
            for name, tokens in material.tokens.items()
        }
        self._folder = folder

    @property
    def n_parts(self) -> int:
        """Parts in which every setting is measured."""
        return max(len(parts) for parts in self.material.parts.values())

    def add(self, score: Score, methods: Sequence[Method], part: int) -> None:
        """Measure a setting on one more part; answers that are logged are not generated again.

        Raises:
            SteerError: the setting is refused, or memory runs out.
            DataError: the disk is full, or another run is writing the same answers.
        """
        folder = self._folder / setting_key(methods)
        arm = Arm(_TUNED if methods else BASELINE, tuple(methods))
        for name, parts in self.material.parts.items():
            for task in parts[part : part + 1]:
                score.counts.setdefault(name, {}).update(self._run(score, arm, name, task, folder))
        logs = [log for name in self.material.parts for log in (folder / name).glob("timings*")]
        score.spent = per_token(read_costs(logs).get(arm.name))

    def whole(self, methods: Sequence[Method]) -> Score:
        """Measure a setting on all parts."""
        score = Score()
        for part in range(self.n_parts):
            self.add(score, methods, part)
        return score

    def _run(
        self, score: Score, arm: Arm, name: str, task: Task, folder: Path
    ) -> dict[str, list[float]]:
        run = run_arms(
            task,
            [arm],
            self.model,
            self.processor,
            model_name=self.model_name,
            settings=self.settings[name],
            batch_size=self.batch_size,
            output=folder / name,
            share_prefix=name == "pope",
        )
        score.notes += [n for n in run.notes[arm.name] if n not in score.notes]
        records = run.records[arm.name]
        items = [item for item in task.items if item.id in records]
        rows = [task.score(item, records[item.id]["text"]).counts for item in items]
        clusters = [item.cluster for item in items]
        totals = cluster_totals(rows, clusters).tolist()
        return dict(zip(sorted(set(clusters)), totals, strict=True))


def per_token(cost: Cost | None) -> dict[str, float | None]:
    """What a token cost, by the names of the goals."""
    if cost is None or not cost.tokens:
        return dict.fromkeys(COSTS)
    spent: dict[str, float | None] = {}
    for name in COSTS:
        total = getattr(cost, METRICS[name].formula)
        spent[name] = None if total is None else total / cost.tokens
    return spent


def setting_key(methods: Sequence[Method]) -> str:
    """A short name of a setting for folders; equal settings have equal names."""
    if not methods:
        return BASELINE
    text = json.dumps(dump(methods), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _value(metric: str, score: Score, baseline: Score) -> float | None:
    """A metric in its unit; None where it is undefined."""
    if metric in COSTS:
        return cost_ratio(metric, score, baseline)
    known = METRICS[metric]
    found = summary(metric, score, n_resamples=1)["value"]
    return None if found is None else known.scale * found


def cost_ratio(metric: str, score: Score, baseline: Score) -> float | None:
    """A cost relative to the baseline's; None where either is unknown."""
    own, other = score.spent.get(metric), baseline.spent.get(metric)
    return own / other if own and other else None


def summary(metric: str, score: Score, *, n_resamples: int = 10_000) -> dict[str, Any]:
    """A metric's value and interval, resampling images; not scaled to the unit."""
    known = METRICS[metric]
    counts = score.counts[known.benchmark]
    return summarise(
        BENCHMARKS[known.benchmark], list(counts.values()), list(counts), n_resamples=n_resamples
    )[known.formula]


def difference(
    metric: str, score: Score, other: Score, *, n_resamples: int = 10_000
) -> dict[str, Any]:
    """A metric's paired difference `score - other` with its interval, on the images of `score`."""
    known = METRICS[metric]
    counts = score.counts[known.benchmark]
    before = [other.counts[known.benchmark][image] for image in counts]
    return compare(
        BENCHMARKS[known.benchmark],
        before,
        list(counts.values()),
        list(counts),
        n_resamples=n_resamples,
    )[known.formula]


def restricted(score: Score, like: Score) -> Score:
    """A score on the images of another."""
    counts = {
        name: {image: score.counts[name][image] for image in images}
        for name, images in like.counts.items()
    }
    return Score(counts, score.spent)


def judged(goals: Goals, score: Score, baseline: Score) -> dict[str, float | None]:
    """Every metric that matters."""
    return {name: _value(name, score, baseline) for name in goals.metrics}
