"""Fifty steps of TRL's own trainers, with and without what is put below them: the same losses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig

from align import prefix
from align.heads import lean_head
from align.lora import lean_lora
from align.prefix import share_prefixes
from reward.elements import Labels
from reward.training import reward_trainer

STEPS, BATCH = 50, 4
WORDS = [
    "rain",
    "bread",
    "river",
    "music",
    "moon",
    "garden",
    "paper",
    "salt",
    "clock",
    "winter",
    "kind",
    "short",
    "answer",
    "people",
    "why",
]


def rows() -> list[dict[str, str]]:
    chance = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(low, high)))

    return [
        {"prompt": text(4, 30), "chosen": text(1, 12) + " kind", "rejected": text(1, 12) + " salt"}
        for _ in range(STEPS * BATCH)
    ]


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "seed": 0,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_length": 256,
    }


def adapter(task_type: str, **extra: Any) -> LoraConfig:
    return LoraConfig(task_type=task_type, r=8, lora_alpha=16, target_modules="all-linear", **extra)


def dpo(tiny_model: Path, folder: Path) -> Any:
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=DPOConfig(**settings(folder)),
        train_dataset=Dataset.from_list(rows()),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=adapter("CAUSAL_LM"),
    )


def reward(tiny_model: Path, folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    tokens = [{f"{side}_ids": tokenizer(row[side])["input_ids"] for side in row} for row in rows()]
    arguments = RewardConfig(**settings(folder))
    return reward_trainer(model, tokenizer, tokens, arguments, adapter("SEQ_CLS", modules_to_save=["score"]), Labels())


@pytest.mark.parametrize("build", [dpo, reward], ids=["dpo", "reward"])
def test_fifty_losses_coincide(build: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build(tiny_model, tmp_path)
    plain.train()
    lean = build(tiny_model, tmp_path)
    if build is dpo:
        lean_head(lean.model)
    lean_lora(lean.model)
    assert share_prefixes(lean.model) is None
    shares, packed = [], prefix._packed

    def counting(decoder: Any, layout: Any, **kwargs: Any) -> Any:
        shares.append(len(layout.ids_P) / layout.place_BS.numel())
        return packed(decoder, layout, **kwargs)

    monkeypatch.setattr(prefix, "_packed", counting)
    lean.train()
    assert len(shares) == (2 if build is dpo else 1) * STEPS  # DPO passes the reference, too
    assert sum(shares) / len(shares) < 0.75
    wanted, found = (
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (plain, lean)
    )
    assert len(wanted) == STEPS and min(wanted) < 0.8 * wanted[0]  # something was learned
    assert found == pytest.approx(wanted, abs=1e-4)
