"""Probes are pure, do what their sentence says, and survive any text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.probes import EDITS, FLATTERY, PROBES, REFUSAL, answers_of_others, gibberish_only
from reward.records import user_prompt

# The same examples on every run, and no failure because a machine was busy.
deterministic = settings(derandomize=True, deadline=None)
PROMPT = user_prompt("Why does bread rise?", system="Be kind.")
ANSWER = "Yeast eats sugar. It makes gas!\nThe dough holds it."
CHANGE = {each.name: each.change for each in (*PROBES, *EDITS)}


def test_each_does_what_it_says() -> None:
    made = {name: change(PROMPT, ANSWER) for name, change in CHANGE.items()}
    assert made["empty"] == ""
    assert made["echo"] == "Why does bread rise?"
    assert made["repeated"] == f"{ANSWER}\n\n{ANSWER}"
    assert made["refusal"] == REFUSAL
    assert made["flattery"] == f"{ANSWER}\n\n{FLATTERY}"
    assert made["trailing space"] == ANSWER + " "
    assert made["final newline"] == ANSWER + "\n"
    assert made["markdown"].splitlines() == [
        "## Answer", "", "- **Yeast** eats sugar.", "- **It** makes gas!", "- **The** dough holds it.", "",
        "### Summary", "", "- **Done.**",
    ]  # fmt: skip


def test_gibberish_is_appended_words_of_no_language() -> None:
    made = CHANGE["gibberish"](PROMPT, ANSWER)
    assert made.startswith(ANSWER + " ")
    words = made[len(ANSWER) + 1 :].split(" ")
    assert len(words) == 30 and all(re.fullmatch("[a-z]{2,9}", word) for word in words)
    assert len(gibberish_only(PROMPT, ANSWER).split()) == len(ANSWER.split())


def test_gibberish_is_the_same_for_the_same_answer_and_another_for_another() -> None:
    change = CHANGE["gibberish"]
    assert change(PROMPT, ANSWER) == change(list(PROMPT), ANSWER)
    assert change(PROMPT, ANSWER)[-40:] != change(PROMPT, ANSWER + "x")[-40:]
    assert change(PROMPT, ANSWER)[-40:] != change(user_prompt("Else?"), ANSWER)[-40:]


def test_names_are_unique_and_kinds_are_the_two() -> None:
    assert len(CHANGE) == len(PROBES) + len(EDITS)
    kinds = {probe.name: probe.kind for probe in PROBES}
    assert [name for name, kind in kinds.items() if kind == "padding"] == ["flattery", "markdown"]
    assert set(kinds.values()) == {"empty of use", "padding"}
    assert all(each.sentence.endswith(".") for each in (*PROBES, *EDITS))


@deterministic
@given(st.text(), st.text())
def test_any_text_can_be_changed_twice_alike(asked: str, answer: str) -> None:
    prompt = [{"role": "user", "content": asked}]
    for name, change in CHANGE.items():
        made = change(prompt, answer)
        assert made == change(prompt, answer)
        if name in ("repeated", "gibberish", "flattery", "trailing space", "final newline"):
            assert made.startswith(answer) and len(made) > len(answer)
    assert gibberish_only(prompt, answer).strip()


@pytest.mark.parametrize("name", list(CHANGE))
def test_a_prompt_without_messages_is_no_accident(name: str) -> None:
    assert isinstance(CHANGE[name]([], "x"), str)


@deterministic
@given(st.integers(2, 50), st.integers(0, 1000))
def test_nobody_keeps_their_answer(count: int, seed: int) -> None:
    answers = [str(number) for number in range(count)]
    moved = answers_of_others(answers, seed)
    assert sorted(moved) == sorted(answers)
    assert all(one != other for one, other in zip(answers, moved, strict=True))
    assert moved == answers_of_others(answers, seed)


def test_another_seed_moves_them_elsewhere() -> None:
    answers = [str(number) for number in range(20)]
    assert len({tuple(answers_of_others(answers, seed)) for seed in range(9)}) == 9
