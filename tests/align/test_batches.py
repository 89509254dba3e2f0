"""Every optimiser step has all its rows, and they are the same ones however they are shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainingArguments

from align.batches import rows_per_step, whole_steps

ROWS = 13


def trainer_of(folder: Path, batch: int, accumulated: int = 1, rows: int = ROWS, **extra: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        seed=3,
        data_seed=3,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **extra,
    )
    dataset = Dataset.from_list([{"row": number} for number in range(rows)])
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=dataset)
    whole_steps(trainer)
    return trainer


def epoch(trainer: Trainer, number: int = 0) -> list[int]:
    loader = trainer.get_train_dataloader()
    loader.set_epoch(number)
    return [row for batch in loader for row in batch["row"].tolist()]


def test_an_epoch_is_every_row_once_and_then_what_the_last_step_lacks(tmp_path: Path) -> None:
    first, second = (epoch(trainer_of(tmp_path, 8), number) for number in (0, 1))
    for seen in (first, second):
        assert len(seen) == 16 and sorted(seen[:ROWS]) == list(range(ROWS)) and len(set(seen[ROWS:])) == 3
    assert first != second and set(first[ROWS:]) != set(second[ROWS:])
    assert epoch(trainer_of(tmp_path, 8)) == first


def test_a_step_larger_than_the_data_takes_them_again(tmp_path: Path) -> None:
    seen = epoch(trainer_of(tmp_path, 16, rows=5))
    assert len(seen) == 16 and [sorted(seen[n : n + 5]) for n in (0, 5, 10)] == [list(range(5))] * 3


def test_what_divides_is_left_as_it_was(tmp_path: Path) -> None:
    seen = epoch(trainer_of(tmp_path, 4, rows=12))
    assert sorted(seen) == list(range(12))
    plain = Trainer.get_train_dataloader(trainer_of(tmp_path, 4, rows=12))
    assert [row for batch in plain for row in batch["row"].tolist()] == seen


@pytest.mark.parametrize(("batch", "accumulated"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_takes_the_same_rows(tmp_path: Path, batch: int, accumulated: int) -> None:
    trainer = trainer_of(tmp_path, batch, accumulated)
    assert rows_per_step(trainer.args) == 8
    assert epoch(trainer) == epoch(trainer_of(tmp_path, 8))


def test_two_processes_take_the_same_rows_step_by_step(tmp_path: Path) -> None:
    whole = epoch(trainer_of(tmp_path, 8))
    batches = BatchSampler(whole, 4, drop_last=False)
    shares = [list(BatchSamplerShard(batches, num_processes=2, process_index=rank)) for rank in (0, 1)]
    assert [sorted([*a, *b]) for a, b in zip(*shares, strict=True)] == [sorted(whole[:8]), sorted(whole[8:])]


def test_no_row_of_the_last_batch_is_taken_for_a_copy(tmp_path: Path) -> None:
    """Else accelerate leaves what was measured on it out of the metrics."""
    trainer = trainer_of(tmp_path, 4, 2)
    left = [trainer.accelerator.gradient_state.remainder for _ in trainer.get_train_dataloader()]
    assert left == [0, 0, 0, 0]


@pytest.mark.parametrize("asked", [{"dataloader_drop_last": True}, {"train_sampling_strategy": "sequential"}])
def test_what_the_user_asked_for_is_left_alone(tmp_path: Path, asked: dict[str, Any]) -> None:
    seen = epoch(trainer_of(tmp_path, 4, **asked))
    assert len(seen) == len(set(seen)) == (12 if "dataloader_drop_last" in asked else ROWS)
