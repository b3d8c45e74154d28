"""Views of a running model made by hand, so that a hook can be called on a planted case."""

import torch
from torch import Tensor

from vlm_steer.engine.hooks import At, Columns

SYSTEM, IMAGE, INSTRUCTION, GENERATED = 1, 2, 3, 4


def view(kinds: list[int], rows: int = 1, **fields: object) -> At:
    """What a hook sees at layer 0 of 1 when the last ``rows`` of the columns are its rows."""
    columns = Columns(torch.tensor([kinds], dtype=torch.int8))
    row_kinds = columns.kinds[:, len(kinds) - rows :]
    defaults: dict[str, object] = {
        "layer": 0,
        "n_layers": 1,
        "step": 0,
        "columns": columns,
        "is_row": torch.ones_like(row_kinds, dtype=torch.bool),
        "row_kinds": row_kinds,
        "marks": None,
        "plan": None,
        "prepared": None,
        "prompt": columns,
        "grid": None,
        "on_rows": lambda values: values[:, len(kinds) - rows : len(kinds)],
        "on_keys": lambda values: values,
        "is_own": lambda: torch.eye(len(kinds), dtype=torch.bool)[len(kinds) - rows :],
        "once": lambda name, make: make(),
        "softmax": plain_softmax,
    }
    return At(**(defaults | fields))  # type: ignore[arg-type]


def plain_softmax(scores: Tensor) -> Tensor:
    """The softmax of rows that see every column."""
    return scores.softmax(dim=-1)
