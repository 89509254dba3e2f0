"""Databases for the label store's tests: SQLite files, and one real PostgreSQL server where it is installed. The app in
a real Chromium, for the tests of its pages."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from labeling_ui.accounts import Accounts
from labeling_ui.address import Address
from labeling_ui.store import LabelStore, Project, Settings
from reward.records import user_prompt
from tests.conftest import free_port


def comparison(number: int = 0, answers: int = 2, **extra: Any) -> dict[str, Any]:
    return {
        "id": f"c{number}",
        "prompt": user_prompt(f"Question {number}?"),
        "split": "train",
        "answers": [{"text": f"Answer {n} to {number}.", "model": "m", "sampling": {}} for n in range(answers)],
        **extra,
    }


class Postgres:
    """A PostgreSQL server of the test session's own, on a socket in a temporary folder: no port is opened."""

    def __init__(self, programs: Path) -> None:
        self.programs, self.folder, self.made = programs, Path(tempfile.mkdtemp(prefix="align-pg-")), False
        # The server refuses to run as root.
        self.user = "postgres" if os.geteuid() == 0 else getpass.getuser()
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres")
        self._run("initdb", "--pgdata", str(self.folder / "data"), "--auth", "trust", "--no-sync")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr}")

    def _control(self, *arguments: str) -> None:
        log = str(self.folder / "log")
        self._run("pg_ctl", "--pgdata", str(self.folder / "data"), "--log", log, "--wait", *arguments)

    def start(self) -> None:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "max_connections": "100",
            # The machine does not lose power during a test, and waiting for the disk takes most of the time.
            "fsync": "off",
            "full_page_writes": "off",
        }
        self._control("start", "--options", " ".join(f"-c {name}={value}" for name, value in settings.items()))

    def stop(self, mode: str = "fast") -> None:
        self._control("stop", "--mode", mode)

    def database(self) -> str:
        """The URL of an empty database; what a test before has left there is gone."""
        if not self.made:
            self._execute("postgres", "CREATE DATABASE labels")
            self.made = True
        self._execute("labels", "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        return self.url("labels")

    def _execute(self, database: str, *statements: str) -> None:
        engine = sa.create_engine(self.url(database, "postgresql+psycopg"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
        engine.dispose()

    def url(self, name: str, scheme: str = "postgresql") -> str:
        return f"{scheme}://{self.user}@/{name}?host={self.folder}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        warnings.warn("PostgreSQL IS NOT INSTALLED: the label store is tested on SQLite alone", stacklevel=1)
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    pytest.importorskip("psycopg")
    server = Postgres(found[-1])
    yield server
    server.stop("immediate")
    shutil.rmtree(server.folder, ignore_errors=True)


# For tests whose statements, types or locks the two databases could take differently: every method of the store and of
# the accounts has one. What is decided before the database is asked is tested on SQLite alone.
on_both = pytest.mark.parametrize("where", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address of a new database."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return str(tmp_path / "labels.db")
    return str(request.getfixturevalue("postgres").database())


class Clock:
    """A clock that tests turn by hand."""

    def __init__(self) -> None:
        self.seconds = time.time()

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(where: str, clock: Clock) -> Iterator[LabelStore]:
    with LabelStore(where, clock=clock) as store:
        yield store


@pytest.fixture
def project(store: LabelStore) -> Project:
    project = store.create_project(
        "helpful", instructions="Choose the more helpful answer.", settings=Settings(gold_share=0.0)
    )
    store.add_items(project, [comparison(0), comparison(1, answers=3)])
    return project


# The pages

PASSWORD = "correct horse battery"
# What the page's policy stopped from running or loading is not to have been tried.
WATCH = """
window.__tried = [];
addEventListener("securitypolicyviolation", (event) => {
  if (event.effectiveDirective === "script-src-attr" || /evil|javascript|^data/.test(event.blockedURI))
    window.__tried.push(`${event.effectiveDirective} ${event.blockedURI}`);
}, true);
"""


class Server:
    """The app over one database; it can be stopped and started again at the same address."""

    def __init__(self, path: Path) -> None:
        self.store, self.port = LabelStore(path), free_port()
        # These tests are about pages: what the disk keeps is tested elsewhere, and waiting for it costs half a minute.
        engine = self.store.database.engine
        engine.dispose()
        sa.event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous = OFF"))
        self.start()

    def start(self) -> None:
        from labeling_ui.server import serving

        self.block = serving(self.store, Address(port=self.port))
        self.origin = self.block.__enter__().origins[0]

    def stop(self) -> None:
        self.block.__exit__(None, None, None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("browser") / "labels.db")
    yield server
    server.stop()
    server.store.close()


@pytest.fixture
def open_page(server: Server, chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens the labelling page of a project for someone who joins by it, in a browser of their own."""
    contexts = []

    def open_page(project: Any, name: str = "ann", **options: Any) -> Any:
        context = chromium.new_context(**options)
        contexts.append(context)
        context.add_init_script(WATCH)
        page = context.new_page()
        page.outside, page.errors, page.dialogs, page.opened = [], [], [], []
        own = (server.origin, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(own) else page.outside.append(r.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("popup", lambda other: page.opened.append(other.url))
        role = "admin" if name.startswith("admin") else "annotator"
        accounts = Accounts(server.store)
        if any(each["name"] == name for each in accounts.annotators()):
            page.goto(f"{server.origin}/login")
        else:
            page.goto(f"{server.origin}/join?token={accounts.invite(role)}")
        page.fill("#name", name)
        page.fill("#password", PASSWORD)
        page.click("button[type=submit]")
        page.goto(f"{server.origin}/label/?project={project.name}")
        painted(page)
        return page

    yield open_page
    for context in contexts:
        context.close()


def painted(page: Any, before: str | None = None) -> str:
    """Wait until an item other than `before` stands on the screen; its lease."""
    page.wait_for_function(
        "before => { const a = document.getElementById('align'); "
        "return a && a.dataset.painted && a.dataset.painted !== before && a.dataset.painted === a.dataset.lease; }",
        arg=before,
        timeout=20000,
    )
    return str(page.evaluate("document.getElementById('align').dataset.painted"))


def press(page: Any, key: str) -> str:
    """Press a key and wait for the next item; its lease."""
    before = page.evaluate("document.getElementById('align').dataset.painted")
    page.keyboard.press(key)
    return painted(page, before)
