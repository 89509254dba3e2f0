"""The figures of the trust report that need no more than the rewards of the held-out pairs.

P pairs, N distinct answers. A pair is right where the chosen answer's reward is above the rejected one's; equal rewards
are wrong. Length is counted in characters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from reward.baselines import baselines
from reward.calibration import (
    brier_score,
    calibration_bins,
    calibration_noise,
    cross_fitted_temperature,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from reward.records import InputError, Record, answer_text, prompt_id
from reward.statistics import (
    Estimate,
    MeanFigure,
    accuracy_interval,
    average_of_shares,
    mcnemar,
    paired_difference,
    share_with_interval,
    spearman,
)
from reward.trust_schema import (
    BaselineFigure,
    BinFigure,
    CalibrationFigure,
    CalibrationSide,
    Ceiling,
    CorrelationFigure,
    Group,
    Groups,
    LengthFigure,
    Point,
)

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

MATCHED = 1.1  # lengths that differ by at most a tenth
STEPS = 5  # this many different margins are shown one by one, more in thirds
POINTS = 200  # pairs in the plot of reward against length

NO_VOTES = "votes are not recorded"
ONE_VOTE = "one annotator a pair: agreement is undefined"
EVEN_VOTES = (
    "no pair has an odd number of votes of three or more: where an even number is split, the pair leaves as a tie, and "
    "those that stay agree more than people do"
)


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs and what the model makes of them.

    Attributes:
        reward_P2: of the chosen and the rejected answer.
        seed: of every bootstrap.
    """

    records: Sequence[Record]
    reward_P2: Floats
    seed: int = 0

    @cached_property
    def prompt_P(self) -> NDArray[np.str_]:
        """Prompt ids, the units of evidence."""
        return np.array([prompt_id(record["prompt"]) for record in self.records])

    @cached_property
    def length_P2(self) -> NDArray[np.int64]:
        """Characters of the chosen and the rejected answer."""
        lengths = [[len(answer_text(record[side])) for side in ("chosen", "rejected")] for record in self.records]
        return np.array(lengths, dtype=np.int64)

    @cached_property
    def gap_P(self) -> Floats:
        """Reward of the chosen answer minus that of the rejected one."""
        return self.reward_P2[:, 0] - self.reward_P2[:, 1]

    @property
    def right_P(self) -> Bools:
        return self.gap_P > 0

    def accuracy(self, where_P: Bools | None = None, resamples: int = 10_000) -> Estimate:
        """Share of right pairs, of all or of those where `where_P` is True (one at least)."""
        where_P = np.ones(len(self.records), dtype=bool) if where_P is None else where_P
        return share_with_interval(self.right_P[where_P], self.prompt_P[where_P], self.seed, resamples)

    def group(self, name: str, where_P: Bools) -> Group | None:
        """The accuracy on some of the pairs; None if there are none."""
        if not where_P.any():
            return None
        return {"name": name, "pairs": int(where_P.sum()), "accuracy": figure(self.accuracy(where_P, 2000))}


def figure(estimate: Estimate) -> MeanFigure:
    """An estimate as it stands in JSON."""
    return cast(MeanFigure, estimate.record())


# Ceiling and floors


def ceiling_of(held: HeldOut) -> Ceiling:
    """Human-human agreement: the mean over pairs of the chance that two annotators of the pair, neither tied, agree.

    With f votes for the chosen answer and a against it, that is (f (f - 1) + a (a - 1)) / (n (n - 1)), n = f + a.
    Only pairs with an odd n of 3 or more count: an even number can be split, such a pair is a tie and not among the
    records, and the pairs left would agree more than people do. With two votes a pair they would always agree.

    The model's figure is the share of the same votes that it is with, averaged in the same way: what a perfect guess
    at one more person's vote is to be compared with. The majority's view is easier to meet than one person's.
    """
    votes = [votes_of(record) for record in held.records]
    if all(each is None for each in votes):
        return {"agreement": None, "model": None, "pairs": 0, "why": NO_VOTES}
    sides_P2 = np.array([_sides(each or {}) for each in votes])
    n_P = sides_P2.sum(axis=1)
    counted_P = (n_P >= 3) & (n_P % 2 == 1)
    known = bool(counted_P.any())
    with_P = counted_P if known else n_P > 0
    if not with_P.any():
        return {"agreement": None, "model": None, "pairs": 0, "why": "every vote is a tie"}
    f, a, n = sides_P2[with_P, 0], sides_P2[with_P, 1], n_P[with_P]
    gap, prompts = held.gap_P[with_P], held.prompt_P[with_P]
    model = share_with_interval(np.where(gap > 0, f, np.where(gap < 0, a, 0)) / n, prompts, held.seed)
    agreement = None
    if known:
        agreement = figure(share_with_interval((f * (f - 1) + a * (a - 1)) / (n * (n - 1)), prompts, held.seed))
    why = None if known else ONE_VOTE if n.max() == 1 else EVEN_VOTES
    return {"agreement": agreement, "model": figure(model), "pairs": int(with_P.sum()), "why": why}


