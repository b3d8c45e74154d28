"""Logistic regression and calibration, in torch and float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vlm_steer.errors import DataError

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "CalibratorName",
    "Logistic",
    "choose_strength",
    "fit_calibrator",
    "fit_logistic",
    "group_folds",
]

CalibratorName: TypeAlias = Literal["platt", "temperature", "isotonic"]
CALIBRATORS: tuple[CalibratorName, ...] = ("platt", "temperature", "isotonic")

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
MIN_PER_CLASS = 5
MAX_COMPONENTS = 512  # as the authors of LapEigvals
_FEWEST = 1e-12
_TRIAL_ITERATIONS = 60


@dataclass(frozen=True, eq=False)
class Logistic:
    """A fitted logistic regression.

    Attributes:
        coef: ``[d]`` float64, of the standardised features.
        intercept: ``[]`` float64.
        mean: ``[d]`` subtracted from the features.
        scale: ``[d]`` they are then divided by.
    """

    coef: Tensor
    intercept: Tensor
    mean: Tensor
    scale: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """``[n]`` log-odds of ``[n, d]`` features.

        Raises:
            DataError: The features are of another number, or not finite.
        """
        check_features(features)
        if features.shape[1] != self.coef.shape[0]:
            raise DataError(
                f"{features.shape[1]} features were given to weights for {self.coef.shape[0]}. "
                "The detector was fitted with other options or on another model."
            )
        return ((features.double() - self.mean) / self.scale) @ self.coef + self.intercept


def check_features(features: Tensor) -> None:
    """Raise DataError where a feature is not finite."""
    bad = ~torch.isfinite(features)
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise DataError(
            f"{int(bad.sum())} features are not finite, the first in row {row}, column {column}. "
            "Record the traces in float32 or bfloat16, and leave out what the model cannot run."
        )


def check_classes(labels: Tensor, fewest: int = MIN_PER_CLASS) -> None:
    """Raise DataError where there are too few units of a class to fit anything."""
    positives = int((labels == 1).sum())
    negatives = int((labels == 0).sum())
    if min(positives, negatives) < fewest:
        raise DataError(
            f"{positives} hallucinated and {negatives} grounded units cannot be told apart by "
            f"fitting; {fewest} of each are the least. Use more images, or a harder split."
        )


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    strength: float = 1.0,
    weights: Tensor | None = None,
    standardise: bool = True,
    is_balanced: bool = True,
    components: int | None = MAX_COMPONENTS,
    max_iterations: int = 1000,
) -> Logistic:
    """Minimise ``|coef|^2 / 2 + strength * sum(weight * loss)``; the intercept is free.

    With ``standardise=False`` and ``is_balanced=False`` these are the weights that scikit-learn's
    ``LogisticRegression(C=strength)`` converges to.

    Args:
        features: ``[n, d]``.
        labels: ``[n]``, 0 or 1.
        strength: How much the data count against small weights, > 0.
        weights: ``[n]`` of the units; 1 for all when omitted.
        standardise: Fit on features with mean 0 and standard deviation 1.
        is_balanced: Weigh both classes alike.
        components: Fit on that many principal components where there are more features; the
            weights returned are those of the features. ``None`` fits on all.
        max_iterations: Limit of the solver; small problems need a few dozen.

    Raises:
        DataError: There are too few units of a class, or features that are not finite.
    """
    check_features(features)
    check_classes(labels)
    given, truth = features.double(), labels.double()
    mean, scale = torch.zeros_like(given[0]), torch.ones_like(given[0])
    if standardise:
        mean, scale = given.mean(0), given.std(0, correction=0)
        scale = torch.where(scale > _FEWEST, scale, 1.0)
    x = (given - mean) / scale
    basis = _principal(x, components)
    x = x if basis is None else x @ basis
    w = torch.ones_like(truth) if weights is None else weights.double()
    if is_balanced:
        share = w @ truth / w.sum()
        w = w * torch.where(truth == 1, 0.5 / share, 0.5 / (1 - share))
    solution = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [solution],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        logits = x @ solution[:-1] + solution[-1]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, truth, weight=w, reduction="sum"
        )
        total: Tensor = solution[:-1].square().sum() / 2 + strength * losses
        total.backward()  # type: ignore[no-untyped-call]  # untyped upstream
        return total

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]  # untyped upstream
    coef, intercept = solution.detach()[:-1].clone(), solution.detach()[-1].clone()
    return Logistic(coef if basis is None else basis @ coef, intercept, mean, scale)


def _principal(x: Tensor, components: int | None) -> Tensor | None:
    """``[d, components]`` directions of largest variance; ``None`` where there are not as many."""
    if components is None or x.shape[1] <= components:
        return None
    directions: Tensor = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
    return directions[:components].T


def group_folds(groups: Sequence[str], n_folds: int, seed: int = 0) -> Tensor:
    """``[n]`` int64, the fold of each unit; units of one group share theirs."""
    names = sorted(set(groups))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=generator)
    fold = {names[int(i)]: place % n_folds for place, i in enumerate(order)}
    return torch.tensor([fold[group] for group in groups])


def choose_strength(
    features: Tensor,
    labels: Tensor,
    groups: Sequence[str],
    *,
    strengths: Sequence[float] = STRENGTHS,
    n_folds: int = 5,
    seed: int = 0,
) -> float:
    """The strength with the least loss on left-out groups; the first where too few are left.

    Args:
        features: ``[n, d]``.
        labels: ``[n]``, 0 or 1.
        groups: The image of each unit: no image is in two folds.
        strengths: What to try.
        n_folds: Parts the groups are divided into, >= 2.
        seed: Seed of the division.
    """
    folds = group_folds(groups, n_folds, seed)
    losses = dict.fromkeys(strengths, 0.0)
    for fold in range(n_folds):
        kept, left = folds != fold, folds == fold
        counts = [int((labels[kept] == c).sum()) for c in (0, 1)]
        if min(counts) < MIN_PER_CLASS or not bool(left.any()):
            continue
        for strength in strengths:
            # Far from convergence already tells which strength is better.
            fitted = fit_logistic(
                features[kept], labels[kept], strength=strength, max_iterations=_TRIAL_ITERATIONS
            )
            losses[strength] += float(
                torch.nn.functional.binary_cross_entropy_with_logits(
                    fitted.logits(features[left]), labels[left].double(), reduction="sum"
                )
            )
    return min(losses, key=lambda strength: losses[strength])


# -- calibration ------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Calibrator:
    """From a raw risk to a probability, never out of order.

    Attributes:
        kind: ``platt`` (slope and shift of the log-odds), ``temperature`` (slope alone) or
            ``isotonic`` (steps).
        values: ``[2]`` slope and shift, or ``[2, steps]`` risks and their probabilities.
    """

    kind: CalibratorName
    values: Tensor

    def __call__(self, risk: Tensor) -> Tensor:
        """``[n]`` probabilities of ``[n]`` raw risks, float64."""
        risk = risk.double()
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
    if kind == "isotonic":
        return Calibrator(kind, _isotonic(risk.double(), labels.double()))
    if kind == "platt":
        fitted = fit_logistic(risk[:, None], labels, strength=1e6, is_balanced=False)
        slope = (fitted.coef[0] / fitted.scale[0]).clamp(min=0)
        shift = fitted.intercept - fitted.coef[0].clamp(min=0) * fitted.mean[0] / fitted.scale[0]
        return Calibrator(kind, torch.stack([slope, shift]))
    return Calibrator(
        kind, torch.stack([_temperature(risk.double(), labels.double()), torch.zeros(())])
    )


def _temperature(risk: Tensor, labels: Tensor) -> Tensor:
    """The slope of least loss, found by golden section over its logarithm."""

    def loss(log_slope: float) -> float:
        logits = risk * torch.tensor(log_slope).exp()
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels))

    low, high, golden = -8.0, 8.0, (5**0.5 - 1) / 2
    for _ in range(60):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) <= loss(b) else (a, high)
    slope: Tensor = torch.tensor((low + high) / 2, dtype=torch.float64).exp()
    return slope


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
