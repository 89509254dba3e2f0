"""The verdict from what judges said: by hand, and in simulation that it says no more than it may."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.compare import verdict
from align.compare.judging import Judgement, by_scores
from align.compare.statistics import standing
from reward.statistics import mean_with_interval


def figures(name: str, **more):
    return {
        "name": name, "path": name, "kl": None, "kl_per_token": None, "entropy": None, "length": None,
        "finished": 1.0, "perplexity": None, **more,
    }  # fmt: skip


def test_by_hand() -> None:
    told = by_scores({"base": [0.0, 0.0, 1.0, None, 2.0], "new": [1.0, 0.0, 0.0, 5.0, 3.0]})
    assert told.outcomes == {"new": [1.0, 0.5, 0.0, None, 1.0]}
    win = verdict.win_figures({"judge": told})["new"]["judge"]
    assert (win["wins"], win["ties"], win["losses"], win["n"], win["unjudged"]) == (2, 1, 1, 4, 1)
    assert win["rate"] == 0.625
    assert win["p"] == 1.0  # two of three, exactly: 2 * P(X >= 2 | 3, 1/2) = 1


def test_p_values_are_corrected_over_every_model_and_judge() -> None:
    eight = [1.0] * 8 + [0.0] * 2
    nine = [1.0] * 10
    found = verdict.win_figures({"a": Judgement({"x": eight, "y": nine}), "b": Judgement({"x": nine, "y": [0.5] * 10})})
    # Exact sign tests: 8 of 10 is 112 / 1024, 10 of 10 is 2 / 1024, all ties 1. Holm over four.
    assert found["x"]["a"]["p"] == pytest.approx(112 / 1024)
    assert found["y"]["a"]["p_adjusted"] == pytest.approx(4 * 2 / 1024)
    assert found["x"]["b"]["p_adjusted"] == pytest.approx(4 * 2 / 1024)  # never below the one before it
    assert found["x"]["a"]["p_adjusted"] == pytest.approx(2 * 112 / 1024)
    assert found["y"]["b"]["p_adjusted"] == 1


def test_a_judge_without_any_verdict_gives_no_figure() -> None:
    assert verdict.win_figures({"a": Judgement({"x": [None, None]})}) == {}
    assert "No verdict" in verdict.headline("base", "a", [figures("base"), figures("x")], {})


def sentence_of(mine: np.ndarray, base: np.ndarray) -> str:
    told = {"judge": by_scores({"base": base.tolist(), "new": mine.tolist()})}
    wins = verdict.win_figures(told)
    return verdict.headline("base", "judge", [figures("base"), figures("new", win_rate=wins["new"])], {})


def test_equal_models_are_found_no_different_in_93_of_100_runs() -> None:
    quiet = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        # Two samples of one distribution on the same prompts, some of them alike: ties.
        base, mine = random.normal(size=(2, 120))
        alike = random.random(120) < 0.2
        quiet += "no difference" in sentence_of(np.where(alike, base, mine), base)
    assert quiet >= 93, quiet


def test_a_model_made_better_is_found() -> None:
    found = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        base, mine = random.normal(size=(2, 120))
        found += "new is better than base" in sentence_of(mine + 0.8, base)  # wins 71 % of prompts
    assert found >= 95, found


def test_a_model_that_only_writes_more_is_exposed() -> None:
    random = np.random.default_rng(0)
    length_base = random.integers(20, 60, 200)
    length_new = length_base + random.integers(-20, 60, 200)
    # A judge that likes length, and nothing else.
    scores = {"base": (length_base + random.normal(0, 5, 200)).tolist(), "new": length_new.tolist()}
    told = {"judge": by_scores(scores)}
    wins = verdict.win_figures(told)
    equal = verdict.equal_length(told, {"base": length_base.tolist(), "new": length_new.tolist()}, "base")
    assert standing(wins["new"]["judge"]["low"], wins["new"]["judge"]["high"]) == "better"
    assert standing(equal["new"]["judge"].low, equal["new"]["judge"].high) != "better"
    said = verdict.headline("base", "judge", [figures("base"), figures("new", win_rate=wins["new"])], equal)
    assert "length may explain the gain" in said


def test_a_judge_that_always_names_the_first_side() -> None:
    count = 40
    told = Judgement({"new": [0.5] * count}, orders={"new": ([1.0] * count, [0.0] * count)}, asked=2 * count)
    assert verdict.win_figures({"judge": told})["new"]["judge"]["rate"] == 0.5
    bias = verdict.bias_of(told)
    assert bias is not None
    assert (bias["first"], bias["consistent"]) == (1.0, 0.0)
    assert verdict.reliability(told, bias, None)[0].startswith("It looks at the side: it named the first side on 100 %")


def test_agreement_with_people_by_hand() -> None:
    people = Judgement({"x": [1.0, 0.0, 0.5, None, 1.0, 0.0]})
    judge = Judgement({"x": [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]})
    found = verdict.agreement(judge, people, "people")
    assert found is not None
    assert (found["share"]["rate"], found["share"]["n"]) == (0.75, 4)
    # Over the five both judged: alike on 3; by chance 2/5 * 4/5 + 2/5 * 1/5 = 0.4.
    assert found["kappa"] == pytest.approx((3 / 5 - 0.4) / (1 - 0.4))
    assert verdict.agreement(judge, Judgement({}), "people") is None


def test_abilities_order_the_models_and_the_first_is_zero() -> None:
    random = np.random.default_rng(1)
    truth = {"base": 0.0, "a": 0.7, "b": -0.7}
    # Gumbel noise makes comparisons Bradley-Terry's: P(a beats b) = sigmoid(difference).
    scores = {name: (strength + random.gumbel(size=600)).tolist() for name, strength in truth.items()}
    found = verdict.abilities(scores, seed=0)
    assert found["base"] == {"strength": 0.0, "low": 0.0, "high": 0.0}
    for name, strength in truth.items():
        if name != "base":
            assert found[name]["low"] < strength < found[name]["high"]
    assert verdict.abilities({"base": [1.0], "a": [2.0]}, seed=0) == {}
    assert verdict.abilities({"base": [None], "a": [2.0], "b": [1.0]}, seed=0) == {}


def test_worst_regressions_come_first() -> None:
    outcomes = {"a": [1.0, 0.0, 0.0, 0.5], "b": [1.0, 0.0, 1.0, 0.5]}
    margins = {"a": [1.0, -0.1, -3.0, 0.0], "b": [1.0, -0.2, 0.5, 0.0]}
    assert verdict.worst_first(outcomes, margins) == [1, 2, 3, 0]
    assert verdict.worst_first({"a": [1.0, 0.0]}, {}) == [1, 0]


def test_ratio_of_by_hand() -> None:
    found = verdict.ratio_of([2.0, 4.0], [1, 3], seed=0)
    assert found is not None
    assert found["mean"] == 1.5
    # Residuals 0.5 and -0.5: sqrt(2 / 1 * 0.5) / 4.
    assert found["standard_error"] == pytest.approx(0.25)
    same = verdict.ratio_of([1.0, 2.0, 5.0], [1, 1, 1], seed=0)
    assert same is not None
    assert same["standard_error"] == pytest.approx(mean_with_interval([1.0, 2.0, 5.0]).standard_error)
    assert verdict.ratio_of([], [], 0) is None and verdict.ratio_of([0.0], [0], 0) is None


def test_the_headline_tells_the_price() -> None:
    def mean(value: float) -> dict:
        return {"mean": value, "low": value, "high": value, "standard_error": 0.0, "n": 9}

    win = verdict.win_figures({"judge": Judgement({"new": [1.0] * 45 + [0.0] * 5})})["new"]
    base = figures("base", length=mean(40.0), perplexity=mean(12.0))
    new = figures("new", win_rate=win, length=mean(50.0), perplexity=mean(13.0), kl=mean(3.0))
    assert verdict.headline("base", "judge", [base, new], {}) == (
        "new is better than base: preferred by the judge on 90 % of 50 held-out prompts (95 % interval 79–96 %). Its "
        "price: 3.0 nats of KL per answer, answers 1.25 times as long and a perplexity of 13.0 instead of 12.0 on "
        "held-out demonstrations."
    )
    assert not math.isnan(win["judge"]["rate"])
