"""Temperature, calibration error and Brier score against hand-worked numbers, scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from reward.calibration import (
    REACH,
    brier_score,
    calibration_bins,
    calibration_noise,
    cross_fitted_temperature,
    expected_calibration_error,
    fit_temperature,
    reliability,
)

# The same examples on every run, and no failure because a machine was busy.
deterministic = settings(derandomize=True, deadline=None)
gaps = st.lists(st.floats(-50, 50).map(lambda x: round(x, 3)), min_size=1, max_size=60)


def likelihood(gap_P: np.ndarray, temperature: float) -> float:
    return float(log_expit(np.asarray(gap_P) / temperature).sum())


# Temperature


def test_temperature_by_hand() -> None:
    """Three right and one wrong at gap 1 want sigmoid(1 / T) = 3/4, so T = 1 / log 3."""
    assert fit_temperature([1, 1, 1, -1]) == pytest.approx(1 / math.log(3))
    assert fit_temperature([2, 2, 2, -2]) == pytest.approx(2 / math.log(3))


def test_temperature_is_found_again() -> None:
    """Gaps whose outcomes are drawn with chance sigmoid(gap / 2.5) want T = 2.5."""
    rng = np.random.default_rng(0)
    size_P = rng.exponential(4, 20_000)
    gap_P = np.where(rng.random(20_000) < expit(size_P / 2.5), size_P, -size_P)
    assert fit_temperature(gap_P) == pytest.approx(2.5, rel=0.03)


@deterministic
@given(gaps)
def test_no_other_temperature_within_reach_is_likelier(gap_P: list[float]) -> None:
    found = fit_temperature(gap_P)
    scale = float(np.abs(gap_P).mean())
    if scale == 0:
        assert found == 1
        return
    assert scale / REACH * (1 - 1e-9) <= found <= scale * REACH * (1 + 1e-9)
    best = likelihood(gap_P, found)
    for other in scale * np.geomspace(1 / REACH, REACH, 41):
        assert likelihood(gap_P, other) <= best + 1e-9 * max(1, abs(best))


def test_temperature_is_scipys_optimum() -> None:
    gap_P = np.random.default_rng(1).normal(1.2, 2, 300)
    found = minimize_scalar(lambda t: -likelihood(gap_P, t), bounds=(0.01, 50), method="bounded")
    assert fit_temperature(gap_P) == pytest.approx(found.x, rel=1e-4)


@deterministic
@given(gaps, st.sampled_from([1e-6, 0.5, 40.0]))
def test_temperature_has_the_unit_of_the_gaps(gap_P: list[float], factor: float) -> None:
    if any(gap_P):
        scaled = fit_temperature([factor * gap for gap in gap_P])
        assert scaled == pytest.approx(factor * fit_temperature(gap_P), rel=1e-6)


def test_where_no_pair_is_wrong_every_confidence_is_near_1() -> None:
    gap_P = np.random.default_rng(2).uniform(1, 3, 50)
    assert fit_temperature(gap_P) == pytest.approx(gap_P.mean() / REACH)
    assert expit(gap_P / fit_temperature(gap_P)).min() > 1 - 1e-12


@pytest.mark.parametrize("gap_P", [[1, -1], [1, -2], [-3.0], [0.5, 0.1, -9]])
def test_where_the_gaps_add_up_to_nothing_every_confidence_is_near_one_half(gap_P: list[float]) -> None:
    found = fit_temperature(gap_P)
    assert found == pytest.approx(np.abs(gap_P).mean() * REACH)
    assert expit(np.abs(gap_P) / found).max() < 0.51


def test_without_a_gap_the_temperature_is_1() -> None:
    assert fit_temperature([0, 0, 0]) == 1


@pytest.mark.parametrize("gap_P", [[], [math.nan], [1, math.inf], [[1, 2]]])
def test_gaps_that_are_none_are_refused(gap_P: list[float]) -> None:
    with pytest.raises(ValueError, match="gap_P"):
        fit_temperature(gap_P)


# Cross-fitting


def test_each_half_is_measured_with_the_others_temperature() -> None:
    prompts = np.repeat([f"p{i}" for i in range(40)], 3)
    gap_P = np.random.default_rng(3).normal(1, 1, 120)
    crossed_P = cross_fitted_temperature(gap_P, prompts)
    assert crossed_P is not None
    first, second = (crossed_P == value for value in np.unique(crossed_P))
    assert crossed_P[first][0] == fit_temperature(gap_P[second])
    assert crossed_P[second][0] == fit_temperature(gap_P[first])
    assert len(set(prompts[first])) == len(set(prompts[second])) == 20
    assert not set(prompts[first]) & set(prompts[second])


def test_the_halves_do_not_depend_on_the_order_of_the_pairs() -> None:
    prompts, gap_P = np.array([f"p{i}" for i in range(30)]), np.random.default_rng(4).normal(1, 1, 30)
    order = np.random.default_rng(5).permutation(30)
    there, back = cross_fitted_temperature(gap_P, prompts), cross_fitted_temperature(gap_P[order], prompts[order])
    assert there is not None and back is not None
    assert there[order] == pytest.approx(back)


def test_cross_fitting_is_harder_than_fitting_on_oneself() -> None:
    """What is fitted on its own pairs has the best likelihood of all; the honest one is below, on average and here."""
    gap_P = np.random.default_rng(6).normal(0.7, 1, 40)
    crossed_P = cross_fitted_temperature(gap_P, np.arange(40))
    assert crossed_P is not None
    assert log_expit(gap_P / crossed_P).sum() < likelihood(gap_P, fit_temperature(gap_P))


def test_a_single_prompt_cannot_be_halved() -> None:
    assert cross_fitted_temperature([1, 2, -1], ["p", "p", "p"]) is None


# Calibration error


def test_error_by_hand() -> None:
    """Bins 0.6 0.6 (one right of two) and 0.9 0.9 (both right): (2 |0.5 - 0.6| + 2 |1 - 0.9|) / 4 = 0.1."""
    confidence, right = [0.6, 0.9, 0.6, 0.9], [1, 1, 0, 1]
    assert expected_calibration_error(confidence, right, 2) == pytest.approx(0.1)
    assert reliability(confidence, right, 2) == [(0.6, 0.5, 2), (0.9, 1.0, 2)]
    # In one bin the two cancel: accuracy 3/4, confidence 3/4.
    assert expected_calibration_error(confidence, right, 1) == pytest.approx(0)


@pytest.mark.parametrize(("n", "bins"), [(1000, 10), (997, 7), (60, 5), (31, 1)])
def test_bins_are_scikit_learns(n: int, bins: int) -> None:
    rng = np.random.default_rng(n)
    confidence_P = rng.uniform(0.5, 1, n)
    right_P = rng.random(n) < confidence_P**2
    accuracy, confidence = calibration_curve(right_P, confidence_P, n_bins=bins, strategy="quantile")
    got = reliability(confidence_P, right_P, bins)
    assert [each.accuracy for each in got] == pytest.approx(accuracy.tolist())
    assert [each.confidence for each in got] == pytest.approx(confidence.tolist())
    weights = np.array([each.n for each in got]) / n
    error = float((weights * np.abs(accuracy - confidence)).sum())
    assert expected_calibration_error(confidence_P, right_P, bins) == pytest.approx(error)


def test_equal_confidences_share_a_bin_whatever_their_order() -> None:
    """A constant model: every confidence one half, and every tie wrong."""
    assert reliability([0.5] * 300, [0] * 300) == [(0.5, 0.0, 300)]
    mixed = ([0.5] * 150 + [0.8] * 50, [0] * 150 + [1] * 50)
    backwards = (mixed[0][::-1], mixed[1][::-1])
    assert reliability(*mixed, bins=4) == reliability(*backwards, bins=4)


@pytest.mark.parametrize(
    ("n", "bins"), [(1, 1), (39, 1), (40, 2), (199, 2), (200, 2), (300, 3), (1499, 14), (10**6, 15)]
)
def test_number_of_bins(n: int, bins: int) -> None:
    assert calibration_bins(n) == bins


@deterministic
@given(st.lists(st.tuples(st.floats(0.5, 1), st.booleans()), min_size=1, max_size=80), st.integers(1, 9))
def test_error_is_a_share_and_is_smallest_in_one_bin(pairs: list[tuple[float, bool]], bins: int) -> None:
    confidence, right = zip(*pairs, strict=True)
    one, many = (expected_calibration_error(confidence, right, b) for b in (1, bins))
    assert one == pytest.approx(abs(np.mean(right) - np.mean(confidence)))
    assert 0 <= one <= many + 1e-9 <= 1 + 1e-9


def test_noise_by_hand() -> None:
    """A pair of confidence 1/2 is always 1/2 off; of two in one bin, half of the time both cancel: 1/4."""
    assert calibration_noise([0.5], 1) == 0.5
    assert calibration_noise([0.5, 0.5], 1, draws=20_000) == pytest.approx(0.25, abs=0.01)
    assert calibration_noise([1.0] * 9) == 0


def test_noise_is_what_calibrated_models_show_and_falls_with_the_square_root() -> None:
    rng = np.random.default_rng(7)
    confidence_P = rng.uniform(0.5, 1, 400)
    shown = [expected_calibration_error(confidence_P, rng.random(400) < confidence_P, 8) for _ in range(300)]
    noise = calibration_noise(confidence_P, 8)
    assert noise == pytest.approx(np.mean(shown), rel=0.08)
    assert calibration_noise(np.repeat(confidence_P, 4), 8) == pytest.approx(noise / 2, rel=0.1)
    assert calibration_noise(confidence_P, 8, seed=1) == calibration_noise(confidence_P, 8, seed=1)


def test_scaling_mends_an_overconfident_model() -> None:
    rng = np.random.default_rng(8)
    size_P = rng.exponential(3, 3000)
    gap_P = 5 * np.where(rng.random(3000) < expit(size_P), size_P, -size_P)
    crossed_P = cross_fitted_temperature(gap_P, np.arange(3000))
    assert crossed_P is not None
    before, after = expit(np.abs(gap_P)), expit(np.abs(gap_P) / crossed_P)
    assert expected_calibration_error(before, gap_P > 0) > 0.05
    assert expected_calibration_error(after, gap_P > 0) < 2 * calibration_noise(after)
    assert brier_score(after, gap_P > 0) < brier_score(before, gap_P > 0)


# Brier


@deterministic
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=50))
def test_brier_is_scikit_learns(gap_P: list[float]) -> None:
    """Also seen as the chance that the chosen answer wins, which it always did."""
    gap = np.array(gap_P)
    confidence_P, right_P = expit(np.abs(gap)), gap > 0
    assert brier_score(confidence_P, right_P) == pytest.approx(
        brier_score_loss(right_P, confidence_P, pos_label=True), abs=1e-12
    )
    assert brier_score(confidence_P, right_P) == pytest.approx(((1 - expit(gap)) ** 2).mean(), abs=1e-12)


@pytest.mark.parametrize("call", [reliability, expected_calibration_error])
def test_outcomes_that_do_not_match_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match="wanted"):
        call([0.5, 0.6], [1])
    with pytest.raises(ValueError, match="bins is 0"):
        call([0.5], [1], 0)
