"""What a generated text depends on, as plain data."""

import hashlib
import importlib.metadata
import json
from typing import Any

import torch

__all__ = ["model_fingerprint", "versions"]

_SAMPLES_PER_TENSOR = 64


def versions() -> dict[str, str]:
    """Releases of the packages that a generated text depends on."""
    return {
        name: importlib.metadata.version(name) for name in ("vlm-steer", "transformers", "torch")
    }


def model_fingerprint(model: Any, name: str) -> dict[str, Any]:
    """A model's identity: its name, how it is run, and a hash of its configuration and weights.

    The hash covers up to 64 evenly spaced values of every parameter, which tells apart any two
    trained models at no noticeable cost; it does not prove that two models are equal everywhere.
    Where the files lie has no part in it.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        if tensor.is_meta or not tensor.numel():
            continue
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
        sample = flat[::step][:_SAMPLES_PER_TENSOR].to("cpu", torch.float64)
        digest.update(sample.numpy().tobytes())
    return {
        "name": name,
        "class": type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "quantization": _quantization(model),
        "generation_defaults": model.generation_config.to_diff_dict(),
        "content": digest.hexdigest(),
    }


def _quantization(model: Any) -> str | None:
    config = getattr(model.config, "quantization_config", None)
    method = getattr(config, "quant_method", None)
    return None if config is None else str(method or type(config).__name__)
