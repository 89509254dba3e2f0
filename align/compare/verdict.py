"""From what judges said to figures and sentences: pure functions, no model and no folder.

P prompts, M models (the first is the one to beat), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from align.compare import statistics
from align.compare.judging import Judgement, plain
from align.compare.schema import (
    Ability,
    AgreementFigure,
    BiasFigure,
    ModelFigures,
    ShareFigure,
    WinRateFigure,
)
from align.compare.statistics import Estimate, percent, percent_range
from labeling_ui.agreement import cohen
from reward.bradley_terry import bradley_terry
from reward.statistics import MeanFigure, accuracy_interval

# Fewer prompts than this say nothing of any but a huge difference: 30 prompts settle a win rate of 69 % at best.
FEW_PROMPTS = 30
# Of the normal prior on an ability, in 1 / nat^2: enough to keep a model that wins always finite.
ABILITY_PRIOR = 0.1
RESAMPLES = 300


def win_figures(judgements: Mapping[str, Judgement]) -> dict[str, dict[str, WinRateFigure]]:
    """By model, then by judge: wins over the first model, p-values corrected over all of them.

    A judge without a verdict on any prompt gives no figure for that model.
    """
    figures: dict[str, dict[str, WinRateFigure]] = {}
    for judge, judgement in judgements.items():
        for name, outcomes in judgement.outcomes.items():
            told, _ = plain(outcomes)
            if not told:
                continue
            win = statistics.win_rate(told)
            own = {
                "p": statistics.sign_test(win.wins, win.losses),
                "p_adjusted": 1.0,
                "unjudged": len(outcomes) - len(told),
            }
            figures.setdefault(name, {})[judge] = cast(WinRateFigure, win.record() | own)
    every = [figure for by in figures.values() for figure in by.values()]
    for figure, adjusted in zip(every, statistics.holm([figure["p"] for figure in every]), strict=True):
        figure["p_adjusted"] = adjusted
    return figures


def equal_length(
    judgements: Mapping[str, Judgement], lengths: Mapping[str, Sequence[int]], first: str
) -> dict[str, dict[str, Estimate]]:
    """By model, then by judge: the win rate, were its answers as long as the first model's."""
    found: dict[str, dict[str, Estimate]] = {}
    for judge, judgement in judgements.items():
        for name, outcomes in judgement.outcomes.items():
            told, numbers = plain(outcomes)
            if told:
                mine, base = (np.array(lengths[who])[numbers] for who in (name, first))
                found.setdefault(name, {})[judge] = statistics.length_controlled_win_rate(told, mine, base)
    return found


def abilities(scores: Mapping[str, Sequence[float | None]], seed: int) -> dict[str, Ability]:
    """Bradley-Terry strengths of M models from every pair of them on every prompt, the first model's being 0.

    The interval is a percentile bootstrap over prompts. Empty for fewer than three models, which a win rate tells
    apart already, or where answers without a score leave nothing to compare.
    """
    names = [*scores]
    score_MP = np.array([[math.nan if s is None else s for s in scores[name]] for name in names])
    score_MP = score_MP[:, ~np.isnan(score_MP).any(axis=0)]
    if len(names) < 3 or score_MP.shape[1] == 0:
        return {}
    won_PMM = (score_MP[:, None] > score_MP[None, :]).transpose(2, 0, 1).astype(np.float64)
    tied_PMM = (score_MP[:, None] == score_MP[None, :]).transpose(2, 0, 1) / 2
    # A tie is half a win of each: the strengths are those behind the win rates of the report.
    beaten_PMM = won_PMM + tied_PMM * (1 - np.eye(len(names)))

    def strengths(prompts: np.ndarray) -> np.ndarray:
        fitted = bradley_terry(beaten_PMM[prompts].sum(axis=0), names=names, prior=ABILITY_PRIOR)
        return np.array([fitted.difference(name, names[0])[0] if name != names[0] else 0.0 for name in names])

    count = len(beaten_PMM)
    random = np.random.default_rng(seed)
    drawn_RM = np.stack([strengths(random.integers(0, count, count)) for _ in range(RESAMPLES)])
    low_M, high_M = np.percentile(drawn_RM, [2.5, 97.5], axis=0)
    whole_M = strengths(np.arange(count))
    return {
        name: Ability(strength=float(whole_M[i]), low=float(low_M[i]), high=float(high_M[i]))
        for i, name in enumerate(names)
    }


