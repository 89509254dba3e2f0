"""Every option of PPO by its definition, and every input it refuses by its sentence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from align.ppo import PPOConfig, PPOTrainer
from align.ppo.rollout import Rollout
from reward.records import InputError

# Every sixth token ends an answer: lengths differ, and some answers reach the limit.
STOPS = list(range(0, 393, 6))
SHOWN = [{"prompt": f"Count to {i}.", "completion": " one" * (i + 1)} for i in range(8)]


def rollout_of(trainer: PPOTrainer, update: int = 0) -> Rollout:
    trainer._roll_out(update)
    assert trainer.rollout is not None
    return trainer.rollout


def loss_of(trainer: PPOTrainer, step: int = 0) -> Tensor:
    """Of one micro-batch, as the training loop asks for it."""
    return trainer.compute_loss(trainer.cast.trained, {"step": step})


def gradients(trainer: PPOTrainer, loss: Tensor) -> dict[str, Tensor]:
    trainer.cast.trained.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in trainer.cast.trained.named_parameters() if p.grad is not None}


def weights_of(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.cast.trained.named_parameters() if p.requires_grad}


def moved(before: dict[str, Tensor], trainer: PPOTrainer) -> set[str]:
    """Which kinds of weights are no longer the same bits."""
    after = weights_of(trainer)
    names = {name for name in before if not torch.equal(before[name], after[name])}
    return {"value" if "value" in name else "policy" for name in names}


def logits_of(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """TV, before each answer token, by the model's own forward."""
    return model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()


def merged(trainer: PPOTrainer) -> Any:
    return copy.deepcopy(trainer.cast.trained.policy).merge_and_unload().eval()


