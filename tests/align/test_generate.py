"""Answers are the model's own, cut at the stop token, and the same again after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.config import GenerationSection
from align.data.render import prompt_ids
from align.decode import Drawn
from align.generate import Answer, Partial, batches, generate, generate_batch, sample_together
from reward.records import user_prompt

QUESTIONS = [
    "Why?",
    "What is rain, and why do people like it so much in winter?",
    "Tell me about salt.",
    "Hi",
    "The moon.",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    """The tiny model with larger weights and a head of its own: clear preferences that change from token to token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    torch.manual_seed(3)
    head = model.get_output_embeddings().weight
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn_like(head) * 0.25)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "lm_head" not in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    return [prompt_ids(tokenizer, user_prompt(question)) for question in QUESTIONS]


def collect(*arguments: Any, **options: Any) -> list[tuple[list[int], list[Answer]]]:
    return list(generate(*arguments, **options))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_answers_equal_the_librarys_one_by_one(
    model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int
) -> None:
    section = GenerationSection(temperature=0, max_new_tokens=20, batch_size=batch_size)
    found = {
        i: a
        for indices, answers in collect(model, tokenizer, prompts, section, "s")
        for i, a in zip(indices, answers, strict=True)
    }
    assert sorted(found) == list(range(len(prompts)))
    for index, prompt in enumerate(prompts):
        wanted = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[0, len(prompt) :]
        assert found[index].ids == wanted.tolist()
        assert found[index].finished == (wanted[-1].item() == tokenizer.eos_token_id)
        assert found[index].text == tokenizer.decode(wanted, skip_special_tokens=True).strip()


