"""Rows of one format into records of one kind, each with its place, or with why it has none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from align.data.files import Placed, open_source
from align.data.formats import Format, check_same, recognise
from align.data.kinds import become, check_possible, kind_of
from align.data.names import Kind
from align.data.turns import CannotHold
from reward.records import InputError, Record

LOOKED_AT = 100  # rows whose format is compared before the first is read


class Understood(NamedTuple):
    """What a row, or one of several records in it, has become.

    row: the row, or the record where a row holds several.
    record: the record in the kind of its format; None where not even that could be made.
    made: the record of the wanted kind, or why there is none.
    """

    where: str
    row: Record
    record: Record | None
    made: Record | CannotHold


def understood(rows: Iterator[Placed], chosen: Format, kind: Kind) -> Iterator[Understood]:
    """The records of a kind in the rows of a format.

    Raises:
        InputError: a row is malformed, or no row of such a file could become a record of this kind.
    """
    possible = False
    for where, row in chosen.gather(rows) if chosen.gather else rows:
        try:
            records = chosen.read(row, where)
        except CannotHold as reason:
            yield Understood(where, row, None, reason)
            continue
        if records and not possible:
            check_possible(kind_of(records[0]), kind)
            possible = True
        for record in records:
            if record.get("split", "train") not in ("train", "test"):
                raise InputError(f"{where}: split is {record['split']!r}, but train or test is wanted.")
            for made in become(record, kind):
                yield Understood(where, row if len(records) == 1 else record, record, made)


def records_of(place: str, kind: Kind, max_rows: int | None = None) -> tuple[str, Iterator[Understood]]:
    """(the name of a file's format, its records of a kind).

    Args:
        max_rows: read only the first rows.

    Raises:
        InputError: the file cannot be read, its rows are in no known format, or not all in one.
    """
    rows = itertools.islice(open_source(place).rows(), max_rows)
    first = list(itertools.islice(rows, LOOKED_AT))
    chosen = recognise(first)

    def checked() -> Iterator[Placed]:
        for placed in itertools.chain(first, rows):
            check_same(chosen, first[0], placed)
            yield placed

    return chosen.name, understood(checked(), chosen, kind)
