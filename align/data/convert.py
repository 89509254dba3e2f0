"""`align data convert`: a file in any known format into records of one kind, in one layout, with nothing lost unsaid.

Rows stream through: a row is read, understood, turned into records and written before the next one is looked at. The
output appears whole or not at all; what found no place in it is listed beside it with the reasons.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from align.data.files import Placed, Source, open_source
from align.data.formats import FORMATS, Format, check_same, columns_of, recognise
from align.data.kinds import COLUMNS, kind_of
from align.data.layouts import Writer, check_held, laid_out, open_writer
from align.data.names import Kind, LayoutName
from align.data.reading import LOOKED_AT, Understood, understood
from align.data.turns import CannotHold
from labeling_ui.comparisons import answer_columns
from reward.records import InputError, Record

EXAMPLE = 200  # characters of a turn that the example shows

Say = Callable[[str], None]


@dataclass
class Counts:
    """What went in and came out, and why not all of it did."""

    rows: int = 0
    records: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)  # left out of the records
    others: int = 0  # rows with other columns than the first
    other: str = ""  # the first of them

    def left_out(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())


def convert(
    source: str | Path, out: Path, kind: Kind, layout: LayoutName = "jsonl", force: bool = False, say: Say = print
) -> Counts:
    """Convert and tell: what was detected, an example as it was understood, what went in and out.

    Args:
        source: a file, a folder of Parquet parts, or a hub id.
        out: the file to write; OUT.dropped.jsonl beside it lists what was left out.
        force: replace `out` where it is there.
        say: takes one line for people at a time.

    Raises:
        InputError: the source cannot be read or understood, or nothing of it has a place in `out`, which is then not
            written.
    """
    check_held(layout, kind)
    found = open_source(source)
    if out.exists() and any(out.samefile(part) for part in found.parts):
        raise InputError(f"{out} is what is converted: give the result another name.")
    if out.is_dir() or (out.exists() and not force):
        what = "is a folder" if out.is_dir() else "is there already"
        raise InputError(f"{out} {what}: give another name{'' if out.is_dir() else ', or --force to replace it'}.")
    counts = Counts()
    rows = found.rows()
    first = list(itertools.islice(rows, LOOKED_AT))
    chosen = recognise(first)
    say(f"{found.name}: {found.container}, read as {chosen.name}")
    dropped = out.with_name(f"{out.name.removesuffix('.gz').rpartition('.')[0] or out.name}.dropped.jsonl")
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            finished, spare = (stack.enter_context(_Whole(path)) for path in (out, dropped))
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise InputError(f"cannot write to {out.parent}: {error.strerror}: give OUT another folder.") from None
        packed = out.name.endswith(".gz")
        write = stack.enter_context(open_writer(finished.temporary, layout, kind, packed))
        drop = stack.enter_context(spare.temporary.open("w", encoding="utf-8"))
        task = _Task(chosen, kind, layout, write, drop, say, counts)
        task.run(first[0], itertools.chain(first, rows))
        if not counts.records:
            raise InputError(f"{found.name}: no row is left of {counts.rows} ({counts.left_out()}).")
        spare.wanted = bool(counts.reasons)
    for line in _told(found, out, dropped, kind, layout, counts):
        say(line)
    return counts


class _Whole:
    """A file that takes its place when the block ends without an error, and leaves nothing behind otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wanted = True

    def __enter__(self) -> _Whole:
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(descriptor)
        self.temporary = Path(name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.wanted:
            with self.temporary.open("rb") as written:
                os.fsync(written.fileno())
            # mkstemp makes files private; this one is as readable as the user's umask says.
            umask = os.umask(0)
            os.umask(umask)
            self.temporary.chmod(0o666 & ~umask)
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)
            if kind is None:
                self.path.unlink(missing_ok=True)  # the list of an earlier conversion, which this one has replaced


