"""Leases: caps that hold, items that nobody judges twice, labels that come late, undo, and the order of items."""

from __future__ import annotations

import functools
import random
import secrets
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from labeling_ui.assignment import UNDO_DEPTH, Assigner, Lease, Refused, drawn_order
from labeling_ui.schema import ITEM, LABEL, LEASE
from labeling_ui.store import LabelStore, Project, Settings
from reward.records import InputError
from tests.labeling_ui.conftest import Clock, comparison, on_both


def make(store: LabelStore, items: int = 6, name: str = "p", **settings: Any) -> Assigner:
    project = store.create_project(name, settings=Settings(**{"gold_share": 0.0, **settings}))
    answers = 4 if project.settings.mode == "ranking" else 2
    store.add_items(project, [comparison(n, answers=answers) for n in range(items)])
    return Assigner(store, project)


def answer(assigner: Assigner, lease: Lease, value: int = 2, key: str | None = None) -> Lease | None:
    said = {"order": list(lease.order), "value": value}
    return assigner.label(lease.annotator, lease.token, key or f"key-{lease.token}", said)[1]


def work(assigner: Assigner, annotator: str, most: int = 10_000) -> list[str]:
    """Label until nothing is left; the items' keys in order."""
    done, lease = [], assigner.next(annotator)
    while lease is not None and len(done) < most:
        done.append(lease.item.key)
        lease = answer(assigner, lease)
    return done


def counts(assigner: Assigner) -> Counter[int]:
    with assigner.store.database.read() as connection:
        rows = connection.execute(sa.select(LABEL.c.item_id).where(LABEL.c.kind == "label"))
        return Counter(rows.scalars())


# Caps


@pytest.mark.parametrize("overlap", [1, 3])
@on_both
def test_everyone_together_gives_every_item_its_labels_and_no_more(store: LabelStore, overlap: int) -> None:
    assigner = make(store, items=8, overlap=overlap)
    people = [f"ann-{n}" for n in range(5)]
    with ThreadPoolExecutor(len(people)) as pool:
        done = list(pool.map(lambda name: work(assigner, name), people))
    assert all(len(set(keys)) == len(keys) for keys in done)  # nobody judged one twice
    assert sorted(counts(assigner).values()) == [overlap] * 8
    progress = assigner.progress("ann-0")
    assert (progress.given, progress.wanted, progress.mine) == (8 * overlap, 8 * overlap, len(done[0]))


@on_both
def test_a_lease_takes_the_place_of_a_label(store: LabelStore) -> None:
    assigner = make(store, items=1)
    lease = assigner.next("ann")
    assert lease is not None and assigner.next("bob") is None
    assert assigner.next("ann").token == lease.token  # type: ignore[union-attr]  # asked again, the same
    assert answer(assigner, lease) is None
    assert assigner.next("bob") is None


@on_both
def test_caps_hold_under_random_behaviour(store: LabelStore, clock: Clock) -> None:
    """People label, skip, undo, leave, let leases expire and send late: at no time is an item over its cap."""
    drawn = random.Random(0)
    assigner = make(store, items=7, overlap=2, lease_seconds=60.0)
    people, old = [f"ann-{n}" for n in range(6)], []
    for step in range(400):
        name = drawn.choice(people)
        deed = drawn.choice(["label", "label", "label", "skip", "undo", "leave", "wait", "late"])
        lease = assigner.next(name)
        try:
            if deed == "label" and lease:
                answer(assigner, lease)
            elif deed == "skip" and lease and drawn.random() < 0.2:
                assigner.skip(name, lease.token, f"s{step}", {"order": list(lease.order), "reason": "no"})
            elif deed == "undo":
                assigner.undo(name, f"u{step}")
            elif deed == "leave":
                assigner.release(name)
            elif deed == "wait":
                clock.seconds += drawn.choice([5, 70])
            elif deed == "late" and old:
                late = drawn.choice(old)
                answer(assigner, late, key=f"late-{step}")
        except Refused:
            pass
        if lease:
            old.append(lease)
        with store.database.read() as connection:
            live = Counter(connection.execute(sa.select(LEASE.c.item_id).where(LEASE.c.state == "live")).scalars())
            taken = dict(connection.execute(sa.select(ITEM.c.id, ITEM.c.taken)).all())
        labelled = counts(assigner)
        for item_id, known in taken.items():
            assert labelled[item_id] + live[item_id] == known <= 2
    projected = [(e.item_id, e.annotator, e.key) for e in store.labels(assigner.project)]
    store.replay(assigner.project)
    assert [(e.item_id, e.annotator, e.key) for e in store.labels(assigner.project)] == projected


