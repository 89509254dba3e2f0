"""A label database: SQLite in one file, or PostgreSQL by URL; transactions, schema, and failures put into words.

Durability: what a transaction wrote is on the disk when it ends (SQLite: write-ahead log with synchronous=FULL). One
writer at a time, for writers that wait on the database's own locks starve each other: within a process a lock, between
processes BEGIN IMMEDIATE or an advisory lock. Readers never wait. Where many wait to write, one commit serves several.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from labeling_ui.schema import metadata
from reward.records import InputError

# "ALBL" in SQLite's application_id tells a label database from every other SQLite file.
APPLICATION_ID = 0x414C424C
# PostgreSQL's advisory locks are numbers that all programs on a database share.
WRITER_LOCK = 0x414C424C


# So many writers share a commit at most: the first of them waits for the last.
LARGEST_GROUP = 8


class _Group:
    """A transaction that several writers share, and whether it is on the disk."""

    def __init__(self, connection: sa.Connection, transaction: sa.Transaction) -> None:
        self.connection, self.transaction = connection, transaction
        self.members = 0
        self.over = threading.Event()
        self.error: BaseException | None = None


class Database:
    """A label database; it is made where there is none. Safe to share between threads.

    Args:
        where: a path of a SQLite file, or a URL `postgresql://user:password@host/name`. A copy of a SQLite file is
            complete only after `close`, for recent labels are in the file beside it.
        busy_seconds: how long to wait for another process that writes.

    Raises:
        InputError: by every transaction, if the database is none of labels or of a newer schema, or cannot be
            reached, opened, written or, within `busy_seconds`, locked.
    """

    def __init__(self, where: str | Path, *, busy_seconds: float = 30.0) -> None:
        self.busy_seconds = busy_seconds
        self._writer = threading.Lock()
        self._group: _Group | None = None  # open between two writers, guarded by _writer
        self._joining, self._counting = 0, threading.Lock()
        self.engine = self._connect(str(where))
        self.dialect = self.engine.dialect.name
        try:
            if self.dialect == "sqlite":
                with self._explained():
                    self._claim_file()
                    self._use_wal()
            with self._explained():
                self._upgrade()
        except BaseException:
            self.close()
            raise

    def _connect(self, where: str) -> sa.Engine:
        if "://" not in where:
            path = Path(where).absolute()
            self.name = str(path)
            # With isolation_level None the driver starts no transactions of its own; ours begin in write and read.
            engine = sa.create_engine(
                sa.URL.create("sqlite", database=self.name),
                connect_args={"timeout": self.busy_seconds, "isolation_level": None, "check_same_thread": False},
            )
            sa.event.listen(engine, "connect", _set_pragmas)
            return engine
        try:
            url = sa.make_url(where)
        except sa.exc.ArgumentError as error:
            raise InputError(
                f"{where.split('://')[0]}://... is no address of a database: give postgresql://user@host/name or the "
                "path of a SQLite file."
            ) from error
        if url.get_backend_name() != "postgresql":
            raise InputError(
                f"{url.get_backend_name()} databases are not supported: give postgresql://... or the path of a SQLite "
                "file."
            )
        self.name = url.render_as_string(hide_password=True)
        try:
            return sa.create_engine(
                url.set(drivername="postgresql+psycopg"), pool_pre_ping=True, pool_size=20, max_overflow=20
            )
        except ModuleNotFoundError as error:
            raise InputError(
                "PostgreSQL needs the package psycopg: pip install 'align-rlhf[postgres]', or use a SQLite file."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; the last one to close folds SQLite's write-ahead log into the file."""
        self.engine.dispose()

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that holds the write lock from its first statement, and so never has to be tried again."""
        with self._writer, self._explained():
            if self._group:
                self._finish(self._group)
            with self.engine.begin() as connection:
                self._lock(connection)
                yield connection

    @contextmanager
    def write_with_others(self) -> Iterator[sa.Connection]:
        """A short transaction that shares its commit with those that wait to write: one wait for the disk for all.

        Each writer works in a savepoint of its own, after the one before, and what it raises undoes its own part only.
        The block is left when all of it is on the disk; where that fails, it fails for every one of them, and nothing
        of theirs is stored.
        """
        with self._explained():
            with self._counting:
                self._joining += 1
            try:
                self._writer.acquire()
            finally:
                with self._counting:
                    self._joining -= 1
            try:
                group = self._group or self._open()
                try:
                    with _savepoint(group.connection):
                        yield group.connection
                except _Broken as broken:
                    group.error = broken.__cause__
                finally:
                    group.members += 1
                    if group.error or not self._joining or group.members >= LARGEST_GROUP:
                        self._finish(group)
            finally:
                self._writer.release()
            # Whoever was waiting ends the group; should that one have been interrupted, we do.
            while not group.over.wait(1.0):
                with self._writer:
                    if self._group is group:
                        self._finish(group)
            if group.error:
                raise group.error

    def _lock(self, connection: sa.Connection) -> None:
        """Begin to write, as the only one."""
        if self.dialect == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{int(self.busy_seconds * 1000)}ms'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")

    def _open(self) -> _Group:
        connection = self.engine.connect()
        try:
            group = _Group(connection, connection.begin())
            self._lock(connection)
        except BaseException:
            connection.close()
            raise
        self._group = group
        return group

    def _finish(self, group: _Group) -> None:
        """Commit a group, or undo it where it is broken, and let its writers go; what fails is theirs to raise."""
        self._group = None
        try:
            if not group.error:
                group.transaction.commit()
        except BaseException as error:
            group.error = error
        finally:
            if group.error:
                group.connection.invalidate()  # closed for good: whatever is left of the transaction goes with it
            group.connection.close()
            group.over.set()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view of the database; it neither waits for writers nor makes them wait."""
        with self._explained(), self.engine.connect() as connection:
            if self.dialect == "sqlite":
                with connection.begin():
                    connection.exec_driver_sql("BEGIN")
                    yield connection
            else:
                with connection.execution_options(isolation_level="REPEATABLE READ").begin():
                    yield connection

    # -- schema ---------------------------------------------------------------------------------------------------

    def _claim_file(self) -> None:
        """Refuse another program's file before anything is written into it."""
        with self._writer, self.engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            application = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            tables = {row[0] for row in connection.exec_driver_sql("SELECT name FROM sqlite_master")}
            if application != APPLICATION_ID and (application or tables):
                raise InputError(f"{self.name} is a database of another program: give the path of a label database.")
            if tables and "alembic_version" not in tables:
                raise InputError(
                    f"{self.name} was made before the first release and cannot be read any more: label into a new "
                    "database."
                )
            # Written at every start: BEGIN IMMEDIATE passes on a read-only file, only a write finds out.
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")

    def _upgrade(self) -> None:
        """Bring the schema to today's version, by Alembic's migrations."""
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        script = ScriptDirectory(str(Path(__file__).parent / "migrations"))
        with self.write() as connection:
            context = MigrationContext.configure(connection, opts={"target_metadata": metadata})
            have, head = context.get_current_revision(), script.get_current_head()
            if have == head:
                return
            if have is not None and have not in {revision.revision for revision in script.walk_revisions()}:
                raise InputError(
                    f"{self.name} has schema version {have}, and this program knows versions up to {head}: update the "
                    "program."
                )
            from alembic.operations import Operations

            with Operations.context(context):
                for revision in reversed(list(script.iterate_revisions(head, have or "base"))):
                    revision.module.upgrade()
                    context.stamp(script, revision.revision)

    def _use_wal(self) -> None:
        """Turn on the write-ahead log, which stays on in the file.

        SQLite answers "busy" at once, without the busy timeout, where two processes turn it on together.
        """
        deadline = time.monotonic() + self.busy_seconds
        with self.engine.connect() as connection:
            while True:
                try:
                    mode = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar_one()
                    break
                except OperationalError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
        if mode != "wal":
            raise InputError(f"{self.name} is on a file system without write-ahead logs: use a local disk.")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the failures that a user can mend into sentences; ours stay as they are."""
        try:
            yield
        except (DBAPIError, sqlite3.Error) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            # SQLite: the low byte is the kind of failure, the rest its variety. PostgreSQL: five letters, two of class.
            advice = ADVICE.get(getattr(cause, "sqlite_errorcode", 0) & 0xFF)
            if advice is None and self.dialect == "postgresql":
                code = getattr(cause, "sqlstate", None) or ""
                if code or isinstance(error, OperationalError):
                    advice = POSTGRES_ADVICE.get(code) or POSTGRES_ADVICE.get(code[:2])
            if advice is None:
                raise
            raise DatabaseError(f"{self.name} {advice.format(seconds=self.busy_seconds)} ({cause}).") from error


class DatabaseError(InputError):
    """The database cannot be used now; nothing of the transaction was stored, and it may be tried again."""


ADVICE = {
    sqlite3.SQLITE_NOTADB: "is not a label database: give the path of one, or of a file that does not exist yet",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: its folder must exist and be writable",
    sqlite3.SQLITE_READONLY: "is read-only: labels need a file and a folder that can be written",
    sqlite3.SQLITE_PERM: "may not be accessed: labels need a file and a folder that can be written",
    sqlite3.SQLITE_BUSY: "has been locked by another process for {seconds:g} seconds: end that process or wait",
    sqlite3.SQLITE_FULL: "cannot grow, the disk is full: free some space and send the label again",
    sqlite3.SQLITE_CORRUPT: "is damaged: restore it from a copy",
    sqlite3.SQLITE_IOERR: "cannot be read or written: check the disk",
}
POSTGRES_ADVICE = {
    "": "cannot be reached: check that the server runs and the address is right",
    "08": "cannot be reached: check that the server runs and the address is right",
    "28": "refuses the user or password: check the address",
    "3D": "has no such database: make it first (createdb)",
    "53": "has no room left, or too many connections: free some space and send the label again",
    "55": "has been locked by another process for {seconds:g} seconds: end that process or wait",
    "57": "is shutting down or starting: send the label again in a moment",
    "25": "is read-only: give an address that can be written",
    "42501": "does not let this user write: grant it the schema",
}


class _Broken(Exception):
    """The connection of a group cannot go on, for any of its writers; the cause says why."""


@contextmanager
def _savepoint(connection: sa.Connection) -> Iterator[None]:
    """A part of a transaction that is undone by itself where the block raises.

    Raises:
        _Broken: it could be neither kept nor undone.
    """
    try:
        connection.exec_driver_sql("SAVEPOINT writer")
    except DBAPIError as error:
        raise _Broken from error
    try:
        yield
    except BaseException as error:
        try:
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT writer")
            connection.exec_driver_sql("RELEASE SAVEPOINT writer")
        except DBAPIError as failed:
            # A full disk ends the whole transaction, and the savepoint is gone: then the first error says why.
            raise _Broken from (error if isinstance(error, DBAPIError) else failed)
        raise
    try:
        connection.exec_driver_sql("RELEASE SAVEPOINT writer")
    except DBAPIError as error:
        raise _Broken from error


def _set_pragmas(connection: sqlite3.Connection, _: object) -> None:
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def now_text(seconds: float) -> str:
    """UTC, ISO 8601 to the millisecond."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def value_rows(connection: sa.Connection, query: Any, column: Any, values: list[Any]) -> Iterator[sa.Row[Any]]:
    """Rows of `query` whose `column` has one of `values`: SQLite takes 32,766 values a statement at most."""
    for start in range(0, len(values), 10_000):
        yield from connection.execute(query.where(column.in_(values[start : start + 10_000])))