def bias_of(judgement: Judgement) -> BiasFigure | None:
    """The position bias of a judge that saw both orders, over all models; None for another judge."""
    ahead, behind = [], []
    for forward, backward in judgement.orders.values():
        for one, other in zip(forward, backward, strict=True):
            if one is not None and other is not None:
                ahead.append(one)
                behind.append(other)
    if not ahead:
        return None
    return cast(BiasFigure, statistics.position_bias(ahead, behind).record())


def agreement(judgement: Judgement, people: Judgement, name_of_people: str) -> AgreementFigure | None:
    """How often a judge prefers what people prefer; None where they judged nothing in common.

    The share is over pairs on which both see a difference; kappa is over all pairs both judged.
    """
    both = [
        (mine, theirs)
        for name, outcomes in judgement.outcomes.items()
        for mine, theirs in zip(outcomes, people.outcomes.get(name, [None] * len(outcomes)), strict=True)
        if mine is not None and theirs is not None
    ]
    differing = [(mine, theirs) for mine, theirs in both if mine != 0.5 and theirs != 0.5]
    if not differing:
        return None
    share = accuracy_interval(sum(mine == theirs for mine, theirs in differing), len(differing))
    kappa = cohen([(int(2 * mine), int(2 * theirs)) for mine, theirs in both])
    return {
        "people": name_of_people,
        "share": cast(ShareFigure, share.record()),
        "kappa": None if math.isnan(kappa) else kappa,
    }


def reliability(judgement: Judgement, bias: BiasFigure | None, agrees: AgreementFigure | None) -> list[str]:
    """How far a judge can be believed, in words."""
    said = []
    if judgement.failed:
        said.append(
            f"It gave no usable answer to {judgement.failed} of {judgement.asked} questions; those prompts are not "
            "counted."
        )
    if bias:
        share = f"it named the first side on {percent(bias['first'])} of {2 * bias['n']} showings"
        if bias["p"] < 0.05:
            said.append(
                f"It looks at the side: {share} and kept its verdict in both orders on {percent(bias['consistent'])} "
                "of pairs. Where it did not, the pair is a tie, which is why its win rates lie closer to 50 %."
            )
        else:
            said.append(
                f"No preference for a side was found: {share}, and kept its verdict in both orders on "
                f"{percent(bias['consistent'])} of pairs."
            )
    if agrees:
        figure = agrees["share"]
        interval = percent_range(figure["low"], figure["high"])
        said.append(
            f"It prefers what {agrees['people']} prefer on {percent(figure['rate'])} of {figure['n']} pairs "
            f"(95 % interval {interval})"
            + ("" if agrees["kappa"] is None else f", kappa {agrees['kappa']:.2f} with ties")
            + ("." if figure["low"] > 0.5 else ": no better than a coin is not excluded.")
        )
    return said


def headline(
    first: str, judge: str, figures: Sequence[ModelFigures], equal: Mapping[str, Mapping[str, Estimate]]
) -> str:
    """The verdict in two sentences: which model is best and by how much, and what it cost.

    Args:
        judge: the judge that is told first.
        figures: of all models, the first among them.
        equal: win rates at equal length, by model and judge.
    """
    judged = [model for model in figures if judge in model.get("win_rate", {})]
    if not judged:
        return f"No verdict: the {judge} judged none of the models."
    best = max(judged, key=lambda model: _place(model, judge))
    win = best["win_rate"][judge]
    settled = statistics.standing(win["low"], win["high"])
    many = sum(len(model.get("win_rate", {})) for model in figures)
    name = best["name"]
    of = f"preferred by the {judge} on {percent(win['rate'])} of {win['n']} held-out prompts"
    interval = f"95 % interval {percent_range(win['low'], win['high'])}"
    if settled == "better":
        corrected = ""
        if many > 1:
            holds = "and it holds" if win["p_adjusted"] < 0.05 else "but it does not hold"
            corrected = f", {holds} after correction for {many} comparisons ({_p(win['p_adjusted'])})"
        which = f"{name}, which wins most often, is" if len(judged) > 1 else f"{name} is"
        said = f"{which} better than {first}: {of} ({interval}){corrected}."
    elif all(statistics.standing(m["win_rate"][judge]["low"], m["win_rate"][judge]["high"]) == "worse" for m in judged):
        who = f"{name} is worse than {first}" if len(judged) == 1 else f"Every model is worse than {first}"
        said = f"{who}: {'the best of them, ' + name + ', is ' if len(judged) > 1 else ''}{of} ({interval})."
    else:
        who = f"no difference between {name} and {first}" if len(judged) == 1 else f"no model better than {first}"
        rate = f"preferred on {percent(win['rate'])} of {win['n']} held-out prompts"
        said = f"The {judge} found {who}: {name} is {rate} ({interval})."
    if settled != "better":
        return said
    costs = _costs(best, figures[0])
    listed = costs[0] if len(costs) == 1 else ", ".join(costs[:-1]) + " and " + "".join(costs[-1:])
    price = f"Its price: {listed}" if costs else ""
    at_length = equal.get(name, {}).get(judge)
    if at_length and statistics.standing(at_length.low, at_length.high) != "better":
        rate = f"{percent(at_length.mean)}, {percent_range(at_length.low, at_length.high)}"
        price += f"{'; at' if price else 'At'} equal length nothing is settled ({rate}), so length may explain the gain"
    return f"{said} {price}." if price else said


