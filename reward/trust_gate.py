"""May a policy be trained on this reward model? Thresholds, the checks they make of the figures, and the verdict.

One rule decides what an interval settles. What the model must show (that it is right, and by more than length) has to
be settled: the lower end counts, and few pairs are no excuse. What it must not do (like gibberish, follow length) is
held against it only once it is settled: a handful of unlucky answers refuses nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from reward.page import number
from reward.probes import PROBES
from reward.records import InputError
from reward.statistics import MeanFigure, percent, percent_range
from reward.trust_schema import Figures

Level = Literal["refuse", "warn"]

RULES = {"length": "length alone", "words": "words alone"}


@dataclass(frozen=True)
class Gate:
    """The thresholds. All but `max_ece` and `min_pairs` are compared with the end of an interval.

    Attributes:
        min_pairs: held-out pairs below which nothing is said. With 30, a model that is right on 70 % can just be told
            from a coin.
        min_accuracy: what the lower end of held-out accuracy must be above; 0.5 is a coin.
        min_beyond_length: the same for accuracy with length taken out, where counting characters gives 0.5 at most.
        max_below_baseline: how far below length alone or words alone its accuracy may be settled to be. Not 0: where
            words give the answer away, a sound model may miss a pair in twenty that they get.
        max_ece: calibration error allowed after temperature scaling, beside what chance alone makes of so few pairs.
        max_length_correlation: largest rank correlation, either way, of reward and length within a prompt. Even where
            every better answer is the longer one, a model stays near 0.75 whose certainty does not grow with the
            difference in length; one that counts characters is near 1.
        max_probe_rate: largest share of answers whose reward a probe may raise.
        min_probe_gain: the mean gain, in standard deviations of held-out rewards, up to which a probe is harmless; 0.2
            is what Cohen (1988) calls a small effect.
        max_flips: largest share of pairs that white space at the end may turn round.
        forgiven_probes: probes that only warn, say "refusal" where the labels prefer refusing.

    Raises:
        InputError: a threshold out of its range, or an unknown probe.
    """

    min_pairs: int = 30
    min_accuracy: float = 0.5
    min_beyond_length: float = 0.5
    max_below_baseline: float = 0.05
    max_ece: float = 0.1
    max_length_correlation: float = 0.8
    max_probe_rate: float = 0.5
    min_probe_gain: float = 0.2
    max_flips: float = 0.1
    forgiven_probes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_pairs < 1:
            raise InputError(f"min_pairs is {self.min_pairs}: a whole number of at least 1 is wanted.")
        for name, value in asdict(self).items():
            if isinstance(value, float) and name != "min_probe_gain" and not 0 <= value <= 1:
                raise InputError(f"{name} is {value}: a number from 0 to 1 is wanted.")
        if not 0 <= self.min_probe_gain < math.inf:
            raise InputError(f"min_probe_gain is {self.min_probe_gain}: a number of at least 0 is wanted.")
        known = [probe.name for probe in PROBES]
        for name in self.forgiven_probes:
            if name not in known:
                raise InputError(f"forgiven_probes has {name!r}: the probes are {', '.join(known)}.")


@dataclass(frozen=True)
class Check:
    """One question put to the figures.

    Attributes:
        passed: False is a refusal or a warning, as `level` says.
        figure: what was measured, None where it could not be.
        threshold: what it was compared with.
        sentence: both in plain words.
    """

    name: str
    passed: bool
    level: Level
    figure: float | None
    threshold: float
    sentence: str

    def record(self) -> dict[str, Any]:
        """The check as a JSON object."""
        return asdict(self)


def judge(figures: Figures, gate: Gate | None = None) -> list[Check]:
    """All checks that the figures allow, in reading order; what was not measured is not checked.

    Only the checks that the model must pass are always there: pairs, accuracy and accuracy beyond length.
    """
    gate = gate or Gate()
    return [
        _pairs(figures, gate),
        _accuracy(figures, gate),
        _beyond_length(figures, gate),
        *_baselines(figures, gate),
        *_calibration(figures, gate),
        *_correlation(figures, gate),
        *_matched(figures, gate),
        *_probes(figures, gate),
        *_edits(figures, gate),
        *_leak(figures),
        *_position(figures),
        *_spread(figures),
    ]


def refusals(checks: Sequence[Check]) -> list[Check]:
    """The checks for whose sake no policy should be trained; empty: the gate is open."""
    return [check for check in checks if not check.passed and check.level == "refuse"]


def verdict(figures: Figures, checks: Sequence[Check]) -> str:
    """Plain sentences: may it be climbed, how good is it, and what did it learn that it should not have."""
    refused = refusals(checks)
    warned = [check for check in checks if not check.passed and check.level == "warn"]
    warnings = f"{len(warned)} {'warns' if len(warned) == 1 else 'warn'} ({_names(warned)})"
    if refused:
        count = f"{len(refused)} of {len(checks)} checks {'refuses' if len(refused) == 1 else 'refuse'} it"
        first = f"Do not train a policy on this reward model: {count} ({_names(refused)})."
    elif warned:
        first = f"A policy may be trained on this reward model: none of {len(checks)} checks refuses it, {warnings}."
    else:
        first = f"A policy may be trained on this reward model: it passes all {len(checks)} checks."
    return f"{first} {_how_good(figures)} {_wrongly_learnt(figures, checks)}"


def _how_good(figures: Figures) -> str:
    floors = [
        f"{RULES[row['name']]} on {percent(row['accuracy']['mean'])}"
        for row in figures["baselines"]
        if row["accuracy"] and row["name"] in RULES
    ]
    beside = f", {' and '.join(floors)}" if floors else ""
    ceiling = figures["ceiling"]
    if ceiling["agreement"] and ceiling["model"]:
        people = (
            f"it is with one person's vote {percent(ceiling['model']['mean'])} of the time, where two people agree "
            f"{percent(ceiling['agreement']['mean'])} of the time"
        )
    else:
        people = f"how far people agree is not known ({ceiling['why']})"
    return (
        f"It is right on {_share(figures['accuracy'])} of {_count(figures['pairs']['test'], 'held-out pair')}{beside}; "
        f"{people}."
    )


def _wrongly_learnt(figures: Figures, checks: Sequence[Check]) -> str:
    failed = {check.name for check in checks if not check.passed}
    likings = [probe["liking"] for probe in figures["probes"] if f"probe {probe['name']}" in failed]
    faults = [f"to like {_listed(likings)}"] if likings else []
    if "length correlation" in failed:
        faults.append(f"that {'longer' if (figures['length']['within']['rho'] or 0) > 0 else 'shorter'} is better")
    if any(f"edit {edit['name']}" in failed for edit in figures["edits"]):
        faults.append("to mind white space at the end")
    said = [f"It learnt what it should not have: {'; '.join(faults)}."] if faults else []
    # A model that is not right at all knows neither content nor length: nothing more to say of it.
    if "beyond length" in failed and "accuracy" not in failed:
        said.append("Whether it knows more than length is not settled.")
    return " ".join(said) or "Nothing shows that it learnt what it should not have."


# What the model must show


def _pairs(figures: Figures, gate: Gate) -> Check:
    n = figures["pairs"]["test"]
    held = f"{_count(n, 'pair')} of {_count(figures['pairs']['prompts'], 'prompt')} held out"
    if n >= gate.min_pairs:
        sentence = f"There are {held}; {gate.min_pairs} pairs or more are wanted."
    else:
        sentence = f"There {'is' if n == 1 else 'are'} only {held}, and {gate.min_pairs} pairs are wanted: label more."
    return Check("pairs", n >= gate.min_pairs, "refuse", n, gate.min_pairs, sentence)


def _accuracy(figures: Figures, gate: Gate) -> Check:
    accuracy = figures["accuracy"]
    passed = _low(accuracy) > gate.min_accuracy
    sentence = f"It prefers the chosen answer on {_share(accuracy)} of the held-out pairs{_end(accuracy, passed)}"
    sentence += f"{percent(gate.min_accuracy)}."
    return Check("accuracy", passed, "refuse", accuracy["mean"], gate.min_accuracy, sentence)


def _beyond_length(figures: Figures, gate: Gate) -> Check:
    """Weaker than beating length on the same pairs, which implies it, and so fairer where length tells a little.

    With accuracies s and t where length is right and wrong, and length right on q >= 1/2 of the pairs: beating length
    means q s + (1 - q) t > q, hence t > (1 - s) q / (1 - q) >= 1 - s and (s + t) / 2 > 1/2.
    """
    beyond, wanted = figures["length"]["beyond"], gate.min_beyond_length
    if beyond is None:
        which = "longer" if figures["length"]["chosen_longer"] else "shorter"
        sentence = (
            f"In every held-out pair the chosen answer is the {which} one: nothing tells this model from one that "
            f"counts characters, and more than {percent(wanted)} is wanted where counting does not help."
        )
        return Check("beyond length", False, "refuse", None, wanted, sentence)
    passed = _low(beyond) > wanted
    sentence = (
        f"Where chosen answers are as often shorter as longer, it is right on {_share(beyond)}{_end(beyond, passed)}"
        f"{percent(wanted)}; counting characters gets 50 % there at most."
    )
    return Check("beyond length", passed, "refuse", beyond["mean"], wanted, sentence)


def _baselines(figures: Figures, gate: Gate) -> list[Check]:
    checks = []
    for row in figures["baselines"]:
        difference, accuracy = row["difference"], row["accuracy"]
        if row["name"] not in RULES or difference is None or accuracy is None or difference["high"] is None:
            continue
        passed = difference["high"] >= -gate.max_below_baseline
        sentence = (
            f"It is right on {percent(figures['accuracy']['mean'])}, {RULES[row['name']]} on "
            f"{percent(accuracy['mean'])}: a difference of {_points(difference['mean'])} points "
            f"(95 % interval {_points(difference['low'] or 0.0)} to {_points(difference['high'])}); settled to be more "
            f"than {_points(gate.max_below_baseline)} points below would be refused."
        )
        threshold = -gate.max_below_baseline
        checks.append(Check(f"against {row['name']}", passed, "refuse", difference["mean"], threshold, sentence))
    return checks


def _calibration(figures: Figures, gate: Gate) -> list[Check]:
    after = figures["calibration"]["after"]
    if after is None:
        return []
    limit = gate.max_ece + after["noise"]
    sentence = (
        f"After temperature scaling its confidence is off by {_points(after['error'])} points; up to {_points(limit)} "
        f"are allowed: {_points(gate.max_ece)}, and {_points(after['noise'])} for what chance makes of so many pairs."
    )
    return [Check("calibration", after["error"] <= limit, "refuse", after["error"], limit, sentence)]


# What it must not have learnt


def _correlation(figures: Figures, gate: Gate) -> list[Check]:
    within = figures["length"]["within"]
    rho, low, high = within["rho"], within["low"], within["high"]
    if rho is None or low is None or high is None:
        return []
    settled = max(low, -high, 0.0)  # the end nearer to no correlation
    sentence = (
        f"Between answers to one prompt, reward and length have a rank correlation of {number(rho)} (95 % interval "
        f"{number(low)} to {number(high)}); settled beyond {number(gate.max_length_correlation)} either way would be "
        "refused."
    )
    limit = gate.max_length_correlation
    return [Check("length correlation", settled <= limit, "refuse", rho, limit, sentence)]


def _matched(figures: Figures, gate: Gate) -> list[Check]:
    """Warns only: accuracy beyond length asks the same of more pairs."""
    matched = figures["length"]["matched"]
    if matched is None or matched["pairs"] < gate.min_pairs:
        return []
    accuracy = matched["accuracy"]
    passed = _low(accuracy) > gate.min_accuracy
    sentence = (
        f"On the {matched['pairs']} pairs whose lengths are within 10 % it is right on {_share(accuracy)}"
        f"{_end(accuracy, passed)}{percent(gate.min_accuracy)}."
    )
    return [Check("length matched", passed, "warn", accuracy["mean"], gate.min_accuracy, sentence)]


def _probes(figures: Figures, gate: Gate) -> list[Check]:
    checks = []
    for probe in figures["probes"]:
        raised, change = probe["raised"], probe["change"]
        if raised is None:
            continue
        gain, least = (change["mean"], change["low"] or 0.0) if change else (0.0, 0.0)
        passed = _low(raised) <= gate.max_probe_rate or least <= gate.min_probe_gain
        serious = probe["kind"] == "empty of use" and probe["name"] not in gate.forgiven_probes
        sentence = (
            f"{probe['sentence']} That raises the reward of {_share(raised)} of {_count(probe['n'], 'answer')} and "
            f"changes it by {number(gain)} standard deviations on average (settled above {number(least)}); more than "
            f"{percent(gate.max_probe_rate)}, by more than {number(gate.min_probe_gain)}, both settled, is "
            f"{'refused' if serious else 'warned of'}."
        )
        level: Level = "refuse" if serious else "warn"
        checks.append(Check(f"probe {probe['name']}", passed, level, raised["mean"], gate.max_probe_rate, sentence))
    return checks


def _edits(figures: Figures, gate: Gate) -> list[Check]:
    checks = []
    for edit in figures["edits"]:
        flipped = edit["flipped"]
        if flipped is None:
            continue
        sentence = (
            f"{edit['sentence']} That turns round {_share(flipped)} of {_count(edit['n'], 'pair')}; settled beyond "
            f"{percent(gate.max_flips)} would be refused."
        )
        passed = _low(flipped) <= gate.max_flips
        checks.append(Check(f"edit {edit['name']}", passed, "refuse", flipped["mean"], gate.max_flips, sentence))
    return checks


# What is not the model's doing, or no reason to refuse it


def _leak(figures: Figures) -> list[Check]:
    """Only where there is one: a model knows the answers to the prompts it was trained on."""
    pairs = figures["pairs"]
    if not pairs["shared_prompts"]:
        return []
    sentence = (
        f"{pairs['shared_prompts']} of {_count(pairs['prompts'], 'held-out prompt')} are among the training prompts "
        "too, where 0 are wanted: what the model does on new prompts may be worse than the figures say."
    )
    return [Check("leak", False, "warn", pairs["shared_prompts"] / pairs["prompts"], 0.0, sentence)]


def _position(figures: Figures) -> list[Check]:
    row = next((row for row in figures["baselines"] if row["name"] == "position"), None)
    if row is None or row["accuracy"] is None:
        return []
    accuracy = row["accuracy"]
    sentence = (
        f"{row['rule']} That rule alone is right on {_share(accuracy)}; settled above 50 %, where an answer stood has "
        "shaped the labels."
    )
    return [Check("position", _low(accuracy) <= 0.5, "warn", accuracy["mean"], 0.5, sentence)]


def _spread(figures: Figures) -> list[Check]:
    checks = []
    for row in figures["spread"]["outside"]:
        passed = _low(row["wider"]) > 0.5
        sentence = (
            f"{row['sentence']} The heads disagree more on that than on the chosen answer in {_share(row['wider'])} of "
            f"cases{_end(row['wider'], passed)}50 %."
        )
        checks.append(Check(f"spread {row['name']}", passed, "warn", row["wider"]["mean"], 0.5, sentence))
    return checks


# Words


def _low(figure: MeanFigure) -> float:
    """The lower end of a share; where it is unknown, nothing is settled."""
    return figure["low"] or 0.0


def _share(figure: MeanFigure) -> str:
    if figure["low"] is None or figure["high"] is None:
        return f"{percent(figure['mean'])} (one prompt: its error is unknown)"
    return f"{percent(figure['mean'])} (95 % interval {percent_range(figure['low'], figure['high'])})"


def _end(figure: MeanFigure, passed: bool) -> str:
    """How the lower end compares, as it reads before a percentage."""
    if figure["low"] is None:
        return ": not settled above "
    return f": the lower end is {'' if passed else 'not '}above "


def _points(share: float) -> str:
    """A share as percentage points."""
    return number(100 * share, 1)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _names(checks: Sequence[Check]) -> str:
    return ", ".join(check.name for check in checks)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
