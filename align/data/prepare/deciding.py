"""What only all rows together can decide: duplicates, the side of a prompt, mixtures, balance.

Rows are numbers here, in the order of their file; nothing of their text is in memory. Every decision depends on the
text of the rows and on the seed alone, not on time or on how many processes were at work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.config_data import DataSource, PrepareSection
from align.data.names import Kind
from align.data.prepare.balance import balanced
from align.data.prepare.duplicates import clusters
from align.data.prepare.steps import EXAMPLES, StepCount
from align.data.prepare.working import SPLITS, Marks, Signatures
from reward.records import InputError

Array = np.ndarray[Any, Any]
TRAIN, TEST = SPLITS.index("train"), SPLITS.index("test")
READ = 2**16  # signatures read at a time: 32 MiB
ALIKE = 0.8  # prompts of this similarity go to one side, where `near_duplicates` names none


@dataclass
class Table:
    """The rows of one file that the steps have left, and what is decided about them.

    sources: what the rows came from; source: (rows,) which of them.
    left: row -> (step, reason, the row it is like or None).
    sides: (rows,) number in SPLITS.
    shown: pairs (row kept, row left out) that the report shows, by step.
    """

    key: str
    kind: Kind
    sources: Sequence[DataSource]
    source: Array
    places: list[str]
    marks: Marks
    left: dict[int, tuple[str, str, int | None]] = field(default_factory=dict)
    sides: Array = field(default_factory=lambda: np.empty(0, np.int8))
    counts: list[StepCount] = field(default_factory=list)
    shown: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def kept(self) -> Array:
        """The rows that are still in, in order."""
        mask = np.ones(len(self.places), bool)
        mask[list(self.left)] = False
        return np.flatnonzero(mask)

    def leave(self, step: str, reason: str, rows: Array, like: Array | None = None) -> None:
        """Leave rows out, each for being like another or for itself."""
        before = len(self.places) - len(self.left)
        for number, row in enumerate(rows):
            self.left[int(row)] = (step, reason, None if like is None else int(like[number]))
        count = next((each for each in self.counts if each.step == step), None)
        if count is None:
            count = StepCount(self.key, self.kind, step, before, before)
            self.counts.append(count)
        count.rows_out -= len(rows)
        if len(rows):
            count.left_out += Counter({reason: len(rows)})
        if like is not None:
            pairs = [(int(like[number]), int(row)) for number, row in enumerate(rows[:EXAMPLES])]
            self.shown.setdefault(step, []).extend(pairs)


def decide(tables: Sequence[Table], section: PrepareSection, seed: int) -> None:
    """All decisions, in order; afterwards `kept` and `sides` of every table say what is written.

    Raises:
        InputError: the rows of one prompt ask for different sides.
    """
    if section.exact_duplicates:
        for table in tables:
            leave_equal_rows(table)
    alike = prompt_clusters(tables, section)
    settle_sides(tables, alike, section)
    if section.near_duplicates is not None:
        for table, prompts in zip(tables, alike, strict=True):
            leave_similar_rows(table, prompts, section.near_duplicates)
    for table in tables:
        leave_for_mixture(table)
        if section.balance:
            rows = table.kept()
            rows = rows[table.sides[rows] == TRAIN]
            chosen = balanced([table.marks.groups[row] for row in rows], section.balance.ratio, seed)
            table.leave("balance", f"of a large group ({section.balance.by})", np.delete(rows, chosen))


def leave_equal_rows(table: Table) -> None:
    """Of rows that say the same, the first stays."""
    rows = table.kept()
    first, inverse = _first_of(table.marks.keys[rows])
    like = rows[first[inverse]]
    again = like != rows
    table.leave("exact duplicates", "that say the same as another", rows[again], like[again])


def prompt_clusters(tables: Sequence[Table], section: PrepareSection) -> list[Array]:
    """Of every table (rows,) the number of each row's prompt: the same for prompts that are alike, or the very same.

    The first of a cluster is its prompt with the least id, whatever the order of the rows.
    """
    ids = np.concatenate([table.marks.prompt_ids for table in tables])
    unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    number = np.arange(len(unique))
    if all("prompt" in table.marks.signatures for table in tables):
        number = clusters(_rows_of([table.marks.signatures["prompt"] for table in tables], first), _threshold(section))
    ends = np.cumsum([len(table.places) for table in tables])[:-1]
    return [*np.split(number[inverse.reshape(-1)], ends)]


def settle_sides(tables: Sequence[Table], alike: Sequence[Array], section: PrepareSection) -> None:
    """The side of every row: what the row asks for, else what its cluster of prompts, or its prompt's hash, says.

    Afterwards no training prompt is alike to one of the test side: rows that would be are left out.
    """
    ids = np.concatenate([table.marks.prompt_ids for table in tables])
    asked = np.concatenate([table.marks.asked for table in tables])
    hashed = np.concatenate([table.marks.hashed for table in tables])
    cluster = np.concatenate(alike)
    prompt = np.unique(ids, return_inverse=True)[1].reshape(-1)
    wanted = _asked_of(tables, prompt, asked)
    sides = np.where(wanted[prompt] > 0, wanted[prompt], hashed)
    if section.split == "cluster":
        # Of a cluster: test where any row asks for it, else train where any does, else its first prompt's hash.
        most, of_first = np.zeros_like(wanted), np.zeros_like(wanted)
        np.maximum.at(most, cluster, wanted[prompt])
        of_first[prompt] = hashed
        side = np.where(most > 0, most, of_first)[cluster]
        sides = np.where(wanted[prompt] > 0, wanted[prompt], side)
    near_test = np.zeros(len(wanted), bool)
    near_test[cluster[sides == TEST]] = True
    crossing = near_test[cluster] & (sides == TRAIN)
    start = 0
    for table in tables:
        end = start + len(table.places)
        table.sides = sides[start:end].astype(np.int8)
        rows = table.kept()
        table.leave("test border", "whose prompt is nearly one of the test side", rows[crossing[start:end][rows]])
        start = end


def _asked_of(tables: Sequence[Table], prompt: Array, asked: Array) -> Array:
    """By prompt, the side that its rows name; 0 where none does."""
    most = np.zeros(prompt.max(initial=0) + 1, np.int8)
    least = np.full(len(most), TEST + 1, np.int8)
    np.maximum.at(most, prompt, asked)
    named = asked > 0
    np.minimum.at(least, prompt[named], asked[named])
    both = np.flatnonzero((most > 0) & (least < most))
    if len(both):
        places = [place for table in tables for place in table.places]
        rows = np.flatnonzero((prompt == both[0]) & named)
        one, other = (next(int(row) for row in rows if asked[row] == side) for side in (TRAIN, TEST))
        raise InputError(
            f"{places[one]} and {places[other]} have the same prompt, on the train side in one and on the test side in "
            "the other: give all rows of a prompt the same split."
        )
    return most


def leave_similar_rows(table: Table, prompts: Array, threshold: float) -> None:
    """Of rows of one voter whose prompts are alike, and whose answers are each like the other's, the first stays."""
    rows = table.kept()
    parts = [prompts[rows], _first_of(table.marks.voters[rows])[1]]
    for column, signatures in table.marks.signatures.items():
        if column != "prompt":
            parts.append(clusters(_rows_of([signatures], rows), threshold))
    first, inverse = _first_of(np.stack(parts, axis=1))
    like = rows[first[inverse]]
    again = like != rows
    table.leave("near duplicates", "that nearly say the same as another", rows[again], like[again])


