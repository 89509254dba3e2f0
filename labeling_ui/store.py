"""The label store: projects, the pairs to judge, and labels that are never changed, in one SQLite file.

Durability: a label that `record` returned is on the disk (WAL, synchronous=FULL); a process killed at any moment loses
none. Within a process one lock admits one writer at a time, for writers that wait on SQLite's own lock starve each
other; between processes BEGIN IMMEDIATE and the busy timeout do the same. Readers never wait.

Labels and the comparisons they judge are append-only, and the database itself refuses to change them. A person who
corrects a label adds a newer one.
"""

from __future__ import annotations

import itertools
import math
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from reward.aggregate import Vote
from reward.records import InputError, Record
from reward.records import digest as content_digest

SCHEMA_VERSION = 1
# "ALBL" in SQLite's application_id tells a label store from every other SQLite file.
APPLICATION_ID = 0x414C424C
# SQLite allows 32,766 values in one statement.
VALUES_PER_STATEMENT = 10_000

metadata = sa.MetaData()
PROJECT = sa.Table(
    "projects",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("instructions", sa.Text, nullable=False),
    sa.Column("simulated", sa.Boolean, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)
COMPARISON = sa.Table(
    "comparisons",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("project_id", sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("comparison_id", sa.Text, nullable=False),
    sa.Column("payload", sa.JSON, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.UniqueConstraint("project_id", "comparison_id"),
)
ITEM = sa.Table(
    "items",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("project_id", sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("comparison", sa.ForeignKey("comparisons.id"), nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("first", sa.Integer, nullable=False),
    sa.Column("second", sa.Integer, nullable=False),
    sa.UniqueConstraint("project_id", "key"),
    sa.CheckConstraint("first < second"),
)
LABEL = sa.Table(
    "labels",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("project_id", sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("item_id", sa.ForeignKey("items.id"), nullable=False, index=True),
    sa.Column("annotator", sa.Text, nullable=False),
    sa.Column("left", sa.Integer, nullable=False),
    sa.Column("right", sa.Integer, nullable=False),
    sa.Column("value", sa.Integer, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("seconds", sa.Float),
    sa.Column("comment", sa.Text),
    sa.Column("created", sa.Text, nullable=False),
    sa.UniqueConstraint("project_id", "key"),
    sa.CheckConstraint("value BETWEEN 1 AND 7"),
)

APPEND_ONLY = [
    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table} are append-only'); END"
    for table in ("comparisons", "labels")
    for verb in ("UPDATE", "DELETE")
] + [
    # INSERT OR REPLACE deletes the old row without firing delete triggers.
    f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN EXISTS (SELECT 1 FROM {table} "
    f"WHERE id = NEW.id OR (project_id = NEW.project_id AND {key} = NEW.{key})) "
    f"BEGIN SELECT RAISE(ABORT, '{table} are append-only'); END"
    for table, key in (("comparisons", "comparison_id"), ("labels", "key"))
]


@dataclass(frozen=True, slots=True)
class Project:
    """A set of items and their labels. `simulated` says that a program gives the labels, never a person."""

    id: int
    name: str
    instructions: str
    simulated: bool
    created: str


@dataclass(frozen=True, slots=True)
class Item:
    """One pair of answers to judge.

    Attributes:
        id: number in this store.
        key: "<comparison id>:<first>-<second>", the same in every store.
        pair: indices of the two answers in the comparison, the smaller first.
        digest: sha256 of the whole comparison.
        payload: `{comparison_id, pair: [i, j], prompt, split, answers: [answer i, answer j]}` and the comparison's
            extra columns.
    """

    id: int
    key: str
    comparison_id: str
    pair: tuple[int, int]
    digest: str
    payload: Record


class Judgement(TypedDict):
    """What `LabelStore.record_many` takes: the arguments of `LabelStore.record`."""

    item_id: int
    annotator: str
    left: int
    right: int
    value: int
    key: str
    seconds: NotRequired[float | None]
    comment: NotRequired[str | None]


JUDGEMENT = tuple(Judgement.__annotations__)


@dataclass(frozen=True, slots=True)
class Label:
    """One person's judgement of one item as it was on the screen.

    Attributes:
        left, right: indices of the answers shown on either side.
        value: 1 (left much better), 2, 3, 4 (tie), 5, 6, 7 (right much better).
        key: idempotency key, unique in the project.
        seconds: time taken, if known.
        created: UTC, ISO 8601.
    """

    id: int
    item_id: int
    annotator: str
    left: int
    right: int
    value: int
    key: str
    seconds: float | None
    comment: str | None
    created: str

    def vote(self) -> Vote:
        """The label turned from the screen's order to the item's: 1 means `pair[0]` is much better."""
        return Vote(self.annotator, self.value if self.left < self.right else 8 - self.value)


class LabelStore:
    """A label database; it is made if `path` does not exist. Safe to share between threads.

    Args:
        path: SQLite file. A copy of it is complete only after `close`, for recent labels are in the file beside it.
        busy_seconds: how long to wait for another process that writes.

    Raises:
        InputError: by every method, if the file is no label database or of a newer schema, or cannot be opened,
            written or, within `busy_seconds`, locked.
    """

    def __init__(self, path: str | Path, *, busy_seconds: float = 30.0) -> None:
        self.path = Path(path).absolute()
        self._writer = threading.Lock()
        self._busy_seconds = busy_seconds
        # With isolation_level None the driver starts no transactions of its own; ours begin in _write and _read.
        self._engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(self.path)),
            connect_args={"timeout": busy_seconds, "isolation_level": None},
        )
        sa.event.listen(self._engine, "connect", _set_pragmas)
        try:
            self._prepare_schema()
            self._use_wal()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; the last one to close folds the write-ahead log into the file."""
        self._engine.dispose()

    def create_project(self, name: str, *, instructions: str = "", simulated: bool = False) -> Project:
        """The project of that name, made if need be.

        Raises:
            InputError: the name is empty, or taken by a project with other instructions or another `simulated`.
        """
        if not name.strip():
            raise InputError("The project name is empty: give a name.")
        with self._write() as connection:
            row = connection.execute(sa.select(PROJECT).where(PROJECT.c.name == name)).one_or_none()
            if row is None:
                values: dict[str, Any] = {
                    "name": name,
                    "instructions": instructions,
                    "simulated": simulated,
                    "created": _now(),
                }
                query = sa.insert(PROJECT).values(values).returning(PROJECT.c.id)
                return Project(id=connection.execute(query).scalar_one(), **values)
        project = Project(**row._mapping)
        if project.simulated != simulated:
            have, want = ("simulated labels" if flag else "people's labels" for flag in (project.simulated, simulated))
            raise InputError(f"Project {name} holds {have}, and {want} must never mix with them: use a new project.")
        if project.instructions != instructions:
            raise InputError(
                f"Project {name} has other instructions: labels given under different instructions must not mix; "
                "keep the instructions or use a new project."
            )
        return project

    def project(self, name: str) -> Project:
        """The project of that name.

        Raises:
            InputError: there is none; the message names those there are.
        """
        with self._read() as connection:
            rows = connection.execute(sa.select(PROJECT).order_by(PROJECT.c.name)).all()
        for row in rows:
            if row.name == name:
                return Project(**row._mapping)
        known = ", ".join(row.name for row in rows) or "none"
        raise InputError(f"{self.path} has no project {name}; it has: {known}.")

    def add_items(self, project: Project, comparisons: Iterable[Record]) -> tuple[int, int]:
        """Add one item for every unordered pair of answers of every comparison, all or nothing.

        Args:
            comparisons: `{id, prompt, split, answers: [{text, ...}]}`; see `reward.records`.

        Returns:
            Number of items added, and of items that were there already.

        Raises:
            InputError: a comparison is malformed, has fewer than two answers, or has the id of another with
                different content; the message names its id.
        """
        records = [_checked_comparison(record) for record in comparisons]
        added = there = 0
        with self._write() as connection:
            wanted = [record["id"] for record in records]
            digests = {
                row.comparison_id: row.digest
                for row in _rows(connection, COMPARISON, project, COMPARISON.c.comparison_id, wanted)
            }
            for record in records:
                comparison_id, digest = record["id"], content_digest(record)
                pairs = list(itertools.combinations(range(len(record["answers"])), 2))
                if known := digests.get(comparison_id):
                    if known != digest:
                        raise InputError(
                            f"Comparison {comparison_id} is in project {project.name} with different content: "
                            "what people judged cannot change; give the new content an id of its own."
                        )
                    there += len(pairs)
                    continue
                row = {"project_id": project.id, "comparison_id": comparison_id, "payload": record, "digest": digest}
                query = sa.insert(COMPARISON).values(row).returning(COMPARISON.c.id)
                comparison = connection.execute(query).scalar_one()
                connection.execute(
                    sa.insert(ITEM),
                    [
                        {
                            "project_id": project.id,
                            "comparison": comparison,
                            "key": f"{comparison_id}:{first}-{second}",
                            "first": first,
                            "second": second,
                        }
                        for first, second in pairs
                    ],
                )
                digests[comparison_id] = digest
                added += len(pairs)
        return added, there

    def record(
        self,
        project: Project,
        item_id: int,
        annotator: str,
        *,
        left: int,
        right: int,
        value: int,
        key: str,
        seconds: float | None = None,
        comment: str | None = None,
    ) -> Label:
        """Store one label; when this returns, the label is on the disk.

        Args:
            left, right: indices of the answers as shown.
            value: 1 (left much better) to 7 (right much better), 4 a tie.
            key: idempotency key; sending the same label again under it returns the first and stores nothing.
            seconds: time taken.

        Raises:
            InputError: a value is out of range, the item is not the project's, the sides are not its pair, the
                annotator or key is empty, or the key belongs to a label with other content.
        """
        judgement: Judgement = {
            "item_id": item_id,
            "annotator": annotator,
            "left": left,
            "right": right,
            "value": value,
            "key": key,
            "seconds": seconds,
            "comment": comment,
        }
        return self.record_many(project, [judgement])[0]

    def record_many(self, project: Project, judgements: Iterable[Judgement]) -> list[Label]:
        """Store many labels in one transaction, all or none; `record` says how each is treated.

        Returns:
            The label of every judgement, in the same order.
        """
        wanted: list[dict[str, Any]] = [{"seconds": None, "comment": None, **each} for each in judgements]
        keys = [each["key"] for each in wanted]
        with self._write() as connection:
            item_ids = [each["item_id"] for each in wanted]
            pairs = {row.id: (row.first, row.second) for row in _rows(connection, ITEM, project, ITEM.c.id, item_ids)}
            known = {
                row.key: {name: row._mapping[name] for name in JUDGEMENT}
                for row in _rows(connection, LABEL, project, LABEL.c.key, keys)
            }
            fresh = []
            for each in wanted:
                _check_judgement(each, project, pairs)
                first = known.setdefault(each["key"], each)
                if first is each:
                    fresh.append({"project_id": project.id, "created": _now(), **each})
                elif first != each:
                    changed = ", ".join(name for name in each if each[name] != first[name])
                    raise InputError(
                        f"The key {each['key']} belongs to a label with a different {changed}: labels never change; "
                        "send a correction under a new key."
                    )
            if fresh:
                connection.execute(sa.insert(LABEL), fresh)
            stored = {row.key: _label(row) for row in _rows(connection, LABEL, project, LABEL.c.key, keys)}
        return [stored[key] for key in keys]

    def items(self, project: Project) -> list[Item]:
        """All items of the project, in the order they were added."""
        query = (
            sa.select(*ITEM.c["id", "key", "first", "second"], *COMPARISON.c["comparison_id", "digest", "payload"])
            .join_from(ITEM, COMPARISON)
            .where(ITEM.c.project_id == project.id)
            .order_by(ITEM.c.id)
        )
        with self._read() as connection:
            return [_item(row) for row in connection.execute(query)]

    def labels(self, project: Project) -> list[Label]:
        """All labels of the project, in the order they were stored."""
        query = sa.select(LABEL).where(LABEL.c.project_id == project.id).order_by(LABEL.c.id)
        with self._read() as connection:
            return [_label(row) for row in connection.execute(query)]

    def count_labels(self, project: Project) -> int:
        """Number of labels of the project."""
        query = sa.select(sa.func.count()).select_from(LABEL).where(LABEL.c.project_id == project.id)
        with self._read() as connection:
            return connection.execute(query).scalar_one()

    def votes(self, project: Project) -> list[tuple[Record, list[Vote]]]:
        """The payload of every item with its votes, as `reward.aggregate.preferences` takes them.

        An annotator's newest label on an item is their vote; the older ones stay in `labels`.
        """
        newest: dict[int, dict[str, Vote]] = {}
        for label in self.labels(project):
            newest.setdefault(label.item_id, {})[label.annotator] = label.vote()
        return [(item.payload, list(newest.get(item.id, {}).values())) for item in self.items(project)]

    def digest(self, project: Project) -> str:
        """sha256 over all labels in order, with the content they judged, as 64 hex digits.

        Row numbers and times of storing do not enter: the same labels on the same items give the same digest in
        any store.
        """
        # Labels before items: then every label's item is there, even while others add to the store.
        given = self.labels(project)
        judged = {item.id: {"item": item.key, "content": item.digest} for item in self.items(project)}
        said = [name for name in JUDGEMENT if name != "item_id"]
        return content_digest(
            [judged[label.item_id] | {name: getattr(label, name) for name in said} for label in given]
        )

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """A transaction that holds the write lock from its first statement, and so never has to be tried again."""
        with self._writer, self._explained(), self._engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        """One consistent view of the database; it neither waits for writers nor makes them wait."""
        with self._explained(), self._engine.begin() as connection:
            connection.exec_driver_sql("BEGIN")
            yield connection

    def _prepare_schema(self) -> None:
        """Check that the file is ours and of our version, or lay out the schema in an empty one."""
        with self._write() as connection:
            application = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            empty = not connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
            if application != APPLICATION_ID and not (empty and application == version == 0):
                raise InputError(f"{self.path} is a database of another program: give the path of a label database.")
            if version > SCHEMA_VERSION:
                raise InputError(
                    f"{self.path} has schema version {version}, and this program knows versions up to "
                    f"{SCHEMA_VERSION}: update the program."
                )
            if version == 0:
                metadata.create_all(connection)
                for trigger in APPEND_ONLY:
                    connection.exec_driver_sql(trigger)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
            # Written at every start: BEGIN IMMEDIATE passes on a read-only file, only a write finds out.
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")

    def _use_wal(self) -> None:
        """Turn on the write-ahead log, which stays on in the file.

        SQLite answers "busy" at once, without the busy timeout, where two processes turn it on together.
        """
        deadline = time.monotonic() + self._busy_seconds
        with self._explained(), self._engine.connect() as connection:
            while True:
                try:
                    mode = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar_one()
                    break
                except OperationalError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
        if mode != "wal":
            raise InputError(f"{self.path} is on a file system without write-ahead logs: use a local disk.")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the failures that a user can mend into sentences; ours stay as they are."""
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            # The low byte is the kind of failure, the rest its variety.
            advice = ADVICE.get(getattr(cause, "sqlite_errorcode", 0) & 0xFF)
            if advice is None:
                raise
            raise InputError(f"{self.path} {advice.format(seconds=self._busy_seconds)} ({cause}).") from error


ADVICE = {
    sqlite3.SQLITE_NOTADB: "is not a label database: give the path of one, or of a file that does not exist yet",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: its folder must exist and be writable",
    sqlite3.SQLITE_READONLY: "is read-only: labels need a file and a folder that can be written",
    sqlite3.SQLITE_PERM: "may not be accessed: labels need a file and a folder that can be written",
    sqlite3.SQLITE_BUSY: "has been locked by another process for {seconds:g} seconds: end that process or wait",
    sqlite3.SQLITE_FULL: "cannot grow, the disk is full: free some space and send the label again",
    sqlite3.SQLITE_CORRUPT: "is damaged: restore it from a copy",
}


def _set_pragmas(connection: sqlite3.Connection, _: object) -> None:
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _rows(
    connection: sa.Connection, table: sa.Table, project: Project, column: sa.Column[Any], values: Sequence[Any]
) -> Iterator[sa.Row[Any]]:
    """The project's rows of `table` whose `column` has one of `values`."""
    for start in range(0, len(values), VALUES_PER_STATEMENT):
        some = values[start : start + VALUES_PER_STATEMENT]
        yield from connection.execute(sa.select(table).where(table.c.project_id == project.id, column.in_(some)))


def _item(row: sa.Row[Any]) -> Item:
    rest = {name: value for name, value in row.payload.items() if name not in ("id", "answers")}
    payload = {
        "comparison_id": row.comparison_id,
        "pair": [row.first, row.second],
        **rest,
        "answers": [row.payload["answers"][row.first], row.payload["answers"][row.second]],
    }
    return Item(row.id, row.key, row.comparison_id, (row.first, row.second), row.digest, payload)


def _label(row: sa.Row[Any]) -> Label:
    return Label(**{name: value for name, value in row._mapping.items() if name != "project_id"})


def _checked_comparison(record: Record) -> Record:
    comparison_id = record.get("id")
    if not isinstance(comparison_id, str) or not comparison_id:
        raise InputError(f"A comparison has the id {comparison_id!r}: a text that is not empty is wanted.")
    answers = record.get("answers")
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and isinstance(answer.get("text"), str) for answer in answers
    ):
        raise InputError(f'Comparison {comparison_id}: "answers" must be a list of objects like {{"text": ...}}.')
    if len(answers) < 2:
        raise InputError(f"Comparison {comparison_id} has {len(answers)} answers: at least 2 are needed for a pair.")
    prompt = record.get("prompt")
    if not isinstance(prompt, list) or not all(
        isinstance(turn, dict) and turn.keys() >= {"role", "content"} for turn in prompt
    ):
        raise InputError(f'Comparison {comparison_id}: "prompt" must be a list of {{"role", "content"}} turns.')
    if record.get("split") not in ("train", "test"):
        raise InputError(
            f'Comparison {comparison_id} has the split {record.get("split")!r}: "train" or "test" is wanted.'
        )
    return record


def _check_judgement(judgement: dict[str, Any], project: Project, pairs: dict[int, tuple[int, int]]) -> None:
    """`pairs` holds the project's items by number."""
    for name in ("annotator", "key"):
        if not isinstance(judgement[name], str) or not judgement[name].strip():
            raise InputError(f"A label has the {name} {judgement[name]!r}: a text that is not empty is wanted.")
    value = judgement["value"]
    if type(value) is not int or not 1 <= value <= 7:
        raise InputError(
            f"A label has the value {value!r}: a whole number from 1 (left much better) to 7 (right much better) "
            "is wanted."
        )
    pair = pairs.get(judgement["item_id"])
    if pair is None:
        raise InputError(f"Project {project.name} has no item {judgement['item_id']!r}.")
    left, right = judgement["left"], judgement["right"]
    if (left, right) not in (pair, pair[::-1]):
        raise InputError(
            f"A label of item {judgement['item_id']} shows answers {left!r} and {right!r}: the item's pair is "
            f"{pair[0]} and {pair[1]}."
        )
    seconds = judgement["seconds"]
    if seconds is not None and not (isinstance(seconds, int | float) and 0 <= seconds < math.inf):
        raise InputError(f"A label took {seconds!r} seconds: a number of at least 0, or none, is wanted.")
