"""Votes to preferences: numbers worked by hand, the symmetries any vote has, published counts, and a known truth."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeling_ui.agreement import fleiss, krippendorff, pairwise_cohen
from labeling_ui.store import LabelStore, Settings
from reward.aggregate import Method, Preferences, Verdict, Vote, _verdict, majority, preferences
from reward.records import InputError, assistant_answer, read_jsonl, user_prompt

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
                "chosen_index": 0,
                "margin": 1.0,
                "weight": 0.75,
                "annotators": ["ann", "zoe"],
                "strengths": [0, 2],
                "comparison_id": "a",
                "pair": [0, 2],
                "split": "train",
                "simulated": True,
            },
            {
                "prompt": why,
                "chosen": assistant_answer("no"),
                "rejected": assistant_answer("yes"),
                "chosen_index": 1,
                "margin": 2.0,
                "weight": 1.0,
                "annotators": ["a0", "a1"],
                "strengths": [1, 3],
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
                "strengths": [0],
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


# Votes weighed by how reliable their annotators are

METHODS: tuple[Method, ...] = ("majority", "dawid-skene", "bradley-terry")
WEIGHED = METHODS[1:]
# Three answers to each of four prompts, the last held out; each of three annotators judges all pairs or some.
judgements = st.lists(
    st.tuples(*[st.lists(st.none() | st.integers(1, 7), min_size=3, max_size=3)] * 3), min_size=4, max_size=4
)
few = settings(derandomize=True, deadline=None, max_examples=25)
Pairs = list[tuple[dict[str, Any], list[Vote]]]


def prompts(drawn: list[tuple[list[int | None], ...]], mirrored: bool = False) -> Pairs:
    """Everybody judges one pair of the first prompt, so that there is something to compare."""
    made: Pairs = []
    for number, of_pairs in enumerate(drawn):
        for (i, j), values in zip(combinations(range(3), 2), of_pairs, strict=True):
            given_ = {f"a{n}": value for n, value in enumerate(values) if value is not None}
            if not made:
                given_ = {"a0": 2, "a1": 3, "a2": 6} | given_
            said = [Vote(name, 8 - value if mirrored else value) for name, value in given_.items()]
            texts = [f"answer {i}", f"answer {j}"]
            split = "test" if number == len(drawn) - 1 else "train"
            made.append((pair(f"p{number}", i, j, *(texts[::-1] if mirrored else texts), split=split), said))
    return made


@pytest.mark.parametrize("method", METHODS)
@few
@given(judgements, st.data())
def test_records_are_sound_whatever_the_order(
    method: Method, drawn: list[tuple[list[int | None], ...]], data: st.DataObject
) -> None:
    pairs = prompts(drawn)
    result = preferences(pairs, simulated=False, method=method)
    said = {(item["comparison_id"], *item["pair"]): votes for item, votes in pairs}
    assert len(result.records) + len(result.ties) + result.unlabelled == len(pairs)
    for record in result.records + result.ties:
        i, j = record["pair"]
        told = {vote.annotator: vote.strength for vote in said[record["comparison_id"], i, j]}
        for_first = "chosen" not in record or record["chosen"] == assistant_answer(f"answer {i}")
        assert record["annotators"] == sorted(told)
        assert record["strengths"] == [told[name] if for_first else -told[name] for name in record["annotators"]]
        if not any(told.values()):
            assert "chosen" not in record  # whatever else is known, nobody preferred one
        if "chosen" in record:
            assert 0.5 < record["weight"] <= 1 and 0 <= record["margin"] <= 3
            assert type(record["weight"]) is float and type(record["margin"]) is float
    shuffled = [(item, list(data.draw(st.permutations(votes)))) for item, votes in data.draw(st.permutations(pairs))]
    assert preferences(shuffled, simulated=False, method=method) == result
    assert (method == "majority") == (not result.reliability)


@pytest.mark.parametrize("method", METHODS)
@few
@given(judgements)
def test_no_answer_wins_for_standing_first(method: Method, drawn: list[tuple[list[int | None], ...]]) -> None:
    plain, mirrored = (preferences(prompts(drawn, side), simulated=False, method=method) for side in (False, True))
    assert [record["pair"] for record in mirrored.ties] == [record["pair"] for record in plain.ties]
    assert len(mirrored.records) == len(plain.records)
    for one, other in zip(plain.records, mirrored.records, strict=True):
        assert (one["chosen"], one["strengths"]) == (other["chosen"], other["strengths"])
        assert other["weight"] == pytest.approx(one["weight"], abs=1e-5)
        assert other["margin"] == pytest.approx(one["margin"], abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
@few
@given(
    judgements, st.lists(st.tuples(*[st.lists(st.integers(1, 7), min_size=3, max_size=3)] * 3), min_size=1, max_size=1)
)
def test_held_out_votes_change_nothing_in_training(
    method: Method, drawn: list[tuple[list[int | None], ...]], other: list[tuple[list[int | None], ...]]
) -> None:
    """Not by one bit, though annotators are the same on both sides."""
    one, two = (preferences(prompts(each), simulated=False, method=method) for each in (drawn, drawn[:-1] + other))
    for field in ("records", "ties"):
        trained = [[each for each in getattr(result, field) if each["split"] == "train"] for result in (one, two)]
        assert trained[0] == trained[1]
    assert one.reliability == two.reliability


@pytest.mark.parametrize("method", METHODS)
def test_ties_are_ties_and_one_against_one_is_a_tie(method: Method) -> None:
    """Nobody's vote is a coin's: two annotators who are equally reliable and contradict each other prefer nothing."""
    agreed = [(pair(f"c{n}", 0, 1, "x", "y"), [Vote("ann", 2), Vote("bob", 3)]) for n in range(6)]
    open_ = [
        (pair("split", 0, 1, "x", "y"), [Vote("ann", 1), Vote("bob", 5)]),
        (pair("tied", 0, 1, "x", "y"), [Vote("ann", 4), Vote("bob", 4)]),
    ]
    result = preferences(agreed + open_, simulated=False, method=method)
    assert [tie["comparison_id"] for tie in result.ties] == ["split", "tied"]
    assert [tie["strengths"] for tie in result.ties] == [[3, -1], [0, 0]]
    only_ties = preferences(open_[1:], simulated=False, method=method)
    assert len(only_ties.ties) == 1 and not only_ties.records


@pytest.mark.parametrize(
    ("values", "trust", "first", "winner", "share", "margin"),
    [
        ((2, 3), (0.5, 0.5), 0.9, 0, 0.9, 1.5),
        ((2, 3), (0.8, 0.2), 0.9, 0, 0.9, 1.8),  # 0.8 * 2 + 0.2 * 1
        ((1, 6), (0.9, -0.5), 0.8, 0, 0.8, 3.0),  # what is no better than chance has no strength
        ((1, 6), (-0.1, 0.0), 0.2, 1, 0.8, 0.0),
        ((2, 2), (0.5, 0.5), 0.3, 1, 0.7, 0.0),  # the rest of the prompt's votes overrule these two
        ((4, 2), (0.5, 0.5), 0.6, 0, 0.6, 1.0),  # half of the trust is no majority of ties
        ((4, 2), (0.6, 0.5), 0.6, None, 0.5, 0.0),
        ((4, 2), (0.0, 0.0), 0.6, 0, 0.6, 0.0),
        ((4, 4), (0.0, 0.0), 0.6, None, 0.5, 0.0),
        ((2, 6), (0.5, 0.5), 0.5 + 1e-9, None, 0.5, 0.0),
    ],
)
def test_weighed_by_hand(
    values: tuple[int, ...], trust: tuple[float, ...], first: float, winner: int | None, share: float, margin: float
) -> None:
    verdict = _verdict(votes(*values), first, trust)
    assert verdict.winner == winner
    assert (verdict.share, verdict.margin) == pytest.approx((share, margin))


@pytest.mark.parametrize("method", WEIGHED)
def test_a_newcomer_on_the_test_side_counts_like_the_average(method: Method) -> None:
    trained = [(pair(f"c{n}", 0, 1, "x", "y"), [Vote("ann", 1 + n % 3), Vote("bob", 2)]) for n in range(20)]
    held_out = [(pair("z", 0, 1, "x", "y", split="test"), [Vote("new", 2)])]
    result = preferences(trained + held_out, simulated=False, method=method)
    (record,) = [record for record in result.records if record["split"] == "test"]
    assert list(result.reliability) == ["ann", "bob"]
    assert 0.5 < record["weight"] < 1 and record["margin"] == 2.0
    assert result.uninformative == []


@pytest.mark.parametrize("method", WEIGHED)
def test_reliability_needs_two_people_who_judged_the_same(method: Method) -> None:
    alone = [(pair(f"c{n}", 0, 1, "x", "y"), [Vote("ann", 2)]) for n in range(5)]
    apart = [(pair(f"d{n}", 0, 1, "x", "y"), [Vote("bob", 2)]) for n in range(5)]
    held_out = [(pair("e", 0, 1, "x", "y", split="test"), votes(2, 2, 2))]
    with pytest.raises(InputError, match=f"{method} judges annotators by each other.*label.aggregate: majority"):
        preferences(alone + apart + held_out, simulated=False, method=method)
    assert len(preferences(alone + apart + held_out, simulated=False).records) == 11
    # Different pairs of one prompt are enough for scores, and not for pairs that stand alone.
    ladder = [(pair("c", 0, 1, "x", "y"), [Vote("ann", 2)]), (pair("c", 1, 2, "y", "z"), [Vote("bob", 2)])]
    if method == "bradley-terry":
        assert len(preferences(ladder, simulated=False, method=method).records) == 2
    else:
        with pytest.raises(InputError, match="the same pair of answers"):
            preferences(ladder, simulated=False, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_and_too_much_to_aggregate(method: Method) -> None:
    nothing = preferences([(pair("a", 0, 1, "x", "y"), [])], simulated=False, method=method)
    assert nothing == Preferences([], [], 0, 1)
    with pytest.raises(InputError, match="Annotator ann voted twice"):
        preferences([(pair("a", 0, 1, "x", "y"), [Vote("ann", 1), Vote("ann", 7)])], simulated=False, method=method)


def test_unknown_method() -> None:
    with pytest.raises(InputError, match="is mean: one of majority, dawid-skene, bradley-terry is wanted"):
        preferences([], simulated=False, method="mean")


def test_a_ranking_speaks_of_all_pairs_of_its_group(tmp_path: Path) -> None:
    """Answer 2, then 0 and 3 as equals, then 1: six pairs, one of them a tie, steps apart as strengths."""
    with LabelStore(tmp_path / "labels.sqlite") as store:
        project = store.create_project("ranked", settings=Settings(mode="ranking"))
        answers = [{"text": f"answer {n}", "model": "m"} for n in range(4)]
        store.add_items(project, [{"id": "c", "prompt": user_prompt("Why?"), "split": "train", "answers": answers}])
        (item,) = store.items(project)
        for annotator in ("ann", "bob"):
            said = {"annotator": annotator, "order": list(item.answers), "ranking": [[2], [0, 3], [1]]}
            store.record(project, {"item_id": item.id, "key": annotator, **said})
        for method in METHODS:
            result = preferences(store.votes(project), simulated=False, method=method)
            won = {(record["chosen"][0]["content"][-1], record["rejected"][0]["content"][-1]): record["strengths"]
                   for record in result.records}  # fmt: skip
            steps = {("2", "0"): 1, ("2", "3"): 1, ("2", "1"): 2, ("0", "1"): 1, ("3", "1"): 1}
            assert won == {pair_: [step, step] for pair_, step in steps.items()}
            assert [tie["pair"] for tie in result.ties] == [[0, 3]]


# Against what is published, and against a known truth


def test_pandalm(shared_data: Path) -> None:
    """999 pairs with three annotators; its README gives majority labels 105 ties, 422, 472 and Cohen's kappas."""
    rows = read_jsonl(shared_data / "data" / "agreement" / "pandalm_testset.jsonl")
    names = ("annotator1", "annotator2", "annotator3")
    value = {0: 4, 1: 2, 2: 6}
    pairs = [
        (pair(f"{row['idx']:04}", 0, 1, "x", "y"), [Vote(name, value[row[name]]) for name in names]) for row in rows
    ]
    verdicts = Counter(majority(each).winner for _, each in pairs)
    assert (verdicts[None], verdicts[0], verdicts[1]) == (105, 422, 472)

    units = [{name: row[name] for name in names} for row in rows]
    kappas = [round(kappa, 2) for kappa in pairwise_cohen(units).values()]
    assert kappas == [0.85, 0.88, 0.86]
    assert fleiss(units) == pytest.approx(0.864175, abs=1e-6)
    assert krippendorff(units) == pytest.approx(0.864221, abs=1e-6)

    # Careful people who agree: weighing changes no verdict.
    plain = preferences(pairs, simulated=False)
    assert (len(plain.records), len(plain.ties)) == (894, 105)
    for method in WEIGHED:
        result = preferences(pairs, simulated=False, method=method)
        assert min(result.reliability.values()) > 0.8 and not result.uninformative
        assert [tie["comparison_id"] for tie in result.ties] == [tie["comparison_id"] for tie in plain.ties]
        assert [record["chosen"] for record in result.records] == [record["chosen"] for record in plain.records]