def test_the_same_seed_gives_the_same_answers_whole_or_resumed(
    model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    section = GenerationSection(max_new_tokens=8, batch_size=2)
    first = collect(model, tokenizer, prompts, section, "seed")
    assert len(first) == 3
    torch.rand(17)  # whatever was drawn before does not matter
    assert collect(model, tokenizer, prompts, section, "seed") == first
    assert collect(model, tokenizer, prompts, section, "seed", numbers=[2, 0]) == [first[2], first[0]]
    assert collect(model, tokenizer, prompts, section, "other seed") != first


def test_equal_prompts_get_different_answers(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    section = GenerationSection(max_new_tokens=8, batch_size=3)
    answers = [a.text for _, found in collect(model, tokenizer, [prompts[0]] * 6, section, "seed") for a in found]
    assert len(set(answers)) > 3


def test_batches_are_longest_first_and_stable() -> None:
    assert batches([[1], [1, 2, 3], [4], [1, 2]], 2) == [[1, 3], [0, 2]]
    assert batches([], 2) == []


# The distribution


def first_tokens(model: Any, tokenizer: Any, prompt: list[int], count: int, **how: Any) -> np.ndarray:
    section = GenerationSection(max_new_tokens=1, batch_size=500, **how)
    found = collect(model, tokenizer, [prompt] * count, section, "distribution")
    tokens = [answer.ids[0] for _, answers in found for answer in answers]
    assert len(tokens) == count
    return np.bincount(tokens, minlength=model.config.vocab_size)


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Of the chi-square test, with rare tokens (fewer than 5 expected) counted together."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    seen = [*counts[common], counts[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    if wanted[-1] == 0:
        assert seen[-1] == 0
        seen, wanted = seen[:-1], wanted[:-1]
    return float(chisquare(seen, np.array(wanted) * sum(seen) / sum(wanted)).pvalue)


@torch.no_grad()
def probabilities(model: Any, prompt: list[int], temperature: float = 1.0) -> np.ndarray:
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature
    return torch.softmax(logits, -1).numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_models_probabilities(
    model: Any, tokenizer: Any, prompts: list[list[int]], temperature: float
) -> None:
    counts = first_tokens(model, tokenizer, prompts[0], 4000, temperature=temperature)
    assert p_value(counts, probabilities(model, prompts[0], temperature)) > 0.01
    # and the test can tell: another temperature is refuted
    assert p_value(counts, probabilities(model, prompts[0], temperature * 1.4)) < 1e-6


def test_top_k_and_top_p_keep_the_likeliest(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    likely = np.argsort(-probabilities(model, prompts[0]))
    counts = first_tokens(model, tokenizer, prompts[0], 500, top_k=5)
    assert set(np.flatnonzero(counts)) <= set(likely[:5])
    share = np.cumsum(np.sort(probabilities(model, prompts[0]))[::-1])
    counts = first_tokens(model, tokenizer, prompts[0], 500, top_p=0.3)
    assert set(np.flatnonzero(counts)) <= set(likely[: int(np.searchsorted(share, 0.3)) + 1])


@pytest.mark.parametrize(
    "habit",
    [
        {"repetition_penalty": 9.0},
        {"top_k": 3, "top_p": 0.2, "temperature": 0.1, "do_sample": True},
        {"typical_p": 0.2, "do_sample": True},
        {"min_p": 0.5, "do_sample": True},
        {"epsilon_cutoff": 0.05, "do_sample": True},
        {"suppress_tokens": list(range(100, 200))},
        {"begin_suppress_tokens": list(range(100, 200))},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 2},
    ],
    ids=lambda habit: next(iter(habit)),
)
def test_a_models_own_generation_config_does_not_bend_the_distribution(
    model: Any, tokenizer: Any, prompts: list[list[int]], habit: dict[str, Any]
) -> None:
    """Log-probabilities, KL and PPO's ratio are those of the plain softmax; samples have to be too."""
    section = GenerationSection(max_new_tokens=20, batch_size=3)
    wanted = collect(model, tokenizer, prompts, section, "seed")
    for key, value in habit.items():
        setattr(model.generation_config, key, value)
    assert collect(model, tokenizer, prompts, section, "seed") == wanted


def test_an_answer_stops_at_the_tokenizers_token_and_the_generation_configs(
    model: Any, tokenizer: Any, prompts: list[list[int]]
) -> None:
    model.generation_config.eos_token_id = [7, 8, 9, 10**6]
    model.generation_config.pad_token_id = None
    stops = {7, 8, 9, tokenizer.eos_token_id}
    section = GenerationSection(max_new_tokens=60, batch_size=5)
    answers = [a for _, found in collect(model, tokenizer, prompts * 8, section, "seed") for a in found]
    assert {answer.ids[-1] for answer in answers if answer.finished} == stops
    for answer in answers:
        assert answer.finished == (answer.ids[-1] in stops)
        assert answer.finished or len(answer.ids) == 60
        assert not stops & set(answer.ids[:-1])


# Answers


def test_the_text_is_without_special_tokens_and_outer_space(
    tokenizer: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = tokenizer.eos_token_id
    text = tokenizer(" The moon.\n", add_special_tokens=False)["input_ids"]
    drawn = [Drawn([*text, stop], [0.0] * (len(text) + 1), True), Drawn([stop], [0.0], True), Drawn(text, [], False)]
    monkeypatch.setattr("align.generate.draw", lambda *arguments, **options: drawn)
    model = SimpleNamespace(generation_config=None)
    assert generate_batch(model, tokenizer, prompts[:3], GenerationSection()) == [
        Answer([*text, stop], "The moon.", True),
        Answer([stop], "", True),
        Answer(text, "The moon.", False),
    ]


def test_partial_batches_survive_a_kill(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "p")
    partial.add(4, [["é"]])
    partial.add(0, [["b"]])
    cut = json.dumps([7, [["é"]]], ensure_ascii=False).encode()
    with (tmp_path / "p" / "0.jsonl").open("ab") as out:
        out.write(b"\n" + cut[:8])  # in the middle of a letter
    again = Partial(tmp_path / "p")
    assert again.batches == {4: [["é"]], 0: [["b"]]}
    again.add(2, [["c"]])
    with (tmp_path / "p" / "0.jsonl").open("ab") as out:
        out.write(b"\n" + cut[:-1])
    assert Partial(tmp_path / "p").batches == {4: [["é"]], 0: [["b"]], 2: [["c"]]}


def test_what_other_processes_sampled_is_not_sampled_again(
    model: Any, tokenizer: Any, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted on three processes and resumed on one, where nothing is left to do at the end."""
    section = GenerationSection(max_new_tokens=8, batch_size=1)
    loads: list[int] = []

    def sampled(folder: str) -> list[Answer]:
        def load() -> Any:
            loads.append(1)
            return model

        return sample_together(load, tokenizer, prompts, section, "seed", tmp_path / folder, "sampling")

    wanted = sampled("one")
    answers = {
        i: a
        for indices, found in collect(model, tokenizer, prompts, section, "seed")
        for i, a in zip(indices, found, strict=True)
    }
    assert wanted == [answers[i] for i in range(len(prompts))] and len(loads) == 1
    for rank, numbers in ((2, [2]), (1, [1, 4])):
        monkeypatch.setenv("RANK", str(rank))
        partial = Partial(tmp_path / "several")
        for number in numbers:
            ((index,), (answer,)) = next(generate(model, tokenizer, prompts, section, "seed", [number]))
            partial.add(number, [[index, answer.ids, answer.text, answer.finished]])
    monkeypatch.setenv("RANK", "0")
    assert sampled("several") == wanted and len(loads) == 2
    own = [json.loads(line)[0] for line in (tmp_path / "several/0.jsonl").read_text("utf-8").splitlines() if line]
    assert own == [0, 3]
    assert sampled("several") == wanted and len(loads) == 2
