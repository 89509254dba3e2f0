"""What the tests of PPO share: a tiny policy that adapters can move, rewards, and trainers around them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback

from align.ppo import PPOConfig, PPOTrainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session", autouse=True)
def few_objects() -> None:
    """Every `train` collects garbage first; what the libraries hold is not worth half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def loud_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with opinions. Random embeddings of std 0.02 bound every logit below 1: no adapter could say
    anything."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    folder = tmp_path_factory.mktemp("loud") / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _loaded(loud_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(loud_model, dtype=torch.float32).eval()


@pytest.fixture
def base(_loaded: Any) -> Any:
    """The loud model as plain transformers load it; a new one for each test."""
    return copy.deepcopy(_loaded)


@pytest.fixture(scope="session")
def lora() -> Callable[..., LoraConfig]:
    def config(**settings: Any) -> LoraConfig:
        plain = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": LINEAR}
        return LoraConfig(**(plain | settings))

    return config


@pytest.fixture(scope="session")
def stir() -> Callable[..., None]:
    """Move an adapter, or a whole model, away from its start, so that policy and reference differ."""

    def stirred(model: torch.nn.Module, adapter: str = "default", std: float = 0.2) -> None:
        torch.manual_seed(7)
        adapters = [p for n, p in model.named_parameters() if f"lora_B.{adapter}." in n]
        with torch.no_grad():
            for parameter in adapters or model.parameters():
                parameter.add_(torch.randn_like(parameter) * (std if adapters else 0.02))

    return stirred


@pytest.fixture(scope="session")
def reward_adapter(loud_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a reward adapter far from zero, as the reward stage saves it; with dropout, as many are trained."""

    def make(base: Path = loud_model, labels: int = 1) -> Path:
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.float32)
        config = LoraConfig(
            task_type="SEQ_CLS", r=4, target_modules=LINEAR, modules_to_save=["score"], lora_dropout=0.3
        )
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp("reward") / "model"
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def vowel_ids(tokenizer: Any) -> set[int]:
    return {i for token, i in tokenizer.get_vocab().items() if token and token[-1] in "aeiou"}


@pytest.fixture(scope="session")
def vowels(vowel_ids: set[int]) -> Callable[..., list[float]]:
    """A verifiable reward in place of a learned one: four times the share of tokens that end in a vowel."""

    def vowels(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [4 * sum(token in vowel_ids for token in ids) / len(ids) for ids in completion_ids]

    return vowels


@pytest.fixture(scope="session")
def questions() -> list[dict[str, Any]]:
    return [{"prompt": f"Tell me about rain, {'very ' * (i % 4)}number {i}.", "level": i} for i in range(24)]


@pytest.fixture
def make_trainer(
    base: Any, tokenizer: Any, vowels: Any, questions: list[dict[str, Any]], lora: Any, tmp_path: Path
) -> Callable[..., PPOTrainer]:
    """A trainer on the loud model under LoRA with the vowel reward. Keywords are the trainer's where it has them and
    settings of PPOConfig otherwise."""
    parts = ("model", "reward", "train_dataset", "eval_dataset", "processing_class", "reward_processing_classes")
    parts += ("ptx_dataset", "peft_config", "callbacks", "optimizers")

    def make(**given: Any) -> PPOTrainer:
        own = {
            "model": copy.deepcopy(base),
            "reward": vowels,
            "train_dataset": questions,
            "processing_class": tokenizer,
            "peft_config": lora(),
        }
        own |= {name: given.pop(name) for name in parts if name in given}
        settings = {
            "output_dir": str(tmp_path / "run"),
            "total_episodes": 48,
            "per_device_train_batch_size": 8,
            "num_ppo_epochs": 2,
            "response_length": 8,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 5,
        }
        trainer = PPOTrainer(args=PPOConfig(**(settings | given)), **own)
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make