# -- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_temperature_is_of_sampling_and_of_every_log_probability(
    temperature: float, make_trainer: Any, stir: Any, base: Any
) -> None:
    trainer = make_trainer(temperature=temperature, stop_token_ids=STOPS)
    stir(trainer.cast.trained.policy)
    r, policy = rollout_of(trainer), merged(trainer)
    with torch.no_grad():
        for row, (prompt, answer) in enumerate(r.pairs):
            at = torch.arange(len(answer)), torch.tensor(answer)
            wanted = (logits_of(policy, prompt, answer) / temperature).log_softmax(-1)[at]
            torch.testing.assert_close(r.sampled_logprobs_BT[row, : len(answer)], wanted, atol=1e-4, rtol=0)
            torch.testing.assert_close(r.old_logprobs_BT[row, : len(answer)], wanted, atol=1e-4, rtol=0)
            reference = (logits_of(base, prompt, answer) / temperature).log_softmax(-1)[at]
            torch.testing.assert_close(r.ref_logprobs_BT[row, : len(answer)], reference, atol=1e-4, rtol=0)
    loss_of(trainer)
    assert trainer._mini["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert trainer._mini["sampling/mismatch"] < 1e-4


def test_a_lower_temperature_is_less_random(make_trainer: Any) -> None:
    entropies = [float(rollout_of(make_trainer(temperature=t)).entropy_BT.mean()) for t in (0.3, 0.7, 1.0)]
    assert entropies[0] < entropies[1] < entropies[2]


def test_answers_end_with_the_first_stop_token_or_at_the_limit(make_trainer: Any, tokenizer: Any) -> None:
    trainer = make_trainer(stop_token_ids=STOPS, response_length=6, per_device_train_batch_size=24)
    r = rollout_of(trainer)
    assert len({len(answer) for answer in r.answers}) > 2 and {True, False} == set(r.finished_B.tolist())
    for answer, finished in zip(r.answers, r.finished_B.tolist(), strict=True):
        assert not set(answer[:-1]) & set(STOPS)
        assert finished == (answer[-1] in STOPS) and (finished or len(answer) == 6)
    assert make_trainer().stop_ids == [tokenizer.eos_token_id]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_answers_are_sampled_some_at_a_time(size: int, make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer has a stream of its own, so in whatever company it is drawn it is the same, and where it belongs."""
    import align.ppo.rollout as rollout

    sizes, draw = [], rollout.draw

    def counting(model: Any, prompts: Any, **options: Any) -> Any:
        sizes.append(len(prompts))
        return draw(model, prompts, **options)

    whole = rollout_of(make_trainer(stop_token_ids=STOPS))
    monkeypatch.setattr(rollout, "draw", counting)
    parts = rollout_of(make_trainer(stop_token_ids=STOPS, rollout_batch_size=size))
    assert sizes == {1: [1] * 8, 3: [3, 3, 2], 8: [8]}[size]
    assert parts.pairs == whole.pairs
    torch.testing.assert_close(parts.sampled_logprobs_BT, whole.sampled_logprobs_BT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("old_logprobs", ["recomputed", "rollout", "auto"])
def test_the_ratio_is_against_the_log_probabilities_asked_for(
    old_logprobs: str, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler that is 0.1 nats off, as another engine may be: the first ratio is exp(-0.1) or 1."""
    import align.ppo.rollout as rollout

    draw = rollout.draw

    def off(*arguments: Any, **options: Any) -> Any:
        drawn = draw(*arguments, **options)
        for answer in drawn:
            answer.logprobs = [logprob + 0.1 for logprob in answer.logprobs]
        return drawn

    monkeypatch.setattr(rollout, "draw", off)
    trainer = make_trainer(old_logprobs=old_logprobs, total_episodes=8, num_ppo_epochs=1)
    trainer.train()
    (record,), r = trainer.history, trainer.rollout
    sampled = old_logprobs != "recomputed"
    assert record["policy/ratio_mean"] == pytest.approx(math.exp(-0.1) if sampled else 1, abs=1e-4)
    assert record["sampling/kl"] == record["sampling/mismatch"] == pytest.approx(0.1, abs=1e-4)
    off = r.sampled_logprobs_BT - r.old_logprobs_BT
    torch.testing.assert_close(off, (0.0 if sampled else 0.1) * r.answer_BT, atol=1e-4, rtol=0)
    # The policy is the reference still: its KL is 0 as it is trained, and 0.1 a token as it was drawn.
    wanted = 0.1 * float(r.answer_BT.sum(1).float().mean()) if sampled else 0
    assert record["objective/kl"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("value_adapter", [False, True])
def test_what_the_sampler_says_is_what_a_forward_pass_says(value_adapter: bool, make_trainer: Any, stir: Any) -> None:
    """In float32 nothing is computed twice: log-probabilities, values and entropies come from the states sampled at."""
    rollouts = []
    for old_logprobs in ("auto", "recomputed"):
        trainer = make_trainer(
            old_logprobs=old_logprobs, temperature=0.8, stop_token_ids=STOPS, value_adapter=value_adapter
        )
        stir(trainer.cast.trained.policy)
        torch.manual_seed(3)
        torch.nn.init.normal_(trainer.cast.trained.value_head.weight)
        assert trainer.args.trusts_sampler(torch.float32) is (old_logprobs == "auto" and not value_adapter)
        rollouts.append(rollout_of(trainer))
    found, wanted = rollouts
    assert found.pairs == wanted.pairs and len({len(answer) for answer in found.answers}) > 1
    for name in ("old_logprobs_BT", "ref_logprobs_BT", "old_value_BT", "entropy_BT", "kl_BT", "advantage_BT"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-4, rtol=0, msg=name)


def test_half_precision_does_not_trust_the_sampler(make_trainer: Any) -> None:
    args = make_trainer().args
    assert args.trusts_sampler(torch.float32) and not args.trusts_sampler(torch.bfloat16)
    assert not make_trainer(bf16=True).args.trusts_sampler(torch.float32)
    assert not make_trainer(kl_estimator="full").args.trusts_sampler(torch.float32)
    assert make_trainer(old_logprobs="rollout").args.trusts_sampler(torch.bfloat16)


# -- reward ----------------------------------------------------------------------------------------------------------


def by_level(level: list[int]) -> list[float]:
    """Scores from -6 to 5.5 that do not depend on the answer."""
    return [0.5 * (n - 12) for n in level]


def shaped(trainer: PPOTrainer, r: Rollout) -> list[float]:
    """What reached each answer as score: its rewards without the KL."""
    assert r.reward_BT is not None
    return (r.reward_BT + trainer.args.kl_coef * r.kl_BT).sum(1).tolist()


def test_clip_and_penalties_change_the_score_by_exactly_their_amounts(make_trainer: Any, stir: Any) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"reward_clip": 2.5},
        {"missing_eos_penalty": 1.5},
        {"overlong_penalty": 3.0, "overlong_buffer": 4},
        {"reward_clip": 2.5, "missing_eos_penalty": 1.5, "overlong_penalty": 3.0, "overlong_buffer": 4},
    ]
    for own in options:
        trainer = make_trainer(
            reward=by_level, stop_token_ids=STOPS, kl_coef=0.3, per_device_train_batch_size=24, **own
        )
        stir(trainer.cast.trained.policy)
        r = rollout_of(trainer)
        scores = by_level([prompt.columns["level"] for prompt in trainer.update_prompts(0)])
        lengths = [len(answer) for answer in r.answers]
        assert len(set(lengths)) > 3 and 8 in lengths and {True, False} == set(r.finished_B.tolist())
        assert r.score_B.tolist() == scores  # what is logged is the reward itself
        wanted = scores
        if "reward_clip" in own:
            wanted = [min(max(score, -2.5), 2.5) for score in wanted]
            assert 0 < trainer._figures["objective/score_clipped"] < 1
            assert trainer._figures["objective/score_clipped"] == pytest.approx(
                sum(abs(score) > 2.5 for score in scores) / 24
            )
        if "missing_eos_penalty" in own:
            wanted = [w - (0 if done else 1.5) for w, done in zip(wanted, r.finished_B.tolist(), strict=True)]
        if "overlong_penalty" in own:  # nothing up to 4 tokens, then 0.75 a token
            wanted = [w - 0.75 * max(0, length - 4) for w, length in zip(wanted, lengths, strict=True)]
        assert shaped(trainer, r) == pytest.approx(wanted, abs=1e-5)
        assert trainer._figures["objective/score"] == pytest.approx(sum(scores) / 24)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_the_kl_of_the_reward_by_definition(estimator: str, make_trainer: Any, stir: Any, base: Any) -> None:
    """With plain logits; the full one is the sum over the vocabulary of p log p / q. Then its part in the reward."""
    trainer = make_trainer(kl_estimator=estimator, kl_coef=0.3, temperature=0.8, stop_token_ids=STOPS)
    stir(trainer.cast.trained.policy)
    r, policy, means = rollout_of(trainer), merged(trainer), []
    with torch.no_grad():
        for row, (prompt, answer) in enumerate(r.pairs):
            p, q = ((logits_of(m, prompt, answer) / 0.8).log_softmax(-1).double() for m in (policy, base))
            d = (p - q)[torch.arange(len(answer)), torch.tensor(answer)]
            wanted = {
                "k1": d,
                "k2": d**2 / 2,
                "k3": (-d).exp() - 1 + d,
                "full": (p.exp() * (p - q)).sum(-1),
            }[estimator]
            torch.testing.assert_close(r.kl_BT[row, : len(answer)].double(), wanted, atol=2e-4, rtol=1e-3)
            assert r.reward_BT is not None
            torch.testing.assert_close(r.reward_BT[row, : len(answer) - 1], -0.3 * r.kl_BT[row, : len(answer) - 1])
            means.append(float(wanted.sum()))
    assert trainer._figures["objective/kl"] == pytest.approx(sum(means) / 8, rel=1e-3)
    assert trainer._figures["objective/rlhf_reward"] == pytest.approx(
        trainer._figures["objective/score"] - 0.3 * sum(means) / 8, abs=1e-3
    )


def test_the_kl_coefficient_follows_its_target(make_trainer: Any) -> None:
    """By the recursion of arXiv 1909.08593 section 2.2, from the KL that each update reports."""
    trainer = make_trainer(kl_target=1.0, kl_horizon=64, total_episodes=48)
    trainer.train()
    coefficient, clipped = 0.05, set()
    for record in trainer.history:
        assert record["objective/kl_coef"] == pytest.approx(coefficient, rel=1e-12)
        error = record["objective/kl"] / 1.0 - 1
        clipped.add(abs(error) > 0.2)
        coefficient *= 1 + min(max(error, -0.2), 0.2) * 8 / 64
    assert trainer.kl_coef == pytest.approx(coefficient, rel=1e-12) and trainer.kl_coef != 0.05
    assert True in clipped
    fixed = make_trainer(total_episodes=16)
    fixed.train()
    assert [record["objective/kl_coef"] for record in fixed.history] == [0.05, 0.05]


@pytest.mark.parametrize("whiten", [True, False])
def test_advantages_are_whitened_only_where_asked_for(whiten: bool, make_trainer: Any, stir: Any) -> None:
    """Against the recursion of GAE in plain Python, with gamma 0.9 and lambda 0.8."""
    trainer = make_trainer(whiten_advantages=whiten, gamma=0.9, lam=0.8, stop_token_ids=STOPS, kl_coef=0.3)
    stir(trainer.cast.trained.policy)
    torch.nn.init.normal_(trainer.cast.trained.value_head.weight)
    r, plain = rollout_of(trainer), []
    assert r.reward_BT is not None and r.advantage_BT is not None and r.return_BT is not None
    for row, answer in enumerate(r.answers):
        rewards, values = r.reward_BT[row].tolist(), [*r.old_value_BT[row, : len(answer)].tolist(), 0.0]
        carried, advantages = 0.0, []
        for t in reversed(range(len(answer))):
            carried = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.9 * 0.8 * carried
            advantages.insert(0, carried)
        wanted = [a + v for a, v in zip(advantages, values, strict=False)]
        assert r.return_BT[row, : len(answer)].tolist() == pytest.approx(wanted, abs=1e-4)
        plain += advantages
    mean = sum(plain) / len(plain)
    std = (sum((a - mean) ** 2 for a in plain) / len(plain)) ** 0.5
    assert abs(mean) > 0.01 and abs(std - 1) > 0.01
    wanted = [(a - mean) / std for a in plain] if whiten else plain
    assert r.advantage_BT[r.answer_BT].tolist() == pytest.approx(wanted, abs=1e-4)


def test_whitened_rewards_keep_their_mean(make_trainer: Any, stir: Any) -> None:
    rewards = []
    for whiten in (False, True):
        trainer = make_trainer(whiten_rewards=whiten, stop_token_ids=STOPS, kl_coef=0.3)
        stir(trainer.cast.trained.policy)
        r = rollout_of(trainer)
        assert r.reward_BT is not None
        rewards.append(r.reward_BT[r.answer_BT])
    plain, white = rewards
    std = plain.std(unbiased=False)
    torch.testing.assert_close(white, (plain - plain.mean()) / std + plain.mean(), atol=1e-5, rtol=0)
    assert abs(float(std) - 1) > 0.1


# -- loss ------------------------------------------------------------------------------------------------------------


def surrogate(
    trainer: PPOTrainer, r: Rollout, low: float = 0.2, high: float = 0.2, dual: float = math.inf
) -> tuple[float, list[float]]:
    """(mean over tokens, ratios) of PPO's clipped loss, token by token in plain Python, of the policy as it is now."""
    assert r.advantage_BT is not None
    policy, losses, ratios = merged(trainer), [], []
    with torch.no_grad():
        for row, (prompt, answer) in enumerate(r.pairs):
            now = logits_of(policy, prompt, answer).log_softmax(-1)
            for t, token in enumerate(answer):
                ratio = math.exp(float(now[t, token] - r.old_logprobs_BT[row, t]))
                a = float(r.advantage_BT[row, t])
                loss = max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))
                losses.append(min(loss, -a * dual) if a < 0 else loss)
                ratios.append(ratio)
    return sum(losses) / len(losses), ratios


