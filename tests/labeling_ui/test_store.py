"""The label store against hand-made data and real failures: SIGKILL, locks, read-only files, hostile SQL."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from labeling_ui.store import SCHEMA_VERSION, Judgement, LabelStore, Project
from reward.aggregate import Vote, preferences
from reward.records import InputError, user_prompt


def comparison(number: int = 0, answers: int = 2, **extra: Any) -> dict[str, Any]:
    return {
        "id": f"c{number}",
        "prompt": user_prompt(f"Question {number}?"),
        "split": "train",
        "answers": [{"text": f"Answer {n} to {number}.", "model": "m", "sampling": {}} for n in range(answers)],
        **extra,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.db"


@pytest.fixture
def store(path: Path) -> Iterator[LabelStore]:
    with LabelStore(path) as store:
        yield store


@pytest.fixture
def project(store: LabelStore) -> Project:
    project = store.create_project("helpful", instructions="Choose the more helpful answer.")
    store.add_items(project, [comparison(0), comparison(1, answers=3)])
    return project


def judgement(**changed: Any) -> Judgement:
    return {"item_id": 1, "annotator": "ann", "left": 1, "right": 0, "value": 2, "key": "k", **changed}  # type: ignore[typeddict-item]


# Projects and items


def test_items_are_the_pairs_of_each_comparison(store: LabelStore, project: Project) -> None:
    items = store.items(project)
    assert [item.key for item in items] == ["c0:0-1", "c1:0-1", "c1:0-2", "c1:1-2"]
    assert items[2].payload == {
        "comparison_id": "c1",
        "pair": [0, 2],
        "prompt": user_prompt("Question 1?"),
        "split": "train",
        "answers": [comparison(1, 3)["answers"][0], comparison(1, 3)["answers"][2]],
    }


def test_extra_columns_ride_along(store: LabelStore, project: Project) -> None:
    store.add_items(project, [comparison(2, source="forum")])
    assert store.items(project)[-1].payload["source"] == "forum"


def test_import_again_adds_nothing(store: LabelStore, project: Project) -> None:
    assert store.add_items(project, [comparison(0), comparison(1, 3), comparison(2, 4), comparison(2, 4)]) == (6, 10)
    assert store.add_items(project, iter([comparison(0), comparison(1, 3), comparison(2, 4)])) == (0, 10)
    assert len(store.items(project)) == 10


def test_changed_comparison_is_refused_and_nothing_is_added(store: LabelStore, project: Project) -> None:
    with pytest.raises(InputError, match=r"Comparison c1 .* different content"):
        store.add_items(project, [comparison(7), comparison(1, answers=4)])
    assert len(store.items(project)) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answers": [{"text": "alone"}]}, "c0 has 1 answers: at least 2"),
        ({"answers": ["bare", "text"]}, 'c0: "answers" must be'),
        ({"prompt": "bare text"}, 'c0: "prompt" must be'),
        ({"split": "validation"}, "c0 has the split 'validation'"),
        ({"id": ""}, "the id ''"),
    ],
)
def test_malformed_comparison_is_refused(store: LabelStore, changed: dict[str, Any], message: str) -> None:
    project = store.create_project("p")
    with pytest.raises(InputError, match=message):
        store.add_items(project, [comparison(5), comparison() | changed])
    assert store.items(project) == []


def test_project_is_made_once(store: LabelStore, project: Project) -> None:
    assert store.create_project("helpful", instructions="Choose the more helpful answer.") == project
    assert store.project("helpful") == project
    with pytest.raises(InputError, match=r"has no project harmless; it has: helpful\."):
        store.project("harmless")


def test_simulated_and_human_labels_never_mix(store: LabelStore, project: Project) -> None:
    with pytest.raises(InputError, match="holds people's labels, and simulated labels must never mix"):
        store.create_project(project.name, instructions=project.instructions, simulated=True)
    store.create_project("robots", simulated=True)
    with pytest.raises(InputError, match="holds simulated labels, and people's labels must never mix"):
        store.create_project("robots")


def test_other_instructions_are_refused(store: LabelStore, project: Project) -> None:
    with pytest.raises(InputError, match="other instructions"):
        store.create_project(project.name, instructions="Choose the longer answer.")


# Labels


def test_label_survives_reopening(path: Path) -> None:
    with LabelStore(path) as store:
        project = store.create_project("p")
        store.add_items(project, [comparison()])
        label = store.record(project, 1, "ann", left=1, right=0, value=2, key="k", seconds=3.5, comment="clear")
    with LabelStore(path) as store:
        assert store.labels(store.project("p")) == [label]
    assert (label.item_id, label.left, label.right, label.value, label.seconds) == (1, 1, 0, 2, 3.5)
    assert label.created.endswith("+00:00")


def test_label_turned_to_the_order_of_the_item(store: LabelStore, project: Project) -> None:
    as_shown = store.record(project, 1, "ann", left=0, right=1, value=2, key="a")
    swapped = store.record(project, 1, "bob", left=1, right=0, value=2, key="b")
    assert as_shown.vote() == Vote("ann", 2)
    assert swapped.vote() == Vote("bob", 6)


def test_same_key_returns_the_first_label(store: LabelStore, project: Project) -> None:
    first = store.record_many(project, [judgement(), judgement()])
    assert first[0] == first[1] == store.record_many(project, [judgement()])[0]
    assert store.count_labels(project) == 1


@pytest.mark.parametrize("changed", [{"value": 3}, {"annotator": "bob"}, {"left": 0, "right": 1}, {"comment": "?"}])
def test_same_key_with_other_content_is_refused(store: LabelStore, project: Project, changed: dict[str, Any]) -> None:
    store.record_many(project, [judgement()])
    with pytest.raises(InputError, match=f"key k belongs to a label with a different {', '.join(changed)}"):
        store.record_many(project, [judgement(key="new"), judgement(**changed)])
    assert store.count_labels(project) == 1


def test_keys_belong_to_one_project(store: LabelStore, project: Project) -> None:
    other = store.create_project("other")
    store.add_items(other, [comparison()])
    store.record_many(project, [judgement()])
    store.record_many(other, [judgement(item_id=store.items(other)[0].id, value=7)])
    assert (store.count_labels(project), store.count_labels(other)) == (1, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"value": 0}, "value 0: a whole number from 1"),
        ({"value": 8}, "value 8"),
        ({"value": 3.5}, "value 3.5"),
        ({"value": True}, "value True"),
        ({"item_id": 99}, "has no item 99"),
        ({"left": 0, "right": 0}, "shows answers 0 and 0: the item's pair is 0 and 1"),
        ({"left": 2, "right": 0}, "shows answers 2 and 0"),
        ({"annotator": " "}, "annotator ' '"),
        ({"key": ""}, "key ''"),
        ({"seconds": float("nan")}, "nan seconds"),
        ({"seconds": -1}, "-1 seconds"),
    ],
)
def test_wrong_label_is_refused_with_its_whole_batch(
    store: LabelStore, project: Project, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        store.record_many(project, [judgement(key="fine"), judgement(**changed)])
    assert store.count_labels(project) == 0


def test_item_of_another_project_is_unknown(store: LabelStore, project: Project) -> None:
    with pytest.raises(InputError, match="Project other has no item 1"):
        store.record_many(store.create_project("other"), [judgement()])


def test_nothing_to_record(store: LabelStore, project: Project) -> None:
    assert store.record_many(project, []) == []


def test_newest_label_of_an_annotator_is_the_vote(store: LabelStore, project: Project) -> None:
    store.record_many(
        project, [judgement(value=1), judgement(annotator="bob", key="b"), judgement(value=4, key="corrected")]
    )
    (payload, votes), *others = store.votes(project)
    assert payload["comparison_id"] == "c0"
    assert votes == [Vote("ann", 4), Vote("bob", 6)]
    assert all(votes == [] for _, votes in others)
    result = preferences(store.votes(project), simulated=project.simulated)
    assert [record["chosen"][0]["content"] for record in result.records] == ["Answer 1 to 0."]
    assert result.unlabelled == 3


def test_digest_is_of_what_was_said_and_not_of_where_it_is_stored(
    store: LabelStore, project: Project, tmp_path: Path
) -> None:
    store.record_many(project, [judgement(), judgement(annotator="bob", key="b")])
    with LabelStore(tmp_path / "other.db") as other:
        other.add_items(other.create_project("first"), [comparison(8)])
        copy = other.create_project("copy")
        other.add_items(copy, [comparison(0), comparison(1, 3)])
        item = other.items(copy)[0].id
        empty = other.digest(copy)
        other.record_many(copy, [judgement(item_id=item)])
        one = other.digest(copy)
        other.record_many(copy, [judgement(item_id=item, annotator="bob", key="b")])
        assert other.digest(copy) == store.digest(project)
    assert len({empty, one, store.digest(project)}) == 3


# Append-only


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE labels SET value = 7",
        "DELETE FROM labels",
        "DELETE FROM labels WHERE id = 1",
        "INSERT OR REPLACE INTO labels SELECT id, project_id, item_id, annotator, left, right, 7, key, 0, '', created "
        "FROM labels",
        "INSERT OR REPLACE INTO labels SELECT 99, project_id, item_id, annotator, left, right, 7, key, 0, '', created "
        "FROM labels",
        "INSERT INTO labels SELECT * FROM labels WHERE true ON CONFLICT DO UPDATE SET value = 7",
        "UPDATE comparisons SET payload = '{}'",
        "DELETE FROM comparisons",
        "REPLACE INTO comparisons SELECT id, project_id, comparison_id, '{}', digest FROM comparisons",
    ],
)
def test_the_database_refuses_to_change_labels(store: LabelStore, project: Project, path: Path, statement: str) -> None:
    label = store.record_many(project, [judgement()])
    before = store.digest(project)
    # A plain connection with SQLite's own defaults: the rule is in the file, not in our settings.
    with sqlite3.connect(path) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()
    assert store.labels(project) == label
    assert store.digest(project) == before


# Files that cannot be used


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message):
        LabelStore(path, **options)


def test_not_a_database(path: Path) -> None:
    path.write_text("name,value\n" * 100)
    refused(path, "is not a label database")
    assert path.read_text() == "name,value\n" * 100


@pytest.mark.parametrize("statement", ["CREATE TABLE recipes (name TEXT)", "PRAGMA user_version = 1"])
def test_database_of_another_program_is_left_alone(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()
    before = path.read_bytes()
    refused(path, "is a database of another program")
    assert path.read_bytes() == before


def test_newer_schema_is_refused_with_both_numbers(path: Path) -> None:
    LabelStore(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    refused(path, f"schema version {SCHEMA_VERSION + 1}, and this program knows versions up to {SCHEMA_VERSION}")


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "missing" / "labels.db", "cannot be opened: its folder must exist")


def test_folder_instead_of_file(tmp_path: Path) -> None:
    refused(tmp_path, "cannot be opened")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach; pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_plain_user(action: Callable[[], None]) -> None:
    """Permissions do not bind root: step down to "nobody" for the action."""
    if os.geteuid() != 0:
        action()
        return
    os.seteuid(65534)
    try:
        action()
    finally:
        os.seteuid(0)


def test_read_only_file(open_folder: Path) -> None:
    path = open_folder / "labels.db"
    LabelStore(path).close()
    path.chmod(0o444)
    open_folder.chmod(0o777)
    as_plain_user(lambda: refused(path, "is read-only"))


def test_read_only_folder(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    as_plain_user(lambda: refused(open_folder / "labels.db", "cannot be opened"))
    open_folder.chmod(0o755)


def test_locked_database(store: LabelStore, project: Project, path: Path) -> None:
    with LabelStore(path, busy_seconds=0.05) as impatient:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match=r"has been locked by another process for 0\.05 seconds"):
            impatient.record_many(project, [judgement()])
        refused(path, "has been locked", busy_seconds=0.05)
        assert impatient.labels(project) == []  # readers do not wait
        other.execute("ROLLBACK")
        other.close()
        assert len(impatient.record_many(project, [judgement()])) == 1


def test_damage_that_no_advice_mends_is_not_hidden(store: LabelStore, project: Project, path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE labels RENAME TO gone")
    connection.close()
    with pytest.raises(Exception, match="no such table: labels"):
        store.labels(project)


# Crashes and contention

WRITER = """
import sys
from labeling_ui.store import LabelStore

