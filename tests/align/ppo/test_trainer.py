"""PPO's cast, rollout and trainer on a tiny model: against plain loading, plain PyTorch, and itself after a kill."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from align.config_file import load_config
from align.logprobs import Batch, collate
from align.ppo import maths
from align.ppo.cast import Cast, PolicyWithValue, build_cast
from align.ppo.rollout import Rollout, sample_episodes, shape_and_estimate
from align.ppo.trainer import PPOConfig, PPOTrainer
from align.training import last_checkpoint
from reward.records import InputError
from reward.scoring import score

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def reward_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward adapter with weights far from zero, saved as the reward stage saves it."""
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=LINEAR, modules_to_save=["score"])
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("reward") / "model"
    model.save_pretrained(folder)
    return folder


def make_config(tmp_path: Path, tiny_model: Path, *overrides: str) -> Any:
    path = tmp_path / "pipeline.yaml"
    path.write_text(f"model: {{base: {tiny_model}, dtype: float32}}\nstages: [reward, ppo]\n")
    return load_config(path, overrides)


@pytest.fixture
def cast(tmp_path: Path, tiny_model: Path, reward_folder: Path) -> Cast:
    torch.manual_seed(2)
    return build_cast(make_config(tmp_path, tiny_model), str(tiny_model), reward_folder)


def prompts_of(tokenizer: Any, count: int = 12) -> list[list[int]]:
    return [tokenizer(f"Tell me about rain, {'very ' * (i % 4)}number {i}.").input_ids for i in range(count)]


def stir(model: torch.nn.Module, std: float = 0.2) -> None:
    """Move an adapter away from its zero start, so that policy and reference differ."""
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=std)


def batch_of(tokenizer: Any) -> tuple[Batch, list[list[int]]]:
    pairs = [(p, tokenizer(f" It is wet {'and cold ' * i}").input_ids) for i, p in enumerate(prompts_of(tokenizer, 4))]
    return collate(pairs, tokenizer.pad_token_id), [p + a for p, a in pairs]


# -- the cast --------------------------------------------------------------------------------------------------------


def test_scores_equal_the_reward_model_loaded_plainly(
    cast: Cast, tokenizer: Any, tiny_model: Path, reward_folder: Path
) -> None:
    stir(cast.trained.policy)  # the policy's adapter must not leak into the reward
    batch, rows = batch_of(tokenizer)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    plain.config.pad_token_id = tokenizer.pad_token_id
    expected = score(PeftModel.from_pretrained(plain, reward_folder), rows, tokenizer.pad_token_id)
    assert cast.scores(batch).tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01  # the test can tell rows apart


def test_reference_is_the_base_whatever_the_policy_became(cast: Cast, tokenizer: Any, tiny_model: Path) -> None:
    stir(cast.trained.policy)
    batch, _ = batch_of(tokenizer)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    logits = base(input_ids=batch.ids_BS, attention_mask=batch.attention_BS.long()).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, batch.ids_BS[:, 1:, None])[..., 0]
    expected = batch.spread(logprobs[batch.answer_BS[:, 1:]])
    torch.testing.assert_close(cast.reference_logprobs(batch), expected, atol=1e-5, rtol=0)
    assert (cast.trained(batch)[0] - expected).abs().max() > 0.01


def test_only_policy_and_value_have_gradients_also_after_scoring(cast: Cast, tokenizer: Any) -> None:
    batch, _ = batch_of(tokenizer)
    before = {name for name, p in cast.trained.named_parameters() if p.requires_grad}
    cast.scores(batch)
    cast.reference_logprobs(batch)
    after = {name for name, p in cast.trained.named_parameters() if p.requires_grad}
    assert before == after
    assert all(".default." in name or "value_head" in name for name in after)
    assert any(".default." in name for name in after)


def test_the_base_weights_are_held_once(cast: Cast, tiny_model: Path) -> None:
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    frozen = sum(p.numel() for p in cast.trained.parameters() if not p.requires_grad)
    reward = sum(p.numel() for n, p in cast.trained.named_parameters() if ".reward." in n)
    assert frozen - reward == whole


def test_a_full_policy_has_a_reference_of_its_own(
    tmp_path: Path, tiny_model: Path, reward_folder: Path, tokenizer: Any
) -> None:
    cast = build_cast(make_config(tmp_path, tiny_model, "ppo.adapter=null"), str(tiny_model), reward_folder)
    batch, _ = batch_of(tokenizer)
    torch.testing.assert_close(cast.trained(batch)[0], cast.reference_logprobs(batch), atol=1e-5, rtol=0)
    with torch.no_grad():
        for parameter in cast.trained.policy.parameters():
            parameter.add_(0.01)
    assert (cast.trained(batch)[0] - cast.reference_logprobs(batch)).abs().max() > 1e-3
    assert all(p.requires_grad for p in cast.trained.policy.parameters())
    assert not any(p.requires_grad for p in cast.frozen.parameters())


