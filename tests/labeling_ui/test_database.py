"""Writers that share a commit: each is on the disk when told so, and one's failure is not another's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from labeling_ui.database import LARGEST_GROUP, Database, DatabaseError
from tests.labeling_ui.conftest import on_both

pytestmark = on_both


@pytest.fixture
def database(where: str) -> Iterator[Database]:
    database = Database(where)
    with database.write() as connection:
        connection.exec_driver_sql("CREATE TABLE note (writer INTEGER, body TEXT)")
    yield database
    with database.write() as connection:
        connection.exec_driver_sql("DROP TABLE note")
    database.close()


def write(database: Database, writer: int, body: str = "x", wrong: bool = False) -> None:
    with database.write_with_others() as connection:
        connection.execute(sa.text("INSERT INTO note VALUES (:w, :b)"), {"w": writer, "b": body})
        if wrong:
            raise ValueError(f"writer {writer} is wrong")


def notes(database: Database) -> list[int]:
    with database.read() as connection:
        return sorted(connection.exec_driver_sql("SELECT writer FROM note").scalars())


def commits_of(database: Database) -> list[float]:
    found: list[float] = []
    sa.event.listen(database.engine, "commit", lambda _: found.append(time.monotonic()))
    return found


def held(database: Database) -> Any:
    """Lets every writer of a test wait for the lock before the first one goes on."""
    database._writer.acquire()

    def release(count: int) -> None:
        while database._joining < count:
            time.sleep(0.001)
        database._writer.release()

    return release


def test_those_who_wait_share_a_commit_and_all_is_stored(database: Database) -> None:
    commits, release = commits_of(database), held(database)
    with ThreadPoolExecutor(3 * LARGEST_GROUP) as pool:
        done = [pool.submit(write, database, writer) for writer in range(3 * LARGEST_GROUP)]
        release(3 * LARGEST_GROUP)
        for each in done:
            each.result(timeout=30)
    assert notes(database) == [*range(3 * LARGEST_GROUP)]
    assert len(commits) == 3 + 1  # three full groups, and the reading


def test_a_writer_alone_commits_at_once(database: Database) -> None:
    commits = commits_of(database)
    write(database, 1)
    assert len(commits) == 1 and notes(database) == [1] and database._group is None


def test_what_a_writer_says_is_seen_by_others_only_when_it_is_on_the_disk(database: Database) -> None:
    """A reader, and whoever wrote, know nothing of a note before the commit that holds it."""
    inside, go_on, returned = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        write(database, 1)
        returned.set()

    def second() -> None:
        with database.write_with_others() as connection:
            connection.execute(sa.text("INSERT INTO note VALUES (2, 'y')"))
            inside.set()
            go_on.wait(30)

    release = held(database)
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    while database._joining < 1:
        time.sleep(0.001)
    threads[1].start()
    release(2)
    if inside.wait(30) and not returned.is_set():  # the first came first, and waits for the second
        assert notes(database) == []
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert notes(database) == [1, 2] and returned.is_set()


def test_one_that_raises_undoes_its_own_part_only(database: Database) -> None:
    release = held(database)
    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(write, database, writer, wrong=writer % 2 == 1) for writer in range(6)]
        release(6)
    for writer, each in enumerate(done):
        if writer % 2:
            with pytest.raises(ValueError, match=f"writer {writer} is wrong"):
                each.result()
        else:
            each.result()
    assert notes(database) == [0, 2, 4]
    assert database._group is None


def test_an_ordinary_writer_ends_an_open_group(database: Database) -> None:
    """It may come between two that share: what they wrote is committed first, by itself."""
    database._joining += 1  # as if another were waiting, who never comes
    waiting = threading.Thread(target=write, args=(database, 1))
    waiting.start()
    while database._group is None:
        time.sleep(0.001)
    with database.write() as connection:
        connection.exec_driver_sql("INSERT INTO note VALUES (2, 'plain')")
    waiting.join(10)
    assert not waiting.is_alive() and notes(database) == [1, 2]
    database._joining -= 1


def test_a_group_that_nobody_ends_is_ended_by_who_waits(database: Database) -> None:
    database._joining += 1  # whoever it was has been interrupted
    write(database, 1)  # comes back within two seconds
    database._joining -= 1
    assert notes(database) == [1] and database._group is None


def test_a_commit_that_fails_fails_for_all_and_nothing_is_stored(database: Database) -> None:
    failing = True

    def refuse(connection: Any) -> None:
        if failing:
            raise sa.exc.OperationalError("COMMIT", None, Exception("the disk is gone"))

    sa.event.listen(database.engine, "commit", refuse)
    release = held(database)
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(write, database, writer) for writer in range(4)]
        release(4)
    for each in done:
        with pytest.raises((DatabaseError, sa.exc.OperationalError)):
            each.result()
    failing = False
    assert notes(database) == []
    write(database, 9)
    assert notes(database) == [9]


def test_a_full_database_fails_for_all_who_shared_and_goes_on_later(database: Database) -> None:
    """SQLite ends the whole transaction when it runs out of room: a real limit on its pages, not a made-up error."""
    if database.dialect != "sqlite":
        pytest.skip("this is about SQLite's pages")

    def limit(connection: Any, *_: Any) -> None:
        connection.execute("PRAGMA max_page_count = 80")

    database.engine.dispose()
    sa.event.listen(database.engine, "connect", limit)
    release = held(database)
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(write, database, 0), pool.submit(write, database, 1, "z" * 1_000_000)]
        release(2)
    errors = [each.exception() for each in done]
    stored = notes(database)
    # Whoever was told that it is stored is stored, and nobody else.
    assert stored == [writer for writer, error in enumerate(errors) if error is None]
    assert isinstance(errors[1], DatabaseError) and "cannot grow, the disk is full" in str(errors[1])
    write(database, 5)
    assert 5 in notes(database)
