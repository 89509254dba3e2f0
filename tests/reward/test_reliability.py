"""Dawid-Skene against crowd-kit, Crowd-BT against exact integrals, and both against people made up for the purpose."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.reliability import (
    FIRST,
    HONEST_AT_FIRST,
    SCORE_DEVIATION,
    SECOND,
    TIE,
    Ballots,
    CrowdBradleyTerry,
    fit_crowd_bradley_terry,
    fit_dawid_skene,
)

# The same examples on every run, and no failure because a machine was busy.
deterministic = settings(derandomize=True, deadline=None, max_examples=25)
# Pairs of one group (first, second), and what annotators 0 to 3 said of them.
Row = tuple[int, tuple[int, int], Mapping[int, int]]
sides = st.sampled_from([FIRST, TIE, SECOND])
rows = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([(0, 1), (0, 2), (1, 2)]),
        st.dictionaries(st.integers(0, 3), sides, min_size=1),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[:2],
)
FITS = [fit_dawid_skene, fit_crowd_bradley_terry]


def ballots(given_: Iterable[Row]) -> Ballots:
    group, answers, votes = [], [], []
    for number, (of, pair, said) in enumerate(given_):
        group.append(of)
        answers.append(pair)
        votes += [(number, annotator, side) for annotator, side in said.items()]
    (first, second), (pair_V, annotator_V, side_V) = np.array(answers).T, np.array(votes).T
    return Ballots(pair_V, annotator_V, side_V, np.array(group), first, second)


def mirrored(given_: Iterable[Row]) -> list[Row]:
    return [(of, (j, i), {annotator: 2 - side for annotator, side in said.items()}) for of, (i, j), said in given_]


def people(seed: int, pairs: int, right: Iterable[float], ties: float = 0.15) -> tuple[list[Row], list[int]]:
    """Pairs and what is true of them; annotator k says so with probability right[k], else one of the other two."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, size=pairs, p=[(1 - ties) / 2, ties, (1 - ties) / 2])
    given_ = []
    for number, true in enumerate(truth):
        said = {
            annotator: int(true if rng.random() < share else rng.choice([side for side in range(3) if side != true]))
            for annotator, share in enumerate(right)
        }
        given_.append((number, (0, 1), said))
    return given_, truth.tolist()


# Dawid and Skene