def test_a_reward_adapter_of_another_base_is_refused(tmp_path: Path, tiny_model: Path, reward_folder: Path) -> None:
    with pytest.raises(InputError, match="train `reward` again"):
        build_cast(make_config(tmp_path, tiny_model), str(tmp_path), reward_folder)


def test_saving_and_loading_gives_the_same_policy_and_value(
    cast: Cast, tmp_path: Path, tiny_model: Path, reward_folder: Path, tokenizer: Any
) -> None:
    stir(cast.trained.policy)
    torch.nn.init.normal_(cast.trained.value_head.weight)
    cast.trained.save(tmp_path / "saved")
    batch, _ = batch_of(tokenizer)
    other = build_cast(make_config(tmp_path, tiny_model), str(tiny_model), reward_folder)
    other.trained.load(tmp_path / "saved")
    for mine, theirs in zip(cast.trained(batch), other.trained(batch), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "saved")
    logits = plain(input_ids=batch.ids_BS, attention_mask=batch.attention_BS.long()).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(2, batch.ids_BS[:, 1:, None])[..., 0][batch.answer_BS[:, 1:]]
    torch.testing.assert_close(batch.spread(logprobs), cast.trained(batch)[0], atol=1e-5, rtol=0)


# -- training --------------------------------------------------------------------------------------------------------


class CountingCast(Cast):
    """A real policy with a verifiable reward in place of a learned one: the share of vowel-ending tokens."""

    vowels: Tensor

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        hits_BS = torch.isin(batch.ids_BS, self.vowels) & batch.answer_BS
        return 4 * hits_BS.sum(1).float() / batch.answer_BS.sum(1)


def counting_cast(tiny_model: Path, tokenizer: Any) -> CountingCast:
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEAR)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():  # random embeddings of std 0.02 bound every logit below 1: no adapter could say anything
        model.get_input_embeddings().weight.mul_(10)
    policy = get_peft_model(model, config)
    cast = CountingCast(PolicyWithValue(policy, 1.0), policy, None, None)
    cast.vowels = torch.tensor([i for t, i in tokenizer.get_vocab().items() if t and t[-1] in "aeiou"])
    return cast


