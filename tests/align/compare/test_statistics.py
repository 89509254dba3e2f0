"""Win rates and the verdict against hand-worked numbers, other implementations, and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

import reward.statistics
from align.compare import statistics
from align.compare.statistics import (
    WinRate,
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


@pytest.mark.parametrize(
    "name",
    ["Estimate", "Proportion", "accuracy_interval", "mean_with_interval", "percent", "percent_range", "sign_test"],
)
def test_what_reward_models_need_too_has_one_home(name):
    assert getattr(statistics, name) is getattr(reward.statistics, name)
