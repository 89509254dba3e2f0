"""What is marked as new in an answer is what the other one does not say; nothing is lost, and it is never slow."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.compare.differences import MOST_WORDS, new_words

TEXTS = st.lists(st.sampled_from(["a", "b", "c", " ", "\n", "\t ", "<b>", "犬", "が", "é"]), max_size=40).map("".join)


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("a red house", "a blue house", [("a ", False), ("blue", True), (" house", False)]),
        ("a house", "a big old house", [("a ", False), ("big old", True), (" house", False)]),
        ("one two three", "one three", [("one three", False)]),
        ("one\ntwo", "one  two ", [("one  two ", False)]),
        ("one two", "two one", [("two", True), (" one", False)]),
        ("", "two words", [("two words", True)]),
        ("two words", "", []),
        ("", " \n", [(" \n", False)]),
        ("Paris.", "paris.", [("paris.", True)]),
        ("犬が好き", "猫が好き", [("猫", True), ("が好き", False)]),
        ("b", "<b>b</b> b", [("<b>b</b>", True), (" b", False)]),
    ],
)
def test_by_hand(old, new, wanted):
    assert new_words(old, new) == wanted


@given(TEXTS, TEXTS)
def test_nothing_is_lost_and_what_is_kept_stands_in_the_other_text_in_order(old, new):
    found = new_words(old, new)
    assert "".join(text for text, _ in found) == new
    assert all(text for text, _ in found)
    assert all(before[1] != after[1] for before, after in pairwise(found))
    assert not any(text.isspace() for text, is_new in found if is_new)
    left = iter("".join(old.split()))
    kept = "".join(text for text, is_new in found if not is_new)
    assert all(character in left for character in "".join(kept.split()))  # a subsequence


@given(TEXTS)
def test_a_text_beside_itself_has_nothing_new(text):
    assert new_words(text, text) == ([(text, False)] if text else [])


def test_long_texts_are_compared_where_they_differ_in_one_place():
    words = [f"word{n % 500}" for n in range(20_000)]
    other = [*words[:9_000], "new", *words[9_001:]]
    assert [text for text, is_new in new_words(" ".join(words), " ".join(other)) if is_new] == ["new"]


def bad_case(different: int) -> tuple[str, str]:
    """Texts whose only common words stand alone and come up again and again: all pairs, looked at over and over."""
    half = MOST_WORDS // 2
    return (
        " ".join(f"c{n % different} u{n}" for n in range(half)),
        " ".join(f"v{n} c{n % different}" for n in range(half)),
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" ".join(f"w{n}" for n in range(20_000)), " ".join(f"w{n + n % 2}" for n in range(20_000))),
        ("a " * 20_000, "b a " * 10_000),
        ("b" + " a" * MOST_WORDS, "a " * MOST_WORDS + "b"),
        *(bad_case(different) for different in (5, 17, 100)),
    ],
    ids=["long", "one word", "one word at the bound", "5 words", "17 words", "100 words"],
)
def test_no_pair_of_texts_takes_long(old, new):
    started = time.process_time()
    found = new_words(old, new)
    assert time.process_time() - started < 3  # about a second at worst on a slow core
    assert found is None or "".join(text for text, _ in found) == new
