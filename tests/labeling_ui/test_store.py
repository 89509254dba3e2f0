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
import sqlalchemy as sa

from labeling_ui.schema import metadata
from labeling_ui.store import Judgement, LabelStore, Project, Settings
from reward.aggregate import Vote, preferences
from reward.records import InputError, user_prompt
from tests.labeling_ui.conftest import Postgres, comparison, on_both


def judgement(**changed: Any) -> Judgement:
    said = {"item_id": 1, "annotator": "ann", "order": [1, 0], "value": 2, "key": "k"}
    return {**said, **changed}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.db"


def sqlite_file(store: LabelStore) -> Path:
    if store.database.dialect != "sqlite":
        pytest.skip("this is about SQLite's files")
    return Path(store.database.name)


# Projects and items


@on_both
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


@on_both
def test_a_prompt_is_on_one_side_only(store: LabelStore, project: Project) -> None:
    twin = comparison(0) | {"id": "twin", "split": "test"}
    with pytest.raises(
        InputError, match="twin is on the test side, but its prompt is on the train side in comparison c0"
    ):
        store.add_items(project, [twin])
    with pytest.raises(InputError, match="its prompt is on the train side"):
        store.add_items(project, [comparison(8), comparison(8) | {"id": "twin", "split": "test"}])
    assert len(store.items(project)) == 4


@on_both
def test_a_model_may_write_the_character_0(store: LabelStore, project: Project) -> None:
    store.add_items(project, [comparison(5) | {"answers": [{"text": "a\0b"}, {"text": "b"}]}])
    item = store.items(project)[-1]
    assert item.payload["answers"][0]["text"] == "a\0b"
    assert store.record(project, judgement(item_id=item.id)).item_id == item.id


def test_equal_texts_are_not_put_before_people(store: LabelStore, project: Project) -> None:
    same = comparison(5) | {"answers": [{"text": "a"}, {"text": "a"}, {"text": "b"}]}
    found = store.add_items(project, [same])
    assert (found.added, found.identical) == (2, 1)


def test_columns_cannot_pose_as_ours(store: LabelStore, project: Project) -> None:
    store.add_items(project, [comparison(5, comparison_id="other", pair=[7, 8])])
    assert store.items(project)[-1].payload["comparison_id"] == "c5"
    assert store.items(project)[-1].payload["pair"] == [0, 1]


def test_extra_columns_ride_along(store: LabelStore, project: Project) -> None:
    store.add_items(project, [comparison(2, source="forum")])
    assert store.items(project)[-1].payload["source"] == "forum"


@on_both
def test_import_again_adds_nothing(store: LabelStore, project: Project) -> None:
    found = store.add_items(project, [comparison(0), comparison(1, 3), comparison(2, 4), comparison(2, 4)])
    assert (found.added, found.there) == (6, 10)
    found = store.add_items(project, iter([comparison(0), comparison(1, 3), comparison(2, 4)]))
    assert (found.added, found.there) == (0, 10)
    assert len(store.items(project)) == 10


@on_both
def test_changed_comparison_is_refused_and_nothing_is_added(store: LabelStore, project: Project) -> None:
    with pytest.raises(InputError, match=r"Comparison c1 .* different content"):
        store.add_items(project, [comparison(7), comparison(1, answers=4)])
    assert len(store.items(project)) == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answers": [{"text": "alone"}]}, "c0 has 1 answers: at least 2"),
        ({"answers": [{"text": "many"}] * 10}, "c0 has 10 answers"),
        ({"answers": [{"text": "x" * 200_001}, {"text": "b"}]}, "a text of 200001 characters"),
        ({"gold": [0, 0]}, r"the gold \[0, 0\]"),
        ({"gold": [0, 2]}, r"the gold \[0, 2\]"),
        ({"answers": ["bare", "text"]}, 'c0: "answers" must be'),
        ({"prompt": [{"role": "user", "content": 3}]}, 'c0: "prompt" must be'),
        ({"answers": [{"text": "\ud800"}, {"text": "b"}]}, "half of a surrogate pair"),
        ({"note": float("nan")}, "a column that is not JSON"),
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


@on_both
def test_project_is_made_once(store: LabelStore, project: Project) -> None:
    assert store.create_project("helpful") == project
    assert store.project("helpful") == project
    with pytest.raises(InputError, match=r"has no project harmless; it has: helpful\."):
        store.project("harmless")