path, annotator, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with LabelStore(path) as store:
    project = store.create_project("p")
    store.add_items(project, [{"id": "c", "prompt": [{"role": "user", "content": "?"}], "split": "train",
                               "answers": [{"text": "a"}, {"text": "b"}]}])
    for n in range(count):
        label = store.record(project, 1, annotator, left=0, right=1, value=1 + n % 7, key=f"{annotator}-{n}")
        print(label.key, label.value, flush=True)
"""


def start_writer(path: Path, annotator: str, count: int) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", WRITER, str(path), annotator, str(count)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("acknowledged", [1, 50, 150])
def test_no_acknowledged_label_is_lost_to_kill_9(path: Path, acknowledged: int) -> None:
    writer = start_writer(path, "ann", 1_000_000)
    assert writer.stdout is not None
    lines = [writer.stdout.readline() for _ in range(acknowledged)]
    writer.send_signal(signal.SIGKILL)
    lines += writer.stdout.readlines()
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()

    with LabelStore(path) as store:
        labels = store.labels(store.project("p"))
    stored = [f"{label.key} {label.value}\n" for label in labels]
    whole = [line for line in lines if line.endswith("\n")]
    assert stored[: len(whole)] == whole
    # At most the label in flight is there without having been acknowledged.
    assert len(stored) - len(whole) <= 1
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_processes_that_create_and_write_together_lose_nothing(path: Path) -> None:
    count = 100
    writers = [start_writer(path, annotator, count) for annotator in ("ann", "bob", "cat")]
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    with LabelStore(path) as store:
        keys = [label.key for label in store.labels(store.project("p"))]
    assert sorted(keys) == sorted(f"{who}-{n}" for who in ("ann", "bob", "cat") for n in range(count))


def test_opening_a_new_file_together(tmp_path: Path) -> None:
    """SQLite does not wait where two connections turn the write-ahead log on at once; the store must."""
    together = threading.Barrier(4)

    def open_store(path: Path) -> str:
        together.wait()
        with LabelStore(path) as store:
            return store.create_project("p").name

    with ThreadPoolExecutor(4) as pool:
        for n in range(25):
            assert list(pool.map(open_store, [tmp_path / f"{n}.db"] * 4)) == ["p"] * 4


def test_threads_share_one_store(store: LabelStore, project: Project) -> None:
    failures: list[BaseException] = []

    def write(annotator: str) -> None:
        try:
            for n in range(25):
                store.record_many(project, [judgement(annotator=annotator, key=f"{annotator}-{n}")])
                # Each thread also repeats the others' shared label: one idempotency key, eight senders.
                store.record_many(project, [judgement(key=f"shared-{n}")])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(f"thread-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.count_labels(project) == 8 * 25 + 25


def test_the_settings_that_durability_rests_on(store: LabelStore) -> None:
    with store._read() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
