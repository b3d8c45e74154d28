"""Keeping the place of a word in its text out of what a classifier learns."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from vlm_steer.errors import DataError

__all__ = ["PLACE_MODES", "PlaceMode", "Residual", "equal_odds", "fit_residual", "strata"]

PlaceMode: TypeAlias = Literal["none", "residualize", "ipw"]
"""Nothing; features less what the place tells of them; inverse-probability weights."""
PLACE_MODES: tuple[PlaceMode, ...] = get_args(PlaceMode)

_KNOTS = (0.05, 0.275, 0.5, 0.725, 0.95)


@dataclass(frozen=True, eq=False)
class Residual:
    """Features less what the place tells of them.

    The place enters as a natural cubic spline of log(1 + words before), which is straight beyond
    its outer knots.

    Attributes:
        knots: ``[k]`` float64, ascending, k >= 1.
        coef: ``[k, d]`` float64 weights of the spline's functions.
    """

    knots: Tensor
    coef: Tensor

    def __call__(self, features: Tensor, words: Tensor) -> Tensor:
        """``[n, d]`` float64 of ``[n, d]`` features and the ``[n]`` words before each unit.

        Raises:
            DataError: The features are of another number.
        """
        if features.shape[1] != self.coef.shape[1]:
            raise DataError(
                f"{features.shape[1]} features were given to splines of {self.coef.shape[1]}. The "
                "detector was fitted with other options or on another model."
            )
        return features.double() - _spline(words, self.knots) @ self.coef


def fit_residual(features: Tensor, words: Tensor) -> Residual:
    """Least squares of every feature on the place.

    Args:
        features: ``[n, d]``, finite.
        words: ``[n]`` words before each unit.
    """
    place = words.double().log1p()
    at = torch.tensor(_KNOTS, dtype=torch.float64)
    knots = torch.unique(torch.quantile(place, at))
    basis = _spline(words, knots)
    # Few distinct places can leave the functions dependent; this driver then takes the smallest.
    coef = torch.linalg.lstsq(basis, features.double(), driver="gelsd").solution
    return Residual(knots, coef)


def _spline(words: Tensor, knots: Tensor) -> Tensor:
    """``[n, knots]``: 1, the place, and one bent function per inner knot."""
    place = words.double().log1p()[:, None]
    if len(knots) == 1:
        return torch.ones_like(place)
    last = knots[-1]
    cubes = (place - knots[:-1]).relu() ** 3 - (place - last).relu() ** 3
    bends = cubes / (last - knots[:-1])
    return torch.cat([torch.ones_like(place), place, bends[:, :-1] - bends[:, -1:]], dim=1)


def strata(words: Tensor, n: int = 10) -> Tensor:
    """``[n]`` int64, the tenth of places that each unit stands in; ties share theirs."""
    inner = torch.linspace(0, 1, n + 1, dtype=torch.float64)[1:-1]
    edges = torch.unique(torch.quantile(words.double(), inner))
    return torch.bucketize(words.double(), edges, right=True)


def equal_odds(words: Tensor, labels: Tensor) -> Tensor:
    """Weights under which every tenth of places holds both classes in the same proportion.

    A unit of class c in stratum s weighs P(c) / P(c | s); where a stratum holds one class only,
    nothing can make up for it, and its units weigh 0.

    Args:
        words: ``[n]`` words before each unit.
        labels: ``[n]``, 0 or 1.

    Returns:
        ``[n]`` float64.

    Raises:
        DataError: No stratum holds both classes.
    """
    stratum, truth = strata(words), (labels == 1).long()
    counts = torch.zeros(int(stratum.max()) + 1, 2, dtype=torch.float64)
    counts.index_put_((stratum, truth), torch.ones(len(truth)).double(), accumulate=True)
    usable = (counts > 0).all(1)
    if not bool(usable.any()):
        raise DataError(
            "no tenth of the places in the texts holds both hallucinated and grounded units, so "
            "weights cannot even them out. Use more images."
        )
    counts = counts * usable[:, None]
    overall = counts.sum(0) / counts.sum()
    weight = overall * counts.sum(1, keepdim=True) / counts
    return weight.masked_fill(~usable[:, None], 0)[stratum, truth]
