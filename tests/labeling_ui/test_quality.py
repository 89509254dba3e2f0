"""The admin's figures of small projects, by hand and against the pure functions they are made of."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from labeling_ui.agreement import krippendorff, side_bias
from labeling_ui.assignment import Assigner
from labeling_ui.quality import AnnotatorQuality, Opinion, Remark, disagreements, quality, reliability, remarks
from labeling_ui.store import Item, LabelStore, Project, Settings
from tests.labeling_ui.conftest import comparison

FEW = 50  # rounds of the bootstrap, where its interval is not looked at


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with LabelStore(tmp_path / "labels.db") as store:
        yield store


def make(
    store: LabelStore, items: int = 4, gold: int = 0, name: str = "p", answers: int = 2, **settings: Any
) -> Project:
    """A project whose gold items come last; answer 1 is the better one of each."""
    project = store.create_project(name, settings=Settings(**{"overlap": 2, **settings}))
    records = [comparison(n, answers=answers) for n in range(items)]
    records += [comparison(n, answers=answers, gold=[1, 0]) for n in range(items, items + gold)]
    store.add_items(project, records)
    return project


NUMBERS = itertools.count()


def judged(item: Item, annotator: str, value: Any, **more: Any) -> Any:
    """A judgement in the item's own order, unless `order` is given; a list is a ranking."""
    given = {"ranking" if isinstance(value, list) else "value": value, "order": list(item.answers), **more}
    return {"item_id": item.id, "annotator": annotator, "key": f"k{next(NUMBERS)}", **given}


def say(store: LabelStore, project: Project, annotator: str, item: int, value: Any, **more: Any) -> None:
    """One label; `item` counts from 0."""
    store.record(project, judged(store.items(project)[item], annotator, value, **more))


def say_all(store: LabelStore, project: Project, units: list[dict[str, int]], **more: Any) -> None:
    """The labels of the first items, each by annotator."""
    rows = zip(store.items(project), units, strict=False)
    store.record_many(project, [judged(item, *each, **more) for item, unit in rows for each in unit.items()])


def of(found: Any, name: str) -> AnnotatorQuality:
    return next(each for each in found.annotators if each.name == name)


# Each annotator


def test_progress_and_each_annotators_work(store: LabelStore) -> None:
    project = make(store, items=4, gold=1)
    say(store, project, "ann", 0, 1, seconds=10.0)
    say(store, project, "ann", 1, 4, seconds=2.0, flag="odd")
    say(store, project, "ann", 2, 7, order=[1, 0], seconds=90)
    say(store, project, "ann", 4, 6)  # gold, and no time told
    say(store, project, "bob", 0, 4)
    found = quality(store, project, FEW)
    assert (found.given, found.wanted) == (4, 8)  # gold does not count
    assert [each.name for each in found.annotators] == ["ann", "bob"]
    ann = of(found, "ann")
    assert (ann.labels, ann.skips, ann.flags, ann.seconds, ann.ties) == (4, 0, 1, 10.0, 0.25)
    assert ann.side == side_bias([1, 4, 7, 6])  # as it was shown
    assert (of(found, "bob").seconds, of(found, "bob").ties) == (None, 1.0)


def test_skips_and_what_was_taken_back(store: LabelStore) -> None:
    project = make(store, items=3, gold_share=0.0)
    assigner = Assigner(store, project)
    lease = assigner.next("ann")
    assert lease
    _, lease, _ = assigner.label("ann", lease.token, "one", {"order": list(lease.order), "value": 1, "seconds": 5})
    assert lease
    skip = {"order": list(lease.order), "reason": "I cannot tell", "flag": "foreign language"}
    _, lease, _ = assigner.skip("ann", lease.token, "two", skip)
    assert lease
    assigner.label("ann", lease.token, "three", {"order": list(lease.order), "value": 4, "flag": "x"})
    ann = of(quality(store, project, FEW), "ann")
    assert (ann.labels, ann.skips, ann.flags, ann.ties, ann.seconds) == (2, 1, 2, 0.5, 5)
    assigner.undo("ann", "four")
    found = quality(store, project, FEW)
    ann = of(found, "ann")
    assert (found.given, ann.labels, ann.skips, ann.flags, ann.ties) == (1, 1, 1, 1, 0.0)


def test_a_corrected_label_counts_once_and_as_corrected(store: LabelStore) -> None:
    project = make(store)
    say(store, project, "ann", 0, 1)
    say(store, project, "ann", 0, 4)
    found = quality(store, project, FEW)
    assert (found.given, of(found, "ann").labels, of(found, "ann").ties) == (1, 1, 1.0)


