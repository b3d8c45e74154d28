"""What a study found, said to people: tables, sentences, and the winner as a file."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from ruamel.yaml import YAML

from vlm_steer import report
from vlm_steer.config import dump, resolve
from vlm_steer.engine.hooks import Method
from vlm_steer.errors import DataError
from vlm_steer_eval.files import write_text

from .goals import Goals
from .plan import Plan

__all__ = [
    "front_blocks",
    "front_table",
    "provenance",
    "spoken",
    "trial_row",
    "verdict",
    "write_winner",
]


def verdict(goals: Goals, held_out: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the held-out run says of every metric, in a sentence each, whatever it says."""
    directions = {objective.metric: objective.sign for objective in goals.objectives}
    lines = []
    for name, entry in held_out.items():
        change = entry["difference"]
        if change is None or change["ci95"] is None:
            lines.append(f"{name}: {_text(entry)}")
            continue
        low, high = change["ci95"]
        says = "no difference shown: the interval holds 0"
        if low > 0 or high < 0:
            sign = directions.get(name, 0)
            better = "confirmed" if sign * low > 0 or sign * high > 0 else "worse, and surely so"
            says = better if sign else "changed, and surely so"
        p = "" if change["p"] is None else f", p {change['p']:.3g}"
        lines.append(f"{name}: {_text(entry)}, against no steering {_signed(change)}{p}: {says}")
    return lines


def front_table(goals: Goals, rows: Sequence[tuple[str, Mapping[str, Any]]], title: str) -> Table:
    """A table of settings: values with intervals, and differences to the unsteered model."""
    table = Table(title=title, title_justify="left")
    for name in _columns(goals):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for row in rows:
        table.add_row(*_cells(goals, *row))
    return table


def front_blocks(
    goals: Goals, rows: Sequence[tuple[str, Mapping[str, Any]]], title: str, said: Sequence[str]
) -> list[report.Block]:
    """The same for a page, with a chart of the intervals, and what the held-out run says."""
    panels = {
        name: [
            report.Estimate(label.partition(":")[0], entries[name]["value"], *entries[name]["ci95"])
            for label, entries in rows
        ]
        for name in goals.metrics
        if all(entries[name]["ci95"] is not None for _, entries in rows)
    }
    blocks: list[report.Block] = [
        report.Paragraphs("Held-out images, the chosen setting against no steering", said),
        report.Table(title, _columns(goals), [_cells(goals, *row) for row in rows]),
    ]
    if panels:
        note = "95 % intervals that resample images; the chosen trial is starred."
        blocks.append(report.Chart(title, report.interval_chart(panels), note))
    return blocks


def _columns(goals: Goals) -> list[str]:
    pairs = [(name, f"Δ {name} [95 %]") for name in goals.metrics]
    return ["setting", *(column for pair in pairs for column in pair)]


def _cells(goals: Goals, label: str, entries: Mapping[str, Any]) -> list[str]:
    cells = [label]
    for name in goals.metrics:
        change = entries[name]["difference"]
        cells += [_text(entries[name]), _signed(change) if change else ""]
    return cells


def write_winner(path: Path, methods: tuple[Method, ...], lines: Sequence[str]) -> None:
    """Write a steering with its provenance as comments, and check that it reads back unchanged.

    Raises:
        DataError: the folder cannot be written.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # typed as None
    yaml.width = 100
    buffer = io.StringIO()
    yaml.dump(dump(methods), buffer)
    comments = [f"# {piece}" for line in lines for piece in line.splitlines()]
    write_text(path, "\n".join(comments) + "\n" + buffer.getvalue())
    if resolve(path) != methods:
        raise DataError(f"{path} does not read back as what was tuned; use tune.json instead")


def provenance(
    plan: Plan,
    identity: Mapping[str, Any],
    n_images: Mapping[str, int],
    number: int,
    n_trials: int,
) -> list[str]:
    """Where a winner comes from, line by line."""
    model, versions = identity["model"], identity["versions"]
    released = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        f"Chosen by `vlm-steer tune {plan.path.name}`: trial {number} of {n_trials}.",
        f"Model: {model['name']} ({model['class']}, {model['dtype']}), "
        f"weights {model['content'][:16]}.",
        f"Tuned on {n_images['tuning']} images: {identity['sources']['data']}.",
        f"Confirmed on {n_images['held_out']} images: {identity['sources']['held_out']}.",
        f"Goals: {', '.join(f'{o.metric} {o.direction}' for o in plan.goals.objectives)}"
        + "".join(f"; {constraint}" for constraint in plan.goals.constraints)
        + ".",
        f"Versions: {released}. Study: {identity['study'][:16]}.",
    ]


def spoken(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Values and differences of a setting on the images that chose it."""
    return [
        f"{name}: {_text(entry)}"
        + (f", against no steering {_signed(entry['difference'])}" if entry["difference"] else "")
        for name, entry in entries.items()
    ]


def trial_row(trial: Any) -> dict[str, Any]:
    """A trial as a row of `trials.jsonl`."""
    attrs = trial.user_attrs
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "parameters": trial.params,
        "values": attrs.get("values"),
        "violations": attrs.get("violations"),
        "given_up": attrs.get("given_up"),
        "refused": attrs.get("refused"),
        "notes": attrs.get("notes", []),
        "setting": attrs.get("setting"),
    }


def _text(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None:
        return "–"
    interval = entry["ci95"]
    ends = "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"
    return f"{entry['value']:.{2 if interval is None else 1}f}{ends}"


def _signed(entry: Mapping[str, Any]) -> str:
    if entry["value"] is None or entry["ci95"] is None:
        return "–"
    low, high = entry["ci95"]
    return f"{entry['value']:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")