@pytest.mark.parametrize(
    ("own", "bounds"),
    [
        ({}, {}),
        ({"cliprange": 0.1}, {"low": 0.1, "high": 0.1}),
        ({"cliprange_high": 0.5}, {"high": 0.5}),
        ({"dual_clip": 1.5}, {"dual": 1.5}),
        ({"cliprange": 0.3, "cliprange_high": 0.4, "dual_clip": 2.0}, {"low": 0.3, "high": 0.4, "dual": 2.0}),
    ],
)
def test_the_bounds_of_the_ratio_reach_the_loss(
    own: dict[str, Any], bounds: dict[str, float], make_trainer: Any, stir: Any
) -> None:
    trainer = make_trainer(vf_coef=0.0, total_episodes=8, **own)
    r = rollout_of(trainer)
    stir(trainer.cast.trained.policy, std=0.2)  # as updates would: the policy is no longer the one that sampled
    loss = float(loss_of(trainer).detach())
    wanted, ratios = surrogate(trainer, r, **bounds)
    assert loss == trainer._mini["loss/policy"] == pytest.approx(wanted, abs=2e-4)
    assert trainer._mini["policy/ratio_max"] == pytest.approx(max(ratios), rel=1e-3)
    assert trainer._mini["policy/ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)
    kl = sum(ratio - 1 - math.log(ratio) for ratio in ratios) / len(ratios)
    assert trainer._mini["policy/approx_kl"] == pytest.approx(kl, rel=2e-2)
    if bounds:
        assert abs(wanted - surrogate(trainer, r)[0]) > 1e-3  # the option makes a difference
    assert ("policy/dual_clip_fraction" in trainer._mini) == ("dual" in bounds)


def test_the_value_loss_and_its_weight(make_trainer: Any, stir: Any) -> None:
    """Half the larger of two squared errors, the value as it is and within 0.05 of the rollout's; times vf_coef."""
    trainers = [make_trainer(vf_coef=c, cliprange_value=0.05, total_episodes=8) for c in (0.0, 0.7)]
    losses = []
    for trainer in trainers:
        r = rollout_of(trainer)
        torch.manual_seed(1)
        torch.nn.init.normal_(trainer.cast.trained.value_head.weight, std=0.1)
        losses.append(float(loss_of(trainer).detach()))
    policy, terms = trainers[1].cast.trained.policy, []
    assert r.return_BT is not None
    with torch.no_grad():
        for row, (prompt, answer) in enumerate(r.pairs):
            output = policy(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
            states = output.hidden_states[-1][0, len(prompt) - 1 : -1]
            for t, value in enumerate(trainers[1].cast.trained.value_head(states)[:, 0].tolist()):
                old, goal = float(r.old_value_BT[row, t]), float(r.return_BT[row, t])
                near = min(max(value, old - 0.05), old + 0.05)
                terms.append(0.5 * max((value - goal) ** 2, (near - goal) ** 2))
    wanted = sum(terms) / len(terms)
    assert trainers[1]._mini["loss/value"] == pytest.approx(wanted, rel=1e-5)
    assert losses[1] - losses[0] == pytest.approx(0.7 * wanted, rel=1e-3)
    assert 0 < trainers[1]._mini["value/clip_fraction"] < 1


def test_the_entropy_bonus_adds_the_gradient_of_the_mean_entropy(make_trainer: Any, stir: Any) -> None:
    """Recomputed with the vocabulary's logits at temperature 0.9 and autograd, row by row."""
    found = []
    for coefficient in (0.0, 0.5):
        trainer = make_trainer(entropy_coef=coefficient, temperature=0.9, stop_token_ids=STOPS, total_episodes=8)
        stir(trainer.cast.trained.policy)
        r = rollout_of(trainer)
        found.append(gradients(trainer, loss_of(trainer)))
    entropies = []
    for prompt, answer in r.pairs:
        p = (logits_of(trainer.cast.trained.policy, prompt, answer) / 0.9).log_softmax(-1)
        entropies.append(-(p.exp() * p).sum(-1))
    mean = torch.cat(entropies).mean()
    assert trainer._mini["loss/entropy"] == pytest.approx(-float(mean), rel=1e-4)
    of_entropy, largest = gradients(trainer, mean), 0.0
    for name, gradient in of_entropy.items():
        torch.testing.assert_close(found[1][name] - found[0][name], -0.5 * gradient, atol=1e-5, rtol=1e-3, msg=name)
        largest = max(largest, float(gradient.abs().max()))
    assert largest > 1e-3


def test_demonstrations_add_their_mean_negative_log_likelihood(make_trainer: Any, stir: Any, tokenizer: Any) -> None:
    """In nats a token of all eight of the mini-batch's, with the stop token behind each; at temperature 1."""
    losses = []
    for own in ({}, {"ptx_coef": 0.25, "ptx_dataset": SHOWN}):
        trainer = make_trainer(total_episodes=8, temperature=0.7, **own)
        stir(trainer.cast.trained.policy)
        losses.append(float(loss_of(trainer).detach()))
    policy, nats, tokens = merged(trainer), 0.0, 0
    for row in SHOWN:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            p = logits_of(policy, prompt, answer).log_softmax(-1)
        nats -= sum(float(p[t, token]) for t, token in enumerate(answer))
        tokens += len(answer)
    assert losses[1] - losses[0] == pytest.approx(0.25 * nats / tokens, rel=1e-4)
    assert trainer._mini["loss/ptx"] == pytest.approx(nats / tokens, rel=1e-4)


def test_demonstrations_are_normalised_over_the_mini_batch(make_trainer: Any, stir: Any) -> None:
    """8 rows at once and 8 x 1, of unequal lengths: the sum of the parts is the whole, in loss and gradient."""
    results = []
    for rows, parts in ((8, 1), (1, 8)):
        trainer = make_trainer(
            total_episodes=8,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=parts,
            ptx_coef=0.25,
            ptx_dataset=SHOWN,
        )
        stir(trainer.cast.trained.policy)
        loss = sum((loss_of(trainer, step) for step in range(parts)), torch.zeros(()))
        results.append((float(loss.detach()), trainer._mini["loss/ptx"], gradients(trainer, loss)))
    (loss, nats, whole), (summed, summed_nats, parted) = results
    assert loss == pytest.approx(summed, abs=1e-5) and nats == pytest.approx(summed_nats, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parted[name], atol=1e-5, rtol=1e-3, msg=name)


def test_conversations_are_shown_as_the_policy_would_answer_them(make_trainer: Any, tokenizer: Any) -> None:
    from align.data.render import demonstration_row
    from reward.records import assistant_answer, user_prompt

    rows = [{"prompt": user_prompt(r["prompt"]), "completion": assistant_answer(r["completion"])} for r in SHOWN]
    trainer = make_trainer(ptx_coef=0.1, ptx_dataset=rows)
    for (prompt, answer), row in zip(trainer.ptx, rows, strict=True):
        assert prompt + answer == demonstration_row(tokenizer, row)["input_ids"]
        assert answer[-1] == tokenizer.eos_token_id


# -- the course of a run ---------------------------------------------------------------------------------------------


def test_an_update_ends_early_and_the_run_goes_on_with_the_next_prompts(make_trainer: Any) -> None:
    """All updates happen, each on its own prompts; one ends with the first mini-batch that is too far away."""
    levels: list[int] = []

    def seen(level: list[int], completion_ids: list[list[int]]) -> list[float]:
        levels.extend(level)
        return [float(len(set(ids))) for ids in completion_ids]

    settings = {"num_ppo_epochs": 5, "num_mini_batches": 2, "per_device_train_batch_size": 4}
    trainer = make_trainer(reward=seen, total_episodes=32, early_stop_kl=0.01, learning_rate=2e-2, **settings)
    trainer.train()
    passes = [record["policy/passes"] for record in trainer.history]
    assert len(passes) == 4 and all(0.5 < p < 5 for p in passes)
    assert all(record["policy/approx_kl_last"] > 0.01 for record in trainer.history)
    assert trainer.state.global_step == 2 * sum(passes)
    assert levels == [p.columns["level"] for update in range(4) for p in trainer.update_prompts(update)]
    assert [record["update"] for record in trainer.history] == [0, 1, 2, 3]
    free = make_trainer(reward=seen, total_episodes=8, learning_rate=2e-2, **settings)
    free.train()
    assert free.history[0]["policy/passes"] == 5 and free.history[0]["policy/approx_kl_last"] > 0.01


@pytest.mark.parametrize("kind", ["shared", "value adapter", "every weight"])
def test_the_critic_warms_up_while_the_policy_stands_still(kind: str, make_trainer: Any, stir: Any) -> None:
    """To the bit, with weight decay and momentum, which would move a weight whose gradient is zero."""
    own = {"peft_config": None} if kind == "every weight" else {"value_adapter": kind == "value adapter"}
    trainer = make_trainer(
        total_episodes=24, critic_warmup_updates=2, weight_decay=0.1, learning_rate=1e-3, ptx_coef=0.1,
        entropy_coef=0.1, ptx_dataset=SHOWN, **own,
    )  # fmt: skip
    stir(trainer.cast.trained.policy)
    before, seen = weights_of(trainer), []
    trainer.add_callback(_Watch(lambda: seen.append(moved(before, trainer))))
    trainer.train()
    assert seen == [{"value"}] * 4 + [{"policy", "value"}] * 2
    assert [record["policy/approx_kl"] for record in trainer.history[:2]] == pytest.approx([0, 0], abs=1e-9)
    assert trainer.history[1]["loss/value"] != trainer.history[0]["loss/value"]


def test_the_warm_up_is_the_value_loss_alone(make_trainer: Any, stir: Any) -> None:
    """The policy's gradient, which a launcher may want, is there and zero: nothing of it reaches the clipped norm."""
    trainer = make_trainer(total_episodes=8, critic_warmup_updates=1, entropy_coef=0.1, vf_coef=0.5)
    stir(trainer.cast.trained.policy)
    rollout_of(trainer)
    torch.nn.init.normal_(trainer.cast.trained.value_head.weight, std=0.1)
    loss = loss_of(trainer)
    assert float(loss.detach()) == pytest.approx(0.5 * trainer._mini["loss/value"], rel=1e-6)
    found = gradients(trainer, loss)
    assert found.keys() == weights_of(trainer).keys()
    assert {name for name, gradient in found.items() if gradient.any()} == {"value_head.weight", "value_head.bias"}


class _Watch(TrainerCallback):
    def __init__(self, look: Callable[[], object]) -> None:
        self.look = look

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.look()


def test_a_critic_of_its_own_moves_its_own_weights(make_trainer: Any) -> None:
    trainer = make_trainer(value_adapter=True, total_episodes=16)
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    for adapter in ("default", "value"):
        names = [name for name in before if f".{adapter}." in name]
        assert len(names) == 28 and all(not torch.equal(before[n], after[n]) for n in names if "lora_B" in n)


@pytest.mark.parametrize("every_weight", [False, True])
def test_recomputing_activations_gives_the_same_update(every_weight: bool, make_trainer: Any, lora: Any) -> None:
    results = []
    for recompute in (False, True):
        trainer = make_trainer(
            total_episodes=8, reward=by_level, optim="sgd", gradient_checkpointing=recompute, stop_token_ids=STOPS,
            peft_config=None if every_weight else lora(),
        )  # fmt: skip
        before = weights_of(trainer)
        trainer.train()
        assert trainer.cast.trained.policy.is_gradient_checkpointing == recompute
        results.append((weights_of(trainer), trainer.rollout.answers))
    (plain, answers), (recomputed, same) = results
    assert answers == same and any(not torch.equal(before[n], plain[n]) for n in plain if "value" not in n)
    for name, weight in plain.items():
        torch.testing.assert_close(weight, recomputed[name], atol=1e-5, rtol=0, msg=name)


def test_recomputing_activations_and_a_critic_of_its_own_exclude_each_other(make_trainer: Any) -> None:
    trainer = make_trainer(value_adapter=True, gradient_checkpointing=True)
    with pytest.raises(InputError, match="gradient_checkpointing computes layers again when another adapter"):
        trainer.train()
    assert trainer.rollout is None


# -- bad input -------------------------------------------------------------------------------------------------------

BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"total_episodes": 0}, "`total_episodes` is 0, but at least 1 is wanted."),
    ({"num_ppo_epochs": 0}, "`num_ppo_epochs` is 0, but at least 1 is wanted."),
    ({"num_mini_batches": 0}, "`num_mini_batches` is 0, but at least 1 is wanted."),
    ({"rollout_batch_size": 0}, "`rollout_batch_size` is 0, but at least 1 is wanted."),
    ({"response_length": 0}, "`response_length` is 0, but at least 1 is wanted."),
    ({"temperature": 0.0}, "`temperature` is 0.0, but above 0 is wanted."),
    ({"temperature": math.inf}, "`temperature` is inf, but above 0 is wanted."),
    ({"temperature": math.nan}, "`temperature` is nan, but above 0 is wanted."),
    ({"stop_token_ids": []}, "`stop_token_ids` is [], but at least one token, or None for the model's own is wanted."),
    (
        {"old_logprobs": "rollout", "kl_estimator": "full"},
        "`old_logprobs` is rollout, but auto or recomputed with value_adapter or the full KL, which need that forward "
        "pass anyway is wanted.",
    ),
    ({"old_logprobs": "sampled"}, "`old_logprobs` is sampled, but auto, recomputed or rollout is wanted."),
    ({"kl_estimator": "k4"}, "`kl_estimator` is k4, but k1, k2, k3 or full is wanted."),
    ({"kl_coef": -0.1}, "`kl_coef` is -0.1, but at least 0 is wanted."),
    ({"kl_coef": math.nan}, "`kl_coef` is nan, but at least 0 is wanted."),
    ({"kl_coef": 0.0, "kl_target": 2.0}, "`kl_coef` is 0.0, but above 0 for kl_target to adapt it is wanted."),
    ({"kl_target": 0.0}, "`kl_target` is 0.0, but above 0 is wanted."),
    (
        {"kl_target": 2.0, "kl_horizon": 31, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
        "`kl_horizon` is 31, but at least the 32 episodes of an update is wanted.",
    ),
    ({"reward_clip": 0.0}, "`reward_clip` is 0.0, but above 0 is wanted."),
    ({"missing_eos_penalty": -1.0}, "`missing_eos_penalty` is -1.0, but at least 0 is wanted."),
    ({"overlong_penalty": -1.0}, "`overlong_penalty` is -1.0, but at least 0 is wanted."),
    (
        {"overlong_penalty": 1.0, "overlong_buffer": 65},
        "`overlong_buffer` is 65, but between 1 and response_length (64) is wanted.",
    ),
    ({"gamma": 0.0}, "`gamma` is 0.0, but above 0 and at most 1 is wanted."),
    ({"gamma": 1.1}, "`gamma` is 1.1, but above 0 and at most 1 is wanted."),
    ({"lam": -0.1}, "`lam` is -0.1, but between 0 and 1 is wanted."),
    ({"lam": 1.1}, "`lam` is 1.1, but between 0 and 1 is wanted."),
    ({"cliprange": 0.0}, "`cliprange` is 0.0, but above 0 is wanted."),
    ({"cliprange_high": 0.0}, "`cliprange_high` is 0.0, but above 0 is wanted."),
    ({"cliprange_value": 0.0}, "`cliprange_value` is 0.0, but above 0 is wanted."),
    ({"dual_clip": 1.0}, "`dual_clip` is 1.0, but above 1 is wanted."),
    ({"vf_coef": -1.0}, "`vf_coef` is -1.0, but at least 0 is wanted."),
    ({"entropy_coef": -1.0}, "`entropy_coef` is -1.0, but at least 0 is wanted."),
    ({"ptx_coef": -1.0}, "`ptx_coef` is -1.0, but at least 0 is wanted."),
    ({"early_stop_kl": 0.0}, "`early_stop_kl` is 0.0, but above 0 is wanted."),
    ({"critic_warmup_updates": -1}, "`critic_warmup_updates` is -1, but at least 0 is wanted."),
]


