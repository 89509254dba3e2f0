"""The figures of the verdict against hand-worked numbers, other implementations, and simulation."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from align.compare.statistics import (
    WinRate,
    accuracy_interval,
    mean_with_interval,
    percent,
    percent_range,
    sign_test,
    standing,
    verdict_sentence,
    win_rate,
)

OUTCOMES = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=200)


def test_a_tie_is_half_a_win():
    got = win_rate([1, 1, 0.5, 0])
    assert got.rate == 0.625
    assert (got.wins, got.ties, got.losses, got.n) == (2, 1, 1, 4)


def test_wilson_interval_by_hand():
    """8 of 10: centre (0.8 + 0.19207) / 1.38415 = 0.71674, half-width 0.22658."""
    got = win_rate([1] * 8 + [0] * 2)
    assert got.low == pytest.approx(0.49016, abs=1e-5)
    assert got.high == pytest.approx(0.94332, abs=1e-5)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: the score interval.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_as_published(wins, n, low, high):
    got = win_rate([1] * wins + [0] * (n - wins))
    assert (got.low, got.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(wins=st.integers(0, 300), losses=st.integers(0, 300))
def test_wilson_interval_is_scipys(wins, losses):
    if wins + losses == 0:
        return
    got = win_rate([1] * wins + [0] * losses)
    want = binomtest(wins, wins + losses).proportion_ci(0.95, method="wilson")
    assert (got.low, got.high) == (pytest.approx(want.low, abs=1e-9), pytest.approx(want.high, abs=1e-9))


@given(OUTCOMES)
def test_swapping_the_two_models_mirrors_everything(outcomes):
    forward, backward = win_rate(outcomes), win_rate([1 - x for x in outcomes])
    assert backward.rate == pytest.approx(1 - forward.rate)
    assert backward.low == pytest.approx(1 - forward.high)
    assert backward.high == pytest.approx(1 - forward.low)
    assert (backward.wins, backward.ties, backward.losses) == (forward.losses, forward.ties, forward.wins)
    mirror = {"better": "worse", "worse": "better", "not settled": "not settled"}
    # An end within rounding of one half may fall on either side of it.
    if min(abs(forward.low - 0.5), abs(forward.high - 0.5)) > 1e-12:
        assert standing(backward.low, backward.high) == mirror[standing(forward.low, forward.high)]


@given(OUTCOMES)
def test_the_interval_holds_the_rate_and_stays_in_range(outcomes):
    got = win_rate(outcomes)
    assert 0 <= got.low <= got.rate <= got.high <= 1
    assert got.low < got.high


@pytest.mark.parametrize("share", [0.5, 0.6, 0.81])
def test_coverage_without_ties(share):
    rng = np.random.default_rng(0)
    assert 0.93 <= _coverage(rng.random((4000, 74)) < share, share) <= 0.97


@pytest.mark.parametrize(("win", "tie"), [(0.4, 0.2), (0.1, 0.8), (0.5, 0.4)])
def test_coverage_with_ties_is_at_least_nominal(win, tie):
    rng = np.random.default_rng(0)
    draws = rng.random((4000, 74))
    outcomes = np.where(draws < win, 1.0, np.where(draws < win + tie, 0.5, 0.0))
    assert _coverage(outcomes, win + tie / 2) >= 0.93


def _coverage(outcomes, truth):
    intervals = [win_rate(row) for row in np.asarray(outcomes, dtype=float)]
    return np.mean([got.low <= truth <= got.high for got in intervals])


@pytest.mark.parametrize("outcomes", [[], [0.7], [1, 0, 2], [math.nan], [[1, 0]]])
def test_anything_but_outcomes_is_refused(outcomes):
    with pytest.raises(ValueError, match="outcomes"):
        win_rate(outcomes)


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


def test_same_seed_same_interval_and_blocks_do_not_show(monkeypatch):
    values = np.random.default_rng(5).normal(size=30)
    assert mean_with_interval(values, seed=1) == mean_with_interval(values, seed=1)
    assert mean_with_interval(values, seed=1).low != mean_with_interval(values, seed=2).low
    monkeypatch.setattr("align.compare.statistics._BLOCK", 300)
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


def test_verdict_better():
    win = WinRate(rate=0.81, low=0.708, high=0.882, wins=60, ties=0, losses=14, n=74)
    assert verdict_sentence("dpo", "base", win, "the simulated preference") == (
        "dpo is better than base: preferred on 81 % of 74 held-out prompts (95 % interval 71–88 %), "
        "by the simulated preference."
    )


def test_verdict_worse_with_its_costs():
    win = win_rate([0] * 70 + [0.5] * 2 + [1] * 28)
    assert verdict_sentence("ppo", "base", win, "people", kl=4.234, length_ratio=1.5) == (
        "ppo is worse than base: preferred on 29 % of 100 held-out prompts, ties counting half "
        "(95 % interval 21–39 %), by people. It moved 4.2 nats per answer away from the reference and "
        "its answers are 1.50 times as long as those of base."
    )


def test_verdict_not_settled():
    got = verdict_sentence("dpo", "base", win_rate([1]), "people", length_ratio=0.9)
    assert got.startswith(
        "It is not settled whether dpo is better than base: preferred on 100 % of 1 held-out prompt ("
    )
    assert got.endswith("Its answers are 0.90 times as long as those of base.")


def test_an_end_on_one_half_settles_nothing():
    assert standing(0.5, 0.9) == standing(0.1, 0.5) == "not settled"


def test_percent_never_rounds_onto_the_marks():
    assert [percent(x) for x in (0.5, 0.811, 0, 1, 0.57)] == ["50 %", "81 %", "0 %", "100 %", "57 %"]
    assert percent_range(0.5004, 0.9996) == "50.04–99.96 %"
    assert percent(0.504) == "50.4 %"
    assert percent(0.003) == "0.3 %"
