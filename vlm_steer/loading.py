"""Load a model and its processor by name: the embedded one, a folder, or a hub id."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm_steer.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

__all__ = ["TINY", "load_model"]

TINY = "tiny"
"""The name of the embedded model."""

_DTYPES = ("auto", "float32", "float16", "bfloat16")


def load_model(
    name: str,
    *,
    dtype: str | None = None,
    device_map: str | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load an image-text-to-text model and its processor, ready to generate.

    Args:
        name: ``"tiny"`` for the embedded model, the folder of a saved model, or a hub id.
        dtype: ``auto``, ``float32``, ``float16`` or ``bfloat16``; what the model's configuration
            asks for when omitted.
        device_map: as in transformers (``auto``, ``cuda``, ``cpu``, ...); the CPU when omitted.
        quantization: ``4bit`` or ``8bit``, by bitsandbytes; ``none`` or omitted for neither.
        revision: branch, tag or commit of a hub model.
        attn: attention implementation (``sdpa``, ``eager``, ...).
        trust_remote_code: run code that comes with the model. Only for sources that you trust.

    Returns:
        The model in evaluation mode and the processor.

    Raises:
        ConfigError: an option is unknown or cannot act on the embedded model, or something that it
            needs is not installed.
        UnsupportedModelError: there is no such model, or it is not an image-text-to-text model.
    """
    from transformers import AutoModelForImageTextToText

    quantization = None if quantization == "none" else quantization
    options: dict[str, Any] = {
        "dtype": _dtype(dtype),
        "device_map": device_map,
        "attn_implementation": attn,
    }
    if name == TINY:
        return _load_tiny(options, quantization, revision)
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, options["dtype"])
    source = {"revision": revision} if revision is not None else {}
    given = {key: value for key, value in options.items() if value is not None}
    processor = _load_processor(name, source, trust_remote_code)
    load: Any = AutoModelForImageTextToText.from_pretrained
    try:
        model = load(name, **given, **source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(name, error) from error
    return model.eval(), processor


def _load_tiny(
    options: dict[str, Any], quantization: str | None, revision: str | None
) -> tuple[Any, Any]:
    for option, value in (("quantization", quantization), ("revision", revision)):
        if value is not None:
            raise ConfigError(
                f"--{option} {value} has no effect on the embedded model 'tiny'; leave it out"
            )
    from vlm_steer.tiny import load_tiny

    dtype = None if options["dtype"] == "auto" else options["dtype"]
    model, processor = load_tiny(dtype=dtype)
    if options["attn_implementation"] is not None:
        model.set_attn_implementation(options["attn_implementation"])
    if options["device_map"] not in (None, "auto"):
        model = model.to(options["device_map"])
    return model, processor


def _load_processor(name: str, source: dict[str, str], trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    load: Any = AutoProcessor.from_pretrained
    try:
        processor = load(name, **source, trust_remote_code=trust_remote_code)
    except ImportError as error:
        if "torchvision" in str(error):
            raise ConfigError(
                f"the processor of {name} needs torchvision, which is not installed; run "
                "`pip install vlm-steer[vision]`"
            ) from error
        raise ConfigError(
            f"the processor of {name} needs a package that is not installed: {error}"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(name, error) from error
    if getattr(processor, "image_processor", None) is None:
        raise UnsupportedModelError(
            f"{name} has no image processor (its processor is {type(processor).__name__}); give a "
            "vision-language model"
        )
    return processor


def _not_loadable(name: str, error: Exception) -> UnsupportedModelError:
    kind = "folder" if Path(name).is_dir() else "hub id"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UnsupportedModelError(
        f"no image-text-to-text model could be loaded from the {kind} {name!r} ({reason}); give "
        "'tiny', the folder of a saved model, or the hub id of a model that "
        "AutoModelForImageTextToText accepts"
    )


def _dtype(name: str | None) -> "torch.dtype | Literal['auto'] | None":
    import torch

    if name is None or name == "auto":
        return "auto" if name == "auto" else None
    if name not in _DTYPES:
        raise ConfigError(f"--dtype {name} is unknown; choose one of {', '.join(_DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _quantization(name: str, dtype: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if name not in ("4bit", "8bit"):
        raise ConfigError(f"--quantization {name} is unknown; choose 4bit, 8bit or none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"--quantization {name} needs bitsandbytes, which is not installed; run "
            "`pip install bitsandbytes`, or leave the option out"
        )
    config: Any = BitsAndBytesConfig
    if name == "8bit":
        return config(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return config(load_in_4bit=True, bnb_4bit_compute_dtype=compute)
