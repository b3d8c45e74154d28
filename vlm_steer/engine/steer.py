"""Attach interventions to a model, and take them off again.

``attach`` and ``steer`` change three things on a model and nothing else: the attention name on
the language model's configuration, forward hooks, and the instance's ``generate``, which is
bracketed so that one generation has one state. The last detach undoes all three.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlm_steer.engine import attention
from vlm_steer.engine.active import ACTIVE, Probe
from vlm_steer.engine.branches import Backend, Source, intercept, is_capturing
from vlm_steer.engine.call import Call, Encoding, Forward, states_after
from vlm_steer.engine.control import Control
from vlm_steer.engine.hooks import Method
from vlm_steer.engine.model import ModelInfo, inspect_model, unwrap
from vlm_steer.engine.plan import Bound, Plan, make_plan
from vlm_steer.engine.run import Run, named_arguments
from vlm_steer.engine.wiring import (
    hook_decoder,
    hook_vision,
    restore_attention,
    switch_attention,
)
from vlm_steer.errors import ConfigError, SteerError, SteerWarning, UnsupportedModelError

__all__ = ["Steering", "attach", "engaged", "last_hidden_states", "steer"]

_LOCK = threading.RLock()
_HISTORY = 8


class Steering:
    """Interventions on one model: what ``attach`` and ``steer`` return."""

    def __init__(
        self,
        installation: "_Installation",
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
        self._warn_of_model()

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
            SteerError: A method acts on that part of the prompt, see ``Plan.prefix``.
        """
        model = self._installation.info.model
        if self._plan.prefix is None:
            raise SteerError(
                "prefill(): these methods act before the question, or on the whole prompt, so "
                "every prompt needs a pass of its own. Call generate() with the whole prompts."
            )
        if self._plan.prefix == "untouched":
            with steer(model, None):
                return model(**inputs, use_cache=True).past_key_values
        run = self.new_run(Source(model), None)
        token = _GENERATION.set(run)
        try:
            cache = model(**inputs, use_cache=True).past_key_values
        finally:
            _GENERATION.reset(token)
            run.leave()
            run.close()
        self._installation.remember(run, cache)
        return cache

    def fork(self, cache: Any, rows: Tensor) -> None:
        """Turn a cache from ``prefill`` into one of other rows; a row may be taken several times.

        Args:
            cache: The cache; changed in place.
            rows: ``[new rows]`` int64, the row that each new row continues.
        """
        run = self._installation.earlier(cache)
        cache.batch_select_indices(rows)
        if run is not None and run.call is not None:
            run.call.positive.select(rows)

    def detach(self) -> None:
        """Take the interventions off. Doing it twice is harmless."""
        with _LOCK:
            if self._is_active:
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

    def belongs_to(self, installation: "_Installation") -> bool:
        """Whether this steering is on that model."""
        return self._installation is installation

    def new_run(self, source: Source, earlier: Run | None) -> Run:
        """Start following a generation; ``earlier`` is the one that filled its cache."""
        return Run(self._plan, source, self._backend, earlier)

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

    def _warn_of_model(self) -> None:
        for bound in self._plan.bounds:
            for warning in bound.method.warnings(bound.constants):
                warnings.warn(f"{bound.method.name}: {warning}", SteerWarning, stacklevel=4)

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


def attach(model: Any, spec: Any, *, processor: Any = None, backend: Backend = "auto") -> Steering:
    """Attach interventions to a model until ``detach()``.

    Args:
        model: A transformers vision-language model, or a PEFT model around one.
        spec: ``"var"``, ``"var+vcd"``, a list, a mapping, a YAML path, a method object, or
            ``None`` for none.
        processor: The model's processor, if at hand: its image token must be the model's. Methods
            that add text to a branch, such as ``icd``, need it.
        backend: How contrast branches run, see ``vlm_steer.engine.branches``.

    Raises:
        ConfigError: The specification is wrong.
        UnsupportedModelError: The model cannot be steered this way.
    """
    return _install(model, spec, backend, processor, is_attached=True)


@contextmanager
def steer(
    model: Any, spec: Any, *, processor: Any = None, backend: Backend = "auto"
) -> Iterator[Steering]:
    """Steer a model inside a ``with`` block.

    Inside the block this steering replaces any other on the model, attached or nested; ``None``
    forces the unsteered model. Other threads keep their own.

    Args:
        model: A transformers vision-language model, or a PEFT model around one.
        spec: See ``attach``.
        processor: See ``attach``.
        backend: See ``attach``.

    Yields:
        The steering, with ``status()``, ``update()``, ``effect()`` and ``records()``.
    """
    steering = _install(model, spec, backend, processor, is_attached=False)
    token = _CONTEXT.set((*_CONTEXT.get(), steering))
    try:
        yield steering
    finally:
        _CONTEXT.reset(token)
        steering.detach()


