"""PPO's trainer on a tiny model: against plain PyTorch, against itself after a kill, and as a Trainer among others."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, HfArgumentParser, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from align.ppo import PPOConfig, PPOTrainer, maths
from align.ppo.rollout import Rollout, sample_episodes, shape_and_estimate
from reward.records import InputError
from reward.scoring import score_rows


def weights_of(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.cast.trained.named_parameters() if p.requires_grad}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], atol=atol, rtol=0, msg=name)


def records_of(trainer: PPOTrainer) -> list[str]:
    """Exactly, and NaN is NaN."""
    return [repr(record) for record in trainer.history]


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_reward_rises_at_bounded_kl(seed: int, make_trainer: Any) -> None:
    """From about 0.4 of 4 to 2-3 in ten updates, at 5-10 nats an answer of 8 tokens; the critic learns too."""
    questions = [{"prompt": f"Tell me about rain, {'very ' * (i % 4)}number {i}."} for i in range(64)]
    trainer = make_trainer(
        train_dataset=questions,
        total_episodes=10 * 64,
        per_device_train_batch_size=64,
        learning_rate=2e-2,
        kl_coef=0.02,
        seed=seed,
    )
    trainer.train()
    scores = [record["objective/score"] for record in trainer.history]
    assert len(scores) == 10
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.8, scores
    assert 0.5 < trainer.history[-1]["objective/kl"] < 16
    assert sum(record["value/explained_variance"] for record in trainer.history[-5:]) > 0


# -- one update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_step_of_an_update_has_ratio_one(bf16: bool, make_trainer: Any) -> None:
    """In mixed precision too: the rollout looks at its answers through the same numbers as the training step."""
    trainer = make_trainer(total_episodes=8, num_ppo_epochs=1, bf16=bf16)
    trainer.train()
    (record,) = trainer.history
    assert record["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert record["policy/ratio_max"] == pytest.approx(1, abs=1e-5) == record["policy/ratio_mean"]
    assert record["policy/clip_fraction"] == 0
    # With whitened advantages and ratio 1 the policy loss is minus their mean: zero.
    assert record["loss/policy"] == pytest.approx(0, abs=1e-5)
    assert record["objective/kl"] == pytest.approx(0, abs=1e-4)  # lora_B is zero: the policy is the reference
    assert record["sampling/mismatch"] < (0.01 if bf16 else 1e-5)


def test_one_update_equals_a_plain_pytorch_one(make_trainer: Any, vowel_ids: set[int]) -> None:
    """Two passes over one rollout, recomputed with full-vocabulary logits, Python loops and torch.optim.AdamW."""
    trainer = make_trainer(total_episodes=8, num_ppo_epochs=2, max_grad_norm=0.0, vf_coef=0.5, kl_coef=0.1)
    twin = copy.deepcopy(trainer.cast)
    trainer.train()
    r = trainer.rollout

    optimizer = torch.optim.AdamW([p for p in twin.trained.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    gamma, lam, clip, clip_value = 1.0, 0.95, 0.2, 0.2
    # Rewards and advantages, token by token in plain Python.
    episodes = []
    for row, (prompt, answer) in enumerate(r.pairs):
        old = r.old_logprobs_BT[row, : len(answer)].tolist()
        ref = r.ref_logprobs_BT[row, : len(answer)].tolist()
        values = r.old_value_BT[row, : len(answer)].tolist()
        rewards = [-0.1 * (a - b) for a, b in zip(old, ref, strict=True)]
        rewards[-1] += 4 * sum(token in vowel_ids for token in answer) / len(answer)
        advantages, carried = [0.0] * len(answer), 0.0
        for t in reversed(range(len(answer))):
            following = values[t + 1] if t + 1 < len(answer) else 0.0
            carried = rewards[t] + gamma * following - values[t] + gamma * lam * carried
            advantages[t] = carried
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        episodes.append((prompt, answer, old, values, advantages, returns))
    flat = [a for episode in episodes for a in episode[4]]
    mean = sum(flat) / len(flat)
    std = (sum((a - mean) ** 2 for a in flat) / len(flat)) ** 0.5
    for _ in range(2):
        loss, tokens = torch.zeros(()), 0
        for prompt, answer, old, values, advantages, returns in episodes:
            ids = torch.tensor([prompt + answer])
            output = twin.trained.policy(input_ids=ids, output_hidden_states=True)
            logprobs = output.logits[0].log_softmax(-1)
            heads = twin.trained.value_head(output.hidden_states[-1][0])[:, 0]
            for t, token in enumerate(answer):
                at = len(prompt) + t - 1
                ratio = torch.exp(logprobs[at, token] - old[t])
                advantage = (advantages[t] - mean) / (std + 1e-8)
                loss = loss - torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
                clipped = values[t] + (heads[at] - values[t]).clamp(-clip_value, clip_value)
                loss = loss + 0.5 * 0.5 * torch.max((heads[at] - returns[t]) ** 2, (clipped - returns[t]) ** 2)
                tokens += 1
        optimizer.zero_grad()
        (loss / tokens).backward()
        optimizer.step()
    plain = {n: p.detach() for n, p in twin.trained.named_parameters() if p.requires_grad}
    assert_equal(weights_of(trainer), plain, atol=2e-4)
    assert sum(float(w.abs().sum()) for n, w in plain.items() if "lora_B" in n) > 1  # there was something to compare


@pytest.mark.parametrize("extras", [{}, {"num_mini_batches": 2, "entropy_coef": 0.1, "ptx_coef": 0.5}])
def test_accumulation_equals_one_batch(extras: dict[str, Any], make_trainer: Any) -> None:
    """8 rows at once and 8 x 1 row see the same rollout and take the same steps; so do the demonstrations beside."""
    shown = [{"prompt": f"Count to {i}.", "completion": " one" * (i + 1)} for i in range(20)] if extras else None
    results = []
    for rows, accumulate in ((8, 1), (1, 8)):
        trainer = make_trainer(
            total_episodes=16,
            num_ppo_epochs=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            ptx_dataset=shown,
            **extras,
        )
        before = weights_of(trainer)
        trainer.train()
        results.append((weights_of(trainer), trainer.rollout, trainer.history))
    (whole, first, _), (parts, second, _) = results
    assert first.answers == second.answers
    assert_equal(whole, parts, atol=1e-5)
    assert any((whole[name] - before[name]).abs().max() > 1e-4 for name in whole if "lora_B" in name)
    for one, other in zip(results[0][2], results[1][2], strict=True):
        for name in ("loss/policy", "loss/value", "policy/approx_kl", "policy/ratio_mean", "grad_norm"):
            assert one[name] == pytest.approx(other[name], abs=1e-4), name


def test_a_rollout_is_whole(make_trainer: Any, stir: Any) -> None:
    """Shapes, padding, the reward's sum, and whitened advantages, by their definitions."""
    trainer = make_trainer(stop_token_ids=list(range(0, 393, 7)))
    stir(trainer.cast.trained.policy)
    torch.nn.init.normal_(trainer.cast.trained.value_head.weight)
    r: Rollout = sample_episodes(
        trainer.cast, trainer.processing_class, trainer.update_prompts(0), trainer.args, trainer.stop_ids
    )
    shape_and_estimate(r, trainer.args, 0.3, lambda tensor: tensor)
    assert r.prompts == [prompt.ids for prompt in trainer.update_prompts(0)]
    assert [len(answer) for answer in r.answers] == r.answer_BT.sum(1).tolist()
    assert len({len(answer) for answer in r.answers}) > 2
    assert r.kl_BT.sum(1).abs().min() > 0
    torch.testing.assert_close(r.reward_BT.sum(1), r.score_B - 0.3 * r.kl_BT.sum(1))
    torch.testing.assert_close(r.kl_BT, r.old_logprobs_BT - r.ref_logprobs_BT)
    for name in ("sampled", "old", "ref"):
        assert (getattr(r, f"{name}_logprobs_BT")[~r.answer_BT] == 0).all(), name
    for name in ("old_value_BT", "entropy_BT", "kl_BT", "reward_BT", "advantage_BT", "return_BT"):
        assert (getattr(r, name)[~r.answer_BT] == 0).all(), name
    mean, var = maths.mean_and_var(maths.masked_moments(r.advantage_BT, r.answer_BT))
    assert float(mean) == pytest.approx(0, abs=1e-6) and float(var) == pytest.approx(1, abs=1e-4)


