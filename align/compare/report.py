"""The final page: is the aligned model really better, by how much, and at what cost?

`write_report` turns the figures of the compare stage into `report.json`, for machines, `report.html`, for people, and
`model_card.md`. The page is one self-contained file without outside requests; its one script, the filter over the
answers, is named in its content security policy by its digest. Prompts and answers are written by strangers and models:
all text reaches the page through Jinja's autoescaping. The same report gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.compare import tables
from align.compare.differences import Segment, new_words
from align.compare.model_card import model_card
from align.compare.plots import plots_of, plots_of_the_climb
from align.compare.schema import SCHEMA, Example, Report
from align.compare.statistics import percent, percent_range
from reward.page import environment
from reward.records import write_atomically, write_json

WORDS = {1.0: "won", 0.5: "tied", 0.0: "lost"}


@dataclass(frozen=True)
class Shown:
    """An answer on the page: its text in pieces, and what the judges said of it."""

    model: str
    pieces: list[Segment]
    is_empty: bool
    scores: dict[str, float]
    verdicts: list[tuple[str, str]]  # (judge, won | tied | lost)


@dataclass(frozen=True)
class SideBySide:
    """One prompt with its answers.

    outcomes: `<model's number>-<judge's number>-<won|tied|lost>`, for the filter.
    is_same: all answers say the same.
    lost: models whose answer lost by the judge that is told first.
    """

    prompt: str
    answers: list[Shown]
    outcomes: list[str]
    is_same: bool
    lost: list[str]


def write_report(report: Report, folder: Path) -> Path:
    """Write the three files into `folder`, which is made if need be; returns the page's path.

    Raises:
        ValueError: the report is of another schema, or holds a nan or infinite number, which JSON does not have.
    """
    if report["schema"] != SCHEMA:
        raise ValueError(f"The report has schema {report['schema']}; this version writes schema {SCHEMA}.")
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    write_json(folder / "report.json", report)
    write_atomically(page, render_html(report))
    write_atomically(folder / "model_card.md", model_card(report))
    return page


def render_html(report: Report) -> str:
    """The page as one string of HTML."""
    templates = environment()
    templates.filters |= {"short": _short, "plain": _plain, "percent": percent}
    templates.globals["range"] = percent_range
    files = resources.files("align.compare")
    template, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("report.html", "report.js"))
    assert "</" not in script  # nothing in it can end its element
    judges = [judge["name"] for judge in report["judges"]]
    return templates.from_string(template).render(
        report=report,
        gains=tables.gains(report),
        costs=tables.costs(report),
        tasks=tables.tasks(report),
        plots=plots_of(report),
        climb=plots_of_the_climb(report),
        examples=[_side_by_side(example, judges) for example in report["examples"]],
        choices=[(number, model["name"]) for number, model in enumerate(report["models"])][1:],
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def terminal_table(report: Report) -> list[list[str]]:
    """Gains and main costs as rows of strings, the heading first; to fit a line, only win rates keep intervals."""
    won, paid = tables.gains(report), tables.costs(report)
    kept = [i for i, column in enumerate(paid.columns) if column.title in ("Answer length", "Finished", "Perplexity")]
    heading = ["Model", *(column.title for column in won.columns), *(paid.columns[i].title for i in kept)]
    rows = [heading]
    for gain, cost in zip(won.rows, paid.rows, strict=True):
        cells = [tables.one_line(cell) if cell.mark else cell.text for cell in gain.cells]
        rows.append([gain.name, *cells, *(cost.cells[i].text for i in kept)])
    return rows


def _side_by_side(example: Example, judges: list[str]) -> SideBySide:
    first = example["answers"][0]["text"] if example["answers"] else ""
    answers, outcomes = [], []
    for number, answer in enumerate(example["answers"]):
        told = answer.get("outcomes", {})
        verdicts = [(judge, WORDS[told[judge]]) for judge in judges if told.get(judge) in WORDS]
        outcomes += [f"{number}-{judges.index(judge)}-{word}" for judge, word in verdicts]
        pieces = (new_words(first, answer["text"]) if number else None) or []
        # A text in which every word is marked says nothing.
        if not any(not is_new and piece.strip() for piece, is_new in pieces):
            pieces = [(answer["text"], False)]
        answers.append(Shown(answer["model"], pieces, not answer["text"].strip(), answer.get("scores", {}), verdicts))
    same = len({answer["text"] for answer in example["answers"]}) == 1
    lost = [a["model"] for a in example["answers"] if judges and a.get("outcomes", {}).get(judges[0]) == 0]
    return SideBySide(example["prompt"], answers, outcomes, same, lost)


def _short(digest: str) -> str:
    """The first 12 digits of a digest in hex; anything else as it is."""
    return digest[:12] if re.fullmatch(r"[0-9a-f]{40,}", digest) else digest


def _plain(value: Any) -> str:
    """A setting as text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
