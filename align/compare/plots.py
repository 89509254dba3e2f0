"""The plots of the final page, as SVG that takes the page's own colours and stays text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.compare.schema import ModelFigures, OverOptimisation, PpoCourse, Report, WinRateFigure
from reward.page import COLOURS, INK, MARKERS, Plot, as_plot, canvas, drawing, interval_of, label_rows, point
from reward.statistics import MeanFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plots_of(report: Report) -> list[Plot]:
    """The plots of the first screens that have something to show, four at most, in reading order."""
    models = report["models"]
    judges = [judge["name"] for judge in report["judges"]]
    first = models[0]["name"] if models else "the first"
    colours = {model["name"]: COLOURS[i % len(COLOURS)] for i, model in enumerate(models)}
    with drawing():
        plots = [
            _win_plot(models, judges, colours, first),
            _reward_plot(models, judges, colours, report["reference"]),
            _ability_plot(models, colours, first),
            _strip_plot(
                "Answer length",
                f"Mean {report['length_unit']} per answer. Judges tend to like longer answers: read gains with this in "
                "mind.",
                f"{report['length_unit']} per answer",
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
        ]
        shown = [plot for plot in plots if plot is not None]
    # Where all five are there, strength says what the win rates say.
    return shown if len(shown) < 5 else [shown[0], shown[1], shown[3], shown[4]]


def plots_of_the_climb(report: Report) -> list[Plot]:
    """How ppo's reward was climbed: held-out prompts along the way, and the training's own course."""
    names = [model["name"] for model in report["models"]]
    colour = COLOURS[names.index("ppo") % len(COLOURS)] if "ppo" in names else COLOURS[3]
    with drawing():
        plots = [_climb_plot(report.get("overoptimisation")), _course_plot(report.get("ppo"), colour)]
    return [plot for plot in plots if plot is not None]


def _win_plot(models: Sequence[ModelFigures], judges: list[str], colours: dict[str, str], first: str) -> Plot | None:
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
    axes.set_xlabel(f"% of prompts preferred over {first}")
    label_rows(axes, [model["name"] for model in compared])
    if len(judges) > 1:
        for i, judge in enumerate(judges):
            axes.plot([], [], linestyle="", marker=MARKERS[i % len(MARKERS)], color=INK, label=judge)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1, borderaxespad=0, handletextpad=0.2)
    return _plot(
        f"Win rate over {first}",
        "Share of held-out prompts on which the answer was preferred, with 95 % interval. "
        f"Right of the dashed line is better than {first}; a bar across the line settles nothing.",
        figure,
    )


def _reward_plot(
    models: Sequence[ModelFigures], judges: Sequence[str], colours: dict[str, str], reference: str | None
) -> Plot | None:
    """By the judge that gives scores and comes first; the reference stands at 0."""
    for judge in judges:
        points = [(model["name"], model["kl"], model.get("scores", {}).get(judge)) for model in models]
        if any(kl and score for _, kl, score in points):
            break
    else:
        return None
    figure, axes = canvas(rows=4)
    for name, kl, score in points:
        if score is None or (kl is None and name != reference):
            continue
        at = (kl["mean"] if kl else 0.0, score["mean"])
        point(axes, at, colours[name], "o", interval_of(kl) if kl else None, interval_of(score))
        axes.annotate(name, at, xytext=(7, 7), textcoords="offset points", color=INK)
    axes.margins(x=0.15, y=0.18)
    axes.set_xlabel("KL to reference, nats per answer")
    axes.set_ylabel("mean score")
    return _plot(
        "Score against KL",
        f"What the gain cost: score won by the {judge} (up) for distance moved from the reference (right), with 95 % "
        "intervals. Much KL for little score is a warning.",
        figure,
    )


def _ability_plot(models: Sequence[ModelFigures], colours: dict[str, str], first: str) -> Plot | None:
    known = [(model["name"], model["ability"]) for model in models if "ability" in model]
    if not known:
        return None
    figure, axes = canvas(rows=len(known))
    for row, (name, ability) in enumerate(known):
        point(axes, (ability["strength"], row), colours[name], "o", x_interval=(ability["low"], ability["high"]))
    axes.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlabel(f"strength in logits above {first}")
    label_rows(axes, [name for name, _ in known])
    return _plot(
        "Strength of all models",
        "Bradley-Terry strengths from every pair of models on every prompt, with 95 % intervals; 1 logit is a win rate "
        "of 73 %.",
        figure,
    )


def _climb_plot(climb: OverOptimisation | None) -> Plot | None:
    """What ppo climbed above, the held-out judge below, over one KL axis: their units differ."""
    if climb is None or len(climb["checkpoints"]) < 2:
        return None
    from matplotlib.figure import Figure

    points, kl = climb["checkpoints"], [each["kl"]["mean"] for each in climb["checkpoints"]]
    golds = [gold for each in points if (gold := each["gold"]) is not None]
    curve = climb["best_of_n"]
    sides = [(climb["proxy_name"], COLOURS[2], [each["proxy"] for each in points], curve and curve["proxy"])]
    if climb["gold_name"] is not None and len(golds) == len(points):
        sides.append((climb["gold_name"], COLOURS[1], golds, curve and curve["gold"]))
    figure = Figure(figsize=(4.4, 0.9 + 1.7 * len(sides)), layout="constrained")
    panels = figure.subplots(len(sides), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, colour, figures, best) in zip(panels, sides, strict=True):
        axes.plot(kl, [each["mean"] for each in figures], color=colour, linewidth=1.2, alpha=0.7)
        for x, each in zip(kl, figures, strict=True):
            point(axes, (x, each["mean"]), colour, "o", y_interval=interval_of(each))
        if curve is not None and best:
            axes.plot(curve["kl"], best, color=colour, linestyle=(0, (4, 3)))
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylabel("mean score")
        axes.margins(x=0.1, y=0.15)
        for index, style in ((climb["parting"], (0, (4, 3))), (climb["recommended"], (0, (1, 2)))):
            if index is not None:
                axes.axvline(kl[index], color=INK, linewidth=0.9, linestyle=style)
    for index, word, height in ((climb["parting"], "they part", 0.16), (climb["recommended"], "ship this", 0.03)):
        if index is not None:
            where = {"xycoords": ("data", "axes fraction"), "xytext": (4, 0), "textcoords": "offset points"}
            panels[-1].annotate(word, (kl[index], height), color=INK, **where)
    panels[-1].set_xlabel("KL to reference, nats per answer")
    dashed = " Dashed curves: the best of n answers of the reference by the first." if curve else ""
    return as_plot(
        "Along the training, on held-out prompts",
        f"What ppo climbed (above) and a judge it never saw (below), at every policy kept.{dashed} Where only the "
        "first still rises, the policy has learned the reward, not the task.",
        figure,
        "the table of policies along the way",
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
