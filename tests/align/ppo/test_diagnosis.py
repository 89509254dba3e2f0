"""Each check on a run made to fail it and on one that just does not; and healthy runs, which are to be left alone.

A run here is a healthy one, noise and all, of which some figures are replaced: by a number, or by a function of the
update's number.
"""

import dataclasses
import math
import random
import subprocess
import sys
from collections.abc import Callable

import pytest

from align.ppo import diagnosis
from align.ppo.diagnosis import Settings, diagnose, summary

NAN, INF = math.nan, math.inf
SETTINGS = Settings(
    response_length=64,
    temperature=0.7,
    kl_coef=0.05,
    kl_target=None,
    learning_rate=1e-5,
    critic_warmup_updates=0,
    num_ppo_epochs=4,
    cliprange=0.2,
    vf_coef=0.1,
    missing_eos_penalty=None,
)
Figure = float | Callable[[int], float]


def healthy(count: int, seed: int = 0, episodes: int = 32) -> list[dict[str, float]]:
    """A run that learns: the score rises by a standard deviation and KL grows to some 8 nats an answer."""
    rng = random.Random(seed)
    noise = 1 / math.sqrt(episodes)
    updates = []
    for i in range(count):
        learned = 1 - math.exp(-i / 12)
        kl = 0.02 + 8 * learned**2
        kl_std = math.sqrt(2 * kl) * noise  # of k1, where log-ratios are normal
        approx_kl = 0.01 * rng.lognormvariate(0, 0.6)
        score = 0.5 + 0.8 * learned + 0.8 * noise * rng.gauss(0, 1)
        updates.append(
            {
                "update": float(i),
                "episodes": float((i + 1) * episodes),
                "objective/score": score,
                "objective/score_std": 0.8 * (1 + 0.7 * noise * rng.gauss(0, 1)),
                "objective/score_clipped": max(0.0, rng.gauss(0.02, 0.02)),
                "objective/kl": kl + kl_std * rng.gauss(0, 1),
                "objective/kl_std": kl_std,
                "objective/kl_coef": 0.05,
                "objective/rlhf_reward": score - 0.05 * kl,
                "objective/entropy": 2 - 0.8 * learned + 0.3 * noise * rng.gauss(0, 1),
                "episode/length": 40 + 4 * learned + 12 * noise * rng.gauss(0, 1),
                "episode/finished": sum(rng.random() < 0.85 for _ in range(episodes)) / episodes,
                "episode/score_length_r": math.tanh(0.3 + noise * rng.gauss(0, 1)),
                "episode/distinct": min(1.0, 0.9 - 0.1 * learned + 0.1 * noise * rng.gauss(0, 1)),
                "reward/model": score,
                "reward/model_std": 0.8,
                "reward/brevity": -0.4 + 0.1 * noise * rng.gauss(0, 1),
                "reward/brevity_std": 0.1,
                "value/explained_variance": 0.6 * (1 - math.exp(-i / 4)) + 0.5 * noise * rng.gauss(0, 1),
                "value/clip_fraction": 0.1 * rng.random(),
                "return/std": 0.8,
                "policy/clip_fraction": 0.08 * rng.lognormvariate(0, 0.5),
                "policy/approx_kl": approx_kl,
                "policy/approx_kl_last": 2 * approx_kl,
                "policy/ratio_max": 1 + rng.lognormvariate(1.5, 1),
                "policy/passes": 4.0,
                "sampling/mismatch": 0.012 * rng.lognormvariate(0, 0.3),
                "sampling/kl": rng.gauss(0.0005, 0.002),
                "loss/policy": rng.gauss(0, 0.02),
                "loss/value": (0.1 + 0.4 * math.exp(-i / 4)) * rng.lognormvariate(0, 0.2),
                "grad_norm": rng.lognormvariate(0, 0.7),
            }
        )
    return updates


def run(figures: dict[str, Figure], count: int = 40) -> list[dict[str, float]]:
    updates = healthy(count)
    for i, update in enumerate(updates):
        update |= {key: value(i) if callable(value) else value for key, value in figures.items()}
    return updates