# Leases


@on_both
def test_an_expired_lease_frees_its_item_and_a_late_label_is_taken_or_refused(store: LabelStore, clock: Clock) -> None:
    assigner = make(store, items=1, lease_seconds=60.0)
    first = assigner.next("ann")
    assert first is not None
    clock.seconds += 61
    second = assigner.next("bob")  # ann's place is free again
    assert second is not None and second.token != first.token
    with pytest.raises(Refused, match="others have judged it since") as refusal:
        answer(assigner, first)
    assert refusal.value.reason == "lost"
    clock.seconds += 61  # now bob is late too, but nobody came instead
    assert answer(assigner, second, value=6) is None
    assert [label.annotator for label in store.labels(assigner.project)] == ["bob"]
    with pytest.raises(Refused):
        answer(assigner, first)


@on_both
def test_a_heartbeat_keeps_a_lease(store: LabelStore, clock: Clock) -> None:
    assigner = make(store, items=1, lease_seconds=60.0)
    lease = assigner.next("ann")
    assert lease is not None
    for _ in range(5):
        clock.seconds += 50
        assert assigner.heartbeat("ann", lease.token) == pytest.approx(clock.seconds + 60)
    assert assigner.next("bob") is None
    clock.seconds += 61
    with pytest.raises(Refused, match="too long without a sign"):
        assigner.heartbeat("ann", lease.token)


@on_both
def test_time_does_not_run_backwards(store: LabelStore, clock: Clock) -> None:
    assigner = make(store, items=1, lease_seconds=60.0)
    first = assigner.next("ann")
    clock.seconds -= 3600
    again = assigner.next("ann")
    assert first is not None and again is not None and again.token == first.token
    assert again.expires >= first.expires


def test_only_who_holds_the_lease_may_answer(store: LabelStore) -> None:
    assigner = make(store)
    lease = assigner.next("ann")
    assert lease is not None
    for name, token in (("bob", lease.token), ("ann", "made-up"), ("ann", "")):
        with pytest.raises(Refused, match="not lent to you"):
            assigner.label(name, token, "k", {"order": list(lease.order), "value": 1})
    assert store.count_labels(assigner.project) == 0


@on_both
def test_the_same_label_sent_again_is_stored_once(store: LabelStore) -> None:
    assigner = make(store)
    lease = assigner.next("ann")
    assert lease is not None
    said = {"order": list(lease.order), "value": 3}
    event, following, _ = assigner.label("ann", lease.token, "k", said)
    again, same, _ = assigner.label("ann", lease.token, "k", said)
    assert again == event and same is not None and following is not None and same.token == following.token
    with pytest.raises(InputError, match="a different value"):
        assigner.label("ann", lease.token, "k", {**said, "value": 5})
    with pytest.raises(Refused, match="answered this item already"):
        assigner.label("ann", lease.token, "other", said)
    assert store.count_labels(assigner.project) == 1


def test_the_order_is_drawn_and_stored(store: LabelStore) -> None:
    assigner = make(store, items=400)
    orders = Counter()
    lease = assigner.next("ann")
    while lease is not None:
        orders[lease.order] += 1
        with pytest.raises(Refused, match="were shown as"):
            assigner.label("ann", lease.token, "x", {"order": list(lease.order[::-1]), "value": 1})
        lease = answer(assigner, lease)
    assert orders.total() == 400
    assert 140 < orders[0, 1] < 260  # six standard deviations
    assert all(
        e.body["order"] in ([0, 1], [1, 0]) and len(e.body["shown"]) == 64 for e in store.labels(assigner.project)
    )


def test_no_answer_is_favoured_on_the_screen() -> None:
    orders = Counter(drawn_order(secrets.token_urlsafe(16), (0, 1)) for _ in range(10_000))
    assert abs(orders[0, 1] - 5000) < 5 * 50  # five standard deviations
    rankings = Counter(drawn_order(secrets.token_urlsafe(16), (0, 1, 2)) for _ in range(12_000))
    assert len(rankings) == 6 and all(abs(count - 2000) < 5 * 41 for count in rankings.values())


