"""Results as tables for people."""

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from vlm_steer_eval.running.presets import preset_remarks

__all__ = [
    "SHOWN",
    "as_shown",
    "comparison_tables",
    "footnotes",
    "format_difference",
    "format_metric",
    "metric_table",
    "parser_line",
    "render",
]

SHOWN: Mapping[str, Mapping[str, bool]] = {
    "pope": {
        "accuracy": True,
        "f1": True,
        "precision": False,
        "recall": False,
        "yes_ratio": True,
        "unparsed": False,
    },
    "chair": {"CHAIRs": True, "CHAIRi": True, "Recall": True, "F1": False, "Len": True},
    "amber": {"CHAIR": True, "Cover": True, "Hal": True, "Cog": False, "f1": True},
    "mme": {
        "perception": True,
        "cognition": True,
        "hallucination": True,
        "accuracy": True,
        "accuracy_plus": False,
        "yes_ratio": True,
    },
    "hallusionbench": {"aAcc": True, "fAcc": True, "qAcc": True, "yes_difference": True},
    "opope": {"accuracy": True, "precision": True, "recall": True, "f_0.2": True},
    "mmhal": {"rating": True, "hallucination_rate": True, "unrated": False},
    "mmvp": {"pair_accuracy": True, "accuracy": True, "unparsed": False},
    "sycophancy": {
        "change": True,
        "error_introduction": True,
        "correction": True,
        "imbalance": True,
        "accuracy_after": True,
    },
    "beaf": {"accuracy": True, "TU": True, "IG": False, "ID": True, "F1_TUID": True},
}
"""Columns of a benchmark's table, and whether each comes with its difference."""

_COUNTS = frozenset({"n", "TP", "FP", "TN", "FN", "unparsed", "unclear", "unrated", "truncated"})
_AS_IS = frozenset({"Len", "perception", "cognition", "hallucination", "points", "rating"})


def as_shown(name: str, value: float) -> float:
    """A metric's value as people read it: fractions in percent."""
    return value if name in _AS_IS | _COUNTS else 100 * value


def metric_table(metrics: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """One row per metric: value and 95 % interval, fractions as percentages."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, entry in metrics.items():
        value, interval = format_metric(name, entry)
        table.add_row(name, value, interval)
    return table


def format_metric(name: str, entry: Mapping[str, Any]) -> tuple[str, str]:
    """A metric's value and interval as text; undefined values are "–"."""
    interval = entry.get("ci95")
    if interval is None:
        return _number(name, entry["value"]), ""
    return _number(
        name, entry["value"]
    ), f"{_number(name, interval[0])} … {_number(name, interval[1])}"


def format_difference(name: str, entry: Mapping[str, Any]) -> str:
    """A paired difference with its interval; a star where Holm's adjusted p is below 0.05."""
    if entry["value"] is None or entry["ci95"] is None:
        return "–"
    low, high = entry["ci95"]
    corrected = entry.get("p_holm")
    star = "*" if corrected is not None and corrected < 0.05 else ""
    return f"{_signed(name, entry['value'])}{star} [{_signed(name, low)}, {_signed(name, high)}]"


def parser_line(sensitivity: Mapping[str, Mapping[str, Any]], parser: str) -> str:
    """One line on how much the choice of parser matters for accuracy."""
    values = {
        name: row["accuracy"] for name, row in sensitivity.items() if row["accuracy"] is not None
    }
    if not values:
        return "parser sensitivity: accuracy is undefined under every parser"
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    listed = ", ".join(f"{name} {100 * value:.1f}" for name, value in values.items())
    return (
        f"parser sensitivity (accuracy, reported: {parser}): {listed}; "
        f"spread {100 * (values[high] - values[low]):.1f} points"
    )


def comparison_tables(scores: Mapping[str, Any]) -> list[Table]:
    """One table per split of an evaluation: arms against the unsteered one.

    Recall and length stand beside CHAIR, the yes ratio beside POPE's F1: without them a gain cannot
    be told from shorter captions or a shifted habit of saying yes.

    Args:
        scores: the contents of `scores.json` of an evaluation.
    """
    shown = SHOWN[scores["benchmark"]]
    splits = list(scores["arms"][scores["baseline"]])
    return [_comparison(scores, split, shown) for split in splits]


def _comparison(scores: Mapping[str, Any], split: str, shown: Mapping[str, bool]) -> Table:
    baseline = scores["baseline"]
    summary = scores["arms"][baseline][split]
    title = f"{scores['benchmark'].upper()} · {split} · {summary['n']} answers"
    table = Table(title=title, title_justify="left")
    table.add_column("arm")
    for name, with_difference in shown.items():
        table.add_column(name, justify="right")
        if with_difference:
            table.add_column(f"Δ {name} [95 %]", justify="right")
    if "auroc" in summary:
        table.add_column("AUROC", justify="right")
    table.add_column("truncated", justify="right")
    for arm, by_split in scores["arms"].items():
        entry = by_split[split]
        cells = [f"{arm} (changed nothing)" if arm in scores["changed_nothing"] else arm]
        for name, with_difference in shown.items():
            cells.append(format_metric(name, entry["metrics"][name])[0])
            if with_difference:
                difference = scores["differences"].get(arm, {}).get(split, {}).get(name)
                cells.append(format_difference(name, difference) if difference else "")
        if "auroc" in summary:
            cells.append(_number("auroc", entry["auroc"]))
        table.add_row(*cells, str(entry["truncated"]))
    return table


def footnotes(scores: Mapping[str, Any]) -> list[str]:
    """What must be said beside the tables."""
    lines = [
        f"{scores['n_items']} answers about {scores['n_images']} images; fractions in percent; Δ "
        f"against '{scores['baseline']}', paired by image; * p < 0.05 after Holm's correction over "
        "the methods (controls and trivial baselines have no star)"
    ]
    if "parsers" in scores:
        lines.append(parser_line(scores["parsers"][scores["baseline"]], scores["parser"]))
    lines += _pair_lines(scores)
    lines += [
        f"{arm}: changed nothing in this model; its row repeats '{scores['baseline']}'"
        for arm in scores["changed_nothing"]
    ]
    lines += [f"[{arm}] {note}" for arm, notes in scores["notes"].items() for note in notes]
    if "preset" in scores:
        lines += preset_remarks(scores["preset"])
    if scores["excluded"]:
        lines.append(f"{len(scores['excluded'])} items were left out because of their image")
    return lines


def _pair_lines(scores: Mapping[str, Any]) -> list[str]:
    """How often both pictures of a pair were answered correctly."""
    lines = []
    for arm, pairs in scores.get("pairs", {}).items():
        value, interval = format_metric("pair_accuracy", pairs["metrics"]["pair_accuracy"])
        line = f"{arm}: {value} % of {pairs['n']} pairs with both pictures right [{interval}]"
        if "difference" in pairs:
            change = format_difference("pair_accuracy", pairs["difference"]["pair_accuracy"])
            line += f", Δ {change}"
        lines.append(line)
    return lines


def render(*parts: Table | str, width: int = 160) -> str:
    """Tables and lines as plain text."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, legacy_windows=False)
    for part in parts:
        console.print(part, highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "auroc":
        return f"{value:.3f}"
    if name in _COUNTS:
        return f"{value:.0f}"
    if name == "rating":
        return f"{value:.2f}"
    return f"{as_shown(name, value):.1f}"


def _signed(name: str, value: float) -> str:
    text = _number(name, abs(value))
    return f"{'+' if value >= 0 else '−'}{text}"
