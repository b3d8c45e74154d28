"""A comparison of runs for people: the same tables as text and as HTML."""

from collections.abc import Mapping
from typing import Any

import rich.table

from vlm_steer.report import (
    Block,
    Chart,
    Estimate,
    Gallery,
    Paragraphs,
    Point,
    Step,
    Table,
    frontier_chart,
    interval_chart,
)
from vlm_steer_eval.benchmarks.registry import BENCHMARKS
from vlm_steer_eval.statistics.comparing import ALL

from .tables import SHOWN, as_shown, format_difference, format_metric

__all__ = ["comparison_blocks", "comparison_text", "remarks"]

_VERDICTS = {
    "beyond": "beyond the frontier",
    "behind": "behind the frontier",
    "not distinguishable": "not distinguishable from it",
}
_MATCHED = {
    "length": ("matched length", ("CHAIRs", "CHAIRi", "Recall")),
    "recall": ("matched recall", ("CHAIRs", "CHAIRi", "Recall", "Len")),
    "yes_ratio": ("matched yes ratio", ("accuracy", "precision", "recall", "f1")),
}


def comparison_text(result: Mapping[str, Any]) -> list[rich.table.Table | str]:
    """Tables and lines to print.

    Args:
        result: from `compare_runs`.
    """
    parts: list[rich.table.Table | str] = []
    for table in _tables(result):
        text = rich.table.Table(title=table.title, title_justify="left")
        for index, column in enumerate(table.columns):
            text.add_column(column, justify="left" if index == 0 else "right")
        for row in table.rows:
            text.add_row(*row)
        parts.append(text)
    return [*parts, *remarks(result)]


