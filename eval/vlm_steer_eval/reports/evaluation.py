"""An evaluation as an HTML report: tables, intervals, and pictures with marked answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_steer.report import (
    Block,
    Chart,
    Estimate,
    Gallery,
    Paragraphs,
    Sample,
    Table,
    interval_chart,
    thumbnail,
)
from vlm_steer_eval.benchmarks.registry import BENCHMARKS
from vlm_steer_eval.benchmarks.tasks import Item, Task
from vlm_steer_eval.running.results import ALL, Scores
from vlm_steer_eval.running.runner import RunResult

from .gallery import marked_answer, truth_of
from .tables import SHOWN, as_shown, footnotes, format_difference, format_metric

__all__ = ["evaluation_blocks"]

_CHARTED = {
    "pope": ("accuracy", "f1", "yes_ratio"),
    "chair": ("CHAIRi", "CHAIRs", "Recall"),
}


def evaluation_blocks(
    task: Task, run: RunResult, scores: Scores, summary: Mapping[str, Any], *, n_samples: int = 12
) -> list[Block]:
    """Blocks of a report on one benchmark.

    Args:
        task: the benchmark.
        run: its answers.
        scores: their scores, from `score_all`.
        summary: the contents of `scores.json`.
        n_samples: images to show, >= 0; those on which the arms differ come first.
    """
    title = task.name.upper()
    splits = list(summary["arms"][summary["baseline"]])
    blocks: list[Block] = [_table(summary, split, f"{title}: {split}") for split in splits]
    main = ALL if ALL in splits else splits[0]
    blocks.append(_value_chart(summary, main, f"{title}: values with 95 % intervals ({main})"))
    if summary["differences"]:
        blocks.append(_difference_chart(summary, main, f"{title}: change against none ({main})"))
    blocks.append(Paragraphs(f"{title}: notes", footnotes(summary)))
    if n_samples:
        note = "Red: hallucinated. Green: right. Images on which the arms differ come first."
        chosen = _telling_items(task, run, scores)[:n_samples]
        samples = [_sample(item, run, scores) for item in chosen]
        blocks.append(Gallery(f"{title}: examples", samples, note))
    return blocks


def _table(summary: Mapping[str, Any], split: str, title: str) -> Table:
    shown = SHOWN[summary["benchmark"]]
    columns = ["arm"]
    for name, with_difference in shown.items():
        columns += [name, "95 %", *(["Δ"] if with_difference else [])]
    rows = []
    for arm, by_split in summary["arms"].items():
        idle = arm in summary["changed_nothing"]
        row = [f"{arm} (changed nothing)" if idle else arm]
        for name, with_difference in shown.items():
            row += format_metric(name, by_split[split]["metrics"][name])
            if with_difference:
                difference = summary["differences"].get(arm, {}).get(split, {}).get(name)
                row.append(format_difference(name, difference) if difference else "")
        rows.append([*row, str(by_split[split]["truncated"])])
    return Table(title, [*columns, "truncated"], rows)


def _value_chart(summary: Mapping[str, Any], split: str, title: str) -> Chart:
    panels = {
        name: [
            _estimate(arm, name, by_split[split]["metrics"][name], "plain")
            for arm, by_split in summary["arms"].items()
        ]
        for name in _charted(summary["benchmark"])
    }
    return Chart(title, interval_chart(panels), "Percent; intervals resample whole images.")


def _difference_chart(summary: Mapping[str, Any], split: str, title: str) -> Chart:
    panels = {}
    better = BENCHMARKS[summary["benchmark"]].higher_is_better or {}
    for name in _charted(summary["benchmark"]):
        estimates = []
        for arm, by_split in summary["differences"].items():
            entry = by_split[split][name]
            estimates.append(_estimate(arm, name, entry, _tone(entry, better.get(name))))
        panels[f"Δ {name}"] = estimates
    note = "Percentage points, paired by image; coloured where Holm-corrected p < 0.05."
    return Chart(title, interval_chart(panels, reference=0.0), note)


def _tone(entry: Mapping[str, Any], higher_is_better: bool | None) -> str:
    if higher_is_better is None or entry["value"] is None or entry.get("p_holm", 1.0) >= 0.05:
        return "plain"
    return "good" if (entry["value"] > 0) == higher_is_better else "bad"


def _charted(benchmark: str) -> Sequence[str]:
    """The metrics to draw; by default those that are shown with their difference."""
    shown = [name for name, with_difference in SHOWN[benchmark].items() if with_difference]
    return _CHARTED.get(benchmark, shown)


def _estimate(label: str, name: str, entry: Mapping[str, Any], tone: str) -> Estimate:
    if entry["value"] is None or entry["ci95"] is None:
        nowhere = float("nan")
        return Estimate(label, nowhere, nowhere, nowhere)
    value, low, high = (as_shown(name, number) for number in (entry["value"], *entry["ci95"]))
    return Estimate(label, value, low, high, tone)


def _telling_items(task: Task, run: RunResult, scores: Scores) -> list[Item]:
    """One item per image, those with the most different answers among the arms first."""
    known = [
        item for item in task.items if all(item.id in records for records in run.records.values())
    ]

    def variety(item: Item) -> int:
        return len({scores[arm][item.id].outcome for arm in run.records})

    seen: set[str] = set()
    chosen = []
    for item in sorted(known, key=lambda item: (-variety(item), item.id)):
        if item.cluster not in seen:
            seen.add(item.cluster)
            chosen.append(item)
    return chosen


def _sample(item: Item, run: RunResult, scores: Scores) -> Sample:
    return Sample(
        image=thumbnail(item.image.load()) if item.has_image else "",
        title=item.image.name or item.id,
        prompt=item.prompt,
        truth=truth_of(item.gold),
        answers=tuple(
            marked_answer(arm, records[item.id]["text"], scores[arm][item.id].details)
            for arm, records in run.records.items()
        ),
    )
