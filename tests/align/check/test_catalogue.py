"""The catalogue of broken data and configs: each is refused, repaired or warned of by the sentence that is expected.

tests/data/broken/expected.yaml is the table. The real functions run in this process; a few commands are real processes.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from align import cli

BROKEN = Path(__file__).resolve().parents[2] / "data" / "broken"
TABLE = yaml.safe_load((BROKEN / "expected.yaml").read_text("utf-8"))
CASES = [(command, *case) for command, cases in TABLE.items() for case in cases]
ROW = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


def ten_gigabytes(path: Path) -> None:
    """A line that is 10 GB long and takes no room on the disk."""
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        file.truncate(10 * 2**30)


def long_record(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'[{"prompt": "')
        file.write(b"a" * (65 * 2**20))


def parts_unlike(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), path / "part-0.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "chosen": 3}]), path / "part-1.parquet")


def cut(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW] * 9), path)
    path.write_bytes(path.read_bytes()[:-40])


def with_bytes(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**ROW, "chosen": b"So."}]), path)


def two_splits(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path.mkdir()
    for split in ("train", "test"):
        name = f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW]), path / name)


MADE: dict[str, Callable[[Path], None]] = {
    "a-line-of-10-GB.jsonl": ten_gigabytes,
    "a-list-of-one-long-record.json": long_record,
    "nothing-here.jsonl": lambda path: None,
    "parts-unlike": parts_unlike,
    "cut.parquet": cut,
    "bytes.parquet": with_bytes,
    "two-splits": two_splits,
}


@pytest.fixture
def arguments(tmp_path: Path, tiny_model: Path) -> Callable[[str, str], list[str]]:
    """The command of a case, with its places filled in."""
    base = tmp_path / "base.yaml"
    settings = {"name": "broken", "runs": str(tmp_path / "runs"), "model": {"base": str(tiny_model)}}
    base.write_text(json.dumps(settings))  # JSON is YAML

    def fill(command: str, name: str) -> list[str]:
        file = BROKEN / name
        if name.startswith("made/"):
            file = tmp_path / file.name
            MADE[file.name](file)
        places = {"file": file, "out": tmp_path / "out", "folder": BROKEN, "model": tiny_model, "base": base}
        return shlex.split(command.format(**places))

    return fill


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str]]:
    """(exit code, what was said) of a command in this process."""

    def call(arguments: list[str]) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["align", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, "".join(capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("command", "name", "code", "says"), CASES, ids=[f"{case[0].split()[0]}-{case[1]}" for case in CASES]
)
def test_what_is_broken_is_said(
    command: str,
    name: str,
    code: int,
    says: str | list[str],
    arguments: Callable[[str, str], list[str]],
    run: Callable[[list[str]], tuple[int, str]],
) -> None:
    ended, said = run(arguments(command, name))
    for part in [says] if isinstance(says, str) else says:
        assert part in said, said
    assert ended == code, said
    if code:
        last = said.rstrip().splitlines()[-1]
        assert last.endswith((".", "?")), last


def test_every_file_of_the_catalogue_is_in_its_table() -> None:
    named = {name for _, name, *_ in CASES} | {Path(part).name for case in CASES for part in shlex.split(case[0])}
    files = [path for path in BROKEN.rglob("*") if path.is_file() and path.name not in ("expected.yaml", "readme.txt")]
    unused = [path for path in files if str(path.relative_to(BROKEN)) not in named and path.name not in named]
    assert len(files) >= 60 and not unused and len(REAL) == 2


# Each costs seconds: one of each command.
REAL = [
    case
    for case in CASES
    if case[:2]
    in {
        ("data convert {file} {out} --to preference", "files/key-twice.jsonl"),
        ("check {base} stages=[sft] data.demonstrations={file}", "checked/control-token-in-an-answer.jsonl"),
    }
]


@pytest.mark.parametrize(("command", "name", "code", "says"), REAL, ids=[f"{c[0].split()[0]}-{c[1]}" for c in REAL])
def test_the_command_line_says_the_same(
    command: str, name: str, code: int, says: str, arguments: Callable[[str, str], list[str]]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "align", *arguments(command, name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("align: ")