def diagnosed(figures: dict[str, Figure], count: int = 40, **changes: object) -> list[tuple[str, str, str]]:
    found = diagnose(run(figures, count), dataclasses.replace(SETTINGS, **changes))
    return [(finding.check, finding.culprit, finding.severity) for finding in found]


def line(start: float, end: float, count: int = 40) -> Callable[[int], float]:
    return lambda i: start + (end - start) * i / (count - 1)


def wobble(mean: float, size: float) -> Callable[[int], float]:
    """Around the mean, without a trend."""
    return lambda i: mean + size * (-1) ** i


EQUAL = {"objective/score": 0.5, "objective/score_std": 0.0}
NEGATIVE = {"objective/kl": -4.1, "objective/kl_std": 0.4}
LONGER = {"episode/length": line(20, 60), "episode/score_length_r": 0.91}
UNLEARNED = {"objective/score": wobble(0.5, 0.05), "objective/score_std": 0.8}
STILL = {"policy/approx_kl": 1e-7, "policy/approx_kl_last": 2e-7, "policy/clip_fraction": 0, "objective/kl": 0.003}
UNFINISHED = {"episode/finished": 0.02, "episode/length": 63.5}

# figures, settings, the one finding, and its sentence
CASES = {
    "score not finite": (
        {"objective/score": lambda i: NAN if i == 38 else 0.5, "reward/model": lambda i: NAN if i == 38 else 0.5},
        {},
        ("reward-not-finite", "reward", "error"),
        "The score (reward/model) was NaN or infinite in 1 of the last 5 updates: mend the reward and resume from a "
        "checkpoint.",
    ),
    "reward constant": (
        EQUAL,
        {},
        ("reward-constant", "reward", "error"),
        "The reward gives every answer the same score (0.5 in all 40 updates): read episodes beside their scores, and "
        "mend the reward or take prompts that it tells answers apart on.",
    ),
    "reward no longer varies": (
        {"objective/score": lambda i: min(1, i / 30), "objective/score_std": lambda i: 0.0 if i >= 30 else 0.3},
        {},
        ("reward-constant", "reward", "warning"),
        "The reward no longer tells answers apart (all score 1, for 5 updates): stop here if that is the best score, "
        "else read the answers and go back to an earlier checkpoint.",
    ),
    "component constant": (
        {"reward/brevity": -1.0, "reward/brevity_std": 0.0},
        {},
        ("reward-component-constant", "reward", "warning"),
        "Of the rewards, reward/brevity (-1) gave every answer the same score in all 40 updates: mend that reward or "
        "take it out.",
    ),
    "reward is length": (
        LONGER,
        {},
        ("reward-is-length", "reward", "warning"),
        "The score rises with length (r = 0.91), and answers grew from 21 to 58 tokens: take length out of the reward, "
        "with a penalty or with preference pairs of like length.",
    ),
    "scores clipped": (
        {"objective/score_clipped": 0.83},
        {},
        ("scores-clipped", "hyperparameters", "warning"),
        "83 % of the scores are cut by reward_clip, which makes good answers equal: raise reward_clip.",
    ),
    "all scores clipped": (
        EQUAL | {"objective/score_clipped": 1.0},
        {},
        ("scores-clipped", "hyperparameters", "error"),
        "100 % of the scores are cut by reward_clip, which makes good answers equal: raise reward_clip.",
    ),
    "score stalled, policy moves": (
        UNLEARNED | {"objective/kl": line(0, 6)},
        {},
        ("score-stalled", "reward", "warning"),
        "Over 40 updates the score changed by -0.0077, against a spread of 0.8: measure the reward on held-out "
        "pairs, for the policy does move, or take more episodes an update.",
    ),
    "score stalled, steps too small": (
        UNLEARNED | {"objective/kl": line(0, 0.3)},
        {},
        ("score-stalled", "hyperparameters", "warning"),
        "Over 40 updates the score changed by -0.0077, against a spread of 0.8: raise learning_rate (1e-05 now), as "
        "KL is only 0.28 nats an answer.",
    ),
    "score stalled, penalty too large": (
        UNLEARNED | {"objective/kl": line(0, 1), "objective/kl_coef": 0.5},
        {},
        ("score-stalled", "hyperparameters", "warning"),
        "Over 40 updates the score changed by -0.0077, against a spread of 0.8: lower kl_coef from 0.5 to about 0.18.",
    ),
    "KL negative, sampling differs": (
        NEGATIVE | {"sampling/mismatch": 0.31, "sampling/kl": 0.12},
        {},
        ("kl-negative", "sampling", "error"),
        "KL is negative (-4.1 nats an answer), as sampling and training disagree by 0.31 nats a token: sample at the "
        "temperature of training (0.7), without top-k, top-p or dropout, from the same weights.",
    ),
    "KL negative, sampling agrees": (
        NEGATIVE | {"sampling/mismatch": 0.011},
        {},
        ("kl-negative", "hyperparameters", "warning"),
        "KL is negative (-4.1 nats an answer), though sampling and training agree to 0.011 nats a token: set "
        "kl_estimator to k3, which is never negative, or to full, which is exact.",
    ),
    "KL negative, sampling unknown": (
        NEGATIVE | {"sampling/mismatch": NAN, "sampling/kl": NAN},
        {},
        ("kl-negative", "sampling", "error"),
        "KL is negative (-4.1 nats an answer): sample at the temperature of training (0.7), without top-k, top-p or "
        "dropout, from the same weights.",
    ),
    "sampling mismatch": (
        {"sampling/mismatch": 0.21, "sampling/kl": 0.07},
        {},
        ("sampling-mismatch", "sampling", "warning"),
        "Sampling and training disagree by 0.21 nats a token, where rounding gives 0.05 at most: sample at the "
        "temperature of training (0.7), without top-k, top-p or dropout, from the same weights.",
    ),
    "sampling mismatch, KL alone known": (
        {"sampling/mismatch": NAN, "sampling/kl": 0.31},
        {},
        ("sampling-mismatch", "sampling", "error"),
        "Sampling and training disagree by 0.31 nats a token, where rounding gives 0.05 at most: sample at the "
        "temperature of training (0.7), without top-k, top-p or dropout, from the same weights.",
    ),
    "sampling mismatch, KL unknown": (
        {"sampling/mismatch": 0.12, "sampling/kl": NAN},
        {},
        ("sampling-mismatch", "sampling", "warning"),
        "Sampling and training disagree by 0.12 nats a token, where rounding gives 0.05 at most: sample at the "
        "temperature of training (0.7), without top-k, top-p or dropout, from the same weights.",
    ),
    "steps too large": (
        {"policy/approx_kl": 0.31, "policy/approx_kl_last": 0.5, "policy/clip_fraction": 0.55},
        {},
        ("learning-rate-too-high", "hyperparameters", "warning"),
        "An update moves the policy by 0.31 nats a token and the last mini-batch of an update finds the policy "
        "0.5 nats a token from where it began: lower learning_rate (1e-05 now) or num_ppo_epochs (4 now).",
    ),
    "steps much too large": (
        {"policy/approx_kl": 1.4},
        {},
        ("learning-rate-too-high", "hyperparameters", "error"),
        "An update moves the policy by 1.4 nats a token: lower learning_rate (1e-05 now) or num_ppo_epochs (4 now).",
    ),
    "tokens clipped": (
        {"policy/clip_fraction": 0.55, "policy/ratio_max": 20_000},
        {},
        ("learning-rate-too-high", "hyperparameters", "warning"),
        "55 % of the tokens are clipped and a token becomes 20,000 times as likely in an update: lower learning_rate "
        "(1e-05 now) or num_ppo_epochs (4 now).",
    ),
    "gradient blows up": (
        {"grad_norm": lambda i: 1.5 ** min(i, 30)},
        {},
        ("learning-rate-too-high", "hyperparameters", "error"),
        "The gradient norm grew from 1.5 to 191,751: lower learning_rate (1e-05 now) or num_ppo_epochs (4 now).",
    ),
    "losses not finite": (
        {"loss/policy": lambda i: NAN if i > 35 else 0.1, "policy/approx_kl": lambda i: INF if i == 39 else 0.01},
        {},
        ("learning-rate-too-high", "hyperparameters", "error"),
        "Losses or gradients were NaN or infinite in 4 of the last 5 updates: lower learning_rate (1e-05 now) or "
        "num_ppo_epochs (4 now).",
    ),
    "policy still": (
        STILL | UNLEARNED,
        {"learning_rate": 1e-9},
        ("policy-still", "hyperparameters", "warning"),
        "After 40 updates the policy is 0.003 nats an answer from the reference and moves by 1e-07 nats a token an "
        "update: raise learning_rate (1e-09 now).",
    ),
    "policy not trained": (
        STILL | {"policy/approx_kl": 0.0, "objective/kl": 0.0},
        {},
        ("policy-still", "hyperparameters", "error"),
        "After 40 updates the policy is 0 nats an answer from the reference and moves by 0 nats a token an update: "
        "raise learning_rate (1e-05 now).",
    ),
    "KL runs away": (
        {"objective/kl": line(0, 90)},
        {},
        ("kl-runaway", "hyperparameters", "warning"),
        "KL rose from 74 to 85 nats an answer in 5 updates: set kl_target, raise kl_coef (0.05 now) or lower "
        "learning_rate.",
    ),
    "KL runs far away, with a target": (
        {"objective/kl": line(0, 900), "objective/kl_coef": 0.12},
        {"kl_target": 6.0},
        ("kl-runaway", "hyperparameters", "error"),
        "KL rose from 738 to 854 nats an answer in 5 updates, where kl_target is 6: raise kl_coef (0.12 now) or lower "
        "learning_rate.",
    ),
    "KL pinned": (
        {"objective/kl": wobble(0.02, 0.01), "objective/kl_coef": NAN, "objective/score_std": 0.8},
        {"kl_coef": 5.0},
        ("kl-pinned", "hyperparameters", "warning"),
        "The penalty holds KL at 0.01 nats an answer, as kl_coef is 5 where scores differ by 0.8: lower kl_coef from "
        "5 to about 0.18.",
    ),
    "answers never stop": (
        UNFINISHED,
        {},
        ("answers-never-stop", "sft model", "warning"),
        "From the start only 2 % of the answers stop within 64 tokens: train sft on answers that end in the stop "
        "token, or raise response_length, or set missing_eos_penalty.",
    ),
    "answers never stop, with a penalty": (
        UNFINISHED,
        {"missing_eos_penalty": 1.0},
        ("answers-never-stop", "sft model", "warning"),
        "From the start only 2 % of the answers stop within 64 tokens: train sft on answers that end in the stop "
        "token, or raise response_length.",
    ),
    "answers ramble": (
        {"episode/finished": line(0.95, 0.1)},
        {},
        ("answers-ramble", "hyperparameters", "warning"),
        "93 % of the answers stopped by themselves at first, and 14 % do now: set missing_eos_penalty.",
    ),
    "answers ramble, with a penalty": (
        {"episode/finished": line(0.95, 0.1)},
        {"missing_eos_penalty": 0.5},
        ("answers-ramble", "hyperparameters", "warning"),
        "93 % of the answers stopped by themselves at first, and 14 % do now: raise missing_eos_penalty (0.5 now).",
    ),
    "answers vanish": (
        {"episode/length": lambda i: 40 if i < 10 else 2, "objective/entropy": lambda i: 2 if i < 10 else 0.2},
        {},
        ("answers-vanish", "reward", "error"),
        "Answers shrank from 40 to 2 tokens, so it pays to stop at once: look at the score of an empty answer and mend "
        "the reward, or raise kl_coef.",
    ),
    "entropy collapses": (
        {"objective/entropy": line(2.2, 0.2)},
        {},
        ("mode-collapse", "hyperparameters", "warning"),
        "Entropy fell from 2.1 to 0.3 nats a token: go back to an earlier checkpoint and raise kl_coef (0.05 now) or "
        "lower learning_rate.",
    ),
    "answers all alike": (
        {"objective/entropy": line(2.2, 0.2), "episode/distinct": lambda i: 0.9 if i < 20 else 0.12},
        {},
        ("mode-collapse", "hyperparameters", "error"),
        "Entropy fell from 2.1 to 0.3 nats a token and different 4-grams fell from 90 % to 12 % of all: go back to an "
        "earlier checkpoint and raise kl_coef (0.05 now) or lower learning_rate.",
    ),
    "critic diverges": (
        {"value/explained_variance": -4.0},
        {},
        ("critic-diverges", "critic", "error"),
        "The critic's errors vary 5 times as much as the returns it predicts: lower learning_rate (1e-05 now) or warm "
        "the critic up (critic_warmup_updates).",
    ),
    "critic explains nothing": (
        {"value/explained_variance": 0.03, "loss/value": 0.5},
        {},
        ("critic-explains-nothing", "critic", "warning"),
        "The critic explains 3 % of the variance of the returns after 40 updates, and its loss stands at 0.5: raise "
        "vf_coef (0.1 now) or warm it up (critic_warmup_updates, 0 now).",
    ),
    "critic explains nothing, and learns": (
        {"value/explained_variance": -0.2, "loss/value": line(2, 0.5)},
        {"critic_warmup_updates": 20},
        ("critic-explains-nothing", "critic", "warning"),
        "The critic explains 0 % of the variance of the returns after 40 updates, though its loss fell from 2 to "
        "0.58: warm it up longer (critic_warmup_updates, 20 now).",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_check_fires_alone_and_says_so(case: str) -> None:
    figures, changes, expected, sentence = CASES[case]
    assert diagnosed(figures, **changes) == [expected]
    assert diagnose(run(figures), dataclasses.replace(SETTINGS, **changes))[0].sentence == sentence


NEAR_MISSES = {
    "two equal updates": ({"objective/score_std": lambda i: 0.0 if i in (38, 39) else 0.8}, {}),
    "scores small, but different": ({"objective/score_std": 1e-4, "objective/score": line(0, 1e-3)}, {"kl_coef": 1e-5}),
    "a component that came to be constant": ({"reward/brevity_std": lambda i: 0.1 if i < 5 else 0.0}, {}),
    "a component NaN": ({"reward/brevity": NAN, "reward/brevity_std": NAN}, {}),
    "the score was NaN long ago": ({"objective/score": lambda i: NAN if i == 3 else i / 40}, {}),
    "longer, hardly correlated": (LONGER | {"episode/score_length_r": 0.6}, {}),
    "correlated, not longer": (LONGER | {"episode/length": line(40, 44)}, {}),
    "longer and correlated, no better": (LONGER | UNLEARNED | {"objective/score": wobble(0.5, 0.3)}, {}),
    "half the scores clipped": ({"objective/score_clipped": 0.45}, {}),
    "KL below 0 within its error": ({"objective/kl": -0.5, "objective/kl_std": 0.3}, {}),
    "KL below 0 twice": ({"objective/kl": lambda i: -4.0 if i > 37 else 4.0, "objective/kl_std": 0.4}, {}),
    "KL below 0 by rounding": ({"objective/kl": -0.01, "objective/kl_std": 1e-4}, {}),
    "KL below 0, error unknown": ({"objective/kl": -4.0, "objective/kl_std": NAN}, {}),
    "bf16 sampling": ({"sampling/mismatch": 0.045, "sampling/kl": 0.02}, {}),
    "bold steps": ({"policy/approx_kl": 0.06, "policy/approx_kl_last": 0.15, "policy/clip_fraction": 0.35}, {}),
    "much clipped by a narrow range": ({"policy/clip_fraction": 0.55}, {"cliprange": 0.05}),
    "gradient grows a little": ({"grad_norm": line(0.1, 8)}, {}),
    "fp16 skips two steps": ({"grad_norm": lambda i: INF if i > 37 else 1.0}, {}),
    "one step an update": (STILL | {"policy/approx_kl": 0.0, "objective/kl": line(0, 5)}, {"num_ppo_epochs": 1}),
    "critic warms up": (
        STILL | {"objective/kl": 0.0, "loss/policy": lambda i: NAN if i < 31 else 0.1},
        {"critic_warmup_updates": 31},
    ),
    "KL high, and steady": ({"objective/kl": wobble(50, 1)}, {}),
    "KL rises below the limit": ({"objective/kl": line(0, 39)}, {}),
    "KL rises towards a high target": ({"objective/kl": line(0, 90)}, {"kl_target": 30.0}),
    "KL low, penalty small": ({"objective/kl": wobble(0.02, 0.01)}, {}),
    "penalty large, KL not low": ({"objective/kl_coef": 5.0}, {}),
    "no penalty": ({"objective/kl_coef": 0.0, "objective/kl": 0.2}, {"kl_coef": 0.0}),
    "many unfinished": ({"episode/finished": 0.2}, {}),
    "learns to stop": ({"episode/finished": line(0.0, 0.9)}, {}),
    "finishes a little less": ({"episode/finished": line(0.95, 0.6)}, {}),
    "short answers from the start": ({"episode/length": 3.0}, {}),
    "shorter answers": ({"episode/length": line(60, 10)}, {}),
    "entropy halves": ({"objective/entropy": line(2, 0.6), "episode/distinct": line(0.9, 0.5)}, {}),
    "critic slow": ({"value/explained_variance": 0.08}, {}),
    "critic NaN": ({"value/explained_variance": NAN}, {}),
    "critic poor": ({"value/explained_variance": -0.9, "loss/value": NAN}, {"critic_warmup_updates": 31}),
    "score rises by 0.4 of a deviation": ({"objective/score": lambda i: 0.5 + 0.008 * i + wobble(0, 0.1)(i)}, {}),
    "score too noisy to tell": ({"objective/score": wobble(0.5, 0.4)}, {}),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_a_check_leaves_a_near_miss_alone(case: str) -> None:
    figures, changes = NEAR_MISSES[case]
    assert diagnosed(figures, **changes) == []


# --- order, time, and how several causes meet ------------------------------------------------------------------------


def test_errors_come_first_then_the_likeliest_culprit() -> None:
    figures = {
        "value/explained_variance": -4.0,
        "sampling/kl": 0.1,
        "objective/entropy": line(2.2, 0.2),
        "policy/approx_kl": 1.4,
    }
    assert [name for name, _, _ in diagnosed(figures)] == [
        "learning-rate-too-high",
        "critic-diverges",
        "sampling-mismatch",
        "mode-collapse",
    ]


def test_a_symptom_is_left_out_beside_its_cause() -> None:
    # A constant reward leaves nothing to learn: the policy stands and the critic has nothing to explain.
    assert [name for name, _, _ in diagnosed(EQUAL | STILL | {"value/explained_variance": 0.0})] == ["reward-constant"]
    broken = {"objective/score": NAN, "loss/policy": NAN, "grad_norm": NAN}
    assert [name for name, _, _ in diagnosed(broken)] == ["reward-not-finite"]
    # A score that stands still is told only where nothing else is.
    assert [name for name, _, _ in diagnosed(UNLEARNED | {"policy/clip_fraction": 0.5})] == ["learning-rate-too-high"]


@pytest.mark.parametrize(
    ("figures", "before", "after"),
    [
        ({"sampling/kl": 0.3}, 0, 1),
        ({"objective/score": INF}, 0, 1),
        (EQUAL, 0, 1),
        (UNFINISHED, 2, 3),
        ({"policy/clip_fraction": 0.6}, 2, 3),
        (NEGATIVE, 2, 3),
        ({"episode/length": lambda i: 40 if i < 3 else 2}, 7, 8),
        (STILL, 9, 10),
        ({"value/explained_variance": 0.0}, 9, 10),
        (UNLEARNED, 29, 30),
    ],
)
def test_a_check_waits_until_it_can_know(figures: dict[str, Figure], before: int, after: int) -> None:
    assert diagnosed(figures, before) == []
    assert len(diagnosed(figures, after)) == 1


def test_a_constant_reward_is_an_error_once_three_updates_say_so() -> None:
    severities = [diagnosed(EQUAL, count)[0][2] for count in (1, 2, 3)]
    assert severities == ["warning", "warning", "error"]
    assert "(0.5 in the only update)" in diagnose(run(EQUAL, 1), SETTINGS)[0].evidence


def test_warmup_counts_by_the_number_of_the_update() -> None:
    late = run(STILL, 40)[20:]  # a file that begins with update 20
    assert diagnose(late, dataclasses.replace(SETTINGS, critic_warmup_updates=31)) == []
    assert len(diagnose(late, dataclasses.replace(SETTINGS, critic_warmup_updates=30))) == 1


# --- healthy runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("episodes", [8, 16, 64, 256])
def test_a_healthy_run_is_left_alone_at_every_length(episodes: int) -> None:
    for seed in range(40):
        updates = healthy(30, seed, episodes)
        found = {f.sentence for count in range(31) for f in diagnose(updates[:count], SETTINGS)}
        assert not found, f"seed {seed}"


def test_one_odd_update_says_nothing() -> None:
    updates = healthy(30)
    for key in updates[0].keys() - {"update", "episodes"}:
        for place in (0, 1, 15, 28, 29):
            for odd in (0.0, -1e3, 1e3, 1e9, NAN, INF, -INF):
                if key == "objective/score" and not math.isfinite(odd):
                    continue  # this one does count at once
                changed = [*updates[:place], updates[place] | {key: odd}, *updates[place + 1 :]]
                assert diagnose(changed, SETTINGS) == [], (key, place, odd)


# --- any figures at all ----------------------------------------------------------------------------------------------


def test_figures_may_be_missing() -> None:
    assert diagnose([], SETTINGS) == []
    assert diagnose([{}] * 40, SETTINGS) == []
    for seed in range(40):
        rng = random.Random(seed)
        updates = [{k: v for k, v in update.items() if rng.random() < 0.7} for update in healthy(30, seed)]
        assert diagnose(updates, SETTINGS) == [], f"seed {seed}"


@pytest.mark.parametrize("case", CASES)
def test_a_figure_left_out_makes_no_other_finding(case: str) -> None:
    """Without any one key, the run has the finding it had, or none; a score that stands still is told when alone."""
    figures, changes, (check, _, _), _ = CASES[case]
    settings, updates = dataclasses.replace(SETTINGS, **changes), run(figures)
    for key in updates[0]:
        bare = diagnose([{k: v for k, v in update.items() if k != key} for update in updates], settings)
        empty = diagnose([update | {key: NAN} for update in updates], settings)
        assert {f.check for f in bare} <= {check, *ALSO.get(case, [])}, key
        if key not in ("objective/score", "grad_norm", "loss/policy", "policy/approx_kl", "policy/ratio_max"):
            assert {f.check for f in empty} == {f.check for f in bare}, key


ALSO = {
    "all scores clipped": ["reward-constant"],
    "answers vanish": ["mode-collapse"],
    "KL negative, sampling differs": ["sampling-mismatch"],
    "policy still": ["score-stalled"],
    "KL pinned": ["score-stalled"],
}


def test_wild_figures_are_borne() -> None:
    wild = [0.0, -0.0, 1.0, -1.0, 1e-38, 3e38, -3e38, NAN, INF, -INF, 3]
    for seed in range(300):
        rng = random.Random(seed)
        updates = [{key: rng.choice(wild) for key in update} for update in healthy(rng.randint(1, 40))]
        for finding in diagnose(updates, SETTINGS):
            assert finding.sentence.endswith(".")
            assert "nan" not in finding.sentence.lower().replace("nan or infinite", "")


@pytest.mark.parametrize("case", CASES)
def test_unrelated_figures_change_nothing(case: str) -> None:
    figures, changes, _, _ = CASES[case]
    settings, updates = dataclasses.replace(SETTINGS, **changes), run(figures)
    more = [{"epoch": 1.0, "objective/other": NAN, "rewardable": 0.0, "x/reward/y_std": 0.0} | u for u in updates]
    assert diagnose(more, settings) == diagnose(updates, settings)


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_summary_is_a_sentence_a_line() -> None:
    assert summary(diagnose(healthy(30), SETTINGS)) == "Healthy: no check found anything wrong."
    found = diagnose(run(EQUAL | {"sampling/kl": 0.3}), SETTINGS)
    assert summary(found) == f"{found[0].sentence}\n{found[1].sentence}"


def test_every_check_is_tried_here() -> None:
    names = {expected[0] for _, _, expected, _ in CASES.values()}
    assert len(names) == len(diagnosis._CHECKS) + 1  # and score-stalled, which is asked last
    assert {name for name, causes in diagnosis._EXPLAINED_BY.items() for name in {name, *causes}} <= names


def test_no_model_library_is_loaded() -> None:
    script = (
        "import align.ppo.diagnosis, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
