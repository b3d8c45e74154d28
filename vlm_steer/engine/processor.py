"""Contrasts as a logits processor, for generation code that takes nothing else."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from vlm_steer.engine.branches import Source
from vlm_steer.engine.hooks import LAYER_HOOKS
from vlm_steer.engine.plan import Plan
from vlm_steer.engine.run import Run
from vlm_steer.engine.steer import engaged, steer
from vlm_steer.errors import SteerError, UnsupportedModelError

__all__ = ["LogitsProcessor"]


class LogitsProcessor(transformers.LogitsProcessor):
    """A contrast as an ordinary logits processor of transformers.

    The extra streams live in the processor, with caches of their own; the user's stream is not
    touched, so only methods that combine logits can be used. Greedy decoding, sampling, beams and
    several return sequences give the tokens that ``vlm_steer.steer`` gives. One processor can be
    used for one generation after the other, over the same inputs.

    Args:
        model: A transformers vision-language model.
        spec: See ``vlm_steer.attach``.
        inputs: The arguments of ``generate`` that hold the prompt: what the processor returned.
        processor: The model's processor, for methods that add text.

    Example:
        A contrast in plain transformers code::

            contrast = vlm_steer.LogitsProcessor(model, "vcd", inputs)
            model.generate(**inputs, logits_processor=[contrast])

    Raises:
        ConfigError: The specification is wrong.
        UnsupportedModelError: A method acts inside the model.
    """

    supports_continuous_batching = False

    def __init__(self, model: Any, spec: Any, inputs: Mapping[str, Any], *, processor: Any = None):
        with steer(model, spec, processor=processor) as steering:
            self._plan: Plan = steering.plan
        _refuse_layers(self._plan)
        self._inputs = dict(inputs)
        if not isinstance(self._inputs.get("input_ids"), Tensor):
            raise SteerError("LogitsProcessor needs the input_ids that generate() is given.")
        self._run: Run | None = None
        self._prompt: dict[str, Any] = {}
        self._ids: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Contrasted log-probabilities ``[rows, vocabulary]`` for scores of the same shape."""
        if not self._plan.bounds:
            return scores
        info = self._plan.model
        with engaged(info), torch.no_grad():
            before = self._ids
            if before is None or input_ids.shape[1] != before.shape[1] + 1:
                run, kwargs, past = self._start(input_ids)
            else:
                run, kwargs, past = self._follow(before, input_ids)
            self._ids = input_ids
            combined = run.beside(info.owner, kwargs, scores, past)
        # Beams add up what they are given, and need it normalised.
        return combined.log_softmax(dim=-1)

    def _start(self, input_ids: Tensor) -> tuple[Run, dict[str, Any], int]:
        given = self._inputs["input_ids"]
        if input_ids.shape[1] != given.shape[1] or input_ids.shape[0] % given.shape[0] != 0:
            raise SteerError(
                f"LogitsProcessor was made for prompts of shape {tuple(given.shape)} and called "
                f"with {tuple(input_ids.shape)}. Make one per prompt, and generate without "
                "assistants, which check several tokens at once."
            )
        copies = input_ids.shape[0] // given.shape[0]
        model = self._plan.model.model
        raw = {**self._inputs, "num_return_sequences": copies, "do_sample": copies > 1}
        generate: Any = model.generate
        source = Source(model, generate, raw | {"num_beams": 1})
        self._prompt = source.whole_prompt({}, given.shape[1])
        self._run = Run(self._plan, source, "separate")
        return self._run, self._prompt, 0

    def _follow(self, before: Tensor, input_ids: Tensor) -> tuple[Run, dict[str, Any], int]:
        run = self._run
        if run is None:
            raise SteerError("LogitsProcessor was called before its prompt was read.")
        if run.branches is not None:
            run.branches.reorder(self._parents(before, input_ids))
        new = input_ids.shape[1] - self._inputs["input_ids"].shape[1]
        kwargs = {"input_ids": input_ids[:, -1:], "past_key_values": object()}
        if (positions := self._prompt.get("position_ids")) is not None:
            kwargs["position_ids"] = positions[..., -1:] + new
        if (mask := self._prompt.get("cross_attention_mask")) is not None:
            kwargs["cross_attention_mask"] = mask[:, -1:]
        return run, kwargs, input_ids.shape[1] - 1

    def _parents(self, before: Tensor, input_ids: Tensor) -> Tensor:
        """Which row of the step before each row goes on from: beam search moves them."""
        rows = input_ids.shape[0]
        group = torch.arange(rows, device=input_ids.device)
        group = group // (rows // self._inputs["input_ids"].shape[0])
        is_same = (input_ids[:, None, :-1] == before[None]).all(dim=-1)
        is_same &= group[:, None] == group[None]
        # Where several rows are the same so far, a row goes on from itself if it can.
        own = torch.eye(rows, device=input_ids.device)
        return (is_same.float() + own * is_same).argmax(dim=1)


def _refuse_layers(plan: Plan) -> None:
    for bound in plan.bounds:
        method = bound.method
        inside = [
            hook
            for hook in (*LAYER_HOOKS, "positions", "prepare", "select_taps", "search")
            if method.overrides(hook) and hook not in method.own
        ]
        if inside:
            raise UnsupportedModelError(
                f"{method.name} acts inside the model ({', '.join(inside)}), which a logits "
                "processor cannot. Use vlm_steer.steer or vlm_steer.attach."
            )
