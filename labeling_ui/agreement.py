"""How far annotators agree, whether one of them guesses, and whether the screen's side decides: pure functions.

Data are units (items) with the values their annotators gave: a list of `{annotator: value}`, one for each unit. An
annotator who did not judge a unit is not in it.

Sources: Cohen (1960, 1968); Fleiss (1971); Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011); Wald's
sequential probability ratio test (1945); Wilson's interval (1927).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Units = Sequence[Mapping[str, int]]
# How many units hold which values: all that a figure needs, and short, however many units there are.
Tally = Mapping[tuple[int, ...], int]
Level = Literal["nominal", "ordinal", "interval"]
Weights = Literal["none", "linear", "quadratic"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval; `units`: on how many it rests. All NaN where there is nothing to compute."""

    value: float
    low: float
    high: float
    units: int

    def words(self) -> str:
        """What the figure means, for someone who has never heard of it."""
        if not self.units:
            return "not enough labels by two people on the same item"
        if math.isnan(self.value):
            return f"everyone gave one and the same value on {self.units} items: chance would look alike"
        if self.high < 0:
            return f"less agreement than by chance ({self.units} items): some may read the scale the other way round"
        steps = [(0.8, "strong agreement"), (0.6, "good agreement"), (0.4, "moderate agreement")]
        steps += [(0.2, "weak agreement"), (-math.inf, "hardly more than chance")]
        reading = next(words for least, words in steps if self.value >= least)
        # Written so that an interval that is not known rules out nothing.
        if not self.low > 0:
            return f"{reading}, and chance alone cannot be ruled out on {self.units} items"
        return f"{reading} ({self.units} items; chance would be 0)"


def cohen(pairs: Sequence[tuple[int, int]], weights: Weights = "none") -> float:
    """Cohen's kappa of two annotators' values on the same units: 1 agreement, 0 chance.

    Args:
        weights: how much a disagreement counts by its distance on the scale; none: all alike.
    """
    if not pairs:
        return math.nan
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    cost = {"none": lambda d: float(d != 0), "linear": abs, "quadratic": lambda d: d * d}[weights]
    seen = sum(cost(a - b) for a, b in pairs) / len(pairs)
    chance = sum(m * n * cost(a - b) for a, m in left.items() for b, n in right.items()) / len(pairs) ** 2
    return 1 - seen / chance if chance else math.nan


def pairwise_cohen(units: Units, weights: Weights = "none") -> dict[tuple[str, str], float]:
    """Cohen's kappa of every two annotators with at least two units in common."""
    shared: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for unit in units:
        names = sorted(unit)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                shared.setdefault((a, b), []).append((unit[a], unit[b]))
    return {names: cohen(pairs, weights) for names, pairs in sorted(shared.items()) if len(pairs) >= 2}


def fleiss(units: Units) -> float:
    """Fleiss' kappa of units with equally many values each; those with fewer than two are left out.

    Where the numbers differ, each unit's own counts are used, as the formula allows.
    """
    return _fleiss(_tally(units))


def krippendorff(units: Units, level: Level = "nominal") -> float:
    """Krippendorff's alpha: any number of annotators, values missing, on a nominal, ordinal or interval scale."""
    return _alpha(_tally(units), level)


def _tally(units: Units) -> Tally:
    return Counter(_values(unit) for unit in units if len(unit) >= 2)


def _values(unit: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sorted(unit.values()))


def _overall(rated: Tally) -> Counter[int]:
    overall: Counter[int] = Counter()
    for values, times in rated.items():
        for value in values:
            overall[value] += times
    return overall


def _fleiss(rated: Tally) -> float:
    overall = _overall(rated)
    total = sum(overall.values())
    agreed = 0.0
    for values, times in rated.items():
        size = len(values)
        agreed += times * sum(n * (n - 1) for n in Counter(values).values()) / (size * (size - 1))
    chance = sum((n / total) ** 2 for n in overall.values())
    return (agreed / sum(rated.values()) - chance) / (1 - chance) if len(overall) > 1 else math.nan


def _alpha(rated: Tally, level: Level) -> float:
    overall = _overall(rated)
    if len(overall) < 2:
        return math.nan
    total, values = sum(overall.values()), sorted(overall)
    distance = _distances(values, overall, level)
    seen = sum(times * sum(distance[a, b] for a in own for b in own) / (len(own) - 1) for own, times in rated.items())
    chance = sum(overall[a] * overall[b] * distance[a, b] for a in values for b in values) / (total - 1)
    return 1 - seen / chance


