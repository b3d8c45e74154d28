"""The statistics against reference values, and their laws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_steer.errors import DataError
from vlm_steer_eval.statistics.closed_form import (
    benjamini_hochberg,
    clopper_pearson,
    clustered_standard_error,
    design_effect,
    holm,
    items_needed,
    mcnemar,
    minimum_detectable_difference,
    paired_permutation,
    paired_t_test,
    wilson,
)
from vlm_steer_eval.statistics.metrics import MetricSet, compare, ratio, summarise
from vlm_steer_eval.statistics.resampling import (
    bootstrap_sums,
    cluster_totals,
    percentile_interval,
    swap_sums,
)

SHARE = MetricSet(columns=("hits", "n"), formulas={"share": lambda c: ratio(c["hits"], c["n"])})


def test_reference_cases_are_reproduced(golden):
    cases = golden("stats.json")
    for case in cases["cases"]:
        a, b = case["a"], case["b"]
        n10 = sum(x > y for x, y in zip(a, b, strict=True))
        n01 = sum(x < y for x, y in zip(a, b, strict=True))
        assert (n10, n01) == (case["n10"], case["n01"])
        result = mcnemar(n10, n01)
        assert result.exact_p == pytest.approx(case["mcnemar_exact_p"], rel=1e-12)
        if case["mcnemar_cc_p"] is None:
            assert result.corrected_p is None
        else:
            assert result.corrected_p == pytest.approx(case["mcnemar_cc_p"], rel=1e-12)
        assert wilson(sum(a), len(a)) == pytest.approx(case["wilson95"], abs=1e-12)
        assert clopper_pearson(sum(a), len(a)) == pytest.approx(
            case["clopper_pearson95"], abs=1e-11
        )
        clusters = np.asarray(case["cluster"])
        assert clustered_standard_error(a, clusters, correction="bessel") == pytest.approx(
            case["clustered_se_lmms_eval"], abs=1e-12
        )
        assert clustered_standard_error(a, clusters) == pytest.approx(
            case["clustered_se_inspect"], abs=1e-12
        )
        expected = case["paired_ttest_lmms_eval"]
        paired = paired_t_test(a, b)
        assert paired.difference == pytest.approx(expected["mean_diff"], abs=1e-12)
        assert paired.standard_error == pytest.approx(expected["se_diff"], abs=1e-12)
        assert paired.t == pytest.approx(expected["t_stat"], abs=1e-10)
        assert paired.p == pytest.approx(expected["p_value"], rel=1e-9)
        assert paired.interval == pytest.approx(
            (expected["ci_lower"], expected["ci_upper"]), abs=1e-9
        )
    many = cases["multiple_comparisons"]
    assert holm(many["p"]) == pytest.approx(many["holm"], abs=1e-15)
    assert benjamini_hochberg(many["p"]) == pytest.approx(many["benjamini_hochberg"], abs=1e-15)


def test_an_interval_of_a_share_stays_within_its_bounds():
    for n in range(1, 60):
        none, everything = wilson(0, n), wilson(n, n)
        assert math.copysign(1, none.low) == 1
        assert none.low < none.high
        assert everything.low < everything.high <= 1


def test_published_greedy_and_sampled_answers_differ_by_mcnemar(golden, data_folder):
    expected = golden("pope_real_expected.json")["results"]
    for name, case in expected.items():
        if name.endswith("mcnemar_sample_vs_greedy"):
            result = mcnemar(case["only_sample_right"], case["only_greedy_right"])
            assert result.exact_p == pytest.approx(case["exact_p"], rel=1e-9)


def test_resampled_sums_are_the_weighted_totals_of_whole_clusters():
    totals = np.diag([1.0, 10.0, 100.0])
    sums = bootstrap_sums(totals, n_resamples=500)
    weights = sums / np.diag(totals)
    assert (weights == weights.round()).all()
    assert (weights.sum(1) == 3).all()
    assert np.allclose(weights.mean(0), 1, atol=0.15)


@given(st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_resampling_keeps_the_number_of_clusters(n, seed):
    sums = bootstrap_sums(np.ones((n, 1)), n_resamples=50, seed=seed)
    assert (sums == n).all()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_swapping_labels_keeps_the_sum_of_both_arms(pairs):
    a, b = (np.array(column, dtype=float)[:, None] for column in zip(*pairs, strict=True))
    swapped_a, swapped_b = swap_sums(a, b, n_resamples=30)
    assert np.allclose(swapped_a + swapped_b, a.sum() + b.sum())


def test_interval_covers_the_truth_about_as_often_as_it_claims():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        hits = generator.random(80) < 0.7
        counts = np.stack([hits, np.ones(80)], axis=1)
        interval = summarise(
            SHARE, counts, [str(i) for i in range(80)], n_resamples=400, seed=seed
        )["share"]["ci95"]
        covered += interval[0] <= 0.7 <= interval[1]
    # Binomial(200, 0.95) leaves [175, 198] with probability below 1e-4; the percentile bootstrap
    # of 80 items covers about one point less than nominal.
    assert 175 <= covered <= 200


def test_clustering_widens_the_interval_of_correlated_items():
    hits = np.repeat(np.random.default_rng(2).random(60) < 0.5, 6)
    counts = np.stack([hits, np.ones(360)], axis=1)
    alone = summarise(SHARE, counts, [str(i) for i in range(360)])["share"]["ci95"]
    grouped = summarise(SHARE, counts, [str(i // 6) for i in range(360)])["share"]["ci95"]
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])


def test_paired_difference_is_sharper_than_two_separate_intervals():
    generator = np.random.default_rng(3)
    base = generator.random(400) < 0.6
    better = base | (generator.random(400) < 0.06)
    clusters = [str(i) for i in range(400)]
    ones = np.ones(400)
    result = compare(SHARE, np.stack([base, ones], 1), np.stack([better, ones], 1), clusters)
    share = result["share"]
    assert share["ci95"][0] > 0
    assert share["p"] < 0.01
    assert share["value"] == pytest.approx(better.mean() - base.mean())


def test_identical_arms_have_no_difference_and_p_one():
    counts = [[1, 1], [0, 1], [1, 1]]
    share = compare(SHARE, counts, counts, ["a", "b", "c"])["share"]
    assert share == {"value": 0.0, "ci95": [0.0, 0.0], "p": 1.0}


def test_undefined_metrics_are_null_and_partly_defined_resamples_are_kept():
    assert summarise(SHARE, [[0, 0]], ["a"])["share"] == {"value": None, "ci95": None}
    assert summarise(SHARE, [], [])["share"] == {"value": None, "ci95": None}
    assert percentile_interval([np.nan, 1.0, 1.0]) == (1.0, 1.0)


def test_rows_without_a_cluster_are_refused():
    with pytest.raises(DataError, match="2 rows"):
        cluster_totals([[1], [2]], ["a"])


@given(st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None)
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(first, second):
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    result = mcnemar(first, second)
    assert result == mcnemar(second, first)
    assert 0 < result.exact_p <= 1
    if first + second:
        reference = scipy_stats.binomtest(first, first + second).pvalue
        assert result.exact_p == pytest.approx(reference, rel=1e-9)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=9))
@settings(max_examples=30, deadline=None)
def test_few_pairs_are_relabelled_exhaustively(pairs):
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    a, b = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    reference = scipy_stats.permutation_test(
        (a, b),
        lambda x, y, axis: (y - x).mean(axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    ).pvalue
    assert paired_permutation(a, b) == pytest.approx(reference)


def test_many_pairs_are_relabelled_at_random_to_the_same_answer():
    generator = np.random.default_rng(5)
    a = generator.normal(size=13)
    b = a + generator.normal(0.4, 1, size=13)
    exact = paired_permutation(a, b)
    sampled = paired_permutation(a, b, n_resamples=8000)
    # Four standard errors of a share of 8,000 relabellings.
    assert sampled == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 8000) + 2e-4)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=10), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_permutation_ignores_order_arms_and_ties(shifts, seed):
    shifts = np.array(shifts, dtype=float)
    zero = np.zeros(len(shifts))
    order = np.random.default_rng(seed).permutation(len(shifts))
    p = paired_permutation(zero, shifts)
    assert 0 < p <= 1
    assert p == paired_permutation(shifts, zero)
    assert p == paired_permutation(zero, shifts[order])
    assert p == paired_permutation(np.append(zero, 1.0), np.append(shifts, 1.0))


def test_swapping_whole_images_is_more_cautious_about_repeated_questions():
    shifts = np.repeat([1.0, 1.0, 1.0, -1.0, 1.0, 1.0], 6)
    clusters = np.repeat(np.arange(6), 6)
    zero = np.zeros(len(shifts))
    assert paired_permutation(zero, shifts, clusters) > 0.2
    assert paired_permutation(zero, shifts) < 0.01


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_adjusted_p_values_keep_the_order_and_bound_each_other(p_values):
    by_holm, by_bh = holm(p_values), benjamini_hochberg(p_values)
    for p, h, q in zip(p_values, by_holm, by_bh, strict=True):
        assert p <= q + 1e-12
        assert q <= h + 1e-12
        assert h <= min(1.0, p * len(p_values)) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(by_holm)[order]) >= 0).all()
    assert (np.diff(np.array(by_bh)[order]) >= 0).all()


@given(st.integers(50, 20_000), st.floats(0.02, 0.6), st.sampled_from([0.8, 0.9]))
def test_the_detectable_difference_and_the_items_needed_undo_each_other(n, discordant, power):
    least = minimum_detectable_difference(n, discordant, power=power)
    if least is None:
        assert items_needed(discordant, discordant, power=power) > n
        return
    assert 0 < least <= discordant
    assert abs(items_needed(least, discordant, power=power) - n) <= 1
    larger = minimum_detectable_difference(4 * n, discordant, power=power)
    assert larger == pytest.approx(least / 2, rel=0.1)


def test_the_detectable_difference_is_found_as_often_as_promised():
    n, discordant = 1000, 0.1
    least = minimum_detectable_difference(n, discordant)
    generator = np.random.default_rng(0)
    gains = generator.binomial(n, (discordant + least) / 2, size=2000)
    losses = generator.binomial(n - gains, (discordant - least) / (2 - discordant - least))
    statistic = (gains - losses) ** 2 / np.maximum(1, gains + losses)
    assert (statistic > 3.8415).mean() == pytest.approx(0.8, abs=0.03)


def test_correlated_questions_are_worth_less():
    assert design_effect(6, 0) == 1
    assert design_effect(6, 1) == 6
    alone = minimum_detectable_difference(3000, 0.05)
    together = minimum_detectable_difference(3000, 0.05, cluster_size=6, correlation=0.2)
    assert together == pytest.approx(alone * np.sqrt(2), rel=0.02)
    with pytest.raises(ValueError, match="discordant"):
        items_needed(0.2, 0.1)
