"""The plots of the final page, as SVG that takes the page's own colours and stays text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.compare.schema import ModelFigures, PpoCourse, Report, WinRateFigure
from reward.page import COLOURS, INK, MARKERS, Plot, as_plot, canvas, drawing, interval_of, label_rows, point
from reward.statistics import MeanFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plots_of(report: Report) -> list[Plot]:
    """The plots that have something to show, in reading order."""
    models = report["models"]
    colours = {model["name"]: COLOURS[i % len(COLOURS)] for i, model in enumerate(models)}
    with drawing():
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
    figure, axes = canvas(rows=len(compared) * max(1, len(judges) * 0.7) + (len(judges) > 1))
    for row, model in enumerate(compared):
        for i, judge in enumerate(judges):
            won: WinRateFigure | None = model["win_rate"].get(judge)
            if won is None:
                continue
            offset = 0.0 if len(judges) == 1 else 0.5 * (i / (len(judges) - 1) - 0.5)
            point(
                axes,
                (100 * won["rate"], row + offset),
                colours[model["name"]],
                MARKERS[i % len(MARKERS)],
                x_interval=(100 * won["low"], 100 * won["high"]),
            )
    axes.axvline(50, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of prompts preferred over base")
    label_rows(axes, [model["name"] for model in compared])
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
    figure, axes = canvas(rows=4)
    for name, kl, reward in points:
        if kl is None or reward is None:
            continue
        at = (kl["mean"], reward["mean"])
        point(axes, at, colours[name], "o", interval_of(kl), interval_of(reward))
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
    figure, axes = canvas(rows=4)
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
    drawn, axes = canvas(rows=len(known))
    for row, (name, figure) in enumerate(known):
        point(axes, (figure["mean"], row), colours[name], "o", x_interval=interval_of(figure))
    if from_zero:
        axes.set_xlim(left=0)
    axes.set_xlabel(unit)
    label_rows(axes, [name for name, _ in known])
    return _plot(title, f"{caption} Bars are 95 % intervals.", drawn)


def _plot(title: str, caption: str, figure: Figure) -> Plot:
    return as_plot(title, caption, figure, "the table of models")
