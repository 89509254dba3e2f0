"""Does the gap between two rewards say how sure to be? Temperature, calibration error, Brier score.

Pure functions on numpy arrays. Shapes: P pairs, B bins. A gap is the reward of the chosen answer minus that of the
rejected one, in the unit of the reward. Confidence is sigmoid(|gap| / T): the chance, by the Bradley-Terry model that
reward training fits, that the answer with the higher reward is the chosen one; in [0.5, 1]. It is correct where the gap
is above 0; a pair with a gap of 0 is counted as wrong.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit

from reward.statistics import finite_vector, vector

# A fitted temperature stays within this factor of the mean absolute gap: beyond it every confidence is 1/2 or 1.
REACH = 100.0


class Bin(NamedTuple):
    """Pairs of like confidence: their mean confidence, their share of right ones, and how many they are."""

    confidence: float
    accuracy: float
    n: int


def fit_temperature(gap_P: ArrayLike) -> float:
    """T > 0 that maximises Σ log sigmoid(gap / T), in the unit of the gaps (Guo et al. 2017, arXiv 1706.04599, 4.2).

    sigmoid(gap / T) is then the likeliest chance that the chosen answer is chosen. In 1/T the sum is concave, so its
    slope has at most one zero, which is bracketed and bisected. T stays within a factor of 100 of the mean absolute
    gap, and this is where it ends up in two cases: if no pair is wrong, the sum grows as T falls, and T is the lower
    bound (every confidence near 1); if the gaps add up to 0 or less (as a rule, an accuracy of one half or below), it
    grows as T rises, and T is the upper bound (every confidence near one half). If all gaps are 0, T is 1.

    By hand: gaps 1, 1, 1, -1 want sigmoid(1/T) = 3/4, T = 1 / log 3 = 0.910239.

    Raises:
        ValueError: no gaps, not one-dimensional, or not finite.
    """
    gaps_P = finite_vector(gap_P, "gap_P")
    scale = float(np.abs(gaps_P).mean())
    if scale == 0:
        return 1.0
    unit_P = gaps_P / scale

    def slope(log_inverse: float) -> float:
        """Of the sum, along 1/T: Σ gap sigmoid(-gap / T)."""
        return float((unit_P * expit(-math.exp(log_inverse) * unit_P)).sum())

    end = math.log(REACH)
    if slope(-end) <= 0:
        return scale * REACH
    if slope(end) >= 0:
        return scale / REACH
    return scale * math.exp(-float(brentq(slope, -end, end)))


def cross_fitted_temperature(gap_P: ArrayLike, clusters: ArrayLike) -> NDArray[np.float64] | None:
    """A temperature for every pair, fitted on the half of the prompts that the pair is not in; shape (P,).

    What is fitted on the pairs it is measured on looks better than it is. The halves alternate along the prompts'
    hashes: they depend neither on the order of the pairs nor on a seed. None with a single prompt.
    """
    gaps_P = vector(gap_P, "gap_P")
    names = [str(cluster) for cluster in np.asarray(clusters).tolist()]
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    if len(ordered) < 2:
        return None
    half = set(ordered[::2])
    in_half_P = np.array([name in half for name in names])
    return np.where(in_half_P, fit_temperature(gaps_P[~in_half_P]), fit_temperature(gaps_P[in_half_P]))


def calibration_bins(n: int) -> int:
    """Number of bins for n pairs: one for every 100, at most 15; 2 from 40 pairs on, 1 below.

    With fewer pairs in a bin its accuracy is mostly noise, which `expected_calibration_error` adds up.
    """
    return 1 if n < 40 else min(15, max(2, n // 100))


def reliability(confidence_P: ArrayLike, correct_P: ArrayLike, bins: int | None = None) -> list[Bin]:
    """Pairs in bins of equal mass along their confidence, lowest first; equal confidences share a bin."""
    conf_P, right_P, member_P = _binned(confidence_P, correct_P, bins)
    groups = [member_P == b for b in np.unique(member_P)]
    return [Bin(float(conf_P[own].mean()), float(right_P[own].mean()), int(own.sum())) for own in groups]


def expected_calibration_error(confidence_P: ArrayLike, correct_P: ArrayLike, bins: int | None = None) -> float:
    """Mean of |accuracy - confidence| over bins of equal mass, weighted by their pairs, in [0, 1].

    Equation 3 of Guo et al. 2017, with bins of equal mass (Nguyen & O'Connor 2015, arXiv 1508.05154) in place of equal
    width: confidences of a good model crowd at one end.

    Args:
        confidence_P: sigmoid(|gap| / T), the chance that the higher reward is the chosen answer's; in [0.5, 1].
        correct_P: whether it is.
        bins: at most this many; None: `calibration_bins`.
    """
    conf_P, right_P, member_P = _binned(confidence_P, correct_P, bins)
    return float(np.abs(np.bincount(member_P, weights=right_P - conf_P)).sum()) / conf_P.size


def calibration_noise(confidence_P: ArrayLike, bins: int | None = None, seed: int = 0, draws: int = 1000) -> float:
    """Mean `expected_calibration_error` that perfect calibration would show with these confidences, bins and pairs.

    Each draw makes a pair right with its confidence as the chance. The error is a sum of absolute values, so that it is
    above 0 even where nothing is wrong, by much on few pairs. By hand: one pair of confidence 0.5 is always 0.5 off.
    """
    conf_P, _, member_P = _binned(confidence_P, confidence_P, bins)
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(draws):
        off_P = (rng.random(conf_P.size) < conf_P) - conf_P
        total += float(np.abs(np.bincount(member_P, weights=off_P)).sum())
    return total / (draws * conf_P.size)


def brier_score(confidence_P: ArrayLike, correct_P: ArrayLike) -> float:
    """Mean squared distance of confidence from right (1) or wrong (0); always saying 0.5 gives 0.25 (Brier 1950)."""
    return float(((vector(confidence_P, "confidence_P") - vector(correct_P, "correct_P")) ** 2).mean())


def _binned(
    confidence_P: ArrayLike, correct_P: ArrayLike, bins: int | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """(confidence, right, bin of each pair), the bins cut at quantiles; those that ties leave empty have no pair."""
    conf_P, right_P = vector(confidence_P, "confidence_P"), vector(correct_P, "correct_P")
    if conf_P.shape != right_P.shape:
        raise ValueError(f"{conf_P.size} confidences and {right_P.size} outcomes: one of each per pair is wanted.")
    bins = calibration_bins(conf_P.size) if bins is None else bins
    if bins < 1:
        raise ValueError(f"bins is {bins}; at least 1 is wanted.")
    cuts = np.quantile(conf_P, np.linspace(0, 1, bins + 1)[1:-1])
    return conf_P, right_P, np.searchsorted(cuts, conf_P)
