"""What ``vlm-steer models`` reports."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm_steer.engine.steer import attach
from vlm_steer.errors import SteerError, SteerWarning

if TYPE_CHECKING:
    from vlm_steer.engine.hooks import Method

__all__ = ["check", "families"]


def families() -> dict[str, str]:
    """The vision-language families of the installed transformers: ``model_type`` to class name."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    return {str(name): str(cls) for name, cls in sorted(NAMES.items())}


def check(
    model: Any, processor: Any, specs: "Mapping[str, Sequence[Method]]"
) -> dict[str, dict[str, Any]]:
    """Attach each specification to a model by itself and take it off again.

    Returns:
        Per specification what ``status()`` says, with the warnings of attaching under
        ``warnings``; or, where attaching is refused, the reason under ``refused``.
    """
    return {name: _check_one(model, processor, methods) for name, methods in specs.items()}


def _check_one(model: Any, processor: Any, methods: "Sequence[Method]") -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SteerWarning)
        try:
            handle = attach(model, methods, processor=processor)
        except SteerError as error:
            return {"refused": str(error)}
        status = handle.status()
        handle.detach()
    return {**status, "warnings": [str(w.message) for w in caught]}
