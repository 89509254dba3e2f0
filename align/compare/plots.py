"""The plots of the final page, as SVG that takes the page's own colours and stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from align.compare.schema import MeanFigure, ModelFigures, PpoCourse, Report, WinRateFigure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
class Plot:
    """An inline SVG, its heading, how to read it, and its figures as a sentence for screen readers."""

    title: str
    caption: str
    svg: Markup


def plots_of(report: Report) -> list[Plot]:
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
                _course_plot(report.get("ppo"), colours.get("ppo", COLOURS[3])),
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
        _point(axes, at, colours[name], "o", interval_of(kl), interval_of(reward))
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


def _course_plot(course: PpoCourse | None, colour: str) -> Plot | None:
    if course is None or len(course["score"]) < 2:
        return None
    figure, axes = _canvas(rows=4)
    kl, score = course["kl"], course["score"]
    axes.plot(kl, score, color=colour, linewidth=1.2, alpha=0.6)
    axes.plot(kl, score, color=colour, marker="o", markersize=4, linestyle="")
    for index, name in ((0, "first update"), (-1, "last update")):
        at = (kl[index], score[index])
        axes.plot(*at, color=colour, marker="o", markersize=8, linestyle="")
        axes.annotate(name, at, xytext=(7, 7), textcoords="offset points", color=INK)
    axes.margins(x=0.15, y=0.18)
    axes.set_xlabel("KL to reference, nats per answer")
    axes.set_ylabel("mean score")
    return _plot(
        "The course of ppo",
        "What ppo climbed, update by update: the mean score of its training answers (up) for the distance moved from "
        "the reference (right). A curve that bends over buys ever less reward for ever more KL.",
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
        _point(axes, (figure["mean"], row), colours[name], "o", x_interval=interval_of(figure))
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


def interval_of(figure: MeanFigure) -> tuple[float, float] | None:
    low, high = figure["low"], figure["high"]
    return None if low is None or high is None else (low, high)
