"""Lets the unsteered model write a text of its own before the user's generation begins."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from vlm_steer.engine.active import ACTIVE, Probe
from vlm_steer.engine.branches import Source
from vlm_steer.engine.hooks import Written
from vlm_steer.engine.model import ModelInfo, kept_module_state
from vlm_steer.engine.plan import Bound
from vlm_steer.engine.prompts import edit_of, with_insertion
from vlm_steer.errors import SteerError, UnsupportedModelError

__all__ = ["write"]

_KEPT = ("eos_token_id", "pad_token_id", "bos_token_id")
_OF_ONE_FORWARD = ("labels", "logits_to_keep", "position_ids", "return_dict", "cache_position")


def write(
    source: Source,
    bound: Bound,
    model: ModelInfo,
    kwargs: Mapping[str, Any],
    kinds: Tensor,
    max_new_tokens: int,
) -> Written:
    """Write greedily, every intervention off, what another prompt about the same images asks for.

    Args:
        source: Where the user's inputs came from.
        bound: The method, whose ``request`` makes the other prompt.
        model: The model.
        kwargs: Arguments of the user's forward.
        kinds: ``[batch, prompt]`` codes of ``Columns``; rows may be repeated as beams.
        max_new_tokens: Limit.

    Raises:
        UnsupportedModelError: The token ids of the prompt are not known.
    """
    if bound.request is None:
        raise SteerError(f"{bound.method.name} asked for a text without a request.")
    given = {**source.given(kwargs)}
    ids = given.pop("inputs", None) if given.get("input_ids") is None else given["input_ids"]
    if not isinstance(ids, Tensor) or ids.shape[1] != kinds.shape[1]:
        raise UnsupportedModelError(
            "a method lets the model write about the image beforehand, and needs the token ids of "
            "the whole prompt. Pass input_ids of the whole conversation."
        )
    copies = kinds.shape[0] // ids.shape[0]
    edit = edit_of(bound.request, kinds[::copies], ids, model.begin_token_ids)
    inputs = _inputs({**given, "input_ids": ids})
    prompt = with_insertion(inputs, edit, model.model.get_input_embeddings())
    generate: Any = type(source.model).generate  # type: ignore[attr-defined]  # not the steered one
    token = ACTIVE.set(Probe())  # so that no steering follows these forwards
    try:
        with kept_module_state(source.model), torch.no_grad():
            output = generate(
                source.model,
                **prompt,
                **_ends(given),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
    finally:
        ACTIVE.reset(token)
    return _written(output, _end_ids(given, source.model), copies)


def _inputs(given: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the model, without the options of ``generate`` and of a single forward."""
    config: Any = GenerationConfig
    options = {*config().to_dict(), "generation_config", "use_cache", "past_key_values"}
    return {
        name: value
        for name, value in given.items()
        if value is not None
        and name not in options
        and name not in _OF_ONE_FORWARD
        and not name.startswith("output_")
    }


def _ends(given: Mapping[str, Any]) -> dict[str, Any]:
    config = given.get("generation_config")
    ends = {name: given.get(name, getattr(config, name, None)) for name in _KEPT}
    return {name: value for name, value in ends.items() if value is not None}


def _end_ids(given: Mapping[str, Any], model: Any) -> list[int]:
    end = _ends(given).get("eos_token_id", model.generation_config.eos_token_id)
    if isinstance(end, Tensor):
        end = end.tolist()
    return [] if end is None else end if isinstance(end, list) else [end]


def _written(output: Any, end_ids: list[int], copies: int) -> Written:
    logits = torch.stack(output.logits, dim=1)
    ids = output.sequences[:, -logits.shape[1] :]
    is_end = torch.isin(ids, torch.tensor(end_ids, dtype=ids.dtype, device=ids.device))
    is_text = ~(is_end.cumsum(dim=1) > 0)
    return Written(*(t.repeat_interleave(copies, dim=0) for t in (ids, is_text, logits)))
