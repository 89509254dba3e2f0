"""Decisions over all rows: by hand, and whatever the order of the rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config_data import BalanceSection, DataSource, PrepareSection
from align.data.names import Kind
from align.data.prepare.deciding import Table, decide, shares
from align.data.prepare.working import SPLITS, Row, Task, work
from reward.records import InputError, Record, assistant_answer, prompt_id, split_of, user_prompt

WORDS = [
    "river",
    "stone",
    "cloud",
    "paper",
    "garden",
    "window",
    "silver",
    "thunder",
    "basket",
    "lantern",
    "meadow",
    "copper",
    "violin",
    "harbour",
    "pepper",
]


def sentence(number: int, length: int = 24) -> str:
    """Words by number: two of them have next to nothing in common."""
    return " ".join(f"{WORDS[(number * 7 + i * (number + 3)) % len(WORDS)]}{number * 31 + i}" for i in range(length))


def pair(prompt: str, chosen: str, rejected: str, **riders: object) -> Record:
    sides = {"chosen": assistant_answer(chosen), "rejected": assistant_answer(rejected)}
    return {"prompt": user_prompt(prompt), **sides, **riders}


def told(prompt: str, answer: str, **riders: object) -> Record:
    return {"prompt": user_prompt(prompt), "completion": assistant_answer(answer), **riders}


def table(
    records: list[Record],
    section: PrepareSection,
    kind: Kind = "demonstration",
    sources: list[DataSource] | None = None,
    source: list[int] | None = None,
) -> Table:
    rows: list[Row] = [(f"line {number}", record) for number, record in enumerate(records, start=1)]
    done = work(Task("rows", kind, section, 0.2, 0, True), rows)
    assert done.marks and len(done.lines) == len(records)
    given_by = np.array(source or [0] * len(rows), np.int16)
    return Table("rows", kind, sources or [DataSource(path="a")], given_by, done.places, done.marks)


def settled(one: Table, section: PrepareSection) -> Table:
    decide([one], section, 0)
    return one


def test_of_rows_that_say_the_same_the_first_stays() -> None:
    a, b = sentence(1), sentence(2)
    section = PrepareSection()
    found = settled(table([told(a, b), told(f"  {a.upper()} ", b), told(b, a), told(a, b)], section), section)
    assert [*found.kept()] == [0, 2]
    assert found.left[1] == ("exact duplicates", "that say the same as another", 0)
    assert found.shown["exact duplicates"] == [(0, 1), (0, 3)]
    [count] = [each for each in found.counts if each.step == "exact duplicates"]
    assert (count.rows_in, count.rows_out, count.left_out.total()) == (4, 2, 2)


def test_near_duplicates_are_alike_in_every_part() -> None:
    prompt, answer, other = sentence(1, 60), sentence(2, 60), sentence(3, 60)
    nearly = answer.replace(answer.split()[30], "otherwise")
    section = PrepareSection()
    rows = [told(prompt, answer), told(prompt, other), told(prompt, nearly), told(other, answer)]
    found = settled(table(rows, section), section)
    assert [*found.kept()] == [0, 1, 3]  # the same prompt with another answer is another demonstration
    assert found.left[2] == ("near duplicates", "that nearly say the same as another", 0)


def test_a_pair_and_its_contradiction_are_no_duplicates() -> None:
    prompt, one, other = sentence(1), sentence(2), sentence(3)
    section = PrepareSection()
    rows = [pair(prompt, one, other), pair(prompt, other, one), pair(prompt, one, other)]
    assert [*settled(table(rows, section, "preference"), section).kept()] == [0, 1]


def test_two_votes_on_one_pair_are_two_labels() -> None:
    prompt, one, other = sentence(1), sentence(2), sentence(3)
    rows = [pair(prompt, one, other + end, annotator=name) for name in ("ann", "bob", "ann") for end in ("", " too")]
    for near, kept in ((None, [0, 1, 2, 3]), (0.8, [0, 2])):
        section = PrepareSection(near_duplicates=near)
        assert [*settled(table(rows, section, "preference"), section).kept()] == kept


def test_similar_prompts_go_to_one_side() -> None:
    section = PrepareSection(exact_duplicates=False)
    prompts = [sentence(number, 40) for number in range(40)]
    rows = [told(prompt + tail, sentence(100 + i)) for i, prompt in enumerate(prompts) for tail in ("", " please")]
    apart = sum(
        split_of(one["prompt"], 0.2) != split_of(two["prompt"], 0.2)
        for one, two in zip(rows[::2], rows[1::2], strict=True)
    )
    assert apart > 5  # else this test shows nothing
    found = settled(table(rows, section), section)
    sides = found.sides.reshape(-1, 2)
    assert (sides[:, 0] == sides[:, 1]).all() and {*sides.ravel()} == {1, 2}


def test_by_hash_a_training_prompt_like_one_of_the_test_side_goes() -> None:
    section = PrepareSection(split="hash", exact_duplicates=False, near_duplicates=0.8)
    prompts = [sentence(number, 40) for number in range(40)]
    rows = [told(prompt + tail, sentence(100 + i)) for i, prompt in enumerate(prompts) for tail in ("", " please")]
    found = settled(table(rows, section), section)
    by_hash = [SPLITS.index(split_of(row["prompt"], 0.2)) for row in rows]
    assert [*found.sides] == by_hash
    for number in range(0, len(rows), 2):
        if {by_hash[number], by_hash[number + 1]} == {1, 2}:
            gone = number if by_hash[number] == 1 else number + 1
            assert found.left[gone][0] == "test border"


def test_a_row_keeps_the_side_it_names_and_draws_similar_prompts_along() -> None:
    section = PrepareSection(exact_duplicates=False)
    prompt = sentence(1, 40)
    rows = [told(prompt, sentence(5), split="test"), told(prompt + " please", sentence(6)), told(sentence(2), "a b c")]
    found = settled(table(rows, section), section)
    assert [*found.sides[:2]] == [2, 2]
    rows[1]["split"] = "train"
    found = settled(table(rows, section), section)
    assert found.left[1] == ("test border", "whose prompt is nearly one of the test side", None)


def test_one_prompt_on_two_sides_is_refused() -> None:
    section = PrepareSection()
    rows = [told("What is rain?", "Water.", split="train"), told("what is rain?", "Wet.", split="test")]
    with pytest.raises(InputError, match=r"^line 1 and line 2 have the same prompt, on the train side"):
        settled(table(rows, section), section)


@given(st.permutations(range(12)))
def test_what_stays_does_not_depend_on_the_order(order: list[int]) -> None:
    section = PrepareSection()
    sources = [DataSource(path="a", max_rows=2), DataSource(path="b")]
    rows = [told(sentence(number, 30), sentence(50 + number)) for number in range(12)]
    one = table(rows, section, sources=sources, source=[0] * 6 + [1] * 6)
    decide([one], section, 7)
    other = table([rows[i] for i in order], section, sources=sources, source=[int(i >= 6) for i in order])
    decide([other], section, 7)
    ids = [prompt_id(row["prompt"]) for row in rows]
    assert {ids[row] for row in one.kept()} == {ids[order[row]] for row in other.kept()}
    assert {ids[row]: side for row, side in enumerate(one.sides)} == {
        ids[order[row]]: side for row, side in enumerate(other.sides)
    }


def test_shares_by_hand() -> None:
    assert shares([100, 100, 10], [2.0, 1.0, 0.5]) == [40, 20, 10]
    assert shares([30, 0], [1.0, 1.0]) == [30, 0]
    assert shares([3, 7], [None, None]) == [3, 7]


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.01, 100)), min_size=1, max_size=6))
def test_shares_are_the_weights_within_a_row(given_rows: list[tuple[int, float]]) -> None:
    available, weights = zip(*given_rows, strict=True)
    taken = shares(available, [*weights])
    unit = min(count / weight for count, weight in given_rows)
    assert all(abs(n - unit * weight) <= 0.5 + 1e-6 for n, weight in zip(taken, weights, strict=True))
    assert all(n <= count for n, count in zip(taken, available, strict=True)) and max(taken) > 0


def test_weights_and_caps_of_a_mixture() -> None:
    section = PrepareSection()
    sources = [
        DataSource(path="a", weight=3),
        DataSource(path="b", weight=1),
        DataSource(path="c", weight=1, max_rows=4),
    ]
    rows = [told(sentence(number), sentence(200 + number)) for number in range(60)]
    found = settled(table(rows, section, sources=sources, source=[0] * 30 + [1] * 20 + [2] * 10), section)
    counts = np.bincount(found.source[found.kept()])
    assert [*counts] == [12, 4, 4]
    reasons = {step: sum(1 for left in found.left.values() if left[0] == step) for step in ("max_rows", "mixture")}
    assert reasons == {"max_rows": 6, "mixture": 34}


def test_balance_spares_the_test_side() -> None:
    section = PrepareSection(balance=BalanceSection(by="label", ratio=2))
    rows = [told(sentence(n), sentence(300 + n), label="a" if n < 30 else "b", split="train") for n in range(35)]
    rows += [told(sentence(n), sentence(300 + n), label="a", split="test") for n in range(35, 40)]
    found = settled(table(rows, section), section)
    kept = found.kept()
    assert [sum(kept < 30), sum((kept >= 30) & (kept < 35)), sum(kept >= 35)] == [10, 5, 5]
