"""Further rows are marked, come of the train side alone, and bring no test prompt with them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config_data import AugmentSection
from align.data.prepare.augment import augmented
from reward.records import InputError, Record, assistant_answer, prompt_id, user_prompt

SWAP = AugmentSection(swap=True)
TEMPLATES = ["Please answer: {prompt}", "{prompt}\n\nThink first."]
ALL = AugmentSection(templates=TEMPLATES, share=1)


def pair(text: str, split: str = "train", **more: Any) -> Record:
    both = {"chosen": assistant_answer("a"), "rejected": assistant_answer("b")}
    return {"prompt": user_prompt(text), **both, "split": split, **more}


def row(text: str, split: str = "train", **more: Any) -> Record:
    return {"prompt": user_prompt(text), "completion": assistant_answer("a"), "split": split, **more}


def test_a_swap_turns_the_order_round_and_nothing_else() -> None:
    first, second = pair("p", chosen_index=0, annotator="ann"), pair("q", chosen_index=1)
    made = [*augmented([first, second, pair("r", "test", chosen_index=0)], "preference", SWAP, 0)]
    marks = [{"augmented": "swap", "augmented_from": prompt_id(each["prompt"])} for each in (first, second)]
    assert made == [{**first, "chosen_index": 1, **marks[0]}, {**second, "chosen_index": 0, **marks[1]}]
    assert first["chosen_index"] == 0  # the row that went in is as it was


def test_two_swaps_are_none() -> None:
    once = [*augmented([pair("p", chosen_index=0)], "preference", SWAP, 0)]
    assert next(augmented(once, "preference", SWAP, 0))["chosen_index"] == 0


@pytest.mark.parametrize("order", [{}, {"chosen_index": None}, {"chosen_index": 2}, {"chosen_index": True}])
def test_a_pair_without_an_order_cannot_be_turned_round(order: Record) -> None:
    with pytest.raises(InputError, match=r"swap turns round .* chosen_index (None|2|True), .* leave swap out"):
        list(augmented([pair("p", **order)], "preference", SWAP, 0))


def test_demonstrations_have_no_order_to_turn_round() -> None:
    assert list(augmented([row("p")], "demonstration", SWAP, 0)) == []


def test_a_paraphrase_changes_the_last_user_turn_alone() -> None:
    turns = [*user_prompt("one {x}", system="s"), *assistant_answer("two"), *user_prompt("three {x}")]
    given = {**row(""), "prompt": turns, "id": "7", "source": "s"}
    (made,) = augmented([given], "demonstration", AugmentSection(templates=TEMPLATES[:1], share=1), 0)
    assert made["prompt"] == [*turns[:-1], *user_prompt("Please answer: three {x}")]
    assert made == {
        **given,
        "prompt": made["prompt"],
        "id": "7-paraphrase-1",
        "augmented": "paraphrase 1",
        "augmented_from": prompt_id(turns),
    }


def test_a_tool_may_have_the_last_word_and_without_a_user_there_is_none() -> None:
    tool = {"role": "tool", "content": "12:30"}
    (made,) = augmented([{**row(""), "prompt": [*user_prompt("time?"), tool]}], "demonstration", ALL, 0)
    assert made["prompt"][1] == tool and "time?" in made["prompt"][0]["content"] != "time?"
    assert list(augmented([{**row(""), "prompt": [tool]}], "demonstration", ALL, 0)) == []


def test_a_paraphrase_that_is_another_rows_prompt_is_left_out() -> None:
    section = AugmentSection(templates=TEMPLATES[:1], share=1)
    for side in ("test", "train"):
        rows = [row("p"), row("please ANSWER: p ", side)]  # the same prompt by its id
        made = [each["prompt"][0]["content"] for each in augmented(rows, "demonstration", section, 0)]
        assert "Please answer: p" not in made


@settings(derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["p", "q", "Please answer: p", "Please answer: Please answer: p"]), st.booleans())
    )
)
def test_no_prompt_of_the_test_side_comes_out(drawn: list[tuple[str, bool]]) -> None:
    sides: dict[str, str] = {}
    rows = [pair(text, sides.setdefault(text, "test" if test else "train"), chosen_index=0) for text, test in drawn]
    made = [*augmented(rows, "preference", AugmentSection(swap=True, templates=TEMPLATES, share=1), 0)]
    held_out = {prompt_id(each["prompt"]) for each in rows if each["split"] == "test"}
    assert all(each["split"] == "train" and each["augmented"] for each in made)
    assert not held_out & {prompt_id(each["prompt"]) for each in made}
    assert not held_out & {each["augmented_from"] for each in made}


def test_the_share_is_drawn_by_the_prompt_and_the_seed() -> None:
    """Of 2,000 prompts a tenth: 200, give or take 4 standard deviations of 13.4. Order changes nothing."""
    rows = [row(f"question {n}") for n in range(2000)]
    section = AugmentSection(templates=TEMPLATES, share=0.1)
    made = [*augmented(rows, "demonstration", section, 0)]
    assert 146 < len(made) < 254
    marks = [each["augmented"] for each in made]
    assert 60 < marks.count("paraphrase 1") < len(made) - 60 and set(marks) == {"paraphrase 1", "paraphrase 2"}
    again = [*augmented(reversed(rows), "demonstration", section, 0)]
    assert sorted(each["augmented_from"] for each in again) == sorted(each["augmented_from"] for each in made)
    assert {each["augmented_from"] for each in augmented(rows, "demonstration", section, 1)} != {
        each["augmented_from"] for each in made
    }
    more = {
        each["augmented_from"]
        for each in augmented(rows, "demonstration", AugmentSection(templates=TEMPLATES, share=0.3), 0)
    }
    assert more > {each["augmented_from"] for each in made}


def test_rows_of_one_prompt_stay_together() -> None:
    rows = [{**row("p"), "completion": assistant_answer(text)} for text in "abc"]
    prompts = [each["prompt"] for each in augmented(rows, "demonstration", ALL, 0)]
    assert len(prompts) == 3 and all(prompt == prompts[0] for prompt in prompts)


def test_nothing_is_made_where_nothing_is_asked_for() -> None:
    assert list(augmented(iter([pair("p", chosen_index=0), row("q")]), "preference", AugmentSection(), 0)) == []
