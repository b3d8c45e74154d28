"""The classifier of SVAR's authors: a network of one hidden layer, in torch and float64."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlm_steer.detection.fitting import (
    Classifier,
    check_classes,
    check_features,
    group_folds,
    scaling,
    shares,
    weighted_loss,
)

__all__ = ["Network", "Training", "choose_training", "fit_network"]

BATCH = 32
RATES = (1e-4, 1e-3, 1e-2)
EPOCHS = (50, 100, 150, 200)
_LEFT_OUT = 5


class Training(NamedTuple):
    """How a network is trained.

    Attributes:
        hidden: Units of the hidden layer, >= 1.
        rate: Step size of Adam, > 0.
        epochs: Passes over the units, >= 1.
    """

    hidden: int = 248
    rate: float = 1e-3
    epochs: int = 100


@dataclass(frozen=True, eq=False, kw_only=True)
class Network(Classifier):
    """A fitted network of one hidden layer with rectified units.

    Its two outputs are log-probabilities but for a constant; kept is their difference.

    Attributes:
        mean: ``[d]`` subtracted from the features.
        scale: ``[d]`` they are then divided by.
        hidden: ``[h, d]`` float64 weights of the hidden layer.
        bias: ``[h]``.
        coef: ``[h]`` weights of the output.
        intercept: ``[]``.
    """

    kind: ClassVar[str] = "mlp"

    hidden: Tensor
    bias: Tensor
    coef: Tensor
    intercept: Tensor

    def of_scaled(self, x: Tensor) -> Tensor:
        """``[n]`` log-odds of ``[n, d]`` standardised features."""
        return (x @ self.hidden.T + self.bias).relu() @ self.coef + self.intercept


def fit_network(
    features: Tensor,
    labels: Tensor,
    training: Training,
    *,
    weights: Tensor | None = None,
    standardise: bool = True,
    is_balanced: bool = True,
    seed: int = 0,
) -> Network:
    """Train by Adam on the cross-entropy of two outputs, 32 units at a time (arXiv 2411.16724).

    Args:
        features: ``[n, d]``.
        labels: ``[n]``, 0 or 1.
        training: How.
        weights: ``[n]`` of the units; 1 for all when omitted.
        standardise: Train on features with mean 0 and standard deviation 1; the authors do not.
        is_balanced: Weigh both classes alike; the authors do not.
        seed: Seed of the first weights and of the order of units. The global one is left alone.

    Raises:
        DataError: There are too few units of a class, or features that are not finite.
    """
    check_features(features)
    check_classes(labels)
    mean, scale = scaling(features, is_wanted=standardise)
    x, truth = (features.double() - mean) / scale, labels.double()
    w = torch.ones_like(truth) if weights is None else weights.double()
    w = shares(truth, w, is_balanced=is_balanced) * len(truth)
    *_, last = _epochs(x, truth, w, training, seed)
    return last(mean, scale)


def choose_training(
    features: Tensor,
    labels: Tensor,
    groups: Sequence[str],
    *,
    weights: Tensor | None = None,
    standardise: bool = True,
    is_balanced: bool = True,
    rates: Sequence[float] = RATES,
    epochs: Sequence[int] = EPOCHS,
    seed: int = 0,
) -> Training:
    """The point of the authors' grid with the least loss on a fifth of the images, left out.

    The authors try 64, 128 and 248 hidden units as well, settle for 248, and choose by the AUROC on
    the images that they report.

    Args:
        features: ``[n, d]``.
        labels: ``[n]``, 0 or 1.
        groups: The image of each unit.
        weights: ``[n]`` of the units; 1 for all when omitted.
        standardise: As in ``fit_network``.
        is_balanced: As in ``fit_network``.
        rates: Step sizes to try, each for the most epochs.
        epochs: When to look.
        seed: Seed of the division and of training.

    Raises:
        DataError: There are too few units of a class on either side.
    """
    check_features(features)
    is_left = group_folds(groups, _LEFT_OUT, seed) == 0
    for part in (labels[is_left], labels[~is_left]):
        check_classes(part)
    mean, scale = scaling(features[~is_left], is_wanted=standardise)
    x, truth = (features.double() - mean) / scale, labels.double()
    w = torch.ones_like(truth) if weights is None else weights.double()
    kept = shares(truth[~is_left], w[~is_left], is_balanced=is_balanced)
    best, least = Training(), float("inf")
    for rate in rates:
        longest = Training(rate=rate, epochs=max(epochs))
        states = _epochs(x[~is_left], truth[~is_left], kept * len(kept), longest, seed)
        for epoch, state in enumerate(states, 1):
            if epoch not in epochs:
                continue
            logits = state(mean, scale).of_scaled(x[is_left])
            loss = float(weighted_loss(logits, truth[is_left], w[is_left]))
            if loss < least:
                best, least = Training(rate=rate, epochs=epoch), loss
    return best


def _epochs(
    x: Tensor, truth: Tensor, weights: Tensor, training: Training, seed: int
) -> Iterator[Callable[[Tensor, Tensor], Network]]:
    """After every pass over the units, what makes a network of the weights so far."""
    generator = torch.Generator().manual_seed(seed)
    parameters = first_weights(x.shape[1], training.hidden, generator)
    optimizer = torch.optim.Adam(parameters, lr=training.rate, fused=True)
    hidden, bias, out, shift = parameters

    def network(mean: Tensor, scale: Tensor) -> Network:
        rows = [value.detach().clone() for value in parameters]
        return Network(
            mean=mean,
            scale=scale,
            hidden=rows[0],
            bias=rows[1],
            coef=rows[2][1] - rows[2][0],
            intercept=rows[3][1] - rows[3][0],
        )

    with torch.enable_grad():
        for _ in range(training.epochs):
            for batch in torch.split(torch.randperm(len(truth), generator=generator), BATCH):
                outputs = (x[batch] @ hidden.T + bias).relu() @ out.T + shift
                loss = weighted_loss(
                    outputs[:, 1] - outputs[:, 0], truth[batch], weights[batch] / len(batch)
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # untyped upstream
                optimizer.step()
            yield network


def first_weights(n_features: int, hidden: int, generator: torch.Generator) -> list[Tensor]:
    """Weights and biases of two layers, drawn as torch draws those of ``Linear``."""
    parameters = []
    for rows, columns in ((hidden, n_features), (2, hidden)):
        for shape in ((rows, columns), (rows,)):
            drawn = torch.empty(shape, dtype=torch.float64)
            bound = columns**-0.5
            parameters.append(drawn.uniform_(-bound, bound, generator=generator).requires_grad_())
    return parameters
