"""Scores are those of plain transformers + PEFT, and what reward training saves is what it trained."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align import models
from align.config import AdapterSection, ModelSection
from reward.elements import Labels
from reward.scoring import score_rows
from reward.training import reward_trainer

F32 = ModelSection(dtype="float32")


@pytest.fixture
def classifier(tiny_model: Path) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32).eval()
    model.score.weight.data.normal_()
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[list[int]]:
    """Ragged rows, most ending with the stop token."""
    draw = random.Random(0)
    rows = [[draw.randrange(3, 300) for _ in range(size)] for size in (5, 1, 30, 12, 12, 44, 7, 2, 19)]
    return [row + [tokenizer.eos_token_id] * (index % 3 > 0) for index, row in enumerate(rows)]


@torch.no_grad()
def alone(model: Any, row: list[int]) -> float:
    return model(input_ids=torch.tensor([row])).logits.item()


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_equals_the_plain_forward_of_each_row(
    classifier: Any, tokenizer: Any, rows: list[list[int]], batch_size: int
) -> None:
    wanted = [alone(classifier, row) for row in rows]
    assert len({round(value, 3) for value in wanted}) == len(rows)
    found = score_rows(classifier, rows, tokenizer.pad_token_id, batch_size=batch_size)
    assert found == pytest.approx(wanted, abs=1e-5)


def test_order_is_kept_and_progress_counts(classifier: Any, tokenizer: Any, rows: list[list[int]]) -> None:
    seen: list[int] = []
    found = score_rows(classifier, rows, tokenizer.pad_token_id, batch_size=4, on_progress=seen.append)
    assert seen == [4, 8, 9]
    backwards = score_rows(classifier, rows[::-1], tokenizer.pad_token_id, batch_size=4)
    assert backwards[::-1] == pytest.approx(found, abs=1e-5)
    assert score_rows(classifier, [], tokenizer.pad_token_id) == []


@pytest.mark.parametrize("configured", ["stop token", "none", "another"])
def test_another_padding_token_in_the_models_config_does_not_move_the_score(
    classifier: Any, tokenizer: Any, rows: list[list[int]], configured: str
) -> None:
    """Hub models have pad = eos in their config: the score would be read before the stop token, or on padding."""
    wanted = [alone(classifier, row) for row in rows]
    ids = {"stop token": tokenizer.eos_token_id, "none": None, "another": 17}
    classifier.config.pad_token_id = ids[configured]
    assert score_rows(classifier, rows, tokenizer.pad_token_id) == pytest.approx(wanted, abs=1e-5)


def test_several_labels_are_refused(tiny_model: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    with pytest.raises(ValueError, match="a reward model has one label, but this one has 2"):
        score_rows(model, [[3, 4]], 0)


# Training


PAIRS = [
    {
        "prompt_ids": [5, 6, 7 + i],
        "chosen_ids": [40 + i, 41, 2],
        "rejected_ids": [60, 61 + i, 62, 63, 2],
        "margin": i / 4,
    }
    for i in range(8)
]


@pytest.fixture
def make_trainer(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> Any:
    from trl import RewardConfig

    def make(*, margin: bool = False, lora: bool = True, **own: Any) -> Any:
        arguments = RewardConfig(
            output_dir=str(tmp_path / "work"), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4,
            bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no",
            disable_tqdm=True, seed=0, **own,
        )  # fmt: skip
        torch.manual_seed(0)
        section = AdapterSection(r=4)
        adapter = models.lora_config(section, "SEQ_CLS", modules_to_save=["score"]) if lora else None
        base = models.load_reward_base(str(tiny_model), F32)
        return reward_trainer(base, tokenizer, PAIRS, arguments, adapter, Labels(margin=margin))

    return make


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_three_steps_move_the_adapter_and_the_head_and_nothing_else(make_trainer: Any) -> None:
    trainer = make_trainer()
    everything = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    before = parameters(trainer.model)
    trainer.train()
    after = parameters(trainer.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if "lora_B" in name or ".score." in name} <= changed
    for name, parameter in trainer.model.named_parameters():
        if name not in before:
            assert torch.equal(parameter, everything[name]), name


@pytest.mark.parametrize("lora", [True, False])
def test_what_is_saved_scores_the_same_in_plain_transformers(
    make_trainer: Any, tiny_model: Path, tokenizer: Any, tmp_path: Path, lora: bool
) -> None:
    from peft import PeftModel

    trainer = make_trainer(lora=lora)
    trainer.train()
    rows = [pair["prompt_ids"] + pair[side] for pair in PAIRS for side in ("chosen_ids", "rejected_ids")]
    trained = score_rows(trainer.model, rows, tokenizer.pad_token_id)
    assert len(set(trained)) > len(PAIRS)
    trainer.save_model(str(tmp_path / "model"))

    place = tiny_model if lora else tmp_path / "model"
    plain = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=torch.float32)
    if lora:
        plain = PeftModel.from_pretrained(plain, tmp_path / "model")
    assert score_rows(plain, rows, tokenizer.pad_token_id) == trained
    loaded = models.load_reward_model(str(tmp_path / "model"), F32)
    assert score_rows(loaded, rows, tokenizer.pad_token_id) == trained

    # Folded into the weights the sums are rounded elsewhere; saved and loaded again, nothing changes any more.
    merged = models.merged(loaded)
    folded = score_rows(merged, rows, tokenizer.pad_token_id)
    assert folded == pytest.approx(trained, abs=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert score_rows(whole, rows, tokenizer.pad_token_id) == folded


def start_loss(trainer: Any) -> tuple[float, Any]:
    """Loss of the first batch with the score head at zero, and the batch."""
    for name, parameter in trainer.model.named_parameters():
        if ".score." in name:
            parameter.data.zero_()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(batch)).item(), batch


def test_with_a_zero_head_the_loss_is_log_2(make_trainer: Any) -> None:
    loss, batch = start_loss(make_trainer())
    assert "margin" not in batch
    assert loss == pytest.approx(math.log(2), abs=1e-6)


def test_the_margin_enters_the_loss(make_trainer: Any) -> None:
    """With equal rewards the loss is the mean of -log sigmoid(-margin) = log(1 + e^margin)."""
    loss, batch = start_loss(make_trainer(margin=True))
    margins = batch["margin"].tolist()
    assert len(set(margins)) == 4 and set(margins) <= {pair["margin"] for pair in PAIRS}
    assert loss == pytest.approx(sum(math.log1p(math.exp(m)) for m in margins) / 4, abs=1e-6)


def test_the_loss_is_bradley_terry_on_our_scores(make_trainer: Any, tokenizer: Any) -> None:
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    sizes = batch["attention_mask"].sum(1).tolist()
    rows = [ids[:size] for ids, size in zip(batch["input_ids"].tolist(), sizes, strict=True)]
    wanted = {tuple(p["prompt_ids"] + p[side]) for p in PAIRS for side in ("chosen_ids", "rejected_ids")}
    assert {tuple(row) for row in rows} <= wanted  # no token added, none cut
    scores = score_rows(trainer.model, rows, tokenizer.pad_token_id)
    gaps = [a - b for a, b in zip(scores[:4], scores[4:], strict=True)]
    assert loss == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 4, abs=1e-5)