# Undo and skip


@on_both
def test_undo_lends_the_item_again_as_it_was_shown(store: LabelStore) -> None:
    assigner = make(store)
    first = assigner.next("ann")
    assert first is not None
    second = answer(assigner, first, value=6)
    assert second is not None
    back = assigner.undo("ann", "u1")
    assert back is not None and back.item.key == first.item.key and back.order == first.order
    assert back.before is not None and back.before["value"] == 6
    assert store.count_labels(assigner.project) == 0
    assert [event.kind for event in store.events(assigner.project)] == ["label", "undo"]
    assert assigner.undo("ann", "u1").token == back.token  # type: ignore[union-attr]  # sent again, nothing more
    following = answer(assigner, back, value=1)
    assert following is not None
    assert [event.body["value"] for event in store.labels(assigner.project)] == [1]


@on_both
def test_undo_goes_back_one_by_one_and_forward_again_in_order(store: LabelStore) -> None:
    assigner = make(store)
    keys = work(assigner, "ann", most=3)
    backwards = [assigner.undo("ann", f"u{n}") for n in range(3)]
    assert [lease.item.key for lease in backwards if lease] == keys[::-1]
    lease, forwards = backwards[-1], []
    for _ in range(3):
        assert lease is not None
        forwards.append(lease.item.key)
        lease = answer(assigner, lease, key=f"again-{lease.item.key}")
    assert forwards == keys
    assert lease is not None and lease.item.key not in keys


@on_both
def test_progress_follows_whatever_is_labelled_skipped_and_taken_back(store: LabelStore) -> None:
    assigner, drawn = make(store, items=6, overlap=2), random.Random(1)
    for step in range(40):
        name = f"ann-{drawn.randrange(3)}"
        try:
            lease = assigner.undo(name, f"u{step}") if drawn.random() < 0.4 else assigner.next(name)
        except Refused:  # others have filled what they skipped
            continue
        order = None if lease is None else list(lease.order)
        if lease is not None and drawn.random() < 0.6:
            assigner.label(name, lease.token, f"l{step}", {"order": order, "value": 2})
        elif lease is not None and drawn.random() < 0.5:
            assigner.skip(name, lease.token, f"s{step}", {"order": order, "reason": "cannot tell"})
        given = [event.annotator for event in store.labels(assigner.project)]
        for person in ("ann-0", "ann-1", "ann-2"):
            progress = assigner.progress(person)
            assert (progress.mine, progress.given) == (given.count(person), len(given))


def test_undo_is_twenty_deep(store: LabelStore) -> None:
    assigner = make(store, items=UNDO_DEPTH + 3)
    assert assigner.undo("ann", "none") is None
    work(assigner, "ann")
    for n in range(UNDO_DEPTH):
        assert assigner.undo("ann", f"u{n}") is not None
    with pytest.raises(Refused, match="last 20"):
        assigner.undo("ann", "one too many")
    assert store.count_labels(assigner.project) == 3


@on_both
def test_a_skipped_item_goes_to_others_and_never_comes_back(store: LabelStore) -> None:
    assigner = make(store, items=2)
    lease = assigner.next("ann")
    assert lease is not None
    with pytest.raises(InputError, match="needs a reason"):
        assigner.skip("ann", lease.token, "s", {"order": list(lease.order), "reason": " "})
    _, following, _ = assigner.skip("ann", lease.token, "s", {"order": list(lease.order), "reason": "cannot tell"})
    assert following is not None and following.item.key != lease.item.key
    assert answer(assigner, following) is None
    assert work(assigner, "bob") == [lease.item.key]


def test_a_skip_cannot_be_taken_back_once_others_filled_the_item(store: LabelStore) -> None:
    assigner = make(store, items=1)
    lease = assigner.next("ann")
    assert lease is not None
    assigner.skip("ann", lease.token, "s", {"order": list(lease.order), "reason": "cannot tell"})
    work(assigner, "bob")
    with pytest.raises(Refused, match="it stays skipped"):
        assigner.undo("ann", "u")
    assert sum(counts(assigner).values()) == 1


# Rankings


