"""The report's tables, built once and shown on the page, in Markdown and in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from align.compare.schema import ModelFigures, Report, ShareFigure, WinRateFigure
from align.compare.statistics import percent, percent_range, standing
from reward.page import MISSING, decimals, interval_of, number
from reward.statistics import MeanFigure


@dataclass(frozen=True)
class Column:
    """A heading; unit and direction are the small print below it, `note` the fine print on hover."""

    title: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One figure as text. `detail` is its interval, `mark` what that settles, `note` the fine print on hover."""

    text: str
    detail: str = ""
    mark: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One model."""

    name: str
    path: str
    cells: list[Cell] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """Models down, figures across; columns without any figure are left out."""

    columns: list[Column]
    rows: list[Row]

    @property
    def upright(self) -> View:
        """As the terminal and Markdown show it."""
        rows = [(Column(row.name, note=row.path), row.cells) for row in self.rows]
        return View("Model", self.columns, rows)

    @property
    def turned(self) -> View:
        """Figures down, models across: for many figures of few models."""
        heads = [Column(row.name, note=row.path) for row in self.rows]
        rows = [(column, [row.cells[place] for row in self.rows]) for place, column in enumerate(self.columns)]
        return View("Figure", heads, rows, "turned")


@dataclass(frozen=True)
class View:
    """A table as it stands on the page: the corner's word, headings across, and a heading with its cells each row."""

    corner: str
    heads: list[Column]
    rows: list[tuple[Column, list[Cell]]]
    kind: str = ""


Filled = tuple[Column, Callable[[ModelFigures], Cell]]


def gains(report: Report) -> Table:
    """What every model won: win rates by judge, at equal length, strength, mean scores, and the distance it moved."""
    judges = [judge["name"] for judge in report["judges"]]
    first = report["models"][0]["name"] if report["models"] else "the first model"
    columns: list[Filled] = [
        (Column(f"Win rate, {judge}", f"over {first}"), partial(_win, judge=judge)) for judge in judges
    ]
    equal = [judge for judge in judges if any(judge in model.get("equal_length", {}) for model in report["models"])][:1]
    columns += [(Column("At equal length", f"win rate, {judge}"), partial(_equal, judge=judge)) for judge in equal]
    columns.append((Column("Strength", f"logits above {first}"), _strength))
    columns += [
        (
            Column(f"Score, {judge}", "mean"),
            partial(_score, judge=judge),
        )
        for judge in judges
    ]
    columns.append((Column("KL", "nats per answer"), partial(_with_error, key="kl")))
    return _table(report, columns, keep=len(judges))


def costs(report: Report) -> Table:
    """What it cost: distance, length, knowledge and variety."""
    unit = report["length_unit"]
    columns: list[Filled] = [
        (Column("KL", "nats per answer, ± standard error"), partial(_with_error, key="kl")),
        (Column("KL per token", "nats"), partial(_with_error, key="kl_per_token")),
        (Column("Entropy", "nats per token"), lambda m: _mean(m["entropy"], "No model answered.")),
        (Column("Answer length", unit), lambda m: _mean(m["length"], "No answers were measured.")),
        (Column("Finished", "with the stop token"), _finished),
        (
            Column("Perplexity", "held-out demonstrations, lower is better"),
            lambda m: _mean(m["perplexity"], "There were no held-out demonstrations, or its tokens are others."),
        ),
    ]
    texts: list[Filled] = [
        (Column("Distinct-1", "different words"), lambda m: _plain(m, "distinct_1")),
        (Column("Distinct-2", "different word pairs"), lambda m: _plain(m, "distinct_2")),
        (
            Column("Self-similarity", "near 1 is collapse"),
            lambda m: _mean(m["text"]["self_similarity"] if "text" in m else None, "Fewer than two answers."),
        ),
        (Column("Refusals"), lambda m: _share(m["text"]["refusals"] if "text" in m else None)),
        (Column("Empty"), lambda m: _share(m["text"]["empty"] if "text" in m else None)),
        (Column("BLEU", "0 to 100, to demonstrations"), lambda m: _plain(m, "bleu")),
        (
            Column("ROUGE-L", "0 to 1, to demonstrations"),
            lambda m: _mean(m["text"]["rouge_l"] if "text" in m else None, "No prompt has a demonstration."),
        ),
    ]
    return _table(report, columns + texts)


def tasks(report: Report) -> Table:
    """Accuracy and F1 on tasks with labels, and what lm-eval measured."""
    names = sorted({name for model in report["models"] for name in model.get("tasks", {})})
    metrics = sorted({name for model in report["models"] for name in model.get("lm_eval", {})})
    columns: list[Filled] = []
    for name in names:
        columns.append((Column(name, "accuracy"), partial(_accuracy, task=name)))
        columns.append((Column(name, "macro F1"), partial(_macro, task=name, key="f1")))
        columns.append((Column(name, "precision"), partial(_macro, task=name, key="precision")))
        columns.append((Column(name, "recall"), partial(_macro, task=name, key="recall")))
    columns += [(Column(name, "lm-eval"), partial(_lm_eval, metric=name)) for name in metrics]
    return _table(report, columns)