def _place(model: ModelFigures, judge: str) -> tuple[float, float, float]:
    """What the best model has most of; where two win as often, their strength against each other decides."""
    win = model["win_rate"][judge]
    return win["low"], win["rate"], model["ability"]["strength"] if "ability" in model else 0.0


def _costs(best: ModelFigures, first: ModelFigures) -> list[str]:
    costs = []
    if kl := best["kl"]:
        costs.append(f"{kl['mean']:.1f} nats of KL per answer")
    if (length := best["length"]) and (base := first["length"]) and base["mean"]:
        costs.append(f"answers {length['mean'] / base['mean']:.2f} times as long")
    if (now := best["perplexity"]) and (before := first["perplexity"]):
        costs.append(f"a perplexity of {now['mean']:.1f} instead of {before['mean']:.1f} on held-out demonstrations")
    return costs


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def worst_first(outcomes: Mapping[str, Sequence[float | None]], margins: Mapping[str, Sequence[float]]) -> list[int]:
    """Numbers of the P prompts, the worst regressions first: most models that lost, then the largest margin lost by.

    Args:
        outcomes: by model other than the first, by the judge told first.
        margins: by model, how far its answer is ahead of the first model's; empty where the judge gives no scores.
    """
    count = len(next(iter(outcomes.values()), []))

    def badness(prompt: int) -> tuple[float, float, int]:
        lost = sum(told[prompt] == 0 for told in outcomes.values())
        behind = min((margin[prompt] for margin in margins.values()), default=0.0)
        won = sum(told[prompt] == 1 for told in outcomes.values())
        return (-lost, behind if lost else won, prompt)

    return sorted(range(count), key=badness)


def mean_of(values: Sequence[float] | None, seed: int) -> MeanFigure | None:
    """The mean with its interval; None without values."""
    if not values:
        return None
    return cast(MeanFigure, statistics.mean_with_interval(values, seed=seed).record())


def ratio_of(totals: Sequence[float], counts: Sequence[int], seed: int) -> MeanFigure | None:
    """Sum of the totals over the sum of the counts (nats per token), with answers as the units that are resampled.

    The standard error is the linearised ratio estimator's (Davison & Hinkley 1997, Bootstrap Methods, chapter 3). None
    where nothing was counted.
    """
    total_N, count_N = np.array(totals, dtype=float), np.array(counts, dtype=float)
    size = len(total_N)
    if not size or not count_N.sum():
        return None
    ratio = float(total_N.sum() / count_N.sum())
    if size == 1:
        return {"mean": ratio, "low": None, "high": None, "standard_error": None, "n": 1}
    drawn_RN = np.random.default_rng(seed).integers(0, size, (RESAMPLES * 10, size))
    counted_R = count_N[drawn_RN].sum(axis=1)
    low, high = np.percentile(total_N[drawn_RN].sum(axis=1) / np.maximum(counted_R, 1), [2.5, 97.5])
    residual_N = total_N - ratio * count_N
    error = math.sqrt(size / (size - 1) * float((residual_N**2).sum())) / float(count_N.sum())
    return {"mean": ratio, "low": float(low), "high": float(high), "standard_error": error, "n": size}
