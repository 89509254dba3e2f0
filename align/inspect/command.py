"""`align inspect CONFIG [--stage dpo] [--n 3] [--html FILE]`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from align.config import Config
from align.pipeline import after_prepare
from reward.records import InputError, write_atomically


def inspect(
    config: Config, stage: str | None = None, n: int = 3, html: Path | None = None, say: Callable[[str], None] = print
) -> None:
    """Show the first `n` training rows of a stage, token by token; with `html`, write them to a page instead.

    Args:
        stage: sft, sample, reward, dpo or ppo; None for the first of the pipeline that trains.
        say: writes to standard output. What it is given has colours only where that is a terminal.

    Raises:
        InputError: no such rows, or none yet: the sentence names the command to run first.
    """
    from align.inspect.stages import seen
    from align.inspect.terminal import as_text
    from align.training import calm_libraries

    if n < 1:
        raise InputError(f"`--n {n}` is no number of rows: give 1 or more.")
    config = after_prepare(config)
    chosen = stage or first_stage(config)
    with calm_libraries():
        found = seen(config, chosen, n)
    if html is None:
        columns, colour = _terminal()
        say(as_text(found, columns, colour))
        return
    from align.inspect.page import render_html

    try:
        write_atomically(html, render_html(found))
    except OSError as error:
        raise InputError(f"--html {html}: {error.strerror}; give a file in a folder you can write to.") from None
    say(f"{chosen}: {len(found.rows)} rows in {html}")


def first_stage(config: Config) -> str:
    """The first stage of the pipeline that trains, else `sample`.

    Raises:
        InputError: it has neither.
    """
    from align.inspect.stages import TRAINED

    trained = [stage for stage in config.stages if stage in TRAINED]
    if not trained and "sample" not in config.stages:
        raise InputError(f"the stages of {config.name} are {', '.join(config.stages)}, and none of them reads tokens.")
    return trained[0] if trained else "sample"


def _terminal() -> tuple[int, bool]:
    """(columns, whether there are colours) of standard output; NO_COLOR and a dumb terminal have none."""
    from rich.console import Console

    from align.inspect.terminal import WIDTH

    console = Console()
    if not console.is_terminal:
        return WIDTH, False
    columns = max(40, shutil.get_terminal_size((WIDTH, 24)).columns)
    return columns, console.color_system is not None and not console.no_color
