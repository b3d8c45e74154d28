"""A detector that is ready to use, in memory and on disk: safetensors and JSON, nothing executable.

It knows the model it was made on, and refuses another one.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_steer import __version__
from vlm_steer.calibration import differences, model_identity
from vlm_steer.detection._inputs import answer_cue
from vlm_steer.detection.base import Detector, Evidence, Unit, build_detector
from vlm_steer.detection.fitting import Classifier, Logistic
from vlm_steer.detection.hub import FILES, fetched, is_hub_name, push
from vlm_steer.detection.network import Network
from vlm_steer.detection.place import Residual
from vlm_steer.detection.probability import CALIBRATORS, Calibrator, moved
from vlm_steer.detection.trace import Trace
from vlm_steer.engine.model import inspect_model
from vlm_steer.errors import ConfigError, DataError, SteerWarning

__all__ = ["FittedDetector", "made_for"]

_FORMAT = "vlm_steer.detector/2"
_READABLE = (_FORMAT, "vlm_steer.detector/1")
_CLASSIFIERS: Mapping[str, type[Classifier]] = {cls.kind: cls for cls in (Logistic, Network)}
_Rate = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class _About:
    """What ``detector.json`` has to hold."""

    detector: str
    options: dict[str, Any]
    classifier: str | None
    calibrator: str | None
    threshold: FiniteFloat | None
    made_for: dict[str, Any]
    made_of: dict[str, Any]
    fitted_rate: _Rate | None = None
    base_rate: _Rate | None = None


def made_for(model: Any, processor: Any) -> dict[str, Any]:
    """What a detector depends on: the model, and how prompts are written."""
    template = getattr(processor, "chat_template", None) or ""
    return {
        **model_identity(inspect_model(model)),
        "cue": answer_cue(processor),
        "chat_template": hashlib.sha256(str(template).encode()).hexdigest()[:16],
    }


@dataclass(frozen=True, eq=False)
class FittedDetector:
    """A detector with its weights and its calibration.

    Attributes:
        detector: What it looks at.
        classifier: Weights of its features; ``None`` where its one feature is the risk.
        calibrator: From that to a probability; ``None`` leaves log-odds, or the feature.
        threshold: Risk above which a unit counts as hallucinated, chosen on calibration images.
        made_for: From ``made_for``, and ``n_features``.
        made_of: What it was fitted on, as plain data.
        residual: What the place of a word tells of its features is taken off them first.
    """

    detector: Detector
    classifier: Classifier | None = None
    calibrator: Calibrator | None = None
    threshold: float | None = None
    made_for: Mapping[str, Any] = field(default_factory=dict)
    made_of: Mapping[str, Any] = field(default_factory=dict)
    residual: Residual | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether risks are probabilities."""
        return self.calibrator is not None

    def risk(self, trace: Trace, units: Sequence[Unit], evidence: Evidence | None = None) -> Tensor:
        """``[units]`` float64 risks: probabilities where calibrated, else in units of its own."""
        words = torch.tensor([unit.word for unit in units], dtype=torch.float64)
        return self.risk_of(self.detector.features(trace, units, evidence), words)

    def risk_of(self, features: Tensor, words: Tensor | None = None) -> Tensor:
        """``[units]`` risks of ``[units, d]`` features and the ``[units]`` words before each."""
        raw = self.raw(features, words)
        return raw if self.calibrator is None else self.calibrator(raw)

    def raw(self, features: Tensor, words: Tensor | None = None) -> Tensor:
        """``[units]`` risks before calibration: log-odds, or the one feature.

        Raises:
            ConfigError: The detector needs the words before each unit, and they were not given.
        """
        if self.residual is not None:
            if words is None:
                raise ConfigError(
                    f"{self.detector.name} was fitted to what places leave open, so it needs the "
                    "words before each unit: give words."
                )
            features = self.residual(features, words)
        if self.classifier is None:
            return self.detector.raw_risk(features)
        return self.classifier.logits(features)

    def at_base_rate(self, base_rate: float) -> "FittedDetector":
        """The same detector where another share of units is hallucinated than it was fitted on.

        Probabilities and the threshold move alike, so the same units are flagged.

        Args:
            base_rate: The share, in (0, 1).

        Raises:
            ConfigError: It is outside, or the detector is not calibrated.
        """
        if self.calibrator is None:
            raise ConfigError(
                f"{self.detector.name} gives no probabilities that a base rate could correct. Fit "
                f"it: vlm-steer detect fit {self.detector.name}."
            )
        threshold, old = self.threshold, self.calibrator.rate
        calibrator = self.calibrator.at_base_rate(base_rate)
        if threshold is not None and old is not None:
            at = torch.tensor(threshold, dtype=torch.float64)
            threshold = float(moved(at, old, base_rate))
        return replace(self, calibrator=calibrator, threshold=threshold)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``detector.json`` and, where it has any numbers, ``detector.safetensors``.

        Raises:
            ConfigError: The folder cannot be written.
        """
        tensors = self._tensors()
        about = self._about()
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            contiguous = {name: value.contiguous() for name, value in tensors.items()}
            save_file(contiguous, Path(folder) / "detector.safetensors")
            text = json.dumps(about, indent=2, allow_nan=False)
            (Path(folder) / "detector.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {os.fspath(folder)}: {error.strerror}.") from error

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        if self.classifier is not None:
            tensors |= {f.name: getattr(self.classifier, f.name) for f in fields(self.classifier)}
        if self.calibrator is not None:
            tensors["calibrator"] = self.calibrator.values.double()
        if self.residual is not None:
            tensors |= {"residual.knots": self.residual.knots, "residual.coef": self.residual.coef}
        return tensors

    def _about(self) -> dict[str, Any]:
        calibrator = self.calibrator
        return {
            "format": _FORMAT,
            "detector": self.detector.name,
            "options": self.detector.options(),
            "label_positive": "hallucinated",
            "classifier": None if self.classifier is None else self.classifier.kind,
            "calibrator": None if calibrator is None else calibrator.kind,
            "fitted_rate": None if calibrator is None else calibrator.fitted_rate,
            "base_rate": None if calibrator is None else calibrator.base_rate,
            "threshold": self.threshold,
            "made_for": dict(self.made_for),
            "made_of": dict(self.made_of),
            "vlm_steer": __version__,
        }

    def push_to_hub(
        self, repo: str, *, private: bool | None = None, message: str = "Add detector"
    ) -> str:
        """Write it into a repository of the Hugging Face hub, made where there is none.

        It names the images that it was fitted on.

        Args:
            repo: ``OWNER/NAME``.
            private: Whether a repository that is made is private; ``None`` leaves it to the owner.
            message: Of the commit.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: The hub refuses, or cannot be reached.
        """
        return push(self, repo, private=private, message=message)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        model: Any = None,
        processor: Any = None,
        *,
        revision: str | None = None,
        strict: bool = True,
    ) -> "FittedDetector":
        """Read what ``save_pretrained`` or ``push_to_hub`` wrote.

        Args:
            source: The folder, or ``OWNER/NAME`` on the Hugging Face hub where there is no such
                folder.
            model: The model it is to be used on; ``None`` does not compare.
            processor: Its processor.
            revision: Branch, tag or commit on the hub.
            strict: Refuse another model or template; ``False`` warns.

        Raises:
            DataError: The folder or repository is missing or damaged.
            ConfigError: The detector was made for another model, or for other prompts, or a
                revision was given for a folder.
        """
        name = os.fspath(source)
        is_remote = not Path(name).exists() and is_hub_name(name)
        if revision is not None and not is_remote:
            raise ConfigError(f"revision {revision} has no effect on the folder {name}")
        folder = fetched(name, revision) if is_remote else Path(name)
        about, tensors = _read(folder)
        try:
            found = cls(
                build_detector(about.detector, about.options),
                _classifier(about, tensors, name),
                _calibrator(about, tensors, name),
                about.threshold,
                about.made_for,
                about.made_of,
                _residual(tensors),
            )
            found._refuse_unlike_shapes(name)
        except KeyError as error:
            raise DataError(f"{name} is no whole detector ({error}). Fit it again.") from error
        if model is not None:
            found.check(model, processor, strict=strict)
        return found

    def _refuse_unlike_shapes(self, name: str) -> None:
        """Raise DataError where its numbers cannot be used together, by using them."""
        if self.classifier is None and self.calibrator is None:
            return
        n_features = 1 if self.classifier is None else self.classifier.mean.numel()
        try:
            risk = self.risk_of(torch.zeros(1, n_features), torch.zeros(1))
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(
                f"{name} is damaged: its weights are of shapes that do not fit each other "
                f"({error}). Fit the detector again."
            ) from error
        if risk.shape != (1,):
            raise DataError(f"{name} is damaged: its weights give no risk. Fit the detector again.")

    def differing(self, here: Mapping[str, Any]) -> list[str]:
        """What, of the facts given, is not as it was where the detector was fitted, in words."""
        return differences(self.made_for, here)

    def check(self, model: Any, processor: Any, *, strict: bool = True) -> None:
        """Refuse, or warn of, a model or prompts that the detector was not made for.

        Raises:
            ConfigError: They differ, and ``strict`` is set.
        """
        differing = self.differing(made_for(model, processor))
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


def _read(folder: Path) -> tuple[_About, dict[str, Tensor]]:
    for name in FILES:
        if not (folder / name).is_file():
            raise DataError(f"{folder} holds no {name}. Make it with: vlm-steer detect fit.")
    try:
        about = json.loads((folder / "detector.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "detector.safetensors")
    except (ValueError, SafetensorError, OSError) as error:
        raise DataError(f"{folder} is damaged: {error}. Fit the detector again.") from error
    if not isinstance(about, dict) or about.get("format") not in _READABLE:
        raise DataError(
            f"{folder} holds no detector that this version of vlm-steer reads (expected format "
            f"{' or '.join(_READABLE)})."
        )
    if any(not bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise DataError(f"{folder} holds weights that are not finite. Fit the detector again.")
    # The first format knew of one kind.
    about.setdefault("classifier", "logistic" if "coef" in tensors else None)
    try:
        return TypeAdapter(_About).validate_python(about), tensors
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{folder} is no whole detector ({where}: {first['msg']}). Fit it again."
        ) from error


def _classifier(about: _About, tensors: Mapping[str, Tensor], folder: str) -> Classifier | None:
    if about.classifier is None:
        return None
    if about.classifier not in _CLASSIFIERS:
        raise DataError(f"{folder}: the classifier {about.classifier!r} is unknown.")
    cls = _CLASSIFIERS[about.classifier]
    return cls(**{f.name: tensors[f.name].double() for f in fields(cls)})


def _calibrator(about: _About, tensors: Mapping[str, Tensor], folder: str) -> Calibrator | None:
    for kind in CALIBRATORS:
        if kind == about.calibrator:
            values = tensors["calibrator"]
            return Calibrator(kind, values, about.fitted_rate, about.base_rate)
    if about.calibrator is None:
        return None
    raise DataError(f"{folder}: the calibrator {about.calibrator!r} is unknown.")


def _residual(tensors: Mapping[str, Tensor]) -> Residual | None:
    if "residual.knots" not in tensors:
        return None
    return Residual(tensors["residual.knots"], tensors["residual.coef"])
