"""What ``vlm-steer models`` reports."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_steer.engine.steer import attach
from vlm_steer.errors import SteerError, SteerWarning

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = ["TABLE", "check", "checked", "families", "markdown", "rows"]

TABLE = Path(__file__).with_name("families.json")
_HEAD = ("family", "attaches", "image", "attention in", "image grid", "prompts steered", "refuses")


def families() -> dict[str, str]:
    """The vision-language families of the installed transformers: ``model_type`` to class name."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    return {str(name): str(cls) for name, cls in sorted(NAMES.items())}


def checked() -> dict[str, Any]:
    """What was seen when families were steered: the table that comes with the package."""
    report: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return report


def rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table as text, heading first."""
    return [_HEAD, *(_row(name, seen) for name, seen in sorted(report["families"].items()))]


def markdown(report: Mapping[str, Any]) -> str:
    """The page of the documentation."""
    head, *body = rows(report)
    tried = [seen for seen in report["families"].values() if seen["attaches"] is not None]
    attached = [seen for seen in tried if seen["attaches"]]
    with_images = [seen for seen in attached if seen["steered"]["images per prompt"]]
    lines = [
        "# Model families",
        "",
        "Depends on `vlm_steer/commands/families.json`, `tests/families/report.py`, and is written",
        "by `python -m tests.families.report`. Do not edit.",
        "",
        f"Of the {len(report['families'])} families that transformers {report['transformers']} "
        f"maps to image-text-to-text, {len(tried)} were tried as tiny random models: "
        f"{len(attached)} attach, {len(with_images)} of them steered with real pixels. "
        "In a left-padded batch of two, "
        "neutral parameters were the unsteered model bit for bit, a method on the last row changed "
        "that row alone (earlier rows too where the prompt is bidirectional), a method "
        "on image columns changed rows after the image, and a prompt "
        "without an image stayed as it was.",
        "",
        "*refuses* names the methods that raise an error at attach with their defaults; "
        "`vlm-steer models --json` has their reasons, and `vlm-steer models --check DIR` tells "
        "what can be done with your model. Nothing is looked up in this table: a family that is "
        "not in it is discovered like the others.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in body),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, seen: Mapping[str, Any]) -> tuple[str, ...]:
    if not seen["attaches"]:
        return (name, "not tried" if seen["attaches"] is None else "no", seen["why"], *[""] * 4)
    counts = seen["steered"]["images per prompt"]
    prompts = {(): "text alone", (1,): "one image", (1, 2): "one and two images"}[tuple(counts)]
    refused = ", ".join(sorted(seen["refuses"])) or "none"
    layout = seen["layout"]
    if seen["steered"]["prefix"] != "causal":
        layout += f", {seen['steered']['prefix']} prompt"
    return (name, "yes", layout, seen["attention"], seen["grid"], prompts, refused)


def check(
    model: Any, processor: Any, specs: "Mapping[str, Sequence[Method]]"
) -> dict[str, dict[str, Any]]:
    """Attach each specification to a model by itself and take it off again.

    Returns:
        Per specification what ``status()`` says, with the warnings of attaching under
        ``warnings``; or, where attaching is refused, the reason under ``refused``.
    """
    return {name: _check_one(model, processor, methods) for name, methods in specs.items()}


def _check_one(model: Any, processor: Any, methods: "Sequence[Method]") -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SteerWarning)
        try:
            handle = attach(model, methods, processor=processor)
        except SteerError as error:
            return {"refused": str(error)}
        status = handle.status()
        handle.detach()
    return {**status, "warnings": [str(w.message) for w in caught]}
