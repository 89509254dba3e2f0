"""The label store: projects, what is to be judged, and every judgement ever made.

What people do is appended to the events and never changed; which label counts is a projection of the events, and
`replay` makes it again from nothing. A person who corrects a label, or takes one back, adds an event.

What is stored stands in `labeling_ui.project`, what may be stored in `checks`, how events become labels in
`projection`. How the database keeps its promises stands in `database`; who judges what next, in `assignment`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from labeling_ui import projection
from labeling_ui.checks import check_guidelines, check_judgement, check_names, checked_comparison, is_storable
from labeling_ui.database import Database, now_text, value_rows
from labeling_ui.items import add_items
from labeling_ui.project import LONGEST_NAME, SAID, Event, Imported, Item, Judgement, Project, Settings, is_name
from labeling_ui.projection import (
    append,
    as_event,
    as_item,
    event_of_key,
    event_row,
    items_query,
    read_item,
    same_said,
    shown_digest,
)
from labeling_ui.render import visible
from labeling_ui.schema import CURSOR, EVENT, GUIDELINE, ITEM, LABEL, LEASE, PROJECT
from reward.aggregate import Vote
from reward.records import InputError, Record
from reward.records import digest as content_digest

__all__ = ["Event", "Imported", "Item", "Judgement", "LabelStore", "Project", "Settings"]


class LabelStore:
    """Projects, items and labels in a label database.

    Args:
        where, busy_seconds: as `Database` takes them.
        clock: seconds since 1970; it is never taken to go backwards.

    Raises:
        InputError: by every method, what `Database` raises.
    """

    def __init__(
        self, where: str | Path, *, busy_seconds: float = 30.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.database = Database(where, busy_seconds=busy_seconds)
        self._clock, self._latest = clock, 0.0
        self.lent_items: dict[int, Item] = {}  # of all projects, by number; read and written by whoever may write
        with self.database.read() as connection:
            self._latest = connection.execute(sa.select(sa.func.max(LEASE.c.issued))).scalar_one() or 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.database.close()

    def now(self) -> float:
        """Seconds since 1970. Where the machine's clock is set back, time stands still until it has caught up."""
        self._latest = max(self._latest, self._clock())
        return self._latest

    # -- projects -------------------------------------------------------------------------------------------------

    def create_project(
        self, name: str, *, instructions: str = "", simulated: bool = False, settings: Settings | None = None
    ) -> Project:
        """The project of that name, made if need be.

        Args:
            settings: None: as they are, or the defaults. Mode and simulated never change; the rest may.

        Raises:
            InputError: the name is empty, or taken by a project with another mode or another `simulated`.
        """
        if not is_name(name):
            raise InputError(
                f"The project name {visible(name[:50])!r} is none: one line of 1 to {LONGEST_NAME} characters that can "
                "all be seen is wanted."
            )
        check_guidelines(instructions)
        with self.database.write() as connection:
            row = connection.execute(sa.select(PROJECT).where(PROJECT.c.name == name)).one_or_none()
            if row is None:
                values = {
                    "name": name,
                    "simulated": simulated,
                    "settings": asdict(settings or Settings()),
                    "item_count": 0,
                    "label_count": 0,
                    "created": now_text(self.now()),
                }
                number = connection.execute(sa.insert(PROJECT).values(values).returning(PROJECT.c.id)).scalar_one()
                _add_guidelines(connection, number, 1, instructions, now_text(self.now()))
            else:
                self._change_project(connection, row, instructions, simulated, settings)
        return self.project(name)

    def _change_project(
        self, connection: sa.Connection, row: Any, instructions: str, simulated: bool, settings: Settings | None
    ) -> None:
        if row.simulated != simulated:
            have, want = ("simulated labels" if flag else "people's labels" for flag in (row.simulated, simulated))
            raise InputError(
                f"Project {row.name} holds {have}, and {want} must never mix with them: use a new project."
            )
        if settings is not None:
            if row.settings["mode"] != settings.mode:
                raise InputError(
                    f"Project {row.name} is judged by {row.settings['mode']}, not by {settings.mode}: use a new "
                    "project."
                )
            changed = asdict(settings) | {
                "criteria": list(settings.criteria),
                "closed": row.settings.get("closed", False),
            }
            if changed != row.settings:
                connection.execute(sa.update(PROJECT).where(PROJECT.c.id == row.id).values(settings=changed))
                if settings.overlap != row.settings["overlap"]:
                    connection.execute(
                        sa.update(ITEM)
                        .where(ITEM.c.project_id == row.id, ITEM.c.gold.is_(None))
                        .values(full=ITEM.c.taken >= settings.overlap)
                    )
        known = _guidelines(connection, row.id)
        if instructions and known.text != instructions:
            _add_guidelines(connection, row.id, known.version + 1, instructions, now_text(self.now()))

    def project(self, name: str) -> Project:
        """The project of that name.

        Raises:
            InputError: there is none; the message names those there are.
        """
        if is_storable(name):
            with self.database.read() as connection:
                row = connection.execute(sa.select(PROJECT).where(PROJECT.c.name == name)).one_or_none()
                if row is not None:
                    return _project(connection, row)
        known = ", ".join(project.name for project in self.projects()) or "none"
        raise InputError(f"{self.database.name} has no project {name}; it has: {known}.")

    def projects(self) -> list[Project]:
        """All projects, by name."""
        with self.database.read() as connection:
            rows = connection.execute(sa.select(PROJECT).order_by(PROJECT.c.name)).all()
            return [_project(connection, row) for row in rows]

    def close_project(self, project: Project, closed: bool = True) -> None:
        """Lend nothing more, or lend again."""
        with self.database.write() as connection:
            where = PROJECT.c.id == project.id
            settings = connection.execute(sa.select(PROJECT.c.settings).where(where)).scalar_one()
            connection.execute(sa.update(PROJECT).where(where).values(settings={**settings, "closed": closed}))

    def closed(self, project: Project) -> bool:
        """Whether it was closed since `project` was read."""
        return self.project(project.name).settings.closed

    # -- items ----------------------------------------------------------------------------------------------------

    def add_items(self, project: Project, comparisons: Iterable[Record]) -> Imported:
        """Add what is to be judged of every comparison, all or nothing: each pair of its answers, or, in a ranking
        project, all of them at once.

        Args:
            comparisons: `{id, prompt, split, answers: [{text, ...}]}`; see `reward.records`. `gold`: indices of the
                better and the worse answer, where that is known: every annotator may get it, to see how they judge.

        Raises:
            InputError: a comparison is malformed, has fewer than two answers, or has the id of another with
                different content; the message names its id.
        """
        records = [checked_comparison(record) for record in comparisons]
        with self.database.write() as connection:
            return add_items(connection, project, records)

    def items(self, project: Project) -> list[Item]:
        """All items of the project, in the order they were added."""
        with self.database.read() as connection:
            return [as_item(row) for row in connection.execute(items_query(project).order_by(ITEM.c.id))]

    def item(self, project: Project, item_id: int) -> Item:
        """One item.

        Raises:
            InputError: the project has none of that number.
        """
        with self.database.read() as connection:
            return read_item(connection, project, item_id)

    def prioritise(self, project: Project, uncertainty: Mapping[str, float]) -> None:
        """Under the policy active, items come by falling uncertainty; those not named stand at 0."""
        with self.database.write() as connection:
            connection.execute(sa.update(ITEM).where(ITEM.c.project_id == project.id).values(priority=0.0))
            rows = [{"k": key, "p": -float(value)} for key, value in uncertainty.items()]
            if rows:
                where = (ITEM.c.project_id == project.id) & (ITEM.c.key == sa.bindparam("k"))
                connection.execute(sa.update(ITEM).where(where).values(priority=sa.bindparam("p")), rows)
            connection.execute(sa.delete(CURSOR).where(CURSOR.c.project_id == project.id))

    # -- labels ---------------------------------------------------------------------------------------------------

    def record(self, project: Project, judgement: Judgement) -> Event:
        """`record_many` of one."""
        return self.record_many(project, [judgement])[0]

    def record_many(self, project: Project, judgements: Iterable[Judgement]) -> list[Event]:
        """Store labels that were given without a lease, by a simulated panel or another tool, all or none.

        When this returns, they are on the disk.

        Raises:
            InputError: a value is out of range, the item is not the project's, the order is not its answers, the
                annotator or key is empty, or the key belongs to a label with other content.
        """
        wanted = list(judgements)
        for each in wanted:
            check_names(each)
        with self.database.write() as connection:
            query = items_query(project)
            numbers = list({each["item_id"] for each in wanted})
            items = {row.id: as_item(row) for row in value_rows(connection, query, ITEM.c.id, numbers)}
            keys = [each["key"] for each in wanted]
            query = sa.select(EVENT).where(EVENT.c.project_id == project.id)
            known = {row.key: as_event(row) for row in value_rows(connection, query, EVENT.c.key, keys)}
            fresh: list[dict[str, Any]] = []
            found: dict[str, dict[str, Any]] = {key: asdict(event) for key, event in known.items()}
            for each in wanted:
                item = items.get(each["item_id"])
                if item is None:
                    raise InputError(f"Project {project.name} has no item {each['item_id']!r}.")
                said = check_judgement(project, item, each)
                if each["key"] in found:
                    same_said(found[each["key"]], "label", each, said)
                    continue
                body = said | {"shown": shown_digest(item, said["order"]), "guidelines": project.guidelines}
                row = event_row(project, item.id, each["annotator"], "label", each["key"], body, self.now())
                fresh.append(row)
                found[each["key"]] = row
            for start in range(0, len(fresh), 1000):
                connection.execute(sa.insert(EVENT), fresh[start : start + 1000])
            query = sa.select(EVENT).where(EVENT.c.project_id == project.id)
            stored = {row.key: as_event(row) for row in value_rows(connection, query, EVENT.c.key, keys)}
            new = {row["key"] for row in fresh}
            projection.count_fresh(connection, project, [event for key, event in stored.items() if key in new])
        return [stored[key] for key in keys]

    def adjudicate(self, project: Project, item_key: str, reviewer: str, said: Mapping[str, Any], key: str) -> Event:
        """Store a reviewer's verdict on an item that annotators disagree about; it overrides their labels.

        Args:
            said: `value` or `ranking`, in the item's own order.

        Raises:
            InputError: there is no such item, or the verdict says what cannot be said.
        """
        with self.database.write() as connection:
            row = connection.execute(items_query(project).where(ITEM.c.key == item_key)).one_or_none()
            if row is None:
                raise InputError(f"Project {project.name} has no item {item_key!r}.")
            item, annotator = as_item(row), f"{reviewer} (verdict)"
            given = {**said, "order": list(item.answers), "annotator": annotator, "key": key, "item_id": item.id}
            checked = check_judgement(project, item, given)
            if (known := event_of_key(connection, project, key)) is not None:
                same_said(asdict(known), "verdict", given, checked)
                return known
            body = checked | {"shown": shown_digest(item, item.answers), "guidelines": project.guidelines}
            return append(connection, project, event_row(project, item.id, annotator, "verdict", key, body, self.now()))

    def labels(self, project: Project) -> list[Event]:
        """The labels that count, one for each annotator and item, in the order they were given."""
        return self._counting(project, "label")

    def _counting(self, project: Project, kind: str) -> list[Event]:
        query = (
            sa.select(EVENT)
            .join(LABEL, LABEL.c.event_id == EVENT.c.id)
            .where(LABEL.c.project_id == project.id, LABEL.c.kind == kind)
            .order_by(EVENT.c.id)
        )
        with self.database.read() as connection:
            return [as_event(row) for row in connection.execute(query)]

    def events(self, project: Project) -> list[Event]:
        """All that anyone ever did, in order."""
        query = sa.select(EVENT).where(EVENT.c.project_id == project.id).order_by(EVENT.c.id)
        with self.database.read() as connection:
            return [as_event(row) for row in connection.execute(query)]

    def count_labels(self, project: Project) -> int:
        """Number of labels that count."""
        where = (LABEL.c.project_id == project.id) & (LABEL.c.kind == "label")
        with self.database.read() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(LABEL).where(where)).scalar_one()

    def votes(self, project: Project) -> list[tuple[Record, list[Vote]]]:
        """Every pair of answers with its votes, as `reward.aggregate.preferences` takes them; gold items are none.

        Where a reviewer has given a verdict, it is the one vote.
        """
        given: dict[int, dict[tuple[int, int], list[Vote]]] = {}
        verdicts = {event.item_id: event for event in self._counting(project, "verdict")}
        labels = [label for label in self.labels(project) if label.item_id not in verdicts]
        for event in [*labels, *verdicts.values()]:
            for pair, vote in event.votes():
                given.setdefault(event.item_id, {}).setdefault(pair, []).append(vote)
        found = []
        for item in self.items(project):
            if item.gold is None:
                for pair in itertools.combinations(item.answers, 2):
                    found.append((_pair_payload(item, pair), given.get(item.id, {}).get(pair, [])))
        return found

    def digest(self, project: Project) -> str:
        """sha256 over the labels that count, with the content they judged, as 64 hex digits.

        Row numbers and times do not enter: the same labels on the same items give the same digest in any store.
        """
        # Labels before items: then every label's item is there, even while others add to the store.
        given = self.labels(project)
        items = {item.id: item for item in self.items(project)}
        told = [
            [items[e.item_id].key, e.annotator, items[e.item_id].digest, {name: e.body.get(name) for name in SAID}]
            for e in given
        ]
        return content_digest(sorted(told, key=lambda row: (row[0], row[1])))

    def replay(self, project: Project) -> None:
        """Make the projection again from the events; what it said before is forgotten."""
        with self.database.write() as connection:
            projection.replay(connection, project)


# -- rows -------------------------------------------------------------------------------------------------------------


def _project(connection: sa.Connection, row: Any) -> Project:
    guidelines = _guidelines(connection, row.id)
    settings = Settings(**{**row.settings, "criteria": tuple(row.settings["criteria"])})
    return Project(row.id, row.name, row.simulated, settings, row.created, guidelines.text, guidelines.version)


def _guidelines(connection: sa.Connection, project_id: int) -> Any:
    query = sa.select(GUIDELINE).where(GUIDELINE.c.project_id == project_id)
    return connection.execute(query.order_by(GUIDELINE.c.version.desc()).limit(1)).one()


def _add_guidelines(connection: sa.Connection, project_id: int, version: int, text: str, created: str) -> None:
    row = {"project_id": project_id, "version": version, "text": text, "created": created}
    connection.execute(sa.insert(GUIDELINE).values(row))


def _pair_payload(item: Item, pair: tuple[int, int]) -> Record:
    answers = dict(zip(item.answers, item.payload["answers"], strict=True))
    return item.payload | {"pair": list(pair), "answers": [answers[i] for i in pair]}