@contextmanager
def engaged(info: ModelInfo) -> Iterator[None]:
    """Have the engine on a model while it runs extra streams, steering nothing by itself."""
    with _LOCK:
        installation = _INSTALLED.get(info.model) or _Installation(info)
        steering = Steering(installation, (), "auto")
        installation.add(steering, is_attached=False)
        _INSTALLED[info.model] = installation
    token = _CONTEXT.set((*_CONTEXT.get(), steering))
    try:
        yield
    finally:
        _CONTEXT.reset(token)
        steering.detach()


_CONTEXT: ContextVar[tuple[Steering, ...]] = ContextVar("vlm_steer_context", default=())
_GENERATION: ContextVar[Run | None] = ContextVar("vlm_steer_generation", default=None)
_INSTALLED: "weakref.WeakKeyDictionary[nn.Module, _Installation]" = weakref.WeakKeyDictionary()


def _install(
    model: Any, spec: Any, backend: Backend, processor: Any, *, is_attached: bool
) -> Steering:
    from vlm_steer.config import resolve

    methods = resolve(spec)
    base = unwrap(model)
    _check_processor(processor, base)
    with _LOCK:
        installation = _INSTALLED.get(base) or _Installation(inspect_model(base))
        steering = Steering(installation, methods, backend, processor)
        installation.add(steering, is_attached=is_attached)
        _INSTALLED[base] = installation
    return steering


def _check_processor(processor: Any, model: nn.Module) -> None:
    token_id = getattr(processor, "image_token_id", None)
    if not isinstance(token_id, int):
        return
    known = inspect_model(model).image_token_ids
    if token_id not in known:
        raise ConfigError(
            f"the processor's image token is {token_id}, but the model's is "
            f"{' or '.join(map(str, known))}. Load both from the same checkpoint."
        )


