"""The table of formats: how each is recognised by its columns, and how a row of it becomes records of ours.

A format reads a row into records of the kind that it holds by itself: a demonstration, a prompt, a preference, an
unpaired answer or a comparison (`align.data.kinds` makes other kinds of them). Columns that it does not use ride along.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from align.data import readers, trees
from align.data.files import Placed
from align.data.kinds import OWN
from labeling_ui.comparisons import LEFT_OUT, PROMPTS, answer_columns
from reward.records import InputError, Record

Columns = frozenset[str]
Read = Callable[[Record, str], list[Record]]


@dataclass(frozen=True)
class Format:
    """One convention for the columns of a row.

    needs: columns that must be there and not null; "a|b" is either.
    read: the records of a row.
    looks: what else the row must be like.
    gather: makes rows of whole things out of rows of parts.
    unused: columns of a row that are neither used nor ride along.
    """

    name: str
    needs: tuple[str, ...]
    read: Read
    looks: Callable[[Record], bool] = lambda row: True
    gather: Callable[[Iterator[Placed]], Iterator[Placed]] | None = None
    unused: Callable[[Columns], Columns] = lambda columns: frozenset()

    def left_out(self, columns: Columns) -> Columns:
        """Those of a row's columns that are not in its records, nor used for them."""
        used = {name for need in self.needs for name in need.split("|")}
        return ((columns & OWN) - used) | self.unused(columns)

    def may_fit(self, columns: Columns) -> bool:
        return all(not columns.isdisjoint(need.split("|")) for need in self.needs)


def recognise(rows: Sequence[Placed]) -> Format:
    """The one format that all the rows are in.

    Raises:
        InputError: a row is in none (the nearest one is named, with what it lacks), or two rows differ.
    """
    where, row = rows[0]
    found = format_of(row)
    if found is None:
        raise _unknown(where, row)
    for placed in rows:
        check_same(found, rows[0], placed)
    return found


def format_of(row: Record) -> Format | None:
    """The first format of the table that fits the row."""
    return next((known for known in _candidates(columns_of(row)) if known.looks(row)), None)


@lru_cache(maxsize=1024)
def _candidates(columns: Columns) -> list[Format]:
    return [known for known in FORMATS if known.may_fit(columns)]


def check_same(wanted: Format, first: Placed, placed: Placed) -> None:
    """Refuse a row that is in another format than the first one."""
    where, row = placed
    found = format_of(row)
    if found is wanted:
        return
    now, then = columns_of(row), columns_of(first[1])
    said = [f"has {', '.join(sorted(now - then))} besides"] if now - then else []
    said += [f"lacks {', '.join(sorted(then - now))}"] if then - now else []
    raise InputError(
        f"{where}: is {found.name if found else 'in no known format'}, but {first[0]} is {wanted.name} "
        f"({' and '.join(said) or 'its columns hold something else'}): mend the row, or put rows of another format "
        "into a file of their own."
    )


def columns_of(row: Record) -> Columns:
    """The columns that say something."""
    return frozenset(column for column, value in row.items() if value is not None)


def _unknown(where: str, row: Record) -> InputError:
    columns = sorted(columns_of(row))

    def lacks(known: Format) -> list[str]:
        return [need for need in known.needs if not set(need.split("|")) & set(columns)]

    def near(known: Format) -> float:
        close = [need for need in lacks(known) if difflib.get_close_matches(need, columns, 1, 0.7)]
        return 1 - (len(lacks(known)) - 0.7 * len(close)) / len(known.needs)

    nearest = max(FORMATS, key=near)
    missing = ", ".join(need.replace("|", " or ") for need in lacks(nearest))
    return InputError(
        f"{where}: the columns {', '.join(columns) or '(none)'} are those of no known format; the nearest is "
        f"{nearest.name}, {f'which lacks {missing}' if missing else 'whose columns hold something else'}: rename the "
        "columns to those of a format in docs/data.md."
    )


def _is_object(column: str, row: Record) -> bool:
    return isinstance(row[column], dict)


_TREE = {"message_tree_id", "prompt"}
_NODE = {"message_tree_id", "message_id", "parent_id", "text", "role", "rank", "deleted"}

# The first that fits a row counts: those that need more stand before those that need less.
FORMATS = (
    Format(
        "OpenAssistant trees",
        ("message_tree_id", "prompt"),
        trees.comparisons,
        looks=partial(_is_object, "prompt"),
        unused=lambda columns: columns - _TREE,
    ),
    Format(
        "OpenAssistant messages",
        ("message_tree_id", "message_id", "text", "role"),
        trees.comparisons,
        gather=trees.grown,
        unused=lambda columns: columns - _NODE,
    ),
    Format(
        "OpenAI preferences",
        ("input", "preferred_output", "non_preferred_output"),
        readers.from_openai_pair,
        looks=partial(_is_object, "input"),
    ),
    Format(
        "an Argilla export",
        ("fields",),
        readers.from_labelling_tool,
        looks=partial(_is_object, "fields"),
        unused=lambda columns: columns - {"fields", "metadata", "id", "external_id"},
    ),
    Format(
        "a Label Studio export",
        ("data",),
        readers.from_labelling_tool,
        looks=partial(_is_object, "data"),
        unused=lambda columns: columns - {"data", "id"},
    ),
    Format("ShareGPT conversations/chosen/rejected", ("conversations", "chosen", "rejected"), readers.from_sharegpt),
    Format("ShareGPT conversations", ("conversations",), readers.from_sharegpt),
    Format("prompt/chosen/rejected", ("prompt", "chosen", "rejected"), partial(readers.from_pair, "prompt")),
    Format("messages/chosen/rejected", ("messages", "chosen", "rejected"), partial(readers.from_pair, "messages")),
    Format(
        "instruction/chosen/rejected", ("instruction", "chosen", "rejected"), partial(readers.from_pair, "instruction")
    ),
    Format("dialogues chosen/rejected", ("chosen", "rejected"), partial(readers.from_pair, "")),
    Format("prompt/completion/label", ("prompt", "completion", "label"), readers.from_unpaired),
    Format("prompt/completion", ("prompt", "completion"), readers.from_completion),
    Format(
        "a prompt with a list of answers",
        ("prompt|instruction", "answers|completions|responses"),
        readers.from_several_answers,
    ),
    Format("messages", ("messages",), readers.from_messages),
    Format("instruction/input/output", ("instruction", "output"), readers.from_instruction),
    Format(
        "a prompt with columns of answers",
        ("|".join(PROMPTS),),
        readers.from_labelling_tool,
        looks=lambda row: len(answer_columns(row)) > 1,
        unused=lambda columns: columns & LEFT_OUT,
    ),
    Format("prompt", ("prompt",), readers.from_prompt),
    Format("instruction", ("instruction",), readers.from_instruction),
    Format("Human/Assistant text", ("text",), readers.from_text),
)
