"""What the place of a word tells is taken off features, or weighed away."""

import numpy as np
import pytest
import torch

from vlm_steer.detection import equal_odds, fit_residual
from vlm_steer.detection.place import strata
from vlm_steer.errors import DataError


@pytest.fixture
def words() -> torch.Tensor:
    return torch.randint(0, 90, (300,)).double()


def test_residuals_are_those_of_natural_cubic_splines(words):
    interpolate = pytest.importorskip("scipy.interpolate")
    features = torch.randn(300, 4, dtype=torch.float64) + words[:, None].sqrt()
    residual = fit_residual(features, words)
    knots, place = residual.knots.numpy(), words.log1p().numpy()
    inside = (place >= knots[0]) & (place <= knots[-1])
    natural = interpolate.CubicSpline(knots, np.eye(len(knots)), bc_type="natural")
    fitted = (features - residual(features, words)).numpy()[inside]
    # Whatever a natural spline through these knots can draw, theirs draws as well.
    basis = natural(place[inside])
    again = basis @ np.linalg.lstsq(basis, fitted, rcond=None)[0]
    np.testing.assert_allclose(again, fitted, atol=1e-9)
    left = residual(features, words).numpy()
    np.testing.assert_allclose(left.sum(0), 0, atol=1e-8)
    np.testing.assert_allclose(place @ left, 0, atol=1e-8)


def test_residuals_are_straight_beyond_the_outer_knots(words):
    features = torch.randn(300, 1, dtype=torch.float64) + words[:, None].sqrt()
    residual = fit_residual(features, words)
    far = torch.linspace(6, 9, 4, dtype=torch.float64).expm1()
    drawn = -residual(torch.zeros(4, 1), far)[:, 0]
    torch.testing.assert_close(drawn.diff().diff(), torch.zeros(2).double(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_few_places_leave_the_mean_of_each(distinct):
    words = torch.arange(60).remainder(distinct).double() * 5
    features = torch.randn(60, 2, dtype=torch.float64)
    left = fit_residual(features, words)(features, words)
    if distinct < 3:
        means = torch.stack([left[words == w].mean(0) for w in words.unique()])
        torch.testing.assert_close(means, torch.zeros_like(means), atol=1e-9, rtol=0)
    torch.testing.assert_close(left.sum(0), torch.zeros(2).double(), atol=1e-9, rtol=0)


def test_other_features_are_refused(words):
    residual = fit_residual(torch.randn(300, 4), words)
    with pytest.raises(DataError, match="3 features were given to splines of 4"):
        residual(torch.randn(300, 3), words)


def test_weights_are_the_inverse_of_what_the_place_tells(words):
    labels = (torch.rand(300) < 0.2 + words / 150).long()
    weights = equal_odds(words, labels)
    stratum, share = strata(words), labels.double().mean()
    for unit in range(300):
        same = labels[stratum == stratum[unit]] == labels[unit]
        overall = share if labels[unit] else 1 - share
        assert float(weights[unit]) == pytest.approx(float(overall / same.double().mean()))


def test_weighted_classes_have_the_same_share_at_every_place(words):
    labels = (torch.rand(300) < words / 90).long()
    weights, stratum = equal_odds(words, labels), strata(words)
    shares = []
    for s in stratum.unique():
        inside = stratum == s
        if len(labels[inside].unique()) == 2:
            shares.append(float(weights[inside] @ labels[inside].double() / weights[inside].sum()))
        else:
            assert not weights[inside].any()
    assert shares == pytest.approx([shares[0]] * len(shares))


def test_strata_are_tenths_and_ties_share_theirs():
    counted = torch.bincount(strata(torch.arange(100)))
    assert counted.tolist() == [10] * 10
    assert strata(torch.tensor([3.0] * 15 + [9.0] * 5)).unique().tolist() == [1, 2]


def test_classes_that_share_no_place_cannot_be_weighed():
    words = torch.arange(40.0)
    with pytest.raises(DataError, match="no tenth of the places"):
        equal_odds(words, (words > 19).long())
