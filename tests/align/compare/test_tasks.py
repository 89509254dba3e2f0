"""Tasks with labels: files, choices by likelihood against plain forwards, figures by hand, and lm-eval."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.compare.tasks import (
    Task,
    chosen,
    flattened,
    load_task,
    measure_task,
    normalised,
    run_lm_eval,
    task_figure,
)
from align.data.render import prompt_ids
from reward.records import InputError, user_prompt


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for parameter in model.parameters():  # large weights, so that choices differ
        parameter.data *= 8 if parameter.ndim > 1 else 1
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "capitals.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


# Files


def test_a_file_with_choices(tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is rain wet?"}]
    rows = [
        {"prompt": "Is snow hot?", "label": "no", "choices": ["yes", "no"], "source": "rides along"},
        {"messages": talk, "label": "yes", "choices": ["no", "yes"]},
    ]
    task = load_task(written(tmp_path, *rows))
    assert task == Task("capitals", [user_prompt("Is snow hot?"), talk], ["no", "yes"], [["yes", "no"], ["no", "yes"]])
    assert task.has_classes
    rows[1]["choices"] = ["no", "yes", "perhaps"]
    assert not load_task(written(tmp_path, *rows)).has_classes


def test_a_file_without_choices(tmp_path):
    task = load_task(
        written(tmp_path, {"prompt": "2 + 2?", "label": "4"}, {"prompt": "3?", "label": "3", "choices": None})
    )
    assert (task.labels, task.choices, task.has_classes) == (["4", "3"], None, False)


GOOD = {"prompt": "Is it?", "label": "no", "choices": ["yes", "no"]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"label": "no"}, "neither `prompt` nor `messages`; the row has label"),
        ({"prompt": "Is it?"}, "`label` is None, but text is wanted"),
        ({**GOOD, "label": 1}, "`label` is 1, but text"),
        ({**GOOD, "label": " "}, "`label` is ' ', but text"),
        ({**GOOD, "label": "maybe"}, "the label 'maybe' is none of the choices yes, no"),
        ({**GOOD, "choices": "yes"}, "`choices` is 'yes', but a list"),
        ({**GOOD, "choices": ["no", 3]}, "but a list of texts"),
        ({**GOOD, "choices": ["no"]}, "two or more different"),
        ({**GOOD, "choices": ["no", "no"]}, "two or more different"),
        ({"prompt": "Is it?", "label": "no"}, "give all or none"),
        ({**GOOD, "prompt": ""}, "the prompt is empty"),
        ({**GOOD, "prompt": [{"role": "assistant", "content": "No."}]}, "must end with a user turn"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, says):
    path = written(tmp_path, GOOD, row)
    with pytest.raises(InputError) as raised:
        load_task(path)
    assert str(raised.value).startswith(f"{path}, line 2: ") and says in str(raised.value)


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_task(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is empty"):
        load_task(written(tmp_path))


# Choices


@torch.no_grad()
def textbook_choice(model: Any, tokenizer: Any, prompt: Any, choices: list[str]) -> str:
    """The rendered conversation up to its stop token, one row at a time, and the mean of the answer's log-softmax."""
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    means = []
    for choice in choices:
        start, answer = tokenizer(before)["input_ids"], tokenizer(f"{choice}<|im_end|>")["input_ids"]
        logprobs = torch.log_softmax(model(torch.tensor([start + answer])).logits[0], -1)
        means.append(sum(logprobs[len(start) + i - 1, token].item() for i, token in enumerate(answer)) / len(answer))
    return choices[max(range(len(choices)), key=means.__getitem__)]


def test_the_choice_is_the_likeliest_per_token(model, tokenizer):
    questions = [user_prompt(f"What is {thing}?") for thing in ("rain", "bread", "a river", "salt", "a clock", "wind")]
    choices = [["a bed", "a river, rather", "the moon", "music", "kind paper"][i % 3 :] for i in range(6)]
    task = Task("what", questions, [own[0] for own in choices], choices)
    wanted = [textbook_choice(model, tokenizer, *row) for row in zip(questions, choices, strict=True)]
    assert len(set(wanted)) > 1
    seen: list[int] = []
    assert chosen(task, model, tokenizer, batch_size=5, on_progress=seen.append) == wanted
    assert seen[-1] == sum(map(len, choices))
    assert chosen(task, model, tokenizer, batch_size=1) == wanted
    right = sum(a == b for a, b in zip(wanted, task.labels, strict=True))
    figure = measure_task(task, model, tokenizer, answer=_not_called)
    assert figure["accuracy"]["rate"] == pytest.approx(right / 6) and figure["f1"] is None
    same = Task("same", questions, ["yes"] * 6, [["yes", "no"]] * 6)
    assert measure_task(same, model, tokenizer, answer=_not_called)["f1"] is not None


def _not_called(ids: Any) -> Any:
    raise AssertionError("nothing is generated where there are choices")


def test_a_question_too_long_is_refused(model, tokenizer):
    task = Task("long", [user_prompt("rain " * 600)], ["yes"], [["yes", "no"]])
    with pytest.raises(InputError, match=r"task long has a question of \d+ tokens .* places for 512"):
        chosen(task, model, tokenizer)


# Free answers


