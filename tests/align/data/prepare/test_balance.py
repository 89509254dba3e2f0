"""No group outweighs the smallest by more than asked, and no part of a file is favoured."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.prepare.balance import balanced, group_of
from reward.records import InputError, Record, assistant_answer, user_prompt

GROUPS = st.lists(st.sampled_from("abcd"), max_size=60)
RATIO = st.floats(1, 10)


@settings(derandomize=True, deadline=None)
@given(GROUPS, RATIO, st.integers(0, 5))
def test_the_ratio_holds_and_no_row_is_left_out_in_vain(groups: list[str], ratio: float, seed: int) -> None:
    kept = balanced(groups, ratio, seed)
    before, after = Counter(groups), Counter(groups[row] for row in kept)
    assert kept == sorted(set(kept))
    assert before.keys() == after.keys()
    if groups:
        least = min(before.values())
        assert after == {group: min(count, int(ratio * least)) for group, count in before.items()}


@settings(derandomize=True, deadline=None)
@given(GROUPS, RATIO, RATIO, st.integers(0, 5))
def test_a_larger_ratio_keeps_all_that_a_smaller_one_keeps(
    groups: list[str], one: float, two: float, seed: int
) -> None:
    assert set(balanced(groups, min(one, two), seed)) <= set(balanced(groups, max(one, two), seed))


@settings(derandomize=True, deadline=None)
@given(GROUPS, st.integers(0, 5))
def test_other_groups_do_not_change_which_rows_of_a_group_stay(groups: list[str], seed: int) -> None:
    """Which rows of a's stay depends on how many may stay, not on where b's rows stand between them."""
    apart = sorted(groups)
    for group in set(groups):
        places = [row for row, each in enumerate(groups) if each == group]
        moved = [row for row, each in enumerate(apart) if each == group]
        stay, stay_moved = set(balanced(groups, 1, seed)), set(balanced(apart, 1, seed))
        assert [row in stay for row in places] == [row in stay_moved for row in moved]


def test_by_hand() -> None:
    groups = list("aaaaaaaabbbcc")
    kept = balanced(groups, 2, seed=0)
    assert Counter(groups[row] for row in kept) == {"a": 4, "b": 3, "c": 2}
    assert balanced([], 2, 0) == [] and balanced(["a"] * 5, 1, 0) == [0, 1, 2, 3, 4]


def test_rows_are_drawn_evenly_by_the_seed() -> None:
    """Of 1,000 rows 100 stay; the mean of their places is 500 give or take 3 standard errors (3 · 289 / 10)."""
    groups = ["a"] * 1000 + ["b"] * 100
    drawn = [[row for row in balanced(groups, 1, seed) if row < 1000] for seed in range(5)]
    assert all(len(rows) == 100 and abs(sum(rows) / 100 - 500) < 87 for rows in drawn)
    assert len({tuple(rows) for rows in drawn}) == 5
    assert drawn[3] == [row for row in balanced(groups, 1, 3) if row < 1000]


def answered(text: str) -> Record:
    return {"prompt": user_prompt("Why?"), "completion": assistant_answer(text)}


@pytest.mark.parametrize(
    ("size", "group"),
    [(0, "0"), (1, "1 to 1"), (2, "2 to 3"), (3, "2 to 3"), (64, "64 to 127"), (127, "64 to 127"), (128, "128 to 255")],
)
def test_lengths_in_powers_of_two(size: int, group: str) -> None:
    assert group_of(answered("x" * size), "length") == group


def test_groups_of_columns() -> None:
    pair: Record = {"prompt": user_prompt("?"), "chosen": assistant_answer("abc"), "rejected": assistant_answer("d")}
    assert group_of(pair, "length") == "2 to 3"
    assert group_of({**pair, "source": "hh"}, "source") == "hh"
    assert group_of({**answered("a"), "label": True}, "label") == "true"
    assert group_of({**answered("a"), "label": 3}, "label") == "3"


@pytest.mark.parametrize("by", ["source", "label", "length"])
def test_a_row_without_a_group_is_refused(by: str) -> None:
    with pytest.raises(InputError, match=f"prepare.balance.by is {by}.*leave prepare.balance out"):
        group_of({"prompt": user_prompt("?"), "label": None}, by)
