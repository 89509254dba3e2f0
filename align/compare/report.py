"""The final page: is the aligned model really better than its base, by how much, and at what cost?

`write_report` turns the figures of the compare stage into `report.json`, for machines, and `report.html`, for people:
one self-contained file without scripts or outside requests. Prompts and answers are written by strangers and models;
all text reaches the page through Jinja's autoescaping, and a content security policy stands behind it.
The same report gives the same bytes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from align.compare.schema import SCHEMA, MeanFigure, ModelFigures, Report, WinRateFigure
from align.compare.statistics import percent, percent_range, standing
from reward.records import write_atomically, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "–"

# Mid tones with at least 3:1 contrast on both the light and the dark page. The first is the base's: it recedes.
COLOURS = ("#7d8590", "#3b82c4", "#c9772b", "#2f9e77", "#b0569b", "#8a7a2f")
MARKERS = "osD^v"
# Stand-ins that the SVG carries until they become the page's own CSS colours, which follow light and dark.
INK, RULE = "#010203", "#040506"

STYLE = {
    # Text stays text: readable aloud, searchable, in the reader's own system font.
    "svg.fonttype": "none",
    "svg.hashsalt": "align-compare",
    # A model called "a$b$" is a name, not a formula.
    "text.parse_math": False,
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


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


@dataclass(frozen=True)
class Plot:
    """An inline SVG, its heading, how to read it, and its figures as a sentence for screen readers."""

    title: str
    caption: str
    svg: Markup


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
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = _short
    environment.filters["plain"] = _plain
    environment.filters["score"] = _number
    environment.filters["units"] = _together
    template = resources.files("align.compare").joinpath("report.html").read_text(encoding="utf-8")
    columns, rows = _table(report)
    return environment.from_string(template).render(
        report=report, columns=columns, rows=rows, plots=_plots(report), missing=MISSING
    )


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
    columns = [Column(f"Win rate, {judge}", "over base") for judge in judges]
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


def _mean_cell(figure: MeanFigure | None, why_missing: str) -> Cell:
    if figure is None:
        return Cell(MISSING, note=why_missing)
    interval = _interval(figure)
    if interval is None:
        return Cell(_number(figure["mean"]), note="One prompt only: its error is unknown.")
    decimals = _decimals(figure["mean"])
    return Cell(
        _number(figure["mean"]),
        f"{_number(interval[0], decimals)} to {_number(interval[1], decimals)}",
        note=f"Mean over {figure['n']} prompts",
    )


def _kl_cell(figure: MeanFigure | None) -> Cell:
    if figure is None:
        return Cell(MISSING, note="KL to the SFT reference is not defined for this model.")
    error = figure["standard_error"]
    text = _number(figure["mean"])
    if error is None:
        return Cell(text, note="One prompt only: its error is unknown.")
    return Cell(f"{text} ± {_number(error, _decimals(figure['mean']))}", note=f"Mean over {figure['n']} prompts")


def _interval(figure: MeanFigure) -> tuple[float, float] | None:
    low, high = figure["low"], figure["high"]
    return None if low is None or high is None else (low, high)


def _one_line(cell: Cell) -> str:
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text


# The plots.


def _plots(report: Report) -> list[Plot]:
    """The plots that have something to show, in reading order."""
    # The plotting library takes a second to load; tables and summaries do without.
    import matplotlib.style

    models = report["models"]
    colours = {model["name"]: COLOURS[i % len(COLOURS)] for i, model in enumerate(models)}
    with matplotlib.style.context(["default", STYLE]):
        return [
            plot
            for plot in (
                _win_plot(models, [judge["name"] for judge in report["judges"]], colours),
                _reward_plot(models, colours),
                _strip_plot(
                    "Answer length",
                    "Mean tokens per answer. Judges tend to like longer answers: read gains with this in mind.",
                    "tokens per answer",
                    [(model["name"], model["length"]) for model in models],
                    colours,
                    from_zero=True,
                ),
                _strip_plot(
                    "Perplexity on held-out demonstrations",
                    "How well each model still predicts good answers. Lower is better; a rise is capability lost.",
                    "perplexity",
                    [(model["name"], model["perplexity"]) for model in models],
                    colours,
                ),
            )
            if plot is not None
        ]


def _win_plot(models: Sequence[ModelFigures], judges: list[str], colours: dict[str, str]) -> Plot | None:
    compared = [model for model in models if model.get("win_rate")]
    if not compared:
        return None
    figure, axes = _canvas(rows=len(compared) * max(1, len(judges) * 0.7) + (len(judges) > 1))
    for row, model in enumerate(compared):
        for i, judge in enumerate(judges):
            won: WinRateFigure | None = model["win_rate"].get(judge)
            if won is None:
                continue
            offset = 0.0 if len(judges) == 1 else 0.5 * (i / (len(judges) - 1) - 0.5)
            _point(
                axes,
                (100 * won["rate"], row + offset),
                colours[model["name"]],
                MARKERS[i % len(MARKERS)],
                x_interval=(100 * won["low"], 100 * won["high"]),
            )
    axes.axvline(50, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of prompts preferred over base")
    _rows(axes, [model["name"] for model in compared])
    if len(judges) > 1:
        for i, judge in enumerate(judges):
            axes.plot([], [], linestyle="", marker=MARKERS[i % len(MARKERS)], color=INK, label=judge)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1, borderaxespad=0, handletextpad=0.2)
    return _plot(
        "Win rate over base",
        "Share of held-out prompts on which the answer was preferred, with 95 % interval. "
        "Right of the dashed line is better than base; a bar across the line settles nothing.",
        figure,
    )


def _reward_plot(models: Sequence[ModelFigures], colours: dict[str, str]) -> Plot | None:
    points = [(model["name"], model["kl"], model["reward"]) for model in models]
    if not any(kl and reward for _, kl, reward in points):
        return None
    figure, axes = _canvas(rows=4)
    for name, kl, reward in points:
        if kl is None or reward is None:
            continue
        at = (kl["mean"], reward["mean"])
        _point(axes, at, colours[name], "o", _interval(kl), _interval(reward))
        axes.annotate(name, at, xytext=(7, 7), textcoords="offset points", color=INK)
    axes.margins(x=0.1, y=0.18)
    axes.set_xlabel("KL to reference, nats per answer")
    axes.set_ylabel("mean reward")
    return _plot(
        "Reward against KL",
        "What the gain cost: reward won (up) for distance moved from the reference (right), with 95 % intervals. "
        "Much KL for little reward is a warning.",
        figure,
    )


def _strip_plot(
    title: str,
    caption: str,
    unit: str,
    figures: Sequence[tuple[str, MeanFigure | None]],
    colours: dict[str, str],
    from_zero: bool = False,
) -> Plot | None:
    """One point with its interval a model, on a common axis."""
    known = [(name, figure) for name, figure in figures if figure is not None]
    if not known:
        return None
    canvas, axes = _canvas(rows=len(known))
    for row, (name, figure) in enumerate(known):
        _point(axes, (figure["mean"], row), colours[name], "o", x_interval=_interval(figure))
    if from_zero:
        axes.set_xlim(left=0)
    axes.set_xlabel(unit)
    _rows(axes, [name for name, _ in known])
    return _plot(title, f"{caption} Bars are 95 % intervals.", canvas)


def _canvas(rows: float) -> tuple[Figure, Axes]:
    """A small figure, so that its text keeps its size on a phone; no pyplot, hence no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 0.9 + 0.42 * rows), layout="constrained")
    return figure, figure.add_subplot()


