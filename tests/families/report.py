"""What was seen when every family was steered, and the table made of it.

``python -m tests.families.report`` examines all families of the installed transformers and writes
``vlm_steer/commands/families.json`` and ``docs/families.md``; with names it refreshes those rows
alone. The tests run the same examination and compare.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText

import vlm_steer
from tests.families import extra, zoo
from vlm_steer.commands.models import TABLE, families, markdown
from vlm_steer.engine.hooks import At, Attends, Method, Rows
from vlm_steer.engine.model import ModelInfo, inspect_model
from vlm_steer.errors import SteerError, SteerWarning, UnsupportedModelError
from vlm_steer.registry import list_methods

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
NEUTRAL = {"method": "pai", "alpha": 0.0, "gamma": 1.0}


@dataclass(frozen=True, kw_only=True)
class LastRow(Method):
    """Acts on the row that predicts the next token."""

    name: ClassVar[str] = "lastrow"
    rows: ClassVar[Rows] = "last"
    attends: ClassVar[Attends] = "both"

    def scores(self, scores: Tensor, at: At) -> Tensor:
        return scores * 0.5


@dataclass(frozen=True, kw_only=True)
class OnImage(Method):
    """Acts on image columns, for rows after the image."""

    name: ClassVar[str] = "onimage"
    rows: ClassVar[Rows] = "after_image"
    attends: ClassVar[Attends] = "image"

    def weights(self, weights: Tensor, at: At) -> Tensor:
        boosted = weights * torch.where(at.columns.is_image, 2.0, 1.0)[:, None, None]
        return boosted / boosted.sum(dim=-1, keepdim=True)


def examine(name: str) -> dict[str, Any]:
    """One row of the table: what attaching and steering a family showed."""
    if name in extra.NOT_BUILT and name not in extra.REFUSED:
        return {"attaches": None, "why": extra.NOT_BUILT[name]}
    if name in extra.REFUSED:
        model: Any = AutoModelForImageTextToText
        return _refusal(lambda: inspect_model(model.from_config(extra.recipe(name).config).eval()))
    family = zoo.load(name)
    info = inspect_model(family.model)
    return {
        "attaches": True,
        "layout": _layout(info),
        "attention": _attention(info),
        "grid": _grid(info),
        "refuses": refusals(family.model),
        "steered": steer(family),
    }


def steer(family: zoo.Family) -> dict[str, Any]:
    """Steer a left-padded batch of two and look where its logits changed."""
    images = [n for n in (1, 2) if zoo.unsupported(family.name, n) is None]
    seen: dict[str, Any] = {"images per prompt": images}
    for count in images or [0]:
        batch = _two_rows(family, count)
        base = _logits(family, batch)
        if not torch.equal(_logits(family, batch, NEUTRAL), base):
            raise AssertionError(f"{family.name}: neutral parameters changed the logits")
        last = _logits(family, batch, LastRow())
        seen["prefix"] = "bidirectional" if sees_ahead(family, batch, base) else "causal"
        is_token = batch["attention_mask"][:, :-1].bool()
        is_alone = torch.equal(last[:, :-1][is_token], base[:, :-1][is_token])
        is_alone |= seen["prefix"] == "bidirectional"
        if not is_alone or torch.equal(last[:, -1], base[:, -1]):
            raise AssertionError(f"{family.name}: not the last row alone was steered")
        if count:
            steered = _logits(family, batch, OnImage())
            after = int(batch["input_ids"].shape[1]) - 5  # five text tokens end every prompt
            changed = (steered != base).any(dim=-1)
            before = changed[:, 0] & is_token[:, 0] & (seen["prefix"] == "causal")
            if not changed[:, after:].any() or before.any():
                raise AssertionError(f"{family.name}: the rows after the image were not steered")
        if not last.isfinite().any(dim=-1).all():
            raise AssertionError(f"{family.name}: logits are not finite")
    if zoo.unsupported(family.name, 0) is None:
        batch = _two_rows(family, 0)
        if not torch.equal(_logits(family, batch, OnImage()), _logits(family, batch)):
            raise AssertionError(f"{family.name}: a text-only prompt was changed")
        seen["text alone"] = "unchanged"
    return seen


def sees_ahead(family: zoo.Family, batch: zoo.Inputs, base: Tensor) -> bool:
    """Whether prompt rows attend to later rows, as in a prefix language model."""
    ids = batch["input_ids"].clone()
    ids[:, -1] = torch.where(ids[:, -1] == zoo.FIRST_TEXT, zoo.FIRST_TEXT + 1, zoo.FIRST_TEXT)
    other = _logits(family, {**batch, "input_ids": ids})
    is_token = batch["attention_mask"][:, :-1].bool()
    return float((other[:, :-1] - base[:, :-1])[is_token].abs().max()) > 1e-3


def refusals(model: Any) -> dict[str, str]:
    """Every registered method that a model refuses at its defaults, with the reason.

    What a method lacks through no fault of the family, a file or a processor, is no refusal.
    """
    refused = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteerWarning)
        for method in list_methods():
            try:
                vlm_steer.attach(model, {"method": method}).detach()
            except UnsupportedModelError as error:
                refused[method] = str(error)
            except SteerError:
                continue
    return refused


def _refusal(attach: Callable[[], object]) -> dict[str, Any]:
    try:
        attach()
    except UnsupportedModelError as error:
        return {"attaches": False, "why": str(error)}
    raise AssertionError("this family was expected to refuse")


def _two_rows(family: zoo.Family, images: int) -> zoo.Inputs:
    rows = [
        family.inputs(n_text=5, seed=0, images=images),
        family.inputs(n_text=9, seed=1, images=images),
    ]
    return family.batch(rows)


def _logits(family: zoo.Family, batch: zoo.Inputs, spec: Any = None) -> Tensor:
    """``[rows, positions, vocabulary]`` of one forward."""
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        vlm_steer.steer(family.model, spec),
    ):
        warnings.simplefilter("ignore", SteerWarning)
        logits: Tensor = family.model(**batch).logits
        return logits


def _layout(info: ModelInfo) -> str:
    if info.has_cross_attention:
        return "keys of cross-attention"
    return "image tokens" if info.image_token_ids else "a mask of places"


def _attention(info: ModelInfo) -> str:
    has = info.attention_layers
    return "every layer" if len(has) == info.n_layers else "some layers (hybrid)"


def _grid(info: ModelInfo) -> str:
    geometry = info.geometry
    if geometry.unknown:
        return f"unknown: {geometry.unknown}"
    return "fixed square" if geometry.side is not None else "per image, from the inputs"


def table(names: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """The whole table, with rows examined anew for these names."""
    rows = {}
    for name in families():
        if name in names or name not in known:
            sys.stderr.write(f"{name}\n")
            rows[name] = examine(name)
        else:
            rows[name] = known[name]
    return {"transformers": transformers.__version__, "methods": list_methods(), "families": rows}


def main(names: list[str]) -> None:
    """Write the table as JSON and as a page."""
    known = json.loads(TABLE.read_text())["families"] if names and TABLE.exists() else {}
    report = table(names or list(families()), known)
    TABLE.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    DOCS.write_text(markdown(report))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(sys.argv[1:])
