"""`align data`: what is done to data before a pipeline reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.data.names import Kind, LayoutName

app = typer.Typer(help="Convert data files.", rich_markup_mode=None)


@app.callback()
def data() -> None:
    """Convert data files."""


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="JSONL, JSON, CSV or Parquet, gzip too; a folder of Parquet parts; or OWNER/NAME[:SPLIT].",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; with .gz at the end it is packed.")],
    to: Annotated[Kind, typer.Option("--to", help="What the rows become.")],
    layout: Annotated[LayoutName, typer.Option("--format", help="The layout of OUT.")] = "jsonl",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT where it is there.")] = False,
) -> None:
    """Convert a file between formats: the format of IN is told from its columns."""
    from align.data import convert as converter

    converter.convert(source, out, to, layout, force, typer.echo)