def test_crowdkit_finds_the_same_from_every_pair_and_its_mirror_image() -> None:
    """Its model has a first and a second side; told each pair both ways round, it finds what ours finds from one."""
    pd = pytest.importorskip("pandas")
    aggregation = pytest.importorskip("crowdkit.aggregation")
    given_, _ = people(3, 120, (0.9, 0.8, 0.75, 0.6, 0.4))
    told = [
        (f"{side} {task}", worker, label)
        for side, each in (("plain", given_), ("mirror", mirrored(given_)))
        for task, _, said in each
        for worker, label in said.items()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = aggregation.DawidSkene(n_iter=60, tol=-1.0)
        oracle.fit(pd.DataFrame(told, columns=["task", "worker", "label"]))
    model = fit_dawid_skene(ballots(given_), 5, prior_votes=0)
    found = model.sides(ballots(given_))
    wanted = oracle.probas_.loc[[f"plain {task}" for task in range(120)], [FIRST, TIE, SECOND]].to_numpy()
    assert found == pytest.approx(wanted, abs=1e-5)
    errors = oracle.errors_.to_dict("index")
    for annotator in range(5):
        for said in (FIRST, TIE, SECOND):
            assert errors[annotator, said] == pytest.approx(
                dict(enumerate(model.confusion_AST[annotator, said])), abs=1e-5
            )


def test_errors_are_recovered() -> None:
    """Right 0.9, 0.7, at random 1/3, and mostly the other way round."""
    given_, truth = people(1, 2000, (0.9, 0.7, 1 / 3, 0.7, 0.9))
    backwards = [(of, pair, said | {4: 2 - said[4]}) for of, pair, said in given_]
    model = fit_dawid_skene(ballots(backwards), 6)
    right = [model.confusion_AST[annotator, FIRST, FIRST] for annotator in range(4)]
    assert right == pytest.approx([0.9, 0.7, 1 / 3, 0.7], abs=0.05)
    assert model.trust_A[:5] == pytest.approx([0.85, 0.55, 0, 0.55, -0.85], abs=0.06)
    assert model.share_T == pytest.approx([0.425, 0.15, 0.425], abs=0.03)
    # Nobody is number 5: like everyone together, and so is no sure judge.
    assert 0 < model.trust_A[5] < 0.7
    decided = model.sides(ballots(backwards)).argmax(axis=1)
    assert (decided == truth).mean() > 0.93


def test_a_few_votes_make_nobody_perfect() -> None:
    agreeing = [(number, (0, 1), {0: FIRST, 1: FIRST}) for number in range(2)]
    model = fit_dawid_skene(ballots(agreeing), 3)
    assert 0.5 < model.trust_A[0] < 0.95
    assert model.trust_A[2] == pytest.approx(model.trust_A[0], abs=0.2)
    assert 0.9 < model.sides(ballots(agreeing))[0, FIRST] < 1


# Crowd-BT


def test_scores_are_those_of_the_exact_integral() -> None:
    """Three answers, seven votes by four people, one a tie: P(s_i > s_j) by a sum over a grid of scores."""
    eta = np.array([0.95, 0.8, 0.5, 0.2])
    given_: list[Row] = [
        (0, (0, 1), {0: FIRST, 1: FIRST, 2: SECOND}),
        (0, (1, 2), {0: FIRST, 3: SECOND}),
        (0, (2, 0), {1: TIE, 2: FIRST}),
    ]
    found = CrowdBradleyTerry(eta).better(ballots(given_))

    grid = np.arange(-9, 9.01, 0.2)
    scores = np.meshgrid(grid, grid, grid, indexing="ij")
    log_density = -sum(score**2 for score in scores) / (2 * SCORE_DEVIATION**2)
    for _, (i, j), said in given_:
        sigmoid = 1 / (1 + np.exp(scores[j] - scores[i]))
        for annotator, side in said.items():
            first = eta[annotator] * sigmoid + (1 - eta[annotator]) * (1 - sigmoid)
            log_density += np.log({FIRST: first, SECOND: 1 - first, TIE: np.sqrt(first * (1 - first))}[side])
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    # On the grid, equal scores have a weight; half of it belongs to each side.
    wanted = [
        density[scores[i] > scores[j]].sum() + density[np.isclose(scores[i], scores[j])].sum() / 2
        for _, (i, j), _ in given_
    ]
    assert found == pytest.approx(wanted, abs=0.02)  # a normal stands for a posterior that is skewed


def crowd(
    seed: int, groups: int, eta: Iterable[float], answers: int = 4, each: int = 3
) -> tuple[list[Row], np.ndarray]:
    """Votes drawn from the model itself, `each` a pair; and the scores."""
    rng, eta = np.random.default_rng(seed), list(eta)
    scores = rng.normal(0, SCORE_DEVIATION, (groups, answers))
    given_ = []
    for group in range(groups):
        for i, j in combinations(range(answers), 2):
            sigmoid = 1 / (1 + np.exp(scores[group, j] - scores[group, i]))
            said = {}
            for annotator in rng.choice(len(eta), each, replace=False):
                honest = rng.random() < eta[annotator]
                said[int(annotator)] = FIRST if (rng.random() < sigmoid) == honest else SECOND
            given_.append((group, (i, j), said))
    return given_, scores


def test_honesty_is_recovered() -> None:
    eta = (0.98, 0.9, 0.8, 0.7, 0.5, 0.5, 0.15)
    given_, scores = crowd(2, 250, eta)
    # 640 votes each, with a standard error of 0.03.
    model = fit_crowd_bradley_terry(ballots(given_), len(eta) + 1)
    assert model.eta_A[: len(eta)] == pytest.approx(eta, abs=0.08)
    assert 0.5 < model.eta_A[-1] < 0.8
    # Probabilities mean what they say: of those between 0.8 and 0.95, so many are right.
    found = model.better(ballots(given_))
    right = np.array([scores[group, i] > scores[group, j] for group, (i, j), _ in given_])
    sure, hit = np.maximum(found, 1 - found), (found > 0.5) == right
    for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 0.99)):
        within = (sure >= low) & (sure < high)
        assert hit[within].mean() == pytest.approx(sure[within].mean(), abs=0.07)


