"""Tokens in a terminal: the role of every line is written before it, and coloured as well where there are colours."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from align.inspect.stages import Seen
from align.inspect.tokens import Part, Role, Row, Token

GUTTER = {"context": "", "loss": "loss", "score": "score"}
STYLE: dict[Role, str] = {"context": "", "loss": "bold green", "score": "bold yellow"}
WIDTH = 100  # columns where nothing says how many there are
READING = (
    "Every token is its id and its text; ␣ is a space, \\n a line break, \\… a part of a character. "
    "What carries loss stands on lines that begin with `loss`; where a score is read, with `score`."
)


def as_text(seen: Seen, width: int = WIDTH, colour: bool = False) -> str:
    """All rows as lines of at most `width` columns, where a single token is not longer than that.

    Args:
        colour: with ANSI codes for colours; no other control character is ever in it but the line break.
    """
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=colour,
        no_color=not colour,
        color_system="standard" if colour else None,
        width=100_000,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    for line in _lines(seen, width):
        console.print(line, soft_wrap=True)
    return out.getvalue().rstrip("\n")


def _lines(seen: Seen, width: int) -> Iterator[Text]:
    count = len(seen.rows)
    rows = "the first row" if count == 1 else f"the first {count} rows"
    yield Text(f"{seen.stage} of {seen.pipeline}: {rows} of the train side of {seen.source}", style="bold")
    yield from _wrapped("What is trained: " + seen.trained, width)
    if seen.too_long:
        yield from _wrapped(f"Passed over: {seen.too_long} longer than {seen.limit}.", width)
    yield from _wrapped(READING, width)
    for row in seen.rows:
        yield from _row(row, width)


def _row(row: Row, width: int) -> Iterator[Text]:
    yield Text()
    yield Text(row.title[0].upper() + row.title[1:], style="bold")
    if row.note:
        yield Text(f"  {row.note}", style="dim")
    for part in row.parts:
        yield from _part(part, width)


def _part(part: Part, width: int) -> Iterator[Text]:
    yield from _wrapped(f"{part.name}: {part.counts}", width, "  ", "    ")
    for role, tokens in part.runs:
        for line in _broken(tokens, width - 10):
            yield _gutter(role).append_text(_cells(line, role))


def _gutter(role: Role) -> Text:
    return Text().append(f"{GUTTER[role]:>7} ", style=STYLE[role]).append("| ", style="dim")


def _cells(tokens: Sequence[Token], role: Role) -> Text:
    line = Text()
    for number, token in enumerate(tokens):
        line.append("  " if number else "").append(f"{token.id} ", style="dim")
        line.append(token.shown, style="magenta" if token.is_special and role == "context" else STYLE[role])
    return line


def _broken(tokens: Iterable[Token], width: int) -> Iterator[list[Token]]:
    """The tokens line by line: a new one behind a line break in the text, and where the line is full."""
    line: list[Token] = []
    used = 0
    for token in tokens:
        size = cell_len(f"{token.id} {token.shown}") + 2
        if line and used + size - 2 > width:
            yield line
            line, used = [], 0
        line.append(token)
        used += size
        if token.text.endswith("\n"):
            yield line
            line, used = [], 0
    if line:
        yield line


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> Iterator[Text]:
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    yield from map(Text, lines)
