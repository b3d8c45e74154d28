"""Files that hold what was calibrated for one model, such as the heads that ACT acts on.

Plain JSON. The shape of the model is in the file, so that it is not applied to another.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_steer.errors import ConfigError

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = ["model_shape", "read_calibration", "write_calibration"]

VERSION = 1


def model_shape(model: "ModelInfo") -> dict[str, str | int]:
    """What tells models apart that a calibration cannot be moved between."""
    config = model.text_config
    return {
        "family": model.family,
        "layers": model.n_layers,
        "heads": int(config.num_attention_heads),
        "hidden_size": int(config.hidden_size),
        "vocabulary": int(config.vocab_size),
    }


def write_calibration(
    path: str | os.PathLike[str], method: str, model: "ModelInfo", result: Mapping[str, Any]
) -> None:
    """Write what was found for a method and a model.

    Raises:
        ConfigError: The file cannot be written.
    """
    data = {"version": VERSION, "method": method, "model": model_shape(model), **result}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {os.fspath(path)}: {error.strerror}.") from error


def read_calibration(
    path: str | os.PathLike[str], method: str, model: "ModelInfo"
) -> dict[str, Any]:
    """Read what was found for a method and this model.

    Raises:
        ConfigError: The file is missing or damaged, or was made for another method or model.
    """
    name = os.fspath(path)
    again = f"Make it with: vlm-steer calibrate {method} --model MODEL --output {name}"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{method}: cannot read {name}: {error.strerror}. {again}") from error
    except ValueError as error:
        raise ConfigError(f"{method}: {name} is not JSON: {error}. {again}") from error
    if not isinstance(data, dict) or data.get("method") != method:
        found = data.get("method") if isinstance(data, dict) else None
        raise ConfigError(f"{method}: {name} is a file for {found or 'something else'}. {again}")
    if data.get("version") != VERSION:
        raise ConfigError(
            f"{method}: {name} has version {data.get('version')}, expected {VERSION}. {again}"
        )
    made_for, shape = data.get("model"), model_shape(model)
    if made_for != shape:
        raise ConfigError(
            f"{method}: {name} was made for another model: {_in_words(made_for)}; this one is "
            f"{_in_words(shape)}. {again}"
        )
    return data


def _in_words(shape: object) -> str:
    if not isinstance(shape, Mapping):
        return "unknown"
    return ", ".join(f"{key} {value}" for key, value in shape.items())
