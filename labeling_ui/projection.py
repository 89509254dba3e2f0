"""Rows within a transaction: events that are appended, the projection of those that count, and items as they are read.

What people do is appended to the events and never changed. Of one annotator's events on one item the top of a stack
counts (`fold`); the table of labels, and how much of every item's cap is taken, follow from the events, and `replay`
makes them again from nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from labeling_ui import statements as st
from labeling_ui.database import now_text, value_rows
from labeling_ui.project import Event, Item, Project
from labeling_ui.schema import COMPARISON, EVENT, ITEM, LABEL, PROJECT
from reward.records import InputError


def fold(stack: list[Event], event: Event) -> None:
    """What counts of one annotator's events on one item is the top of the stack."""
    if event.kind == "undo":
        stack[:] = [before for before in stack if before.key != event.body["undoes"]]
    else:
        stack.append(event)


def append(connection: sa.Connection, project: Project, row: dict[str, Any]) -> Event:
    """Append one event and let it count."""
    number = connection.execute(st.ADD_EVENT, row).scalar_one()
    event = Event(id=number, **{name: value for name, value in row.items() if name != "project_id"})
    if event.kind == "undo":
        stack: list[Event] = []
        for before in connection.execute(st.EVENTS_ON_ITEM, {"i": event.item_id, "a": event.annotator}):
            fold(stack, as_event(before))
        set_label(connection, project, event.item_id, event.annotator, stack[-1] if stack else None)
    else:
        set_label(connection, project, event.item_id, event.annotator, event)
    return event


def set_label(connection: sa.Connection, project: Project, item_id: int, annotator: str, event: Event | None) -> None:
    connection.execute(st.DROP_LABEL, {"i": item_id, "a": annotator})
    if event is not None:
        row = {"item_id": item_id, "annotator": annotator, "project_id": project.id}
        connection.execute(st.ADD_LABEL, row | {"event_id": event.id, "kind": event.kind})


def recount(connection: sa.Connection, project: Project, item_id: int) -> int:
    """How much of an item's cap is taken: labels that count and leases that live, never both of one annotator."""
    connection.execute(st.MORE_LABELS, {"p": project.id, "i": item_id})
    return recount_leases(connection, project, item_id)


def recount_leases(connection: sa.Connection, project: Project, item_id: int) -> int:
    """As `recount`, where no label has changed."""
    return int(connection.execute(st.RECOUNT, {"i": item_id, "cap": project.settings.overlap}).scalar_one())


def read_item(connection: sa.Connection, project: Project, item_id: int) -> Item:
    row = connection.execute(st.ITEM_BY_ID, {"p": project.id, "i": item_id}).one_or_none()
    if row is None:
        raise InputError(f"Project {project.name} has no item {item_id!r}.")
    return as_item(row)


def event_of_key(connection: sa.Connection, project: Project, key: str) -> Event | None:
    row = connection.execute(st.EVENT_BY_KEY, {"p": project.id, "k": key}).one_or_none()
    return None if row is None else as_event(row)


def event_row(
    project: Project, item_id: int, annotator: str, kind: str, key: str, body: dict[str, Any], now: float
) -> dict[str, Any]:
    return {
        "project_id": project.id,
        "item_id": item_id,
        "annotator": annotator,
        "kind": kind,
        "key": key,
        "body": body,
        "created": now_text(now),
    }


def same_said(known: Mapping[str, Any], kind: str, given: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Refuse a key that belongs to something else that was said.

    Raises:
        InputError: it does; the message names what differs.
    """
    pairs = {"kind": (known["kind"], kind), "annotator": (known["annotator"], given["annotator"])}
    pairs["item_id"] = (known["item_id"], given["item_id"])
    pairs |= {name: (known["body"].get(name), value) for name, value in said.items()}
    if changed := [name for name, (before, now) in pairs.items() if before != now]:
        raise InputError(
            f"The key {given['key']} belongs to a label with a different {', '.join(changed)}: labels never change; "
            "send a correction under a new key."
        )


def shown_digest(item: Item, order: Sequence[int]) -> str:
    """sha256 of what was on the screen: the prompt, and the answers' texts in their order."""
    texts = dict(zip(item.answers, (answer["text"] for answer in item.payload["answers"]), strict=True))
    shown = json.dumps([item.payload["prompt"], [texts[i] for i in order]], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(shown.encode("utf-8", "surrogatepass")).hexdigest()


def count_fresh(connection: sa.Connection, project: Project, events: list[Event]) -> None:
    """Let fresh labels count."""
    newest = {(event.item_id, event.annotator): event for event in sorted(events, key=lambda event: event.id)}
    touched = list({item_id for item_id, _ in newest})
    query = sa.select(LABEL).where(LABEL.c.project_id == project.id)
    there = {(row.item_id, row.annotator) for row in value_rows(connection, query, LABEL.c.item_id, touched)}
    rows = [
        {"item_id": i, "annotator": a, "project_id": project.id, "event_id": event.id, "kind": event.kind}
        for (i, a), event in newest.items()
    ]
    if added := [row for row, place in zip(rows, newest, strict=True) if place not in there]:
        connection.execute(sa.insert(LABEL), added)
    for (item_id, annotator), event in newest.items():
        if (item_id, annotator) in there:
            set_label(connection, project, item_id, annotator, event)
    for item_id in touched:
        recount(connection, project, item_id)


def replay(connection: sa.Connection, project: Project) -> None:
    """Make the projection again from the events; what it said before is forgotten."""
    stacks: dict[tuple[int, str], list[Event]] = {}
    query = sa.select(EVENT).where(EVENT.c.project_id == project.id).order_by(EVENT.c.id)
    for event in map(as_event, connection.execute(query)):
        fold(stacks.setdefault((event.item_id, event.annotator), []), event)
    connection.execute(sa.delete(LABEL).where(LABEL.c.project_id == project.id))
    connection.execute(sa.update(ITEM).where(ITEM.c.project_id == project.id).values(labelled=0))
    connection.execute(sa.update(PROJECT).where(PROJECT.c.id == project.id).values(label_count=0))
    rows = [
        {"item_id": i, "annotator": a, "project_id": project.id, "event_id": s[-1].id, "kind": s[-1].kind}
        for (i, a), s in stacks.items()
        if s
    ]
    if rows:
        connection.execute(sa.insert(LABEL), rows)
    for (item_id,) in connection.execute(sa.select(ITEM.c.id).where(ITEM.c.project_id == project.id)).all():
        recount(connection, project, item_id)


# -- rows -------------------------------------------------------------------------------------------------------------


def items_query(project: Project) -> Any:
    return (
        sa.select(*ITEM.c["id", "key", "answers", "gold"], *COMPARISON.c["comparison_id", "digest", "payload"])
        .join_from(ITEM, COMPARISON)
        .where(ITEM.c.project_id == project.id)
    )


def as_item(row: sa.Row[Any]) -> Item:
    rest = {name: value for name, value in row.payload.items() if name not in ("id", "answers", "gold")}
    payload = {
        **rest,
        "comparison_id": row.comparison_id,
        "pair": list(row.answers),
        "answers": [row.payload["answers"][i] for i in row.answers],
    }
    gold = None if row.gold is None else (row.gold["better"], row.gold["worse"])
    return Item(row.id, row.key, row.comparison_id, tuple(row.answers), row.digest, payload, gold)


def as_event(row: Any) -> Event:
    return Event(**{each.name: row._mapping[each.name] for each in fields(Event)})