def spammed(seed: int, groups: int = 250, each: int = 3) -> tuple[Pairs, dict[tuple[str, int, int], int]]:
    """Four answers to each prompt, all pairs judged by 3 of 10 people, of whom 2 press a key at random; and the truth.

    The careful ones differ in care: logistic noise of 0.2 to 1.5 on a difference of two standard normal qualities.
    """
    rng = Random(seed)
    noise = {f"careful-{n}": rng.uniform(0.2, 1.5) for n in range(8)} | {"spam-0": None, "spam-1": None}
    pairs: Pairs = []
    truth = {}
    for group in range(groups):
        quality = [rng.gauss(0, 1) for _ in range(4)]
        for i, j in combinations(range(4), 2):
            given_ = []
            for name in rng.sample(sorted(noise), each):
                width = noise[name]
                if width is None:
                    given_.append(Vote(name, rng.randint(1, 7)))
                    continue
                share = rng.random()
                felt = quality[i] - quality[j] + width * math.log(share / (1 - share))
                steps = (abs(felt) > 0.15) + (abs(felt) > 0.75) + (abs(felt) > 1.75)
                given_.append(Vote(name, 4 - steps if felt > 0 else 4 + steps))
            split = "test" if group % 5 == 0 else "train"
            pairs.append((pair(f"g{group:03}", i, j, f"answer {i}", f"answer {j}", split=split), given_))
            truth[f"g{group:03}", i, j] = 0 if quality[i] > quality[j] else 1
    return pairs, truth


