"""Means, shares, paired comparisons and correlation against hand-worked numbers, other implementations, simulation."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from reward.statistics import (
    Estimate,
    accuracy_interval,
    average_of_shares,
    mcnemar,
    mean_with_interval,
    paired_difference,
    percent,
    percent_range,
    share_with_interval,
    sign_test,
    spearman,
)

# The same examples on every run, and no failure because a machine was busy.
deterministic = settings(derandomize=True, deadline=None)


def test_standard_error_by_hand():
    """1, 2, 3, 4: s² = 5/3, so s/√4 = 0.645497."""
    got = mean_with_interval([1, 2, 3, 4])
    assert (got.mean, got.n) == (2.5, 4)
    assert got.standard_error == pytest.approx(0.645497, abs=1e-6)


def test_bootstrap_of_two_values_is_exact():
    """0 and 1: the draws are 0, ½, 1 with shares ¼, ½, ¼, so the 2.5 % and 97.5 % points are 0 and 1."""
    got = mean_with_interval([0, 1])
    assert (got.low, got.mean, got.high) == (0, 0.5, 1)


def test_clustered_standard_error_by_hand():
    """Sums 2 and 6 of sizes 1 and 3 both lie on the mean 2: no error.

    Sums 1 and 5 of size 2 lie -2 and 2 from 2 · 1.5: sqrt(2/1 · 8) / 4 = 1.
    """
    assert mean_with_interval([2, 2, 2, 2], clusters=["a", "b", "b", "b"]).standard_error == 0
    got = mean_with_interval([0, 1, 2, 3], clusters=[7, 7, 9, 9])
    assert (got.mean, got.standard_error, got.n) == (1.5, pytest.approx(1.0), 2)


def test_singleton_clusters_change_nothing():
    values = np.random.default_rng(1).normal(size=50)
    assert mean_with_interval(values) == mean_with_interval(values, clusters=np.arange(50))


def test_bootstrap_agrees_with_theory():
    """For 400 normal values the percentile interval is mean ± 1.96 standard errors, up to noise."""
    got = mean_with_interval(np.random.default_rng(2).normal(3, 2, size=400))
    assert got.low == pytest.approx(got.mean - 1.96 * got.standard_error, abs=0.02)
    assert got.high == pytest.approx(got.mean + 1.96 * got.standard_error, abs=0.02)


def test_correlated_answers_of_one_prompt_widen_the_interval():
    """Four near copies of a value carry the evidence of one: the honest interval is twice as wide."""
    rng = np.random.default_rng(3)
    values = np.repeat(rng.normal(size=60), 4) + rng.normal(scale=0.1, size=240)
    naive = mean_with_interval(values)
    honest = mean_with_interval(values, clusters=np.repeat(np.arange(60), 4))
    assert honest.mean == naive.mean
    assert (honest.high - honest.low) / (naive.high - naive.low) == pytest.approx(2, abs=0.15)
    assert honest.standard_error / naive.standard_error == pytest.approx(2, abs=0.15)


def test_clustered_bootstrap_covers():
    rng = np.random.default_rng(4)
    clusters = np.repeat(np.arange(50), 3)
    hits = 0
    for _ in range(400):
        got = mean_with_interval(rng.normal(size=50)[clusters] + rng.normal(size=150), clusters, resamples=500)
        hits += got.low <= 0 <= got.high
    assert 0.91 <= hits / 400 <= 0.98


@pytest.mark.parametrize(("share", "n"), [(0.6, 200), (0.5, 400), (0.8, 300)])
def test_the_exact_interval_covers(share, n):
    """1,000 runs: never less than it says, and hardly more where n is not small."""
    drawn, counts = np.unique(np.random.default_rng(6).binomial(n, share, 1000), return_counts=True)
    intervals = [accuracy_interval(int(right), n) for right in drawn]
    hits = sum(count for got, count in zip(intervals, counts, strict=True) if got.low <= share <= got.high)
    assert 930 <= hits <= 970


def test_the_bootstrap_covers():
    rng = np.random.default_rng(7)
    intervals = [mean_with_interval(rng.exponential(size=120), seed=run, resamples=800) for run in range(1000)]
    hits = sum(got.low <= 1 <= got.high for got in intervals)
    assert 930 <= hits <= 970


def test_same_seed_same_interval_and_blocks_do_not_show(monkeypatch):
    values = np.random.default_rng(5).normal(size=30)
    assert mean_with_interval(values, seed=1) == mean_with_interval(values, seed=1)
    assert mean_with_interval(values, seed=1).low != mean_with_interval(values, seed=2).low
    monkeypatch.setattr("reward.statistics._BLOCK", 300)
    assert mean_with_interval(values, seed=1).low == pytest.approx(mean_with_interval(values, seed=2).low, abs=0.05)


def test_one_unit_says_nothing_about_its_error():
    for got in (mean_with_interval([4.0]), mean_with_interval([3.0, 5.0], clusters=["p", "p"])):
        assert (got.mean, got.n) == (4.0, 1)
        assert math.isnan(got.low) and math.isnan(got.high) and math.isnan(got.standard_error)
        assert json.loads(json.dumps(got.record(), allow_nan=False))["low"] is None


def test_constant_values_have_no_width():
    got = mean_with_interval([0.1] * 7)
    assert got.low == pytest.approx(0.1) and got.low == got.high


@pytest.mark.parametrize(
    ("values", "options"),
    [([], {}), ([1.0, math.inf], {}), ([1.0, 2.0], {"clusters": [1]}), ([1.0], {"resamples": 0})],
)
def test_means_of_nothing_sensible_are_refused(values, options):
    with pytest.raises(ValueError, match=r"wanted|finite"):
        mean_with_interval(values, **options)


def test_accuracy_interval_by_hand():
    """All 10 right: the lower bound solves p^10 = 0.025, p = 0.6915; none right mirrors it."""
    assert accuracy_interval(10, 10).low == pytest.approx(0.025**0.1)
    assert accuracy_interval(10, 10).high == 1
    assert accuracy_interval(0, 10).high == pytest.approx(1 - 0.025**0.1)
    got = accuracy_interval(81, 263)  # Newcombe 1998, table I, method 5
    assert (got.low, got.high) == (pytest.approx(0.2527, abs=5e-5), pytest.approx(0.3676, abs=5e-5))


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_accuracies_are_refused(correct, n):
    with pytest.raises(ValueError, match="right of"):
        accuracy_interval(correct, n)


def test_sign_test_by_hand():
    """5 of 5: 2/32. 8 against 2: 2 (1 + 10 + 45) / 1024."""
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(112 / 1024)
    assert sign_test(0, 0) == sign_test(3, 3) == 1
    with pytest.raises(ValueError, match="negative"):
        sign_test(-1, 2)


def test_percent_never_rounds_onto_the_marks():
    assert [percent(x) for x in (0.5, 0.811, 0, 1, 0.57)] == ["50 %", "81 %", "0 %", "100 %", "57 %"]
    assert percent_range(0.5004, 0.9996) == "50.04–99.96 %"
    assert percent(0.504) == "50.4 %"
    assert percent(0.003) == "0.3 %"


# Shares


def test_a_share_is_a_mean_unless_all_are_alike():
    rng = np.random.default_rng(0)
    hits, prompts = rng.random(90) < 0.7, np.repeat(np.arange(30), 3)
    assert share_with_interval(hits, prompts, seed=3) == mean_with_interval(hits, prompts, seed=3)


@pytest.mark.parametrize("value", [0, 1])
def test_equal_shares_get_the_exact_interval_over_prompts(value):
    """Three prompts of two answers, all right: the lower bound solves p^3 = 0.025, p = 0.2924."""
    got = share_with_interval([value] * 6, ["a", "a", "b", "b", "c", "c"])
    assert (got.mean, got.n) == (value, 3)
    assert (got.low, got.high) == pytest.approx((0.025 ** (1 / 3), 1) if value else (0, 1 - 0.025 ** (1 / 3)))


def test_a_single_right_answer_proves_next_to_nothing():
    got = share_with_interval([True])
    assert (got.mean, got.low, got.high, got.n) == (1, pytest.approx(0.025), 1, 1)


def test_average_of_shares_by_hand():
    """0.9 (0.8 to 0.95) and 0.5 (0.2 to 0.8): 0.7, down by sqrt(0.1² + 0.3²) / 2 and up by sqrt(0.05² + 0.3²) / 2."""
    got = average_of_shares(Estimate(0.9, 0.8, 0.95, 0.04, 50), Estimate(0.5, 0.2, 0.8, 0.03, 9))
    assert (got.mean, got.n) == (pytest.approx(0.7), 9)
    assert got.low == pytest.approx(0.7 - math.sqrt(0.1) / 2)
    assert got.high == pytest.approx(0.7 + math.sqrt(0.0925) / 2)
    assert got.standard_error == pytest.approx(0.025)


def test_an_unknown_end_counts_as_the_end_of_the_range():
    known, unknown = Estimate(1.0, 0.9, 1.0, 0.0, 40), Estimate(0.5, math.nan, math.nan, math.nan, 1)
    got = average_of_shares(known, unknown)
    assert (got.low, got.high) == pytest.approx((0.75 - math.hypot(0.1, 0.5) / 2, 1.0))
    assert average_of_shares(known, known).low == pytest.approx(1 - math.hypot(0.1, 0.1) / 2)


def test_average_of_shares_covers():
    """A big stratum and one of 12: the average of their true shares is inside at least 93 times in 100."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        first = share_with_interval(rng.random(150) < 0.9, resamples=300)
        second = share_with_interval(rng.random(12) < 0.4, resamples=300)
        got = average_of_shares(first, second)
        hits += got.low <= 0.65 <= got.high
    assert hits / 300 >= 0.9


