"""Attach interventions to a model, and take them off again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlm_steer.engine.active import ACTIVE, Probe
from vlm_steer.engine.branches import Backend
from vlm_steer.engine.handle import Steering, put_on
from vlm_steer.engine.installation import in_context, info_of
from vlm_steer.engine.model import ModelInfo, unwrap
from vlm_steer.engine.streams import states_after
from vlm_steer.errors import ConfigError

__all__ = ["Steering", "attach", "engaged", "last_hidden_states", "steer"]


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
    with in_context(steering):
        yield steering


@contextmanager
def engaged(info: ModelInfo) -> Iterator[None]:
    """Have the engine on a model while it runs extra streams, steering nothing by itself."""
    with in_context(put_on(info, ())):
        yield


def _install(
    model: Any, spec: Any, backend: Backend, processor: Any, *, is_attached: bool
) -> Steering:
    from vlm_steer.config import resolve

    methods = resolve(spec)
    info = info_of(unwrap(model))
    _check_processor(processor, info)
    steering = put_on(info, methods, backend, processor, is_attached=is_attached)
    # At the user's line: contextlib stands between it and `steer`.
    steering.warn_of_model(stacklevel=4 if is_attached else 5)
    return steering


def _check_processor(processor: Any, info: ModelInfo) -> None:
    token_id = getattr(processor, "image_token_id", None)
    if isinstance(token_id, int) and token_id not in info.image_token_ids:
        raise ConfigError(
            f"the processor's image token is {token_id}, but the model's is "
            f"{' or '.join(map(str, info.image_token_ids))}. Load both from the same checkpoint."
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
    with steer(model, None) as steering:
        info = steering.plan.model
        probe = Probe(taps=frozenset(info.layers))
        token = ACTIVE.set(probe)
        try:
            with torch.inference_mode():
                info.model(**inputs)
        finally:
            ACTIVE.reset(token)
    return states_after(probe.states, range(info.n_layers))