@pytest.mark.parametrize(("own", "sentence"), BAD_SETTINGS)
def test_a_setting_out_of_range_is_refused(own: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, **own)
    assert str(refused.value) == sentence


def test_every_field_of_its_own_says_what_it_is() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    theirs = {field.name for field in fields(TrainingArguments)}
    own = [field for field in fields(PPOConfig) if field.name not in theirs]
    assert len(own) > 30 and all(field.metadata.get("help", "").endswith(".") for field in own)


TALKS = [{"prompt": [{"role": "user", "content": "Why?"}]}] * 24
TEXTS = [{"prompt": f"Why {i}?"} for i in range(24)]

BAD_DATA: list[tuple[dict[str, Any], str]] = [
    ({"train_dataset": []}, r"train_dataset is empty: ppo needs prompts\."),
    (
        {"train_dataset": TEXTS[:7]},
        r"ppo has 7 prompts, but one update takes 8 episodes \(per_device_train_batch_",
    ),
    (
        {"train_dataset": [{"question": "Why?", "level": 1}] * 24},
        r"train_dataset has the columns question, level; ppo wants `prompt`, text or a conversation\.",
    ),
    ({"train_dataset": ["Why?"] * 24}, r"the rows of train_dataset are of the type str: give dicts with `prompt`\."),
    (
        {"train_dataset": [*TEXTS, {"prompt": ""}]},
        r"prompt 24 of train_dataset \(''\) has no tokens: leave it out\.",
    ),
    (
        {"train_dataset": [*TEXTS, {"prompt": None}]},
        r"prompt 24 of train_dataset is None, a NoneType: give text or a conversation\.",
    ),
    (
        {"train_dataset": [*TEXTS, {"prompt": "word " * 600}]},
        r"prompt 24 of train_dataset has \d+ tokens, and with response_length 8 it passes the model's context of "
        r"512: leave out such prompts or lower response_length\.",
    ),
    ({"response_length": 510}, r"prompt 0 of train_dataset has \d+ tokens, and with response_length 510 it passes"),
    ({"eval_dataset": []}, r"eval_dataset is empty"),
    ({"eval_dataset": [{"prompt": "word " * 600}]}, r"prompt 0 of eval_dataset has \d+ tokens"),
    ({"eval_dataset": [{"text": "Why?"}]}, r"eval_dataset has the columns text"),
    (
        {"ptx_coef": 0.1},
        r"ptx_coef is 0\.1 and there are 0 demonstrations: PPO-ptx needs both, a positive ptx_coef and a ptx_dataset\.",
    ),
    ({"ptx_dataset": SHOWN}, r"ptx_coef is 0\.0 and there are 8 demonstrations"),
    (
        {"ptx_coef": 0.1, "ptx_dataset": TEXTS},
        r"ptx_dataset has the columns prompt; ppo wants `prompt` and `completion`, text or a conversation\.",
    ),
    (
        {"ptx_coef": 0.1, "ptx_dataset": [*SHOWN, {"prompt": "", "completion": "x"}]},
        r"the prompt of demonstration 8 of ptx_dataset has no tokens: leave it out\.",
    ),
    (
        {"ptx_coef": 0.1, "ptx_dataset": [{"prompt": "x", "completion": None}]},
        r"demonstration 0 of ptx_dataset has a str as `prompt` and a NoneType as `completion`: give two texts or two",
    ),
    (
        {"ptx_coef": 0.1, "ptx_dataset": [*SHOWN, {"prompt": "word " * 600, "completion": "x"}]},
        r"row 8 of ptx_dataset has \d+ tokens, and the model's context is 512\.",
    ),
    (
        {"max_steps": 7},
        r"max_steps is 7, but total_episodes decides how long ppo trains: 48 episodes are 12 optimiser steps\. Leave",
    ),
]


