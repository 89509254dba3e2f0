"""The label store: projects, what is to be judged, and every judgement ever made.

What people do is appended to the events and never changed; which label counts is a projection of the events, and
`replay` makes it again from nothing. A person who corrects a label, or takes one back, adds an event.

How the database keeps its promises stands in `labeling_ui.database`; who judges what next, in `labeling_ui.assignment`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NotRequired, Self, TypedDict

import sqlalchemy as sa

from labeling_ui import statements as st
from labeling_ui.database import Database, now_text, value_rows
from labeling_ui.schema import COMPARISON, EVENT, GUIDELINE, ITEM, LABEL, LEASE, PROJECT
from reward.aggregate import Vote
from reward.records import InputError, Record, prompt_id
from reward.records import digest as content_digest

# Longer texts are no answers, and a page that holds them is no page.
LONGEST_TEXT = 200_000
LONGEST_NOTE = 10_000
MOST_ANSWERS = 9


@dataclass(frozen=True, slots=True)
class Settings:
    """How a project is judged.

    Attributes:
        mode: pairwise: two answers at a time on a scale of 1 to 7; ranking: all answers of a prompt at once.
        overlap: labels by different annotators that an item wants; it never gets more.
        policy: which item comes next. random: any; least: the one with the fewest labels; active: the one whose
            outcome is least certain.
        random_share: under active, the share of items drawn at random all the same, for an evaluation without bias.
        gold_share: the share of items with a known answer mixed in, where the project has any.
        lease_seconds: how long an item is kept for an annotator who shows no sign of life.
        criteria: what each answer is rated for from 1 to 5 beside the preference; may be empty.
        closed: nothing more is lent; whoever waits for labels goes on with those there are.
    """

    mode: Literal["pairwise", "ranking"] = "pairwise"
    overlap: int = 1
    policy: Literal["random", "least", "active"] = "random"
    random_share: float = 0.2
    gold_share: float = 0.07
    lease_seconds: float = 900.0
    criteria: tuple[str, ...] = ()
    closed: bool = False

    def __post_init__(self) -> None:
        problems = [
            (self.mode in ("pairwise", "ranking"), f"mode is {self.mode!r}: pairwise or ranking is wanted"),
            (self.overlap >= 1, f"overlap is {self.overlap}: at least 1 label an item is wanted"),
            (self.policy in ("random", "least", "active"), f"policy is {self.policy!r}: random, least or active"),
            (0 <= self.random_share <= 1, f"random_share is {self.random_share}: a share from 0 to 1 is wanted"),
            (0 <= self.gold_share <= 0.5, f"gold_share is {self.gold_share}: a share from 0 to 0.5 is wanted"),
            (self.lease_seconds >= 10, f"lease_seconds is {self.lease_seconds}: at least 10 are wanted"),
            (len(set(self.criteria)) == len(self.criteria) <= 8, "criteria: up to 8 different names are wanted"),
        ]
        for fine, problem in problems:
            if not fine:
                raise InputError(f"A project's {problem}.")


@dataclass(frozen=True, slots=True)
class Project:
    """A set of items and their labels. `simulated` says that a program gives the labels, never a person."""

    id: int
    name: str
    simulated: bool
    settings: Settings
    created: str
    instructions: str
    guidelines: int  # version of the instructions


@dataclass(frozen=True, slots=True)
class Item:
    """What is judged at once: some answers of one comparison.

    Attributes:
        id: number in this store.
        key: "<comparison id>:<first>-<second>...", the same in every store.
        answers: indices of the answers in the comparison, ascending.
        digest: sha256 of the whole comparison.
        payload: `{comparison_id, pair: indices, prompt, split, answers}` and the comparison's extra columns.
        gold: the indices of the better and the worse answer; None: nobody knows.
    """

    id: int
    key: str
    comparison_id: str
    answers: tuple[int, ...]
    digest: str
    payload: Record
    gold: tuple[int, ...] | None = None

    @property
    def pair(self) -> tuple[int, ...]:
        return self.answers


class Judgement(TypedDict):
    """One person's judgement of one item as it was on the screen.

    item_id: the item. annotator: who. key: idempotency key, unique in the project: sent again, it stores nothing.
    order: indices of the answers from left to right.
    value: pairwise: 1 (left much better), 2, 3, 4 (tie), 5, 6, 7 (right much better).
    ranking: groups of answer indices from best to worst, equals in one group; answers may be left out.
    ratings: for each criterion, the rating 1 to 5 of answers by index (as text, for JSON's sake).
    seconds: time spent looking at it. comment, flag, rewrite: words. rewrite: a better answer.
    """

    item_id: int
    annotator: str
    key: str
    order: Sequence[int]
    value: NotRequired[int | None]
    ranking: NotRequired[list[list[int]] | None]
    ratings: NotRequired[dict[str, dict[str, int]] | None]
    seconds: NotRequired[float | None]
    comment: NotRequired[str | None]
    flag: NotRequired[str | None]
    rewrite: NotRequired[str | None]


SAID = ("order", "value", "ranking", "ratings", "seconds", "comment", "flag", "rewrite")


@dataclass(frozen=True, slots=True)
class Event:
    """Something a person did: `kind` is label, skip, undo, or verdict (of a reviewer, which overrides all labels).

    `body` is what they said, in what order it was shown, the sha256 of the text shown, the version of the guidelines,
    and the lease they held.
    """

    id: int
    item_id: int
    annotator: str
    kind: str
    key: str
    body: dict[str, Any]
    created: str

    def votes(self) -> list[tuple[tuple[int, int], Vote]]:
        """What it says of pairs of answers (first < second), in the pair's own order."""
        if self.kind not in ("label", "verdict"):
            return []
        if (value := self.body.get("value")) is not None:
            left, right = self.body["order"]
            return [((min(left, right), max(left, right)), Vote(self.annotator, value if left < right else 8 - value))]
        ranks = {answer: rank for rank, group in enumerate(self.body["ranking"]) for answer in group}
        found = []
        for first, second in itertools.combinations(sorted(ranks), 2):
            # A ranking says which, not how much: the distance stands for the strength, up to "much better".
            steps = max(-3, min(3, ranks[second] - ranks[first]))
            found.append(((first, second), Vote(self.annotator, 4 - steps)))
        return found


@dataclass(frozen=True)
class Imported:
    """How many items an import added, how many were there already, and how many pairs have one text on both sides:
    people are not asked which of two equal texts is better."""

    added: int = 0
    there: int = 0
    identical: int = 0


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
        if not name.strip() or len(name) > 200:
            raise InputError("The project name is empty or longer than 200 characters: give a name.")
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
        projects = self.projects()
        for project in projects:
            if project.name == name:
                return project
        known = ", ".join(project.name for project in projects) or "none"
        raise InputError(f"{self.database.name} has no project {name}; it has: {known}.")

    def projects(self) -> list[Project]:
        """All projects, by name."""
        with self.database.read() as connection:
            found = []
            for row in connection.execute(sa.select(PROJECT).order_by(PROJECT.c.name)).all():
                guidelines = _guidelines(connection, row.id)
                settings = Settings(**{**row.settings, "criteria": tuple(row.settings["criteria"])})
                found.append(
                    Project(
                        row.id,
                        row.name,
                        row.simulated,
                        settings,
                        row.created,
                        guidelines.text,
                        guidelines.version,
                    )
                )
        return found

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
        records = [_checked_comparison(record) for record in comparisons]
        added = there = identical = 0
        with self.database.write() as connection:
            self._check_sides(connection, project, records)
            wanted = [record["id"] for record in records]
            query = sa.select(COMPARISON).where(COMPARISON.c.project_id == project.id)
            digests = {
                row.comparison_id: row.digest
                for row in value_rows(connection, query, COMPARISON.c.comparison_id, wanted)
            }
            for record in records:
                comparison_id, digest = record["id"], content_digest(record)
                groups, same = _groups(project, record)
                if known := digests.get(comparison_id):
                    if known != digest:
                        raise InputError(
                            f"Comparison {comparison_id} is in project {project.name} with different content: "
                            "what people judged cannot change; give the new content an id of its own."
                        )
                    there += len(groups)
                    continue
                row = {
                    "project_id": project.id,
                    "comparison_id": comparison_id,
                    "payload": record,
                    "digest": digest,
                    "prompt": prompt_id(record["prompt"]),
                    "split": record["split"],
                }
                comparison = connection.execute(sa.insert(COMPARISON).returning(COMPARISON.c.id), row).scalar_one()
                if rows := [_item_row(project, comparison, record, group) for group in groups]:
                    connection.execute(sa.insert(ITEM), rows)
                identical += same
                digests[comparison_id] = digest
                added += len(groups)
            counted = sa.select(sa.func.count()).where(ITEM.c.project_id == project.id, ITEM.c.gold.is_(None))
            connection.execute(
                sa.update(PROJECT).where(PROJECT.c.id == project.id).values(item_count=counted.scalar_subquery())
            )
        return Imported(added, there, identical)

    def _check_sides(self, connection: sa.Connection, project: Project, records: list[Record]) -> None:
        """Refuse a prompt that is held out under one id and trained on under another."""
        prompts = [prompt_id(record["prompt"]) for record in records]
        columns = COMPARISON.c["prompt", "split", "comparison_id"]
        query = sa.select(*columns).where(COMPARISON.c.project_id == project.id)
        sides = {row.prompt: row for row in value_rows(connection, query, COMPARISON.c.prompt, list(set(prompts)))}
        known = {prompt: (row.split, row.comparison_id) for prompt, row in sides.items()}
        for record, prompt in zip(records, prompts, strict=True):
            split, other = known.setdefault(prompt, (record["split"], record["id"]))
            if split != record["split"]:
                raise InputError(
                    f"Comparison {record['id']} is on the {record['split']} side, but its prompt is on the {split} "
                    f"side in comparison {other}: give all comparisons of a prompt the same split."
                )

    def items(self, project: Project) -> list[Item]:
        """All items of the project, in the order they were added."""
        with self.database.read() as connection:
            return [_item(row) for row in connection.execute(_items_query(project).order_by(ITEM.c.id))]

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
            from labeling_ui.schema import CURSOR

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
            _check_names(each)
        with self.database.write() as connection:
            query = _items_query(project)
            numbers = list({each["item_id"] for each in wanted})
            items = {row.id: _item(row) for row in value_rows(connection, query, ITEM.c.id, numbers)}
            keys = [each["key"] for each in wanted]
            query = sa.select(EVENT).where(EVENT.c.project_id == project.id)
            known = {row.key: _event(row) for row in value_rows(connection, query, EVENT.c.key, keys)}
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
            stored = {row.key: _event(row) for row in value_rows(connection, query, EVENT.c.key, keys)}
            new = {row["key"] for row in fresh}
            self._project_many(connection, project, [event for key, event in stored.items() if key in new])
        return [stored[key] for key in keys]

    def adjudicate(self, project: Project, item_key: str, reviewer: str, said: Mapping[str, Any], key: str) -> Event:
        """Store a reviewer's verdict on an item that annotators disagree about; it overrides their labels.

        Args:
            said: `value` or `ranking`, in the item's own order.

        Raises:
            InputError: there is no such item, or the verdict says what cannot be said.
        """
        with self.database.write() as connection:
            row = connection.execute(_items_query(project).where(ITEM.c.key == item_key)).one_or_none()
            if row is None:
                raise InputError(f"Project {project.name} has no item {item_key!r}.")
            item, annotator = _item(row), f"{reviewer} (verdict)"
            given = {**said, "order": list(item.answers), "annotator": annotator, "key": key, "item_id": item.id}
            checked = check_judgement(project, item, given)
            if (known := event_of_key(connection, project, key)) is not None:
                same_said(asdict(known), "verdict", given, checked)
                return known
            body = checked | {"shown": shown_digest(item, item.answers), "guidelines": project.guidelines}
            return append(connection, project, event_row(project, item.id, annotator, "verdict", key, body, self.now()))

    def _project_many(self, connection: sa.Connection, project: Project, events: list[Event]) -> None:
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
            return [_event(row) for row in connection.execute(query)]

    def events(self, project: Project) -> list[Event]:
        """All that anyone ever did, in order."""
        query = sa.select(EVENT).where(EVENT.c.project_id == project.id).order_by(EVENT.c.id)
        with self.database.read() as connection:
            return [_event(row) for row in connection.execute(query)]

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
        stacks: dict[tuple[int, str], list[Event]] = {}
        with self.database.write() as connection:
            query = sa.select(EVENT).where(EVENT.c.project_id == project.id).order_by(EVENT.c.id)
            for event in map(_event, connection.execute(query)):
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


# -- within a transaction ---------------------------------------------------------------------------------------------


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
            fold(stack, _event(before))
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
    labelled, lent, labelled_before, taken_before, counts = connection.execute(st.COUNT, {"i": item_id}).one()
    taken = int(labelled + lent)
    if (labelled, taken) != (labelled_before, taken_before):
        full = not counts or taken >= project.settings.overlap
        changed = {"i": item_id, "labelled_now": labelled, "taken_now": taken, "full_now": full}
        connection.execute(st.SET_COUNT, changed)
    if counts and labelled != labelled_before:
        connection.execute(st.MORE_LABELS, {"p": project.id, "more": labelled - labelled_before})
    return taken


def read_item(connection: sa.Connection, project: Project, item_id: int) -> Item:
    row = connection.execute(st.ITEM_BY_ID, {"p": project.id, "i": item_id}).one_or_none()
    if row is None:
        raise InputError(f"Project {project.name} has no item {item_id!r}.")
    return _item(row)


def event_of_key(connection: sa.Connection, project: Project, key: str) -> Event | None:
    row = connection.execute(st.EVENT_BY_KEY, {"p": project.id, "k": key}).one_or_none()
    return None if row is None else _event(row)


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


def check_judgement(project: Project, item: Item, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a judgement says, in the form it is stored in.

    Raises:
        InputError: it is none of this item, or says what cannot be said.
    """
    _check_names(given)
    said: dict[str, Any] = {name: given.get(name) for name in SAID}
    order = said["order"] = list(given["order"]) if isinstance(given.get("order"), list | tuple) else given.get("order")
    if not is_order(order, item):
        raise InputError(
            f"A label of item {item.id} shows answers {order!r}: the item's answers are {list(item.answers)}."
        )
    if project.settings.mode == "pairwise":
        value = said["value"]
        if type(value) is not int or not 1 <= value <= 7 or said["ranking"] is not None:
            raise InputError(
                f"A label has the value {value!r}: a whole number from 1 (left much better) to 7 (right much better) "
                "is wanted."
            )
    else:
        said["ranking"] = _checked_ranking(item, said["ranking"])
        if said["value"] is not None:
            raise InputError("A label of a ranking project has a value: a ranking is wanted, and nothing else.")
    said["ratings"] = _checked_ratings(project, item, said["ratings"])
    said["seconds"] = checked_seconds(said["seconds"])
    for name, most in (("comment", LONGEST_NOTE), ("flag", LONGEST_NOTE), ("rewrite", LONGEST_TEXT)):
        said[name] = checked_note(name, said[name], most)
    return said


def _check_names(given: Mapping[str, Any]) -> None:
    for name in ("annotator", "key"):
        text = given.get(name)
        if not isinstance(text, str) or not text.strip() or len(text) > 500 or not _is_storable(text):
            raise InputError(f"A label has the {name} {text!r}: a text of 1 to 500 characters is wanted.")


def is_order(order: Any, item: Item) -> bool:
    """Whether it names each of the item's answers once."""
    return isinstance(order, list) and all(type(i) is int for i in order) and sorted(order) == list(item.answers)


def checked_seconds(seconds: Any) -> float | None:
    """Time that something took.

    Raises:
        InputError: it is no time.
    """
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if seconds is not None and not (number and 0 <= seconds < math.inf):
        raise InputError(f"A label took {seconds!r} seconds: a number of at least 0, or none, is wanted.")
    return seconds


def _is_storable(text: str) -> bool:
    """Whether every database takes it: no character 0, no half of a surrogate pair."""
    try:
        return "\0" not in text and bool(text.encode("utf-8") or True)
    except UnicodeEncodeError:
        return False


def checked_note(name: str, text: Any, most: int = LONGEST_NOTE) -> str | None:
    """Words beside a label: None where there are none."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str) or len(text) > most:
        raise InputError(f"A label's {name} must be a text of at most {most} characters.")
    if "\0" in text:
        raise InputError(f"A label's {name} holds the character 0, which no text has: leave it out.")
    return text.encode("utf-8", "replace").decode()


def _checked_ranking(item: Item, ranking: Any) -> list[list[int]]:
    named = [answer for group in ranking for answer in group] if _is_ranking(ranking) else []
    if len(named) < 2 or len(set(named)) != len(named) or not set(named) <= set(item.answers):
        raise InputError(
            f"A label has the ranking {ranking!r}: groups of the answers {list(item.answers)} from best to worst are "
            "wanted, at least two answers in all and none twice."
        )
    return [sorted(group) for group in ranking]


def _is_ranking(ranking: Any) -> bool:
    groups = isinstance(ranking, list) and all(isinstance(group, list) and group for group in ranking)
    return groups and all(type(answer) is int for group in ranking for answer in group)


def _checked_ratings(project: Project, item: Item, ratings: Any) -> dict[str, dict[str, int]] | None:
    if not ratings:
        return None
    known = {str(answer) for answer in item.answers}
    for criterion, given in ratings.items() if isinstance(ratings, dict) else [("", {})]:
        fine = criterion in project.settings.criteria and isinstance(given, dict) and set(given) <= known
        if not fine or not all(type(value) is int and 1 <= value <= 5 for value in given.values()):
            raise InputError(
                f"A label has the ratings {ratings!r}: for the criteria {list(project.settings.criteria)}, whole "
                "numbers from 1 to 5 by answer are wanted."
            )
    return ratings


# -- rows -------------------------------------------------------------------------------------------------------------


def _guidelines(connection: sa.Connection, project_id: int) -> Any:
    query = sa.select(GUIDELINE).where(GUIDELINE.c.project_id == project_id)
    return connection.execute(query.order_by(GUIDELINE.c.version.desc()).limit(1)).one()


def _add_guidelines(connection: sa.Connection, project_id: int, version: int, text: str, created: str) -> None:
    row = {"project_id": project_id, "version": version, "text": text, "created": created}
    connection.execute(sa.insert(GUIDELINE).values(row))


def _groups(project: Project, record: Record) -> tuple[list[tuple[int, ...]], int]:
    """(answers that are judged together, how many such groups hold one text only and are left out)."""
    texts = [answer["text"] for answer in record["answers"]]
    size = 2 if project.settings.mode == "pairwise" else len(texts)
    groups = list(itertools.combinations(range(len(texts)), size))
    # A program is not bothered, and its preferences count the pairs that are left out.
    kept = [group for group in groups if project.simulated or len({texts[i] for i in group}) > 1]
    return kept, len(groups) - len(kept)


def _item_row(project: Project, comparison: int, record: Record, group: tuple[int, ...]) -> dict[str, Any]:
    key = f"{record['id']}:{'-'.join(map(str, group))}"
    drawn = hashlib.sha256(f"{project.name} {key}".encode("utf-8", "surrogatepass")).digest()
    gold = record.get("gold")
    if gold is not None:
        gold = {"better": gold[0], "worse": gold[1]} if set(gold) <= set(group) else None
    return {
        "project_id": project.id,
        "comparison": comparison,
        "key": key,
        "answers": list(group),
        "gold": gold,
        "taken": 0,
        "full": gold is not None,
        "shuffle": int.from_bytes(drawn[:6]) / 2**48,
        "priority": 0.0,
    }


def _items_query(project: Project) -> Any:
    return (
        sa.select(*ITEM.c["id", "key", "answers", "gold"], *COMPARISON.c["comparison_id", "digest", "payload"])
        .join_from(ITEM, COMPARISON)
        .where(ITEM.c.project_id == project.id)
    )


def _item(row: sa.Row[Any]) -> Item:
    rest = {name: value for name, value in row.payload.items() if name not in ("id", "answers", "gold")}
    payload = {
        **rest,
        "comparison_id": row.comparison_id,
        "pair": list(row.answers),
        "answers": [row.payload["answers"][i] for i in row.answers],
    }
    gold = None if row.gold is None else (row.gold["better"], row.gold["worse"])
    return Item(row.id, row.key, row.comparison_id, tuple(row.answers), row.digest, payload, gold)


def _pair_payload(item: Item, pair: tuple[int, int]) -> Record:
    answers = dict(zip(item.answers, item.payload["answers"], strict=True))
    return item.payload | {"pair": list(pair), "answers": [answers[i] for i in pair]}


def _event(row: Any) -> Event:
    return Event(**{each.name: row._mapping[each.name] for each in fields(Event)})


def _checked_comparison(record: Record) -> Record:
    comparison_id = record.get("id")
    fine = isinstance(comparison_id, str) and 0 < len(comparison_id) <= 500 and _is_storable(comparison_id)
    if not fine:
        raise InputError(f"A comparison has the id {comparison_id!r}: a text of 1 to 500 characters is wanted.")
    answers = record.get("answers")
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and isinstance(answer.get("text"), str) for answer in answers
    ):
        raise InputError(f'Comparison {comparison_id}: "answers" must be a list of objects like {{"text": ...}}.')
    if not 2 <= len(answers) <= MOST_ANSWERS:
        raise InputError(
            f"Comparison {comparison_id} has {len(answers)} answers: at least 2 are needed for a pair, and more than "
            f"{MOST_ANSWERS} nobody can compare."
        )
    prompt = record.get("prompt")
    if not isinstance(prompt, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in prompt
    ):
        raise InputError(f'Comparison {comparison_id}: "prompt" must be a list of {{"role", "content"}} turns of text.')
    texts = [answer["text"] for answer in answers] + [turn["content"] for turn in prompt]
    for text in texts:
        if len(text) > LONGEST_TEXT:
            raise InputError(
                f"Comparison {comparison_id} has a text of {len(text)} characters: at most {LONGEST_TEXT} are wanted."
            )
        # Models do write the character 0; as JSON every database takes it, and the page shows a mark.
        if not _is_storable(text.replace("\0", "")):
            raise InputError(f"Comparison {comparison_id} has a text with half of a surrogate pair, which no text has.")
    try:
        json.dumps(record, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, ValueError, TypeError) as error:
        raise InputError(f"Comparison {comparison_id} has a column that is not JSON ({error}).") from error
    if record.get("split") not in ("train", "test"):
        raise InputError(
            f'Comparison {comparison_id} has the split {record.get("split")!r}: "train" or "test" is wanted.'
        )
    gold = record.get("gold")
    numbers = isinstance(gold, list | tuple) and len(gold) == 2 and all(type(i) is int for i in gold)
    if gold is not None and not (numbers and gold[0] != gold[1] and set(gold) <= set(range(len(answers)))):
        raise InputError(
            f"Comparison {comparison_id} has the gold {gold!r}: the indices of the better and the worse answer are "
            "wanted."
        )
    return record
