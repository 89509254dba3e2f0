"""`align data`: what is done to data before a pipeline reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.data.names import Kind, LayoutName

app = typer.Typer(help="Convert and prepare data files.", rich_markup_mode=None)


@app.callback()
def data() -> None:
    """Convert and prepare data files."""


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


@app.command()
def prepare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the pipeline.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as prepare.split=hash.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Redo it where its folder was made from other inputs.")
    ] = False,
) -> None:
    """Stage 0: clean, mix and split the files of `data`, and report what was done."""
    from align import pipeline
    from align.config_file import load_config

    given = overrides or []
    loaded = load_config(config, given)
    if loaded.prepare is None:
        loaded = load_config(config, [*given, "prepare={}"])
    pipeline.run_stage(loaded, "prepare", force=force)
