"""Ensembles: several heads in training, a plain classifier with their mean on disk, all of them again when loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from align import models, reward_heads
from align.config import AdapterSection, ModelSection
from align.scorer import Scorer
from reward import score
from reward.elements import Labels
from reward.records import InputError
from reward.scoring import RewardScores, head_scores, score_rows
from reward.training import reward_trainer

F32 = ModelSection(dtype="float32")
ROWS = [[5, 6, 7 + i, 40 + i, 41] for i in range(6)]
PAIRS = [
    {"prompt_ids": [5, 6, 7 + i], "chosen_ids": [40 + i, 41, 2], "rejected_ids": [60, 61 + i, 62, 2]} for i in range(16)
]


def trained(tiny_model: Path, folder: Path, *, lora: bool, heads: int = 4) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = models.load_reward_base(str(tiny_model), F32, heads=heads)
    arguments = RewardConfig(
        output_dir=str(folder / "work"), max_steps=6, learning_rate=1e-2, per_device_train_batch_size=4, bf16=False,
        use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    keep = model.fresh_modules
    adapter = models.lora_config(AdapterSection(r=4), "SEQ_CLS", modules_to_save=keep) if lora else None
    trainer = reward_trainer(model, tokenizer, PAIRS, arguments, adapter, Labels(ensemble=heads))
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return trainer


@pytest.mark.parametrize("lora", [True, False])
def test_what_is_saved_is_the_mean_in_plain_transformers_and_all_heads_here(
    tiny_model: Path, tmp_path: Path, lora: bool
) -> None:
    trainer = trained(tiny_model, tmp_path, lora=lora)
    wanted = head_scores(trainer.model, [{"input_ids": row} for row in ROWS], 0)
    assert wanted.shape == (6, 4) and wanted.std(axis=1).min() > 0
    reward_heads.split(tmp_path / "model")

    place = tiny_model if lora else tmp_path / "model"
    plain = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=torch.float32)
    if lora:
        plain = PeftModel.from_pretrained(plain, tmp_path / "model")
    assert score_rows(plain, ROWS, 0) == pytest.approx(wanted.mean(axis=1).tolist(), abs=1e-6)
    assert score_rows(plain.merge_and_unload() if lora else plain, ROWS, 0) == pytest.approx(
        wanted.mean(axis=1).tolist(), abs=1e-5
    )

    loaded = models.load_reward_model(str(tmp_path / "model"), F32)
    assert np.array_equal(head_scores(loaded, [{"input_ids": row} for row in ROWS], 0), wanted)


def test_heads_differ_and_agree_more_where_they_were_trained(tiny_model: Path, tmp_path: Path) -> None:
    trainer = trained(tiny_model, tmp_path, lora=True)
    entry = next(e for e in trainer.state.log_history if "spread" in e)
    assert entry["spread"] > 0 and 0 <= entry["accuracy"] <= 1


def test_one_head_has_no_file_beside_it(tiny_model: Path, tmp_path: Path) -> None:
    trained(tiny_model, tmp_path, lora=True, heads=1)
    with pytest.raises(InputError, match="no score head with several outputs"):
        reward_heads.split(tmp_path / "model")
    model = models.load_reward_model(str(tmp_path / "model"), F32)
    assert reward_heads.restore(model, tmp_path / "model") == 1


def test_heads_of_another_model_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained(tiny_model, tmp_path, lora=True, heads=1)
    save_file({"weight": torch.zeros(4, 7)}, tmp_path / "model" / reward_heads.HEADS)
    with pytest.raises(InputError, match=r"heads\.safetensors does not fit its model"):
        models.load_reward_model(str(tmp_path / "model"), F32)


def test_the_reader_scores_texts_with_mean_and_spread(tiny_model: Path, tmp_path: Path) -> None:
    trained(tiny_model, tmp_path, lora=True)
    reward_heads.split(tmp_path / "model")
    reader = Scorer.load(tmp_path / "model", dtype=torch.float32)
    prompts = [[{"role": "user", "content": f"What is rain? ({i})"}] for i in range(3)]
    found = score(reader, prompts, ["Water.", "Wet.", "Wet."])
    assert found.per_head.shape == (3, 4) and found.mean == pytest.approx(found.per_head.mean(axis=1))
    assert found.std == pytest.approx(found.per_head.std(axis=1, ddof=1))
    again = score(reader, prompts[::-1], ["Wet.", "Wet.", "Water."], batch_size=1)
    assert again.mean[::-1] == pytest.approx(found.mean, abs=1e-5)
    with pytest.raises(ValueError, match="3 prompts and 1 answers"):
        score(reader, prompts, ["Water."])


def test_what_is_climbed() -> None:
    scores = RewardScores.of(np.array([[1.0, 3.0], [2.0, 2.0]]))
    assert scores.aggregated("mean").tolist() == [2.0, 2.0]
    assert scores.aggregated("min").tolist() == [1.0, 2.0]
    assert scores.aggregated("lcb", 2.0).tolist() == pytest.approx([2 - 2 * 2**0.5, 2.0])
    one = RewardScores.of(np.array([[1.5], [2.5]]))
    assert one.aggregated("lcb").tolist() == one.aggregated("min").tolist() == [1.5, 2.5]


def test_a_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(InputError, match="a Linear has no linear score head"):
        reward_heads.head_place(torch.nn.Linear(2, 2))


def test_an_encoder_trains_with_its_own_tokens_and_comes_back(tmp_path: Path) -> None:
    """A tiny random BERT: two texts, token types, a pooler that came from no file and is trained whole."""
    from tests.reward.encoders import make_tiny_bert

    base = make_tiny_bert(tmp_path / "bert")
    model = models.load_reward_base(str(base), F32, heads=2)
    assert model.fresh_modules == ["classifier"]
    tokenizer = models.load_reward_tokenizer(str(base))
    scorer = Scorer(model, tokenizer, "bert", max_length=64)
    assert scorer.is_encoder
    row, border = scorer.row("what is rain", "water"), scorer.border("what is rain", "water")
    assert row["token_type_ids"] == [int(place >= border) for place in range(len(row["input_ids"]))]
    with pytest.raises(InputError, match="has max_length 65, but the model takes 64 tokens"):
        Scorer(model, tokenizer, "bert", max_length=65)
