"""The final page: is the aligned model really better than its base, by how much, and at what cost?

`write_report` turns the figures of the compare stage into `report.json`, for machines, and `report.html`, for people:
one self-contained file without scripts or outside requests. Prompts and answers are written by strangers and models;
all text reaches the page through Jinja's autoescaping, and a content security policy stands behind it.
The same report gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from align.compare.plots import plots_of
from align.compare.schema import SCHEMA, ModelFigures, Report
from align.compare.statistics import percent, percent_range, standing
from reward.page import MISSING, decimals, environment, interval_of, number
from reward.records import write_atomically, write_json
from reward.statistics import MeanFigure


@dataclass(frozen=True)
class Column:
    """A heading of the table of models; unit and direction are the small print below it."""

    title: str
    unit: str = ""


@dataclass(frozen=True)
class Cell:
    """One figure as text. `detail` is its interval, `mark` what that settles, `note` the fine print on hover."""

    text: str
    detail: str = ""
    mark: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    path: str
    cells: list[Cell] = field(default_factory=list)


def write_report(report: Report, folder: Path) -> Path:
    """Write `report.json` and `report.html` into `folder`, which is made if need be; returns the page's path.

    Raises:
        ValueError: the report is of another schema, or holds a nan or infinite number, which JSON does not have.
    """
    if report["schema"] != SCHEMA:
        raise ValueError(f"The report has schema {report['schema']}; this version writes schema {SCHEMA}.")
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    write_json(folder / "report.json", report)
    write_atomically(page, render_html(report))
    return page


def render_html(report: Report) -> str:
    """The page as one string of HTML."""
    templates = environment()
    templates.filters["short"] = _short
    templates.filters["plain"] = _plain
    template = resources.files("align.compare").joinpath("report.html").read_text(encoding="utf-8")
    columns, rows = _table(report)
    return templates.from_string(template).render(report=report, columns=columns, rows=rows, plots=plots_of(report))


def markdown_summary(report: Report) -> str:
    """Notices, verdict and table as Markdown, for a model card or a pull request."""
    columns, rows = _table(report)
    lines = [f"# {_markdown(report['pipeline'])}: is the aligned model better?", ""]
    for notice in report["notices"]:
        lines += [f"> **Note:** {_markdown(notice)}", ""]
    lines += [f"- {_markdown(sentence)}" for sentence in report["verdict"]]
    heads = ["Model", *(f"{column.title} ({column.unit})" if column.unit else column.title for column in columns)]
    lines += ["", _pipes(heads), "|---|" + "---:|" * len(columns)]
    lines += [_pipes([row.name, *map(_one_line, row.cells)]) for row in rows]
    prompts = report["prompts"]
    lines += ["", f"Measured on {prompts['n']} held-out prompts; ranges are 95 % intervals, ± is one standard error."]
    return "\n".join(lines) + "\n"


def terminal_table(report: Report) -> list[list[str]]:
    """The table of models as rows of strings, the heading first; only win rates keep their intervals, to fit a line."""
    columns, rows = _table(report)
    heading = ["Model", *(column.title for column in columns)]
    return [heading] + [[row.name, *(_one_line(c) if c.mark else c.text for c in row.cells)] for row in rows]


# The table: built once, shown three ways.


def _table(report: Report) -> tuple[list[Column], list[Row]]:
    """Columns and rows of the table of models; simulated preference is a column only where it was measured."""
    judges = [judge["name"] for judge in report["judges"]]
    simulated = any(model["preference"] for model in report["models"])
    equal = [judge for judge in judges if any(judge in model.get("equal_length", {}) for model in report["models"])][:1]
    columns = [Column(f"Win rate, {judge}", "over base") for judge in judges]
    columns += [Column("At equal length", f"win rate over base, {judge}") for judge in equal]
    columns.append(Column("Reward", "mean score"))
    if simulated:
        columns.append(Column("Simulated preference", "mean score"))
    columns += [
        Column("KL to reference", "nats per answer, ± standard error"),
        Column("Answer length", "tokens"),
        Column("Finished", "ended with the stop token"),
        Column("Perplexity", "held-out demonstrations, lower is better"),
    ]
    rows = []
    for model in report["models"]:
        cells = [_win_cell(model, judge) for judge in judges]
        cells += [_equal_cell(model, judge) for judge in equal]
        cells.append(_mean_cell(model["reward"], "No reward model scored these answers."))
        if simulated:
            cells.append(_mean_cell(model["preference"], "The simulated preference did not score these answers."))
        cells += [
            _kl_cell(model["kl"]),
            _mean_cell(model["length"], "No answers were measured."),
            Cell(percent(model["finished"])),
            _mean_cell(model["perplexity"], "There were no held-out demonstrations to measure it on."),
        ]
        rows.append(Row(model["name"], model["path"], cells))
    return columns, rows


def _win_cell(model: ModelFigures, judge: str) -> Cell:
    figure = model.get("win_rate", {}).get(judge)
    if figure is None:
        is_base = not model.get("win_rate")
        why = "The others are compared with this model." if is_base else f"Not judged by {judge}."
        return Cell(MISSING, note=why)
    return Cell(
        percent(figure["rate"]),
        percent_range(figure["low"], figure["high"]),
        standing(figure["low"], figure["high"]),
        f"{figure['wins']} won, {figure['ties']} tied, {figure['losses']} lost of {figure['n']} prompts",
    )


def _equal_cell(model: ModelFigures, judge: str) -> Cell:
    figure = model.get("equal_length", {}).get(judge)
    interval = interval_of(figure) if figure else None
    if figure is None or interval is None:
        return Cell(MISSING, note="The others are compared with this model.")
    note = "The win rate, were its answers as long as the base's: a logistic model with a length term."
    return Cell(percent(figure["mean"]), percent_range(*interval), standing(*interval), note)


def _mean_cell(figure: MeanFigure | None, why_missing: str) -> Cell:
    if figure is None:
        return Cell(MISSING, note=why_missing)
    interval = interval_of(figure)
    if interval is None:
        return Cell(number(figure["mean"]), note="One prompt only: its error is unknown.")
    places = decimals(figure["mean"])
    return Cell(
        number(figure["mean"]),
        f"{number(interval[0], places)} to {number(interval[1], places)}",
        note=f"Mean over {figure['n']} prompts",
    )


def _kl_cell(figure: MeanFigure | None) -> Cell:
    if figure is None:
        return Cell(MISSING, note="KL to the SFT reference is not defined for this model.")
    error = figure["standard_error"]
    text = number(figure["mean"])
    if error is None:
        return Cell(text, note="One prompt only: its error is unknown.")
    return Cell(f"{text} ± {number(error, decimals(figure['mean']))}", note=f"Mean over {figure['n']} prompts")


def _one_line(cell: Cell) -> str:
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text


# Text.


def _short(digest: str) -> str:
    """The first 12 digits of a digest in hex; anything else as it is."""
    return digest[:12] if re.fullmatch(r"[0-9a-f]{40,}", digest) else digest


def _plain(value: Any) -> str:
    """A setting as text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _markdown(text: str) -> str:
    """Text on one line with Markdown's and HTML's own characters made literal."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_markdown, cells)) + " |"