def comparison_blocks(result: Mapping[str, Any], gallery: Gallery | None = None) -> list[Block]:
    """Blocks of an HTML report.

    Args:
        result: from `compare_runs`.
        gallery: examples, from `runs_gallery`.
    """
    tables = _tables(result)
    blocks: list[Block] = [table for table in tables if not table.title.startswith("Cost")]
    if result["differences"]:
        blocks.insert(1, _chart(result))
    if result["frontier"] is not None and result["frontier"]["staircase"]:
        blocks.append(_frontier_chart(result["frontier"]))
    blocks += [table for table in tables if table.title.startswith("Cost")]
    blocks += [] if gallery is None else [gallery]
    return [*blocks, Paragraphs("How to read this", remarks(result))]


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What must be said beside the tables."""
    lines = [
        f"{result['n_units']} units of {result['n_images']} images, paired; fractions in percent; "
        f"Δ against '{result['baseline']}'; * p < 0.05 after Holm's correction over the methods"
    ]
    if result["uncorrected"]:
        lines.append(
            f"° p without correction: {', '.join(result['uncorrected'])} take no part in that, "
            "since of controls and trivial baselines nothing is claimed"
        )
    lines += _power(result)
    if result["frontier"] is not None:
        count = len(result["frontier"]["points"])
        lines.append(
            f"frontier: {count} trivial baselines; a method counts only if its error lies below "
            "their staircase at its own recall (gap > 0, Holm over the methods)"
        )
        if count == 1:
            lines.append(
                "the frontier is the baseline alone: nothing could be derived from it, and no "
                "--trivial arm was given"
            )
    if result["excluded"]:
        lines.append(f"{len(result['excluded'])} units are not in every run and were left out")
    return [*lines, *result["notes"]]


def _power(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for arm, parts in result["differences"].items():
        for metric, entry in parts[_main(result)].items():
            if entry.get("detectable") is not None:
                lines.append(
                    f"{arm}: with {100 * entry['discordant']:.1f} % of units discordant, a change "
                    f"of {metric} of {100 * entry['detectable']:.1f} points or more is found in 4 "
                    "of 5 such runs"
                )
    return lines


def _main(result: Mapping[str, Any]) -> str:
    parts = list(result["arms"][result["baseline"]])
    return ALL if ALL in parts else parts[0]


def _tables(result: Mapping[str, Any]) -> list[Table]:
    parts = result["arms"][result["baseline"]]
    tables = [_values(result, part) for part in parts]
    if result["seeds"]:
        tables.append(_seeds(result))
    tables += [
        _matched(result, kind)
        for kind in _MATCHED
        if any(kind in found for found in result["matched"].values())
    ]
    if result["length_adjusted"]:
        tables.append(_adjusted(result["length_adjusted"]))
    if result["controls"]:
        tables.append(_beside_controls(result))
    if result["frontier"] is not None:
        tables.append(_verdicts(result["frontier"]))
    if result["cost"]:
        tables.append(_costs(result["cost"]))
    return tables


def _values(result: Mapping[str, Any], part: str) -> Table:
    shown = SHOWN[result["benchmark"]]
    columns = ["arm"]
    for name, with_difference in shown.items():
        columns += [name, *([f"Δ {name} [95 %]", "p"] if with_difference else [])]
    rows = []
    for arm, by_part in result["arms"].items():
        row = [f"{arm} (trivial)" if arm in result["trivial"] else arm]
        for name, with_difference in shown.items():
            row.append(format_metric(name, by_part[part]["metrics"][name])[0])
            if with_difference:
                entry = result["differences"].get(arm, {}).get(part, {}).get(name)
                row += ["", ""] if entry is None else _difference(name, entry)
        rows.append(row)
    n = result["arms"][result["baseline"]][part]["n"]
    return Table(f"{result['benchmark'].upper()} · {part} · {n} units", columns, rows)


def _seeds(result: Mapping[str, Any]) -> Table:
    shown = SHOWN[result["benchmark"]]
    rows = []
    for arm, by_metric in result["seeds"].items():
        n = len(next(iter(by_metric.values()))["values"])
        cells = [
            [format_metric(name, {"value": value})[0] for value in by_metric[name]["values"]]
            + [format_metric(name, {"value": by_metric[name]["sd"]})[0]]
            for name in shown
        ]
        rows.append([arm, *(f"{' / '.join(values)} ± {sd}" for *values, sd in cells)])
    return Table(f"Seed by seed, ± standard deviation ({n} seeds)", ["arm", *shown], rows)


def _difference(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [format_difference(name, entry), _p_of(entry)]


def _p_of(entry: Mapping[str, Any]) -> str:
    """The corrected p; that of a control as it is, marked."""
    corrected = entry.get("p_holm")
    if corrected is not None or entry["p"] is None:
        return _p(corrected)
    return f"{_p(entry['p'])}°"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _matched(result: Mapping[str, Any], kind: str) -> Table:
    name, metrics = _MATCHED[kind]
    columns = ["arm", "matched at"]
    for metric in metrics:
        columns += [f"Δ {metric} [95 %]", "p"]
    rows = []
    for arm, found in result["matched"].items():
        entry = found[kind]
        row = [arm, _matched_at(kind, entry)]
        for metric in metrics:
            row += _difference(metric, entry["differences"][metric])
        rows.append(row)
    return Table(f"At {name}", columns, rows)


def _matched_at(kind: str, entry: Mapping[str, Any]) -> str:
    if kind == "length":
        return f"{entry['sentences']:.1f} sentences"
    if kind == "recall":
        return f"{entry['shortened']} cut after {entry['words']} words"
    return f"{100 * entry['yes_ratio']:.1f} % yes"


def _adjusted(adjusted: Mapping[str, Any]) -> Table:
    rows = [
        [
            arm,
            f"× {e['rate_ratio']:.2f}",
            f"{e['ci95'][0]:.2f} … {e['ci95'][1]:.2f}",
            _p_of(e),
        ]
        for arm, e in adjusted.items()
    ]
    return Table("CHAIRi at equal length (count model)", ["arm", "rate", "95 %", "p"], rows)


def _beside_controls(result: Mapping[str, Any]) -> Table:
    """Each method minus its control: what is left is the method's own."""
    shown = SHOWN[result["benchmark"]]
    metrics = [name for name, with_difference in shown.items() if with_difference]
    columns = ["arm", "control"]
    for metric in metrics:
        columns += [f"Δ {metric} [95 %]", "p"]
    rows = []
    for arm, by_control in result["controls"].items():
        for control, found in by_control.items():
            row = [arm, control]
            for metric in metrics:
                row += _difference(metric, found[metric])
            rows.append(row)
    return Table("Methods against their own controls", columns, rows)