def accuracy(result: Preferences, truth: dict[tuple[str, int, int], int], split: str | None = None) -> float:
    """Share of pairs whose better answer won; a tie is half right."""
    records = [each for each in result.records if split in (None, each["split"])]
    ties = [each for each in result.ties if split in (None, each["split"])]
    right = 0
    for record in records:
        i, j = record["pair"]
        winner = 0 if record["chosen"] == assistant_answer(f"answer {i}") else 1
        right += winner == truth[record["comparison_id"], i, j]
    return (right + len(ties) / 2) / (len(records) + len(ties))


@pytest.mark.parametrize("seed", range(5))
def test_with_a_fifth_of_spammers_weighed_votes_beat_the_majority(seed: int) -> None:
    pairs, truth = spammed(seed)
    found = {method: preferences(pairs, simulated=True, method=method) for method in METHODS}
    shares = {method: accuracy(result, truth) for method, result in found.items()}
    held_out = {method: accuracy(result, truth, "test") for method, result in found.items()}
    print(f"seed {seed}:", *(f"{name} {share:.4f} (held out {held_out[name]:.4f})" for name, share in shares.items()))
    for method in WEIGHED:
        assert shares[method] > shares["majority"] and held_out[method] > held_out["majority"]
        assert {"spam-0", "spam-1"} <= set(found[method].uninformative)


def test_neither_torch_nor_the_store_is_loaded() -> None:
    code = "import sys, reward.aggregate; print({'torch', 'sqlalchemy', 'labeling_ui', 'align'} & sys.modules.keys())"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
