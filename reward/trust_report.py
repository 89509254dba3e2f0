"""The trust report as one page: the verdict first, then the checks, four plots, every figure as text, and the method.

Names of sources and annotators come from data; all text reaches the page through Jinja's autoescaping, and a content
security policy stands behind it. The same figures give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from reward.page import (
    COLOURS,
    INK,
    MISSING,
    Plot,
    as_plot,
    canvas,
    drawing,
    environment,
    interval_of,
    label_rows,
    number,
    point,
)
from reward.statistics import MeanFigure, percent, percent_range
from reward.trust_gate import Check, refusals
from reward.trust_schema import CalibrationSide, CorrelationFigure, Figures, Group, Groups

GREY, BLUE, ORANGE, GREEN = COLOURS[:4]
DASHES: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3))}


@dataclass(frozen=True)
class Table:
    """Figures as text; the first cell of a row is its heading. `note`: what to know, or why something is missing."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def render_html(figures: Figures, checks: Sequence[Check], verdict: str) -> str:
    """The page as one string of HTML."""
    template = resources.files("reward").joinpath("trust.html").read_text(encoding="utf-8")
    # Refusals, then warnings, then what passed; in reading order within each.
    ordered = sorted(checks, key=lambda check: (check.passed, check.level == "warn"))
    return environment().from_string(template).render(
        figures=figures,
        verdict=verdict,
        refused=bool(refusals(checks)),
        checks=[(check, *_marks(check), _measured(check, check.figure), _measured(check, check.threshold))
                for check in ordered],
        plots=plots_of(figures, checks),
        tables=_tables(figures),
    )  # fmt: skip


def _marks(check: Check) -> tuple[str, str]:
    """(word, CSS class) of a check's outcome."""
    if check.passed:
        return "passed", "better"
    return ("refused", "worse") if check.level == "refuse" else ("warning", "warned")


def _measured(check: Check, value: float | None) -> str:
    """A figure or threshold of a check in its unit."""
    if value is None:
        return MISSING
    if check.name == "pairs":
        return f"{value:.0f}"
    if check.name == "length correlation":
        return number(value)
    if check.name == "calibration" or check.name.startswith("against "):
        return f"{number(100 * value, 1)} points"
    return percent(value)


# Plots


def plots_of(figures: Figures, checks: Sequence[Check]) -> list[Plot]:
    """Reliability, accuracy by length gap, reward against length, and probes, where there is something to show."""
    with drawing():
        drawn = (_reliability(figures), _by_length(figures), _reward_length(figures), _probes(figures, checks))
        return [plot for plot in drawn if plot is not None]


def _reliability(figures: Figures) -> Plot | None:
    drawn, axes = canvas(rows=5)
    axes.plot((50, 100), (50, 100), **DASHES)
    calibration = figures["calibration"]
    for side, name, colour, marker in (
        (calibration["before"], "as it is", GREY, "o"),
        (calibration["after"], "after scaling", BLUE, "s"),
    ):
        if side is None:
            continue
        axes.plot([], [], linestyle="", marker=marker, color=colour, label=name)
        for each in side["bins"]:
            at = (100 * each["confidence"], 100 * each["accuracy"])
            point(axes, at, colour, marker, y_interval=(100 * each["low"], 100 * each["high"]))
    axes.set_xlim(49, 101)
    axes.set_ylim(-2, 102)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("right, %")
    axes.legend(loc="lower right", borderaxespad=0.2, handletextpad=0.2)
    return _plot(
        "Reliability",
        "How often it is right (up) when it is so sure (right): on the dashed line, confidence means what it says. "
        "After scaling, each half of the prompts is measured with the temperature of the other half.",
        drawn,
    )


def _by_length(figures: Figures) -> Plot | None:
    rows = figures["by_length"]["rows"]
    if not rows:
        return None
    drawn, axes = canvas(rows=len(rows))
    for place, row in enumerate(rows):
        _share_point(axes, row["accuracy"], place, BLUE)
    axes.axvline(50, **DASHES)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("right, %")
    label_rows(axes, [row["name"] for row in rows])
    return _plot(
        "Accuracy by length gap",
        "Fifths of the pairs by how many times as long as the rejected answer the chosen one is, with 95 % intervals. "
        "A model that goes by length is right at one end and wrong at the other.",
        drawn,
    )


