"""What the steps of preparation share: a row goes through, changed or not, or is left out with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from align.data.names import Kind
from reward.records import Record

EXAMPLES = 3  # rows that the report shows of each thing


@dataclass(frozen=True)
class Left:
    """Why a row is left out: `reason` is one of a few, which are counted; `detail` is about this row."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Step:
    """One thing that is done to every row by itself.

    name: as in the report and beside the rows it left out: "language".
    apply: the record (the very same object where nothing changed, else a new one), or why it is left out.
    private: the rows it changes are not kept as they were: the change is meant to be final.
    """

    name: str
    apply: Callable[[Record], Record | Left]
    private: bool = False


@dataclass
class StepCount:
    """What one step did to one file, for the report.

    rows_in, rows_out: rows before and after.
    left_out: rows by reason.
    changed: rows that came out otherwise than they went in.
    examples: a few `{"before": text, "after": text}` of changed rows, `{"kept": text, "left out": text}` of duplicates,
        or `{"reason": text, "text": text}` of rows left out.
    """

    file: str
    kind: Kind
    step: str
    rows_in: int = 0
    rows_out: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    changed: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


def text_of(record: Record) -> str:
    """All turns of a record as one text, in order, a line break between turns: what duplicates are found by."""
    columns = [record[name] for name in ("prompt", "completion", "chosen", "rejected") if name in record]
    return "\n".join(turn["content"] for turns in columns for turn in turns)


def prompt_text(record: Record) -> str:
    """The turns of the prompt as one text."""
    return "\n".join(turn["content"] for turn in record["prompt"])
