"""Which rows stay where one group of them would outweigh the others."""

from __future__ import annotations

import functools
import hashlib
import heapq
from collections.abc import Sequence
from typing import Literal

from align.data.prepare.texts import answer_text_of
from reward.records import InputError, Record

By = Literal["source", "label", "length"]


def balanced(groups: Sequence[str], ratio: float, seed: int) -> list[int]:
    """The rows that stay, in order: of no group more than `ratio` times as many as the smallest group has.

    Of a larger group those rows stay whose hash is least. It is taken of the seed, the group and the row's place within
    its group: no part of a file is favoured, and the other groups and the ratio have no say in who comes first.

    Args:
        groups: (rows,) the group of each row, as by `group_of`.
        ratio: at least 1.

    By hand: groups of 8, 3 and 2 rows and a ratio of 2 leave 4, 3 and 2.
    """
    assert ratio >= 1, ratio
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    if not rows:
        return []
    most = int(ratio * min(map(len, rows.values())))
    kept: list[int] = []
    for group, members in rows.items():
        if len(members) <= most:
            kept += members
        else:
            drawn = heapq.nsmallest(most, range(len(members)), key=functools.partial(_hash, seed, group))
            kept += [members[place] for place in drawn]
    return sorted(kept)


def _hash(seed: int, group: str, place: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{group}\0{place}".encode(), digest_size=8).digest()


def group_of(record: Record, by: By) -> str:
    """The group of a row: its column `source` or `label`, or its answer's characters as "64 to 127".

    Raises:
        InputError: the row has no such column, or no answer whose length could be told.
    """
    if by == "length":
        if not ("completion" in record or "chosen" in record):
            raise InputError(
                "prepare.balance.by is length, the answer's, but a row has no answer (columns "
                f"{', '.join(sorted(record))}): balance by source or label, or leave prepare.balance out."
            )
        size = len(answer_text_of(record))
        low = 1 << (size.bit_length() - 1) if size else 0
        return f"{low} to {2 * low - 1}" if size else "0"
    if record.get(by) is None:
        raise InputError(
            f"prepare.balance.by is {by}, but a row has no column `{by}` (it has {', '.join(sorted(record))}): add the "
            "column, balance by length, or leave prepare.balance out."
        )
    value = record[by]
    return str(value).lower() if isinstance(value, bool) else str(value)
