"""Faults put into real runs of a tiny model, one at a time: the diagnosis must name what was broken, with the number
that was measured; and a sound run of the same size, which is to be left alone.

What a run is told is checked against figures recomputed here from the run's history.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.ppo import PPOConfig, PPOTrainer, rollout
from align.ppo.diagnosis import diagnose

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [{"prompt": f"Tell me about rain, {'very ' * (i % 4)}number {i}."} for i in range(48)]
EPISODES = 40  # of an update


class Lab:
    """The tiny model, what its tokens are, and runs of PPO on it."""

    def __init__(self, folder: Path, output: Path) -> None:
        self.folder, self.output = folder, output
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        self.vowels = {i for i, token in enumerate(tokens) if token[-1] in "aeiou"}
        others = [i for i in range(len(tokens)) if i not in self.vowels]
        # A random model hardly ever says the one stop token. With a tenth of the others ending an answer, a third of
        # the answers end by themselves.
        self.stops = others[::10]
        ids = torch.tensor([self.tokenizer(row["prompt"]).input_ids[-8:] for row in PROMPTS])
        with torch.no_grad():
            probs_V = self.model()(ids).logits.softmax(-1).mean((0, 1))
        self.likely = sorted(others, key=lambda i: -float(probs_V[i]))[:8]

    def model(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        with torch.no_grad():  # random embeddings of std 0.02 bound every logit below 1: no adapter could say anything
            model.get_input_embeddings().weight.mul_(10)
        return model

    def vowel_share(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """The share of an answer's tokens that end in a vowel, 0 to 1; stop tokens count neither way."""
        words = [[i for i in ids if i not in self.stops] for ids in completion_ids]
        return [sum(i in self.vowels for i in ids) / max(1, len(ids)) for ids in words]

    def run(
        self,
        updates: int,
        reward: Any = None,
        break_it: Callable[[PPOTrainer], Any] = id,
        adapted: bool = True,
        **settings: Any,
    ) -> Any:
        """A trainer after `updates` updates; `break_it` may put a fault in first. Not `adapted`: all weights learn."""
        torch.manual_seed(3)  # of the adapter's weights
        args: dict[str, Any] = {
            "per_device_train_batch_size": EPISODES,
            "response_length": 8,
            "stop_token_ids": self.stops,
            "learning_rate": 3e-3,
            "kl_coef": 0.005,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 0,
        } | settings
        args["total_episodes"] = updates * args["per_device_train_batch_size"]
        trainer = PPOTrainer(
            model=self.model(),
            reward=reward or self.vowel_share,
            args=PPOConfig(output_dir=str(self.output), **args),
            train_dataset=PROMPTS,
            processing_class=self.tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEAR)
            if adapted
            else None,
        )
        break_it(trainer)
        trainer.train()
        assert len(trainer.history) == updates
        return trainer


@pytest.fixture(scope="module")
def lab(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tiny_model, tmp_path_factory.mktemp("health"))


# -- faults -----------------------------------------------------------------------------------------------------------


def constant(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.37 for _ in completion_ids]


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [len(ids) / 16 for ids in completion_ids]


def freeze_critic(trainer: PPOTrainer) -> None:
    trainer.cast.trained.value_head.requires_grad_(False)


def recent(history: list[dict[str, float]], key: str) -> float:
    return statistics.median(update[key] for update in history[-5:])


def first(history: list[dict[str, float]], key: str) -> float:
    return statistics.median(update[key] for update in history[:3])


def leap(history: list[dict[str, float]]) -> tuple[float, float]:
    """KL before the first update, and where it stood after the second."""
    kls = [update["objective/kl"] for update in history]
    return kls[0], statistics.median(kls[1:4])


@dataclass
class Fault:
    """What is broken, and what the diagnosis is to say of it first: check, culprit, severity, and these numbers."""

    updates: int
    verdict: tuple[str, str, str]
    numbers: Callable[[list[dict[str, float]]], tuple[float, ...]]
    reward: Any = None
    break_it: Callable[[PPOTrainer], Any] = id
    settings: dict[str, Any] = field(default_factory=dict)


