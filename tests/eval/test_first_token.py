"""Ranking and calibration of first-token margins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_steer.errors import DataError
from vlm_steer_eval.benchmarks.first_token import (
    average_precision,
    bias_for_yes_ratio,
    first_token_scores,
    ranked_auroc,
)


@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30
    )
)
@settings(deadline=None, max_examples=50)
def test_weighted_rankings_are_those_of_scikit_learn(rows):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    values, truth, weights = (np.array(column) for column in zip(*rows, strict=True))
    values, weights = values.astype(float), weights.astype(float)[None]
    if not (weights[0] * truth).sum() or not (weights[0] * ~truth).sum():
        assert np.isnan(ranked_auroc(values, truth, weights)[0])
        return
    assert ranked_auroc(values, truth, weights)[0] == pytest.approx(
        metrics.roc_auc_score(truth, values, sample_weight=weights[0])
    )
    assert average_precision(values, truth, weights)[0] == pytest.approx(
        metrics.average_precision_score(truth, values, sample_weight=weights[0])
    )


def test_a_calibrated_model_has_no_calibration_error_and_a_bold_one_has():
    generator = np.random.default_rng(0)
    margins = generator.normal(0, 2, size=4000)
    truth = generator.random(4000) < 1 / (1 + np.exp(-margins))
    images = [str(i // 4) for i in range(4000)]
    honest = first_token_scores(margins.tolist(), truth.tolist(), images, n_resamples=200)
    bold = first_token_scores((3 * margins).tolist(), truth.tolist(), images, n_resamples=200)
    assert honest["ece"]["value"] < 0.03
    assert bold["ece"]["value"] > 0.1
    assert bold["brier"]["value"] > honest["brier"]["value"]
    # What ranks the same is as good a detector.
    assert bold["auroc"] == honest["auroc"]
    assert sum(entry["n"] for entry in honest["calibration"]) == 4000
    for entry in honest["calibration"]:
        assert entry["low"] <= entry["predicted"] <= entry["high"]
    for name in ("auroc", "average_precision", "brier", "ece"):
        low, high = honest[name]["ci95"]
        assert low < high
        assert low <= honest[name]["value"] + 0.01


def test_a_shift_towards_yes_changes_no_ranking():
    generator = np.random.default_rng(1)
    truth = generator.random(300) < 0.5
    margins = generator.normal(truth.astype(float), 1.0)
    images = [str(i) for i in range(300)]
    plain, shifted = (
        first_token_scores((margins + bias).tolist(), truth.tolist(), images, n_resamples=50)
        for bias in (0.0, 5.0)
    )
    assert plain["auroc"] == shifted["auroc"]
    assert shifted["ece"]["value"] > plain["ece"]["value"] + 0.2


def test_undefined_measures_are_null():
    assert first_token_scores([None, None], [True, False], ["a", "b"]) is None
    found = first_token_scores([1.0, 2.0, None], [True, True, False], ["a", "b", "c"])
    assert found["n"] == 2
    assert found["auroc"] == {"value": None, "ci95": None}
    assert found["average_precision"]["value"] == 1


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_bias_for_a_yes_ratio_says_yes_as_often(share):
    margins = [2.0, -1.0, None, 0.5, -3.0, 4.0, 1.0, -0.5, -2.0]
    bias = bias_for_yes_ratio(margins, share)
    known = [margin for margin in margins if margin is not None]
    assert sum(margin + bias > 0 for margin in known) == share * len(known)
    assert all(abs(margin + bias) >= 0.25 for margin in known)  # no answer on the edge


def test_questions_with_equal_margins_get_equal_answers():
    assert bias_for_yes_ratio([1.0, 1.0, 1.0, 0.0], 0.5) == -0.5
    assert bias_for_yes_ratio([1.0], 0.9) == 0.0


@pytest.mark.parametrize(("margins", "share"), [([], 0.5), ([None], 0.5), ([1.0], 1.5)])
def test_no_bias_is_made_up(margins, share):
    with pytest.raises(DataError, match="yes ratio"):
        bias_for_yes_ratio(margins, share)
