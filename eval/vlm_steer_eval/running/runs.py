"""Finished runs, read back from their folders to be compared."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm_steer.errors import ConfigError, DataError
from vlm_steer_eval.benchmarks.questions import list_some
from vlm_steer_eval.benchmarks.registry import BENCHMARKS
from vlm_steer_eval.files import read_json, read_rows
from vlm_steer_eval.statistics.counts import COUNTS_NAME, Unit, read_units

from .parts import local_copy, remote_url

__all__ = ["Cost", "RunArm", "Runs", "load_runs", "read_costs"]

_SCORING = (
    "parser",
    "normaliser",
    "similarity",
    "reader",
    "part",
    "images_only",
    "judge",
    "reading",
)
_FILES = ("scores.json", COUNTS_NAME, "samples.jsonl", "timings*.jsonl")


@dataclass(frozen=True)
class Cost:
    """What generating cost, from the log of timings.

    Attributes:
        answers: answers generated.
        tokens: tokens generated.
        seconds: wall-clock time.
        passes: rows that went through the decoder; None where they were not counted.
        memory: largest peak in bytes; None where it was not measured.
    """

    answers: int
    tokens: int
    seconds: float
    passes: int | None = 0
    memory: int | None = None


@dataclass(frozen=True)
class RunArm:
    """One arm of a run.

    Attributes:
        name: how the comparison calls it.
        units: unit id -> counts.
        samples: unit id -> the row of `samples.jsonl`; empty where units are not single answers.
        cost: None where nothing was timed.
    """

    name: str
    units: Mapping[str, Unit]
    samples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cost: Cost | None = None


@dataclass(frozen=True)
class Runs:
    """Arms of one benchmark, counted by the same rule.

    Attributes:
        benchmark: its name.
        scoring: the rule: parser, normaliser and the like.
        arms: by name, the baseline first.
        baseline: the arm that the others are compared with.
        excluded: units left out since not every arm has them.
        seeds: the units of each seed, where runs under several were pooled.
    """

    benchmark: str
    scoring: Mapping[str, Any]
    arms: Mapping[str, RunArm]
    baseline: str
    excluded: Sequence[str] = ()
    seeds: Sequence[Sequence[str]] = ()


def load_runs(
    folders: Sequence[Path],
    *,
    baseline: str | None = None,
    missing: Literal["error", "exclude"] = "error",
    pool: bool = False,
) -> Runs:
    """Read the folders that `eval` and `score` have written.

    Args:
        folders: each gives one arm (`score`), or all of its arms (`eval`). An arm of several
            folders is called after its folder, `FOLDER` or `FOLDER/ARM`. Addresses such as
            `s3://bucket/run` are folders too.
        baseline: name of an arm; the first one by default, which is the unsteered arm of `eval`.
        missing: what to do about units that not every arm has: stop, or leave them out.
        pool: take the folders for one run under several seeds: arms of equal names are one arm,
            in which every image has an answer per seed.

    Raises:
        ConfigError: fewer than two arms, runs to be pooled that have different arms, an unknown
            baseline, or runs that cannot be compared.
        DataError: a folder holds no finished run, an address cannot be used, or the runs cover
            different units.
    """
    by_run: list[list[RunArm]] = []
    if pool and len(folders) == 1:
        raise ConfigError("--pool takes several folders, one per seed; give them, or leave it out")
    rules: dict[str, tuple[str, dict[str, Any]]] = {}
    for run in folders:
        with local_copy(run, _FILES) as folder:
            scores = _scores(run, folder)
            rule = (scores["benchmark"], {key: scores[key] for key in _SCORING if key in scores})
            _refuse_other_rule(rules, run, rule)
            by_run.append(_arms(folder, scores, several=len(folders) > 1 and not pool))
    arms = _pooled(folders, by_run) if pool else _distinct(by_run)
    if len(arms) < 2:
        raise ConfigError(f"{folders[0]} holds a single arm; give another run to compare it with")
    chosen = baseline if baseline is not None else next(iter(arms))
    if chosen not in arms:
        raise ConfigError(f"--baseline {chosen!r} is no arm; choose one of {', '.join(arms)}")
    ordered = {chosen: arms[chosen], **arms}
    benchmark, scoring = next(iter(rules.values()))
    common, excluded = _common(ordered, missing)
    seeds = [[u for u in common if u.startswith(f"{n}/")] for n in range(len(folders))]
    return Runs(
        benchmark,
        scoring,
        {name: _only(arm, common) for name, arm in ordered.items()},
        chosen,
        excluded,
        seeds if pool else (),
    )


def _distinct(by_run: Sequence[Sequence[RunArm]]) -> dict[str, RunArm]:
    arms: dict[str, RunArm] = {}
    for arm in (arm for run in by_run for arm in run):
        if arm.name in arms:
            raise ConfigError(
                f"two runs are called {arm.name!r}; rename one of the folders, or give it once"
            )
        arms[arm.name] = arm
    return arms


def _pooled(folders: Sequence[Path], by_run: Sequence[Sequence[RunArm]]) -> dict[str, RunArm]:
    """Arms of equal names as one, whose units are called `NUMBER OF THE RUN/UNIT`."""
    names = [arm.name for arm in by_run[0]]
    for folder, run in zip(folders, by_run, strict=True):
        if [arm.name for arm in run] != names:
            raise ConfigError(
                f"--pool: {folder} has the arms {', '.join(arm.name for arm in run)} and "
                f"{folders[0]} has {', '.join(names)}; pool runs of the same arms that differ in "
                "their seeds"
            )
    return {
        group[0].name: RunArm(
            group[0].name,
            {
                f"{n}/{name}": unit
                for n, arm in enumerate(group)
                for name, unit in arm.units.items()
            },
            {
                f"{n}/{name}": row
                for n, arm in enumerate(group)
                for name, row in arm.samples.items()
            },
            _total([arm.cost for arm in group if arm.cost is not None]),
        )
        for group in zip(*by_run, strict=True)
    }


def _total(costs: Sequence[Cost]) -> Cost | None:
    return None if not costs else functools.reduce(_added, costs)


def _added(one: Cost, other: Cost) -> Cost:
    return Cost(
        one.answers + other.answers,
        one.tokens + other.tokens,
        one.seconds + other.seconds,
        _sum(one.passes, other.passes),
        max(filter(None, (one.memory, other.memory)), default=None),
    )


def _scores(run: Path, folder: Path) -> dict[str, Any]:
    path = folder / "scores.json"
    if not path.is_file():
        raise DataError(
            f"{remote_url(run) or run} holds no scores.json; give a folder that `vlm-steer eval` "
            "or `vlm-steer score` has written"
        )
    scores = read_json(path)
    if not isinstance(scores, dict) or scores.get("benchmark") not in BENCHMARKS:
        raise DataError(f"{run}/scores.json names no benchmark to compare; score the run again")
    return scores


def _refuse_other_rule(
    rules: dict[str, tuple[str, dict[str, Any]]], folder: Path, rule: tuple[str, dict[str, Any]]
) -> None:
    for other, known in rules.items():
        if known != rule:
            raise ConfigError(
                f"{other} is {known[0]} {known[1]} and {folder} is {rule[0]} {rule[1]}; only runs "
                "of one benchmark, scored by one rule, can be compared: score one of them again"
            )
    rules[str(folder)] = rule


def _arms(folder: Path, scores: Mapping[str, Any], *, several: bool) -> list[RunArm]:
    width = len(BENCHMARKS[scores["benchmark"]].columns)
    units = read_units(folder / COUNTS_NAME, width)
    samples = _samples(folder / "samples.jsonl", units)
    costs = read_costs(sorted(folder.glob("timings*.jsonl")))
    label = folder.resolve().name
    is_scored = "arms" not in scores
    return [
        RunArm(
            label if is_scored else f"{label}/{arm}" if several else arm,
            by_unit,
            samples.get(arm, {}),
            costs.get(arm),
        )
        for arm, by_unit in units.items()
    ]


def _samples(
    path: Path, units: Mapping[str, Mapping[str, Unit]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """The answers behind the units, where there is exactly one answer per unit."""
    rows = read_rows(path) if path.is_file() else []
    only = next(iter(units)) if len(units) == 1 else None
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(str(row.get("arm", only)), []).append(row)
    return {
        arm: dict(zip(by_unit, by_arm[arm], strict=True))
        for arm, by_unit in units.items()
        if len(by_arm.get(arm, ())) == len(by_unit)
    }


def read_costs(paths: Sequence[Path]) -> dict[str, Cost]:
    """Arm -> what it cost, summed over logs of timings."""
    costs: dict[str, Cost] = {}
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    for line in (line for text in texts for line in text.splitlines()):
        try:
            row = json.loads(line)
            more = Cost(
                row["answers"], row["tokens"], row["seconds"], row.get("passes"), row.get("memory")
            )
            costs[row["arm"]] = _added(costs.get(row["arm"], Cost(0, 0, 0.0)), more)
        except (ValueError, KeyError, TypeError):
            continue  # a kill tears the last line, and timings prove nothing anyway
    return costs


def _sum(known: int | None, more: int | None) -> int | None:
    return None if known is None or more is None else known + more


def _common(
    arms: Mapping[str, RunArm], missing: Literal["error", "exclude"]
) -> tuple[list[str], list[str]]:
    everything = dict.fromkeys(unit for arm in arms.values() for unit in arm.units)
    common = [unit for unit in everything if all(unit in arm.units for arm in arms.values())]
    excluded = [unit for unit in everything if unit not in set(common)]
    if not common or (excluded and missing == "error"):
        unlike = next(a.name for a in arms.values() if len(a.units) < len(everything))
        raise DataError(
            f"{len(excluded)} units ({list_some(excluded)}) are not in every run; {unlike!r} "
            "lacks some. Complete the runs, or pass --missing exclude to compare the "
            f"{len(common)} that all have"
        )
    return common, excluded


def _only(arm: RunArm, units: Sequence[str]) -> RunArm:
    """The arm with these units, in this order."""
    return RunArm(
        arm.name,
        {unit: arm.units[unit] for unit in units},
        {unit: arm.samples[unit] for unit in units if unit in arm.samples},
        arm.cost,
    )