def test_simulated_and_human_labels_never_mix(store: LabelStore, project: Project) -> None:
    with pytest.raises(InputError, match="holds people's labels, and simulated labels must never mix"):
        store.create_project(project.name, instructions=project.instructions, simulated=True)
    store.create_project("robots", simulated=True)
    with pytest.raises(InputError, match="holds simulated labels, and people's labels must never mix"):
        store.create_project("robots")


@on_both
def test_guidelines_have_versions_that_labels_name(store: LabelStore, project: Project) -> None:
    first = store.record(project, judgement())
    changed = store.create_project(project.name, instructions="Choose the longer answer.")
    second = store.record(changed, judgement(key="later"))
    assert (project.guidelines, changed.guidelines) == (1, 2)
    assert (first.body["guidelines"], second.body["guidelines"]) == (1, 2)
    assert store.create_project(project.name).instructions == "Choose the longer answer."


@on_both
def test_settings_change_but_not_the_mode(store: LabelStore, project: Project) -> None:
    wider = store.create_project(project.name, settings=Settings(overlap=3))
    assert wider.settings.overlap == 3 and store.project(project.name) == wider
    with pytest.raises(InputError, match="is judged by pairwise, not by ranking"):
        store.create_project(project.name, settings=Settings(mode="ranking"))
    store.close_project(project)
    assert store.closed(project) and store.create_project(project.name, settings=Settings()).settings.closed


