"""Who judges what next: leases, so that no item is judged too often and no annotator judges one twice.

An item is lent to an annotator with a token. While the lease lives (a heartbeat renews it) it counts towards the item's
cap as a label does, so that labels and leases together never pass it. An expired lease frees its place; a label that
comes late all the same is taken where the place is still free, and refused with the reason where it is not.

Everything happens in transactions that hold the write lock from their start: what is read there cannot change before
it is written.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import sqlalchemy as sa

from labeling_ui import statements as st
from labeling_ui.checks import check_judgement, checked_note, checked_seconds, is_order
from labeling_ui.project import Event, Item, Project
from labeling_ui.projection import (
    append,
    event_of_key,
    event_row,
    read_item,
    recount,
    recount_leases,
    same_said,
    shown_digest,
)
from labeling_ui.schema import EVENT, LABEL, LEASE
from labeling_ui.store import LabelStore
from reward.records import InputError

UNDO_DEPTH = 20
LONGEST_LEASE = 24 * 3600.0
# Kept in memory of those lent last.
MOST_LENT_ITEMS = 1000


@dataclass(frozen=True, slots=True)
class Lease:
    """An item lent to an annotator.

    order: the answers as they stand on the screen, drawn when the lease was made. arm: why this item: policy, random,
    gold or undo. before: after an undo, what the annotator had said.
    """

    token: str
    item: Item
    annotator: str
    order: tuple[int, ...]
    arm: str
    expires: float
    before: dict[str, Any] | None = None


class Refused(InputError):
    """A label that cannot be taken; the sentence is for the annotator. `reason` is one word for programs."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Progress:
    """Labels: `mine` by the annotator, `given` by all, `wanted` in the end."""

    mine: int
    given: int
    wanted: int


class Answered(NamedTuple):
    """What an answer leads to: the event as it is stored, the next item (None: there is none left), how far all is."""

    event: Event
    lease: Lease | None
    progress: Progress


