"""From answers to scores: intervals per arm and split, paired differences, parser sensitivity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_steer.errors import DataError
from vlm_steer_eval.benchmarks.first_token import first_token_scores, ranked_auroc
from vlm_steer_eval.benchmarks.registry import BINARY, discordant
from vlm_steer_eval.benchmarks.scoring import (
    EDITED_PAIR,
    PAIR_METRICS,
    pair_rows,
    parser_sensitivity,
)
from vlm_steer_eval.benchmarks.tasks import Item, Scored, Task
from vlm_steer_eval.statistics.closed_form import holm, mcnemar
from vlm_steer_eval.statistics.counts import Unit
from vlm_steer_eval.statistics.metrics import compare, summarise

from .arms import BASELINE, is_tested
from .runner import RunResult

__all__ = ["ALL", "Scores", "auroc", "evaluate", "sample_rows", "score_all", "units"]

ALL = "all"
"""All splits pooled."""

_RANKINGS = 1000
"""Resamples of what has to be ranked anew in each of them."""

Scores = dict[str, dict[str, Scored]]


def score_all(task: Task, run: RunResult) -> Scores:
    """Score every answer: arm -> item id -> score."""
    items = {item.id: item for item in task.items}
    return {
        arm: {name: task.score(items[name], record["text"]) for name, record in records.items()}
        for arm, records in run.records.items()
    }


def evaluate(
    task: Task, run: RunResult, scores: Scores, *, n_resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """The contents of `scores.json`.

    Args:
        task: the benchmark.
        run: its answers.
        scores: from `score_all`.
        n_resamples: bootstrap resamples and relabellings, > 0.
        seed: seed of both.

    Returns:
        `arms`: arm -> split -> `metrics`, `n`, truncated and (for yes/no tasks) `auroc`
            and `first_token`;
        `differences`: arm -> split -> metric -> paired difference against `none` with interval, p
            and, for methods under test, p after Holm's correction over these;
        `uncorrected`: the arms without that, controls and trivial baselines; and what else there is
        to know about the run.

    Raises:
        DataError: answers count in groups, and none of them is whole.
    """
    usable = [item for item in task.items if item.id in run.records[BASELINE]]
    counted = units(task, scores)
    if not counted[BASELINE]:
        first = run.failures[0]["error"] if run.failures else "questions are missing"
        raise DataError(
            f"no group of questions of {task.name} is whole, so nothing can be counted "
            f"({first.rstrip('.')}); mend that and run the same command again, which adds what is "
            "missing"
        )
    parts = _parts(counted[BASELINE], usable)
    result: dict[str, Any] = {
        "benchmark": task.name,
        **task.scoring,
        "baseline": BASELINE,
        "n_items": len(usable),
        "n_images": len({item.cluster for item in usable}),
        "arms": {
            arm: {
                name: _summary(task, part, counted[arm], run.records[arm], n_resamples, seed)
                for name, part in parts.items()
            }
            for arm in run.records
        },
        "differences": {
            arm: {
                name: _difference(task, part, counted[BASELINE], counted[arm], n_resamples, seed)
                for name, part in parts.items()
            }
            for arm in run.records
            if arm != BASELINE
        },
        "uncorrected": [arm for arm in run.records if arm != BASELINE and not is_tested(arm)],
        "changed_nothing": _idle_arms(run),
        "notes": {arm: notes for arm, notes in run.notes.items() if notes},
        "excluded": run.failures,
    }
    _adjust(result["differences"])
    if task.name == "pope":
        result["parsers"] = {
            arm: parser_sensitivity(
                [records[item.id]["text"] for item in usable],
                [item.gold["label"] for item in usable],
            )
            for arm, records in run.records.items()
        }
        if set(parts) == EDITED_PAIR | {ALL}:
            result["pairs"] = _pairs(counted, n_resamples, seed)
    return result


def sample_rows(task: Task, run: RunResult, scores: Scores) -> list[dict[str, Any]]:
    """One row per answer: what was asked, what came back, and how it was read."""
    return [
        {
            "arm": arm,
            "item": item.id,
            "split": item.split,
            "image": item.image.name,
            **{key: value for key, value in record.items() if key not in ("arm", "item", "key")},
            **scores[arm][item.id].details,
        }
        for arm, records in run.records.items()
        for item in task.items
        if (record := records.get(item.id)) is not None
    ]


def units(task: Task, scores: Scores) -> dict[str, list[Unit]]:
    """Arm -> the counts that its metrics are computed from."""
    return {arm: task.units(by_item) for arm, by_item in scores.items()}


def auroc(margins: Sequence[float | None], positives: Sequence[bool]) -> float | None:
    """Probability that a positive's margin exceeds a negative's, ties counting half.

    None where either side is missing, or no margin was measured.
    """
    known = [(m, p) for m, p in zip(margins, positives, strict=True) if m is not None]
    if not known:
        return None
    values, truth = (np.array(column) for column in zip(*known, strict=True))
    area = float(ranked_auroc(values, truth, np.ones((1, len(values))))[0])
    return None if np.isnan(area) else area


@dataclass(frozen=True)
class _Part:
    """A part of a benchmark: indices of its units, and the items that they come from."""

    indices: Sequence[int]
    items: Sequence[Item]

    def counts(self, units: Sequence[Unit]) -> list[Sequence[float]]:
        return [units[index].counts for index in self.indices]

    def clusters(self, units: Sequence[Unit]) -> list[str]:
        return [units[index].cluster for index in self.indices]


def _parts(units: Sequence[Unit], items: Sequence[Item]) -> dict[str, _Part]:
    """The parts in order of appearance, and all of them last where there are several.

    Where an answer serves several parts, such as a caption that answers questions of each, a part
    has the answers about its images.
    """
    by_name: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        by_name.setdefault(unit.part, []).append(index)
    parts = {}
    for name, indices in by_name.items():
        images = {units[index].cluster for index in indices}
        own = [item for item in items if item.split == name]
        parts[name] = _Part(indices, own or [item for item in items if item.cluster in images])
    return parts if len(parts) == 1 else {**parts, ALL: _Part(range(len(units)), items)}


def _summary(
    task: Task,
    part: _Part,
    units: Sequence[Unit],
    records: Mapping[str, Mapping[str, Any]],
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    items = part.items
    summary: dict[str, Any] = {
        "n": len(part.indices),
        "metrics": summarise(
            task.metrics,
            part.counts(units),
            part.clusters(units),
            n_resamples=n_resamples,
            seed=seed,
        ),
        "truncated": sum(records[item.id]["truncated"] for item in items),
        "empty": sum(not records[item.id]["text"] for item in items),
    }
    asked = [item for item in items if item.gold.get("label") in ("yes", "no")]
    if task.first_token_words is not None and asked:
        margins = [records[item.id]["margin"] for item in asked]
        is_yes = [item.gold["label"] == "yes" for item in asked]
        summary["auroc"] = auroc(margins, is_yes)
        summary["first_token"] = first_token_scores(
            margins,
            is_yes,
            [item.cluster for item in asked],
            n_resamples=min(n_resamples, _RANKINGS),
            seed=seed,
        )
    return summary


def _difference(
    task: Task,
    part: _Part,
    baseline: Sequence[Unit],
    treated: Sequence[Unit],
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    before, after = part.counts(baseline), part.counts(treated)
    clusters = part.clusters(baseline)
    table = compare(task.metrics, before, after, clusters, n_resamples=n_resamples, seed=seed)
    if task.name in BINARY:
        only_before, only_after = discordant(task.name, before, after)
        table[BINARY[task.name][0]]["mcnemar_p"] = mcnemar(only_before, only_after).exact_p
    return table


def _pairs(
    counted: Mapping[str, Sequence[Unit]], n_resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Arm -> both pictures of a pair answered correctly, and the difference to the baseline.

    Empty where no pair is whole.
    """
    resampling = {"n_resamples": n_resamples, "seed": seed}
    rows = {
        arm: pair_rows([u.cluster for u in units], [bool(u.counts[0] + u.counts[2]) for u in units])
        for arm, units in counted.items()
    }
    images = list(rows[BASELINE])
    base = list(rows[BASELINE].values())
    table: dict[str, dict[str, Any]] = {}
    for arm, by_image in rows.items() if images else ():
        own = list(by_image.values())
        found = summarise(PAIR_METRICS, own, images, **resampling)
        table[arm] = {"n": len(own), "metrics": found}
        if arm != BASELINE:
            table[arm]["difference"] = compare(PAIR_METRICS, base, own, images, **resampling)
    return table


def _adjust(differences: Mapping[str, Mapping[str, Mapping[str, dict[str, Any]]]]) -> None:
    """Add Holm's adjusted p over the methods under test, separately for every split and metric.

    Nobody claims that a control or a trivial baseline helps, so these keep their p as it is.
    """
    tables = [table for arm, table in differences.items() if is_tested(arm)]
    for split in tables[0] if tables else ():
        for metric in tables[0][split]:
            tested = [t[split][metric] for t in tables if t[split][metric]["p"] is not None]
            for entry, p in zip(tested, holm([e["p"] for e in tested]), strict=True):
                entry["p_holm"] = p


def _idle_arms(run: RunResult) -> list[str]:
    return [
        arm
        for arm, records in run.records.items()
        if all(record["changed"] is False for record in records.values())
    ]
