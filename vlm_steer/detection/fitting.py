"""Logistic regression, in torch and float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_steer.errors import DataError

__all__ = ["Classifier", "Logistic", "choose_strength", "fit_logistic", "group_folds"]

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
MIN_PER_CLASS = 5
MAX_COMPONENTS = 512  # as the authors of LapEigvals
_FEWEST = 1e-12
_TRIAL_ITERATIONS = 60


@dataclass(frozen=True, eq=False, kw_only=True)
class Classifier:
    """Fitted weights: from features to log-odds.

    Attributes:
        mean: ``[d]`` float64, subtracted from the features.
        scale: ``[d]`` they are then divided by.
    """

    kind: ClassVar[str] = ""

    mean: Tensor
    scale: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """``[n]`` float64 log-odds of ``[n, d]`` features.

        Raises:
            DataError: The features are of another number, or not finite.
        """
        check_features(features)
        if features.shape[1] != self.mean.shape[0]:
            raise DataError(
                f"{features.shape[1]} features were given to weights for {self.mean.shape[0]}. "
                "The detector was fitted with other options or on another model."
            )
        return self.of_scaled((features.double() - self.mean) / self.scale)

    def of_scaled(self, x: Tensor) -> Tensor:
        """``[n]`` log-odds of ``[n, d]`` standardised features."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Logistic(Classifier):
    """A fitted logistic regression.

    Attributes:
        coef: ``[d]`` float64, of the standardised features.
        intercept: ``[]`` float64.
        mean: ``[d]`` subtracted from the features.
        scale: ``[d]`` they are then divided by.
    """

    kind: ClassVar[str] = "logistic"

    coef: Tensor
    intercept: Tensor

    def of_scaled(self, x: Tensor) -> Tensor:
        """``[n]`` log-odds of ``[n, d]`` standardised features."""
        return x @ self.coef + self.intercept


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
    truth = labels.double()
    mean, scale = scaling(features, is_wanted=standardise)
    x = (features.double() - mean) / scale
    basis = _principal(x, components)
    x = x if basis is None else x @ basis
    w = torch.ones_like(truth) if weights is None else weights.double()
    penalty = 0.5 / (strength * float(w.sum()))
    w = shares(truth, w, is_balanced=is_balanced)
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
        # A mean, so that the solver's tolerances mean the same for few units and for many.
        total = penalty * solution[:-1].square().sum() + weighted_loss(logits, truth, w)
        total.backward()  # type: ignore[no-untyped-call]  # untyped upstream
        return total

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]  # untyped upstream
    coef, intercept = solution.detach()[:-1].clone(), solution.detach()[-1].clone()
    coef = coef if basis is None else basis @ coef
    return Logistic(coef=coef, intercept=intercept, mean=mean, scale=scale)


def scaling(features: Tensor, *, is_wanted: bool) -> tuple[Tensor, Tensor]:
    """``[d]`` means and standard deviations, 1 for what is constant; 0 and 1 if not wanted."""
    given = features.double()
    if not is_wanted:
        return torch.zeros_like(given[0]), torch.ones_like(given[0])
    scale = given.std(0, correction=0)
    return given.mean(0), torch.where(scale > _FEWEST, scale, 1.0)


def shares(truth: Tensor, weights: Tensor, *, is_balanced: bool) -> Tensor:
    """``[n]`` what each unit counts in the mean loss; they sum to 1."""
    w = weights / weights.sum()
    if is_balanced:
        positive = w @ truth
        w = w * torch.where(truth == 1, 0.5 / positive, 0.5 / (1 - positive))
    return w


def weighted_loss(logits: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of log-odds, summed with weights, nats."""
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, truth, weight=weights, reduction="sum"
    )


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
    weights: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    n_folds: int = 5,
    seed: int = 0,
) -> float:
    """The strength with the least loss on left-out groups; the first where too few are left.

    Args:
        features: ``[n, d]``.
        labels: ``[n]``, 0 or 1.
        groups: The image of each unit: no image is in two folds.
        weights: ``[n]`` of the units; 1 for all when omitted.
        strengths: What to try.
        n_folds: Parts the groups are divided into, >= 2.
        seed: Seed of the division.
    """
    folds = group_folds(groups, n_folds, seed)
    w = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights.double()
    losses = dict.fromkeys(strengths, 0.0)
    for fold in range(n_folds):
        kept, left = folds != fold, folds == fold
        counts = [int((labels[kept] == c).sum()) for c in (0, 1)]
        if min(counts) < MIN_PER_CLASS or not bool(left.any()):
            continue
        for strength in strengths:
            # Far from convergence already tells which strength is better.
            fitted = fit_logistic(
                features[kept],
                labels[kept],
                strength=strength,
                weights=w[kept],
                max_iterations=_TRIAL_ITERATIONS,
            )
            logits = fitted.logits(features[left])
            losses[strength] += float(weighted_loss(logits, labels[left].double(), w[left]))
    return min(losses, key=lambda strength: losses[strength])
