"""Recording traces: while a model generates, or in one pass over a text that is there already.

Attention rows are computed beside the model's own kernel, and only those that predict a generated
token, so nothing is ever ``[heads, sequence, sequence]`` and the text does not change.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from vlm_steer.detection._inputs import answer_cue, prompt_layout, trace_layouts, with_answers
from vlm_steer.detection._observers import Maps, Masses
from vlm_steer.detection._passes import Lens, blind_logprob, predicted, received, token_stats
from vlm_steer.detection.trace import Trace, TraceLayout, char_spans
from vlm_steer.engine.call import Call
from vlm_steer.engine.forward import Forward
from vlm_steer.engine.grid import grids_among
from vlm_steer.engine.hooks import Columns, Method, Selector
from vlm_steer.engine.model import inspect_model, kept_module_state
from vlm_steer.engine.plan import Plan, make_plan
from vlm_steer.engine.steer import engaged, steer
from vlm_steer.engine.streams import Stream
from vlm_steer.errors import ConfigError
from vlm_steer.generation import answer_ids, without_prompt

__all__ = ["NEEDS", "Need", "trace_answers", "trace_generation"]

Need: TypeAlias = Literal["maps", "received", "lens", "blind"]

NEEDS: tuple[Need, ...] = ("maps", "received", "lens", "blind")
"""What a trace holds only when asked for; all but ``maps`` need ``trace_answers``."""


def trace_answers(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    answers: Sequence[Tensor | Sequence[int]],
    *,
    needs: Sequence[Need] = (),
    layers: Selector = "all",
    map_layers: Selector = "all",
    received_scope: Literal["response", "sequence"] = "response",
    cue: int | None = None,
) -> list[Trace]:
    """Trace texts that are there already, in one pass over prompts and answers.

    The unsteered model reads them. For a text that it wrote itself this gives what
    ``trace_generation`` gives, at the cost of one forward; ``received``, ``lens`` and ``blind``
    come this way only.

    Args:
        model: A transformers vision-language model, or a PEFT model around one.
        processor: Its processor.
        inputs: What the processor returned for the prompts, padded on the left.
        answers: Token ids of each answer, 1 or more, end token included where there is one.
        needs: What else to record, see ``NEEDS``. ``received`` and ``blind`` cost one more pass
            each, ``lens`` the output head on every image token in every layer.
        layers: Decoder layers to record.
        map_layers: Decoder layers to record maps of.
        received_scope: For ``received``: tokens of the response, or of the whole sequence.
        cue: Trailing prompt tokens that open the answer; measured on the chat template if omitted.

    Returns:
        One trace per row.

    Raises:
        ConfigError: The answers do not fit the inputs, or a selector reaches outside the model.
        UnsupportedModelError: The model cannot be traced.
    """
    info = inspect_model(model)
    _check_needs(needs, NEEDS)
    ids = [torch.as_tensor(answer, dtype=torch.long) for answer in answers]
    layout = prompt_layout(info, inputs)
    if layout.prompt.shape[0] != len(ids) or not all(len(answer) for answer in ids):
        raise ConfigError(
            f"{len(ids)} answers of {[len(answer) for answer in ids]} tokens were given for "
            f"{layout.prompt.shape[0]} prompts. Give one answer of at least one token per prompt."
        )
    layouts = trace_layouts(info, layout, inputs, answer_cue(processor) if cue is None else cue)
    whole, is_answer = with_answers(inputs, ids, info)
    text = whole["input_ids"][:, layout.prompt_length :]
    width = text.shape[1]
    is_image = Columns(layout.prompt).is_image
    lens = Lens(info, is_image, text) if "lens" in needs else None
    with engaged(info), torch.inference_mode(), kept_module_state(info.model):
        stream = Stream("positive", layout)
        plan = make_plan(_observers(layouts, needs, layers, map_layers), info, processor)
        call = Call(plan, stream, grids_among(inputs))
        forward = Forward(call, (stream,), 0, layout.prompt_length + width)
        with lens.watching() if lens else ExitStack():
            logits = predicted(info, whole, width, forward)
        extra: dict[str, list[Any]] = {}
        if lens is not None:
            extra["lens"] = list(lens.found())
        if "received" in needs:
            extra["received"] = received(info, whole, layout, is_answer, received_scope, layers)
        if "blind" in needs:
            extra["blind"] = list(blind_logprob(info, whole, layout, is_answer))
    records = {
        name: torch.stack([seen[layer][:, :width] for layer in sorted(seen)], dim=2)
        for name, seen in forward.observed.items()
    }
    marks = {key: marked[:, : layout.prompt_length] for key, marked in stream.marks.items()}
    seen = _Seen(plan, records, marks, token_stats(logits, text))
    tokenizer = getattr(processor, "tokenizer", processor)
    return [
        seen.trace(tokenizer, answer, layouts[row], row, row, {k: v[row] for k, v in extra.items()})
        for row, answer in enumerate(ids)
    ]


# -- while generating -------------------------------------------------------------------------
def trace_generation(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    *,
    methods: Any = None,
    needs: Sequence[Need] = (),
    layers: Selector = "all",
    map_layers: Selector = "all",
    cue: int | None = None,
    **options: Any,
) -> list[Trace]:
    """Generate, and trace what was generated while it is written.

    Args:
        model: A transformers vision-language model, or a PEFT model around one.
        processor: Its processor.
        inputs: What the processor returned for the prompts, padded on the left.
        methods: What to steer with, see ``vlm_steer.steer``; the trace shows the steered model.
        needs: ``maps``, or nothing; the rest needs ``trace_answers``.
        layers: Decoder layers to record.
        map_layers: Decoder layers to record maps of.
        cue: Trailing prompt tokens that open the answer; measured on the chat template if omitted.
        **options: What ``generate`` takes: sampling, beams, several sequences per prompt.

    Returns:
        One trace per generated sequence.

    Raises:
        ConfigError: An option is not for here, or a selector reaches outside the model.
        UnsupportedModelError: The model cannot be traced.
    """
    from vlm_steer.config import resolve

    info = inspect_model(model)
    _check_needs(needs, ("maps",))
    clashing = sorted({"output_logits", "return_dict_in_generate", *inputs} & set(options))
    if clashing:
        raise ConfigError(
            f"trace_generation sets {', '.join(clashing)} itself, or gets it with the inputs. "
            "Leave it out."
        )
    layout = prompt_layout(info, inputs)
    layouts = trace_layouts(info, layout, inputs, answer_cue(processor) if cue is None else cue)
    chosen = (*resolve(methods), *_observers(layouts, needs, layers, map_layers))
    with steer(model, chosen, processor=processor) as steering, torch.inference_mode():
        options |= {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
        output = model.generate(**inputs, **options)
        records = {name: seen.squeeze(3) for name, seen in steering.records(output).items()}
        plan, marks = steering.plan, steering.marks(output)
    copies = len(output.sequences) // len(layouts)
    prompts = inputs["input_ids"].repeat_interleave(copies, dim=0)
    text = without_prompt(output.sequences, prompts)[:, : len(output.logits)]
    answers = answer_ids(model, output.sequences, inputs["input_ids"])
    logits = torch.stack(_followed(output.logits, getattr(output, "beam_indices", None)), dim=1)
    seen = _Seen(plan, records, marks, token_stats(logits, text))
    tokenizer = getattr(processor, "tokenizer", processor)
    marked = len(next(iter(marks.values()))) // len(layouts)
    return [
        seen.trace(
            tokenizer,
            answer,
            layouts[row // copies],
            row,
            row // copies * marked,
            {},
        )
        for row, answer in enumerate(answers)
    ]


def _followed(logits: Sequence[Tensor], beams: Tensor | None) -> list[Tensor]:
    """Logits ``[sequences, vocabulary]`` per step, of the beams each sequence came from."""
    if beams is None:
        return list(logits)
    return [step[beams[:, i].clamp(min=0)] for i, step in enumerate(logits[: beams.shape[1]])]


# -- from what was seen to traces -------------------------------------------------------------
@dataclass(frozen=True)
class _Seen:
    """What was recorded of a batch of sequences.

    Attributes:
        plan: The plan with the observers.
        records: By observer, ``[sequences, tokens, layers, heads, ...]``.
        marks: By index in the plan and layer, ``[batch, prompt]`` bool, the sinks.
        stats: ``[3, sequences, tokens]``: log-probability, entropy, margin.
    """

    plan: Plan
    records: Mapping[str, Tensor]
    marks: Mapping[tuple[int, int], Tensor]
    stats: Tensor

    def trace(
        self,
        tokenizer: Any,
        ids: Tensor,
        layout: TraceLayout,
        row: int,
        prompt_row: int,
        extra: Mapping[str, Any],
    ) -> Trace:
        """The trace of one sequence; ``prompt_row`` is the row of its prompt in ``marks``."""
        n = len(ids)
        text, spans = char_spans(tokenizer, ids.tolist())
        logprob, entropy, margin = self.stats[:, row, :n].cpu()
        bounds = {bound.method.name: bound for bound in self.plan.bounds}
        masses = self.records[Masses.name][row, :n].float().cpu()
        # Blocks of images that other rows of the batch have, and this one has not.
        kept = [0, *range(1, len(layout.images) + 1), *range(-5, 0)]
        masses = masses[..., kept]
        maps = self.records.get(Maps.name)
        layers = tuple(sorted(bounds[Masses.name].layers))
        found = [self.marks[bounds[Masses.name].index, layer] for layer in layers]
        is_cross = self.plan.model.has_cross_attention
        n_image = 0 if is_cross else layout.image_columns.shape[0]
        return Trace(
            text=text,
            ids=ids,
            spans=spans,
            logprob=logprob,
            entropy=entropy,
            margin=margin,
            layout=layout,
            layers=layers,
            masses=masses[..., :-2],
            image_entropy=masses[..., -2],
            sink_mass=masses[..., -1],
            sinks=torch.stack([m[prompt_row, -layout.prompt_length :].cpu() for m in found]),
            map_layers=() if maps is None else tuple(sorted(bounds[Maps.name].layers)),
            maps=None if maps is None else _of_row(maps[row, :n], n_image),
            **_extras(extra, n, layers),
        )


def _of_row(maps: Tensor, n_image: int) -> Tensor:
    """Maps without the columns of longer rows; cross-attention has columns of its own."""
    return (maps[..., :n_image] if n_image else maps).half().cpu()


def _extras(extra: Mapping[str, Any], n: int, layers: tuple[int, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if "received" in extra:
        found |= dict(zip(("received", "own", "n_rows"), extra["received"], strict=True))
    if "lens" in extra:
        found["lens"] = extra["lens"][:n, list(layers)].float().cpu()
    if "blind" in extra:
        found["blind"] = extra["blind"][:n].cpu()
    return found


def _observers(
    layouts: Sequence[TraceLayout], needs: Sequence[Need], layers: Selector, map_layers: Selector
) -> tuple[Method, ...]:
    n_images = max(len(layout.images) for layout in layouts)
    masses = Masses(layers=layers, cue=layouts[0].cue, n_images=n_images)
    return (masses, Maps(layers=map_layers)) if "maps" in needs else (masses,)


def _check_needs(needs: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(needs) - set(known))
    if unknown:
        raise ConfigError(
            f"needs {', '.join(unknown)} cannot be recorded here; choose among {', '.join(known)}. "
            "All but maps come from trace_answers, which reads a finished text once more."
        )