@dataclass
class _Task:
    format: Format
    kind: Kind
    layout: LayoutName
    write: Writer
    dropped: IO[str]
    say: Say
    counts: Counts

    def run(self, first: Placed, rows: Iterator[Placed]) -> None:
        for found in understood(self._checked(first, rows), self.format, self.kind):
            if isinstance(found.made, CannotHold):
                self._drop(found.made, found.where, found.row)
            else:
                self._write(found, found.made)

    def _checked(self, first: Placed, rows: Iterator[Placed]) -> Iterator[Placed]:
        """The rows, counted; whether all are in the first one's format, and where their columns begin to differ."""
        wanted = columns_of(first[1])
        seen: set[frozenset[str]] = set()
        for where, row in rows:
            self.counts.rows += 1
            check_same(self.format, first, (where, row))
            columns = columns_of(row)
            if columns not in seen:
                seen.add(columns)
                self.counts.columns |= self.format.left_out(columns)
            if columns != wanted:
                self.counts.others += 1
                if not self.counts.other:
                    changes = [f"without {name}" for name in sorted(wanted - columns)]
                    changes += [f"with {name}" for name in sorted(columns - wanted)]
                    self.counts.other = f"{where} ({', '.join(changes)})"
            yield where, row

    def _write(self, found: Understood, made: Record) -> None:
        clean = _unmistakable(made, self.kind)
        try:
            laid = laid_out(self.layout, self.kind, clean)
            self.write(laid)
        except CannotHold as reason:
            self._drop(reason, found.where, found.row)
            return
        given = found.record or {}
        riders = given.keys() - set(COLUMNS[kind_of(given)])
        self.counts.columns |= riders - (clean if self.layout == "jsonl" else laid).keys()
        self.counts.records += 1
        if self.counts.records == 1:
            for line in example(clean, self.kind, found.where):
                self.say(line)

    def _drop(self, reason: CannotHold, where: str, row: Record) -> None:
        self.counts.reasons[str(reason)] += 1
        listed = {"reason": str(reason), "where": where, "record": row}
        self.dropped.write(json.dumps(listed, ensure_ascii=False) + "\n")


_TELLING = {name for known in FORMATS for need in known.needs for name in need.split("|")}


def _unmistakable(record: Record, kind: Kind) -> Record:
    """The record without further columns by which it would be taken for another format."""
    own = COLUMNS[kind]
    rest = {name for name in record if name not in own}
    gone = (rest & _TELLING) | (set(answer_columns(record)) & rest if kind == "prompt" else set())
    return {name: record[name] for name in (*own, *(name for name in record if name in rest - gone))}


def example(record: Record, kind: Kind, where: str) -> list[str]:
    """A record for people, a line a turn, with the roles as they were understood."""
    lines = [f"For example {where}:"]
    for column in COLUMNS[kind]:
        value = record[column]
        if column == "answers":
            for number, answer in enumerate(value):
                measures = [f"{name} {answer[name]}" for name in ("model", "rank", "score") if name in answer]
                told = f" ({', '.join(measures)})" if measures else ""
                lines.append(f"  answer {number}{told}: {_shortened(answer['text'])}")
        elif isinstance(value, list):
            lines += [f"  {column}, {turn['role']}: {_shortened(turn['content'])}" for turn in value]
        else:
            lines.append(f"  {column}: {str(value).lower() if isinstance(value, bool) else value}")
    return lines


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE else line[: EXAMPLE - 3] + "..."


def _told(found: Source, out: Path, dropped: Path, kind: Kind, layout: LayoutName, counts: Counts) -> Iterator[str]:
    yield f"{counts.rows} rows in, {counts.records} {kind} records out: {out} ({layout})"
    if counts.reasons:
        yield f"Left out, with the reasons in {dropped}: {counts.left_out()}"
    if counts.columns:
        yield f"Columns left out: {', '.join(sorted(counts.columns))}"
    if counts.others:
        yield f"{counts.others} rows have other columns than the first, beginning with {counts.other}"
