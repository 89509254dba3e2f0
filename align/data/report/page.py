"""The data report as one page: what to look at first, then every file, then what training on it costs.

All texts come from data. They reach the page through Jinja's autoescaping or are drawn, and so escaped, by matplotlib;
a content security policy stands behind both. The same figures give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from markupsafe import Markup

from align import progress
from align.data.report.findings import percent
from align.data.report.schema import SAMPLED, FileFigures, Group, Lengths, Limit, Pairs, StepFigures, Told
from align.inspect.tokens import inert
from reward.page import COLOURS, INK, Plot, as_plot, drawing, environment

BLUE = COLOURS[1]
SINGULAR = {"demonstrations": "demonstration", "prompts": "prompt", "preferences": "pair"}
OF = {"prompt": "Prompt", "answer": "Answer", "row": "Prompt and answer together"}


def render_html(told: Told) -> str:
    """The page as one string of HTML."""
    templates = environment()
    templates.finalize = _inert
    templates.filters |= {"percent": percent, "duration": progress.duration}
    template = resources.files("align.data.report").joinpath("report.html").read_text(encoding="utf-8")
    return templates.from_string(template).render(
        told=told,
        files=[(file, plots_of(file), _groups(file), _doubles(file), _changes(file)) for file in told["files"]],
        rows=sum(file["rows"] for file in told["files"]),
        agreement=agreement,
        most=SAMPLED,
    )


def _inert(value: Any) -> Any:
    """What the template writes: text of the data without control characters, such as those that turn a line round."""
    return inert(value, kept=" \n\t\u00a0\u2060") if isinstance(value, str) and not isinstance(value, Markup) else value


# Tables


def _groups(file: FileFigures) -> list[tuple[str, str, list[Group]]]:
    """(title, what is counted, groups) of the tables that have something to show."""
    tables = [
        ("Sources", "Rows", file["sources"]),
        ("Languages", "Sampled rows", file["languages"]),
        ("How answers begin", "Sampled answers", file["openings"]),
    ]
    return [table for table in tables if table[2]]


def _doubles(file: FileFigures) -> list[dict[str, str]]:
    """Examples of duplicates: what was kept and what was left out for it."""
    return [dict(each) for step in file["steps"] for each in step["examples"] if "kept" in each]


def _changes(file: FileFigures) -> list[tuple[StepFigures, list[tuple[str, str]]]]:
    """By step, examples of what was changed, as (before, after), or left out, as (reason, text)."""
    found = []
    for step in file["steps"]:
        keys = [("before", "after") if "before" in each else ("reason", "text") for each in step["examples"]]
        pairs = [
            (each[first], each[second])
            for each, (first, second) in zip(step["examples"], keys, strict=True)
            if first in each and second in each
        ]
        if pairs:
            found.append((step, pairs))
    return found


def agreement(pairs: Pairs) -> str:
    """What labels of one pair say about each other, as a sentence."""
    if not pairs["labelled_again"]:
        return "No pair is labelled more than once."
    return (
        f"{pairs['labelled_again']:,} pairs are labelled more than once; the labels of {pairs['agreeing']:,} of them "
        f"({percent(pairs['agreement'] or 0)}) agree. Equal copies may have been left out before."
    )


# Plots


def plots_of(file: FileFigures) -> list[Plot]:
    """How long prompts, answers and whole rows are; one plot, a panel for each."""
    if not file["lengths"]:
        return []
    with drawing():
        return [_lengths(file)]


def _lengths(file: FileFigures) -> Plot:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    panels = file["lengths"]
    figure = Figure(figsize=(4.8, 0.6 + 1.15 * len(panels)), layout="constrained")
    every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    edges = max((lengths["edges"] for lengths in panels), key=len)
    limits = [limit["limit"] for limit in file["limits"]]
    # The first bin begins at 0, which a scale of doubles does not have: it is drawn as wide as the others.
    left, right = edges[1] / 2, max([edges[-1], *(2 * limit for limit in limits if limit < 4 * edges[-1])])
    for axes, lengths in zip(every, panels, strict=True):
        _bars(axes, lengths, left)
        _mark_limits(axes, [limit for limit in file["limits"] if limit["of"] == lengths["of"]], right)
        axes.set_title(OF[lengths["of"]], loc="left", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xlim(left, right)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("%")
    ticks = [edges[1]]
    while ticks[-1] < right:
        ticks.append(2 * ticks[-1])
    ticks = ticks if len(ticks) < 9 else ticks[::2]
    every[-1].xaxis.set_major_locator(FixedLocator(ticks))
    every[-1].xaxis.set_minor_locator(NullLocator())
    every[-1].set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    every[-1].set_xlabel(file["unit"])
    dashed = " Dashed: the longest that a stage takes; what is right of it is left out." if limits else ""
    return as_plot(
        f"Lengths of {file['key']}",
        f"Share of {file['sampled']:,} sampled rows by length in {file['unit']}. From one bar to the next, lengths "
        f"double.{dashed}",
        figure,
        f"the table of lengths of {file['key']}",
    )


def _bars(axes: Any, lengths: Lengths, left: float) -> None:
    starts = [max(edge, left) for edge in lengths["edges"][:-1]]
    widths = [end - start for start, end in zip(starts, lengths["edges"][1:], strict=True)]
    heights = [100 * count / lengths["n"] for count in lengths["counts"]]
    axes.bar(starts, heights, widths, align="edge", color=BLUE, edgecolor="none", linewidth=0)


def _mark_limits(axes: Any, limits: Sequence[Limit], right: float) -> None:
    """One line for limits of the same length."""
    by_limit: dict[int, list[str]] = {}
    for limit in limits:
        by_limit.setdefault(limit["limit"], []).append(limit["key"].partition(".")[0])
    for at, stages in by_limit.items():
        if at < right:
            axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            where = {"xycoords": ("data", "axes fraction"), "xytext": (-3, -3), "textcoords": "offset points"}
            axes.annotate(", ".join(stages), (at, 1), ha="right", va="top", color=INK, fontsize=9, **where)