def test_normalised_by_hand():
    assert normalised("  The  Nile. ") == normalised("the “nile”!") == "the nile"
    assert normalised("3.14") == "3.14" != normalised("314")
    assert normalised("-5") == "-5" != normalised("5")
    assert normalised("- 5") == normalised("(5)") == "5"
    assert normalised("don't") == "don't"
    assert normalised("?") == "?" != normalised("")
    assert normalised("Straße") == "strasse"


def test_free_answers_are_compared_as_text(model, tokenizer):
    task = Task(
        "river", [user_prompt("Which river?"), user_prompt("How many?"), user_prompt("Who?")], ["Nile", "3", "I"], None
    )
    asked: list[Any] = []

    def answer(ids: list[list[int]]) -> list[str]:
        asked.extend(ids)
        return ["nile.", "Three", "the I"]

    figure = measure_task(task, model, tokenizer, answer)
    assert asked == [prompt_ids(tokenizer, prompt) for prompt in task.prompts]
    assert figure["accuracy"]["rate"] == pytest.approx(1 / 3)
    assert (figure["f1"], figure["precision"], figure["recall"], figure["n"]) == (None, None, None, 3)


# Figures


def test_figures_by_hand():
    """a: precision 2/2, recall 2/3, F1 4/5. b: precision 1/2, recall 1, F1 2/3."""
    exact = binomtest(3, 4).proportion_ci(0.95)
    found = task_figure(["a", "a", "a", "b"], ["a", "a", "b", "b"])
    assert found["accuracy"] == {"rate": 0.75, "low": exact.low, "high": exact.high, "n": 4}
    assert found["precision"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_only_classes_among_the_labels_count():
    """Predicting c, which is no label, costs a its recall, and is no class of its own; b is never predicted: all 0."""
    found = task_figure(["a", "a", "b"], ["a", "c", "a"])
    assert found["precision"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["recall"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["f1"] == pytest.approx((1 / 2 + 0) / 2)


def test_figures_need_pairs():
    with pytest.raises(ValueError, match="0 labels"):
        task_figure([], [])
    with pytest.raises(ValueError, match="2 predictions"):
        task_figure(["a"], ["a", "b"])


# lm-eval


def test_lm_eval_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"compare.lm_eval names hellaswag, .*pip install lm-eval"):
        run_lm_eval(["hellaswag"], None, None)


def test_results_are_flattened():
    results = {
        "arc": {"alias": "arc", "sample_len": 20, "acc,none": 0.5, "acc_stderr,none": 0.1, "name": "arc"},
        "gsm": {"sample_len": 8, "exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A", "bleu,none": 3},
        "wiki": {"sample_len": 2, "perplexity,none": 9.0, "perplexity_stderr,none": math.nan},
    }
    found = flattened(results)
    assert list(found) == ["arc/acc", "gsm/exact_match (strict)", "gsm/bleu", "wiki/perplexity"]
    assert found["arc/acc"] == {
        "mean": 0.5,
        "low": pytest.approx(0.304, abs=1e-4),
        "high": pytest.approx(0.696, abs=1e-4),
        "standard_error": 0.1,
        "n": 20,
    }
    unknown = {"low": None, "high": None, "standard_error": None}
    assert found["gsm/exact_match (strict)"] == {"mean": 0.25, **unknown, "n": 8}
    assert found["wiki/perplexity"] == {"mean": 9.0, **unknown, "n": 2}


def test_lm_eval_on_a_task_of_ones_own(tmp_path, model, tokenizer):
    """Its accuracy is that of summed log-likelihoods of the choices after the question, row by row."""
    pytest.importorskip("lm_eval")
    rows = [{"number": number, "label": number % 2} for number in range(1, 11)]
    written(tmp_path, *rows)
    (tmp_path / "parity.yaml").write_text(
        f"""
task: parity_of_ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/capitals.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Is {{{{number}}}} even? Answer:"
doc_to_target: "{{{{label}}}}"
doc_to_choice: ["yes", "no"]
metric_list: [{{metric: acc}}]
"""
    )
    with pytest.raises(InputError, match=r"no task 'parity_of_our'; the nearest are parity_of_ours"):
        run_lm_eval(["parity_of_our"], model, tokenizer, folder=tmp_path)
    found = run_lm_eval(["parity_of_ours"], model, tokenizer, batch_size=4, folder=tmp_path)
    right = []
    for row in rows:
        question = f"Is {row['number']} even? Answer:"
        start = tokenizer(question)["input_ids"]
        sums = []
        for choice in ("yes", "no"):
            whole = tokenizer(f"{question} {choice}")["input_ids"]
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([whole])).logits[0], -1)
            sums.append(sum(logprobs[i - 1, whole[i]].item() for i in range(len(start), len(whole))))
        right.append(sums.index(max(sums)) == row["label"])
    assert found["parity_of_ours/acc"]["mean"] == pytest.approx(sum(right) / 10)
    assert found["parity_of_ours/acc"]["n"] == 10
    assert run_lm_eval(["parity_of_ours"], model, tokenizer, limit=3, folder=tmp_path)["parity_of_ours/acc"]["n"] == 3
    with pytest.raises(InputError, match="lm-eval cannot run hellaswag"):
        run_lm_eval(["hellaswag"], model, tokenizer, folder=tmp_path)