# Comparisons on the same pairs


def test_paired_difference_by_hand():
    """Right on 3 and 2 of 4: 1/4, from differences 0, 1, 1, -1."""
    got = paired_difference([True, True, True, False], [True, False, False, True])
    assert (got.mean, got.n) == (0.25, 4)
    assert got.standard_error == pytest.approx(math.sqrt(2.75 / 3) / 2)


def test_swapping_the_two_sides_negates_the_difference():
    rng = np.random.default_rng(2)
    first, second, prompts = rng.random(60) < 0.8, rng.random(60) < 0.6, np.repeat(np.arange(20), 3)
    there, back = paired_difference(first, second, prompts), paired_difference(second, first, prompts)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))


def test_the_same_rule_twice_differs_by_exactly_nothing():
    got = paired_difference([True, False, True], [True, False, True])
    assert (got.mean, got.low, got.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="3 values against 2"):
        paired_difference([1, 0, 1], [1, 0])


def test_mcnemar_by_hand():
    """2 (1 + 8) / 2⁸: the first example of Fagerland, Lydersen & Laake 2013 (BMC Med Res Methodol 13:91)."""
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(0.0703125)
    assert mcnemar(0, 0) == 1


# Correlation


def test_spearman_by_hand():
    """1 2 3 4 5 against 2 1 4 3 5: 1 - 6 (1 + 1 + 1 + 1) / (5 · 24) = 0.8; z = 1.0986, half 1.96 sqrt(1.32 / 2)."""
    got = spearman([10, 20, 30, 40, 500], [2, 1, 4, 3, 5])
    assert (got.rho, got.n) == (pytest.approx(0.8), 5)
    half = 1.959964 * math.sqrt((1 + 0.32) / 2)
    assert (got.low, got.high) == pytest.approx((math.tanh(1.098612 - half), math.tanh(1.098612 + half)), abs=1e-5)


@deterministic
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=40))
def test_spearman_is_scipys(points):
    x, y = zip(*points, strict=True)
    got = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(got.rho) and got.record()["rho"] is None
    else:
        assert got.rho == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)
        assert spearman(x, [-value for value in y]).rho == pytest.approx(-got.rho)


def test_fewer_independent_units_widen_the_interval():
    x = np.arange(40.0)
    y = x + np.random.default_rng(3).normal(0, 10, 40)
    many, few = spearman(x, y), spearman(x, y, n=20)
    assert few.rho == many.rho and few.low < many.low and few.high > many.high
    three = spearman(x, y, n=3)
    assert math.isnan(three.low) and three.rho == many.rho


def test_perfect_correlation_has_finite_ends():
    got = spearman(np.arange(30), np.arange(30) ** 3)
    assert got.rho == 1 and 0.99 < got.low <= got.high <= 1


@pytest.mark.parametrize(("x", "y"), [([], []), ([1, 2], [1]), ([1, math.nan], [1, 2])])
def test_correlations_of_nothing_sensible_are_refused(x, y):
    with pytest.raises(ValueError, match="wanted"):
        spearman(x, y)