# -- prompts and steps -----------------------------------------------------------------------------------------------


def test_every_prompt_comes_once_a_lap_and_laps_differ(make_trainer: Any) -> None:
    trainer = make_trainer()
    levels = [prompt.columns["level"] for update in range(6) for prompt in trainer.update_prompts(update)]
    laps = [levels[:24], levels[24:]]
    assert sorted(laps[0]) == sorted(laps[1]) == list(range(24))
    assert laps[0] != laps[1]
    assert laps[0] != [p.columns["level"] for u in range(3) for p in make_trainer(seed=6).update_prompts(u)]


def test_every_pass_takes_every_episode_once(make_trainer: Any) -> None:
    """By counting: 2 updates of 2 passes of 2 mini-batches of 2 x 3 rows."""
    trainer = make_trainer(
        per_device_train_batch_size=3, gradient_accumulation_steps=2, num_mini_batches=2, total_episodes=24
    )
    assert trainer.args.steps_per_update == 8 and trainer.args.num_updates == 2
    assert len(trainer.train_dataset) == 16 and trainer.args.max_steps == 8
    passes = [[trainer.micro_batch(step) for step in range(first, first + 4)] for first in range(0, 16, 4)]
    for steps in passes:
        assert all(len(rows) == 3 for rows in steps)
        assert sorted(number for rows in steps for number in rows) == list(range(12))
    assert len({str(steps) for steps in passes}) == 4


