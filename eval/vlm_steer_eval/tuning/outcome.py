"""What a study found: values with intervals, the point chosen, and whether it holds elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_steer.engine.hooks import Method
from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.running.arms import BASELINE
from vlm_steer_eval.running.pipeline import Evaluation, run_benchmark
from vlm_steer_eval.running.runs import read_costs

from .goals import COSTS, METRICS, Goals
from .measure import Meter, Score, cost_ratio, difference, per_token, summary
from .plan import COMPROMISE
from .study import TuningStudy

__all__ = ["choose", "confirm", "confirmed", "describe"]

_TUNED = "tuned"


def describe(
    goals: Goals, score: Score, baseline: Score, *, n_resamples: int = 10_000
) -> dict[str, dict[str, Any]]:
    """Metric -> value and paired difference to the baseline, with intervals, in the metric's unit.

    Costs are ratios without an interval.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name in goals.metrics:
        if name in COSTS:
            ratio = cost_ratio(name, score, baseline)
            entries[name] = {"value": ratio, "ci95": None, "difference": None}
            continue
        scale = METRICS[name].scale
        entries[name] = {
            **_scaled(summary(name, score, n_resamples=n_resamples), scale),
            "difference": _scaled(
                difference(name, score, baseline, n_resamples=n_resamples), scale
            ),
        }
    return entries


def choose(
    study: TuningStudy, goals: Goals, baseline: Mapping[str, Any], rule: str, number: int | None
) -> Any:
    """The trial of the front to confirm.

    Args:
        study: a study without running trials.
        goals: its goals.
        baseline: metric -> the unsteered value.
        rule: `compromise`, or the objective that decides.
        number: the user's own choice of a complete trial, which wins.

    Raises:
        ConfigError: the user's choice is no complete trial.
        DataError: no complete trial keeps the constraints.
    """
    if number is not None:
        chosen = [trial for trial in study.complete() if trial.number == number]
        if not chosen:
            known = ", ".join(str(trial.number) for trial in study.complete())
            raise ConfigError(f"--choose {number} is no complete trial; they are {known or 'none'}")
        return chosen[0]
    front = study.front()
    if not front:
        raise DataError(
            f"none of the {len(study.trials())} trials was completed within the constraints; widen "
            "the ranges or the bounds in another folder, or try more settings with --trials. "
            "All results are kept"
        )
    gains = {
        o.metric: {t.number: o.sign * t.values[i] for t in front}
        for i, o in enumerate(goals.objectives)
    }
    if rule != COMPROMISE:
        return max(front, key=lambda trial: gains[rule][trial.number])
    for objective in goals.objectives:
        known = baseline[objective.metric]
        ends = [*gains[objective.metric].values(), objective.sign * known]
        width = (max(ends) - min(ends)) or 1.0
        for trial in front:
            gains[objective.metric][trial.number] /= width
    return max(front, key=lambda trial: sum(of[trial.number] for of in gains.values()))


def confirm(
    meter: Meter, methods: tuple[Method, ...], folder: Path, *, n_resamples: int, seed: int
) -> dict[str, Evaluation]:
    """Run a setting against no steering on the held-out images: benchmark -> evaluation."""
    return {
        name: run_benchmark(
            task,
            {_TUNED: methods},
            meter.model,
            meter.processor,
            model_name=meter.model_name,
            settings=meter.settings[name],
            batch_size=meter.batch_size,
            output=folder / name,
            n_resamples=n_resamples,
            seed=seed,
            share_prefix=name == "pope",
        )
        for name, task in meter.material.held_out.items()
    }


def confirmed(
    goals: Goals, evaluations: Mapping[str, Evaluation], folder: Path
) -> dict[str, dict[str, Any]]:
    """Metric -> held-out value, paired difference and p, in the metric's unit."""
    entries: dict[str, dict[str, Any]] = {}
    costs = read_costs(
        [path for name in evaluations for path in (folder / name).glob("timings*.jsonl")]
    )
    tuned, unsteered = (Score({}, per_token(costs.get(arm))) for arm in (_TUNED, BASELINE))
    for name in goals.metrics:
        metric = METRICS[name]
        if name in COSTS:
            ratio = cost_ratio(name, tuned, unsteered)
            entries[name] = {"value": ratio, "ci95": None, "difference": None}
            continue
        scores = evaluations[metric.benchmark].summary
        part = list(scores["arms"][_TUNED])[-1]
        found = scores["differences"][_TUNED][part][metric.formula]
        entries[name] = {
            **_scaled(scores["arms"][_TUNED][part]["metrics"][metric.formula], metric.scale),
            "difference": {**_scaled(found, metric.scale), "p": found["p"]},
        }
    return entries


def _scaled(entry: Mapping[str, Any], scale: float) -> dict[str, Any]:
    value, interval = entry["value"], entry["ci95"]
    return {
        "value": None if value is None else scale * value,
        "ci95": None if interval is None else [scale * end for end in interval],
    }
