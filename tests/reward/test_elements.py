"""Elements of reward training: what labels say, the loss of all pairs of a prompt from one pass over its answers."""

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
from align.reward_heads import widen
from reward.elements import Labels, collate, elements_of
from reward.losses import preference_loss
from reward.records import InputError
from reward.scoring import score_rows
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


GROUPED = Labels(margin=True, group_pairs=True)


def test_every_answer_of_a_prompt_is_one_row() -> None:
    first, second = elements_of(ROWS, GROUPED)
    assert first == {
        "answers": [[5, 6, 8], [5, 6, 9], [5, 6, 10, 11]],
        "prompt_sizes": [2, 2, 2],
        "pairs": [[0, 1], [1, 2], [0, 2]],
        "outcomes": [[1.0, 0.0, 0.0]] * 3,
        "margins": [0.5, 1.0, 2.0],
        "weights": [1.0, 1.0, 1.0],
        "draws": [1.0],
    }
    assert second["answers"] == [[7, 8], [7, 12]] and second["pairs"] == [[0, 1]] and second["margins"] == [0.0]
    assert elements_of(ROWS, Labels(group_pairs=True))[0]["margins"] == [0.0, 0.0, 0.0]
    alone = elements_of(ROWS, Labels())
    assert [element["pairs"] for element in alone] == [[[0, 1]]] * 4
    assert [element["answers"][0] for element in alone] == [[*r["prompt_ids"], *r["chosen_ids"]] for r in ROWS]


def test_what_a_label_says() -> None:
    rows = [row([1], [2], [3]) | {"weight": 0.75}, row([1], [4], [5]) | {"weight": 1.0}]
    tie = row([1], [6], [7]) | {"tied": True, "weight": 0.5, "margin": 3.0}
    found = [e["outcomes"][0] for e in elements_of([*rows, tie], Labels(disagreement="soft", label_smoothing=0.1))]
    assert found == [pytest.approx([0.7, 0, 0.3]), pytest.approx([0.9, 0, 0.1]), [0, 1, 0]]
    weighed = elements_of([*rows, tie], Labels(disagreement="weight", margin=True))
    assert [e["weights"][0] for e in weighed] == pytest.approx([0.75 * 12 / 11, 12 / 11, 12 / 11])  # mean 1
    assert weighed[2]["margins"] == [0.0]
    assert [e["outcomes"][0] for e in weighed] == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_every_head_counts_a_prompt_its_own_way_and_all_its_pairs_alike() -> None:
    rows = [row([prompt], [2], [3 + pair]) for prompt in range(400) for pair in range(2)]
    labels = Labels(ensemble=3, seed=7)
    draws = [element["draws"] for element in elements_of(rows, labels)]
    assert draws[0::2] == draws[1::2] and len({tuple(draw) for draw in draws}) == 400
    means = [sum(draw[head] for draw in draws) / len(draws) for head in range(3)]
    assert means == pytest.approx([1, 1, 1], abs=0.15)  # exponential: 400 draws have a standard error of 0.05
    assert draws != [element["draws"] for element in elements_of(rows, Labels(ensemble=3, seed=8))]
    assert draws == [element["draws"] for element in elements_of(rows, labels)]


@pytest.mark.parametrize(
    ("rows", "said"), [([], "there are no pairs"), ([ROWS[0] | {"tied": True}], "all 1 pairs are ties")]
)
def test_nothing_to_learn_from_is_refused(rows: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=f"{said}: a reward model learns from preferences"):
        elements_of(rows, Labels(ties="davidson"))


def test_a_batch() -> None:
    batch = collate(elements_of(ROWS, GROUPED), pad_id=3, segments=True)
    assert batch["input_ids"].tolist() == [[5, 6, 8, 3], [5, 6, 9, 3], [5, 6, 10, 11], [7, 8, 3, 3], [7, 12, 3, 3]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 3, 4, 2, 2]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 0]] * 2 + [[0, 0, 1, 1]] + [[0, 1, 0, 0]] * 2
    assert batch["pairs"].tolist() == [[0, 1], [1, 2], [0, 2], [3, 4]]
    assert batch["weights"].tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert batch["draws"].tolist() == [[1.0]] * 4


