"""Progress for people: a bar with time left on a terminal, a line now and then elsewhere, almost nothing under CI."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

# Seconds between two lines where no bar can be drawn (a log file, a cluster's output).
LINE_EVERY = 30.0

Report = Callable[..., None]


def quiet() -> bool:
    """True under CI and on every process but the first."""
    return bool(os.environ.get("CI")) or int(os.environ.get("RANK", "0")) > 0


def say(text: str) -> None:
    """One line on stderr from the main process."""
    if int(os.environ.get("RANK", "0")) == 0:
        console.print(text, markup=False)


@contextmanager
def bar(what: str, total: int) -> Iterator[Report]:
    """A progress bar of `total` steps; the value is called with (steps done so far, short status text)."""
    if quiet():
        yield lambda done, status="": None
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[status]}"))
        with Progress(*columns, *left, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total, status="")
            yield lambda done, status="": progress.update(task, completed=done, status=status)
    else:
        started = last = time.monotonic()
        say(f"  {what}: 0/{total}")

        def line(done: int, status: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= LINE_EVERY and 0 < done < total:
                last = now
                say(f"  {what}: {done}/{total}, {duration((now - started) / done * (total - done))} left  {status}")

        yield line


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 07 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(rows: list[list[str]]) -> None:
    """A table on stderr: the first row is the header, the first column the names."""
    from rich.table import Table

    if int(os.environ.get("RANK", "0")) > 0:
        return
    drawn = Table(box=None, pad_edge=False, padding=(0, 2))
    for index, title in enumerate(rows[0]):
        drawn.add_column(title, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows[1:]:
        drawn.add_row(*row)
    # A file or a pipe has no width of its own; 160 columns keep every figure whole.
    wide = console if console.is_terminal else Console(stderr=True, highlight=False, width=160, emoji=False)
    wide.print(drawn, markup=False)