def test_all_updates_happen_and_the_last_one_is_whole(make_trainer: Any) -> None:
    trainer = make_trainer(total_episodes=17)
    trainer.train()
    assert [(record["update"], record["episodes"]) for record in trainer.history] == [(0, 8), (1, 16), (2, 24)]
    assert trainer.state.global_step == 6 and all(record["policy/passes"] == 2 for record in trainer.history)


# -- resume ----------------------------------------------------------------------------------------------------------

# Two mini-batches of two accumulated passes, updates that end early, demonstrations, a critic and a KL that adapts.
BUSY: dict[str, Any] = {
    "total_episodes": 24,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "early_stop_kl": 0.004,
    "learning_rate": 3e-2,
    "ptx_coef": 0.1,
    "value_adapter": True,
    "critic_warmup_updates": 1,
    "kl_target": 0.5,
    "lr_scheduler_type": "cosine",
    "ptx_dataset": [{"prompt": f"Count to {i}.", "completion": " one" * (i + 1)} for i in range(9)],
    "save_strategy": "steps",
    "save_steps": 1,
}


class Stop(TrainerCallback):
    """Like a kill: after an optimiser step, or in the middle of one, where passes are accumulated."""

    def __init__(self, step: int, within: bool = False) -> None:
        self.step, self.within = step, within

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and not self.within:
            raise KeyboardInterrupt

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and self.within:
            raise KeyboardInterrupt


