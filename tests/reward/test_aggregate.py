"""Majority against numbers worked by hand and the symmetries any vote has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.aggregate import Preferences, Verdict, Vote, majority, preferences
from reward.records import InputError, assistant_answer, user_prompt

# The same examples on every run, and no failure because a machine was busy.
deterministic = settings(derandomize=True, deadline=None)
ballots = st.lists(st.integers(1, 7), min_size=1, max_size=9)


def votes(*values: int) -> list[Vote]:
    return [Vote(f"a{number}", value) for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "winner", "share", "margin"),
    [
        ((1,), 0, 1.0, 3.0),
        ((7,), 1, 1.0, 3.0),
        ((4,), None, 0.5, 0.0),
        ((2, 3, 6), 0, 2 / 3, 1 / 3),  # (2 + 1 - 2) / 3
        ((6, 7, 3), 1, 2 / 3, 4 / 3),  # (2 + 3 - 1) / 3
        ((3, 4), 0, 0.75, 0.5),  # half of the votes being ties is no majority of ties
        ((3, 4, 4), None, 0.5, 0.0),
        ((1, 7), None, 0.5, 0.0),
        ((1, 5), None, 0.5, 0.0),  # sides are counted, strength does not decide
        ((2, 5, 4), None, 0.5, 0.0),
        ((2, 2, 6, 4, 4), 0, 0.6, 0.4),  # (2 + 1) / 5 and (2 + 2 - 2) / 5
        ((3, 3, 7), 0, 2 / 3, 0.0),  # (1 + 1 - 3) / 3 < 0
    ],
)
def test_by_hand(values: tuple[int, ...], winner: int | None, share: float, margin: float) -> None:
    verdict = majority(votes(*values))
    assert (verdict.winner, verdict.n) == (winner, len(values))
    assert (verdict.share, verdict.margin) == pytest.approx((share, margin))


def test_annotators_are_sorted() -> None:
    assert majority([Vote("zoe", 1), Vote("ann", 2)]) == Verdict(0, 1.0, 2.5, 2, ("ann", "zoe"))


@deterministic
@given(ballots, st.randoms(use_true_random=False))
def test_order_of_votes_does_not_matter(values: list[int], random: Any) -> None:
    shuffled = votes(*values)
    random.shuffle(shuffled)
    assert majority(shuffled) == majority(votes(*values))


@deterministic
@given(ballots)
def test_swapping_the_answers_mirrors_the_verdict(values: list[int]) -> None:
    verdict = majority(votes(*values))
    mirrored = majority(votes(*(8 - value for value in values)))
    assert mirrored.winner == (None if verdict.winner is None else 1 - verdict.winner)
    assert (mirrored.share, mirrored.margin) == (verdict.share, verdict.margin)


@deterministic
@given(ballots)
def test_the_winner_has_more_than_half(values: list[int]) -> None:
    verdict = majority(votes(*values))
    assert 0 <= verdict.margin <= 3
    assert verdict.share == 0.5 if verdict.winner is None else 0.5 < verdict.share <= 1


@deterministic
@given(ballots)
def test_everybody_voting_twice_as_two_people_changes_nothing(values: list[int]) -> None:
    once, twice = majority(votes(*values)), majority(votes(*values, *values))
    assert (once.winner, once.share, once.margin) == (twice.winner, twice.share, twice.margin)


def test_one_person_has_one_vote() -> None:
    with pytest.raises(InputError, match="Annotator ann voted twice"):
        majority([Vote("ann", 1), Vote("bob", 7), Vote("ann", 1)])


@pytest.mark.parametrize("value", [0, 8])
def test_vote_out_of_range(value: int) -> None:
    with pytest.raises(InputError, match=f"vote of ann is {value}"):
        Vote("ann", value)


def pair(comparison_id: str, first: int, second: int, *texts: str, split: str = "train") -> dict[str, Any]:
    return {
        "comparison_id": comparison_id,
        "pair": [first, second],
        "prompt": user_prompt("Why?"),
        "split": split,
        "answers": [{"text": text, "model": "m"} for text in texts],
    }


def test_records() -> None:
    result = preferences(
        [
            (pair("b", 0, 1, "yes", "no"), votes(5, 7)),
            (pair("a", 1, 2, "same", "same"), votes(1)),
            (pair("a", 0, 10, "left", "right", split="test"), votes(4)),
            (pair("a", 0, 2, "good", "bad"), [Vote("zoe", 2), Vote("ann", 4)]),
            (pair("a", 0, 1, "x", "y"), []),
        ],
        simulated=True,
    )
    why = user_prompt("Why?")
    assert result == Preferences(
        records=[
            {
                "prompt": why,
                "chosen": assistant_answer("good"),
                "rejected": assistant_answer("bad"),
                "margin": 1.0,
                "weight": 0.75,
                "annotators": ["ann", "zoe"],
                "comparison_id": "a",
                "pair": [0, 2],
                "split": "train",
                "simulated": True,
            },
            {
                "prompt": why,
                "chosen": assistant_answer("no"),
                "rejected": assistant_answer("yes"),
                "margin": 2.0,
                "weight": 1.0,
                "annotators": ["a0", "a1"],
                "comparison_id": "b",
                "pair": [0, 1],
                "split": "train",
                "simulated": True,
            },
        ],
        ties=[
            {
                "prompt": why,
                "answers": [assistant_answer("left"), assistant_answer("right")],
                "annotators": ["a0"],
                "comparison_id": "a",
                "pair": [0, 10],
                "split": "test",
                "simulated": True,
            }
        ],
        identical=1,
        unlabelled=1,
    )


@deterministic
@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("xyz"), ballots | st.just([])), max_size=12), st.data()
)
def test_every_pair_is_in_one_place_whatever_the_order(
    drawn: list[tuple[str, str, list[int]]], data: st.DataObject
) -> None:
    pairs = [(pair(f"c{n}", 0, 1, first, second), votes(*values)) for n, (first, second, values) in enumerate(drawn)]
    result = preferences(pairs, simulated=False)
    assert len(result.records) + len(result.ties) + result.identical + result.unlabelled == len(pairs)
    assert all(record["chosen"] != record["rejected"] for record in result.records)
    assert preferences(data.draw(st.permutations(pairs)), simulated=False) == result


def test_neither_torch_nor_the_store_is_loaded() -> None:
    code = "import sys, reward.aggregate; print({'torch', 'sqlalchemy', 'labeling_ui', 'align'} & sys.modules.keys())"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
