"""Databases for the label store's tests: SQLite files, and one real PostgreSQL server where it is installed."""

from __future__ import annotations

import getpass
import itertools
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from labeling_ui.store import LabelStore, Project, Settings
from reward.records import user_prompt

_NUMBER = itertools.count()


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
        self.programs, self.folder = programs, Path(tempfile.mkdtemp(prefix="align-pg-"))
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
        settings = f"-c listen_addresses= -c unix_socket_directories={self.folder} -c max_connections=100"
        self._control("start", "--options", settings)

    def stop(self, mode: str = "fast") -> None:
        self._control("stop", "--mode", mode)

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"labels_{next(_NUMBER)}"
        engine = sa.create_engine(self.url("postgres", "postgresql+psycopg"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        engine.dispose()
        return self.url(name)

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


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address of a new database, of both kinds in turn."""
    if request.param == "sqlite":
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
