"""How far each annotator can be trusted, and what votes say when they count by that: Dawid-Skene and Crowd-BT.

Nobody says which side is right: expectation maximisation finds the sides and the annotators' errors that together
explain the votes best. A model is fitted on one set of votes and applied to any other, so that held-out votes never
shape what training sees. Neither model knows a first and a second answer: mirrored votes give mirrored results.

    V votes, P pairs, A annotators, G groups (the answers to one prompt), K answers of a group, Q quadrature nodes
    S: what was said, T: what is true; both are 0 the first answer is better, 1 a tie, 2 the second is better

Sources: Dawid and Skene, Applied Statistics 28 (1979), doi 10.2307/2346806; Chen, Bennett, Collins-Thompson and
Horvitz, "Pairwise ranking aggregation in a crowdsourced setting" (WSDM 2013), doi 10.1145/2433396.2433420; Minka,
"Expectation propagation for approximate Bayesian inference" (UAI 2001).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FIRST, TIE, SECOND = 0, 1, 2
# Every annotator begins with this many votes like everyone's: someone new is believed like the average, and someone
# with three votes cannot be found perfect.
PRIOR_VOTES = 4.0
# And everyone together with as many votes of people who are right two times in three.
AT_FIRST_ST = np.array([[4.0, 1.0, 1.0], [1.0, 4.0, 1.0], [1.0, 1.0, 4.0]]) / 6
HONEST_AT_FIRST = 2 / 3
LEAST = 1e-10  # where a probability is 0
ROUNDS, TOLERANCE = 1000, 1e-7

# Crowd-BT: answers' scores are normal around 0 with this standard deviation, in units of the logistic noise of one
# comparison: two random answers differ by 2.8 in the mean square, which a perfect annotator tells right 5 times in 6.
SCORE_DEVIATION = 2.0
NODES = 16
DAMPING = 0.5  # parallel updates of votes on one pair overshoot


@dataclass(frozen=True, slots=True)
class Ballots:
    """Votes as numbers.

    Attributes:
        pair_V: the pair each vote is on. annotator_V: who gave it. side_V: 0, 1 or 2 (see S above).
        group_P: the group of each pair. first_P, second_P: its two answers, numbered from 0 within the group.
    """

    pair_V: Ints
    annotator_V: Ints
    side_V: Ints
    group_P: Ints
    first_P: Ints
    second_P: Ints


@dataclass(frozen=True, slots=True)
class DawidSkene:
    """Annotators' errors and how frequent each truth is.

    Attributes:
        confusion_AST: probability that annotator A says S where T is true.
        share_T: probability of each truth before any vote.
    """

    confusion_AST: Floats
    share_T: Floats

    @property
    def trust_A(self) -> Floats:
        """P(names the better answer) - P(names the worse): 1 never errs, 0 tells nothing, -1 has it reversed."""
        return np.asarray(self.confusion_AST[:, FIRST, FIRST] - self.confusion_AST[:, SECOND, FIRST])

    def sides(self, ballots: Ballots) -> Floats:
        """Probability of each truth for each pair, given its votes: (P, 3)."""
        log_VT = np.log(self.confusion_AST)[ballots.annotator_V, ballots.side_V]
        log_PT = np.log(self.share_T) + _sums(ballots.pair_V, log_VT, len(ballots.group_P))
        sides_PT = np.exp(log_PT - log_PT.max(axis=1, keepdims=True))
        return np.asarray(sides_PT / sides_PT.sum(axis=1, keepdims=True))

    def better(self, ballots: Ballots) -> Floats:
        """Probability that the first answer of each pair is the better one, a tie counting half: (P,)."""
        sides_PT = self.sides(ballots)
        return np.asarray(sides_PT[:, FIRST] + sides_PT[:, TIE] / 2)


def fit_dawid_skene(ballots: Ballots, annotators: int, prior_votes: float = PRIOR_VOTES) -> DawidSkene:
    """Expectation maximisation from the votes' shares; every pair has a vote.

    Which answer of a pair is called first was drawn at random, so an error and its mirror image are one: 3 free numbers
    an annotator instead of 6, and twice the votes for each.

    Args:
        annotators: A; an annotator without a vote gets everyone's errors together.
        prior_votes: votes like everyone's that each annotator begins with; 0 gives maximum likelihood.
    """
    sides_PT = _shares(_sums(ballots.pair_V, np.eye(3)[ballots.side_V], len(ballots.group_P)), axis=1)
    for _ in range(ROUNDS):
        said_V = 3 * ballots.annotator_V + ballots.side_V
        counts_AST = _sums(said_V, sides_PT[ballots.pair_V], 3 * annotators).reshape(annotators, 3, 3)
        counts_AST = counts_AST + counts_AST[:, ::-1, ::-1]
        everyone_ST = _shares(counts_AST.sum(axis=0) + prior_votes * AT_FIRST_ST, axis=0)
        counts_T = sides_PT.sum(axis=0) + prior_votes / 3
        model = DawidSkene(
            _shares(counts_AST + prior_votes * everyone_ST, axis=1), _shares(counts_T + counts_T[::-1], axis=0)
        )
        before, sides_PT = sides_PT, model.sides(ballots)
        if np.abs(sides_PT - before).max() < TOLERANCE:
            break
    return model


def _sums(index_V: Ints, rows_VT: Floats, size: int) -> Floats:
    """Rows with the same index added up: (size, 3); `np.add.at` is slower."""
    return np.stack([np.bincount(index_V, column_V, minlength=size) for column_V in rows_VT.T], axis=1)


def _shares(counts: Floats, axis: int) -> Floats:
    counts = np.maximum(counts, LEAST)
    return np.asarray(counts / counts.sum(axis=axis, keepdims=True))


# Not crowd-kit's NoisyBradleyTerry: it takes grouped comparisons, but its gradient keeps only each annotator's last
# vote, one place off, so that spammers come out above careful people (docs/decisions.md); and it knows neither ties nor
# annotators it was not fitted to. Point estimates of one score for every few votes would also be fitted to the very
# votes they then judge. So the scores are integrated out here.


@dataclass(frozen=True, slots=True)
class CrowdBradleyTerry:
    """Annotators' honesty (Chen et al. call it eta) and, for any votes, the Bradley-Terry scores behind them.

    An annotator votes as Bradley-Terry says with probability eta, and the other way round with 1 - eta:

        P(k prefers i to j) = eta_k sigmoid(s_i - s_j) + (1 - eta_k) sigmoid(s_j - s_i)

    Scores belong to one group and are normal around 0 before any vote. A tie is half a vote each way.
    """

    eta_A: Floats

    @property
    def trust_A(self) -> Floats:
        """2 eta - 1: 1 votes as Bradley-Terry says, 0 tells nothing, -1 has it reversed."""
        return np.asarray(2 * self.eta_A - 1)

    def better(self, ballots: Ballots) -> Floats:
        """Probability that the first answer of each pair has the higher score: (P,)."""
        _, mean_P, variance_P = _scores(ballots, self.eta_A, None)
        return np.asarray(ndtr(mean_P / np.sqrt(variance_P)))


def fit_crowd_bradley_terry(ballots: Ballots, annotators: int, prior_votes: float = PRIOR_VOTES) -> CrowdBradleyTerry:
    """Expectation maximisation of eta, with the scores integrated out by expectation propagation.

    Args:
        annotators: A; an annotator without a vote gets everyone's eta together.
        prior_votes: votes like everyone's that each annotator begins with.
    """
    eta_A, _, _ = _scores(ballots, np.full(annotators, HONEST_AT_FIRST), prior_votes)
    return CrowdBradleyTerry(eta_A)


def _scores(ballots: Ballots, eta_A: Floats, prior_votes: float | None) -> tuple[Floats, Floats, Floats]:
    """(eta, mean and variance of s_first - s_second of each pair); eta is learned unless `prior_votes` is None.

    Each vote is stood for by a normal factor exp(shift d - tightness d^2 / 2) on its pair's difference d. Again and
    again, each is judged against what all others say (the cavity): its factor becomes the one with which d has the mean
    and variance that its true, not normal, likelihood gives. How likely the vote was honest follows from the same sums.
    """
    group_V, first_V, second_V = (x_P[ballots.pair_V] for x_P in (ballots.group_P, ballots.first_P, ballots.second_P))
    node_Q, weight_Q = np.polynomial.hermite_e.hermegauss(NODES)
    said_V1 = 1 - ballots.side_V[:, None] / 2  # 1 the first answer, 1/2 a tie, 0 the second
    given_A = np.bincount(ballots.annotator_V, minlength=len(eta_A))
    tightness_V, shift_V = np.zeros(len(group_V)), np.zeros(len(group_V))
    for _ in range(ROUNDS):
        mean_GK, covariance_GKK = _normal(ballots, tightness_V, shift_V)
        mean_V, variance_V = _differences(mean_GK, covariance_GKK, group_V, first_V, second_V)
        rest_V = 1 / variance_V - tightness_V
        centre_V = (mean_V / variance_V - shift_V) / rest_V

        d_VQ = centre_V[:, None] + node_Q / np.sqrt(rest_V)[:, None]
        up_VQ, down_VQ, eta_V1 = expit(d_VQ), expit(-d_VQ), eta_A[ballots.annotator_V][:, None]
        first_VQ = eta_V1 * up_VQ + (1 - eta_V1) * down_VQ
        second_VQ = eta_V1 * down_VQ + (1 - eta_V1) * up_VQ
        likelihood_VQ = np.where(
            said_V1 == 1, first_VQ, np.where(said_V1 == 0, second_VQ, np.sqrt(first_VQ * second_VQ))
        )
        tilted_VQ = weight_Q * likelihood_VQ
        tilted_VQ /= tilted_VQ.sum(axis=1, keepdims=True)
        tilted_mean_V = (tilted_VQ * d_VQ).sum(axis=1)
        tilted_variance_V = (tilted_VQ * (d_VQ - tilted_mean_V[:, None]) ** 2).sum(axis=1)

        # A surprising vote widens what is believed; a factor that did so could leave no distribution, so it only moves.
        new_tightness_V = np.maximum(1 / tilted_variance_V - rest_V, 0)
        new_shift_V = tilted_mean_V * (rest_V + new_tightness_V) - centre_V * rest_V
        moved = max(np.abs(new_tightness_V - tightness_V).max(), np.abs(new_shift_V - shift_V).max())
        tightness_V += DAMPING * (new_tightness_V - tightness_V)
        shift_V += DAMPING * (new_shift_V - shift_V)

        if prior_votes is not None:
            honest_VQ = said_V1 * up_VQ / first_VQ + (1 - said_V1) * down_VQ / second_VQ
            honest_V = (tilted_VQ * eta_V1 * honest_VQ).sum(axis=1)
            honest_A = np.bincount(ballots.annotator_V, honest_V, minlength=len(eta_A))
            everyone = (honest_V.sum() + prior_votes * HONEST_AT_FIRST) / (len(honest_V) + prior_votes)
            before_A, eta_A = eta_A, (honest_A + prior_votes * everyone) / (given_A + prior_votes)
            moved = max(moved, np.abs(eta_A - before_A).max())
        if moved < TOLERANCE:
            break
    mean_GK, covariance_GKK = _normal(ballots, tightness_V, shift_V)
    return eta_A, *_differences(mean_GK, covariance_GKK, ballots.group_P, ballots.first_P, ballots.second_P)


def _normal(ballots: Ballots, tightness_V: Floats, shift_V: Floats) -> tuple[Floats, Floats]:
    """Mean (G, K) and covariance (G, K, K) of the scores under the prior and the votes' normal factors."""
    tightness_P = np.bincount(ballots.pair_V, tightness_V, minlength=len(ballots.group_P))
    shift_P = np.bincount(ballots.pair_V, shift_V, minlength=len(ballots.group_P))
    group_P, first_P, second_P = ballots.group_P, ballots.first_P, ballots.second_P
    groups, answers = group_P.max() + 1, max(first_P.max(), second_P.max()) + 1
    precision_GKK = np.tile(np.eye(answers) / SCORE_DEVIATION**2, (groups, 1, 1))
    shift_GK = np.zeros((groups, answers))
    for i_P, j_P in ((first_P, second_P), (second_P, first_P)):
        np.add.at(precision_GKK, (group_P, i_P, i_P), tightness_P)
        np.add.at(precision_GKK, (group_P, i_P, j_P), -tightness_P)
    np.add.at(shift_GK, (group_P, first_P), shift_P)
    np.add.at(shift_GK, (group_P, second_P), -shift_P)
    covariance_GKK = np.asarray(np.linalg.inv(precision_GKK), dtype=np.float64)
    return np.asarray((covariance_GKK @ shift_GK[..., None])[..., 0]), covariance_GKK


def _differences(
    mean_GK: Floats, covariance_GKK: Floats, group: Ints, first: Ints, second: Ints
) -> tuple[Floats, Floats]:
    """Mean and variance of s_first - s_second."""
    mean = mean_GK[group, first] - mean_GK[group, second]
    own = covariance_GKK[group, first, first] + covariance_GKK[group, second, second]
    return mean, own - 2 * covariance_GKK[group, first, second]
