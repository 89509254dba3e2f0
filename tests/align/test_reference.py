"""Reference log-probabilities: the model's own, computed once, and known again by what they are of."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from align import reference
from align.logprobs import Pair, answer_logprobs
from align.reference import reference_logprobs, weights_digest

ROWS: list[tuple[Pair, Pair]] = [
    (([5, 6, 7], [8, 9]), ([5, 6, 7], [10])),
    (([11, 12], [13, 14, 15]), ([11, 12], [16, 17, 18, 19])),
    (([20], [21]), ([20], [22])),
]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Pair]:
    """The pairs that really passed through a model."""
    pairs: list[Pair] = []

    def counting(model: Any, given: Any, *rest: Any, **how: Any) -> Any:
        pairs.extend(given)
        return answer_logprobs(model, given, *rest, **how)

    monkeypatch.setattr(reference, "answer_logprobs", counting)
    return pairs


def assert_right(found: list[tuple[float, float]], model: Any, rows: list[tuple[Pair, Pair]]) -> None:
    for row, sums in zip(rows, found, strict=True):
        for (prompt, answer), total in zip(row, sums, strict=True):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            wanted = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum()
            assert total == pytest.approx(float(wanted), abs=1e-4)


def test_computed_once_and_only_what_is_new(model: Any, computed: list[Pair]) -> None:
    first = reference_logprobs(model, ROWS[:2], 0)
    assert_right(first, model, ROWS[:2])
    assert sorted(computed) == sorted(pair for row in ROWS[:2] for pair in row)
    computed.clear()
    again = reference_logprobs(copy.deepcopy(model), ROWS[::-1], 0)
    assert again[::-1][:2] == first
    assert sorted(computed) == sorted(ROWS[2])
    assert_right(again, model, ROWS[::-1])


def test_other_weights_are_another_reference(model: Any, computed: list[Pair]) -> None:
    reference_logprobs(model, ROWS, 0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1e-3
    computed.clear()
    reference_logprobs(other, ROWS, 0)
    assert len(computed) == 6
    assert weights_digest(model) != weights_digest(other) != weights_digest(model.to(torch.bfloat16))


def test_an_adapter_is_off_and_not_part_of_the_key(model: Any, computed: list[Pair]) -> None:
    wanted = reference_logprobs(model, ROWS, 0)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert weights_digest(adapted) == weights_digest(model)
    computed.clear()
    assert reference_logprobs(adapted, ROWS, 0) == wanted and not computed
    for path in (Path(reference.models.cache_folder()) / "reference-logprobs").iterdir():
        path.unlink()
    again = reference_logprobs(adapted, ROWS, 0)
    torch.testing.assert_close(torch.tensor(again), torch.tensor(wanted), atol=1e-4, rtol=0)
    assert len(computed) == 6


@pytest.mark.parametrize("damage", ["", "[1, 2]", '{"a": "b"}', '{"a": 1'])
def test_a_damaged_file_is_computed_again(model: Any, damage: str, computed: list[Pair]) -> None:
    wanted = reference_logprobs(model, ROWS, 0)
    (path,) = (Path(reference.models.cache_folder()) / "reference-logprobs").iterdir()
    path.write_text(damage)
    computed.clear()
    assert reference_logprobs(model, ROWS, 0) == wanted and len(computed) == 6
    assert len(json.loads(path.read_text())) == 6
    assert [p.suffix for p in path.parent.iterdir()] == [".json"]


def test_a_cache_that_cannot_be_written_is_said_and_costs_nothing_else(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = reference_logprobs(model, ROWS, 0)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "file"))
    assert reference_logprobs(model, ROWS, 0) == wanted
    printed = capsys.readouterr()
    assert "not kept for the next run" in printed.out + printed.err