def _distances(values: Sequence[int], counts: Mapping[int, int], level: Level) -> dict[tuple[int, int], float]:
    if level == "nominal":
        return {(a, b): float(a != b) for a in values for b in values}
    if level == "interval":
        return {(a, b): float(a - b) ** 2 for a in values for b in values}
    found = {}
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            between = values[min(i, j) : max(i, j) + 1]
            found[a, b] = (sum(counts[v] for v in between) - (counts[a] + counts[b]) / 2) ** 2
    return found


def bootstrap(
    units: Units,
    figure: Literal["nominal", "ordinal", "interval", "fleiss"],
    rounds: int = 1000,
    seed: int = 0,
    groups: Sequence[object] | None = None,
) -> Estimate:
    """Alpha at a level, or Fleiss' kappa, with its 95 % percentile interval.

    Args:
        groups: what each unit belongs to, say its prompt. Groups are drawn again with replacement, whole: two pairs
            of answers to one prompt are not two independent witnesses. None: every unit stands alone.
    """
    import numpy as np

    def compute(rated: Tally) -> float:
        return _fleiss(rated) if figure == "fleiss" else _alpha(rated, figure)

    members: dict[object, list[tuple[int, ...]]] = {}
    for group, unit in zip(range(len(units)) if groups is None else groups, units, strict=True):
        if len(unit) >= 2:
            members.setdefault(group, []).append(_values(unit))
    rated = _tally(units)
    value, count = compute(rated), sum(rated.values())
    if len(members) < 2 or math.isnan(value):
        return Estimate(value, math.nan, math.nan, count)
    # Many groups hold the same values: how often each kind of group is drawn is multinomial.
    kinds = sorted(Counter(tuple(sorted(each)) for each in members.values()).items())
    columns = {values: column for column, values in enumerate(rated)}
    holds = np.zeros((len(kinds), len(columns)))
    for row, (kind, _) in enumerate(kinds):
        for values in kind:
            holds[row, columns[values]] += 1
    shares = np.array([times for _, times in kinds]) / len(members)
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(rounds):
        drawn = generator.multinomial(len(members), shares) @ holds
        found.append(compute({values: int(n) for values, n in zip(rated, drawn, strict=True) if n}))
    # Where all that was drawn is of one value, there is no figure.
    found = sorted(each for each in found if not math.isnan(each))
    if not found:
        return Estimate(value, math.nan, math.nan, count)
    low, high = (found[min(len(found) - 1, int(share * len(found)))] for share in (0.025, 0.975))
    return Estimate(value, low, high, count)


def wilson(hits: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % interval of a share."""
    if count == 0:
        return 0.0, 1.0
    share, scale = hits / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True)
class SideBias:
    """How often the left answer won among labels that are no tie; `biased`: 0.5 is outside the interval."""

    left: int
    count: int
    low: float
    high: float

    @property
    def biased(self) -> bool:
        return self.count > 0 and not self.low <= 0.5 <= self.high


def side_bias(values: Sequence[int]) -> SideBias:
    """From labels on the screen's own scale, 1 (left much better) to 7 (right much better).

    Which answer stands left is drawn at random, so that a share other than one half is the annotator's doing.
    """
    left, count = sum(value < 4 for value in values), sum(value != 4 for value in values)
    return SideBias(left, count, *wilson(left, count))


Verdict = Literal["fine", "guessing", "open"]


def sequential_test(
    hits: Sequence[bool], guess: float = 0.5, careful: float = 0.85, alpha: float = 0.01, beta: float = 0.05
) -> tuple[Verdict, int]:
    """Whether someone guesses, told from gold items as early as the errors allow (Wald's test).

    Args:
        hits: whether each gold item was judged right, in order.
        guess, careful: the share that a coin gets right, and that a careful annotator does.
        alpha: chance that a careful annotator is called guessing. beta: that a guesser is called fine.

    Returns:
        (verdict, after how many items it was reached; all of them while it is open). Once reached, it stands.
    """
    guessing, fine = math.log((1 - beta) / alpha), math.log((1 - alpha) / beta)
    evidence = 0.0  # log of P(hits | guess) / P(hits | careful)
    for number, hit in enumerate(hits, 1):
        evidence += math.log(guess / careful) if hit else math.log((1 - guess) / (1 - careful))
        if evidence >= guessing:
            return "guessing", number
        if evidence <= -fine:
            return "fine", number
    return "open", len(hits)