def test_resume_is_exact_wherever_it_was_killed(make_trainer: Any, tmp_path: Path) -> None:
    """The same bits of every weight, the same record of every update, the same coefficient."""
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **BUSY)
    whole.train()
    passes = [record["policy/passes"] for record in whole.history]
    # The warm-up moves no policy, so nothing ends it; the others end early, one of them in the middle of a pass.
    assert passes[0] == 2 and len(passes) == 3 and max(passes[1:]) < 2 and any(p % 1 for p in passes), passes
    assert whole.kl_coef != 0.05
    second, last = int(2 * (passes[0] + passes[1])), whole.state.global_step
    assert last == 2 * sum(passes)
    cut = make_trainer(output_dir=str(tmp_path / "cut"), callbacks=[Stop(5, within=True)], **BUSY)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    killed = Path(str(get_last_checkpoint(str(tmp_path / "cut"))))
    assert killed.name == "checkpoint-5"
    # In the middle of the warm-up, of an optimiser step, and of the last update; between updates; and a finished run,
    # which has nothing left to do but to be saved, also where its last update ended early.
    checkpoints = [tmp_path / "whole" / f"checkpoint-{step}" for step in (2, second, last - 1, last)]
    for checkpoint in [killed, *checkpoints]:
        again = make_trainer(**BUSY | {"save_strategy": "no"})
        again.train(resume_from_checkpoint=str(checkpoint))
        assert_equal(weights_of(whole), weights_of(again))
        assert records_of(again) == records_of(whole)
        assert again.kl_coef == whole.kl_coef and again.state.global_step == last
        assert [finding.check for finding in again.findings] == [finding.check for finding in whole.findings]


@pytest.mark.parametrize("stop", [2, 3, 6])
def test_resume_is_exact_in_the_simplest_run(stop: int, make_trainer: Any, tmp_path: Path) -> None:
    """Every weight trained; the last step is the run's own last, after which only saving is left."""
    settings = {"total_episodes": 24, "save_strategy": "steps", "save_steps": 1, "peft_config": None}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), learning_rate=1e-3, **settings)
    whole.train()
    again = make_trainer(learning_rate=1e-3, **settings | {"save_strategy": "no"})
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert_equal(weights_of(whole), weights_of(again))
    assert records_of(again) == records_of(whole)


