"""`align score`: every shape of line, a run folder or a model folder, and what is no input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.score import score_file
from reward.records import InputError, read_jsonl
from reward.scoring import score_rows
from tests.conftest import write_jsonl


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on hardware without bfloat16, whose rounding would hide what is compared here."""
    monkeypatch.setattr("align.models._cpu_has_bfloat16", lambda: False)


@pytest.fixture(scope="module")
def judge(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def plain(judge: Path, prompt: str, answer: str) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text + answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    (found,) = score_rows(model, [ids], tokenizer.pad_token_id)
    return found


def test_every_shape_of_line_gets_its_rewards(judge: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [
        {"prompt": "What is rain?", "completion": "Water.", "id": 7},
        {"prompt": [{"role": "user", "content": "What is rain?"}], "chosen": "Water.", "rejected": "Stone."},
        {"prompt": "What is rain?", "answers": ["Water.", {"text": "Stone."}]},
        {"messages": [{"role": "user", "content": "What is rain?"}, {"role": "assistant", "content": "Water."}]},
    ]
    file = write_jsonl(tmp_path / "answers.jsonl", rows)
    score_file(str(judge), file, tmp_path / "scored.jsonl")
    one, pair, several, messages = read_jsonl(tmp_path / "scored.jsonl")
    water, stone = (plain(judge, "What is rain?", answer) for answer in ("Water.", "Stone."))
    assert abs(water - stone) > 1e-3
    assert one == rows[0] | {"reward": pytest.approx(water, abs=1e-5)}
    assert (pair["chosen_reward"], pair["rejected_reward"]) == pytest.approx((water, stone), abs=1e-5)
    assert several["rewards"] == pytest.approx([water, stone], abs=1e-5)
    assert messages["reward"] == pytest.approx(water, abs=1e-5)

    capsys.readouterr()
    score_file(str(judge), file, None)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == read_jsonl(tmp_path / "scored.jsonl")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "no prompt"},
        {"prompt": "What?"},
        {"prompt": "What?", "answers": []},
        {"prompt": "What?", "chosen": "one side"},
        {"prompt": "What?", "completion": 7},
        {"messages": [{"role": "user", "content": "no answer"}]},
    ],
)
def test_a_line_without_anything_to_score_is_named(judge: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    good = {"prompt": "What?", "completion": "This."}
    file = write_jsonl(tmp_path / "answers.jsonl", [good, row])
    with pytest.raises(InputError, match=r"answers\.jsonl, line 2: nothing to score; wanted is a `prompt`"):
        score_file(str(judge), file, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_no_reward_model_is_refused(tiny_model: Path, judge: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "answers.jsonl", [{"prompt": "What?", "completion": "This."}])
    with pytest.raises(InputError, match="has no trained score head"):
        score_file(str(tiny_model), file, None)
    with pytest.raises(InputError, match=r"the reward model .* does not exist"):
        score_file(str(tmp_path / "none"), file, None)
    with pytest.raises(InputError, match=r"--out .* cannot be written"):
        score_file(str(judge), file, tmp_path / "none" / "out.jsonl")
