"""Statistics that several stages need: means, shares, paired comparisons and rank correlation.

Pure functions on numpy arrays. All intervals are two-sided at 95 %. The unit of evidence is the prompt, not the answer:
several answers to one prompt resemble each other, and counting them as independent understates the error.

Shapes: P pairs, N values, K clusters, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, rankdata

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)  # 1.959964

# Indices drawn at a time by the bootstrap: 32 MiB of int64, whatever the number of prompts.
_BLOCK = 2**22


class MeanFigure(TypedDict):
    """A mean with its 95 % interval over n prompts; interval and standard error are None when n is 1."""

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None
    n: int


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
        return _without_nan(asdict(self))


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


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation in [-1, 1] with its 95 % interval over n independent units; nan where undefined."""

    rho: float
    low: float
    high: float
    n: int

    def record(self) -> dict[str, Any]:
        """The figures as a JSON object; nan becomes null."""
        return _without_nan(asdict(self))


# Means and shares


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
    x = finite_vector(values, "values")
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


def share_with_interval(
    shares: ArrayLike, clusters: ArrayLike | None = None, seed: int = 0, resamples: int = 10_000
) -> Estimate:
    """Mean of values in [0, 1] as `mean_with_interval` has it, but honest where all of them are 0 or all are 1.

    Resampling equal values gives an interval without width, as if three right of three proved 100 %. There the interval
    is Clopper and Pearson's with one trial a cluster: 29 to 100 % for three of three.
    """
    estimate = mean_with_interval(shares, clusters, seed, resamples)
    if 0 < estimate.mean < 1:
        return estimate
    exact = accuracy_interval(estimate.n if estimate.mean else 0, estimate.n)
    return replace(estimate, low=exact.low, high=exact.high)


def average_of_shares(first: Estimate, second: Estimate) -> Estimate:
    """(first + second) / 2 of two shares measured on different pairs.

    The interval is recovered from theirs (MOVER: Zou & Donner 2008, Statistics in Medicine 27:1693), which keeps it
    honest where one of the two rests on a handful of pairs; an unknown end counts as 0 or 1. n is the smaller of the
    two.
    """
    mean = (first.mean + second.mean) / 2
    both = (first, second)
    below = math.hypot(*(each.mean - (0 if math.isnan(each.low) else each.low) for each in both)) / 2
    above = math.hypot(*((1 if math.isnan(each.high) else each.high) - each.mean for each in both)) / 2
    error = math.hypot(first.standard_error, second.standard_error) / 2
    return Estimate(mean, max(mean - below, 0.0), min(mean + above, 1.0), error, min(first.n, second.n))


def accuracy_interval(correct: int, n: int) -> Proportion:
    """Share of right answers with the exact interval of Clopper & Pearson (1934, Biometrika 26:404).

    Raises:
        ValueError: n is below 1, or correct is outside 0..n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} right of {n}: wanted n of at least 1 and 0 <= correct <= n.")
    interval = binomtest(correct, n).proportion_ci(CONFIDENCE, method="exact")
    return Proportion(rate=correct / n, low=float(interval.low), high=float(interval.high), n=n)


# Comparisons on the same pairs


def paired_difference(
    first_P: ArrayLike, second_P: ArrayLike, clusters: ArrayLike | None = None, seed: int = 0
) -> Estimate:
    """Mean of first minus second over the same pairs: for rights and wrongs, the difference of two accuracies.

    Raises:
        ValueError: the two are not of one length, or as `mean_with_interval`.
    """
    a_P, b_P = vector(first_P, "first_P"), vector(second_P, "second_P")
    if a_P.shape != b_P.shape:
        raise ValueError(f"{a_P.size} values against {b_P.size}: one of each per pair is wanted.")
    return mean_with_interval(a_P - b_P, clusters, seed)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of "wins and losses are equally likely"; ties are left out (Dixon & Mood 1946).

    Without a win or a loss there is no evidence either way: p = 1.

    Raises:
        ValueError: a negative count.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"{wins} wins and {losses} losses: counts cannot be negative.")
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def mcnemar(b: int, c: int) -> float:
    """Exact p-value of "both are equally accurate", from b pairs only the first has right and c only the second.

    McNemar (1947): pairs on which both are right or both wrong say nothing, and the others are a sign test.
    """
    return sign_test(b, c)


# Correlation


def spearman(x_N: ArrayLike, y_N: ArrayLike, n: int | None = None) -> Correlation:
    """Spearman's rank correlation, equal values sharing their mean rank.

    Args:
        n: number of independent units behind the N values; None: N.

    The interval is that of Bonett & Wright (2000, Psychometrika 65:23): Fisher's z with standard error
    sqrt((1 + rho²/2) / (n - 3)). It is nan up to n = 3, and all is nan where x or y is constant.

    Raises:
        ValueError: no values, or not equally many.
    """
    x, y = finite_vector(x_N, "x_N"), finite_vector(y_N, "y_N")
    if x.shape != y.shape:
        raise ValueError(f"{x.size} values against {y.size}: one of each is wanted.")
    n = x.size if n is None else n
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(math.nan, math.nan, math.nan, n)
    rho = min(1.0, max(-1.0, float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])))
    if n <= 3:
        return Correlation(rho, math.nan, math.nan, n)
    z = math.atanh(min(1 - 1e-12, max(1e-12 - 1, rho)))
    half = Z * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return Correlation(rho, math.tanh(z - half), math.tanh(z + half), n)


# Text


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


# Helpers


def vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """`values` as a one-dimensional array; `name` is what the error calls them.

    Raises:
        ValueError: not one-dimensional, or empty.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; a one-dimensional array with at least one value is wanted.")
    return array


def finite_vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """`vector`, and a ValueError for nan or infinite values."""
    array = vector(values, name)
    if not np.isfinite(array).all():
        strange = int((~np.isfinite(array)).sum())
        raise ValueError(f"{strange} of {array.size} {name} are nan or infinite: finite ones are wanted.")
    return array


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}


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
