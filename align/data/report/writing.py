"""The report on disk, and in a few lines."""

from __future__ import annotations

from pathlib import Path

from align.data.report.schema import SCHEMA, Told
from reward.records import write_atomically, write_json

MOST_LINES = 6  # findings said aloud; the page has them all


def write(folder: Path, told: Told) -> None:
    """Write data_report.json and data_report.html into a folder, which is made if need be.

    Raises:
        ValueError: the report is of another schema.
    """
    from align.data.report.page import render_html

    if told["schema"] != SCHEMA:
        raise ValueError(f"The report has schema {told['schema']}; this version writes schema {SCHEMA}.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "data_report.json", told)
    write_atomically(folder / "data_report.html", render_html(told))


def sentences(told: Told) -> list[str]:
    """A line for each file, then what to look at."""
    lines = []
    for file in told["files"]:
        read = file["steps"][0]["rows_in"] if file["steps"] else file["rows"]
        sides = f"{file['train']:,} train, {file['test']:,} test"
        lines.append(f"{file['key']}: {file['rows']:,} rows ({sides}) of {read:,} read")
    looks = told["look_at"]
    lines += [f"look at {look['file']}: {look['what']}" for look in looks[:MOST_LINES]]
    if more := len(looks) - MOST_LINES:
        lines += [f"and {more} more to look at in data_report.html"] if more > 0 else []
    return lines