def test_who_judges_with_a_spammer_is_not_mistaken_for_one() -> None:
    """Two annotators on every pair, answers in pairs: a vote may not be its own witness."""
    rng = np.random.default_rng(4)
    given_: list[Row] = []
    for number in range(900):
        true = int(rng.choice([FIRST, SECOND]))
        said = {}
        for annotator in rng.choice(5, 2, replace=False):
            spams = annotator == 4
            said[int(annotator)] = int(rng.choice([FIRST, SECOND])) if spams or rng.random() < 0.1 else true
        given_.append((number, (0, 1), said))
    for fit in FITS:
        trust = fit(ballots(given_), 5).trust_A
        assert trust[:4].min() > 0.5 > 0.25 > abs(trust[4])


def test_a_tie_is_half_a_vote_each_way() -> None:
    model = CrowdBradleyTerry(np.array([0.9, 0.9, 0.5]))
    alone, with_tie, with_coin, contested, coin, tie = model.better(
        ballots(
            [
                (0, (0, 1), {0: FIRST}),
                (1, (0, 1), {0: FIRST, 1: TIE}),
                (2, (0, 1), {0: FIRST, 2: SECOND}),
                (3, (0, 1), {0: FIRST, 1: SECOND}),
                (4, (0, 1), {2: FIRST}),
                (5, (0, 1), {0: TIE, 1: TIE}),
            ]
        )
    )
    assert 0.5 < with_tie < alone == pytest.approx(with_coin, abs=1e-6)
    assert (contested, coin, tie) == pytest.approx((0.5, 0.5, 0.5), abs=1e-9)


def test_a_group_is_one_ladder() -> None:
    """a over b and b over c speak for a over c, where the votes contradict each other."""
    contested: Row = (0, (0, 2), {0: FIRST, 1: SECOND})
    ladder: list[Row] = [(0, (0, 1), {0: FIRST, 1: FIRST}), (0, (1, 2), {0: FIRST, 1: FIRST}), contested]
    model = CrowdBradleyTerry(np.array([0.9, 0.9]))
    assert model.better(ballots(ladder))[2] > 0.8
    assert model.better(ballots([contested]))[0] == pytest.approx(0.5, abs=1e-9)


# Both


@pytest.mark.parametrize("fit", FITS)
@deterministic
@given(rows)
def test_mirrored_votes_give_mirrored_results(fit: object, given_: list[Row]) -> None:
    model, other = fit(ballots(given_), 5), fit(ballots(mirrored(given_)), 5)
    assert other.trust_A == pytest.approx(model.trust_A, abs=1e-6)
    found, mirror = model.better(ballots(given_)), other.better(ballots(mirrored(given_)))
    assert mirror == pytest.approx(1 - found, abs=1e-5)
    assert (found >= 0).all() and (found <= 1).all()
    assert (np.abs(model.trust_A) <= 1).all()


@pytest.mark.parametrize("fit", FITS)
@deterministic
@given(rows)
def test_who_never_voted_is_like_everyone(fit: object, given_: list[Row]) -> None:
    few, many = fit(ballots(given_), 5), fit(ballots(given_), 7)
    assert many.trust_A[:5].tolist() == few.trust_A.tolist()
    assert many.trust_A[4] == many.trust_A[5] == many.trust_A[6]


def test_new_annotators_are_honest_as_often_as_everyone() -> None:
    given_, _ = crowd(8, 60, (0.9, 0.9, 0.9))
    model = fit_crowd_bradley_terry(ballots(given_), 4)
    assert model.eta_A[3] == pytest.approx(model.eta_A[:3].mean(), abs=0.02)
    nobody = fit_crowd_bradley_terry(ballots([(0, (0, 1), {0: TIE, 1: TIE})]), 3)
    assert (nobody.eta_A > 0.6).all() and (nobody.eta_A < HONEST_AT_FIRST).all()  # two ties speak for coins, softly
