"""One row after another through the steps, in one process or several: what comes out, what is left out, and marks.

The marks are what later decisions over all rows need: keys of equal texts, signatures by which similar ones are found,
the side that a row or its prompt's hash asks for, and a number drawn from the seed and the text.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from align.config_data import PrepareSection
from align.data.names import Kind
from align.data.prepare.steps import EXAMPLES, Left, Step, StepCount, text_of
from reward.records import Record, prompt_id, prompt_text, split_of

CHUNK = 500  # rows that go to a worker at a time
ALONE = 10 * CHUNK  # rows before worker processes are worth their start

Row = tuple[str, Record]  # (place, record)
Array = np.ndarray[Any, Any]

# The texts of a row that are compared with those of other rows, one by one: pairs about one prompt are not duplicates.
COMPARED: dict[Kind, tuple[str, ...]] = {
    "demonstration": ("prompt", "completion"),
    "prompt": ("prompt",),
    "preference": ("prompt", "chosen", "rejected"),
}
SPLITS = ("", "train", "test")


@dataclass(frozen=True)
class Task:
    """What a worker needs to know.

    signed: whether similar rows, or similar prompts, are looked for.
    """

    file: str
    kind: Kind
    section: PrepareSection
    test_share: float
    seed: int
    signed: bool


@dataclass
class Lost:
    """A row that was left out, as it was when it came to the step."""

    file: str
    where: str
    step: str
    reason: str
    detail: str
    record: Record


@dataclass
class Changed:
    """A row that came out otherwise than it went in; `before` is the record as it was read."""

    file: str
    where: str
    steps: list[str]
    before: Record | None


class Signatures(Protocol):
    """A table of signatures, an array or on disk: read by slices of rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Array: ...


@dataclass
class Marks:
    """Of the rows that are left, in order.

    keys: (rows,) 128 bits of what a row says and who said it, as bytes.
    voters: (rows,) 128 bits of whose judgement a row is, as bytes; the same for all that name nobody.
    prompt_ids: (rows,) as bytes.
    asked: (rows,) number in SPLITS of the side that the row itself names.
    hashed: (rows,) number in SPLITS of the side that the prompt's hash names.
    draws: (rows,) uint64, by which rows are drawn: from the seed and the text alone.
    groups: (rows,) what `balance.by` names.
    signatures: by column, (rows, permutations); of a whole file, on disk.
    """

    keys: Array
    voters: Array
    prompt_ids: Array
    asked: Array
    hashed: Array
    draws: Array
    groups: list[str]
    signatures: Mapping[str, Signatures]


@dataclass
class Worked:
    """What came of some rows."""

    lines: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    changed: list[Changed] = field(default_factory=list)
    counts: list[StepCount] = field(default_factory=list)
    marks: Marks | None = None


def work(task: Task, rows: list[Row]) -> Worked:
    """The rows through the steps of `align.data.prepare.rows`."""
    steps = _steps(task)
    told = Worked(counts=[StepCount(task.file, task.kind, step.name) for step in steps])
    kept = [record for where, read in rows if (record := _through(steps, told, task, where, read)) is not None]
    told.lines = [json.dumps(record, ensure_ascii=False) for record in kept]
    told.marks = _marks(task, kept)
    return told


def worked(task: Task, rows: Iterable[Row], processes: int | None) -> Iterator[Worked]:
    """The rows in order, in chunks; by worker processes where there are enough of them.

    Args:
        processes: None for one a core, at most 8.
    """
    count = processes or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 8)
    chunks = _chunks(rows)
    for done, chunk in enumerate(chunks, start=1):
        yield work(task, chunk)
        if count > 1 and done * CHUNK >= ALONE:
            break
    else:
        return
    # Started anew and not forked: this process has threads.
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[Worked]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(work, task, chunk))
            if len(waiting) > 4 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) == CHUNK:
            yield held
            held = []
    if held:
        yield held


_made: tuple[Task, list[Step]] | None = None  # of the last task: test sets are read once a process


def _steps(task: Task) -> list[Step]:
    global _made
    if _made is None or _made[0] != task:
        from align.data.prepare.contamination import decontamination
        from align.data.prepare.rows import row_steps

        steps = row_steps(task.section, task.kind)
        if task.section.decontaminate:
            steps = [*steps, decontamination(task.section.decontaminate, task.section.decontaminate_ngram)]
        _made = (task, steps)
    return _made[1]


def masked(record: Record, section: PrepareSection) -> Record:
    """A record as it may be listed: what is scrubbed from the result must not live on among what was left out."""
    from align.data.prepare.scrub import scrubbed_record

    return scrubbed_record(record, section.scrub) if section.scrub else record


def _through(steps: list[Step], told: Worked, task: Task, where: str, read: Record) -> Record | None:
    record, changes, final = read, list[str](), False

    def short(shown: Record) -> str:
        return _short(masked(shown, task.section))

    for step, count in zip(steps, told.counts, strict=True):
        count.rows_in += 1
        made = step.apply(record)
        if isinstance(made, Left):
            count.left_out[made.reason] += 1
            if len(count.examples) < EXAMPLES:
                count.examples.append({"reason": made.reason, "text": short(record)})
            listed = masked(record, task.section)
            told.lost.append(Lost(task.file, where, step.name, made.reason, made.detail, listed))
            return None
        count.rows_out += 1
        if made is not record:
            count.changed += 1
            if len(count.examples) < EXAMPLES:
                before = "(not kept)" if step.private else short(record)
                count.examples.append({"before": before, "after": short(made)})
            changes.append(step.name)
            final |= step.private
            record = made
    if changes:
        told.changed.append(Changed(task.file, where, changes, None if final else read))
    told.places.append(where)
    return record


def _short(record: Record, most: int = 300) -> str:
    text = text_of(record)
    return text if len(text) <= most else text[: most - 3] + "..."


def _marks(task: Task, records: list[Record]) -> Marks:
    from align.data.prepare.balance import group_of
    from align.data.prepare.duplicates import exact_key, sign

    columns = COMPARED[task.kind]
    texts = {column: [_turns(record[column]) for record in records] for column in columns}
    # Two people's votes on one pair are two labels; a row read twice is one.
    voters = [exact_key("\x1f".join(_voters(record))) for record in records]
    said = ["\x1f".join(parts) for parts in zip(*texts.values(), strict=True)]
    keys = [exact_key(f"{text}\x1f{whose.hex()}") for text, whose in zip(said, voters, strict=True)]
    seed = task.seed.to_bytes(8, "little")
    draws = [int.from_bytes(hashlib.blake2b(key, digest_size=8, salt=seed).digest(), "little") for key in keys]
    by = task.section.balance.by if task.section.balance else None
    return Marks(
        keys=np.array(keys, dtype="S16"),
        voters=np.array(voters, dtype="S16"),
        prompt_ids=np.array([prompt_id(record["prompt"]).encode() for record in records], dtype="S16"),
        asked=np.array([SPLITS.index(record.get("split", "")) for record in records], np.int8),
        hashed=np.array([SPLITS.index(split_of(record["prompt"], task.test_share)) for record in records], np.int8),
        draws=np.array(draws, np.uint64),
        groups=[group_of(record, by) for record in records] if by else [],
        signatures={column: sign(texts[column]) for column in columns} if task.signed else {},
    )


def _turns(turns: list[dict[str, str]]) -> str:
    """A conversation's text; one turn alone without its role, so that what people wrote is what is compared."""
    return turns[0]["content"] if len(turns) == 1 else prompt_text(turns)


def _voters(record: Record) -> list[str]:
    return [str(record[name]) for name in ("annotator", "annotators") if record.get(name)]