@pytest.mark.parametrize("wrong", [{"overlap": 0}, {"gold_share": 0.6}, {"lease_seconds": 1}, {"criteria": ("a", "a")}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"A project's {next(iter(wrong))}"):
        Settings(**wrong)


@on_both
def test_a_ranking_project_judges_all_answers_at_once(store: LabelStore) -> None:
    project = store.create_project("ranked", settings=Settings(mode="ranking"))
    store.add_items(project, [comparison(1, answers=4)])
    (item,) = store.items(project)
    assert (item.key, item.answers) == ("c1:0-1-2-3", (0, 1, 2, 3))
    ranking = [[2], [0, 3]]
    said: Judgement = {
        "item_id": item.id,
        "annotator": "ann",
        "key": "k",
        "order": [3, 2, 1, 0],
        "value": None,
        "ranking": ranking,
    }
    store.record(project, said)
    votes = {tuple(payload["pair"]): [vote.value for vote in given] for payload, given in store.votes(project)}
    # Answer 2 is a rank above 0 and 3, which are equal; of answer 1 nothing is said.
    assert votes == {(0, 1): [], (0, 2): [5], (0, 3): [4], (1, 2): [], (1, 3): [], (2, 3): [3]}


# Labels


@on_both
def test_label_survives_reopening(where: str) -> None:
    with LabelStore(where) as store:
        project = store.create_project("p")
        store.add_items(project, [comparison()])
        label = store.record(project, judgement(seconds=3.5, comment="clear"))
    with LabelStore(where) as store:
        assert store.labels(store.project("p")) == [label]
    body = label.body
    assert (label.item_id, body["order"], body["value"], body["seconds"], body["comment"]) == (
        1,
        [1, 0],
        2,
        3.5,
        "clear",
    )
    assert label.created.endswith("+00:00")


def test_label_turned_to_the_order_of_the_item(store: LabelStore, project: Project) -> None:
    as_shown = store.record(project, judgement(order=[0, 1]))
    swapped = store.record(project, judgement(annotator="bob", key="b"))
    assert as_shown.votes() == [((0, 1), Vote("ann", 2))]
    assert swapped.votes() == [((0, 1), Vote("bob", 6))]


@on_both
def test_same_key_returns_the_first_label(store: LabelStore, project: Project) -> None:
    first = store.record_many(project, [judgement(), judgement()])
    assert first[0] == first[1] == store.record_many(project, [judgement()])[0]
    assert store.count_labels(project) == 1


@pytest.mark.parametrize("changed", [{"value": 3}, {"annotator": "bob"}, {"order": [0, 1]}, {"comment": "?"}])
def test_same_key_with_other_content_is_refused(store: LabelStore, project: Project, changed: dict[str, Any]) -> None:
    store.record_many(project, [judgement()])
    with pytest.raises(InputError, match=f"key k belongs to a label with a different {', '.join(changed)}"):
        store.record_many(project, [judgement(key="new"), judgement(**changed)])
    assert store.count_labels(project) == 1


@on_both
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
        ({"order": [0, 0]}, r"shows answers \[0, 0\]: the item's answers are \[0, 1\]"),
        ({"order": [2, 0]}, r"shows answers \[2, 0\]"),
        ({"order": "01"}, "shows answers '01'"),
        ({"order": ["0", "1"]}, "shows answers"),
        ({"key": "a\0b"}, "the key"),
        ({"annotator": "\ud800"}, "the annotator"),
        ({"ranking": [[0], [1]]}, "the value 2"),
        ({"ratings": {"style": {"0": 3}}}, "the ratings"),
        ({"comment": "a\0b"}, "the character 0"),
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


@on_both
def test_nothing_to_record(store: LabelStore, project: Project) -> None:
    assert store.record_many(project, []) == []


@on_both
def test_newest_label_of_an_annotator_is_the_vote(store: LabelStore, project: Project) -> None:
    store.record_many(
        project, [judgement(value=1), judgement(annotator="bob", key="b"), judgement(value=4, key="corrected")]
    )
    (payload, votes), *others = store.votes(project)
    assert payload["comparison_id"] == "c0"
    assert sorted(votes, key=lambda vote: vote.annotator) == [Vote("ann", 4), Vote("bob", 6)]
    assert len(store.events(project)) == 3
    assert all(votes == [] for _, votes in others)
    result = preferences(store.votes(project), simulated=project.simulated)
    assert [record["chosen"][0]["content"] for record in result.records] == ["Answer 1 to 0."]
    assert result.unlabelled == 3


@on_both
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


@on_both
def test_a_verdict_overrides_the_labels(store: LabelStore, project: Project) -> None:
    store.record_many(project, [judgement(value=1), judgement(annotator="bob", key="b", value=7)])
    event = store.adjudicate(project, "c0:0-1", "rev", {"value": 6}, "v")
    assert store.adjudicate(project, "c0:0-1", "rev", {"value": 6}, "v") == event
    assert store.votes(project)[0][1] == [Vote("rev (verdict)", 6)]
    assert store.count_labels(project) == 2 and len(store.labels(project)) == 2
    store.replay(project)
    assert store.votes(project)[0][1] == [Vote("rev (verdict)", 6)]
    with pytest.raises(InputError, match="has no item 'c9:0-1'"):
        store.adjudicate(project, "c9:0-1", "rev", {"value": 6}, "w")
    with pytest.raises(InputError, match="the value 8"):
        store.adjudicate(project, "c0:0-1", "rev", {"value": 8}, "w")


@on_both
def test_a_replay_rebuilds_the_projection(store: LabelStore, project: Project) -> None:
    store.record_many(
        project, [judgement(value=1), judgement(annotator="bob", key="b"), judgement(value=4, key="corrected")]
    )
    before, digest = store.labels(project), store.digest(project)
    with store.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM labels")
        connection.exec_driver_sql("UPDATE items SET taken = 9, labelled = 3")
    assert store.labels(project) == []
    store.replay(project)
    assert store.labels(project) == before and store.digest(project) == digest
    assert store.project(project.name) == project


@on_both
def test_the_migrations_make_todays_schema(store: LabelStore) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    with store.database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


# Append-only


CHANGES = [
    "UPDATE events SET kind = 'skip'",
    "DELETE FROM events",
    "DELETE FROM events WHERE id = 1",
    "UPDATE comparisons SET payload = '{}'",
    "DELETE FROM comparisons",
]
COLUMNS = "project_id, item_id, annotator, kind, key, body, created"
SQLITE_CHANGES = [
    f"INSERT OR REPLACE INTO events (id, {COLUMNS}) SELECT id, {COLUMNS} FROM events",
    f"INSERT OR REPLACE INTO events (id, {COLUMNS}) SELECT 99, {COLUMNS} FROM events",
    f"INSERT INTO events (id, {COLUMNS}) SELECT id, {COLUMNS} FROM events WHERE true "
    "ON CONFLICT DO UPDATE SET kind = 'skip'",
    "REPLACE INTO comparisons SELECT id, project_id, comparison_id, '{}', digest, prompt, split FROM comparisons",
]


@pytest.mark.parametrize("statement", [*CHANGES, *SQLITE_CHANGES, "TRUNCATE events CASCADE"])
@on_both
def test_the_database_refuses_to_change_what_people_did(store: LabelStore, project: Project, statement: str) -> None:
    dialect = store.database.dialect
    if (statement in SQLITE_CHANGES and dialect != "sqlite") or (statement[0] == "T" and dialect == "sqlite"):
        pytest.skip("of the other database")
    events = store.record_many(project, [judgement()])
    before = store.digest(project)
    if dialect == "sqlite":
        # A plain connection with SQLite's own defaults: the rule is in the file, not in our settings.
        connection = sqlite3.connect(sqlite_file(store))
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
        connection.close()
    else:
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), store.database.engine.begin() as connection:
            connection.exec_driver_sql(statement)
    assert store.events(project) == events
    assert store.digest(project) == before