def test_an_empty_project(store: LabelStore) -> None:
    project = make(store)
    found = quality(store, project)
    assert (found.given, found.wanted, found.annotators, found.cohen) == (0, 8, (), {})
    assert math.isnan(found.nominal.value) and found.nominal.words().startswith("not enough")
    assert disagreements(store, project) == [] and reliability(store, project) == []


# Gold


@pytest.mark.parametrize(
    ("value", "order", "hit"),
    [
        (7, [0, 1], True),  # answer 1, the better one, stood right and won
        (5, [0, 1], True),
        (3, [0, 1], False),
        (4, [0, 1], False),  # a tie is a miss
        (4, [1, 0], False),
        (1, [1, 0], True),
        (3, [1, 0], True),
        (6, [1, 0], False),
    ],
)
def test_a_gold_hit_is_the_better_answers_wherever_it_stood(
    store: LabelStore, value: int, order: list[int], hit: bool
) -> None:
    project = make(store, items=0, gold=1)
    say(store, project, "ann", 0, value, order=order)
    ann = of(quality(store, project, FEW), "ann")
    assert (ann.gold_right, ann.gold_asked) == (int(hit), 1)


def test_who_guesses_is_found_by_gold_and_the_careful_are_not(store: LabelStore) -> None:
    project, rng = make(store, items=1, gold=40), Random(2)
    for item in range(1, 41):
        order = rng.sample([0, 1], 2)
        say(store, project, "coin", item, rng.choice([2, 6]), order=order)
        better_is_right = order == [0, 1]
        careful = better_is_right if rng.random() < 0.95 else not better_is_right
        say(store, project, "careful", item, 6 if careful else 2, order=order)
    say(store, project, "new", 1, 6)
    found = quality(store, project, FEW)
    assert of(found, "coin").verdict == "guessing" and of(found, "coin").verdict_after <= 40
    assert of(found, "careful").verdict == "fine" and of(found, "careful").gold_right >= 34
    assert (of(found, "new").verdict, of(found, "new").verdict_after) == ("open", 1)
    assert found.nominal.units == 0  # gold is not part of agreement


def test_who_always_takes_the_left_is_seen(store: LabelStore) -> None:
    project, rng = make(store, items=30), Random(4)
    for item in range(30):
        say(store, project, "lefty", item, rng.randint(1, 3), order=rng.sample([0, 1], 2))
        order = rng.sample([0, 1], 2)
        say(store, project, "ann", item, 2 if order[0] == 0 else 6, order=order)  # always answer 0
    found = quality(store, project, FEW)
    assert of(found, "lefty").side.biased and of(found, "lefty").side.left == 30
    assert not of(found, "ann").side.biased


# Agreement


def test_agreement_by_hand(store: LabelStore) -> None:
    """Sides f f, f s, s s, s s: see `test_agreement`; what one person or gold says beside it changes nothing."""
    project = make(store, items=6, gold=1)
    for item, (ann, bob) in enumerate([(1, 2), (3, 5), (6, 6), (7, 6)]):
        say(store, project, "ann", item, ann)
        say(store, project, "bob", item, 8 - bob, order=[1, 0])
    say(store, project, "ann", 4, 1)
    for name, value in (("ann", 1), ("bob", 7)):
        say(store, project, name, 6, value)
    found = quality(store, project, 500)
    assert found.nominal.value == pytest.approx(1 - 14 / 30, abs=1e-12)
    assert found.fleiss.value == pytest.approx((3 / 4 - 34 / 64) / (1 - 34 / 64), abs=1e-12)
    rows = [{"a": 1, "b": 2}, {"a": 3, "b": 5}, {"a": 6, "b": 6}, {"a": 7, "b": 6}]
    assert found.ordinal.value == pytest.approx(krippendorff(rows, "ordinal"), abs=1e-12)
    # Quadratic kappa by hand: means 4.25 and 4.75, variances 5.6875 and 2.6875, covariance 3.5625.
    assert found.cohen == {("ann", "bob"): pytest.approx(2 * 3.5625 / (5.6875 + 2.6875 + 0.25), abs=1e-12)}
    for estimate in (found.nominal, found.ordinal, found.fleiss):
        assert estimate.units == 4 and estimate.low <= estimate.value <= estimate.high
        assert "4 items" in estimate.words()


def test_pairs_of_one_prompt_are_one_witness(store: LabelStore) -> None:
    """Six pairs of one prompt, all agreed on or all not: the interval is that of the prompts, not of the pairs."""
    few, many = make(store, items=24, answers=4, name="few"), make(store, items=144, name="many")
    rng = Random(6)
    for project in (few, many):
        agreed: dict[str, bool] = {}
        units = []
        for number, item in enumerate(store.items(project)):
            alike = agreed.setdefault(item.comparison_id, rng.random() < 0.7)
            side = 1 if number % 2 else 7
            units.append({"ann": side, "bob": side if alike else 8 - side})
        say_all(store, project, units)
    one, other = quality(store, few).nominal, quality(store, many).nominal
    assert one.units == other.units == 144
    assert one.high - one.low > 1.8 * (other.high - other.low)