def test_the_loss_by_hand() -> None:
    reward = torch.tensor([[2.0], [0.5], [-1.0]], requires_grad=True)
    pairs, margins = torch.tensor([[0, 1], [1, 2]]), torch.tensor([0.0, 1.0])
    own = {"margin_P": margins, "weight_P": torch.tensor([0.5, 0.5]), "draw_PM": torch.ones(2, 1)}
    outcomes = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    wanted = 0.5 * math.log(1 + math.exp(-1.5)) + 0.5 * math.log(1 + math.exp(-0.5))
    assert float(preference_loss(reward, pairs, outcomes, **own)) == pytest.approx(wanted, abs=1e-6)
    centred = preference_loss(reward, pairs, outcomes, **own, center_rewards_coefficient=0.1)
    assert float(centred) == pytest.approx(wanted + 0.1 * (0.5 * 2.5**2 + 0.5 * 0.5**2), abs=1e-6)
    centred.backward()
    assert reward.grad is not None and reward.grad.abs().min() > 0


def trainer(tiny_model: Path, tmp_path: Path, **how: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    if how.get("ensemble", 1) > 1:
        widen(model, how["ensemble"])
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
    rows = how.pop("rows", ROWS)
    return reward_trainer(model, tokenizer, rows, config, adapter, Labels(**({"margin": True} | how)))


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_single_pairs_train_as_trl_trains_them(tiny_model: Path, tmp_path: Path) -> None:
    """Where every prompt has one pair, the K-wise loss is Bradley-Terry's over a batch of pairs: TRL is the oracle."""
    rows = [row([20 + i, 6], [8 + i], [30, 31 + i], 0.3 * i) for i in range(4)]
    plain, grouped = (losses(trainer(tiny_model, tmp_path, rows=rows, group_pairs=g)) for g in (False, True))
    assert len(plain) == 3 and grouped == pytest.approx(plain, abs=1e-5)
    # A weight of one, soft or not, and ties that there are none of, change nothing either.
    sure = [row | {"weight": 1.0} for row in rows]
    for how in ({"disagreement": "soft"}, {"disagreement": "weight"}, {"ties": "davidson"}):
        assert losses(trainer(tiny_model, tmp_path, rows=sure, **how)) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("ties", ["davidson", "rao-kupper"])
def test_ties_are_learned_as_ties(tiny_model: Path, tmp_path: Path, ties: str) -> None:
    """Three ties of the same two answers beside other pairs: their gap shrinks, whichever side they stand on."""
    tied = [row([5, 6], [8], [10, 11]) | {"tied": True}, row([5, 6], [10, 11], [8]) | {"tied": True}]
    other = row([7], [8], [12])
    gaps = []
    for rows in ([other, other], [other, *tied]):
        made = trainer(tiny_model, tmp_path, rows=rows, ties=ties, margin=False)
        before = score_rows(made.model, [[5, 6, 8], [5, 6, 10, 11]], 0)
        made.train()
        after = score_rows(made.model, [[5, 6, 8], [5, 6, 10, 11]], 0)
        gaps.append(abs(after[0] - after[1]) - abs(before[0] - before[1]))
    assert gaps[1] < gaps[0]


def test_groups_train_with_and_without_shared_prefixes(tiny_model: Path, tmp_path: Path) -> None:
    plain = trainer(tiny_model, tmp_path, group_pairs=True)
    shared = trainer(tiny_model, tmp_path, group_pairs=True)
    assert share_prefixes(shared.model) is None
    first, second = losses(plain), losses(shared)
    assert second == pytest.approx(first, abs=1e-5) and first[-1] < first[0]
    entry = plain.state.log_history[0]
    assert entry["pairs"] == 4 and 0 <= entry["accuracy"] <= 1 and "margin" in entry