def _verdicts(found: Mapping[str, Any]) -> Table:
    columns = [
        "arm",
        found["recall"],
        found["error"],
        "gap to the staircase [95 %]",
        "p",
        "verdict",
    ]
    rows = []
    for arm, entry in found["verdicts"].items():
        rows.append(
            [
                arm,
                format_metric(found["recall"], {"value": entry["recall"]})[0],
                format_metric(found["error"], {"value": entry["error"]})[0],
                format_difference("gap", {**entry, "value": entry["gap"]}),
                _p_of(entry),
                _VERDICTS[entry["verdict"]],
            ]
        )
    return Table("Against trivial baselines", columns, rows)


def _costs(costs: Mapping[str, Any]) -> Table:
    rows = [
        [
            arm,
            f"{entry['tokens_per_answer']:.1f}",
            f"{entry['seconds_per_answer']:.3f}",
            f"{entry['tokens_per_second']:.1f}",
            *(_times(entry[f"relative_{what}"]) for what in ("speed", "passes", "memory")),
        ]
        for arm, entry in costs.items()
    ]
    columns = [
        "arm", "tokens per answer", "s per answer", "tokens/s", "speed", "passes per token",
        "memory",
    ]  # fmt: skip
    return Table("Cost of the runs, as they were batched", columns, rows)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"× {ratio:.2f}"


def _chart(result: Mapping[str, Any]) -> Chart:
    better = BENCHMARKS[result["benchmark"]].higher_is_better or {}
    part = _main(result)
    panels = {
        f"Δ {name}": [
            _estimate(arm, name, parts[part][name], better.get(name))
            for arm, parts in result["differences"].items()
        ]
        for name, with_difference in SHOWN[result["benchmark"]].items()
        if with_difference and name in better
    }
    note = f"Against '{result['baseline']}', paired by image; coloured where p < 0.05 after Holm."
    return Chart(f"Change ({part})", interval_chart(panels, reference=0.0), note)


def _estimate(arm: str, name: str, entry: Mapping[str, Any], higher: bool | None) -> Estimate:
    if entry["value"] is None or entry["ci95"] is None:
        nowhere = float("nan")
        return Estimate(arm, nowhere, nowhere, nowhere)
    tone = "plain"
    if higher is not None and entry.get("p_holm", 1.0) < 0.05:
        tone = "good" if (entry["value"] > 0) == higher else "bad"
    value, low, high = (as_shown(name, number) for number in (entry["value"], *entry["ci95"]))
    return Estimate(arm, value, low, high, tone)


def _frontier_chart(found: Mapping[str, Any]) -> Chart:
    steps = [
        Step(*(100 * step[key] for key in ("recall", "error", "low", "high")))
        for step in found["staircase"]
        if None not in step.values()
    ]
    tones = {"beyond": "good", "behind": "bad", "not distinguishable": "plain"}

    def points(entries: Mapping[str, Any]) -> list[Point]:
        return [
            Point(
                name,
                100 * entry["recall"],
                100 * entry["error"],
                tones.get(entry.get("verdict", ""), "plain"),
            )
            for name, entry in entries.items()
            if entry["recall"] is not None and entry["error"] is not None
        ]

    svg = frontier_chart(
        (found["recall"], found["error"]), steps, points(found["points"]), points(found["verdicts"])
    )
    note = "Grey: trivial baselines, their staircase and its 95 % band. Lower right is better."
    return Chart("The frontier of trivial baselines", svg, note)