class _Installation:
    """Everything of ours that is on one model, and who uses it."""

    def __init__(self, info: ModelInfo):
        self.info = info
        self._contexts: list[Steering] = []
        self._attached: list[Steering] = []
        self._handles: list[RemovableHandle] = []
        self._own_generate: Any = None
        self._runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()

    # -- coming and going ---------------------------------------------------------------------
    def add(self, steering: Steering, *, is_attached: bool) -> None:
        if not self._contexts and not self._attached:
            self._put_on()
        (self._attached if is_attached else self._contexts).append(steering)

    def remove(self, steering: Steering) -> None:
        for group in (self._contexts, self._attached):
            if steering in group:
                group.remove(steering)
        if not self._contexts and not self._attached:
            self._take_off()
            _INSTALLED.pop(self.info.model, None)

    def _put_on(self) -> None:
        switch_attention(self.info.configs)
        owner = self.info.owner
        self._handles += [
            owner.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            owner.register_forward_hook(self._after, always_call=True),
        ]
        if owner is not self.info.model:
            self._handles.append(
                self.info.model.register_forward_pre_hook(self._enclose, with_kwargs=True)
            )
            self._handles.append(
                self.info.model.register_forward_hook(self._unclose, always_call=True)
            )
        self._handles += hook_decoder(self.info)
        self._handles += hook_vision(self.info, self._encoding)
        model = self.info.model
        self._own_generate = vars(model).get("generate")
        model.generate = self._bracket(model.generate)  # type: ignore

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        model = self.info.model
        del model.generate
        if self._own_generate is not None:
            model.generate = self._own_generate
        restore_attention(self.info.configs)

    # -- finding what applies -----------------------------------------------------------------
    def current(self) -> Steering | None:
        """This context's own steering, else the innermost of any thread, else the attached."""
        for steering in reversed(_CONTEXT.get()):
            if steering.belongs_to(self):
                return steering
        others = self._contexts or self._attached
        return others[-1] if others else None

    # -- generate() ---------------------------------------------------------------------------
    def _bracket(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def steered_generate(*args: Any, **kwargs: Any) -> Any:
            steering = self.current()
            if steering is None or steering.is_off or self._generation() is not None:
                return generate(*args, **kwargs)
            raw = {"inputs": args[0], **kwargs} if args else dict(kwargs)
            _refuse_mode(steering.plan, raw)
            search, control = steering.plan.search, None
            if search is not None:
                control = Control(search, self.info.model, raw)
                raw = control.arguments
            cache = raw.get("past_key_values")
            run = steering.new_run(
                Source(self.info.model, generate, _inputs_of(raw)), self.earlier(cache)
            )
            token = _GENERATION.set(run)
            try:
                if control is None:
                    output = generate(*args, **kwargs)
                else:
                    output = generate(**raw, custom_generate=control.loop(run))
            finally:
                _GENERATION.reset(token)
                run.leave()
                run.close()
            self.remember(run, getattr(output, "past_key_values", None) if cache is None else cache)
            steering.finish(run.call, output)
            return output

        return steered_generate

    def _generation(self) -> Run | None:
        run = _GENERATION.get()
        return run if run is not None and run.source.model is self.info.model else None

    def _encoding(self) -> Encoding | None:
        """Under what images are being encoded in this context."""
        active = ACTIVE.get()
        if isinstance(active, Forward):
            call = active.call
            return Encoding(call.plan, active.streams[0].is_positive, call.vision)
        run = self._generation()
        if active is not None or run is None:
            return None
        return Encoding(run.plan, not is_capturing(), run.vision)

    # -- forwards -----------------------------------------------------------------------------
    def _enclose(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A plain forward of a model around the one that returns logits: one run as well."""
        steering = self.current()
        if ACTIVE.get() is not None or self._generation() is not None:
            return
        if steering is None or steering.is_off or is_capturing():
            return

        def again(past_key_values: Any, use_cache: bool, **inputs: Any) -> Any:
            return model(**inputs)

        source = Source(self.info.model, again, named_arguments(model, args, kwargs))
        run = steering.new_run(source, None)
        run.enclosing = _GENERATION.set(run)

    def _unclose(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run = self._generation()
        if run is None or run.enclosing is None:
            return
        _GENERATION.reset(run.enclosing)
        run.leave()
        run.close()
        steering = self.current()
        if steering is not None:
            steering.finish(run.call, output)

    def _before(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if ACTIVE.get() is not None:
            return None
        kwargs = named_arguments(owner, args, kwargs)
        intercept(kwargs)
        run = self._generation() or self._plain_run(kwargs)
        if run is None:
            return None
        if owner.training:
            raise UnsupportedModelError(
                "the model was put into training mode while steered. Call model.eval() first."
            )
        return (), run.before(owner, kwargs)

    def _after(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = Run.inside(owner)
        if run is None:
            return None
        output = run.after(owner, output)
        if self._generation() is None and run.call is not None:
            self.remember(run, getattr(output, "past_key_values", None))
            steering = self.current()
            if steering is not None and run.call.step <= 2:
                steering.finish(run.call, output)
        return output

    def _plain_run(self, kwargs: dict[str, Any]) -> Run | None:
        """The run of a forward outside ``generate``: a new one, or the one that owns its cache."""
        steering = self.current()
        if steering is None or steering.is_off:
            return None
        cache = kwargs.get("past_key_values")
        earlier = self.earlier(cache)
        if (
            earlier is not None
            and cache is not None
            and cache.get_seq_length() > 0
            and earlier.plan is steering.plan
        ):
            return earlier
        return steering.new_run(Source(self.info.model), earlier)

    def earlier(self, cache: Any) -> Run | None:
        """The last run that filled this cache."""
        try:
            return self._runs.get(cache) if cache is not None else None
        except TypeError:
            return None

    def remember(self, run: Run, cache: Any) -> None:
        """Know later which run filled this cache."""
        if cache is not None:
            self._runs[cache] = run


_NOT_FOR_BRANCHES = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "assistant_model",
    "custom_generate",
    "stop_strings",
    "tokenizer",
)


def _inputs_of(raw: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``generate`` that decide what its first forward gets."""
    return {name: value for name, value in raw.items() if name not in _NOT_FOR_BRANCHES}


def _refuse_mode(plan: Plan, raw: dict[str, Any]) -> None:
    """Refuse, by name, ways of generating that steering cannot follow."""

    def option(name: str) -> Any:
        value = raw.get(name)
        return getattr(raw.get("generation_config"), name, None) if value is None else value

    if option("prefill_chunk_size") is not None:
        raise UnsupportedModelError(
            "prefill_chunk_size splits the prompt over several forwards, which steering cannot "
            "follow. Leave it unset."
        )
    if option("cache_implementation") == "paged":
        raise UnsupportedModelError(
            "a paged cache (continuous batching) cannot be steered. Use the default cache."
        )
    is_static = "static" in str(option("cache_implementation"))
    if is_static and plan.model.model.device.type != "cpu" and not option("disable_compile"):
        raise UnsupportedModelError(
            "a static cache makes generate() compile the model, which steering cannot follow. "
            "Pass disable_compile=True, or use the default cache."
        )
    if not plan.has_branches:
        return
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if option(name) is not None:
            raise UnsupportedModelError(
                f"{name} verifies several tokens in one forward, which a contrast branch cannot "
                "follow. Generate without it, or without the contrast method."
            )


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


def last_hidden_states(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """States of the last token after every decoder layer, every intervention off.

    Args:
        model: A transformers vision-language model, or a PEFT model around one.
        inputs: Arguments of one forward, padded on the left.

    Returns:
        ``[batch, layers, hidden]`` in the model's dtype.

    Raises:
        UnsupportedModelError: The model cannot be steered at all.
    """
    with steer(model, None):
        info = inspect_model(model)
        probe = Probe(taps=frozenset(info.layers))
        token = ACTIVE.set(probe)
        try:
            with torch.inference_mode():
                info.model(**inputs)
        finally:
            ACTIVE.reset(token)
    return states_after(probe.states, range(info.n_layers))
