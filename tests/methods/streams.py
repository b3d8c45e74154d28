"""What the streams of a method say, and the unsteered model asked step by step."""

import dataclasses
from typing import Any

from torch import Tensor

import vlm_steer
from tests.families import zoo
from vlm_steer.engine.hooks import LogitsAt, Method


def recorded(
    family: zoo.Family,
    method: Method,
    batch: dict[str, Tensor],
    backend: Any = "auto",
    **options: Any,
) -> tuple[Tensor, list[dict[str | None, Tensor]]]:
    """Generated tokens ``[rows, steps]``, and what each branch said at every step.

    The user's own stream is under ``None``.
    """
    seen: list[dict[str | None, Tensor]] = []
    steered = type(method).logits

    class Recording(type(method)):  # type: ignore[misc]
        def logits(self, logits: Tensor, at: LogitsAt) -> Tensor:
            seen.append({None: at.raw, **at.branches})
            return steered(self, logits, at)

    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    with vlm_steer.steer(family.model, Recording(**fields), backend=backend):
        tokens = family.model.generate(**batch, do_sample=False, **options)
    return tokens[:, batch["input_ids"].shape[1] :], seen