def test_rankings_speak_of_answers_or_of_places(store: LabelStore) -> None:
    assigner = make(store, mode="ranking", criteria=("style",))
    lease = assigner.next("ann")
    assert lease is not None
    event, following, _ = assigner.label(
        "ann", lease.token, "a", {"ranking": [[2], [0, 1]], "ratings": {"style": {"3": 5}}}
    )
    places = lease.order
    assert event.body["ranking"] == [[places[2]], sorted([places[0], places[1]])]
    assert event.body["ratings"] == {"style": {str(places[3]): 5}}
    pairs = dict(event.votes())
    assert pairs[min(places[0], places[1]), max(places[0], places[1])].value == 4
    assert all(places[3] not in pair for pair in pairs)  # left out of the ranking: nothing is said of it
    assert following is not None
    for ranking in ([[0]], [[0], [0]], [[0], [9]], [], "best", [[]], [[True], [1]], None):
        with pytest.raises(InputError):
            assigner.label("ann", following.token, "b", {"ranking": ranking})


# Order of items


@on_both
def test_least_labelled_items_come_first(store: LabelStore) -> None:
    assigner = make(store, items=8, overlap=3, policy="least")
    first, second = work(assigner, "ann", most=3), work(assigner, "bob", most=3)
    assert not set(first) & set(second)


@on_both
def test_uncertain_items_come_first_and_some_at_random(store: LabelStore) -> None:
    assigner = make(store, items=200, policy="active", random_share=0.3)
    store.prioritise(assigner.project, {f"c{n}:0-1": 1 - n / 200 for n in range(200)})
    done = work(assigner, "ann", most=100)
    arms = Counter(event.body["arm"] for event in store.labels(assigner.project))
    assert 12 < arms["random"] < 50
    active = [e for e in store.labels(assigner.project) if e.body["arm"] == "policy"]
    numbers = [int(key.split(":")[0][1:]) for key in done]
    by_policy = [n for n, e in zip(numbers, store.labels(assigner.project), strict=True) if e in active]
    assert by_policy == sorted(by_policy)


@on_both
def test_gold_items_are_mixed_in_beside_the_cap(store: LabelStore) -> None:
    project = store.create_project("p", settings=Settings(gold_share=0.3))
    store.add_items(project, [comparison(n) for n in range(60)])
    store.add_items(project, [comparison(100 + n, gold=[0, 1]) for n in range(10)])
    assigner = Assigner(store, project)
    first, second = work(assigner, "ann"), work(assigner, "bob")
    gold = [key for key in first if key.startswith("c1") and len(key.split(":")[0]) == 4]
    assert 5 <= len(gold) <= 10 and len(set(first)) == len(first)
    assert all(key.startswith("c10") for key in second)  # the rest had their one label
    assert all(item["comparison_id"].startswith("c") and len(votes) == 1 for item, votes in store.votes(project))
    assert len(store.votes(project)) == 60


def _note(seen: list[Any], connection: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool) -> None:
    seen.append((sql, parameters))


def test_the_plan_of_next_uses_its_index(tmp_path: Path) -> None:
    with LabelStore(tmp_path / "plan.db") as store:
        for policy in ("random", "least", "active"):
            assigner = make(store, items=3, name=policy, policy=policy)
            seen: list[tuple[str, Any]] = []
            note = functools.partial(_note, seen)
            sa.event.listen(store.database.engine, "before_cursor_execute", note)
            work(assigner, "ann", most=2)
            sa.event.remove(store.database.engine, "before_cursor_execute", note)
            picks = [(sql, par) for sql, par in seen if 'items."full"' in sql and sql.startswith("SELECT items.id")]
            assert picks
            with store.database.read() as connection:
                for sql, parameters in picks:
                    plan = " ".join(r[3] for r in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", parameters))
                    assert "USING INDEX items_by_" in plan or "USING COVERING INDEX items_by_" in plan, plan
                    assert "USE TEMP B-TREE" not in plan, plan


@on_both
def test_projects_keep_apart(store: LabelStore) -> None:
    one, two = make(store, items=2, name="one"), make(store, items=2, name="two")
    assert len(work(one, "ann")) == len(work(two, "ann")) == 2
    lease: Project = one.project
    assert store.count_labels(lease) == 2


@on_both
def test_many_threads_of_one_annotator_hold_one_item(store: LabelStore) -> None:
    assigner, tokens, gate = make(store), set(), threading.Barrier(6)

    def ask(_: int) -> None:
        gate.wait()
        lease = assigner.next("ann")
        assert lease is not None
        tokens.add(lease.token)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))
    assert len(tokens) == 1