def test_the_same_trainer_goes_on_after_an_interrupt(make_trainer: Any, tmp_path: Path) -> None:
    """What half an optimiser step had added to the figures does not count twice."""
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "total_episodes": 16}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    stop = Stop(1, within=True)
    trainer = make_trainer(output_dir=str(tmp_path / "cut"), callbacks=[stop], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train(resume_from_checkpoint=True)
    assert_equal(weights_of(whole), weights_of(trainer))
    assert records_of(trainer) == records_of(whole)


def test_the_same_seed_gives_the_same_run_whatever_was_drawn_before(make_trainer: Any) -> None:
    runs = []
    for noise in (0, 17):
        torch.rand(noise)
        trainer = make_trainer(total_episodes=16)
        torch.rand(noise)
        trainer.train()
        runs.append((weights_of(trainer), records_of(trainer)))
    assert runs[0][1] == runs[1][1]
    assert_equal(runs[0][0], runs[1][0])


# -- as a Trainer ----------------------------------------------------------------------------------------------------


class Log(TrainerCallback):
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.lines.append(logs | {"step": state.global_step})


def test_callbacks_get_one_record_an_update_and_the_rate_it_was_trained_at(make_trainer: Any) -> None:
    log = Log()
    trainer = make_trainer(total_episodes=32, lr_scheduler_type="linear", callbacks=[log])
    trainer.train()
    updates = [line for line in log.lines if "update" in line]
    assert [line["update"] for line in updates] == [0, 1, 2, 3]
    assert [line["step"] for line in updates] == [2, 4, 6, 8]
    # Linear from 0.01 to 0 in 8 steps: an update takes two of them, and its record is their mean.
    assert [line["learning_rate"] for line in updates] == pytest.approx([0.009375, 0.006875, 0.004375, 0.001875])
    assert not any(math.isnan(value) for line in log.lines for value in line.values())
    kept = [{n: v for n, v in record.items() if not math.isnan(v)} for record in trainer.history]
    assert [{n: line[n] for n in record} for line, record in zip(updates, kept, strict=True)] == kept


def test_old_checkpoints_are_removed_and_the_best_one_is_taken(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        output_dir=str(tmp_path),
        total_episodes=40,
        num_ppo_epochs=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=[{"prompt": "Tell me about salt."}] * 4,
        load_best_model_at_end=True,
        metric_for_best_model="objective/score",
    )
    trainer.train()
    scores = [line["eval_objective/score"] for line in trainer.state.log_history if "eval_objective/score" in line]
    assert len(scores) == 5 and trainer.state.best_metric == max(scores)
    best = tmp_path / f"checkpoint-{scores.index(max(scores)) + 1}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {best.name, "checkpoint-5"}
    twin = make_trainer()
    twin.cast.trained.load(best)
    assert_equal(weights_of(trainer), weights_of(twin))


def test_what_is_saved_loads_plainly(make_trainer: Any, base: Any, tmp_path: Path) -> None:
    trainer = make_trainer(total_episodes=16)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved")
    ids = torch.tensor([trainer.update_prompts(0)[0].ids])
    torch.testing.assert_close(plain(ids).logits, trainer.cast.trained.policy.eval()(ids).logits)
    assert (plain(ids).logits - base(ids).logits).abs().max() > 0.01
    assert {"adapter_config.json", "value_head.safetensors", "tokenizer_config.json"} <= {
        path.name for path in (tmp_path / "saved").iterdir()
    }


def test_settings_can_be_given_on_a_command_line(tmp_path: Path) -> None:
    line = f"--output_dir {tmp_path} --use_cpu --kl_estimator full --stop_token_ids 1 2 --cliprange_high 0.3"
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(line.split())
    assert config.kl_estimator == "full" and config.stop_token_ids == [1, 2] and config.cliprange_high == 0.3
    assert config.whiten_advantages and config.kl_target is None and not config.value_adapter


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_same_every_time_and_leaves_training_alone(
    make_trainer: Any, questions: list[dict[str, Any]]
) -> None:
    plain = make_trainer(total_episodes=24)
    plain.train()
    watched = make_trainer(total_episodes=24, eval_dataset=questions[:5], eval_strategy="steps", eval_steps=1)
    before = watched.evaluate()
    watched.train()
    assert_equal(weights_of(plain), weights_of(watched))
    assert records_of(plain) == records_of(watched)
    lines = [line for line in watched.state.log_history if "eval_objective/score" in line]
    assert len(lines) == 6  # one a step
    after = watched.evaluate()
    assert watched.evaluate() == after != before
    assert after["eval_objective/kl"] > 0 == pytest.approx(before["eval_objective/kl"], abs=1e-6)


def test_evaluation_is_the_reward_of_the_answers_by_hand(make_trainer: Any, questions: list[dict[str, Any]]) -> None:
    seen: list[tuple[int, float]] = []

    def length(completion_ids: list[list[int]], level: list[int]) -> list[float]:
        seen.extend((n, float(len(ids))) for n, ids in zip(level, completion_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(reward=length, stop_token_ids=list(range(0, 393, 7)))
    metrics = trainer.evaluate(questions[:6], metric_key_prefix="held")
    assert [n for n, _ in seen] == [0, 1, 2, 3, 4, 5]
    mean = sum(score for _, score in seen) / 6
    std = (sum((score - mean) ** 2 for _, score in seen) / 6) ** 0.5
    assert metrics["held_objective/score"] == metrics["held_reward/length"] == pytest.approx(mean)
    assert metrics["held_episode/length"] == pytest.approx(mean)
    assert metrics["held_objective/score_std"] == pytest.approx(std)
    assert metrics["held_episode/finished"] == pytest.approx(sum(score < 8 for _, score in seen) / 6, abs=0.2)
    assert not any("rlhf_reward" in name or "explained" in name for name in metrics)  # those belong to training
    with pytest.raises(InputError, match=r"there is nothing to evaluate on: give an eval_dataset\."):
        trainer.evaluate()


# -- policies and rewards --------------------------------------------------------------------------------------------


def test_a_policy_by_its_path_and_by_its_adapter(
    make_trainer: Any, loud_model: Path, base: Any, lora: Any, stir: Any
) -> None:
    """Loaded by name with its own tokenizer, and as a `PeftModel` whose adapter goes on from where it is."""
    by_path = make_trainer(model=str(loud_model), processing_class=None, total_episodes=8)
    by_path.train()
    assert by_path.processing_class.get_vocab() == make_trainer().processing_class.get_vocab()
    assert by_path.history[0]["objective/kl"] == pytest.approx(0, abs=0.2)  # a CPU may hold the base in bfloat16
    adapted = get_peft_model(copy.deepcopy(base), lora())
    stir(adapted)
    before = {n: p.clone() for n, p in adapted.named_parameters()}
    by_adapter = make_trainer(model=adapted, peft_config=None, total_episodes=8)
    by_adapter.train()
    assert by_adapter.history[0]["objective/kl"] > 0.5
    moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}


def test_conversations_columns_and_texts_reach_the_reward(make_trainer: Any, tokenizer: Any) -> None:
    calls: list[dict[str, Any]] = []

    def graded(prompts: Any, completions: Any, completion_ids: Any, topic: list[str], **others: Any) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions, "ids": completion_ids, "topic": topic} | others)
        return [float(len(t)) for t in topic]

    talks = [{"prompt": [{"role": "user", "content": f"Number {i}?"}], "topic": "x" * i} for i in range(8)]
    trainer = make_trainer(reward=graded, train_dataset=talks, total_episodes=8)
    trainer.train()
    (call,) = calls
    order = [len(topic) for topic in call["topic"]]
    assert sorted(order) == list(range(8))
    assert call["prompts"] == [talks[i]["prompt"] for i in order]
    texts = tokenizer.batch_decode(call["ids"], skip_special_tokens=True)
    assert call["completions"] == [[{"role": "assistant", "content": text}] for text in texts]
    assert trainer.rollout.score_B.tolist() == order
    ids = tokenizer.apply_chat_template(talks[order[0]]["prompt"], add_generation_prompt=True, return_dict=True)
    assert trainer.rollout.prompts[0] == list(ids["input_ids"])