def _table(report: Report, columns: list[Filled], keep: int = 0) -> Table:
    """The first `keep` columns stay though they be empty."""
    models = report["models"]
    filled = [(column, [cell(model) for model in models]) for column, cell in columns]
    shown = [
        (column, cells)
        for place, (column, cells) in enumerate(filled)
        if place < keep or any(cell.text != MISSING for cell in cells)
    ]
    rows = [Row(model["name"], model["path"], [cells[i] for _, cells in shown]) for i, model in enumerate(models)]
    return Table([column for column, _ in shown], rows)


def _win(model: ModelFigures, judge: str) -> Cell:
    figure: WinRateFigure | None = model.get("win_rate", {}).get(judge)
    if figure is None:
        is_first = not model.get("win_rate")
        return Cell(MISSING, note="The others are compared with this model." if is_first else f"Not judged by {judge}.")
    unjudged = f", {figure['unjudged']} without a verdict" if figure["unjudged"] else ""
    return Cell(
        percent(figure["rate"]),
        percent_range(figure["low"], figure["high"]),
        standing(figure["low"], figure["high"]),
        f"{figure['wins']} won, {figure['ties']} tied, {figure['losses']} lost of {figure['n']} prompts{unjudged}; "
        f"p = {figure['p']:.3g}, {figure['p_adjusted']:.3g} after correction for all comparisons",
    )


def _equal(model: ModelFigures, judge: str) -> Cell:
    figure = model.get("equal_length", {}).get(judge)
    interval = interval_of(figure) if figure else None
    if figure is None or interval is None:
        return Cell(MISSING, note="The others are compared with this model.")
    note = "The win rate, were its answers as long as the first model's: a logistic model with a length term."
    return Cell(percent(figure["mean"]), percent_range(*interval), standing(*interval), note)


def _strength(model: ModelFigures) -> Cell:
    ability = model.get("ability")
    if ability is None or ability["low"] == ability["high"]:
        return Cell(MISSING, note="The others are measured from this model.")
    return Cell(
        number(ability["strength"]),
        f"{number(ability['low'])} to {number(ability['high'])}",
        note="Bradley-Terry, from every pair of models on every prompt.",
    )


def _score(model: ModelFigures, judge: str) -> Cell:
    return _mean(model.get("scores", {}).get(judge), f"Not every answer has a score by {judge}.")


def _lm_eval(model: ModelFigures, metric: str) -> Cell:
    return _mean(model.get("lm_eval", {}).get(metric), "Not measured.")


def _mean(figure: MeanFigure | None, why_missing: str) -> Cell:
    if figure is None:
        return Cell(MISSING, note=why_missing)
    interval = interval_of(figure)
    if interval is None:
        return Cell(number(figure["mean"]), note="One prompt only, or no error was given.")
    places = decimals(figure["mean"])
    return Cell(
        number(figure["mean"]),
        f"{number(interval[0], places)} to {number(interval[1], places)}",
        note=f"Mean over {figure['n']}",
    )


def _with_error(model: ModelFigures, key: Literal["kl", "kl_per_token"]) -> Cell:
    figure = model[key]
    if figure is None:
        return Cell(MISSING, note="Not defined for this model, or its answers were not sampled at temperature 1.")
    error, places = figure["standard_error"], 3 if key == "kl_per_token" else decimals(figure["mean"])
    text = number(figure["mean"], places)
    if error is None:
        return Cell(text, note="One prompt only: its error is unknown.")
    return Cell(f"{text} ± {number(error, places)}", note=f"Mean over {figure['n']} answers")


def _finished(model: ModelFigures) -> Cell:
    if model["finished"] is None:
        return Cell(MISSING, note="The answers come from a file.")
    return Cell(percent(model["finished"]))


def _plain(model: ModelFigures, key: str) -> Cell:
    value = model.get("text", {}).get(key)
    return Cell(MISSING, note="No prompt has a demonstration.") if value is None else Cell(number(float(str(value))))


def _share(figure: ShareFigure | None) -> Cell:
    if figure is None:
        return Cell(MISSING, note="Not measured.")
    return Cell(percent(figure["rate"]), percent_range(figure["low"], figure["high"]))


def _accuracy(model: ModelFigures, task: str) -> Cell:
    figure = model.get("tasks", {}).get(task)
    return _share(figure["accuracy"] if figure else None)


def _macro(model: ModelFigures, task: str, key: str) -> Cell:
    figure = model.get("tasks", {}).get(task)
    value = figure.get(key) if figure else None
    return Cell(MISSING, note="Its labels are no classes.") if value is None else Cell(number(float(str(value))))


def one_line(cell: Cell) -> str:
    """A cell as text on one line."""
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text