def _rows(axes: Axes, names: list[str]) -> None:
    """Names down the left side, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _point(
    axes: Axes,
    at: tuple[float, float],
    colour: str,
    marker: str,
    x_interval: tuple[float, float] | None = None,
    y_interval: tuple[float, float] | None = None,
) -> None:
    """A point, with a bar along each axis whose interval is known."""
    style: dict[str, Any] = {"color": colour, "linewidth": 2, "solid_capstyle": "butt"}
    if x_interval:
        axes.plot(x_interval, (at[1], at[1]), **style)
    if y_interval:
        axes.plot((at[0], at[0]), y_interval, **style)
    axes.plot(*at, marker=marker, color=colour, markersize=7, linestyle="")


def _plot(title: str, caption: str, figure: Figure) -> Plot:
    """The figure as SVG that can stand inside a page: no prologue, no metadata, its own ids, the page's colours."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A style element inside an SVG would rule the whole page; the page's own sheet says the same for figures.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--plot-rule)")
    label = escape(f"{title}. The figures are in the table of models.")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return Plot(title, caption, Markup(svg))  # matplotlib escapes the text it draws


# Text.


def _decimals(value: float) -> int:
    return 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0


def _number(value: float, decimals: int | None = None) -> str:
    """Three or four significant figures, with a true minus sign and never a negative zero."""
    text = f"{value:z,.{_decimals(value) if decimals is None else decimals}f}"
    return text.replace("-", "−")


def _short(digest: str) -> str:
    """The first 12 digits of a digest in hex; anything else as it is."""
    return digest[:12] if re.fullmatch(r"[0-9a-f]{40,}", digest) else digest


def _plain(value: Any) -> str:
    """A setting as text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _together(text: str) -> str:
    """Figures that no line break may tear apart: "81 %", "71–88 %"."""
    return re.sub(r"(?<=\d)–(?=\d)", "–\u2060", text.replace(" %", "\u00a0%"))


def _markdown(text: str) -> str:
    """Text on one line with Markdown's and HTML's own characters made literal."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_markdown, cells)) + " |"
