"""A detector that is ready to use, in memory and on disk: safetensors and JSON, nothing executable.

It knows the model it was made on, and refuses another one.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_steer import __version__
from vlm_steer.calibration import model_shape
from vlm_steer.detection._inputs import answer_cue
from vlm_steer.detection.base import Detector, Evidence, Unit, build_detector
from vlm_steer.detection.fitting import CALIBRATORS, Calibrator, Logistic
from vlm_steer.detection.trace import Trace
from vlm_steer.engine.model import inspect_model
from vlm_steer.errors import ConfigError, DataError, SteerWarning

__all__ = ["FittedDetector", "made_for"]

_FORMAT = "vlm_steer.detector/1"
_LOGISTIC = ("coef", "intercept", "mean", "scale")


def made_for(model: Any, processor: Any) -> dict[str, Any]:
    """What a detector depends on: the shape of the model, and how prompts are written."""
    template = getattr(processor, "chat_template", None) or ""
    return {
        **model_shape(inspect_model(model)),
        "cue": answer_cue(processor),
        "chat_template": hashlib.sha256(str(template).encode()).hexdigest()[:16],
    }


@dataclass(frozen=True, eq=False)
class FittedDetector:
    """A detector with its weights and its calibration.

    Attributes:
        detector: What it looks at.
        logistic: Weights of its features; ``None`` where its one feature is the risk.
        calibrator: From that to a probability; ``None`` leaves log-odds, or the feature.
        threshold: Risk above which a unit counts as hallucinated, chosen on calibration images.
        made_for: From ``made_for``, and ``n_features``.
        made_of: What it was fitted on, as plain data.
    """

    detector: Detector
    logistic: Logistic | None = None
    calibrator: Calibrator | None = None
    threshold: float | None = None
    made_for: Mapping[str, Any] = field(default_factory=dict)
    made_of: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_calibrated(self) -> bool:
        """Whether risks are probabilities."""
        return self.calibrator is not None

    def risk(self, trace: Trace, units: Sequence[Unit], evidence: Evidence | None = None) -> Tensor:
        """``[units]`` float64 risks: probabilities where calibrated, else in units of its own."""
        return self.risk_of(self.detector.features(trace, units, evidence))

    def risk_of(self, features: Tensor) -> Tensor:
        """``[units]`` risks of ``[units, d]`` features."""
        raw = self.raw(features)
        return raw if self.calibrator is None else self.calibrator(raw)

    def raw(self, features: Tensor) -> Tensor:
        """``[units]`` risks before calibration: log-odds, or the one feature."""
        if self.logistic is None:
            return self.detector.raw_risk(features)
        return self.logistic.logits(features)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``detector.json`` and, where it has any numbers, ``detector.safetensors``.

        Raises:
            ConfigError: The folder cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        if self.logistic is not None:
            tensors |= {name: getattr(self.logistic, name) for name in _LOGISTIC}
        if self.calibrator is not None:
            tensors["calibrator"] = self.calibrator.values.double()
        about = {
            "format": _FORMAT,
            "detector": self.detector.name,
            "options": self.detector.options(),
            "label_positive": "hallucinated",
            "calibrator": None if self.calibrator is None else self.calibrator.kind,
            "threshold": self.threshold,
            "made_for": dict(self.made_for),
            "made_of": dict(self.made_of),
            "vlm_steer": __version__,
        }
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            contiguous = {name: value.contiguous() for name, value in tensors.items()}
            save_file(contiguous, Path(folder) / "detector.safetensors")
            text = json.dumps(about, indent=2, allow_nan=False)
            (Path(folder) / "detector.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {os.fspath(folder)}: {error.strerror}.") from error

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        model: Any = None,
        processor: Any = None,
        *,
        strict: bool = True,
    ) -> "FittedDetector":
        """Read what ``save`` wrote.

        Args:
            folder: The folder.
            model: The model it is to be used on; ``None`` does not compare.
            processor: Its processor.
            strict: Refuse another model or template; ``False`` warns.

        Raises:
            DataError: The folder is missing or damaged.
            ConfigError: The detector was made for another model, or for other prompts.
        """
        about, tensors = _read(Path(folder))
        try:
            detector = build_detector(about["detector"], about["options"])
            kind = about["calibrator"]
            logistic = None
            if "coef" in tensors:
                logistic = Logistic(*(tensors[name].double() for name in _LOGISTIC))
            calibrator = None
            if kind is not None:
                if kind not in CALIBRATORS:
                    raise DataError(f"{folder}: the calibrator {kind!r} is unknown.")
                calibrator = Calibrator(kind, tensors["calibrator"])
            found = cls(
                detector,
                logistic,
                calibrator,
                about["threshold"],
                about["made_for"],
                about["made_of"],
            )
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{os.fspath(folder)} is no whole detector ({error}). Fit it again."
            ) from error
        if model is not None:
            found.check(model, processor, strict=strict)
        return found

    def check(self, model: Any, processor: Any, *, strict: bool = True) -> None:
        """Refuse, or warn of, a model or prompts that the detector was not made for.

        Raises:
            ConfigError: They differ, and ``strict`` is set.
        """
        here = made_for(model, processor)
        differing = [
            f"{name} {self.made_for[name]} instead of {value}"
            for name, value in here.items()
            if name in self.made_for and self.made_for[name] != value
        ]
        if not differing:
            return
        message = (
            f"{self.detector.name} was made for another model or template: "
            f"{', '.join(differing)}. Fit it on this model: vlm-steer detect fit "
            f"{self.detector.name}."
        )
        if strict:
            raise ConfigError(message)
        warnings.warn(message, SteerWarning, stacklevel=3)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in ("detector.json", "detector.safetensors"):
        if not (folder / name).is_file():
            raise DataError(f"{folder} holds no {name}. Make it with: vlm-steer detect fit.")
    try:
        about = json.loads((folder / "detector.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "detector.safetensors")
    except (ValueError, SafetensorError, OSError) as error:
        raise DataError(f"{folder} is damaged: {error}. Fit the detector again.") from error
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise DataError(f"{folder} holds no detector of vlm-steer (expected format {_FORMAT}).")
    if any(not bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise DataError(f"{folder} holds weights that are not finite. Fit the detector again.")
    return about, tensors