def votes_of(record: Record) -> dict[str, int] | None:
    """Strength by annotator, -3 to 3 and positive towards the chosen answer; None where votes are not recorded.

    Raises:
        InputError: not one strength an annotator, or one outside -3 to 3.
    """
    strengths = record.get("strengths")
    if strengths is None:
        return None
    annotators = record.get("annotators") or []
    if len(strengths) != len(annotators) or not all(each in range(-3, 4) for each in strengths):
        raise InputError(
            f"The pair {record.get('comparison_id', '')} has strengths {strengths} for annotators {annotators}: one "
            "whole number from -3 (rejected much better) to 3 (chosen much better) is wanted for each annotator."
        )
    return dict(zip(annotators, strengths, strict=True))


def _sides(votes: dict[str, int]) -> tuple[int, int]:
    return sum(s > 0 for s in votes.values()), sum(s < 0 for s in votes.values())


def baselines_of(train: Sequence[Record], held: HeldOut) -> list[BaselineFigure]:
    """The floors of `reward.baselines`, and how far the model is above each on the same pairs."""
    found: list[BaselineFigure] = []
    for each in baselines(train, held.records):
        row: BaselineFigure = {"name": each.name, "rule": each.rule, "accuracy": None, "difference": None, "p": None}
        if each.correct_P is not None:
            only_model, only_rule = held.right_P & ~each.correct_P, ~held.right_P & each.correct_P
            row["accuracy"] = figure(share_with_interval(each.correct_P, held.prompt_P, held.seed))
            row["difference"] = figure(paired_difference(held.right_P, each.correct_P, held.prompt_P, held.seed))
            row["p"] = mcnemar(int(only_model.sum()), int(only_rule.sum()))
        found.append(row)
    return found


# Accuracy by group


def by_source(held: HeldOut) -> Groups:
    """By the column `source`."""
    sources = [record.get("source") for record in held.records]
    if all(source is None for source in sources):
        return {"rows": [], "why": "sources are not recorded"}
    # Objects, for numpy's own text is as wide as the longest and drops trailing zeros.
    names = np.array(["not recorded" if source is None else str(source) for source in sources], dtype=object)
    return {"rows": _rows(held.group(name, names == name) for name in sorted(set(names.tolist()))), "why": None}


def by_annotator(held: HeldOut) -> Groups:
    """By annotator, on that person's own votes, ties left out: how often the model is with them."""
    rights: dict[str, list[tuple[bool, str]]] = {}
    recorded = False
    for record, gap, prompt in zip(held.records, held.gap_P.tolist(), held.prompt_P.tolist(), strict=True):
        votes = votes_of(record)
        recorded |= votes is not None
        for annotator, strength in (votes or {}).items():
            if strength:
                rights.setdefault(str(annotator), []).append((gap * strength > 0, prompt))
    if not recorded:
        return {"rows": [], "why": NO_VOTES}
    rows: list[Group] = []
    for annotator, own in sorted(rights.items()):
        right, prompts = zip(*own, strict=True)
        accuracy = share_with_interval(np.array(right), np.array(prompts), held.seed, 2000)
        rows.append({"name": annotator, "pairs": len(own), "accuracy": figure(accuracy)})
    return {"rows": rows, "why": None if rows else "every vote is a tie"}


def by_margin(held: HeldOut) -> Groups:
    """By the label's margin, in steps of strength from 0 to 3: each margin where they are few, else thirds."""
    margins = np.array([math.nan if (m := record.get("margin")) is None else float(m) for record in held.records])
    known = np.isfinite(margins)
    if not known.any():
        return {"rows": [], "why": "margins are not recorded"}
    steps = np.unique(margins[known])
    if steps.size <= STEPS:
        return {"rows": _rows(held.group(f"{step:.2g}", margins == step) for step in steps), "why": None}
    return {
        "rows": _rows(held.group(f"{low:.2g} to {high:.2g}", own) for low, high, own in _quantiles(margins, known, 3)),
        "why": None,
    }


def by_length(held: HeldOut) -> Groups:
    """By how many times as long as the rejected answer the chosen one is, in fifths; an empty answer counts as 1."""
    length_P2 = np.maximum(held.length_P2, 1)
    ratio_P = length_P2[:, 0] / length_P2[:, 1]
    parts = _quantiles(ratio_P, np.ones(ratio_P.size, dtype=bool), 5)
    return {"rows": _rows(held.group(_times(low, high), own) for low, high, own in parts), "why": None}


def _times(low: float, high: float) -> str:
    first, last = f"{low:.2f}", f"{high:.2f}"
    return f"{first} times" if first == last else f"{first} to {last} times"


