"""Files that hold what was calibrated for one model, such as the heads that ACT acts on.

Plain JSON. The shape of the model and a few of its weights are in the file, so that it is not
applied to another.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_steer.errors import ConfigError

if TYPE_CHECKING:
    from vlm_steer.engine.model import ModelInfo

__all__ = [
    "are_other_weights",
    "differences",
    "model_identity",
    "model_shape",
    "read_calibration",
    "weights_sample",
    "write_calibration",
]

VERSION = 1

_N_SAMPLED = 16
# A value cast to bfloat16, the coarsest type that models run in, is off by 2**-8 of itself at most;
# the smallest ones are rounded by float16 to multiples of 6e-8.
_RELATIVE, _ABSOLUTE = 2**-7, 1e-6


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


def model_identity(model: "ModelInfo") -> dict[str, Any]:
    """The shape of a model, and a sample of its ``weights`` where one can be taken."""
    sample = weights_sample(model)
    return {**model_shape(model), **({} if sample is None else {"weights": sample})}


def weights_sample(model: "ModelInfo") -> list[float] | None:
    """16 values of the input embeddings, which tell apart models that were trained apart.

    Quantisation leaves this matrix alone, and of an adapted model the base counts.

    Returns:
        The values, or ``None`` where they are not in memory, packed, or not finite.
    """
    matrix = next(model.model.get_input_embeddings().parameters())
    if matrix.is_meta or not matrix.is_floating_point():
        return None
    places = torch.linspace(0, matrix.numel() - 1, _N_SAMPLED, dtype=torch.float64).long()
    values = matrix.detach().flatten()[places.to(matrix.device)].double()
    if not bool(values.isfinite().all()):
        return None
    return [float(f"{value:.6g}") for value in values.tolist()]


def are_other_weights(known: object, here: object) -> bool:
    """Whether two samples differ by more than casts do; not where one of them is missing."""
    if known is None or here is None:
        return False
    if not (isinstance(known, list) and isinstance(here, list) and len(known) == len(here)):
        return True
    return not all(
        isinstance(a, float | int) and math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
        for a, b in zip(known, here, strict=True)
    )


def differences(known: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What of the facts about a model here is not as it was known, in words."""
    found = [
        f"{name} {known[name]} instead of {value}"
        for name, value in here.items()
        if name != "weights" and known.get(name, value) != value
    ]
    is_other = are_other_weights(known.get("weights"), here.get("weights"))
    return [*found, "other weights"] if is_other else found


def write_calibration(
    path: str | os.PathLike[str], method: str, model: "ModelInfo", result: Mapping[str, Any]
) -> None:
    """Write what was found for a method and a model.

    Raises:
        ConfigError: The file cannot be written.
    """
    data = {"version": VERSION, "method": method, "model": model_identity(model), **result}
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
    known = data.get("model")
    known = known if isinstance(known, Mapping) else {}
    differing = differences(known, model_identity(model))
    differing += [f"unknown {fact}" for fact in model_shape(model) if fact not in known]
    if differing:
        raise ConfigError(
            f"{method}: {name} was made for another model: {', '.join(differing)}. {again}"
        )
    return data