def leave_for_mixture(table: Table) -> None:
    """At most `max_rows` of a source, then shares of the sources as their weights say: none is repeated, the others are
    cut down to the one of which there is too little. Which rows stay is drawn by the seed and their text."""
    if all(source.max_rows is None and source.weight is None for source in table.sources):
        return
    rows = table.kept()
    by_source = [rows[table.source[rows] == number] for number in range(len(table.sources))]
    drawn = [each[np.argsort(table.marks.draws[each], kind="stable")] for each in by_source]
    capped = [each[: source.max_rows] for each, source in zip(drawn, table.sources, strict=True)]
    if any(source.max_rows is not None for source in table.sources):
        over = [each[len(kept) :] for each, kept in zip(drawn, capped, strict=True)]
        table.leave("max_rows", "over the max_rows of their source", np.sort(np.concatenate(over)))
    counts = shares([len(each) for each in capped], [source.weight for source in table.sources])
    if any(source.weight is not None for source in table.sources):
        over = [each[count:] for each, count in zip(capped, counts, strict=True)]
        table.leave("mixture", "over the share of their source", np.sort(np.concatenate(over)))


def shares(available: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Rows of every source, as many as there are of the scarcest one for its weight.

    >>> shares([100, 100, 10], [2.0, 1.0, 0.5])
    [40, 20, 10]
    """
    if any(weight is None for weight in weights):
        return [*available]
    given = [float(weight or 0) for weight in weights]
    # A source without a row would make all others empty; it has no share.
    unit = min((count / weight for count, weight in zip(available, given, strict=True) if count), default=0.0)
    return [min(count, round(unit * weight)) for count, weight in zip(available, given, strict=True)]


def _threshold(section: PrepareSection) -> float:
    return ALIKE if section.near_duplicates is None else section.near_duplicates


def _first_of(keys: Array) -> tuple[Array, Array]:
    """(index of the first row of each group of equal keys, group of each row)."""
    _, first, inverse = np.unique(keys, axis=0 if keys.ndim > 1 else None, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _rows_of(parts: Sequence[Signatures], rows: Array) -> Array:
    """Rows, by their number over all parts, of tables that may lie on disk; read a block after the other."""
    found = np.empty((len(rows), parts[0].shape[1]), parts[0].dtype)
    order = np.argsort(rows, kind="stable")
    wanted, start = rows[order], 0
    for part in parts:
        for begin in range(0, len(part), READ):
            block = part[begin : begin + READ]
            first, end = np.searchsorted(wanted, [start + begin, start + begin + len(block)])
            found[order[first:end]] = block[wanted[first:end] - start - begin]
        start += len(part)
    return found