def _rows(groups: Any) -> list[Group]:
    return [group for group in groups if group is not None]


def _quantiles(values_P: Floats, known_P: Bools, parts: int) -> list[tuple[float, float, Bools]]:
    """(least, greatest, which) of up to `parts` groups of like size along the values; equal values stay together."""
    cuts = np.unique(np.quantile(values_P[known_P], np.linspace(0, 1, parts + 1)[1:-1]))
    member_P = np.where(known_P, np.searchsorted(cuts, values_P), -1)
    groups = [member_P == part for part in range(cuts.size + 1)]
    return [(float(values_P[own].min()), float(values_P[own].max()), own) for own in groups if own.any()]


# Calibration


def calibration_of(held: HeldOut) -> CalibrationFigure:
    """Whether the gap says how sure to be, as it stands and after temperature scaling."""
    crossed_P = cross_fitted_temperature(held.gap_P, held.prompt_P)
    return {
        "temperature": fit_temperature(held.gap_P),
        "halves": None if crossed_P is None else np.unique(crossed_P).tolist(),
        "before": _calibrated(held, 1.0),
        "after": None if crossed_P is None else _calibrated(held, crossed_P),
        "why": "a single prompt cannot be halved" if crossed_P is None else None,
    }


def _calibrated(held: HeldOut, temperature_P: ArrayLike) -> CalibrationSide:
    conf_P, right_P = expit(np.abs(held.gap_P) / temperature_P), held.right_P
    bins = calibration_bins(conf_P.size)
    rows: list[BinFigure] = []
    for each in reliability(conf_P, right_P, bins):
        exact = accuracy_interval(round(each.accuracy * each.n), each.n)
        rows.append({**each._asdict(), "low": exact.low, "high": exact.high})  # type: ignore[typeddict-item]
    return {
        "error": expected_calibration_error(conf_P, right_P, bins),
        "noise": calibration_noise(conf_P, bins, held.seed),
        "brier": brier_score(conf_P, right_P),
        "bins": rows,
    }


# Length


def length_of(held: HeldOut) -> LengthFigure:
    """How reward goes with length, and what is left of accuracy where length cannot help."""
    longer_P = held.length_P2[:, 0] - held.length_P2[:, 1]
    length_P2 = np.maximum(held.length_P2, 1)
    matched_P = length_P2.max(axis=1) <= MATCHED * length_P2.min(axis=1)
    beyond = None
    if (longer_P >= 0).any() and (longer_P <= 0).any():
        beyond = figure(average_of_shares(held.accuracy(longer_P >= 0), held.accuracy(longer_P <= 0)))
    reward_N, length_N, prompt_N = _answers(held)
    prompts = len(set(held.prompt_P.tolist()))
    within = (_centred(reward_N, prompt_N), _centred(length_N, prompt_N))
    return {
        "overall": cast(CorrelationFigure, spearman(reward_N, length_N, prompts).record()),
        "within": cast(CorrelationFigure, spearman(*within, prompts).record()),
        "matched": held.group("lengths within 10 %", matched_P),
        "chosen_longer": held.group("chosen longer", longer_P > 0),
        "chosen_shorter": held.group("chosen shorter", longer_P < 0),
        "beyond": beyond,
        "points": _points(held),
    }


def _answers(held: HeldOut) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """(reward, length, number of the prompt) of every distinct held-out answer, in order of first appearance."""
    rows: dict[tuple[str, str], tuple[float, int]] = {}
    for record, prompt, rewards, lengths in zip(
        held.records, held.prompt_P.tolist(), held.reward_P2.tolist(), held.length_P2.tolist(), strict=True
    ):
        for side, reward, length in zip(("chosen", "rejected"), rewards, lengths, strict=True):
            rows.setdefault((prompt, answer_text(record[side])), (reward, length))
    reward_N, length_N = np.array(list(rows.values()), dtype=np.float64).T
    return reward_N, length_N, np.unique([prompt for prompt, _ in rows], return_inverse=True)[1]


def _centred(values_N: Floats, member_N: NDArray[np.intp]) -> Floats:
    """Values minus the mean of their group."""
    # From the first value on, so that equal values come out as exactly 0 and not as rounding errors with a rank order.
    shifted_N = values_N - values_N[0]
    means = np.bincount(member_N, weights=shifted_N) / np.bincount(member_N)
    return np.asarray(shifted_N - means[member_N])


def _points(held: HeldOut) -> list[Point]:
    """Both answers of up to `POINTS` pairs, evenly spaced along the records."""
    count = len(held.records)
    chosen_pairs = np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int)).tolist()
    return [
        {
            "length": int(held.length_P2[pair, side]),
            "reward": float(held.reward_P2[pair, side]),
            "chosen": side == 0,
        }
        for pair in chosen_pairs
        for side in (0, 1)
    ]
