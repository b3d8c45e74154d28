"""Lets the unsteered model write a text of its own before the user's generation begins."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vlm_steer import functional as F
from vlm_steer.engine.active import ACTIVE, Probe
from vlm_steer.engine.branches import Source
from vlm_steer.engine.hooks import Writing, Written
from vlm_steer.engine.model import ModelInfo, kept_module_state
from vlm_steer.engine.plan import Bound
from vlm_steer.engine.prompts import edit_of, with_insertion
from vlm_steer.errors import SteerError, UnsupportedModelError
from vlm_steer.generation import without_prompt

__all__ = ["model_inputs", "write"]

_KEPT = ("eos_token_id", "pad_token_id", "bos_token_id")
_OF_ONE_FORWARD = ("labels", "logits_to_keep", "position_ids", "return_dict", "cache_position")


def write(
    source: Source,
    bound: Bound,
    model: ModelInfo,
    kwargs: Mapping[str, Any],
    kinds: Tensor,
    writing: Writing,
) -> Written:
    """Write, every intervention off, what another prompt about the same images asks for.

    Args:
        source: Where the user's inputs came from.
        bound: The method, whose ``requests`` make the other prompts.
        model: The model.
        kwargs: Arguments of the user's forward.
        kinds: ``[batch, prompt]`` codes of ``Columns``; rows may be repeated as beams.
        writing: What to write and how.

    Raises:
        UnsupportedModelError: The token ids of the prompt are not known.
    """
    if not bound.requests:
        raise SteerError(f"{bound.method.name} asked for a text without a request.")
    given = {**source.given(kwargs)}
    ids = given.pop("inputs", None) if given.get("input_ids") is None else given["input_ids"]
    if not isinstance(ids, Tensor) or ids.shape[1] != kinds.shape[1]:
        raise UnsupportedModelError(
            "a method lets the model write about the image beforehand, and needs the token ids of "
            "the whole prompt. Pass input_ids of the whole conversation."
        )
    copies = kinds.shape[0] // ids.shape[0]
    more = None if writing.more is None else writing.more[::copies]
    request = bound.requests[writing.request]
    edit = edit_of(request, kinds[::copies], ids, model.begin_token_ids, more)
    inputs = model_inputs({**given, "input_ids": ids})
    prompt = with_insertion(inputs, edit, model.model.get_input_embeddings())
    generate: Any = type(source.model).generate  # type: ignore[attr-defined]  # not the steered one
    token = ACTIVE.set(Probe())  # so that no steering follows these forwards
    random = torch.random.fork_rng(devices=_devices(source.model))
    try:
        with kept_module_state(source.model), torch.no_grad(), random:
            output = generate(
                source.model,
                **prompt,
                **_ends(given),
                **_decoding(writing),
                max_new_tokens=writing.max_new_tokens,
                output_logits=writing.keeps_logits,
                return_dict_in_generate=True,
            )
    finally:
        ACTIVE.reset(token)
    asked = prompt["input_ids"].repeat_interleave(writing.starts or 1, dim=0)
    ids = without_prompt(output.sequences, asked)
    return _written(ids, output.logits, _end_ids(given, source.model), writing, copies)


def _devices(model: Any) -> list[Any]:
    return [] if model.device.type == "cpu" else [model.device]


def _decoding(writing: Writing) -> dict[str, Any]:
    """The options of ``generate`` that write so."""
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    if writing.starts is not None:
        # What is drawn is decided before: sampling is the way to have several rows per prompt.
        options |= {"do_sample": True, "num_return_sequences": writing.starts, "top_k": 0}
        options |= {"temperature": 1.0, "top_p": 1.0}
    if writing.starts is not None or writing.temperature is not None:
        options["logits_processor"] = LogitsProcessorList([_Choice(writing)])
    if writing.until:
        options["stopping_criteria"] = StoppingCriteriaList([_Until(writing.until)])
    return options


class _Choice(LogitsProcessor):
    """Leaves one token to choose: at the start by rank, then drawn by numbers of its own."""

    def __init__(self, writing: Writing):
        self._writing = writing
        self._generator = torch.Generator().manual_seed(writing.seed)
        self._has_started = writing.starts is None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        texts = self._writing.starts or 1
        if not self._has_started:
            self._has_started = True
            ranked = scores.topk(texts, dim=-1).indices
            rank = torch.arange(len(scores), device=scores.device)[:, None] % texts
            tokens = ranked.gather(1, rank)
        elif self._writing.temperature is None:
            tokens = scores.argmax(dim=-1, keepdim=True)
        else:
            waiting = torch.empty(texts, scores.shape[1]).exponential_(generator=self._generator)
            waiting = waiting.repeat(len(scores) // texts, 1).to(scores.device)
            scores = scores.float() / self._writing.temperature
            kept = F.nucleus(scores, top_p=self._writing.top_p)
            tokens = F.draw_tokens(scores.masked_fill(~kept, -torch.inf), waiting)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


class _Until(StoppingCriteria):
    """Ends a text behind some tokens."""

    def __init__(self, ids: tuple[int, ...]):
        self._ids = torch.tensor(ids)

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.isin(input_ids[:, -1], self._ids.to(input_ids.device))


def model_inputs(given: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the model, without the options of ``generate`` and of a single forward.

    Args:
        given: What the user passed.
    """
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


def _written(ids: Tensor, steps: Any, end_ids: list[int], writing: Writing, copies: int) -> Written:
    ends, until = (
        torch.isin(ids, torch.tensor(known, dtype=ids.dtype, device=ids.device))
        for known in (end_ids, writing.until)
    )
    is_text = (ends.cumsum(dim=1) == 0) & (until.cumsum(dim=1) - until.long() == 0)
    logits = torch.stack(steps, dim=1) if writing.keeps_logits else torch.empty(len(ids), 0)
    texts = writing.starts or 1
    return Written(
        *(
            t.reshape(len(ids) // texts, texts, *t.shape[1:])
            .repeat_interleave(copies, dim=0)
            .flatten(0, 1)
            for t in (ids, is_text, logits)
        )
    )
