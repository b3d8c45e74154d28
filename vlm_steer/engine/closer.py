"""What the model would say next if it saw a part of its image closer.

A search may ask at any token. Nothing of the running generation can be used for it, since every
token behind the image depends on the image: the prompt and the text so far pass again.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_steer.engine.active import ACTIVE, Probe
from vlm_steer.engine.branches import Source
from vlm_steer.engine.describe import model_inputs
from vlm_steer.engine.hooks import Grid
from vlm_steer.engine.inputs import is_per_token
from vlm_steer.engine.model import kept_module_state
from vlm_steer.engine.pictures import check_places, enlarged_parts, shapes_of
from vlm_steer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["look_closer"]

_WHOLE = (0.0, 0.0, 1.0, 1.0)


def look_closer(
    source: Source,
    info: "ModelInfo",
    grid: Grid,
    texts: Tensor,
    rows: Tensor,
    image: Tensor,
    boxes: Tensor,
) -> Tensor:
    """Next-token logits under other fields of view, every intervention off.

    Args:
        source: Where the user's inputs came from.
        info: The model.
        grid: Where the image tokens of each row's prompt lie.
        texts: ``[all rows, tokens]`` ids, prompts included.
        rows: ``[rows]`` int64, those that look.
        image: ``[rows]`` int64, the image (or tile) of its own at which each of them looks.
        boxes: ``[rows, fields, 4]`` left, top, right and bottom in that image, in [0, 1].

    Returns:
        ``[rows, fields, vocabulary]`` float32.

    Raises:
        UnsupportedModelError: The pixels of the images were not passed, or cannot be told apart.
    """
    given = model_inputs(source.given({}))
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor):
        raise UnsupportedModelError(
            "a method lets the model look closer at its image, and needs the token ids of the "
            "whole prompt. Pass input_ids."
        )
    copies = len(texts) // len(ids)
    shapes = shapes_of(grid, copies)
    info.remember("places of pixels", lambda: check_places(info.model, given, shapes))
    n_fields = boxes.shape[1]
    prompts = rows // copies
    if all(len(v) == len(ids) for v in given.values() if isinstance(v, Tensor)) and all(
        len(row) == 1 for row in grid.shapes
    ):
        some = {
            k: v[prompts.to(v.device)] if isinstance(v, Tensor) else v for k, v in given.items()
        }
        parts = boxes.transpose(0, 1)
        shapes, order = [shapes[i] for i in prompts.tolist()], rows
        places = torch.arange(len(rows))
    else:
        # Images cannot be told apart by rows: all prompts pass, once for every text.
        order = torch.arange(len(texts)).view(-1, copies).T.flatten()
        some = _stacked(given, copies)
        counts = torch.tensor([len(row) for row in grid.shapes])[order]
        first = counts.cumsum(0) - counts
        places = torch.zeros(len(texts), dtype=torch.long).scatter(
            0, order, torch.arange(len(order))
        )
        places = places[rows.cpu()]
        parts = torch.tensor(_WHOLE).repeat(n_fields, int(counts.sum()), 1)
        parts[:, first[places] + image.cpu()] = boxes.transpose(0, 1).float().cpu()
        shapes = shapes * copies
    longer = _with_text(some, texts[order.to(texts.device)], len(ids[0]))
    pixels = [enlarged_parts(some, shapes, part) for part in parts]
    stacked = _stacked(longer, n_fields) | {"pixel_values": torch.cat(pixels)}
    logits = _passed(source, info.owner, stacked)
    return logits.view(n_fields, len(order), -1)[:, places.to(logits.device)].transpose(0, 1)


def _stacked(given: Mapping[str, Any], times: int) -> dict[str, Any]:
    """A batch several times over, one after the other."""
    return {k: torch.cat([v] * times) if isinstance(v, Tensor) else v for k, v in given.items()}


def _with_text(given: Mapping[str, Any], texts: Tensor, prompt: int) -> dict[str, Any]:
    """The inputs of prompts with what was generated behind them."""
    new = texts.shape[1] - prompt
    longer = dict(given)
    for name, value in given.items():
        if is_per_token(name, value, len(texts), prompt):
            more = value[:, -1:].expand(-1, new, *value.shape[2:])
            longer[name] = torch.cat([value, more], dim=1)
    return longer | {"input_ids": texts}


def _passed(source: Source, owner: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """``[batch, vocabulary]`` float32 logits behind the last token."""
    again = Source(source.model, source.generate, dict(inputs))
    with kept_module_state(source.model), torch.no_grad():
        prompt = again.with_inputs({}, {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}, 0)
        token = ACTIVE.set(Probe())  # so that no steering follows this forward
        try:
            output = owner(**{**prompt, "use_cache": False, "past_key_values": None})
        finally:
            ACTIVE.reset(token)
    logits: Tensor = output.logits[:, -1]
    return logits.float()
