"""What a detector is, and the list of them.

A detector turns a trace into numbers about stretches of its text, its units. Every risk points the
same way: higher means more likely not supported by the image. A detector is found because its
module lies in ``vlm_steer/detection/detectors``.
"""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from vlm_steer.detection.trace import Span, Trace
from vlm_steer.errors import ConfigError, SteerError
from vlm_steer.registry import did_you_mean

if TYPE_CHECKING:
    from PIL import Image

    from vlm_steer.detection.recording import Need

__all__ = [
    "Detector",
    "Evidence",
    "OfTrace",
    "PerToken",
    "Pool",
    "Unit",
    "build_detector",
    "get_detector",
    "list_detectors",
    "pooled",
    "register_detector",
    "token_units",
]

Pool: TypeAlias = Literal["first", "mean"]
"""Which tokens of a unit speak for it: the first, whose row decides on the word, or all."""

GROUNDED, HALLUCINATED, IGNORED = 0, 1, -1


@dataclass(frozen=True, slots=True)
class Unit:
    """A stretch of a generated text that is judged: usually the mention of an object.

    Attributes:
        tokens: Its tokens, half-open and not empty.
        span: Its characters, half-open.
        name: The object that it names.
        word: Words before it in the text.
        occurrence: Earlier units of the text with the same name.
        label: 1 not supported by the image, 0 supported, -1 unknown.
    """

    tokens: Span
    span: Span
    name: str = ""
    word: int = 0
    occurrence: int = 0
    label: int = IGNORED


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a detector may look at beside the trace.

    Attributes:
        image: The image.
        prompt: The whole prompt, as ``vlm_steer.generation.render_prompt`` returns it.
        question: The user's part of it.
        model: The model that wrote the text, for detectors that ask it again.
        processor: Its processor.
    """

    image: "Image.Image"
    prompt: str
    question: str = ""
    model: Any = None
    processor: Any = None


@dataclass(frozen=True, kw_only=True)
class Detector:
    """Base of every detector: a frozen dataclass, whose fields are its options.

    Class attributes:
        paper: Where it comes from.
        needs: What a trace must hold for it, see ``vlm_steer.detection.NEEDS``.
        must_be_fitted: Its features say nothing before weights have been fitted.
        needs_evidence: It looks at the image itself, or asks a model again.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: "ClassVar[tuple[Need, ...]]" = ()
    must_be_fitted: ClassVar[bool] = False
    needs_evidence: ClassVar[bool] = False

    def features(
        self, trace: Trace, units: Sequence[Unit], evidence: Evidence | None = None
    ) -> Tensor:
        """``[units, d]`` float64, d the same for all traces of a model.

        Raises:
            SteerError: The trace, or the evidence, does not hold what the detector needs.
        """
        raise NotImplementedError

    def raw_risk(self, features: Tensor) -> Tensor:
        """``[units]`` risk without fitted weights, in units of its own."""
        if features.shape[1] != 1 or self.must_be_fitted:
            raise SteerError(
                f"{self.name} has {features.shape[1]} features and no weights for them. Fit it: "
                f"vlm-steer detect fit {self.name}."
            )
        return features[:, 0]

    def options(self) -> dict[str, Any]:
        """Its options as plain data."""
        return dataclasses.asdict(self)

    def require(self, value: Tensor | None, need: str) -> Tensor:
        """What a trace holds, or an error that says how to record it."""
        if value is None:
            raise SteerError(
                f"{self.name} needs {need}, which this trace does not hold. Record it with "
                f"trace_answers(..., needs=({need!r},))."
            )
        return value


def token_units(trace: Trace) -> list[Unit]:
    """Every token of a trace as a unit of its own, for risks per token."""
    words = [len(trace.text[: span[0]].split()) for span in trace.spans]
    return [
        Unit((t, t + 1), span, name=trace.text[slice(*span)].strip(), word=words[t])
        for t, span in enumerate(trace.spans)
    ]


def pooled(values: Tensor, units: Sequence[Unit], pool: Pool) -> Tensor:
    """``[units, ...]`` float64 from ``[tokens, ...]``."""
    if pool == "first":
        return values[[unit.tokens[0] for unit in units]].double()
    means = [values[slice(*unit.tokens)].double().mean(0) for unit in units]
    return torch.stack(means) if means else values[:0].double()


@dataclass(frozen=True, kw_only=True)
class OfTrace(Detector):
    """Base of detectors that look at nothing but the trace."""

    def features(
        self,
        trace: Trace,
        units: Sequence[Unit],
        evidence: Evidence | None = None,  # noqa: ARG002
    ) -> Tensor:
        """``[units, d]`` float64."""
        return self.of_units(trace, units)

    def of_units(self, trace: Trace, units: Sequence[Unit]) -> Tensor:
        """``[units, d]`` float64."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PerToken(OfTrace):
    """Base of detectors that look at every token by itself; a unit has what its tokens have.

    Attributes:
        pool: ``first`` token of a unit, or the ``mean`` over its tokens.
    """

    pool: Pool = "first"

    def of_units(self, trace: Trace, units: Sequence[Unit]) -> Tensor:
        """``[units, d]`` float64."""
        return pooled(self.of_token(trace), units, self.pool)

    def of_token(self, trace: Trace) -> Tensor:
        """``[tokens, d]``."""
        raise NotImplementedError


# -- the list ---------------------------------------------------------------------------------
_DETECTORS: dict[str, type[Detector]] = {}
D = TypeVar("D", bound=type[Detector])


def register_detector(name: str) -> Callable[[D], D]:
    """Class decorator that makes a detector known under a name.

    Raises:
        ConfigError: The name is malformed or taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(
            f"{name!r} cannot name a detector. Use lower-case letters, digits and underscores."
        )

    def decorate(cls: D) -> D:
        known = _DETECTORS.setdefault(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"{name!r} is the name of {known.__qualname__}. Choose another name.")
        _DETECTORS[name] = cls
        cls.name = name
        return cls

    return decorate


def list_detectors() -> list[str]:
    """Names of all detectors, sorted."""
    package = importlib.import_module("vlm_steer.detection.detectors")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return sorted(_DETECTORS)


def get_detector(name: str) -> type[Detector]:
    """The class of a detector.

    Raises:
        ConfigError: There is none of that name.
    """
    known = list_detectors()
    if name not in known:
        raise ConfigError(
            f"unknown detector {name!r}, and no folder of a fitted one.{did_you_mean(name, known)} "
            f"Detectors: {', '.join(known)}."
        )
    return _DETECTORS[name]


def build_detector(name: str, options: Mapping[str, Any] | None = None) -> Detector:
    """A detector by its name, with options from a file or a command line.

    Raises:
        ConfigError: There is no such detector or option, or a value is not one.
    """
    cls = get_detector(name)
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    given = dict(options or {})
    for option in given:
        if option not in fields:
            raise ConfigError(
                f"{name} has no option {option!r}.{did_you_mean(option, fields)} "
                f"It has {', '.join(sorted(fields)) or 'none'}."
            )
    try:
        return TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{name}: {where} is {first['input']!r}: {first['msg']}.") from error
