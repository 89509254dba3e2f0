"""Bradley-Terry abilities by maximum likelihood, with ties (Davidson) and standard errors.

With a_i the ability of item i, in nats, and nu how readily a tie is called (0 without ties), i against j ends

    win : loss : tie  =  exp(d / 2) : exp(-d / 2) : nu,   d = a_i - a_j

so that without ties P(win) = sigmoid(d). Only differences mean anything; abilities are given with sum zero.

    N items; M pairs of items that met

Sources: Bradley and Terry, Biometrika 39 (1952), doi 10.2307/2334029; Davidson, "On extending the Bradley-Terry model
to accommodate ties in paired comparison experiments", JASA 65 (1970), doi 10.1080/01621459.1970.10481082; Ford,
American Mathematical Monthly 64 (1957), for when a maximum exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.csgraph import connected_components

from reward.records import InputError

Floats = NDArray[np.float64]
STEPS, CONVERGED, SHORTEST = 100, 1e-10, 1e-6
# exp(25) to 1: no number of comparisons in practice tells such an ability, so the likelihood has no maximum.
FARTHEST = 25.0
FLATTEST = 1e12  # condition number of the information; comparisons in the millions come to 1e8


@dataclass(frozen=True, slots=True)
class Abilities:
    """Fitted abilities.

    Attributes:
        names: the items, in the order given.
        ability_N: in nats, sum zero.
        covariance_NN: of the abilities with sum zero; the inverse of the negative Hessian.
        tie: Davidson's nu; 0 where there were no ties.
        log_likelihood: in nats, over all comparisons; the prior is not in it.
    """

    names: tuple[str, ...]
    ability_N: Floats
    covariance_NN: Floats
    tie: float
    log_likelihood: float

    def difference(self, name: str, reference: str) -> tuple[float, float]:
        """(ability of one item above another's, its standard error)."""
        i, j = self.names.index(name), self.names.index(reference)
        variance = self.covariance_NN[i, i] + self.covariance_NN[j, j] - 2 * self.covariance_NN[i, j]
        return float(self.ability_N[i] - self.ability_N[j]), math.sqrt(max(0.0, float(variance)))

    def probabilities(self, name: str, other: str) -> tuple[float, float, float]:
        """Of one comparison: (name wins, tie, other wins)."""
        half = self.difference(name, other)[0] / 2
        # Both divided by the larger, so that nothing overflows.
        win, loss, tie = (math.exp(x - abs(half)) for x in (half, -half, 0.0))
        total = win + loss + self.tie * tie
        return win / total, self.tie * tie / total, loss / total


def tally(comparisons: Iterable[tuple[str, str, float]]) -> tuple[tuple[str, ...], Floats, Floats]:
    """(names in order, wins, ties) of comparisons `(first, second, score)`; score 1: first won, 0: second, 1/2: a tie.

    Raises:
        InputError: an item is compared with itself, or a score is none of the three.
    """
    rows = list(comparisons)
    names = tuple(sorted({name for first, second, _ in rows for name in (first, second)}))
    number = {name: n for n, name in enumerate(names)}
    wins_NN, ties_NN = np.zeros((len(names),) * 2), np.zeros((len(names),) * 2)
    for first, second, score in rows:
        i, j = number[first], number[second]
        if i == j:
            raise InputError(f"{first} is compared with itself: a comparison needs two different items.")
        if score not in (0, 0.5, 1):
            raise InputError(
                f"The score of {first} against {second} is {score}: 1 (the first won), 0 (the second won) or 0.5 (a "
                "tie) is wanted."
            )
        if score == 0.5:
            ties_NN[i, j] += 1
            ties_NN[j, i] += 1
        else:
            wins_NN[(i, j) if score else (j, i)] += 1
    return names, wins_NN, ties_NN


def bradley_terry(
    wins: ArrayLike, ties: ArrayLike | None = None, names: Sequence[str] | None = None, prior: float = 0.0
) -> Abilities:
    """Abilities of N items from how often each beat each other.

    Newton's method on a concave log-likelihood; where a step would go down, it is halved.

    Args:
        wins: (N, N), times that the row's item won against the column's; diagonal 0. Fractions are allowed.
        ties: (N, N), symmetric, times that the two tied; None: never.
        names: of the items; None: their numbers.
        prior: precision of a normal prior around zero on each ability, in 1 / nat^2; 0: none. With 1, an ability is
            between -2 and 2 in 95 of 100 cases before anything is seen.

    Raises:
        InputError: the tables are no such tables, or the maximum lies at infinity: without a prior, where some items
            never won or never lost, alone or together; with one too, where every comparison is a tie.
    """
    wins_NN, ties_NN, items = _checked(wins, ties, names, prior)
    if not prior:
        _check_connected(wins_NN + ties_NN, items)
    n = len(items)
    i_M, j_M = np.nonzero(np.triu(wins_NN + wins_NN.T + ties_NN, 1))
    win_M, loss_M, tie_M = wins_NN[i_M, j_M], wins_NN[j_M, i_M], ties_NN[i_M, j_M]
    met_M = win_M + loss_M + tie_M
    tied = bool(tie_M.any())
    if tied and not (win_M + loss_M).any():
        raise InputError(f"All {tie_M.sum():g} comparisons are ties: they put the items in no order.")
    pair_MN = np.zeros((len(met_M), n))
    pair_MN[np.arange(len(met_M)), i_M], pair_MN[np.arange(len(met_M)), j_M] = 1, -1

    def log_likelihoods(point: Floats) -> tuple[Floats, Floats, Floats]:
        """Of a win, a loss and a tie of each pair. The point is (abilities, log nu)."""
        half_M, log_nu = pair_MN @ point[:n] / 2, point[n] if tied else -math.inf
        total_M = np.logaddexp(np.logaddexp(half_M, -half_M), log_nu)
        return half_M - total_M, -half_M - total_M, log_nu - total_M

    def log_likelihood(point: Floats) -> float:
        log_win_M, log_loss_M, log_tie_M = log_likelihoods(point)
        total = win_M @ log_win_M + loss_M @ log_loss_M
        return float(total + tie_M @ log_tie_M if tied else total)  # without ties log nu is -inf, and 0 * inf is no 0

    def objective(point: Floats) -> float:
        return log_likelihood(point) - prior / 2 * float(point[:n] @ point[:n])

    # Equal abilities, and the share of ties that was seen: nu / (2 + nu).
    point = np.zeros(n + 1)
    point[n] = math.log(2 * tie_M.sum() / (win_M + loss_M).sum()) if tied else 0.0
    for _ in range(STEPS):
        p_win_M, p_loss_M, p_tie_M = (np.exp(each_M) for each_M in log_likelihoods(point))
        # d goes with u = 1/2 for a win, -1/2 for a loss, 0 for a tie; log nu with the number of ties.
        mean_M = (p_win_M - p_loss_M) / 2
        variance_M = (p_win_M + p_loss_M) / 4 - mean_M**2
        gradient = np.append(
            pair_MN.T @ ((win_M - loss_M) / 2 - met_M * mean_M) - prior * point[:n], (tie_M - met_M * p_tie_M).sum()
        )
        information = np.zeros((n + 1, n + 1))
        # Shifting all abilities alike changes nothing; the matrix of ones forbids it and touches no difference.
        information[:n, :n] = pair_MN.T @ ((met_M * variance_M)[:, None] * pair_MN) + prior * np.eye(n) + 1
        information[:n, n] = information[n, :n] = -pair_MN.T @ (met_M * mean_M * p_tie_M)
        information[n, n] = (met_M * p_tie_M * (1 - p_tie_M)).sum() if tied else 1.0
        step = np.linalg.solve(information, gradient)
        if np.abs(step).max() < CONVERGED:
            break
        size, here = 1.0, objective(point)
        while size > SHORTEST and objective(point + size * step) < here - 1e-12 * abs(here):
            size /= 2
        point = point + size * step
        # On the way to infinity the likelihood becomes flat before the point is far: how soon, rounding decides.
        if np.abs(point).max() > FARTHEST or np.linalg.cond(information) > FLATTEST:
            raise InputError(
                f"The abilities of the {n} items grow without end, for their {met_M.sum():g} comparisons never "
                "contradict an order: collect more comparisons of items that are close, or give a prior strength, such "
                "as prior=0.1."
            )
    centre_NN = np.eye(n) - 1 / n
    covariance_NN = centre_NN @ np.linalg.inv(information)[:n, :n] @ centre_NN
    nu = math.exp(point[n]) if tied else 0.0
    return Abilities(items, point[:n] - point[:n].mean(), covariance_NN, nu, log_likelihood(point))


def _checked(
    wins: ArrayLike, ties: ArrayLike | None, names: Sequence[str] | None, prior: float
) -> tuple[Floats, Floats, tuple[str, ...]]:
    wins_NN = np.asarray(wins, dtype=float)
    n = len(wins_NN) if wins_NN.ndim else 0
    ties_NN = np.zeros((n, n)) if ties is None else np.asarray(ties, dtype=float)
    for what, table in (("wins", wins_NN), ("ties", ties_NN)):
        if n < 2 or table.shape != (n, n):
            raise InputError(
                f"The table of {what} has the shape {table.shape}, but a square one of at least 2 items is wanted, the "
                "same for wins and ties."
            )
        if not (np.isfinite(table).all() and (table >= 0).all()):
            raise InputError(f"The table of {what} holds a number below 0 or none at all: counts are wanted.")
        if table.diagonal().any():
            raise InputError(f"The table of {what} has an item against itself: set its diagonal to 0.")
    if (ties_NN != ties_NN.T).any():
        raise InputError("The table of ties is not symmetric: a tie of i with j is one of j with i, write it in both.")
    if not (wins_NN.any() or ties_NN.any()):
        raise InputError(f"There are no comparisons of the {n} items: at least one is wanted.")
    named = tuple(names) if names is not None else tuple(map(str, range(n)))
    if len(set(named)) != n or len(named) != n:
        raise InputError(f"The names are {', '.join(named)}, but {n} different ones are wanted.")
    if not 0 <= prior < math.inf:
        raise InputError(f"The prior strength is {prior}: 0 (none) or a positive number is wanted.")
    return wins_NN, ties_NN, named


def _check_connected(beaten_NN: Floats, names: tuple[str, ...]) -> None:
    """Without a prior, every split of the items in two needs a win (or a tie) in each direction (Ford 1957)."""
    parts, part_N = connected_components(beaten_NN > 0, directed=True, connection="strong")
    if parts == 1:
        return
    without = {"never won": beaten_NN.max(axis=1) == 0, "never lost": beaten_NN.max(axis=0) == 0}
    found = [f"{_list(names, items_N)} {what}" for what, items_N in without.items() if items_N.any()]
    if not found:
        # A part that nothing outside has beaten; there always is one.
        top = next(p for p in range(parts) if not (beaten_NN > 0)[np.ix_(part_N != p, part_N == p)].any())
        found = [f"none of {_list(names, np.asarray(part_N == top))} ever lost to one of the others"]
    raise InputError(
        f"Bradley-Terry abilities would be infinite: {'; '.join(found)} (a tie is half of each). Collect comparisons "
        "that link them, leave these items out, or give a prior strength, such as prior=0.1."
    )


def _list(names: tuple[str, ...], items_N: NDArray[np.bool_]) -> str:
    return ", ".join(name for name, there in zip(names, items_N, strict=True) if there)