def test_two_functions_are_a_weighted_sum_with_a_figure_each(make_trainer: Any, vowels: Any) -> None:
    def brief(completion_ids: list[list[int]]) -> list[float | None]:
        return [None if i % 2 else -float(len(ids)) for i, ids in enumerate(completion_ids)]

    trainer = make_trainer(
        reward=[vowels, brief],
        reward_weights=[2.0, 0.25],
        total_episodes=8,
        stop_token_ids=list(range(0, 393, 7)),
    )
    trainer.train()
    r, (record,) = trainer.rollout, trainer.history
    shares = vowels(r.answers)
    wanted = [2 * share for share in shares]
    for i in range(0, 8, 2):
        wanted[i] -= 0.25 * len(r.answers[i])
    assert r.score_B.tolist() == pytest.approx(wanted)
    assert record["objective/score"] == pytest.approx(sum(wanted) / 8, abs=1e-5)
    assert record["reward/vowels"] == pytest.approx(sum(shares) / 8, abs=1e-5)
    lengths = [len(answer) for answer in r.answers[::2]]
    assert record["reward/brief"] == pytest.approx(-sum(lengths) / 4)  # of those it applies to
    variance = sum((n - sum(lengths) / 4) ** 2 for n in lengths) / 4
    assert record["reward/brief_std"] == pytest.approx(variance**0.5, abs=1e-5)


def test_a_reward_adapter_and_a_function_are_mixed(make_trainer: Any, vowels: Any, reward_adapter: Any) -> None:
    """With every weight trained and the adapter on the same base: the reference stays that base, bit for bit."""
    folder = str(reward_adapter())
    for config in ({}, {"peft_config": None, "learning_rate": 1e-3}):
        trainer = make_trainer(reward=[folder, vowels], reward_weights=[1.0, 0.5], total_episodes=16, **config)
        held = {n: p.clone() for n, p in trainer.cast.reference.named_parameters() if ".default." not in n}
        trainer.train()
        assert all(torch.equal(p, held[n]) for n, p in trainer.cast.reference.named_parameters() if n in held)
        r = trainer.rollout
        wanted = [a + 0.5 * b for a, b in zip(r.parts["reward_model"].tolist(), vowels(r.answers), strict=True)]
        assert r.score_B.tolist() == pytest.approx(wanted, abs=1e-5)
        assert abs(trainer.history[1]["objective/kl"]) > 1e-3 and "reward/reward_model" in trainer.history[0]


