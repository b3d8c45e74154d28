"""What is put on a model while it is steered, and taken off again.

Three things and nothing else: the attention name on the language model's configuration, forward
hooks, and the instance's ``generate``, which is bracketed so that one generation has one state.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from vlm_steer.engine.active import ACTIVE
from vlm_steer.engine.branches import Source, intercept, is_capturing
from vlm_steer.engine.call import Encoding
from vlm_steer.engine.control import Control
from vlm_steer.engine.forward import Forward
from vlm_steer.engine.model import ModelInfo, inspect_model
from vlm_steer.engine.plan import Plan
from vlm_steer.engine.run import Run, named_arguments
from vlm_steer.engine.wiring import hook_decoder, hook_vision, restore_attention, switch_attention
from vlm_steer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from vlm_steer.engine.handle import Steering

__all__ = ["Installation", "following", "in_context", "info_of", "join"]

_LOCK = threading.RLock()
_CONTEXT: ContextVar[tuple["Steering", ...]] = ContextVar("vlm_steer_context", default=())
_GENERATION: ContextVar[Run | None] = ContextVar("vlm_steer_generation", default=None)
_INSTALLED: "weakref.WeakKeyDictionary[nn.Module, Installation]" = weakref.WeakKeyDictionary()


def info_of(model: nn.Module) -> ModelInfo:
    """What the engine knows about a model; one that is steered was looked at before."""
    with _LOCK:
        installation = _INSTALLED.get(model)
        return inspect_model(model) if installation is None else installation.info


def join(
    info: ModelInfo, make: Callable[["Installation"], "Steering"], *, is_attached: bool
) -> "Steering":
    """Add a steering to those on a model, the first of which puts everything on."""
    with _LOCK:
        installation = _INSTALLED.get(info.model) or Installation(info)
        steering = make(installation)
        installation.add(steering, is_attached=is_attached)
        _INSTALLED[info.model] = installation
    return steering


@contextmanager
def in_context(steering: "Steering") -> Iterator[None]:
    """Let a steering replace all others of its model in this context, then detach it."""
    token = _CONTEXT.set((*_CONTEXT.get(), steering))
    try:
        yield
    finally:
        _CONTEXT.reset(token)
        steering.detach()


@contextmanager
def following(run: Run) -> Iterator[None]:
    """Let a run follow what its model does in this context."""
    token = _GENERATION.set(run)
    try:
        yield
    finally:
        _GENERATION.reset(token)
        run.leave()
        run.close()


class Installation:
    """Everything of ours that is on one model, and who uses it."""

    def __init__(self, info: ModelInfo):
        self.info = info
        self._contexts: list[Steering] = []
        self._attached: list[Steering] = []
        self._handles: list[RemovableHandle] = []
        self._own_generate: Any = None
        self._runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()

    # -- coming and going ---------------------------------------------------------------------
    def add(self, steering: "Steering", *, is_attached: bool) -> None:
        """Remember a steering; the first one puts everything on."""
        if not self._contexts and not self._attached:
            self._put_on()
        (self._attached if is_attached else self._contexts).append(steering)

    def remove(self, steering: "Steering") -> None:
        """Forget a steering; the last one takes everything off. Doing it twice is harmless."""
        with _LOCK:
            group = next((g for g in (self._contexts, self._attached) if steering in g), None)
            if group is None:
                return
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
    def current(self) -> "Steering | None":
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
            with following(run):
                if control is None:
                    output = generate(*args, **kwargs)
                else:
                    output = generate(**raw, custom_generate=control.loop(run))
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
