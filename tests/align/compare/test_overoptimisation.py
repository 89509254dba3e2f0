"""Where proxy and gold part: by hand, against brute force, and how often it cries wolf."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from align.compare.overoptimisation import (
    best_of_n,
    fall,
    parting,
    recommended,
    sentences,
    simultaneous,
    summarise,
)

KL = [0.0, 2.0, 5.0, 9.0, 14.0]


def tables(means: list[list[float]], prompts: int = 48, seed: int = 0, noise: float = 0.3) -> list[np.ndarray]:
    """Scores CP with these means and noise, and an effect of the prompt that all checkpoints share."""
    rng = np.random.default_rng(seed)
    found = []
    for rows in means:
        prompt_P = rng.normal(0, 1, prompts)
        found.append(np.array([m + prompt_P + rng.normal(0, noise, prompts) for m in rows]))
    return found


def kls(prompts: int = 48, kl: list[float] = KL) -> np.ndarray:
    return np.repeat(np.array(kl)[:, None], prompts, axis=1)


HACKED = [[0.0, 1.0, 1.6, 2.1, 2.5], [0.0, 0.5, 0.8, 0.3, -0.4]]
HONEST = [[0.0, 1.0, 1.6, 2.1, 2.5], [0.0, 0.5, 0.9, 1.3, 1.6]]
BROKEN = [[0.0, 1.0, 1.6, 0.6, -0.5], [0.0, 0.5, 0.8, 0.3, -0.4]]


# Simultaneous intervals


def test_one_difference_has_students_interval() -> None:
    """By hand: 1, 2, 3 has mean 2, standard error 1/√3 and t of 2 degrees of freedom 4.303."""
    (estimate,) = simultaneous([[1.0, 2.0, 3.0]], 0)
    half = 4.302653 / math.sqrt(3)
    assert (estimate.mean, estimate.n) == (2.0, 3)
    assert (estimate.low, estimate.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)


def test_many_differences_get_wider_intervals_unless_they_are_the_same() -> None:
    rng = np.random.default_rng(0)
    d_DP = rng.normal(0, 1, (6, 40))
    (alone,) = simultaneous(d_DP[:1], 0)
    among = simultaneous(d_DP, 0)[0]
    copies = simultaneous(np.repeat(d_DP[:1], 6, axis=0), 0)[0]
    assert among.mean == alone.mean and among.low < alone.low and among.high > alone.high
    assert copies.low == pytest.approx(alone.low, abs=0.02)
    # Six independent t values: Bonferroni's point is an upper bound, and close.
    bound = student.ppf(1 - 0.025 / 6, 39) * among.standard_error
    assert 0.93 * bound < among.high - among.mean < 1.02 * bound


def test_equal_values_have_no_width_and_one_prompt_no_interval() -> None:
    estimates = simultaneous([[0.1, 0.1, 0.1], [1.0, 2.0, 4.0]], 0)
    assert estimates[0].low == estimates[0].high == estimates[0].mean
    assert estimates[1].low < 1
    assert math.isnan(simultaneous([[1.0]], 0)[0].low)


# Parting


def test_a_hacked_run_parts_at_its_best() -> None:
    proxy_CP, gold_CP = tables(HACKED)
    assert parting(proxy_CP, gold_CP, 0) == 2
    best, fallen = fall(gold_CP, 0)
    assert best == 2 and fallen.high < 0
    assert fallen.mean == pytest.approx(gold_CP[4].mean() - gold_CP[2].mean())
    assert fallen.low < -1.2 < fallen.high


def test_a_run_that_only_harms_parts_at_the_reference() -> None:
    assert parting(*tables([HACKED[0], [0.0, -0.3, -0.6, -0.9, -1.2]]), 0) == 0


@pytest.mark.parametrize(
    "means",
    [
        HONEST,
        BROKEN,
        [[0.0] * 5, HACKED[1]],  # the gold falls, but the proxy never rose
        [HACKED[0], [0.0, 0.5, -0.8, 0.5, 0.9]],  # a dip that the run recovered from
    ],
    ids=["honest", "both fall", "no proxy", "recovered"],
)
def test_what_is_no_parting(means: list[list[float]]) -> None:
    assert parting(*tables(means), 0) is None


def test_without_a_held_out_judge_nothing_is_seen() -> None:
    assert parting(tables(HACKED)[0], None, 0) is None


@pytest.mark.parametrize("scores", [[[0.0], [1.0]], [[0.0], [-1.0]]])
def test_one_prompt_settles_nothing(scores: list[list[float]]) -> None:
    assert parting([[0.0], [1.0]], scores, 0) is None
    assert recommended([[0.0], [1.0]], scores, [[0.0], [3.0]], 0) == 0


@pytest.mark.parametrize(("prompts", "checkpoints"), [(8, 4), (32, 9)])
def test_false_alarms_are_rare_although_the_best_is_chosen(prompts: int, checkpoints: int) -> None:
    """The gold never changes but for noise, the proxy rises: no more than 5 % of 300 runs may part.

    The plain interval of best less last would part in several times as many, which is what the correction is for.
    """
    rng = np.random.default_rng(1)
    runs, alarms, plain = 300, 0, 0
    proxy_CP = np.arange(checkpoints)[:, None] + np.zeros(prompts)
    for seed in range(runs):
        gold_CP = rng.normal(0, 1, prompts) + rng.normal(0, 1, (checkpoints, prompts))
        alarms += parting(proxy_CP, gold_CP, seed) is not None
        d_P = gold_CP[gold_CP.mean(1).argmax()] - gold_CP[-1]
        plain += d_P.mean() > 1.96 * d_P.std(ddof=1) / math.sqrt(prompts)
    assert alarms <= 0.05 * runs, alarms
    assert plain > 0.08 * runs, plain


def test_a_real_fall_is_found_most_of_the_time() -> None:
    """A fall of one standard deviation of a difference, over 32 prompts: well above chance."""
    found = 0
    for seed in range(40):
        proxy_CP, gold_CP = tables([HACKED[0], [0.0, 0.5, 0.8, 0.5, 0.35]], prompts=32, seed=seed)
        found += parting(proxy_CP, gold_CP, seed) is not None
    assert found >= 34


# What to ship


def test_a_hacked_run_ships_its_best() -> None:
    proxy_CP, gold_CP = tables(HACKED)
    assert recommended(proxy_CP, gold_CP, kls(), 0) == 2


def test_of_equals_the_one_at_least_kl_is_shipped() -> None:
    proxy_CP, gold_CP = tables([HONEST[0], [0.0, 0.9, 0.9, 0.9, 0.9]])
    assert recommended(proxy_CP, gold_CP, kls(), 0) == 1
    assert recommended(proxy_CP, gold_CP, kls(kl=[0.0, 4.0, 3.0, 9.0, 14.0]), 0) == 2


def test_where_nothing_is_better_the_reference_is_shipped() -> None:
    proxy_CP, gold_CP = tables([HACKED[0], [0.0, 0.01, -0.01, 0.0, 0.01]])
    assert recommended(proxy_CP, gold_CP, kls(), 0) == 0


def test_one_that_may_be_no_better_than_the_reference_is_not_shipped() -> None:
    """Checkpoint 1 is so noisy that it is not settled to be worse than the best, nor better than the reference."""
    proxy_CP, gold_CP = tables(HONEST, noise=0.1)
    gold_CP[1] += np.random.default_rng(1).normal(0, 12, 48)
    gold_CP[1] += 0.5 - gold_CP[1].mean()
    assert recommended(proxy_CP, gold_CP, kls(), 0) == 4
    assert recommended(proxy_CP[:2], gold_CP[:2], kls()[:2], 0) == 0


def test_without_gold_the_proxy_decides() -> None:
    proxy_CP, gold_CP = tables(HACKED)
    assert recommended(proxy_CP, None, kls(), 0) == 4 != recommended(proxy_CP, gold_CP, kls(), 0)


def test_a_run_without_effect_ships_the_reference_in_all_but_few_cases() -> None:
    rng = np.random.default_rng(3)
    shipped = 0
    for seed in range(200):
        gold_CP = rng.normal(0, 1, 16) + rng.normal(0, 1, (6, 16))
        shipped += recommended(gold_CP, gold_CP, np.arange(6)[:, None] + np.zeros(16), seed) > 0
    assert shipped <= 10, shipped


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 5).flatmap(
        lambda c: st.lists(st.lists(st.integers(-3, 3), min_size=12, max_size=12), min_size=c, max_size=c)
    ),
    st.integers(0, 3),
)
def test_shift_and_scale_of_the_scores_do_not_matter(gold: list[list[int]], seed: int) -> None:
    gold_CP = np.array(gold, dtype=float)
    proxy_CP, kl_CP = np.arange(len(gold))[:, None] + np.zeros(12), np.arange(len(gold))[:, None] + np.zeros(12)
    plain = parting(proxy_CP, gold_CP, seed), recommended(proxy_CP, gold_CP, kl_CP, seed)
    moved = 8 * gold_CP + 64  # exact in binary
    assert (parting(proxy_CP, moved, seed), recommended(proxy_CP, moved, kl_CP, seed)) == plain
    if plain[0] is not None:
        assert plain[0] < len(gold) - 1 and gold_CP[plain[0]].mean() == gold_CP.mean(1).max()


# Best of n


def test_best_of_n_by_hand() -> None:
    """Of 1, 2, 3 the pairs have maxima 2, 3, 3. Their gold, 30, 20, 10, goes the other way."""
    curve = best_of_n([[1.0, 2.0, 3.0]], [[30.0, 20.0, 10.0]], [1, 2, 3])
    assert curve["n"] == [1, 2, 3]
    assert curve["proxy"] == pytest.approx([2, 8 / 3, 3])
    assert curve["gold"] == pytest.approx([20, 40 / 3, 10])
    assert curve["kl"] == pytest.approx([0, 0.193147, 0.431946], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_best_of_n_is_the_mean_over_all_subsets(seed: int) -> None:
    """With ties: among equals, each is taken alike."""
    rng = np.random.default_rng(seed)
    proxy_PM, gold_PM = rng.integers(0, 4, (3, 6)).astype(float), rng.normal(0, 1, (3, 6))
    curve = best_of_n(proxy_PM, gold_PM, range(1, 7))
    for n, proxy, gold in zip(curve["n"], curve["proxy"], curve["gold"] or [], strict=True):
        proxies, golds = [], []
        for p in range(3):
            for subset in itertools.combinations(range(6), n):
                best = max(proxy_PM[p, i] for i in subset)
                proxies.append(best)
                golds.append(np.mean([gold_PM[p, i] for i in subset if proxy_PM[p, i] == best]))
        assert proxy == pytest.approx(np.mean(proxies)) and gold == pytest.approx(np.mean(golds))


def test_best_of_one_is_the_mean_and_the_proxy_only_rises() -> None:
    rng = np.random.default_rng(0)
    proxy_PM = rng.normal(0, 1, (20, 64))
    curve = best_of_n(proxy_PM, None, [1, 2, 8, 64])
    assert curve["gold"] is None
    assert curve["proxy"][0] == pytest.approx(proxy_PM.mean())
    assert curve["proxy"][3] == pytest.approx(proxy_PM.max(1).mean())
    assert curve["proxy"] == sorted(curve["proxy"])


@pytest.mark.parametrize("n", [0, 4])
def test_more_than_there_are_cannot_be_drawn(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}, but of 3 answers a prompt 1 to 3"):
        best_of_n([[1.0, 2.0, 3.0]], None, [n])


# Words


def told(means: list[list[float]], gold: bool = True, **given: Any) -> list[str]:
    proxy_CP, gold_CP = tables(means)
    names = ["sft", *(f"update {i}" for i in (4, 8, 12, 16))]
    return sentences(
        names,
        proxy_CP,
        gold_CP if gold else None,
        kls(),
        "the reward model",
        "the held-out judge" if gold else None,
        given.get("curve"),
        0,
    )


def test_a_hacked_run_is_told_with_its_figures() -> None:
    proxy_CP, gold_CP = tables(HACKED)
    first, second = told(HACKED)
    _, fallen = fall(gold_CP, 0)
    rise = proxy_CP[4].mean() - proxy_CP[2].mean()
    assert first == (
        f"From update 8 on (KL 5.0 nats) the reward model still rises (+{rise:.2f}) while the held-out judge, which "
        f"the policy never saw, falls ({fallen.mean:.2f}, 95 % {fallen.low:.2f} to {fallen.high:.2f}, over 48 "
        "prompts): the policy is over-optimised."
    )
    assert second.startswith("Ship update 8: by the held-out judge it is better than sft (+0.")
    assert second.endswith("at 5.0 nats.")


def test_other_runs_are_told_apart() -> None:
    assert told(HONEST)[0].startswith("No over-optimisation is seen: from sft to update 16 (KL 14.0 nats)")
    assert told(BROKEN)[0].endswith("that is no over-optimisation but a run that went wrong.")
    unsettled = told([HACKED[0], [0.0, 0.5, 0.9, 0.94, 0.9]])
    assert unsettled[0].startswith("No over-optimisation is settled:") and unsettled[0].endswith("may be chance.")
    assert "and not settled to be worse than the best, update 12, at 5.0 nats instead of 9.0." in unsettled[1]
    nothing = told([HACKED[0], [0.0, 0.01, -0.01, 0.0, 0.01]])
    assert nothing[1] == (
        "Ship sft, the policy before the training: with all checkpoints compared at once, none is settled to be better "
        "by the held-out judge."
    )


def test_without_gold_the_sentences_warn() -> None:
    first, second = told(HACKED, gold=False)
    assert "over-optimisation cannot be seen, only the KL: 14.0 nats at update 16." in first
    assert second.startswith("Ship update 16: by the reward model") and "the proxy's own word" in second


def test_the_best_of_n_stands_beside_what_is_shipped() -> None:
    curve = best_of_n([[0.0, 1.0, 2.0, 3.0]], [[0.0, 0.25, 0.5, 1.0]], [1, 4])
    last = told(HACKED, curve=curve)[-1]
    assert last.startswith("For comparison, the best of 4 answers of sft by the reward model gets 1.00 by the held-out")
    assert "at 0.6 nats" in last and "update 8 gets" in last


def test_the_summary_holds_the_means_and_is_the_same_twice() -> None:
    proxy_CP, gold_CP = tables(HACKED)
    length_CP = 10 + 5 * np.abs(proxy_CP)
    arguments = (["sft", "a", "b", "c", "d"], [0, 1, 2, 3, 4], proxy_CP, gold_CP, kls(), length_CP, "p", "g", None, 3)
    found = summarise(*arguments)
    assert found == summarise(*arguments)
    assert (found["parting"], found["recommended"]) == (2, 2)
    assert [c["step"] for c in found["checkpoints"]] == [0, 1, 2, 3, 4]
    one = found["checkpoints"][2]
    assert one["proxy"]["mean"] == proxy_CP[2].mean() and one["length"]["mean"] == length_CP[2].mean()
    assert one["gold"] is not None and one["gold"]["mean"] == gold_CP[2].mean()
    assert one["kl"] == {"mean": 5.0, "low": 5.0, "high": 5.0, "standard_error": 0.0, "n": 48}
    assert found["sentences"][0].startswith("From b on (KL 5.0 nats)")


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one value for each score"):
        parting([[1.0, 2.0]], [[1.0]], 0)
    with pytest.raises(ValueError, match="nan or infinite"):
        parting([[1.0, math.nan]], [[1.0, 2.0]], 0)
    with pytest.raises(ValueError, match="2 names and 1 steps for 2 checkpoints"):
        summarise(["a", "b"], [0], [[1.0], [2.0]], None, [[0.0], [1.0]], [[1.0], [1.0]], "p", None, None, 0)