def test_mixed_precision_is_the_policys_and_not_the_rewards(
    make_trainer: Any, reward_adapter: Any, loud_model: Path, tokenizer: Any
) -> None:
    folder = reward_adapter()
    trainer = make_trainer(reward=str(folder), bf16=True, total_episodes=8)
    trainer.train()
    plain = AutoModelForSequenceClassification.from_pretrained(loud_model, num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = tokenizer.pad_token_id
    rows = [prompt + answer for prompt, answer in trainer.rollout.pairs]
    expected = score_rows(PeftModel.from_pretrained(plain, folder), rows, tokenizer.pad_token_id)
    assert trainer.rollout.score_B.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_whole_classifier_in_a_folder_on_another_base(make_trainer: Any, tiny_model: Path, tmp_path: Path) -> None:
    """With its own tokenizer: one more token, so that it could not read the policy's."""
    from transformers import AutoTokenizer

    from align.ppo.rewards import ModelReward

    own = AutoTokenizer.from_pretrained(tiny_model)
    own.add_tokens(["<|aside|>"])
    torch.manual_seed(8)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.resize_token_embeddings(len(own))
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "judge")
    own.save_pretrained(tmp_path / "judge")
    trainer = make_trainer(reward=tmp_path / "judge", total_episodes=8)
    trainer.cast.rewards.rewards[0].model.float()
    trainer.train()
    r = trainer.rollout
    texts = [trainer.processing_class.decode(answer, skip_special_tokens=True) for answer in r.answers]
    judge = ModelReward(model, own, "judge")
    rows = zip(trainer.update_prompts(0), texts, r.finished_B.tolist(), strict=True)
    ids = [judge.row(prompt.prompt, text, finished)["input_ids"] for prompt, text, finished in rows]
    wanted = [float(model(torch.tensor([row])).logits) for row in ids]
    assert r.score_B.tolist() == pytest.approx(wanted, abs=0.05)
    assert max(wanted) - min(wanted) > 0.2 and "reward/judge" in trainer.history[0]


def test_findings_are_said_once(make_trainer: Any) -> None:
    def same(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    trainer, told = make_trainer(reward=same, total_episodes=40, num_ppo_epochs=1), []
    trainer.tell = told.append
    trainer.train()
    assert len(trainer.history) == 5 and "reward-constant" in [finding.check for finding in trainer.findings]
    assert ["the same score" in sentence for sentence in told].count(True) == 1


def test_gradient_reaches_every_weight_of_the_policy(make_trainer: Any) -> None:
    """Under mixed precision too, where weights are cast once without a gradient when the rollout is looked at."""
    for options in ({}, {"bf16": True}, {"bf16": True, "peft_config": None}):
        trainer = make_trainer(total_episodes=8, num_ppo_epochs=1, optim="sgd", learning_rate=1.0, **options)
        before = weights_of(trainer)
        trainer.train()
        after = weights_of(trainer)
        still = {n for n, w in after.items() if torch.equal(w, before[n]) and "lora_A" not in n}
        assert not still  # lora_A has no gradient as long as lora_B is zero


def test_the_model_is_the_one_that_was_given(make_trainer: Any, base: Any) -> None:
    """No copy of the policy is trained behind the user's back."""
    model = copy.deepcopy(base)
    trainer = make_trainer(model=model, peft_config=None, total_episodes=8, learning_rate=1e-3)
    trainer.train()
    assert trainer.cast.trained.policy is model
    assert isinstance(model, type(AutoModelForCausalLM.from_config(base.config)))
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))
