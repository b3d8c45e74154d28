"""Steer any HuggingFace vision-language model to look at its image.

The names below load on first use, so that ``import vlm_steer`` costs nothing and needs no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_steer import functional
    from vlm_steer.engine.processor import LogitsProcessor
    from vlm_steer.engine.steer import attach, steer
    from vlm_steer.explanation.explaining import explain
    from vlm_steer.loading import load_model
    from vlm_steer.registry import get_method, list_methods, register_method
    from vlm_steer.tiny import load_tiny

__version__ = "0.1.0"

__all__ = [
    "LogitsProcessor",
    "__version__",
    "attach",
    "explain",
    "functional",
    "get_method",
    "list_methods",
    "load_model",
    "load_tiny",
    "register_method",
    "steer",
]

_HOMES = {
    "LogitsProcessor": "vlm_steer.engine.processor",
    "attach": "vlm_steer.engine.steer",
    "explain": "vlm_steer.explanation.explaining",
    "get_method": "vlm_steer.registry",
    "list_methods": "vlm_steer.registry",
    "load_model": "vlm_steer.loading",
    "load_tiny": "vlm_steer.tiny",
    "register_method": "vlm_steer.registry",
    "steer": "vlm_steer.engine.steer",
}


def __getattr__(name: str) -> object:
    if name == "functional":
        return importlib.import_module("vlm_steer.functional")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
