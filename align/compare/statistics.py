"""The statistics of the verdict: win rates, means, accuracies, and the sentence that says what they settle.

Pure functions on numpy arrays. All intervals are two-sided at 95 %. The unit of evidence is the prompt, not
the answer: several answers to one prompt resemble each other, and counting them as independent understates
the error.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)  # 1.959964

# Indices drawn at a time by the bootstrap: 32 MiB of int64, whatever the number of prompts.
_BLOCK = 2**22

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


@dataclass(frozen=True)
class Estimate:
    """A mean in the unit of its values, with its 95 % interval and standard error.

    n counts independent units: clusters (prompts) where they were given, else values. One unit says
    nothing about its error, so for n = 1 low, high and standard_error are nan.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    n: int

    def record(self) -> dict[str, Any]:
        """The figures as a JSON object; nan, which JSON does not have, becomes null."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Proportion:
    """A share of right answers in [0, 1] with its 95 % interval."""

    rate: float
    low: float
    high: float
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
    won = _vector(outcomes, "outcomes")
    strange = won[~np.isin(won, (0.0, 0.5, 1.0))]
    if strange.size:
        raise ValueError(f"outcomes holds {strange[0]:g}; only 1 (won), 0.5 (tie) and 0 (lost) are outcomes.")
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


def mean_with_interval(
    values: ArrayLike, clusters: ArrayLike | None = None, seed: int = 0, resamples: int = 10_000
) -> Estimate:
    """Mean of all values, with a percentile bootstrap interval that resamples whole clusters.

    Args:
        values: one-dimensional, finite.
        clusters: the cluster (prompt) each value belongs to, any labels; None when every value is its own.
        seed: of the resampling; the same call gives the same interval.
        resamples: bootstrap draws.

    With K clusters of sums S_k and sizes N_k, a draw takes K clusters with replacement and its mean is the
    ratio ΣS/ΣN (Davison & Hinkley 1997, Bootstrap Methods, chapter 3). The standard error is not drawn but
    computed, by the linearised ratio estimator sqrt(K/(K-1) Σ(S_k - mean N_k)²) / N, which is s/√n when every
    value is its own cluster. Below some ten clusters a percentile interval is too narrow: read n beside it.

    Raises:
        ValueError: no values, not one-dimensional, not finite, or not one cluster per value.
    """
    x = _vector(values, "values")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).sum())} of {x.size} values are nan or infinite: a mean needs finite.")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; at least 1 is wanted.")
    if clusters is None:
        member = np.arange(x.size)
    else:
        labels = np.asarray(clusters)
        if labels.shape != x.shape:
            raise ValueError(
                f"clusters has shape {labels.shape} and values {x.shape}; one cluster per value is wanted."
            )
        member = np.unique(labels, return_inverse=True)[1]
    mean = float(x.mean())
    # Deviations from the mean, so that constant values get an interval of exactly zero width.
    sum_K = np.bincount(member, weights=x - mean).astype(np.float64)
    size_K = np.bincount(member)
    count = size_K.size
    if count == 1:
        return Estimate(mean=mean, low=math.nan, high=math.nan, standard_error=math.nan, n=1)
    means_R = _resampled_means(sum_K, size_K, seed, resamples)
    low, high = np.quantile(means_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    error = math.sqrt(count / (count - 1) * float((sum_K**2).sum())) / x.size
    return Estimate(mean=mean, low=mean + float(low), high=mean + float(high), standard_error=error, n=count)


def accuracy_interval(correct: int, n: int) -> Proportion:
    """Share of right answers with the exact interval of Clopper & Pearson (1934, Biometrika 26:404).

    Raises:
        ValueError: n is below 1, or correct is outside 0..n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} right of {n}: wanted n of at least 1 and 0 <= correct <= n.")
    interval = binomtest(correct, n).proportion_ci(CONFIDENCE, method="exact")
    return Proportion(rate=correct / n, low=float(interval.low), high=float(interval.high), n=n)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of "wins and losses are equally likely"; ties are left out (Dixon & Mood 1946).

    Without a win or a loss there is no evidence either way: p = 1.

    Raises:
        ValueError: a negative count.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"{wins} wins and {losses} losses: counts cannot be negative.")
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


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
) -> str:
    """The verdict on one model in plain words, with the figures it rests on.

    Args:
        name, base: the two models compared.
        win: of `name` over `base`.
        judge: who preferred, as it reads after "by": "the simulated preference".
        kl: distance of `name` from the SFT reference in nats per answer; None leaves it unsaid.
        length_ratio: mean answer length over the base's; None leaves it unsaid. Judges like long answers, so
            a reader should see it next to the win rate.
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
    return f"{sentence} {' and '.join(costs)}." if costs else sentence


def percent(share: float) -> str:
    """A share in [0, 1] as whole percent: "81 %"."""
    return f"{_hundredths(share)} %"


def percent_range(low: float, high: float) -> str:
    """Two shares in [0, 1] as one range: "71–88 %"."""
    return f"{_hundredths(low)}–{_hundredths(high)} %"


def _hundredths(share: float) -> str:
    """Whole percent, with decimals where rounding would land on 0, 50 or 100.

    A verdict is read against these marks: "better, interval 50–62 %" would contradict itself.
    """
    for decimals in range(4):
        text = f"{100 * share:.{decimals}f}"
        if float(text) not in (0, 50, 100):
            return text
    return f"{100 * share:.0f}"


def _vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not vector.size:
        raise ValueError(f"{name} has shape {vector.shape}; a one-dimensional array with at least one value is wanted.")
    return vector


def _resampled_means(
    sum_K: NDArray[np.float64], size_K: NDArray[np.int64], seed: int, resamples: int
) -> NDArray[np.float64]:
    """R bootstrap means of the ratio ΣS/ΣN, drawing K clusters with replacement each time."""
    rng = np.random.default_rng(seed)
    count = size_K.size
    rows = max(1, _BLOCK // count)
    means = []
    for start in range(0, resamples, rows):
        drawn_RK = rng.integers(count, size=(min(rows, resamples - start), count))
        means.append(sum_K[drawn_RK].sum(axis=1) / size_K[drawn_RK].sum(axis=1))
    return np.concatenate(means)