class Assigner:
    """Lends the items of one project."""

    def __init__(self, store: LabelStore, project: Project) -> None:
        self.store, self.project = store, project

    # -- what annotators do ---------------------------------------------------------------------------------------

    def next(self, annotator: str) -> Lease | None:
        """The item the annotator holds, or one lent now; None: there is none left for them."""
        with self.store.database.write_with_others() as connection:
            now = self.store.now()
            self._expire(connection, now)
            return self._next(connection, annotator, now)

    def label(self, annotator: str, token: str, key: str, said: Mapping[str, Any]) -> Answered:
        """Store the label of a lent item, and lend the next one, in one transaction.

        Args:
            key: idempotency key: sent again, the label is stored once and answered alike.
            said: the parts of a `Judgement` beside item, annotator and key. Without `order` it speaks of places on the
                screen, from 0, where a label speaks of answers.

        Raises:
            Refused: the lease is not the annotator's, or was answered or lost.
            InputError: the label says what cannot be said.
        """
        return self._answer(annotator, token, "label", key, said)

    def skip(self, annotator: str, token: str, key: str, said: Mapping[str, Any]) -> Answered:
        """Leave a lent item to others, for good, with a reason (`said` holds `order`, `reason`, `flag`, `seconds`)."""
        return self._answer(annotator, token, "skip", key, said)

    def undo(self, annotator: str, key: str) -> Lease | None:
        """Take back the annotator's last label or skip and lend its item again; None: there is none to take back.

        What they hold meanwhile goes back to the others. Up to 20 labels can be taken back in a row; what was said
        stays among the events.
        """
        with self.store.database.write_with_others() as connection:
            now = self.store.now()
            self._expire(connection, now)
            if (known := event_of_key(connection, self.project, key)) is not None:
                same_said(_fields(known), "undo", {"key": key, "annotator": annotator, "item_id": known.item_id}, {})
                return self._held(connection, annotator, now)
            own = (EVENT.c.project_id == self.project.id) & (EVENT.c.annotator == annotator)
            latest = connection.execute(
                sa.select(EVENT.c.kind).where(own).order_by(EVENT.c.id.desc()).limit(UNDO_DEPTH)
            ).scalars()
            if list(latest) == ["undo"] * UNDO_DEPTH:
                raise Refused("depth", f"Only the last {UNDO_DEPTH} labels can be taken back in a row.")
            row = connection.execute(
                sa.select(EVENT)
                .join(LABEL, LABEL.c.event_id == EVENT.c.id)
                .where(LABEL.c.project_id == self.project.id, LABEL.c.annotator == annotator)
                .order_by(EVENT.c.id.desc())
                .limit(1)
            ).one_or_none()
            if row is None:
                return None
            item = self._item(connection, row.item_id)
            taken = recount_leases(connection, self.project, item.id)
            if row.kind == "skip" and item.gold is None and taken >= self.project.settings.overlap:
                raise Refused("full", "Others have judged the item that you skipped; it stays skipped.")
            self._give_up(connection, annotator)
            body = {"undoes": row.key}
            event = append(
                connection, self.project, event_row(self.project, row.item_id, annotator, "undo", key, body, now)
            )
            recount(connection, self.project, item.id)
            return self._lend(connection, annotator, item, "undo", now, tuple(row.body["order"]), event.id)

    def heartbeat(self, annotator: str, token: str) -> float:
        """Keep the lease: until when, in seconds since 1970.

        Raises:
            Refused: it is not the annotator's, or is over.
        """
        with self.store.database.write_with_others() as connection:
            now = self.store.now()
            self._expire(connection, now)
            row = self._lease_row(connection, annotator, token)
            if row.state != "live":
                raise Refused("lost", "This item was kept for you too long without a sign and went to others.")
            expires = min(now + self.project.settings.lease_seconds, row.issued + LONGEST_LEASE)
            connection.execute(st.SET_EXPIRY, {"t": token, "until": expires})
            return expires

    def release(self, annotator: str) -> None:
        """Give back what the annotator holds, as they leave."""
        with self.store.database.write_with_others() as connection:
            self._give_up(connection, annotator)

    def progress(self, annotator: str) -> Progress:
        """How far the annotator, and the project, have come; skips do not count, nor, for the project, gold items."""
        with self.store.database.read() as connection:
            return self._progress(connection, annotator)

    # -- within a transaction -------------------------------------------------------------------------------------

    def _progress(self, connection: sa.Connection, annotator: str) -> Progress:
        given, items, own = connection.execute(st.PROGRESS, {"p": self.project.id, "a": annotator}).one()
        return Progress(own, given, items * self.project.settings.overlap)

    def _answer(self, annotator: str, token: str, kind: str, key: str, said: Mapping[str, Any]) -> Answered:
        with self.store.database.write_with_others() as connection:
            now = self.store.now()
            self._expire(connection, now)
            row = self._lease_row(connection, annotator, token)
            item = self._item(connection, row.item_id)
            spoken = said if "order" in said else _of_answers(said, row.order)
            given = {**spoken, "annotator": annotator, "key": key, "item_id": item.id}
            checked = check_judgement(self.project, item, given) if kind == "label" else _checked_skip(item, given)
            if (known := event_of_key(connection, self.project, key)) is not None:
                same_said(_fields(known), kind, given, checked)
                lease = self._next(connection, annotator, now)
                return Answered(known, lease, self._progress(connection, annotator))
            if checked["order"] != list(row.order):
                raise Refused("order", f"The answers were shown as {row.order}, not as {checked['order']}.")
            self._may_answer(connection, annotator, row, item)
            body = checked | {
                "shown": shown_digest(item, row.order),
                "guidelines": self.project.guidelines,
                "lease": token,
                "arm": row.arm,
            }
            connection.execute(st.SET_STATE, {"t": token, "s": "labelled"})
            event = append(connection, self.project, event_row(self.project, item.id, annotator, kind, key, body, now))
            recount(connection, self.project, item.id)
            # Whoever answers what they hold, in the ordinary course, holds nothing else and has taken nothing back.
            ordinary = row.state == "live" and row.arm != "undo"
            lease = self._lent(connection, annotator, now) if ordinary else self._next(connection, annotator, now)
            return Answered(event, lease, self._progress(connection, annotator))

    def _may_answer(self, connection: sa.Connection, annotator: str, row: Any, item: Item) -> None:
        if row.state == "live":
            return
        if row.state == "labelled":
            raise Refused("answered", "You have answered this item already; take the answer back to change it.")
        if connection.execute(st.LABEL_BY, {"i": item.id, "a": annotator}).one_or_none() is not None:
            raise Refused("answered", "You have answered this item already; take the answer back to change it.")
        held = (LEASE.c.item_id == item.id) & (LEASE.c.annotator == annotator) & (LEASE.c.state == "live")
        mine = connection.execute(sa.select(sa.func.count()).select_from(LEASE).where(held)).scalar_one()
        taken = recount_leases(connection, self.project, item.id)
        if item.gold is None and taken - mine >= self.project.settings.overlap:
            raise Refused(
                "lost", "Your time for this item ran out and others have judged it since: your label was not stored."
            )
        # The same item may have been lent to them again since; it is answered now.
        connection.execute(sa.update(LEASE).where(held).values(state="given up"))

    def _item(self, connection: sa.Connection, item_id: int) -> Item:
        """An item that is lent or about to be; what it says never changes, and several people are shown it in a row."""
        known = self.store.lent_items
        if (found := known.get(item_id)) is None:
            found = read_item(connection, self.project, item_id)
            if len(known) >= MOST_LENT_ITEMS:
                del known[next(iter(known))]
            known[item_id] = found
        return found

    def _lease_row(self, connection: sa.Connection, annotator: str, token: str) -> Any:
        known = {"t": token, "p": self.project.id, "a": annotator}
        row = connection.execute(st.LEASE_BY_TOKEN, known).one_or_none()
        if row is None:
            raise Refused("stranger", "This item is not lent to you: load the page again.")
        return row

    def _expire(self, connection: sa.Connection, now: float) -> None:
        for token, item_id in connection.execute(st.OVERDUE, {"now": now, "p": self.project.id}).all():
            connection.execute(st.SET_STATE, {"t": token, "s": "expired"})
            recount_leases(connection, self.project, item_id)

    def _give_up(self, connection: sa.Connection, annotator: str) -> None:
        for row in connection.execute(st.HELD, {"p": self.project.id, "a": annotator}).all():
            connection.execute(st.SET_STATE, {"t": row.token, "s": "given up"})
            recount_leases(connection, self.project, row.item_id)

    def _held(self, connection: sa.Connection, annotator: str, now: float) -> Lease | None:
        row = connection.execute(st.HELD, {"p": self.project.id, "a": annotator}).first()
        if row is None:
            return None
        expires = min(now + self.project.settings.lease_seconds, row.issued + LONGEST_LEASE)
        connection.execute(st.SET_EXPIRY, {"t": row.token, "until": expires})
        item = self._item(connection, row.item_id)
        return self._lease(connection, row.token, item, annotator, tuple(row.order), row.arm, expires, row.undone)

    def _next(self, connection: sa.Connection, annotator: str, now: float) -> Lease | None:
        if held := self._held(connection, annotator, now):
            return held
        if not self.project.settings.closed and (again := self._undone(connection, annotator, now)):
            return again
        return self._lent(connection, annotator, now)

    def _lent(self, connection: sa.Connection, annotator: str, now: float) -> Lease | None:
        """An item lent now."""
        if self.project.settings.closed:
            return None
        token = secrets.token_urlsafe(16)
        drawn = Random(f"arm {token}")
        arms = ["policy", "random"]
        if self.project.settings.policy == "active" and drawn.random() < self.project.settings.random_share:
            arms = ["random"]
        if drawn.random() < self.project.settings.gold_share:
            arms = ["gold", *arms]
        for arm in arms:
            item_id = self._gold(connection, annotator) if arm == "gold" else self._pick(connection, annotator, arm)
            if item_id is not None:
                return self._lend(connection, annotator, self._item(connection, item_id), arm, now, token=token)
        return None

    def _undone(self, connection: sa.Connection, annotator: str, now: float) -> Lease | None:
        """What the annotator took back and did not judge again comes first, the last taken back last."""
        row = connection.execute(st.UNDONE, {"p": self.project.id, "a": annotator}).one_or_none()
        if row is None:
            return None
        item = self._item(connection, row.item_id)
        return self._lend(connection, annotator, item, "undo", now, tuple(row.order), row.undone)

    def _gold(self, connection: sa.Connection, annotator: str) -> int | None:
        return connection.execute(st.GOLD, {"p": self.project.id, "a": annotator}).scalar_one_or_none()

    def _pick(self, connection: sa.Connection, annotator: str, arm: str) -> int | None:
        """The first open item after the annotator's place in the order; once round, from the start."""
        policy = self.project.settings.policy if arm == "policy" else "random"
        who = {"p": self.project.id, "a": annotator}
        place = connection.execute(st.PLACE, who | {"policy": policy}).one_or_none()
        found = None
        if place is not None:
            after = {"second": place.second} if policy == "random" else {"first": place.first, "second": place.second}
            found = connection.execute(st.NEXT_OPEN[policy], who | after).one_or_none()
        if found is None:
            found = connection.execute(st.FIRST_OPEN[policy], who).one_or_none()
        if found is None:
            return None
        first, second = float(found[1]), found[2]
        if place is not None:
            connection.execute(st.SET_PLACE, who | {"policy": policy, "f": first, "s": second})
        else:
            row = {"project_id": self.project.id, "annotator": annotator, "arm": policy}
            connection.execute(st.ADD_PLACE, row | {"first": first, "second": second})
        return int(found[0])

    def _lend(
        self,
        connection: sa.Connection,
        annotator: str,
        item: Item,
        arm: str,
        now: float,
        order: tuple[int, ...] | None = None,
        undone: int | None = None,
        token: str | None = None,
    ) -> Lease:
        token = token or secrets.token_urlsafe(16)
        if order is None:
            order = drawn_order(token, item.answers)
        expires = now + self.project.settings.lease_seconds
        row = {
            "token": token,
            "project_id": self.project.id,
            "item_id": item.id,
            "annotator": annotator,
            "order": list(order),
            "arm": arm,
            "issued": now,
            "expires": expires,
            "state": "live",
            "undone": undone,
        }
        connection.execute(st.ADD_LEASE, row)
        recount_leases(connection, self.project, item.id)
        return self._lease(connection, token, item, annotator, order, arm, expires, undone)

    def _lease(
        self,
        connection: sa.Connection,
        token: str,
        item: Item,
        annotator: str,
        order: tuple[int, ...],
        arm: str,
        expires: float,
        undone: int | None,
    ) -> Lease:
        before = None
        if undone is not None:
            undo = connection.execute(sa.select(EVENT.c.body).where(EVENT.c.id == undone)).scalar_one()
            said = event_of_key(connection, self.project, undo["undoes"])
            before = None if said is None else {**said.body, "kind": said.kind}
        return Lease(token, item, annotator, order, arm, expires, before)


