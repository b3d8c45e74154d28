"""From raw risks to probabilities, and from one share of hallucinated units to another."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vlm_steer.detection.fitting import check_classes, check_features, fit_logistic
from vlm_steer.errors import ConfigError

__all__ = ["CALIBRATORS", "Calibrator", "CalibratorName", "fit_calibrator", "moved"]

CalibratorName: TypeAlias = Literal["platt", "temperature", "isotonic"]
CALIBRATORS: tuple[CalibratorName, ...] = ("platt", "temperature", "isotonic")

_FEWEST = 1e-12


@dataclass(frozen=True, eq=False)
class Calibrator:
    """From a raw risk to a probability, never out of order.

    Attributes:
        kind: ``platt`` (slope and shift of the log-odds), ``temperature`` (slope alone) or
            ``isotonic`` (steps).
        values: ``[2]`` slope and shift, or ``[2, steps]`` risks and their probabilities.
        fitted_rate: Share of hallucinated units that it was fitted on; ``None`` if unknown.
        base_rate: Share that is expected where it is used; ``None`` for the same.
    """

    kind: CalibratorName
    values: Tensor
    fitted_rate: float | None = None
    base_rate: float | None = None

    def __call__(self, risk: Tensor) -> Tensor:
        """``[n]`` probabilities of ``[n]`` raw risks, float64."""
        probability = self._fitted(risk.double())
        if self.base_rate is None or self.fitted_rate is None:
            return probability
        return moved(probability, self.fitted_rate, self.base_rate)

    @property
    def rate(self) -> float | None:
        """The share of hallucinated units that probabilities are right for."""
        return self.fitted_rate if self.base_rate is None else self.base_rate

    def at_base_rate(self, base_rate: float) -> "Calibrator":
        """The same calibrator where another share of units is hallucinated.

        Args:
            base_rate: The share, in (0, 1).

        Raises:
            ConfigError: It is outside, or nothing is known of the share that this was fitted on.
        """
        if not 0 < base_rate < 1:
            raise ConfigError(f"a base rate of {base_rate} was given; it lies between 0 and 1")
        if self.fitted_rate is None:
            raise ConfigError(
                "this detector does not say what share of units it was calibrated on was "
                "hallucinated, so another share cannot be corrected for. Fit it again."
            )
        return replace(self, base_rate=base_rate)

    def _fitted(self, risk: Tensor) -> Tensor:
        if self.kind != "isotonic":
            slope, shift = self.values
            probability: Tensor = torch.sigmoid(slope * risk + shift)
            return probability
        at, steps = self.values
        place = torch.searchsorted(at, risk.contiguous()).clamp(1, len(at) - 1)
        width = (at[place] - at[place - 1]).clamp(min=_FEWEST)
        share = ((risk - at[place - 1]) / width).clamp(0, 1)
        between: Tensor = steps[place - 1] + share * (steps[place] - steps[place - 1])
        return between


def moved(probability: Tensor, old_rate: float, new_rate: float) -> Tensor:
    """Probabilities where another share of units is positive.

    Only the share of the classes differs, not what units of a class look like, so the odds of every
    unit change by the same factor (Bayes' rule).
    """
    new, old = torch.logit(torch.tensor([new_rate, old_rate], dtype=torch.float64))
    return torch.sigmoid(torch.logit(probability) + new - old)


def fit_calibrator(kind: CalibratorName, risk: Tensor, labels: Tensor) -> Calibrator:
    """Fit a calibrator on units that the detector was not fitted on.

    Args:
        kind: Which.
        risk: ``[n]`` raw risks.
        labels: ``[n]``, 0 or 1.

    Raises:
        DataError: There are too few units of a class.
    """
    check_features(risk[:, None])
    check_classes(labels)
    rate = float(labels.double().mean())
    return Calibrator(kind, _FITTERS[kind](risk.double(), labels.double()), rate)


def _platt(risk: Tensor, labels: Tensor) -> Tensor:
    """``[2]`` slope and shift of least loss; a risk that points the wrong way has slope 0."""
    fitted = fit_logistic(risk[:, None], labels, strength=1e6, is_balanced=False)
    if fitted.coef[0] <= 0:
        return torch.stack([torch.zeros_like(fitted.coef[0]), torch.logit(labels.mean())])
    slope = fitted.coef[0] / fitted.scale[0]
    return torch.stack([slope, fitted.intercept - slope * fitted.mean[0]])


def _temperature(risk: Tensor, labels: Tensor) -> Tensor:
    """``[2]`` slope of least loss, found by golden section over its logarithm, and no shift."""

    def loss(log_slope: float) -> float:
        logits = risk * torch.tensor(log_slope).exp()
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels))

    low, high, golden = -8.0, 8.0, (5**0.5 - 1) / 2
    for _ in range(60):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) <= loss(b) else (a, high)
    return torch.tensor([math.exp((low + high) / 2), 0.0], dtype=torch.float64)


def _isotonic(risk: Tensor, labels: Tensor) -> Tensor:
    """``[2, steps]`` by pooling adjacent violators."""
    values, inverse = torch.unique(risk, return_inverse=True)
    weight = torch.zeros_like(values).index_add(0, inverse, torch.ones_like(labels))
    total = torch.zeros_like(values).index_add(0, inverse, labels)
    blocks: list[list[float]] = []  # weight, sum, number of values
    for w, t in zip(weight.tolist(), total.tolist(), strict=True):
        blocks.append([w, t, 1])
        while len(blocks) > 1 and blocks[-2][1] / blocks[-2][0] >= blocks[-1][1] / blocks[-1][0]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    fitted = [t / w for w, t, n in blocks for _ in range(int(n))]
    steps = torch.stack([values, torch.tensor(fitted, dtype=torch.float64)])
    return steps if steps.shape[1] > 1 else steps.repeat(1, 2)


_FITTERS: Mapping[CalibratorName, Callable[[Tensor, Tensor], Tensor]] = {
    "platt": _platt,
    "temperature": _temperature,
    "isotonic": _isotonic,
}
