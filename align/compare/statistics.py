"""The statistics of the verdict: win rates, and the sentence that says what they settle.

Pure functions on numpy arrays. All intervals are two-sided at 95 %. The unit of evidence is the prompt, not
the answer: several answers to one prompt resemble each other, and counting them as independent understates
the error. Means, shares and tests that reward models need too are in `reward.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from reward.statistics import (
    Estimate,
    Proportion,
    Z,
    accuracy_interval,
    mean_with_interval,
    percent,
    percent_range,
    sign_test,
    vector,
)

__all__ = [
    "Estimate",
    "PositionBias",
    "Proportion",
    "Standing",
    "WinRate",
    "accuracy_interval",
    "holm",
    "length_controlled_win_rate",
    "mean_with_interval",
    "percent",
    "percent_range",
    "position_bias",
    "prompts_wanted",
    "sign_test",
    "standing",
    "verdict_sentence",
    "win_rate",
]

# More prompts than this are not proposed to anyone, and from fewer than these nothing is foretold.
MOST_PROMPTS, FEWEST_TO_PLAN_BY = 10_000, 10

Standing = Literal["better", "worse", "not settled"]


@dataclass(frozen=True)
class WinRate:
    """How often one model's answer was preferred to the base's on the same prompt; shares in [0, 1].

    rate = (wins + ties / 2) / n; low and high are its 95 % interval.
    """

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    n: int

    def record(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return asdict(self)


def win_rate(outcomes: ArrayLike) -> WinRate:
    """Share of prompts won, a tie counting half, with the Wilson score interval on that mean.

    Args:
        outcomes: one per prompt: 1 the model won, 0.5 a tie, 0 the base won.

    The Wilson interval (Wilson 1927, JASA 22:209) solves |rate - p| = z sqrt(p (1 - p) / n) for p, where
    p (1 - p) is the variance of a win or loss. A variable x on [0, 1] with mean p has x² <= x, hence variance
    at most p (1 - p), and less as soon as ties are possible. So ties make the interval conservative: wider
    than it need be, covering the truth more often than 95 % says.

    By hand: 8 wins of 10 give 0.8 with interval 0.490 to 0.943.

    Raises:
        ValueError: no outcomes, not one-dimensional, or a value other than 0, 0.5 and 1.
    """
    won = _outcomes(outcomes)
    n = won.size
    rate = float(won.mean())
    shrink = 1 + Z**2 / n
    centre = (rate + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
    return WinRate(
        rate=rate,
        # At 0 and 1 the exact bound is the rate itself; rounding must not carry it past.
        low=min(max(centre - half, 0.0), rate),
        high=max(min(centre + half, 1.0), rate),
        wins=int((won == 1).sum()),
        ties=int((won == 0.5).sum()),
        losses=int((won == 0).sum()),
        n=n,
    )


@dataclass(frozen=True)
class PositionBias:
    """How far a judge that saw every pair of answers in both orders looks at the side and not at the answer.

    Attributes:
        first: share of all verdicts for the side shown first, a tie counting half; 0.5 without bias.
        consistent: share of prompts on which both orders give one verdict.
        p: two-sided exact p-value of "neither side is preferred as a side", over prompts whose orders disagree.
        n: prompts.
    """

    first: float
    consistent: float
    p: float
    n: int

    def record(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return asdict(self)


def position_bias(forward_N: ArrayLike, backward_N: ArrayLike) -> PositionBias:
    """The bias of a judge, from its verdicts on the same prompts in both orders.

    Args:
        forward_N: outcome for the model, 1, 0.5 or 0, where its answer was shown first.
        backward_N: the same where it was shown second.

    The model's outcome free of the side is the mean of the two: a judge that always names the first side gives 1/2 on
    every prompt, and `first` is 1. (Zheng et al. 2023, arXiv 2306.05685, section 3.3.)

    Raises:
        ValueError: not one outcome each, or a value other than 0, 0.5 and 1.
    """
    ahead_N, behind_N = _outcomes(forward_N), _outcomes(backward_N)
    if ahead_N.shape != behind_N.shape:
        raise ValueError(
            f"{ahead_N.size} verdicts in one order and {behind_N.size} in the other: each twice is wanted."
        )
    # For the first side in both orders: the model's outcome ahead, and the other's where the model stood behind.
    first_N = ahead_N + (1 - behind_N)
    return PositionBias(
        first=float(first_N.mean()) / 2,
        consistent=float((ahead_N == behind_N).mean()),
        p=sign_test(int((first_N > 1).sum()), int((first_N < 1).sum())),
        n=ahead_N.size,
    )


def length_controlled_win_rate(outcomes: ArrayLike, length: ArrayLike, base_length: ArrayLike) -> Estimate:
    """The win rate the model would have if its answers were as long as the base's.

    Outcomes are modelled as logit P(win) = a + b tanh(d / s), with d the model's length minus the base's and s the
    standard deviation of d (the length term of Dubois et al. 2024, arXiv 2404.04475); at d = 0 that is sigmoid(a).
    The coefficients have normal priors around 0 (Gelman et al. 2008, arXiv 0901.4011, in a plain form): of deviation
    2.5 for a, so that a model which always wins has a finite figure, and of 10 for b, so that a judge who looks at
    nothing but length is fitted as what it is. The interval is that of `a`, through the
    sigmoid, by the sandwich covariance or the model's own, whichever is wider: where length tells nearly every outcome,
    no residual is left for the first. Outcomes may be shares, as of two orders.

    Where all differences in length are alike, nothing tells length from the model: then the figure is the plain rate,
    with b = 0.

    Raises:
        ValueError: not one of each per prompt, or an outcome outside 0..1.
    """
    won_N, own_N, base_N = vector(outcomes, "outcomes"), vector(length, "length"), vector(base_length, "base_length")
    if not won_N.shape == own_N.shape == base_N.shape:
        raise ValueError(f"{won_N.size} outcomes, {own_N.size} and {base_N.size} lengths: one of each is wanted.")
    if ((won_N < 0) | (won_N > 1)).any():
        raise ValueError("an outcome is outside 0..1.")
    difference_N = own_N - base_N
    spread = float(difference_N.std())
    columns = [np.ones_like(won_N)] + ([np.tanh(difference_N / spread)] if spread > 1e-9 else [])
    x_NC = np.stack(columns, axis=1)
    precision = np.diag([1 / 2.5**2, 1 / 10**2][: x_NC.shape[1]])
    beta_C = np.zeros(x_NC.shape[1])
    for _ in range(100):  # Newton on a strictly concave function
        p_N = expit(x_NC @ beta_C)
        slope_C = x_NC.T @ (won_N - p_N) - precision @ beta_C
        curve_CC = (x_NC * (p_N * (1 - p_N))[:, None]).T @ x_NC + precision
        step_C = np.linalg.solve(curve_CC, slope_C)
        beta_C = beta_C + step_C
        if float(np.abs(step_C).max()) < 1e-10:
            break
    score_NC = x_NC * (won_N - expit(x_NC @ beta_C))[:, None]
    inverse_CC = np.linalg.inv(curve_CC)
    sandwich_CC = inverse_CC @ (score_NC.T @ score_NC) @ inverse_CC
    error = math.sqrt(max(float(sandwich_CC[0, 0]), float(inverse_CC[0, 0])))
    rate, low, high = (float(expit(beta_C[0] + shift * Z * error)) for shift in (0, -1, 1))
    return Estimate(rate, low, high, error * rate * (1 - rate), won_N.size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of several tests at once, in the order given (Holm 1979, Scand. J. Statist. 6:65).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none falls below one before it.

    Raises:
        ValueError: a p-value outside 0..1.
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values are {list(p_values)}: numbers from 0 to 1 are wanted.")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - place)))
        adjusted[index] = largest
    return adjusted


def prompts_wanted(rate: float, variance: float | None = None, power: float = 0.8) -> int | None:
    """Prompts that would settle a win rate, if it is truly `rate`: enough to find it off 1/2 with this probability.

    n = ((z_0.975 sqrt(v) + z_power sqrt(v)) / (rate - 1/2))^2 for a two-sided test at 5 %, with v the variance of one
    outcome. None where the rate is 1/2, which no number of prompts tells from 1/2.

    Args:
        variance: of one outcome; None: rate (1 - rate), that of wins and losses without ties.

    Raises:
        ValueError: rate outside 0..1, or power outside (0, 1).
    """
    if not 0 <= rate <= 1 or not 0 < power < 1:
        raise ValueError(f"rate is {rate} and power is {power}: shares are wanted, and power strictly between 0 and 1.")
    if rate == 0.5:
        return None
    spread = math.sqrt(rate * (1 - rate) if variance is None else variance)
    z = Z + NormalDist().inv_cdf(power)
    return max(1, math.ceil((z * spread / (rate - 0.5)) ** 2))


def standing(low: float, high: float) -> Standing:
    """What a 95 % interval of a win rate settles: an end that touches one half settles nothing."""
    if low > 0.5:
        return "better"
    return "worse" if high < 0.5 else "not settled"


def verdict_sentence(
    name: str,
    base: str,
    win: WinRate,
    judge: str,
    kl: float | None = None,
    length_ratio: float | None = None,
    controlled: Estimate | None = None,
) -> str:
    """The verdict on one model in plain words, with the figures it rests on.

    Args:
        name, base: the two models compared.
        win: of `name` over `base`.
        judge: who preferred, as it reads after "by": "the simulated preference".
        kl: distance of `name` from the SFT reference in nats per answer; None leaves it unsaid.
        length_ratio: mean answer length over the base's; None leaves it unsaid. Judges like long answers, so
            a reader should see it next to the win rate.
        controlled: the win rate at equal length; None leaves it unsaid.
    """
    opening = {
        "better": f"{name} is better than {base}",
        "worse": f"{name} is worse than {base}",
        "not settled": f"It is not settled whether {name} is better than {base}",
    }[standing(win.low, win.high)]
    prompts = "1 held-out prompt" if win.n == 1 else f"{win.n} held-out prompts"
    ties = ", ties counting half" if win.ties else ""
    sentence = (
        f"{opening}: preferred on {percent(win.rate)} of {prompts}{ties} "
        f"(95 % interval {percent_range(win.low, win.high)}), by {judge}."
    )
    costs = []
    if kl is not None:
        costs.append(f"It moved {kl:.1f} nats per answer away from the reference")
    if length_ratio is not None:
        costs.append(f"{'its' if costs else 'Its'} answers are {length_ratio:.2f} times as long as those of {base}")
    if costs:
        sentence += f" {' and '.join(costs)}."
    if controlled is not None:
        sentence += f" {_at_equal_length(win, controlled)}"
    wanted = prompts_wanted(win.rate)
    if standing(win.low, win.high) == "not settled" and wanted is not None and win.n >= FEWEST_TO_PLAN_BY:
        if wanted <= MOST_PROMPTS:
            sentence += f" If that rate holds, {max(wanted, win.n + 1)} prompts in all would be likely to settle it."
        else:
            sentence += f" If that rate holds, not even {MOST_PROMPTS:,} prompts would settle it."
    return sentence


def _at_equal_length(win: WinRate, controlled: Estimate) -> str:
    figure = f"{percent(controlled.mean)} ({percent_range(controlled.low, controlled.high)})"
    before, after = standing(win.low, win.high), standing(controlled.low, controlled.high)
    if before == after:
        return f"At equal length it would be preferred on {figure}."
    if after == "not settled":
        return f"At equal length that is not settled: it would be preferred on {figure}."
    return f"At equal length it is {after}: it would be preferred on {figure}."


def _outcomes(outcomes: ArrayLike) -> NDArray[np.float64]:
    won = vector(outcomes, "outcomes")
    strange = won[~np.isin(won, (0.0, 0.5, 1.0))]
    if strange.size:
        raise ValueError(f"outcomes holds {strange[0]:g}; only 1 (won), 0.5 (tie) and 0 (lost) are outcomes.")
    return won
