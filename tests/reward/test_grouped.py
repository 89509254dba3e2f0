"""K-wise reward training: the loss of all pairs of a prompt from one pass over its answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from align.prefix import share_prefixes
from reward.grouped import collate, group_loss, groups_of
from reward.training import reward_trainer


def row(prompt: list[int], chosen: list[int], rejected: list[int], margin: float = 0.0) -> dict[str, Any]:
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "margin": margin}


# Three answers of one prompt, ranked [8] > [9] > [10 11]; one pair of another prompt.
ROWS = [
    row([5, 6], [8], [9], 0.5),
    row([5, 6], [9], [10, 11], 1.0),
    row([7], [8], [12]),
    row([5, 6], [8], [10, 11], 2.0),
]


def test_every_answer_of_a_prompt_is_one_row() -> None:
    first, second = groups_of(ROWS, margin=True)
    assert first == {
        "answers": [[5, 6, 8], [5, 6, 9], [5, 6, 10, 11]],
        "pairs": [[0, 1], [1, 2], [0, 2]],
        "margins": [0.5, 1.0, 2.0],
    }
    assert second == {"answers": [[7, 8], [7, 12]], "pairs": [[0, 1]], "margins": [0.0]}
    assert groups_of(ROWS, margin=False)[0]["margins"] == [0.0, 0.0, 0.0]


def test_a_batch() -> None:
    batch = collate(groups_of(ROWS, margin=True), pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 8, 3], [5, 6, 9, 3], [5, 6, 10, 11], [7, 8, 3, 3], [7, 12, 3, 3]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 3, 4, 2, 2]
    assert batch["pairs"].tolist() == [[0, 1], [1, 2], [0, 2], [3, 4]]
    assert batch["weights"].tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_the_loss_by_hand() -> None:
    reward = torch.tensor([2.0, 0.5, -1.0], requires_grad=True)
    pairs, margins = torch.tensor([[0, 1], [1, 2]]), torch.tensor([0.0, 1.0])
    weights = torch.tensor([0.5, 0.5])
    wanted = 0.5 * math.log(1 + math.exp(-1.5)) + 0.5 * math.log(1 + math.exp(-0.5))
    assert float(group_loss(reward, pairs, margins, weights, None)) == pytest.approx(wanted, abs=1e-6)
    centred = group_loss(reward, pairs, margins, weights, 0.1)
    assert float(centred) == pytest.approx(wanted + 0.1 * (0.5 * 2.5**2 + 0.5 * 0.5**2), abs=1e-6)
    centred.backward()
    assert reward.grad is not None and reward.grad.abs().min() > 0


def trainer(tiny_model: Path, tmp_path: Path, **how: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = RewardConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        center_rewards_coefficient=0.01,
    )
    adapter = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"])
    return reward_trainer(model, tokenizer, how.pop("rows", ROWS), config, adapter, margin=True, **how)


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_single_pairs_train_as_trl_trains_them(tiny_model: Path, tmp_path: Path) -> None:
    """Where every prompt has one pair, the K-wise loss is Bradley-Terry's over a batch of pairs: TRL is the oracle."""
    rows = [row([20 + i, 6], [8 + i], [30, 31 + i], 0.3 * i) for i in range(4)]
    plain, grouped = (losses(trainer(tiny_model, tmp_path, rows=rows, group_pairs=g)) for g in (False, True))
    assert len(plain) == 3 and grouped == pytest.approx(plain, abs=1e-5)


def test_groups_train_with_and_without_shared_prefixes(tiny_model: Path, tmp_path: Path) -> None:
    plain = trainer(tiny_model, tmp_path, group_pairs=True)
    shared = trainer(tiny_model, tmp_path, group_pairs=True)
    assert share_prefixes(shared.model) is None
    first, second = losses(plain), losses(shared)
    assert second == pytest.approx(first, abs=1e-5) and first[-1] < first[0]
    entry = plain.state.log_history[0]
    assert entry["pairs"] == 4 and 0 <= entry["accuracy"] <= 1 and "margin" in entry
