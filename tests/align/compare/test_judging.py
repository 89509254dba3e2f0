"""Judges that look at the wrong thing, lengths, several tests at once, and how many prompts would settle it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.compare.statistics import (
    Estimate,
    holm,
    length_controlled_win_rate,
    position_bias,
    prompts_wanted,
    verdict_sentence,
    win_rate,
)


def test_a_judge_that_always_picks_the_first_side_is_exposed() -> None:
    ahead, behind = np.ones(40), np.zeros(40)  # the model wins wherever it stands first
    bias = position_bias(ahead, behind)
    assert bias.first == 1 and bias.consistent == 0 and bias.p == pytest.approx(2 * 0.5**40)
    assert (ahead + behind).mean() / 2 == 0.5


def test_an_unbiased_judge_by_hand() -> None:
    # Four prompts: won both, lost both, a tie both, and one where the first side wins either way.
    bias = position_bias([1, 0, 0.5, 1], [1, 0, 0.5, 0])
    assert bias.first == pytest.approx((1 + 1 + 1 + 2) / 8) and bias.consistent == 0.75 and bias.p == 1.0
    with pytest.raises(ValueError, match="2 verdicts in one order and 1 in the other"):
        position_bias([1, 0], [1])


def simulated(seed: int, quality: float, length: float, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outcomes of a judge that values quality and length, and the two lengths."""
    rng = np.random.default_rng(seed)
    own, base = rng.normal(120, 30, n), rng.normal(100, 30, n)
    chance = 1 / (1 + np.exp(-(quality + length * (own - base) / 42)))
    return (rng.random(n) < chance).astype(float), own, base


def test_a_model_that_only_writes_longer_answers_is_exposed() -> None:
    settled = 0
    for seed in range(40):
        outcomes, own, base = simulated(seed, quality=0.0, length=2.0)
        plain, controlled = win_rate(outcomes), length_controlled_win_rate(outcomes, own, base)
        assert plain.low > 0.5
        settled += controlled.low > 0.5 or controlled.high < 0.5
    assert settled <= 6  # 5 % of 40 are 2; more than 6 would be a chance of 0.3 %


def test_a_model_that_is_better_stays_better_and_length_alone_changes_nothing_there() -> None:
    outcomes, own, base = simulated(1, quality=1.5, length=0.0)
    controlled = length_controlled_win_rate(outcomes, own, base)
    assert controlled.low > 0.5 and controlled.mean == pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.06)


def test_the_interval_covers() -> None:
    """1,000 runs with the model as assumed: 93 to 97 of 100 intervals hold the truth."""
    inside, n, truth = 0, 300, 1 / (1 + math.exp(-0.4))
    rng = np.random.default_rng(0)
    for _ in range(1000):
        difference = rng.normal(0, 1, n)
        chance = 1 / (1 + np.exp(-(0.4 + 1.2 * np.tanh(difference / difference.std()))))
        found = length_controlled_win_rate((rng.random(n) < chance).astype(float), difference, np.zeros(n))
        inside += found.low <= truth <= found.high
    assert 930 <= inside <= 970


def test_swapping_the_models_mirrors_the_figure_and_equal_lengths_give_the_plain_rate() -> None:
    outcomes, own, base = simulated(3, quality=0.3, length=1.0)
    one, other = length_controlled_win_rate(outcomes, own, base), length_controlled_win_rate(1 - outcomes, base, own)
    assert other.mean == pytest.approx(1 - one.mean, abs=1e-9) and other.low == pytest.approx(1 - one.high, abs=1e-9)
    flat = length_controlled_win_rate(outcomes, np.full(400, 50.0), np.full(400, 50.0))
    assert flat.mean == pytest.approx(outcomes.mean(), abs=0.002)  # the prior pulls a little towards 1/2
    always = length_controlled_win_rate(np.ones(20), own[:20], base[:20])
    assert 0.9 < always.mean < 1 and always.high <= 1
    with pytest.raises(ValueError, match=r"an outcome is outside 0\.\.1"):
        length_controlled_win_rate([2.0], [1], [1])


def test_holm_by_hand() -> None:
    # 0.01 x 3, then 0.03 x 2, then 0.04 x 1, which may not fall below the one before it.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
    with pytest.raises(ValueError, match="numbers from 0 to 1 are wanted"):
        holm([1.2])


def test_how_many_prompts_would_settle_it() -> None:
    wanted = prompts_wanted(0.6)
    assert wanted == math.ceil(((1.959964 + 0.841621) / 0.1) ** 2 * 0.24)
    rng = np.random.default_rng(0)
    found = sum(win_rate((rng.random(wanted) < 0.6).astype(float)).low > 0.5 for _ in range(600)) / 600
    assert found == pytest.approx(0.8, abs=0.05)
    assert prompts_wanted(0.5) is None and prompts_wanted(0.4) == wanted
    assert prompts_wanted(0.6, variance=0.12) == pytest.approx(wanted / 2, abs=1)


def test_the_verdict_says_what_length_does_and_what_would_settle_it() -> None:
    clear = win_rate([1] * 60 + [0] * 14)
    kept, lost, turned = (Estimate(m, m - 0.05, m + 0.05, 0.03, 74) for m in (0.7, 0.52, 0.4))
    said = [verdict_sentence("ppo", "base", clear, "people", controlled=c) for c in (kept, lost, turned)]
    assert said[0].endswith("At equal length it would be preferred on 70 % (65–75 %).")
    assert said[1].endswith("At equal length that is not settled: it would be preferred on 52 % (47–57 %).")
    assert said[2].endswith("At equal length it is worse: it would be preferred on 40 % (35–45 %).")
    open_ = win_rate([1] * 33 + [0] * 27)
    assert verdict_sentence("dpo", "base", open_, "people").endswith(
        f"If that rate holds, {prompts_wanted(0.55)} prompts in all would be likely to settle it."
    )
    hopeless = verdict_sentence("dpo", "base", win_rate([1] * 501 + [0] * 499), "people")
    assert hopeless.endswith("If that rate holds, not even 10,000 prompts would settle it.")
    assert "prompts in all" not in verdict_sentence("dpo", "base", win_rate([1, 0, 1]), "people")