FAULTS = {
    "the reward gives every answer the same score": Fault(
        3,
        ("reward-constant", "reward", "error"),
        lambda history: (recent(history, "objective/score"), 3),
        reward=constant,
    ),
    "the critic is not trained": Fault(
        10,
        ("critic-explains-nothing", "critic", "warning"),
        lambda history: (100 * recent(history, "value/explained_variance"), 10, recent(history, "loss/value")),
        break_it=freeze_critic,
        settings={"vf_coef": 0.0},
    ),
    "the learning rate is 100 times too high": Fault(
        6,
        ("learning-rate-too-high", "hyperparameters", "error"),
        lambda history: (*leap(history), 0.3),
        settings={"learning_rate": 0.3},
    ),
    "the learning rate is 30,000 times too low": Fault(
        10,
        ("policy-still", "hyperparameters", "warning"),
        lambda history: (recent(history, "objective/kl"), recent(history, "policy/approx_kl"), 1e-7),
        settings={"learning_rate": 1e-7, "per_device_train_batch_size": 10},
    ),
    "the reward is the length": Fault(
        14,
        ("reward-is-length", "reward", "warning"),
        lambda history: (1.0, first(history, "episode/length"), recent(history, "episode/length")),
        reward=length,
        settings={"response_length": 16, "per_device_train_batch_size": 24},
    ),
    "the model never stops": Fault(
        3,
        ("answers-never-stop", "sft model", "warning"),
        lambda history: (100 * recent(history, "episode/finished"), 8),
        settings={"stop_token_ids": None},
    ),
    "every weight learns, and nothing holds the policy to the reference": Fault(
        12,
        ("mode-collapse", "hyperparameters", "error"),
        lambda history: (
            *(at(history, "objective/entropy") for at in (first, recent)),
            *(100 * at(history, "episode/distinct") for at in (first, recent)),
        ),
        settings={"adapted": False, "kl_coef": 0.0},
    ),
    "the penalty is 600 times too high": Fault(
        10,
        ("kl-pinned", "hyperparameters", "warning"),
        lambda history: (recent(history, "objective/kl"), 3.0, recent(history, "objective/score_std")),
        settings={"kl_coef": 3.0, "per_device_train_batch_size": 20},
    ),
}


def numbers_of(sentence: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", sentence)]


def assert_told(trainer: Any, verdict: tuple[str, str, str], wanted: tuple[float, ...]) -> None:
    finding = trainer.findings[0]
    assert (finding.check, finding.culprit, finding.severity) == verdict, [f.sentence for f in trainer.findings]
    for number in wanted:  # sentences give two digits, and whole numbers from 10 on
        told = numbers_of(finding.sentence)
        assert any(n == pytest.approx(number, rel=0.051, abs=1e-12) or n == round(number) for n in told), (
            finding.sentence
        )


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_number(lab: Lab, name: str) -> None:
    fault = FAULTS[name]
    settings = dict(fault.settings)
    if fault.reward is length:
        settings["stop_token_ids"] = lab.likely  # few stop tokens, which are quickly unlearned
    trainer = lab.run(fault.updates, fault.reward, fault.break_it, **settings)
    assert_told(trainer, fault.verdict, fault.numbers(trainer.history))


def test_a_sampler_at_another_temperature_is_named_at_the_first_update(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = rollout.draw

    def hotter(*args: Any, **kwargs: Any) -> Any:
        return draw(*args, **(kwargs | {"temperature": 1.5 * kwargs["temperature"]}))

    monkeypatch.setattr(rollout, "draw", hotter)
    trainer = lab.run(1)
    mismatch = trainer.history[0]["sampling/mismatch"]
    assert mismatch > 0.5
    assert_told(trainer, ("sampling-mismatch", "sampling", "error"), (mismatch, trainer.args.temperature))


# -- and a sound run --------------------------------------------------------------------------------------------------


def test_a_sound_run_is_left_alone_at_every_update(lab: Lab) -> None:
    trainer = lab.run(15)
    scores = [update["objective/score"] for update in trainer.history]
    assert statistics.fmean(scores[-3:]) > 3 * statistics.fmean(scores[:3]), scores  # it is sound: it learns
    verdicts = {fault.verdict[0] for fault in FAULTS.values()} | {"sampling-mismatch"}
    for count in range(1, 16):
        found = diagnose(trainer.history[:count], trainer.args.health)
        assert not [f.sentence for f in found if f.severity == "error" or f.check in verdicts], f"{count} updates"
    assert trainer.findings == diagnose(trainer.history, trainer.args.health)
