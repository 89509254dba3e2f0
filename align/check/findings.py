"""What preflight finds: a thing that is refused, or a thing to know of, in sentences for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or looks wrong, with what a stage reads.

    what: one or two whole sentences with place, row and numbers, and how to mend it.
    """

    level: Literal["refused", "warned"]
    stage: str
    what: str


def refused(stage: str, what: str) -> Finding:
    return Finding("refused", stage, what)


def warned(stage: str, what: str) -> Finding:
    return Finding("warned", stage, what)


def refusals(found: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.level == "refused"]


def part(count: int, of: int, what: str = "rows") -> str:
    """ "37 of 2,000 rows (1.9 %)"."""
    return f"{count:,} of {of:,} {what} ({count / of:.1%})".replace("%", " %")
