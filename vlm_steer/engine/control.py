"""Runs methods that take the place of the decoding loop of ``generate``.

``generate`` prepares inputs, caches, processors and stopping criteria as ever, and hands them to
the loop here (``custom_generate``), which asks the model for scores as the loops of transformers
do. The rows of a search are the rows that ``generate`` makes for beams, so whatever follows beams
(caches, branches, module state) follows a search.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from vlm_steer.engine.closer import look_closer
from vlm_steer.engine.grid import grid_of
from vlm_steer.engine.hooks import Grid
from vlm_steer.engine.inputs import n_rows
from vlm_steer.engine.pictures import pictures_by_row
from vlm_steer.engine.search import Asked, Found, SearchSetup
from vlm_steer.errors import SteerError, UnsupportedModelError

if TYPE_CHECKING:
    from vlm_steer.engine.plan import Bound
    from vlm_steer.engine.run import Run

__all__ = ["Control"]

_REFUSED = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "custom_generate",
    "output_attentions",
    "output_hidden_states",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "synced_gpus",
)


class Control:
    """One generation whose tokens a method chooses.

    Args:
        bound: The method.
        model: The model.
        raw: What the user passed to ``generate``.

    Raises:
        UnsupportedModelError: The user asked for something that a search cannot do.
    """

    def __init__(self, bound: "Bound", model: PreTrainedModel, raw: Mapping[str, Any]):
        self._bound = bound
        self._model = model
        name = bound.method.name
        for option in _REFUSED:
            if self._option(raw, option):
                raise UnsupportedModelError(
                    f"{name} chooses tokens itself, which {option} of generate() does not go "
                    f"with. Generate without {option}, or without {name}."
                )
        cache = raw.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise UnsupportedModelError(
                f"{name} runs several rows per prompt and cannot continue a cache. Generate from "
                "the whole prompt, without past_key_values."
            )
        self.asked = Asked(
            samples=bool(self._option(raw, "do_sample")),
            num_beams=self._option(raw, "num_beams") or 1,
            num_return_sequences=self._option(raw, "num_return_sequences") or 1,
            length_penalty=float(self._option(raw, "length_penalty", 1.0)),
            early_stopping=self._option(raw, "early_stopping", False),
        )
        self.setup: SearchSetup = bound.method.search_setup(self.asked)
        self._streamer = raw.get("streamer")
        if self._streamer is not None and not self.setup.streams:
            raise UnsupportedModelError(
                f"{name} may take tokens back, so there is nothing to stream before its end. "
                f"Generate without a streamer, or without {name}."
            )
        if self.setup.takes_back and self._option(raw, "cache_implementation"):
            raise UnsupportedModelError(
                f"{name} takes tokens back, which caches of a chosen cache_implementation may "
                f"not. Generate without cache_implementation, or without {name}."
            )
        self.arguments = self._arranged(raw)

    def _option(self, raw: Mapping[str, Any], name: str, default: Any = None) -> Any:
        """An option of ``generate``: as passed, as in the configuration passed, or the model's."""
        for value in (
            raw.get(name),
            getattr(raw.get("generation_config"), name, None),
            getattr(self._model.generation_config, name, None),
        ):
            if value is not None:
                return value
        return default

    def _arranged(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments under which ``generate`` makes the rows and scores of the search."""
        setup, arguments = self.setup, {**raw, "streamer": None}
        if setup.sampling is not None or self.asked.samples:
            arguments |= {"do_sample": True, "num_beams": 1, "num_return_sequences": setup.rows}
            arguments |= setup.sampling or {}
        else:
            arguments |= {"do_sample": False, "num_beams": setup.rows, "num_return_sequences": 1}
        # A loop of our own is not given the tokenizer, which stop strings need.
        stop, tokenizer = self._option(raw, "stop_strings"), arguments.pop("tokenizer", None)
        if stop is not None and tokenizer is not None:
            criteria = [*(raw.get("stopping_criteria") or ())]
            criteria.append(
                StopStringCriteria(tokenizer, [stop] if isinstance(stop, str) else stop)
            )
            arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
            arguments.pop("stop_strings", None)
            if (config := raw.get("generation_config")) is not None:
                arguments["generation_config"] = config = copy.copy(config)
                config.stop_strings = None
        return arguments

    def loop(self, run: "Run") -> Callable[..., Any]:
        """What ``generate`` calls in place of a loop of its own."""

        def search(
            model: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Any:
            decoding = _Decoding(
                self, run, model, input_ids, logits_processor, stopping_criteria, generation_config
            )
            with model._optimize_model_for_decode():
                decoding.start(model_kwargs)
                found = self._bound.method.search(decoding)
            if self._streamer is not None:
                self._streamer.end()
            return decoding.output(found)

        return search

    @property
    def bound(self) -> "Bound":
        """The method."""
        return self._bound

    @property
    def streamer(self) -> Any:
        """The user's streamer, if any."""
        return self._streamer


class _Decoding:
    """See ``vlm_steer.engine.search.Decoding``."""

    def __init__(
        self,
        control: Control,
        run: "Run",
        model: Any,
        ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ):
        self.asked = control.asked
        self.plan = control.bound.constants
        self.ids = ids
        self.prompt_length = ids.shape[1]
        self.is_done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        self._n_tokens = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
        self.scores = self.logits = torch.empty(0)
        self.is_finished = False
        self._control, self._run, self._model = control, run, model
        self._processors, self._criteria, self._config = processors, criteria, config
        self._kwargs: dict[str, Any] = {}
        self._pad = self.pad
        self._streamed = self.prompt_length
        self._earlier: list[dict[str, Any]] = []
        self._kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        self.trace = ids.new_empty(ids.shape[0], 0)

    @property
    def pad(self) -> int:
        """Id that fills up texts behind their end."""
        pad = self._config._pad_token_tensor
        return 0 if pad is None else int(pad)

    @property
    def seen(self) -> Mapping[int, Tensor]:
        """What the method's own ``observe`` hook returned in the last pass."""
        return {} if self._run.call is None else self._run.call.seen

    @property
    def grid(self) -> Grid:
        """Where the image tokens of the prompts lie."""
        call = self._run.call
        if call is None:
            raise SteerError("a search asked for the grid of an image before its first pass.")
        geometry, kinds = call.plan.model.geometry, call.positive.layout.prompt
        return grid_of(geometry, kinds, call.grids, call.copies)

    def decoded(self, texts: Sequence[Tensor] | Tensor) -> list[str]:
        processor = self._run.plan.processor
        tokenizer = getattr(processor, "tokenizer", processor)
        if tokenizer is None:
            raise SteerError("a search read its text without needs_processor.")
        found: list[str] = tokenizer.batch_decode(texts, skip_special_tokens=True)
        return found

    def pictures(self) -> tuple[tuple[Tensor, ...], ...]:
        grid, given = self.grid, self._run.source.given({})
        copies = self.ids.shape[0] // max(n_rows(given), 1)
        return pictures_by_row(given, grid, copies, self._run.plan.processor)

    def closer(self, rows: Tensor, image: Tensor, boxes: Tensor) -> Tensor:
        texts = self.ids[:, :-1]
        run = self._run
        return look_closer(run.source, run.plan.model, self.grid, texts, rows, image, boxes)

    # -- passes -------------------------------------------------------------------------------
    def start(self, kwargs: dict[str, Any]) -> None:
        """Run the prompt."""
        self._kwargs = kwargs
        if (streamer := self._control.streamer) is not None:
            streamer.put(self.ids[:: self._rows_per_sequence].cpu())
        self._take(self._model._prefill(self.ids, self._config, kwargs))

    def append(self, tokens: Tensor) -> None:
        tokens = tokens.masked_fill(self.is_done, self._pad)
        self._n_tokens = self._n_tokens + ~self.is_done
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        scores = tuple(self._kept["scores"]) if self._config.output_scores else None
        self.is_done = self.is_done | self._criteria(self.ids, scores)
        self.is_finished = bool(self.is_done.all())
        if self.is_finished:
            return
        length = 1 if self._kwargs["use_cache"] else None
        inputs = self._model.prepare_inputs_for_generation(
            self.ids, next_sequence_length=length, **self._kwargs
        )
        self._take(self._model(**inputs, return_dict=True))

    def _take(self, outputs: Any) -> None:
        if self._control.setup.takes_back:
            self._earlier.append(dict(self._kwargs))
        self._kwargs = self._model._update_model_kwargs_for_generation(
            outputs, self._kwargs, is_encoder_decoder=False
        )
        last = outputs.logits[:, -1]
        self.logits = last.to(copy=True, dtype=torch.float32, device=self.ids.device)
        given = self.logits if self._config.do_sample else self.logits.log_softmax(dim=-1)
        ids: Any = self.ids
        self.scores = self._processors(ids, given)
        for name, kept in self._kept.items():
            if getattr(self._config, f"output_{name}"):
                kept.append(getattr(self, name))
        rows = torch.arange(self.ids.shape[0], device=self.ids.device)
        self.trace = torch.cat([self.trace, rows[:, None]], dim=1)

    # -- rows ---------------------------------------------------------------------------------
    def reorder(self, rows: Tensor) -> None:
        self.ids, self.is_done = self.ids[rows], self.is_done[rows]
        self._n_tokens = self._n_tokens[rows]
        self.scores, self.logits = self.scores[rows], self.logits[rows]
        self.trace = self.trace[rows]
        cache = self._kwargs.get("past_key_values")
        if cache is None:
            return
        if hasattr(self._model, "_reorder_cache"):
            self._kwargs["past_key_values"] = self._model._reorder_cache(cache, rows)
        else:
            cache.reorder_cache(rows)

    def take_back(self, n: int) -> None:
        n_passes = self.trace.shape[1] - n
        for kept in self._kept.values():
            del kept[n_passes:]
        self.ids, self.trace = self.ids[:, :-n], self.trace[:, :n_passes]
        left = self.ids.shape[1] - self.prompt_length
        self.is_done = self.is_done & (self._n_tokens <= left)  # others end later, or not at all
        self._n_tokens = self._n_tokens.clamp(max=left)
        # The arguments of a pass, before what it had in its cache was added to.
        cache, self._kwargs = self._kwargs.get("past_key_values"), self._earlier[n_passes]
        del self._earlier[n_passes:]
        if cache is not None:
            cache.crop(-n)
            self._kwargs["past_key_values"] = cache
        self._run.take_back(n)

    @property
    def _rows_per_sequence(self) -> int:
        return self._control.setup.rows // self.asked.num_return_sequences

    # -- results ------------------------------------------------------------------------------
    def commit(self, rows: Tensor, length: int) -> None:
        if (streamer := self._control.streamer) is None:
            return
        end = self.prompt_length + length
        for tokens in self.ids[rows, self._streamed : end].cpu().unbind(dim=1):
            streamer.put(tokens)
        self._streamed = end

    def count_changes(self, changes: Tensor) -> None:
        call = self._run.call
        if call is not None:
            index = self._control.bound.index
            call.changes[index] = call.changes.get(index, 0) + changes.sum()

    def output(self, found: Found) -> Any:
        """What ``generate`` returns."""
        if self._run.call is not None:
            self._run.call.traced = found.trace
        if not self._config.return_dict_in_generate:
            return found.ids
        passed = found.trace.clamp(min=0).unbind(dim=1)
        kept: dict[str, Any] = {
            name: tuple(step[rows] for step, rows in zip(kept, passed, strict=False)) or None
            for name, kept in self._kept.items()
        }
        kept["sequences"] = found.ids
        if found.scores is None:
            return GenerateDecoderOnlyOutput(**kept)
        return GenerateBeamDecoderOnlyOutput(**kept, sequences_scores=found.scores)
