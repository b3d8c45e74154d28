"""What ``attach`` and ``steer`` return: a handle on the interventions of one model."""

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from vlm_steer.engine import attention
from vlm_steer.engine.branches import Backend, Source
from vlm_steer.engine.caches import take_rows
from vlm_steer.engine.call import Call
from vlm_steer.engine.hooks import Method
from vlm_steer.engine.installation import Installation, following, in_context, join
from vlm_steer.engine.model import ModelInfo
from vlm_steer.engine.plan import Bound, Plan, make_plan
from vlm_steer.engine.run import Run
from vlm_steer.errors import ConfigError, SteerError, SteerWarning

__all__ = ["Steering", "put_on"]

_HISTORY = 8


class Steering:
    """Interventions on one model: what ``attach`` and ``steer`` return."""

    def __init__(
        self,
        installation: Installation,
        methods: tuple[Method, ...],
        backend: Backend,
        processor: Any = None,
    ):
        self._installation = installation
        self._backend = backend
        self._processor = processor
        self._plan = make_plan(methods, installation.info, processor)
        self._last: Call | None = None
        self._outputs: list[tuple[weakref.ref[Any], Call]] = []
        self._effective: set[int] = set()
        self._warned = False
        self._is_active = True

    # -- what a user asks ---------------------------------------------------------------------
    def status(self) -> dict[str, Any]:
        """What is attached to what, as plain data."""
        info = self._installation.info
        bound = {id(b.method): b for b in self._plan.bounds}
        return {
            "active": self._is_active,
            "model": type(info.model).__name__,
            "family": info.family,
            "attention": attention.base_name(info.base_implementation),
            "layers": info.n_layers,
            "methods": [
                {
                    "name": method.name,
                    "neutral": id(method) not in bound,
                    "layers": sorted(bound[id(method)].layers) if id(method) in bound else [],
                    "notes": _notes(bound.get(id(method))),
                }
                for method in self._plan.methods
            ],
        }

    def update(self, **changes: Any) -> None:
        """Change options without attaching again; takes effect at the next generation.

        Args:
            **changes: ``alpha=0.3``, or ``pai={"alpha": 0.3}`` to name the method.

        Raises:
            ConfigError: No method, or more than one, has the option.
        """
        methods = {method.name: method for method in self._plan.methods}
        options: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            if name in methods and isinstance(value, dict):
                options.setdefault(name, {}).update(value)
                continue
            owners = [m for m in methods.values() if name in m.__dataclass_fields__]
            if len(owners) != 1:
                having = " and ".join(m.name for m in owners) or "no attached method"
                raise ConfigError(
                    f"update({name}=...): {having} has this option. Name the method: "
                    f"update(pai={{{name!r}: ...}})."
                )
            options.setdefault(owners[0].name, {})[name] = value
        for name, values in options.items():
            methods[name] = methods[name].replace(**values)
        self._plan = make_plan(tuple(methods.values()), self._installation.info, self._processor)
        self._effective.clear()
        self._warned = False

    def effect(self) -> dict[str, Any]:
        """What the last generation changed, measured on its prompt and first decoding step.

        Returns:
            Per method: ``layers`` maps a layer to the number of attention or hidden-state rows
            changed, the heads changed (mean over the batch, largest pass), and the attention mass
            moved (sum over rows and heads of half the absolute difference); ``probability_moved``
            is the same for next-token probabilities, per row, and over the whole generation, as is
            ``choices_changed`` of methods that search. Those that act in the vision tower have
            ``vision_states``, the states changed there. Empty before the first generation.
        """
        call = self._last
        if call is None:
            return {}
        report: dict[str, Any] = {}
        for bound in call.plan.bounds:
            layers = {
                layer: dict(zip(("rows", "heads", "mass"), touch.tolist(), strict=True))
                for (index, layer), touch in sorted(call.touches.items())
                if index == bound.index
            }
            moved = call.moved.get(bound.index)
            report[bound.method.name] = {
                "layers": layers,
                "probability_moved": None if moved is None else float(moved),
            }
            if (changes := call.changes.get(bound.index)) is not None:
                report[bound.method.name]["choices_changed"] = int(changes)
            if (changed := call.vision.get(bound.index)) is not None:
                report[bound.method.name]["vision_states"] = int(changed)
        return report

    def records(self, output: Any = None) -> dict[str, Tensor]:
        """What observers saw, per generated token.

        Args:
            output: What ``generate`` returned; the last generation when omitted. For beam search
                pass ``return_dict_in_generate=True, output_scores=True`` to ``generate``, so that
                every returned sequence can be traced to the beams it came from.

        Returns:
            Observer name to ``[sequences, tokens, layers, ...]``.

        Raises:
            SteerError: The output did not come from this steering, or beams cannot be traced.
        """
        call: Call = self._call_of(output)
        beams = getattr(output, "beam_indices", None)
        if call.traced is not None:
            beams = call.traced
        if beams is None:
            rows = _n_sequences(output)
            return {name: _stacked(seen, rows) for name, seen in call.records.items()}
        return {name: _follow_beams(seen, beams) for name, seen in call.records.items()}

    def marks(self, output: Any = None) -> dict[tuple[int, int], Tensor]:
        """Columns that the ``marks`` hooks marked, ``[batch, prompt]`` bool.

        Args:
            output: What ``generate`` returned; the last generation when omitted.

        Returns:
            By place in the list of methods that act, and by layer.
        """
        return dict(self._call_of(output).positive.marks)

    def prefill(self, **inputs: Any) -> Any:
        """Run prompts up to and including their last image token, for ``generate`` to continue.

        Together with ``fork`` this lets questions about one image share its pass::

            cache = steering.prefill(**prefix)
            steering.fork(cache, rows)
            model.generate(input_ids=whole_prompts, past_key_values=cache, ...)

        Args:
            **inputs: What ``model(...)`` takes, for the beginning of the prompts only.

        Returns:
            The cache.

        Raises:
            SteerError: A method acts on that part of the prompt, or the model may read it by what
                follows, see ``Plan.prefix``.
        """
        model = self._installation.info.model
        if self._plan.prefix is None:
            raise SteerError(
                "prefill(): these methods act before the question or on the whole prompt, or what "
                f"{self._installation.info.family} makes of an image may depend on the question, "
                "so every prompt needs a pass of its own. Call generate() with the whole prompts."
            )
        if self._plan.prefix == "untouched":
            with in_context(put_on(self._installation.info, ())):
                return model(**inputs, use_cache=True).past_key_values
        run = self.new_run(Source(model), None)
        with following(run):
            cache = model(**inputs, use_cache=True).past_key_values
        self._installation.remember(run, cache)
        return cache

    def fork(self, cache: Any, rows: Tensor) -> None:
        """Turn a cache from ``prefill`` into one of other rows; a row may be taken several times.

        Args:
            cache: The cache; changed in place.
            rows: ``[new rows]`` int64, the row that each new row continues.

        Raises:
            SteerError: The cache has fewer rows.
        """
        run = self._installation.earlier(cache)
        take_rows(cache, rows)
        if run is not None and run.call is not None:
            run.call.positive.select(rows)

    def detach(self) -> None:
        """Take the interventions off. Doing it twice is harmless."""
        self._is_active = False
        self._installation.remove(self)
        self._warn_if_idle()

    # -- what the engine asks -----------------------------------------------------------------
    @property
    def plan(self) -> Plan:
        """The methods resolved for the model."""
        return self._plan

    @property
    def is_off(self) -> bool:
        """Whether this steering forces the unsteered model."""
        return not self._plan.bounds

    def belongs_to(self, installation: Installation) -> bool:
        """Whether this steering is on that model."""
        return self._installation is installation

    def new_run(self, source: Source, earlier: Run | None) -> Run:
        """Start following a generation; ``earlier`` is the one that filled its cache."""
        return Run(self._plan, source, self._backend, earlier)

    def warn_of_model(self, stacklevel: int) -> None:
        """Say what the methods find wanting in the model, at the line that far up the stack."""
        for bound in self._plan.bounds:
            for warning in bound.method.warnings(bound.constants):
                message = f"{bound.method.name}: {warning}"
                warnings.warn(message, SteerWarning, stacklevel=stacklevel)

    def finish(self, call: Call | None, output: Any = None) -> None:
        """Remember a finished generation for ``effect`` and ``records``."""
        if call is None:
            return
        self._last = call
        if output is not None:
            self._outputs = [*self._outputs[-_HISTORY + 1 :], (weakref.ref(output), call)]
        if len(self._effective) < len(call.plan.bounds):
            for (index, _), touch in call.touches.items():
                if index not in self._effective and bool((touch > 0).any()):
                    self._effective.add(index)
            for amounts in (call.moved, call.changes, call.vision):
                self._effective.update(i for i, amount in amounts.items() if float(amount) > 0)
        self._warn_if_idle()

    def _call_of(self, output: Any) -> Call:
        if output is None:
            if self._last is None:
                raise SteerError("records(): nothing was generated under this steering yet.")
            return self._last
        for reference, known in reversed(self._outputs):
            if reference() is output:
                found: Call = known
                return found
        raise SteerError(
            "records(output): this output was not among the last "
            f"{_HISTORY} generated under this steering. Call records() right after generate()."
        )

    def _warn_if_idle(self) -> None:
        call = self._last
        if call is None or self._warned:
            return
        idle = [
            b.method.name
            for b in call.plan.bounds
            if b.index not in self._effective and not b.method.observer
        ]
        if not idle:
            return
        self._warned = True
        why = (
            "the prompt holds no image tokens"
            if not call.positive.layout.has_image
            else "nothing in this model or prompt met its conditions"
        )
        warnings.warn(
            f"{', '.join(idle)} changed nothing in the last generation: {why}. "
            "effect() shows what was changed where.",
            SteerWarning,
            stacklevel=3,
        )


