"""Stage 0, prepare: what the pipeline's files of records become before any other stage reads them.

    demonstrations.jsonl, prompts.jsonl, preferences.jsonl   the rows that are left, each with its `split`
    dropped.jsonl        every row left out: {file, where, step, reason, detail, record}
    changed.jsonl        every row changed, as it was: {file, where, steps, before}
    data_report.html, data_report.json

Two passes: the rows stream through the steps and into a scratch file, with marks of each (`working`); what only all of
them together can decide is decided on the marks (`deciding`); then the scratch file streams into the result. Memory
grows by the marks alone, a hundred bytes a row; signatures lie on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from align import models, progress
from align.config import Config
from align.config_data import DATA_KEYS, DataSource, PrepareSection
from align.data.names import Kind
from align.data.prepare.augment import augmented
from align.data.prepare.deciding import Array, Table, decide
from align.data.prepare.rows import row_steps
from align.data.prepare.steps import EXAMPLES, StepCount, text_of
from align.data.prepare.working import SPLITS, Lost, Marks, Row, Signatures, Task, Worked, masked, worked
from align.data.reading import records_of
from align.data.turns import CannotHold
from align.runs import Run
from reward.records import InputError, Record

KINDS: dict[str, Kind] = {"demonstrations": "demonstration", "prompts": "prompt", "preferences": "preference"}
SHOWN = 300  # characters of a text in the report


def run_prepare(config: Config, run: Run) -> dict[str, Any]:
    """Prepare and report; returns the rows in and out of every file."""
    from align.data import report

    section = config.prepare or PrepareSection()
    keys = [key for key in DATA_KEYS if config.sources(key)]
    row_steps(section, "prompt")  # an unknown language is said before anything is read
    if not keys:
        raise InputError("prepare has nothing to prepare: set data.demonstrations, data.prompts or data.preferences.")
    with ExitStack() as stack:
        dropped, changed = (
            stack.enter_context((run.folder / name).open("w", encoding="utf-8"))
            for name in ("dropped.jsonl", "changed.jsonl")
        )
        tables = [read_in(config, section, key, run.work, dropped, changed) for key in keys]
        decide(tables, section, config.seed)
        files = {table.key: run.folder / f"{table.key}.jsonl" for table in tables}
        for table in tables:
            write_out(table, section, config.seed, run.work, files[table.key], dropped)
    counts = [count for table in tables for count in table.counts]
    told = report.describe(config, counts, files, _tokenizer(config))
    report.write(run.folder, told)
    for line in report.sentences(told):
        progress.say(f"  {line}")
    return {
        table.key: {"rows in": table.counts[0].rows_in, "rows out": _count_lines(files[table.key])} for table in tables
    }


def read_in(config: Config, section: PrepareSection, key: str, work: Path, dropped: IO[str], changed: IO[str]) -> Table:
    """Every source of a file through the steps of single rows, into `work`; with the marks of the rows that are left.

    Raises:
        InputError: a source cannot be read, or no row is left.
    """
    kind, sources = KINDS[key], config.sources(key)
    signed = section.near_duplicates is not None or section.split == "cluster"
    reading, counts = StepCount(key, kind, "read"), list[StepCount]()
    places, marks, source = list[str](), list[Marks](), list[Array]()
    with (work / f"{key}.jsonl").open("w", encoding="utf-8") as out, _Kept(work, key) as kept:
        for number, one in enumerate(sources):
            task = Task(key, kind, section, config.data.test_share, config.seed, signed)
            rows = _rows(config, section, one, key, len(sources) > 1, reading, dropped)
            for told in worked(task, rows, section.processes):
                _note(told, dropped, changed)
                out.writelines(line + "\n" for line in told.lines)
                places += told.places
                _add(counts, told.counts)
                if told.marks and told.lines:
                    kept.add(told.marks.signatures)
                    marks.append(told.marks)
                    source.append(np.full(len(told.lines), number, np.int16))
    if not places:
        left = ", ".join(f"{n} {reason}" for count in [reading, *counts] for reason, n in count.left_out.items())
        raise InputError(f"{key}: no row is left of {reading.rows_in} ({left}): loosen the steps of `prepare`.")
    whole = Marks(
        **{name: np.concatenate([getattr(each, name) for each in marks]) for name in _ARRAYS},
        groups=[group for each in marks for group in each.groups],
        signatures=kept.tables(),
    )
    table = Table(key, kind, sources, np.concatenate(source), places, whole)
    table.counts = [reading, *counts]
    return table


_ARRAYS = ("keys", "voters", "prompt_ids", "asked", "hashed", "draws")


def _rows(
    config: Config,
    section: PrepareSection,
    source: DataSource,
    key: str,
    several: bool,
    count: StepCount,
    dropped: IO[str],
) -> Iterator[Row]:
    """The records of a source, counted; rows that hold none are listed."""
    name, found = records_of(source.path, KINDS[key], config.data.max_rows)
    progress.say(f"  {key}: {source.path}, read as {name}")
    for where, row, _, made in found:
        count.rows_in += 1
        if count.rows_in % 100_000 == 0:
            progress.say(f"  {key}: {count.rows_in:,} rows read")
        if isinstance(made, CannotHold):
            count.left_out[str(made)] += 1
            _list(dropped, Lost(key, where, "read", str(made), "", masked(row, section)))
            continue
        count.rows_out += 1
        if several:
            made = {**made, "source": source.title}
        yield where, made


def _note(told: Worked, dropped: IO[str], changed: IO[str]) -> None:
    for lost in told.lost:
        _list(dropped, lost)
    for each in told.changed:
        changed.write(json.dumps(asdict(each), ensure_ascii=False) + "\n")


def _list(dropped: IO[str], lost: Lost) -> None:
    dropped.write(json.dumps(asdict(lost), ensure_ascii=False) + "\n")


def _add(counts: list[StepCount], more: list[StepCount]) -> None:
    """Sum up what the same steps did to further rows."""
    if not counts:
        counts += more
        return
    for count, new in zip(counts, more, strict=True):
        count.rows_in += new.rows_in
        count.rows_out += new.rows_out
        count.left_out += new.left_out
        count.changed += new.changed
        count.examples += new.examples[: max(0, EXAMPLES - len(count.examples))]


@dataclass(frozen=True)
class _OnDisk:
    """Signatures in a file. Not a memory map: what is read of one counts as memory of this process."""

    path: Path
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        begin, end, _ = rows.indices(len(self))
        width = self.shape[1]
        offset = begin * width * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, (end - begin) * width, offset=offset).reshape(-1, width)


class _Kept:
    """Signatures on disk, a file a column."""

    def __init__(self, work: Path, key: str) -> None:
        self.work, self.key = work, key
        self.files: dict[str, IO[bytes]] = {}
        self.shape: dict[str, tuple[int, np.dtype[Any]]] = {}

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()

    def _path(self, column: str) -> Path:
        return self.work / f"{self.key}.{column}.signatures"

    def add(self, signatures: Mapping[str, Signatures]) -> None:
        for column, table in signatures.items():
            rows = table[:]
            if column not in self.files:
                self.files[column] = self._path(column).open("wb")
                self.shape[column] = (rows.shape[1], rows.dtype)
            rows.tofile(self.files[column])

    def tables(self) -> dict[str, _OnDisk]:
        """Of all that was added; the files must have been closed."""
        found = {}
        for column, (width, dtype) in self.shape.items():
            path = self._path(column)
            found[column] = _OnDisk(path, (path.stat().st_size // (width * dtype.itemsize), width), dtype)
        return found


def write_out(table: Table, section: PrepareSection, seed: int, work: Path, out: Path, dropped: IO[str]) -> None:
    """The rows that are left, with their sides, and what is made from them; the others are listed in `dropped`."""
    texts: dict[int, str] = {row: "" for pairs in table.shown.values() for pair in pairs for row in pair}
    with out.open("w", encoding="utf-8") as file:
        for row, record in enumerate(_records(work / f"{table.key}.jsonl")):
            if row in texts:
                texts[row] = text_of(record)[:SHOWN]
            if why := table.left.get(row):
                step, reason, like = why
                detail = "" if like is None else table.places[like]
                _list(dropped, Lost(table.key, table.places[row], step, reason, detail, record))
                continue
            file.write(json.dumps({**record, "split": SPLITS[table.sides[row]]}, ensure_ascii=False) + "\n")
    for count in table.counts:
        pairs = table.shown.get(count.step, [])
        count.examples += [{"kept": texts[one], "left out": texts[other]} for one, other in pairs]
    if section.augment:
        made = [*augmented(_records(out), table.kind, section.augment, seed)]
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in made)
        rows = len(table.kept())
        table.counts.append(StepCount(table.key, table.kind, "augment", rows, rows + len(made)))


def _records(path: Path) -> Iterator[Record]:
    with path.open("r", encoding="utf-8", newline="\n") as lines:
        yield from (json.loads(line) for line in lines)


def _count_lines(path: Path) -> int:
    return sum(1 for _ in _records(path))


def _tokenizer(config: Config) -> Any:
    """None where the model cannot be had: a report without token counts is better than none."""
    try:
        return models.load_tokenizer(models.base_path(config.model), config.model)
    except InputError as error:
        progress.say(f"  without token counts: {error}")
        return None