@pytest.mark.parametrize(("own", "message"), BAD_DATA)
def test_data_that_does_not_fit_is_refused_at_once(own: dict[str, Any], message: str, make_trainer: Any) -> None:
    with pytest.raises(InputError, match=message):
        make_trainer(**own)


def test_conversations_need_a_chat_template(make_trainer: Any, loud_model: Path) -> None:
    plain = AutoTokenizer.from_pretrained(loud_model)
    plain.chat_template = None
    with pytest.raises(InputError, match="train_dataset has conversations, but the tokenizer has no chat template"):
        make_trainer(processing_class=plain, train_dataset=TALKS)
    shown = [{"prompt": TALKS[0]["prompt"], "completion": [{"role": "assistant", "content": "So."}]}]
    with pytest.raises(InputError, match="ptx_dataset has conversations, but the tokenizer has no chat template"):
        make_trainer(processing_class=plain, ptx_coef=0.1, ptx_dataset=shown)


def test_without_a_stop_token_one_has_to_be_named(make_trainer: Any, loud_model: Path, base: Any) -> None:
    endless = AutoTokenizer.from_pretrained(loud_model)
    endless.eos_token = endless.pad_token = None
    model = copy.deepcopy(base)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    parts = {"model": model, "processing_class": endless}
    with pytest.raises(InputError, match="neither the tokenizer nor the model has a stop token: set stop_token_ids"):
        make_trainer(**parts)
    with pytest.raises(InputError, match="the tokenizer has no stop token to put behind the answers of ptx_dataset"):
        make_trainer(**parts, stop_token_ids=STOPS, ptx_coef=0.1, ptx_dataset=SHOWN)
    trainer = make_trainer(**parts, stop_token_ids=STOPS, total_episodes=8)  # nor a token to pad with
    trainer.train()
    assert any(trainer.rollout.finished_B.tolist())