def _fields(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in ("kind", "annotator", "item_id", "body")}


def drawn_order(token: str, answers: tuple[int, ...]) -> tuple[int, ...]:
    """The answers as they stand on the screen: tokens are random, so every order is as likely."""
    return tuple(Random(f"order {token}").sample(answers, len(answers)))


def _of_answers(said: Mapping[str, Any], order: list[int]) -> dict[str, Any]:
    """What was said of places on the screen, as said of answers.

    Raises:
        InputError: there is no such place.
    """
    try:
        ranking, ratings = said.get("ranking"), said.get("ratings")
        return {
            **said,
            "order": order,
            "ranking": None if ranking is None else [[_at(order, place) for place in group] for group in ranking],
            "ratings": None
            if ratings is None
            else {
                name: {str(_at(order, int(place))): value for place, value in of.items()}
                for name, of in ratings.items()
            },
        }
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"A label speaks of places that are not on the screen ({error}).") from error


def _at(order: list[int], place: int) -> int:
    if type(place) is not int or not 0 <= place < len(order):
        raise IndexError(f"place {place!r} of {len(order)}")
    return order[place]


def _checked_skip(item: Item, given: Mapping[str, Any]) -> dict[str, Any]:
    order = given.get("order")
    if not is_order(order, item):
        raise InputError(f"A skip shows answers {order!r}: the item's answers are {list(item.answers)}.")
    reason = checked_note("reason", given.get("reason"), 500)
    if reason is None:
        raise InputError("A skip needs a reason.")
    return {
        "order": order,
        "reason": reason,
        "flag": checked_note("flag", given.get("flag")),
        "comment": checked_note("comment", given.get("comment")),
        "seconds": checked_seconds(given.get("seconds")),
    }
