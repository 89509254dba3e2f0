"""Active selection: what a reward model is unsure of, by hand, and the order in which people are then asked."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.scorer import Scorer
from align.uncertainty import prioritise, uncertainty
from labeling_ui.store import LabelStore, Settings
from reward import score


def test_one_head_is_undecided_and_several_disagree() -> None:
    assert uncertainty(np.array([[2.0], [2.0]])) == pytest.approx(0.5)
    p = 1 / (1 + math.exp(-1.5))
    assert uncertainty(np.array([[1.5], [0.0]])) == pytest.approx(math.sqrt(p * (1 - p)))
    # Two heads that are both undecided agree; two that are sure of opposite sides do not.
    assert uncertainty(np.array([[2.0, 2.0], [2.0, 2.0]])) == 0.0
    assert uncertainty(np.array([[30.0, -30.0], [0.0, 0.0]])) == pytest.approx(0.5)
    # Of three answers, the least certain pair counts.
    sure, unsure = [20.0], [0.1]
    assert uncertainty(np.array([sure, unsure, [0.0]])) == pytest.approx(uncertainty(np.array([unsure, [0.0]])))
    assert uncertainty(np.array([[1.0]])) == 0.0  # nothing to order


def test_items_come_by_uncertainty(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.score.weight.data.normal_(0, 3)
    model.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "judge")
    words = ["rain", "bread", "a river", "music", "the moon", "salt", "paper", "winter"]
    comparisons = [
        {
            "id": f"c{number}",
            "prompt": [{"role": "user", "content": f"What is {word}?"}],
            "split": "train",
            "answers": [{"text": f"{word} is fine"}, {"text": f"nobody knows {number}"}],
        }
        for number, word in enumerate(words)
    ]
    reader = Scorer.load(tmp_path / "judge")
    wanted = {}
    for comparison in comparisons:
        answers = [answer["text"] for answer in comparison["answers"]]
        wanted[comparison["id"]] = uncertainty(score(reader, [comparison["prompt"]] * 2, answers).per_head)
    assert len(set(wanted.values())) == len(wanted)

    from labeling_ui.assignment import Assigner

    with LabelStore(tmp_path / "labels.sqlite") as store:
        project = store.create_project(
            "p", settings=Settings(overlap=1, policy="active", random_share=0.0, gold_share=0.0)
        )
        store.add_items(project, comparisons)
        assert prioritise(store, project, str(tmp_path / "judge")) == len(words)
        assigner, came = Assigner(store, project), []
        for number in range(len(words)):
            lease = assigner.next(f"a{number}")
            assert lease is not None
            came.append(lease.item.comparison_id)
    assert came == sorted(wanted, key=lambda name: -wanted[name])