def needs_gold(completions: list[str], gold: list[str]) -> list[float]:
    return [1.0] * len(completions)


def test_a_reward_that_does_not_fit_is_refused_before_anything_is_sampled(
    make_trainer: Any, vowels: Any, base: Any, loud_model: Path, reward_adapter: Any, questions: list[dict[str, Any]]
) -> None:
    with pytest.raises(InputError, match=r"the reward `needs_gold` needs `gold`, but there is only .*`level`"):
        make_trainer(reward=needs_gold)
    graded = [row | {"gold": "x"} for row in questions]
    with pytest.raises(InputError, match="the reward `needs_gold` needs `gold`"):  # the evaluation would come too late
        make_trainer(reward=needs_gold, train_dataset=graded, eval_dataset=questions)
    with pytest.raises(InputError, match=r"there are 1 reward weights for 2 rewards: give one for each\."):
        make_trainer(reward=[vowels, needs_gold], reward_weights=[1.0], train_dataset=graded)
    with pytest.raises(InputError, match=r"there is no reward: give at least one\."):
        make_trainer(reward=[])
    several = AutoModelForSequenceClassification.from_pretrained(loud_model, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(loud_model)
    with pytest.raises(InputError, match="has 3 labels: a reward model has one"):
        make_trainer(reward=several, reward_processing_classes=tokenizer)
    with pytest.raises(InputError, match="comes without a tokenizer: give the one it was trained with"):
        make_trainer(reward=AutoModelForSequenceClassification.from_pretrained(loud_model, num_labels=1))
    with pytest.raises(InputError, match="has 3 labels: a reward model has one"):
        make_trainer(reward=str(reward_adapter(labels=3)))
    with pytest.raises(InputError, match=r"the reward model /nowhere does not exist: give a folder or a hub id\."):
        make_trainer(reward="/nowhere")
    with pytest.raises(InputError, match="42, a int, is no reward"):
        make_trainer(reward=42)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: 1 / 0, r"the reward `faulty` raised ZeroDivisionError on 8 answers: division by zero"),
        (lambda n: [1.0] * (n - 1), r"the reward `faulty` returned 7 scores for 8 answers: give one for each\."),
        (lambda n: [1.0, math.nan] * (n // 2), r"the reward `faulty` returned 4 of 8 scores that are NaN or infinite"),
        (lambda n: ["good"] * n, r"the reward `faulty` returned 'good', a str, at scores\[0\]: a number is wanted"),
        (lambda n: [None] * n, r"no reward applies to 8 of 8 answers"),
    ],
)
def test_what_a_reward_gets_wrong_is_a_sentence_at_the_first_rollout(
    returned: Callable[[int], Any], message: str, make_trainer: Any
) -> None:
    def faulty(completions: list[str]) -> Any:
        return returned(len(completions))

    trainer = make_trainer(reward=faulty)
    before = weights_of(trainer)
    with pytest.raises(InputError, match=message):
        trainer.train()
    assert moved(before, trainer) == set() and trainer.history == []


def test_a_checkpoint_of_something_else_is_refused(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(output_dir=str(tmp_path), total_episodes=8, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / "ppo_state_0.pt").unlink()
    with pytest.raises(InputError, match=r"ppo_state_0\.pt is missing: resume with as many processes as the"):
        make_trainer(total_episodes=8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
