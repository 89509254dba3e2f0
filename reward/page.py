"""What our report pages share: one style sheet, one template environment, plots that take the page's colours.

A page is one self-contained file without outside requests, and without scripts but the report's filter. Strangers and
models write its texts: all of them pass through Jinja's autoescaping or are drawn, and so escaped, by matplotlib.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from reward.statistics import MeanFigure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "–"

# Mid tones with at least 3:1 contrast on both the light and the dark page. The first recedes.
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
class Plot:
    """An inline SVG, its heading, how to read it, and its figures as a sentence for screen readers."""

    title: str
    caption: str
    svg: Markup


def environment() -> Environment:
    """Templates that escape what they are given, refuse unknown names, and write numbers as our pages do."""
    own = resources.files("reward")
    made = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: own.joinpath(name).read_text(encoding="utf-8")),  # what pages share
    )
    made.filters["number"] = number
    made.filters["units"] = together
    made.globals["style"] = Markup(own.joinpath("page.css").read_text(encoding="utf-8"))
    made.globals["missing"] = MISSING
    return made


# Text


def decimals(value: float) -> int:
    """Decimals that leave a value three or four significant figures."""
    return 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0


def number(value: float, places: int | None = None) -> str:
    """Three or four significant figures, with a true minus sign and never a negative zero."""
    text = f"{value:z,.{decimals(value) if places is None else places}f}"
    return text.replace("-", "−")


def together(text: str) -> str:
    """Figures that no line break may tear apart: "81 %", "71–88 %"."""
    return re.sub(r"(?<=\d)–(?=\d)", "–\u2060", text.replace(" %", "\u00a0%"))


# Plots


@contextmanager
def drawing() -> Iterator[None]:
    """The style of our plots, while they are drawn."""
    # The plotting library takes a second to load; tables and summaries do without.
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def canvas(rows: float) -> tuple[Figure, Axes]:
    """A small figure, so that its text keeps its size on a phone; no pyplot, hence no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 0.9 + 0.42 * rows), layout="constrained")
    return figure, figure.add_subplot()


def label_rows(axes: Axes, names: list[str]) -> None:
    """Names down the left side, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def point(
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


def as_plot(title: str, caption: str, figure: Figure, table: str) -> Plot:
    """The figure as SVG that can stand inside a page: no prologue, no metadata, its own ids, the page's colours.

    Args:
        table: where the figures stand as text, as it reads after "The figures are in".
    """
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
    label = escape(f"{title}. The figures are in {table}.")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return Plot(title, caption, Markup(svg))  # matplotlib escapes the text it draws


def interval_of(figure: MeanFigure) -> tuple[float, float] | None:
    """The two ends of a figure's interval, where they are known."""
    low, high = figure["low"], figure["high"]
    return None if low is None or high is None else (low, high)