def put_on(
    info: ModelInfo,
    methods: tuple[Method, ...],
    backend: Backend = "auto",
    processor: Any = None,
    *,
    is_attached: bool = False,
) -> Steering:
    """Put interventions, or none, on a model until ``detach()``."""

    def make(installation: Installation) -> Steering:
        return Steering(installation, methods, backend, processor)

    return join(info, make, is_attached=is_attached)


def _notes(bound: Bound | None) -> list[str]:
    if bound is None:
        return []
    method, constants = bound.method, bound.constants
    return [*bound.notes, *method.notes(constants), *method.warnings(constants)]


def _n_sequences(output: Any) -> int | None:
    sequences = getattr(output, "sequences", output)
    return sequences.shape[0] if isinstance(sequences, Tensor) else None


def _stacked(seen: list[Tensor], rows: int | None) -> Tensor:
    """``[sequences, tokens, layers, ...]`` from one ``[batch, layers, ...]`` per step."""
    if rows is not None and seen and seen[0].shape[0] != rows:
        raise SteerError(
            f"records(): {seen[0].shape[0]} beams became {rows} sequences and cannot be traced. "
            "Pass return_dict_in_generate=True and output_scores=True to generate(), and its "
            "output to records()."
        )
    return torch.stack(seen, dim=1)


def _follow_beams(seen: list[Tensor], beams: Tensor) -> Tensor:
    """Gather, for every returned sequence, the rows it was in at each step; NaN past its end."""
    steps = torch.stack(seen)[: beams.shape[1]].float()
    index = beams[:, : steps.shape[0]].clamp(min=0)
    step = torch.arange(steps.shape[0], device=index.device).expand(index.shape)
    gathered = steps[step, index]
    is_past_end = beams[:, : steps.shape[0]] < 0
    return gathered.masked_fill(
        is_past_end.reshape(*index.shape, *[1] * (steps.ndim - 2)), torch.nan
    )