# Files that cannot be used


def refused(path: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message):
        LabelStore(path, **options)


def test_not_a_database(path: Path) -> None:
    path.write_text("name,value\n" * 100)
    refused(path, "is not a label database")
    assert path.read_text() == "name,value\n" * 100


@pytest.mark.parametrize("statement", ["CREATE TABLE recipes (name TEXT)", "PRAGMA application_id = 1"])
def test_database_of_another_program_is_left_alone(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()
    before = path.read_bytes()
    refused(path, "is a database of another program")
    assert path.read_bytes() == before


@on_both
def test_newer_schema_is_refused_with_both_numbers(where: str) -> None:
    with LabelStore(where) as store, store.database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    refused(
        Path(where) if "://" not in where else where, "schema version 9999, and this program knows versions up to 0"
    )


def test_addresses_that_are_none(tmp_path: Path) -> None:
    refused("mysql://host/name", "mysql databases are not supported")
    refused("postgresql://", r"cannot be reached|is no address|no such database|refuses")
    refused("://", "is no address of a database")


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


def test_locked_database(store: LabelStore, project: Project) -> None:
    path = sqlite_file(store)
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


def test_full_disk(store: LabelStore, project: Project) -> None:
    sqlite_file(store)
    engine = store.database.engine
    with store.database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    engine.dispose()
    sa.event.listen(engine, "connect", lambda raw, _: raw.execute(f"PRAGMA max_page_count = {pages + 2}"))
    kept = []
    with pytest.raises(InputError, match="the disk is full: free some space and send the label again"):
        for n in range(1000):
            kept.append(store.record(project, judgement(key=f"k{n}", comment="x" * 5000)))
    assert kept and store.events(project) == kept


def test_locked_postgresql(postgres: Postgres) -> None:
    where = postgres.database()
    with LabelStore(where) as store, LabelStore(where, busy_seconds=0.05) as impatient:
        project = store.create_project("p")
        with (
            store.database.write(),
            pytest.raises(InputError, match=r"has been locked by another process for 0\.05 seconds"),
        ):
            impatient.add_items(project, [comparison()])


def test_postgresql_restarted_in_the_middle(postgres: Postgres) -> None:
    with LabelStore(postgres.database(), busy_seconds=2) as store:
        project = store.create_project("p")
        store.add_items(project, [comparison()])
        label = store.record(project, judgement())
        postgres.stop()
        with pytest.raises(InputError, match=r"cannot be reached|is shutting down"):
            store.record(project, judgement(key="while it is down"))
        postgres.start()
        assert store.labels(project) == [label]
        store.record(project, judgement(annotator="bob", key="afterwards"))
        assert store.count_labels(project) == 2


def test_damage_that_no_advice_mends_is_not_hidden(store: LabelStore, project: Project) -> None:
    with sqlite3.connect(sqlite_file(store)) as connection:
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
        value = 1 + n % 7
        said = {"item_id": 1, "annotator": annotator, "order": [0, 1], "value": value, "key": f"{annotator}-{n}"}
        print(store.record(project, said).key, value, flush=True)
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
        labels = store.events(store.project("p"))
    stored = [f"{label.key} {label.body['value']}\n" for label in labels]
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
        keys = [label.key for label in store.events(store.project("p"))]
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


@on_both
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
    assert len(store.events(project)) == 8 * 25 + 25
    assert store.count_labels(project) == 9


def test_the_settings_that_durability_rests_on(store: LabelStore) -> None:
    sqlite_file(store)
    with store.database.read() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