def _reward_length(figures: Figures) -> Plot | None:
    drawn, axes = canvas(rows=5)
    for chosen, name, colour, marker in ((True, "chosen", BLUE, "o"), (False, "rejected", ORANGE, "s")):
        own = [each for each in figures["length"]["points"] if each["chosen"] is chosen]
        lengths, rewards = [each["length"] for each in own], [each["reward"] for each in own]
        axes.plot(lengths, rewards, linestyle="", marker=marker, markersize=4, alpha=0.55, color=colour, label=name)
    axes.set_xlabel("characters")
    axes.set_ylabel("reward")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handletextpad=0.2)
    return _plot(
        "Reward against length",
        "Answers to held-out prompts. A cloud that rises from left to right pays for length.",
        drawn,
    )


def _probes(figures: Figures, checks: Sequence[Check]) -> Plot | None:
    rows = [(probe, probe["raised"]) for probe in figures["probes"] if probe["raised"]]
    if not rows:
        return None
    drawn, axes = canvas(rows=len(rows) + 1)
    for kind, colour in (("empty of use", BLUE), ("padding", GREY)):
        axes.plot([], [], linestyle="", marker="o", color=colour, label=kind)
        for place, (probe, raised) in enumerate(rows):
            if probe["kind"] == kind and raised:
                _share_point(axes, raised, place, colour)
    for limit in sorted({check.threshold for check in checks if check.name.startswith("probe ")}):
        axes.axvline(100 * limit, **DASHES)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("% of answers whose reward rises")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, handletextpad=0.2)
    label_rows(axes, [probe["name"] for probe, _ in rows])
    return _plot(
        "Probes",
        "Chosen answers changed in ways that must not pay, with 95 % intervals. Right of the dashed line most rise.",
        drawn,
    )


def _share_point(axes: Any, share: MeanFigure, row: int, colour: str) -> None:
    ends = interval_of(share)
    bar = (100 * ends[0], 100 * ends[1]) if ends else None
    point(axes, (100 * share["mean"], row), colour, "o", x_interval=bar)


def _plot(title: str, caption: str, figure: Any) -> Plot:
    return as_plot(title, caption, figure, "the tables below")


# Tables


def _tables(figures: Figures) -> list[Table]:
    return [
        _floors_table(figures),
        _calibration_table(figures),
        _length_table(figures),
        _groups_table("By length gap", "Chosen over rejected, in characters", figures["by_length"]),
        _groups_table("By source", "Source", figures["by_source"]),
        _groups_table("By annotator", "Annotator, on their own votes", figures["by_annotator"]),
        _groups_table("By margin", "Steps of strength, 0 to 3", figures["by_margin"]),
        _probes_table(figures),
        _spread_table(figures),
    ]


def _floors_table(figures: Figures) -> Table:
    rows = [["This model", *_cells(figures["accuracy"]), MISSING, MISSING]]
    missing = []
    for row in figures["baselines"]:
        accuracy, difference, p = row["accuracy"], row["difference"], row["p"]
        if accuracy is None or difference is None:
            missing.append(f"{row['name'].capitalize()}: {row['rule']}")
            continue
        ends = interval_of(difference)
        gap = f"{_points(difference['mean'])}" + (f" ({_points(ends[0])} to {_points(ends[1])})" if ends else "")
        rows.append([f"{row['name'].capitalize()}: {row['rule']}", *_cells(accuracy), gap, MISSING if p is None else
                     f"{p:.2g}"])  # fmt: skip
    ceiling = figures["ceiling"]
    if ceiling["model"]:
        rows.append(["This model with one person's vote", *_cells(ceiling["model"]), MISSING, MISSING])
    if ceiling["agreement"]:
        rows.append(["Two people with each other", *_cells(ceiling["agreement"]), MISSING, MISSING])
    if ceiling["why"]:
        missing.append(f"Agreement of people: {ceiling['why']}.")
    head = ["", "Right", "95 % interval", "Model minus this, points", "McNemar's p"]
    return Table("Ceiling and floors", head, rows, " ".join(missing))