def make_trainer(tiny_model: Path, tokenizer: Any, folder: Path, **settings: Any) -> PPOTrainer:
    defaults: dict[str, Any] = {
        "total_episodes": 48,
        "per_device_train_batch_size": 8,
        "num_ppo_epochs": 2,
        "response_length": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    args = PPOConfig(output_dir=str(folder), **(defaults | settings))
    return PPOTrainer(counting_cast(tiny_model, tokenizer), args, prompts_of(tokenizer, 24), tokenizer)


def weights_of(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.cast.trained.named_parameters() if p.requires_grad}


def test_reward_rises_at_bounded_kl(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        trainer = make_trainer(
            tiny_model,
            tokenizer,
            tmp_path,
            total_episodes=600,
            per_device_train_batch_size=24,
            num_ppo_epochs=4,
            learning_rate=3e-3,
            seed=seed,
            kl_coef=0.02,
        )
        trainer.train()
        updates = [line for line in trainer.state.log_history if "objective/score" in line]
        scores = [line["objective/score"] for line in updates]
        assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0, scores
        assert 0 < updates[-1]["objective/kl"] < 20


def test_the_first_step_of_an_update_has_ratio_one(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tokenizer, tmp_path, total_episodes=8, num_ppo_epochs=1)
    trainer.train()
    line = next(line for line in trainer.state.log_history if "policy/approx_kl" in line)
    assert line["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert line["policy/clip_fraction"] == 0
    # With whitened advantages and ratio 1 the policy loss is minus their mean: zero.
    assert line["loss/policy"] == pytest.approx(0, abs=1e-5)
    assert line["objective/kl"] == pytest.approx(0, abs=1e-4)  # lora_B is zero: the policy is the reference


def test_one_update_equals_a_plain_pytorch_one(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Two passes over one rollout, recomputed with full-vocabulary logits, Python loops and torch.optim.AdamW."""
    trainer = make_trainer(
        tiny_model, tokenizer, tmp_path, total_episodes=8, num_ppo_epochs=2, max_grad_norm=0.0, vf_coef=0.5, kl_coef=0.1
    )
    twin = copy.deepcopy(trainer.cast)
    trainer.train()
    r = trainer.rollout
    assert r is not None

    optimizer = torch.optim.AdamW([p for p in twin.trained.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    gamma, lam, clip, clip_value = 1.0, 0.95, 0.2, 0.2
    # Rewards and advantages, token by token in plain Python.
    episodes = []
    for row, (prompt, answer) in enumerate(r.pairs):
        old = r.old_logprobs_BT[row, : len(answer)].tolist()
        ref = r.ref_logprobs_BT[row, : len(answer)].tolist()
        values = r.old_value_BT[row, : len(answer)].tolist()
        rewards = [-0.1 * (a - b) for a, b in zip(old, ref, strict=True)]
        hits = sum(token in set(twin.vowels.tolist()) for token in answer)
        rewards[-1] += 4 * hits / len(answer)
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
    mine, plain = weights_of(trainer), {n: p for n, p in twin.trained.named_parameters() if p.requires_grad}
    moved = 0.0
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, plain[name].detach(), atol=2e-4, rtol=0, msg=name)
        moved = max(moved, float((parameter - plain[name]).abs().max()))
    assert moved < 2e-4


def test_accumulation_equals_one_batch(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """8 rows at once and 8 x 1 row see the same rollout and take the same step."""
    results = []
    for rows, accumulate in ((8, 1), (1, 8)):
        trainer = make_trainer(
            tiny_model,
            tokenizer,
            tmp_path,
            total_episodes=8,
            num_ppo_epochs=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
        )
        trainer.train()
        results.append((weights_of(trainer), trainer.rollout))
    (whole, first), (parts, second) = results
    assert first.answers == second.answers
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-5, rtol=0, msg=name)
    assert any((whole[name] != 0).any() for name in whole if "lora_B" in name)


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resume_is_exact_also_in_the_middle_of_an_update(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, stop: int
) -> None:
    settings = {"total_episodes": 24, "num_ppo_epochs": 2, "save_strategy": "steps", "save_steps": 1, "kl_target": 0.5}
    whole = make_trainer(tiny_model, tokenizer, tmp_path / "whole", **settings)
    whole.train()
    cut = make_trainer(tiny_model, tokenizer, tmp_path / "cut", **settings)
    cut.add_callback(Stop(stop))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = make_trainer(tiny_model, tokenizer, tmp_path / "cut", **settings)
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint is not None and checkpoint.name == f"checkpoint-{stop - 1}"
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.kl_coef == whole.kl_coef != 0.05
    for name, parameter in weights_of(whole).items():
        assert torch.equal(parameter, weights_of(again)[name]), name


def test_too_few_prompts_are_refused_with_the_numbers(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"24 prompts, but one update takes 32 episodes"):
        make_trainer(tiny_model, tokenizer, tmp_path, per_device_train_batch_size=32)


def test_every_prompt_comes_once_a_lap_and_laps_differ(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tokenizer, tmp_path, total_episodes=48)
    laps = [sorted(tuple(p) for u in us for p in trainer.update_prompts(u)) for us in ((0, 1, 2), (3, 4, 5))]
    assert laps[0] == laps[1] == sorted(map(tuple, trainer.prompts))
    assert trainer.update_prompts(0) != trainer.update_prompts(3)


def test_a_rollout_is_whole(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Shapes, padding, the reward's sum, and the split of score and KL, by their definitions."""
    trainer = make_trainer(tiny_model, tokenizer, tmp_path)
    stir(trainer.cast.trained.policy)
    torch.manual_seed(0)
    r: Rollout = sample_episodes(trainer.cast, tokenizer, trainer.update_prompts(0), trainer.args)
    kl_BT = shape_and_estimate(r, trainer.args, 0.3, lambda tensor: tensor)
    assert [len(answer) for answer in r.answers] == r.answer_BT.sum(1).tolist()
    assert r.reward_BT is not None
    torch.testing.assert_close(r.reward_BT.sum(1), r.score_B - 0.3 * kl_BT.sum(1))
    for name in ("old_logprobs_BT", "ref_logprobs_BT", "old_value_BT", "reward_BT", "advantage_BT", "return_BT"):
        assert (getattr(r, name)[~r.answer_BT] == 0).all(), name
    mean, var = maths.mean_and_var(maths.masked_moments(r.advantage_BT, r.answer_BT))
    assert float(mean) == pytest.approx(0, abs=1e-6) and float(var) == pytest.approx(1, abs=1e-4)
