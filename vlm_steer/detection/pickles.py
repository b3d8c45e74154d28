"""Published Lookback Lens classifiers, read without running anything that is in them."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlm_steer.detection.base import build_detector
from vlm_steer.detection.fitting import Logistic
from vlm_steer.detection.store import FittedDetector
from vlm_steer.errors import DataError

__all__ = ["convert_lookback"]


class _Plain:
    """Stands in for a class of scikit-learn: it holds a state and does nothing."""

    state: dict[str, Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


class _Array:
    """Stands in for an array of numpy until its bytes are there."""

    value: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, content = state
        if not isinstance(kind, _Kind) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array holds something else than numbers")
        flat = np.frombuffer(content, dtype=kind.dtype)
        self.value = flat.reshape(shape, order="F" if is_fortran else "C")


class _Kind:
    """Stands in for a numeric type of numpy."""

    def __init__(self, name: str, *_: Any) -> None:
        if not isinstance(name, str) or name.lstrip("<>|=")[:1] not in "fiub":
            raise pickle.UnpicklingError(f"a numeric type {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if isinstance(order, str) and order in "<>=":
            self.dtype = self.dtype.newbyteorder(order)  # type: ignore[arg-type]  # checked above


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: _Kind, content: bytes) -> float:
    return float(np.frombuffer(content, dtype=kind.dtype)[0])


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("sklearn.linear_model._logistic", "LogisticRegression"): _Plain,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    **{
        (f"{core}.multiarray", name): stand_in
        for core in ("numpy.core", "numpy._core")
        for name, stand_in in (("_reconstruct", _empty_array), ("scalar", _scalar))
    },
}
"""Everything that a file may name, and what stands in for it."""


class _Reader(pickle.Unpickler):
    """Builds plain data; whatever else a file names is refused before it can act."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def convert_lookback(path: Path, *, layers: int, heads: int) -> FittedDetector:
    """A detector from a pickle of the official Lookback Lens code.

    Its classifier rates what is factual; here the sign is turned, so that higher is riskier.

    Args:
        path: The file.
        layers: Decoder layers of its model.
        heads: Heads per layer.

    Raises:
        DataError: The file is missing, damaged, holds something else, or weights of another model.
    """
    try:
        content = _Reader(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        KeyError,
        OverflowError,
    ) as error:
        raise DataError(
            f"{path} is no pickle of a Lookback Lens classifier: {error}. Nothing in it was run."
        ) from error
    classifier = content.get("clf") if isinstance(content, dict) else content
    state = getattr(classifier, "state", {})
    found = [state.get(name) for name in ("coef_", "intercept_")]
    arrays = [array for array in found if isinstance(array, _Array)]
    if len(arrays) != 2:
        raise DataError(f"{path} holds no logistic regression with coef_ and intercept_.")
    coef, intercept = (torch.tensor(array.value.astype(np.float64)).flatten() for array in arrays)
    if len(coef) != layers * heads or len(intercept) != 1:
        raise DataError(
            f"{path} holds {len(coef)} weights, but {layers} layers of {heads} heads need "
            f"{layers * heads}. Give the --layers and --heads of its model."
        )
    detector = build_detector("lookback_ratio", {"parts": ["context"]})
    logistic = Logistic(
        coef=-coef,
        intercept=-intercept[0],
        mean=torch.zeros_like(coef),
        scale=torch.ones_like(coef),
    )
    shape = {"layers": layers, "heads": heads, "n_features": len(coef)}
    return FittedDetector(
        detector, logistic, made_for=shape, made_of={"source": path.name, "preset": "paper"}
    )