def _calibration_table(figures: Figures) -> Table:
    calibration = figures["calibration"]

    def row(name: str, side: CalibrationSide) -> list[str]:
        return [name, _points(side["error"]), _points(side["noise"]), number(side["brier"], 3), str(len(side["bins"]))]

    rows = [row("As it is", calibration["before"])]
    if calibration["after"]:
        rows.append(row("After scaling, cross-fitted", calibration["after"]))
    note = f"Temperature fitted on all held-out pairs: {number(calibration['temperature'])}."
    if calibration["why"]:
        note += f" After scaling: {calibration['why']}."
    head = ["", "Calibration error, points", "Of that by chance, points", "Brier score", "Bins"]
    return Table("Calibration", head, rows, note)


def _length_table(figures: Figures) -> Table:
    length = figures["length"]
    rows = [
        ["Correlation within prompts", *_correlation(length["within"])],
        ["Correlation over all answers", *_correlation(length["overall"])],
    ]
    kinds: tuple[Group | None, ...] = (length["matched"], length["chosen_longer"], length["chosen_shorter"])
    rows += [[f"Right, {row['name']}", *_cells(row["accuracy"]), str(row["pairs"])] for row in kinds if row]
    if length["beyond"]:
        rows.append(["Right, length taken out", *_cells(length["beyond"]), MISSING])
    rewards = figures["rewards"]
    spread = number(rewards["deviation"])
    note = f"Held-out rewards have mean {number(rewards['mean'])} and standard deviation {spread}."
    return Table("Length, in characters", ["", "Figure", "95 % interval", "Pairs"], rows, note)


def _groups_table(title: str, first: str, groups: Groups) -> Table:
    rows = [[row["name"], *_cells(row["accuracy"]), str(row["pairs"])] for row in groups["rows"]]
    note = f"{groups['why'].capitalize()}." if groups["why"] else ""
    return Table(title, [first, "Right", "95 % interval", "Pairs"], rows, note)


def _probes_table(figures: Figures) -> Table:
    rows = []
    for probe in figures["probes"]:
        change = number(probe["change"]["mean"]) if probe["change"] else MISSING
        name = f"{probe['name'].capitalize()} ({probe['kind']}): {probe['sentence']}"
        rows.append([name, *_cells(probe["raised"]), change, str(probe["n"])])
    for edit in figures["edits"]:
        name = f"{edit['name'].capitalize()} (edit): {edit['sentence']}"
        rows.append([name, *_cells(edit["flipped"]), MISSING, str(edit["n"])])
    head = ["", "Rises; order flips", "95 % interval", "Mean change, standard deviations", "Answers; pairs"]
    return Table("Probes and edits", head, rows)


def _spread_table(figures: Figures) -> Table:
    spread = figures["spread"]
    rows = []
    if spread["inside"] is not None:
        rows.append(["The chosen answer", number(spread["inside"]), MISSING, MISSING])
    rows += [[row["sentence"], number(row["mean"]), *_cells(row["wider"])] for row in spread["outside"]]
    head = ["", "Mean spread", "Wider than on the chosen answer", "95 % interval"]
    return Table("Spread of the heads", head, rows, f"{spread['why'].capitalize()}." if spread["why"] else "")


def _cells(share: MeanFigure | None) -> list[str]:
    """A share and its interval."""
    if share is None:
        return [MISSING, MISSING]
    ends = interval_of(share)
    return [percent(share["mean"]), percent_range(*ends) if ends else MISSING]


def _correlation(figure: CorrelationFigure) -> list[str]:
    rho, low, high = figure["rho"], figure["low"], figure["high"]
    ends = MISSING if low is None or high is None else f"{number(low)} to {number(high)}"
    return [MISSING if rho is None else number(rho), ends, MISSING]


def _points(share: float) -> str:
    return number(100 * share, 1)
