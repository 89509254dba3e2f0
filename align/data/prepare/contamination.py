"""Training rows that hold text of a test set: found by runs of n words, n being 13 (Brown et al. 2020) or as one says.

Words are compared without case and punctuation, turn by turn. What says nothing about a test set does not count:

- system turns, and a run that is in more than a tenth of the set's texts (and in more than ten): a template;
- a run of which half the words or more repeat others of it ("yes yes yes ..."): anybody may have written it;
- a text of fewer than n words, unless it is a whole user turn of at least three: a short question is a question of the
  set, a short answer such as "Paris" is not its property.

Of a test set only hashes are kept: 64 bits a run, made from 32 bits a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from align.data.files import open_source
from align.data.formats import format_of
from align.data.kinds import COLUMNS, kind_of
from align.data.prepare.duplicates import SHORTEST, codes, spread, words
from align.data.prepare.steps import Left, Step
from align.data.turns import CannotHold
from reward.records import InputError, Record

Array = np.ndarray[Any, Any]

TEMPLATE_SHARE = 0.1  # of the texts of a test set ...
TEMPLATE_TEXTS = 10  # ... and at least this many: what more than these have in common is a template
_SYSTEM = ("system", "system_prompt", "system_message")


@dataclass(frozen=True)
class TestSet:
    """What is known of a test set.

    runs: (runs,) uint64, sorted: hashes of its runs of n words.
    wholes: (wholes,) uint64, sorted: hashes of its texts of fewer than n words.
    templates: runs that were left aside because too many of its texts have them.
    """

    name: str
    runs: Array
    wholes: Array
    templates: int

    @classmethod
    def of(cls, place: str | Path, n: int) -> TestSet:
        """Read a test set: its prompts and answers in any known format, else all its columns of text.

        Args:
            place: a file, a folder of Parquet parts, or a hub id.
            n: words of a run.

        Raises:
            InputError: it cannot be read, or has no text that could be found again.
        """
        source = open_source(place)
        runs: list[Array] = []
        wholes: set[int] = set()
        seen: set[int] = set()  # a text counts once, however many rows have it
        for where, row in source.rows():
            for text, asked in _texts(row, where):
                said = codes(words(text))
                if len(said) >= n:
                    mark = _whole(said)
                    if mark not in seen:
                        seen.add(mark)
                        runs.append(np.unique(_runs(said, n)[_varied(said, n)]))
                elif asked and len(said) >= SHORTEST and _varied(said, len(said))[0]:
                    wholes.add(_whole(said))
        found, counts = np.unique(np.concatenate([*runs, np.empty(0, np.uint64)]), return_counts=True)
        shared = counts > max(TEMPLATE_TEXTS, TEMPLATE_SHARE * len(seen))
        if shared.all() and not wholes:
            raise InputError(
                f"{source.name} has no text of at least {SHORTEST} different words: give the file of a test set in any "
                "format, or with its questions in a column of text."
            )
        name = Path(source.name).name if source.parts else source.name
        return cls(name, found[~shared], np.array(sorted(wholes), np.uint64), int(shared.sum()))


@dataclass(frozen=True)
class Shared:
    """What a row has in common with a test set: its name, and the first such words."""

    test_set: str
    words: str


@dataclass(frozen=True)
class Contamination:
    """Looks for the texts of test sets in records; `tests` are to be made with the same `n`."""

    tests: Sequence[TestSet]
    n: int

    def find(self, record: Record) -> Shared | None:
        """The first words that a record, of any kind, has in common with a test set, or None."""
        for text, asked in _turns(record):
            found = words(text)
            said = codes(found)
            if len(said) >= self.n:
                runs = _runs(said, self.n)
                for test in self.tests:
                    if len(hits := np.flatnonzero(_among(runs, test.runs))):
                        return Shared(test.name, " ".join(found[hits[0] : hits[0] + self.n]))
            elif asked and len(said) >= SHORTEST:
                whole = np.array([_whole(said)], np.uint64)
                for test in self.tests:
                    if _among(whole, test.wholes)[0]:
                        return Shared(test.name, " ".join(found))
        return None

    def apply(self, record: Record) -> Record | Left:
        """The record, or why it is left out."""
        shared = self.find(record)
        return record if shared is None else Left(f"shared with test set {shared.test_set}", shared.words)


def decontamination(paths: Sequence[str | Path], n: int = 13) -> Step:
    """The step that leaves out rows which share text with one of the test sets.

    Raises:
        InputError: a test set cannot be read, or has no text.
    """
    tests = [TestSet.of(path, n) for path in paths]
    names = [test.name for test in tests]
    tests = [
        replace(test, name=str(path)) if names.count(test.name) > 1 else test
        for test, path in zip(tests, paths, strict=True)
    ]
    return Step("decontaminate", Contamination(tests, n).apply)


def _turns(record: Record) -> Iterator[tuple[str, bool]]:
    """(text, whether a user wrote it) of the turns and answers of a record, without those of the system."""
    for column in ("prompt", "completion", "chosen", "rejected"):
        for turn in record.get(column, ()):
            if turn["role"] != "system":
                yield turn["content"], turn["role"] == "user"
    for answer in record.get("answers", ()):
        yield answer["text"], False


def _texts(row: Record, where: str) -> Iterator[tuple[str, bool]]:
    """(text, whether it may be a question) of a row of a test set: nothing that is text is passed over.

    A row in no known format, or one that its format has no use for, is taken column by column.
    """
    known = format_of(row)
    try:
        records = known.read(row, where) if known and not known.gather else []
    except (InputError, CannotHold):
        records = []
    if not records:
        yield from ((text, True) for text in _strings(row))
    for record in records:
        yield from _turns(record)
        own = COLUMNS[kind_of(record)]
        yield from ((text, False) for text in _strings({k: v for k, v in record.items() if k not in own}))


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value, however deep, but those of the system."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict) and "system" not in (value.get("role"), value.get("from")):
        for name, item in value.items():
            if name not in _SYSTEM:
                yield from _strings(item)


def _runs(said: Array, n: int) -> Array:
    """Hashes of all runs of n words: (words - n + 1,) uint64, a weighted sum of the words' numbers modulo 2^64."""
    return np.lib.stride_tricks.sliding_window_view(said.astype(np.uint64), n) @ _weights(n)


@cache
def _weights(n: int) -> Array:
    return spread(n, seed=3)


def _whole(said: Array) -> int:
    """The hash of a text of any length."""
    return int.from_bytes(blake2b(said.astype("<u4").tobytes(), digest_size=8).digest(), "little")


def _varied(said: Array, n: int) -> Array:
    """Whether more than half of the words of each run are different ones: (words - n + 1,)."""
    ordered = np.sort(np.lib.stride_tricks.sliding_window_view(said, n), axis=1)
    return (np.diff(ordered, axis=1) != 0).sum(axis=1) + 1 > n / 2


def _among(values: Array, known: Array) -> Array:
    """Which values are in a sorted array."""
    places = np.searchsorted(known, values)
    places[places == len(known)] = 0
    return known[places] == values if len(known) else np.zeros(len(values), bool)