def test_rankings_count_as_their_pairs(store: LabelStore) -> None:
    project = make(store, items=2, answers=3, gold=1, mode="ranking")
    say(store, project, "ann", 0, [[0], [1], [2]], order=[2, 0, 1])
    say(store, project, "bob", 0, [[0], [2], [1]], order=[0, 1, 2])
    say(store, project, "ann", 1, [[0, 1]], order=[1, 2, 0])  # the third left out
    say(store, project, "ann", 2, [[1], [2], [0]])
    say(store, project, "bob", 2, [[0, 1], [2]])
    say(store, project, "cid", 2, [[2], [1]])  # gold, of which one answer was not ranked
    found = quality(store, project, FEW)
    assert (found.given, found.wanted) == (3, 4)
    ann, bob, cid = (of(found, name) for name in ("ann", "bob", "cid"))
    assert [(each.gold_right, each.gold_asked) for each in (ann, bob, cid)] == [(1, 1), (0, 1), (0, 1)]
    # Of each ranking the outermost two as shown: 2 against 1 (1 won, right), 1 against 0 (tie), 0 against 2 (2, right).
    assert (ann.side.left, ann.side.count) == (0, 2)
    assert ann.ties == 1 / 7
    # Pairs 0-1 and 0-2: both first; 1-2: first and second.
    assert found.nominal.units == 3
    rows = [{"a": -1, "b": -1}, {"a": -1, "b": -1}, {"a": -1, "b": 1}]
    assert found.nominal.value == pytest.approx(krippendorff(rows), abs=1e-12)
    split = disagreements(store, project)
    assert [(each.key, each.pair, each.share) for each in split] == [("c0:0-1-2", (1, 2), 0.5)]


# The queue


def test_disagreements_the_most_contested_first(store: LabelStore) -> None:
    project = make(store, items=6, gold=1, overlap=4)
    said = [
        (1, 3, 5),  # 0: one of three against
        (2, 2, 2),  # agreed
        (3, 4, 4),  # nobody took the other side
        (3, 5),  # 3: even, with weak words
        (1, 7),  # 4: even, with strong ones
        (1, 2, 6, 4),  # 5: one of four against
        (1, 7),  # gold
    ]
    for item, values in enumerate(said):
        for name, value in zip("abcd", values, strict=False):
            say(store, project, name, item, value, comment="because" if (item, name) == (4, "b") else None)
    found = disagreements(store, project)
    assert [each.key for each in found] == ["c4:0-1", "c3:0-1", "c0:0-1", "c5:0-1"]
    assert [each.share for each in found] == [0.5, 0.5, 1 / 3, 1 / 4]
    assert found[0].opinions == (Opinion("a", 1, None), Opinion("b", 7, "because"))
    assert found[0].item_id == store.items(project)[4].id and found[0].pair == (0, 1)


def test_disagreement_is_of_answers_not_of_sides_of_the_screen(store: LabelStore) -> None:
    project = make(store, items=2)
    say(store, project, "ann", 0, 2)
    say(store, project, "bob", 0, 6, order=[1, 0])  # the same answer
    say(store, project, "ann", 1, 2)
    say(store, project, "bob", 1, 2, order=[1, 0])  # the other one
    assert [each.key for each in disagreements(store, project)] == ["c1:0-1"]
    assert [each.value for each in disagreements(store, project)[0].opinions] == [2, 6]


def test_a_reviewers_verdict_ends_a_disagreement_and_is_no_annotators_label(store: LabelStore) -> None:
    project = make(store, items=3)
    for item in range(2):
        say(store, project, "ann", item, 1)
        say(store, project, "bob", item, 7)
    before = quality(store, project, FEW)
    store.adjudicate(project, "c0:0-1", "eve", {"value": 2}, "verdict")
    store.adjudicate(project, "c2:0-1", "eve", {"value": 2}, "of nothing")
    assert quality(store, project, FEW) == before
    assert [each.key for each in disagreements(store, project)] == ["c1:0-1"]
    assert {each.annotator for each in reliability(store, project)} == {"ann", "bob"}


