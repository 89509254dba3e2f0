"""The floors learn from the train records alone and are silent where their rule says nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reward.baselines import baselines, length_only, position_only, words_only
from reward.records import InputError, assistant_answer, user_prompt


def pair(chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt": user_prompt("What is rain?"),
        "chosen": assistant_answer(chosen),
        "rejected": assistant_answer(rejected),
        "comparison_id": "c1",
        **more,
    }


def swapped(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "chosen": record["rejected"], "rejected": record["chosen"]}


LONGER = [pair("a long answer", "short"), pair("longer still than", "that"), pair("x", "yy")]


def test_length_is_decided_on_train_alone() -> None:
    test = [pair("aaaa", "bb"), pair("b", "aaa"), pair("ab", "cd")]
    longer = length_only(LONGER, test)
    assert longer.rule == "The longer answer is better, in characters."
    assert longer.correct_P is not None and longer.correct_P.tolist() == [True, False, False]
    shorter = length_only([swapped(record) for record in LONGER], test)
    assert shorter.rule == "The shorter answer is better, in characters."
    assert shorter.correct_P is not None and shorter.correct_P.tolist() == [False, True, False]


def test_characters_not_bytes_are_counted() -> None:
    """Four characters of three bytes each are shorter than five of one."""
    found = length_only(LONGER, [pair("abcde", "雨雨雨雨")])
    assert found.correct_P is not None and found.correct_P.tolist() == [True]


def test_position_needs_to_be_recorded() -> None:
    train = [pair("a", "b", chosen_index=index) for index in (1, 1, 0)]
    test = [pair("a", "b", chosen_index=index) for index in (0, 1)]
    found = position_only(train, test)
    assert found.rule == "The second answer of a pair is better."
    assert found.correct_P is not None and found.correct_P.tolist() == [False, True]
    for records in ((LONGER, test), (train, LONGER)):
        missing = position_only(*records)
        assert missing.correct_P is None and "not recorded" in missing.rule
    with pytest.raises(InputError, match="The pair c1 has chosen_index 2"):
        position_only(train, [pair("a", "b", chosen_index=2)])


POLITE = ["thank you kindly", "please let me help", "gladly my friend", "thank you and please"]
RUDE = ["you fool of a man", "stupid as ever", "what a fool", "stupid question my friend"]
MANNERS = [pair(polite, rude) for polite in POLITE for rude in RUDE]


def test_words_learn_what_one_word_gives_away() -> None:
    test = [pair("please sit down", "sit down stupid"), pair("a fool am i", "thank you i am")]
    found = words_only(MANNERS, test)
    assert found.correct_P is not None and found.correct_P.tolist() == [True, False]


def test_word_pairs_count_where_words_do_not() -> None:
    """Both answers hold the same words; only their order differs."""
    train = [pair("not bad", "bad not"), pair("it is not bad", "is it bad not")]
    found = words_only(train, [pair("well not bad", "well bad not")])
    assert found.correct_P is not None and found.correct_P.tolist() == [True]


def test_swapping_the_answers_swaps_the_outcome() -> None:
    test = [pair(polite[2:], rude[2:]) for polite, rude in zip(POLITE, RUDE, strict=True)]
    there, back = words_only(MANNERS, test), words_only(MANNERS, [swapped(record) for record in test])
    assert there.correct_P is not None and back.correct_P is not None
    assert (there.correct_P != back.correct_P).all()
    reversed_labels = words_only([swapped(record) for record in MANNERS], test)
    assert reversed_labels.correct_P is not None
    assert (reversed_labels.correct_P == back.correct_P).all()


def test_unknown_words_and_equal_answers_leave_the_rule_silent() -> None:
    found = words_only(MANNERS, [pair("zyx", "wvu"), pair("thank you", "thank you")])
    assert found.correct_P is not None and not found.correct_P.any()


def test_the_order_of_the_train_records_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    words = np.array(["thank", "please", "gladly", "fool", "stupid", "rain", "moon", "salt", "paper", "winter"])
    random_pairs = [pair(" ".join(rng.choice(words, 5)), " ".join(rng.choice(words, 5))) for _ in range(60)]
    one, other = words_only(random_pairs[:40], random_pairs[40:]), words_only(random_pairs[39::-1], random_pairs[40:])
    assert one.correct_P is not None and other.correct_P is not None
    assert (one.correct_P == other.correct_P).all()


def test_random_labels_are_not_learnt() -> None:
    rng = np.random.default_rng(1)
    words = np.array([f"w{i}" for i in range(200)])
    records = [pair(" ".join(rng.choice(words, 8)), " ".join(rng.choice(words, 8))) for _ in range(1200)]
    found = words_only(records[:600], records[600:])
    assert found.correct_P is not None
    assert found.correct_P.mean() == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize(
    ("train", "why"),
    [([], "no training pairs"), ([pair("!?", "...")], "no words"), ([pair("a b", "A B!")], "the same words")],
)
def test_where_there_is_nothing_to_learn_it_says_so(train: list[dict[str, Any]], why: str) -> None:
    found = words_only(train, MANNERS)
    assert found.correct_P is None and why in found.rule


def test_all_three_in_order() -> None:
    found = baselines(MANNERS, MANNERS[:3])
    assert [each.name for each in found] == ["length", "position", "words"]
    assert [each.correct_P is None for each in found] == [False, True, False]
    assert all(each.rule.endswith(".") for each in found)
    assert [each.correct_P for each in baselines([], MANNERS)] == [None, None, None]
