"""The tables that commands print for people; everything in them is in ``--json`` too."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from vlm_steer.commands.catalog import Entry

__all__ = ["show_answers", "show_check", "show_families", "show_method", "show_methods"]


def show_methods(entries: Sequence[Entry], presets: Sequence[str]) -> None:
    """All methods in one table, then the presets that are not the defaults of a method."""
    names = [entry.name for entry in entries]
    _show(
        ("method", "what it does", "arXiv"),
        [(entry.name, entry.summary, entry.paper.rpartition("/")[2]) for entry in entries],
    )
    others = [preset for preset in presets if preset not in names]
    _say(f"Presets: {', '.join(others)}" if others else "")
    _say("vlm-steer methods NAME explains one of them.")


def show_method(entry: Entry) -> None:
    """One method with its options."""
    _say(f"{entry.name}: {entry.summary}")
    for label, text in (
        ("Paper", entry.paper),
        ("Hooks", ", ".join(entry.hooks)),
        ("Cost", entry.cost),
    ):
        _say(f"{label}: {text}" if text else "")
    _show(
        ("option", "default", "type", "meaning"),
        [
            (
                option.name,
                "required" if option.required else _as_yaml(option.default),
                option.type,
                option.doc.replace("``", ""),
            )
            for option in entry.options
        ],
    )


def show_families(report: Mapping[str, Any]) -> None:
    """What was seen of the families of transformers."""
    from vlm_steer.commands.models import rows

    head, *body = rows(report)
    _show(head, body)
    _say(
        f"{len(body)} families, checked with transformers {report['transformers']}. Models are not "
        "listed by hand: what is steered is found in the loaded model. vlm-steer models --check "
        "DIR tells what can be done with yours."
    )


def show_check(report: Mapping[str, Mapping[str, Any]]) -> None:
    """What can be attached to a model."""
    rows = []
    for name, status in report.items():
        if "refused" in status:
            rows.append((name, "no", status["refused"]))
            continue
        about = [_placed(method) for method in status["methods"]]
        rows.append((name, "yes", "; ".join([*about, *status["warnings"]])))
    known = [status for status in report.values() if "refused" not in status]
    if known:
        one = known[0]
        _say(f"{one['model']} ({one['family']}), {one['layers']} layers, {one['attention']}")
    _show(("method", "attaches", "notes"), rows)


def show_answers(report: Mapping[str, Any], *, compare: bool) -> None:
    """Answers per image, side by side when compared, then what the steering changed."""
    from vlm_steer.commands.generate import summarise

    answers = report["answers"]
    rows = list(zip(report["images"], *answers.values(), strict=True))
    if compare:
        _show(("image", *answers), rows)
    else:
        for image, text in rows:
            _say(f"{image}: {text}" if len(rows) > 1 else text)
    if compare:
        for effect in report["effects"]:
            for line in summarise(effect):
                _say(line)


def _placed(method: Mapping[str, Any]) -> str:
    layers = f"{len(method['layers'])} layers" if method["layers"] else "no layers"
    return f"{method['name']}: {', '.join([layers, *method['notes']])}"


def _as_yaml(value: object) -> str:
    """A default as one would write it."""
    return value if isinstance(value, str) else json.dumps(value)


def _show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    # A name of a hub or a path is longer than its column, and useless where it is cut off.
    table = Table(*(Column(name, overflow="fold") for name in columns), show_lines=True)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)


def _say(text: str) -> None:
    if text:
        Console(markup=False, highlight=False, soft_wrap=True).print(text)