def test_figures_hold_while_others_label(store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items that come, with their labels, between the two readings leave every event its item."""
    project = make(store, items=1)
    say(store, project, "ann", 0, 1)
    read = store.events

    def meanwhile(project: Project) -> Any:
        number = next(NUMBERS)
        store.add_items(project, [comparison(1000 + number)])
        store.record(project, judged(store.items(project)[-1], "bob", 7))
        return read(project)

    monkeypatch.setattr(store, "events", meanwhile)
    for figures in (quality, disagreements, reliability):
        figures(store, project)


def test_remarks_are_the_words_that_count_the_newest_first(store: LabelStore) -> None:
    project = make(store, items=3)
    say(store, project, "ann", 0, 1, comment="first thought")
    say(store, project, "bob", 0, 7, comment="no", flag="odd", rewrite="Better.")
    say(store, project, "ann", 0, 2, comment="second thought")
    say(store, project, "ann", 1, 4)
    assigner = Assigner(store, project)
    lease = assigner.next("cid")
    assert lease is not None
    assigner.skip("cid", lease.token, "s", {"order": list(lease.order), "reason": "not my field"})
    assert remarks(store, project) == [
        Remark(lease.item.key, "cid", "skip", "not my field"),
        Remark("c0:0-1", "ann", "comment", "second thought"),
        Remark("c0:0-1", "bob", "flag", "odd"),
        Remark("c0:0-1", "bob", "comment", "no"),
        Remark("c0:0-1", "bob", "better answer", "Better."),
    ]


# Reliability


def textbook(units: list[dict[str, int]], rounds: int = 300) -> dict[str, float]:
    """Dawid and Skene (1979), equations 2.3 to 2.5, written as loops; how often each annotator is right."""
    names, kinds = sorted({n for u in units for n in u}), sorted({v for u in units for v in u.values()})
    truth = [[sum(v == k for v in u.values()) / len(u) for k in kinds] for u in units]
    for _ in range(rounds):
        prior = [sum(t[j] for t in truth) / len(units) for j in range(len(kinds))]
        error: dict[str, list[list[float]]] = {}
        for name in names:
            error[name] = []
            for j in range(len(kinds)):
                given_ = [sum(t[j] for t, u in zip(truth, units, strict=True) if u.get(name) == k) for k in kinds]
                error[name].append([g / sum(given_) if sum(given_) else 0.0 for g in given_])
        for row, unit in zip(truth, units, strict=True):
            for j in range(len(kinds)):
                row[j] = prior[j] * math.prod(error[name][j][kinds.index(v)] for name, v in unit.items())
            row[:] = [each / sum(row) for each in row]
    return {n: sum(prior[j] * error[n][j][j] for j in range(len(kinds))) for n in names}


def panel(rng: Random, right: dict[str, float], count: int) -> list[dict[str, int]]:
    """Each annotator gives the true side (-1, 0 for a tie, 1) with their own probability, else one of the others."""
    units = []
    for _ in range(count):
        sides = rng.sample([-1, 0, 1], 3)  # the first is the true one
        units.append({name: sides[0] if rng.random() < p else rng.choice(sides[1:]) for name, p in right.items()})
    return units


def test_reliability_finds_the_coin_and_equals_the_textbook(store: LabelStore) -> None:
    right = {"ann": 0.95, "bob": 0.85, "cid": 0.7, "coin": 1 / 3}
    units = panel(Random(9), right, 150)
    project = make(store, items=len(units) + 1, overlap=4)
    say_all(store, project, [{name: 4 + 2 * side for name, side in unit.items()} for unit in units])
    say(store, project, "lonely", len(units), 1)  # nobody else judged that item
    found = reliability(store, project)
    assert [each.annotator for each in found] == ["coin", "cid", "bob", "ann"]
    assert all(each.votes == 150 for each in found)
    expected = textbook(units)
    for each in found:
        assert each.right == pytest.approx(expected[each.annotator], abs=1e-5)
        assert each.right == pytest.approx(right[each.annotator], abs=0.1)


def test_reliability_does_not_hang_on_which_answer_is_first(store: LabelStore) -> None:
    units = panel(Random(10), {"ann": 0.95, "bob": 0.85, "cid": 0.75}, 60)
    one, other = make(store, items=60, name="one"), make(store, items=60, name="other")
    values = [{name: 4 + side for name, side in unit.items()} for unit in units]
    say_all(store, one, values)
    say_all(store, other, values, order=[1, 0])
    for left, right in zip(reliability(store, one), reliability(store, other), strict=True):
        assert left.annotator == right.annotator and left.right == pytest.approx(right.right, abs=1e-6)
        assert np.isfinite(left.right)


# Imports


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    heavy = "{'torch', 'align', 'gradio', 'numpy', 'pandas', 'crowdkit', 'sklearn'}"
    code = f"import sys, labeling_ui.quality; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
