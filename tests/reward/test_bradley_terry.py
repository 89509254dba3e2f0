"""Bradley-Terry and Davidson against published tables, another implementation, and symmetries any such fit has."""

from __future__ import annotations

import json
import math
import warnings
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.bradley_terry import Abilities, bradley_terry, tally
from reward.records import InputError

# The same examples on every run, and no failure because a machine was busy.
deterministic = settings(derandomize=True, deadline=None, max_examples=50)
# A win each way between all items: a maximum always exists.
tables = st.integers(2, 5).flatmap(
    lambda n: st.lists(st.lists(st.integers(1, 9), min_size=n, max_size=n), min_size=n, max_size=n)
)

# American League, eastern division, 1987: wins of the row over the column (Agresti 2002, table 10.10).
TEAMS = ("Baltimore", "Boston", "Cleveland", "Detroit", "Milwaukee", "New York", "Toronto")
WINS_1987 = [
    [0, 1, 7, 4, 2, 3, 1],
    [12, 0, 7, 2, 6, 7, 6],
    [6, 6, 0, 4, 4, 6, 5],
    [9, 11, 9, 0, 6, 5, 7],
    [11, 7, 9, 7, 0, 7, 9],
    [10, 6, 7, 8, 6, 0, 6],
    [12, 7, 8, 6, 4, 7, 0],
]
# Times that the row was cited by the column (Stigler 1994).
JOURNALS = ("Biometrika", "Comm Statist", "JASA", "JRSS-B")
CITED = [[0, 730, 498, 221], [33, 0, 68, 17], [320, 813, 0, 142], [284, 276, 325, 0]]


def table(drawn: list[list[int]]) -> np.ndarray:
    wins = np.array(drawn, dtype=float)
    np.fill_diagonal(wins, 0)
    return wins


def above(fit: Abilities, reference: str) -> list[float]:
    return [fit.difference(name, reference)[0] for name in fit.names]


# Published


def test_baseball_1987() -> None:
    fit = bradley_terry(WINS_1987, names=TEAMS)
    assert above(fit, "Baltimore") == pytest.approx([0, 1.1077, 0.6839, 1.4364, 1.5814, 1.2476, 1.2945], abs=1e-3)
    # Two decimals in print, and standard errors of about 0.3.
    assert np.round(above(fit, "Baltimore"), 2).tolist() == [0, 1.11, 0.68, 1.44, 1.58, 1.25, 1.29]
    assert all(0.3 < fit.difference(name, "Baltimore")[1] < 0.36 for name in TEAMS[1:])
    assert fit.tie == 0 and fit.ability_N.sum() == pytest.approx(0, abs=1e-9)


def test_citations_between_journals() -> None:
    fit = bradley_terry(CITED, names=JOURNALS)
    assert above(fit, "Biometrika") == pytest.approx([0, -2.94907, -0.47957, 0.26895], abs=1e-4)


def test_reference_tables_beside_the_checkout(shared_data: Path) -> None:
    found = json.loads((shared_data / "data" / "agreement" / "reference_tables.json").read_text("utf-8"))
    for key, wins, wanted, reference in (
        ("bradley_terry_baseball_1987", "wins_row_over_col", "ability_fit_here", 0),
        ("bradley_terry_citations", "cited_row_citing_col", "ability_vs_biometrika_fit_here", 0),
    ):
        fit = bradley_terry(table(found[key][wins]))
        assert above(fit, str(reference)) == pytest.approx(found[key][wanted], abs=1e-3)


def test_crowdkit_finds_the_same() -> None:
    pd = pytest.importorskip("pandas")
    aggregation = pytest.importorskip("crowdkit.aggregation")
    rows = [(TEAMS[i], TEAMS[j], TEAMS[i]) for i in range(7) for j in range(7) for _ in range(WINS_1987[i][j])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A tolerance of 0: it compares an array with itself, and would stop after two rounds.
        model = aggregation.BradleyTerry(n_iter=3000, tol=0.0).fit(
            pd.DataFrame(rows, columns=["left", "right", "label"])
        )
    logs = np.log([model.scores_[name] for name in TEAMS])
    assert bradley_terry(WINS_1987).ability_N == pytest.approx(logs - logs.mean(), abs=1e-6)


# By hand


def test_two_items() -> None:
    """30 against 10: log 3, with the variance 1 / 30 + 1 / 10 of a log odds."""
    fit = bradley_terry([[0, 30], [10, 0]], names=("a", "b"))
    assert fit.difference("a", "b") == pytest.approx((math.log(3), math.sqrt(1 / 30 + 1 / 10)), abs=1e-9)
    assert fit.probabilities("a", "b") == pytest.approx((0.75, 0, 0.25), abs=1e-9)
    assert fit.log_likelihood == pytest.approx(30 * math.log(0.75) + 10 * math.log(0.25), abs=1e-9)
    assert fit.difference("a", "a") == (0, 0)


def test_two_items_with_ties() -> None:
    """Wins 40, losses 10, ties 20: three outcomes and two parameters, so the shares are met exactly; nu is 1."""
    fit = bradley_terry([[0, 40], [10, 0]], [[0, 20], [20, 0]], names=("a", "b"))
    assert fit.probabilities("a", "b") == pytest.approx((4 / 7, 2 / 7, 1 / 7), abs=1e-9)
    assert fit.difference("a", "b")[0] == pytest.approx(math.log(4), abs=1e-9)
    assert fit.tie == pytest.approx(20 / math.sqrt(40 * 10), abs=1e-9)
    # Without the ties the odds are the same, and the variance that of log(40 / 10).
    assert fit.difference("a", "b")[1] == pytest.approx(math.sqrt(1 / 40 + 1 / 10), abs=1e-9)


def test_tally() -> None:
    names, wins, ties = tally([("b", "a", 1), ("a", "b", 1), ("a", "b", 0), ("c", "a", 0.5), ("a", "c", 0.5)])
    assert names == ("a", "b", "c")
    assert wins.tolist() == [[0, 1, 0], [2, 0, 0], [0, 0, 0]]
    assert ties.tolist() == [[0, 0, 2], [0, 0, 0], [2, 0, 0]]


# Symmetries


@deterministic
@given(tables, tables, st.randoms(use_true_random=False), st.booleans())
def test_names_do_not_matter(drawn: list[list[int]], other: list[list[int]], random: object, tied: bool) -> None:
    wins = table(drawn)
    n = len(wins)
    ties = np.triu(np.resize(table(other), (n, n)), 1) * tied
    ties += ties.T
    order = list(range(n))
    random.shuffle(order)
    fit, shuffled = bradley_terry(wins, ties), bradley_terry(wins[np.ix_(order, order)], ties[np.ix_(order, order)])
    assert shuffled.ability_N == pytest.approx(fit.ability_N[order], abs=1e-7)
    assert shuffled.covariance_NN == pytest.approx(fit.covariance_NN[np.ix_(order, order)], abs=1e-7)
    assert shuffled.tie == pytest.approx(fit.tie, abs=1e-7)


@deterministic
@given(tables)
def test_winning_and_losing_exchanged_is_the_negative(drawn: list[list[int]]) -> None:
    wins = table(drawn)
    fit, mirrored = bradley_terry(wins), bradley_terry(wins.T)
    assert mirrored.ability_N == pytest.approx(-fit.ability_N, abs=1e-7)
    assert mirrored.covariance_NN == pytest.approx(fit.covariance_NN, abs=1e-7)


@deterministic
@given(tables)
def test_twice_the_counts_are_the_same_abilities_known_better(drawn: list[list[int]]) -> None:
    wins = table(drawn)
    fit, twice = bradley_terry(wins), bradley_terry(2 * wins)
    assert twice.ability_N == pytest.approx(fit.ability_N, abs=1e-7)
    assert twice.covariance_NN * 2 == pytest.approx(fit.covariance_NN, abs=1e-7)


@deterministic
@given(tables)
def test_expected_wins_are_those_seen(drawn: list[list[int]]) -> None:
    """The score equations: each item's expected number of wins is what it won."""
    wins = table(drawn)
    fit = bradley_terry(wins)
    chance = 1 / (1 + np.exp(fit.ability_N[None, :] - fit.ability_N[:, None]))
    assert ((wins + wins.T) * chance).sum(axis=1) == pytest.approx(wins.sum(axis=1), abs=1e-6)


# In simulation


def simulated(ability: np.ndarray, nu: float, each: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    n = len(ability)
    wins, ties = np.zeros((n, n)), np.zeros((n, n))
    for i, j in combinations(range(n), 2):
        odds = np.array([np.exp(ability[i]), np.exp(ability[j]), nu * np.exp((ability[i] + ability[j]) / 2)])
        wins[i, j], wins[j, i], ties[i, j] = rng.multinomial(each, odds / odds.sum())
    return wins, ties + ties.T


def test_davidson_recovers_what_was_simulated_and_its_errors_are_right() -> None:
    """Over 200 sets of 15 pairs with 40 comparisons each, errors in units of the standard error have variance 1."""
    rng = np.random.default_rng(5)
    ability = np.array([-1.0, -0.5, 0.0, 0.2, 0.5, 0.8])
    scaled, ties = [], []
    for _ in range(200):
        fit = bradley_terry(*simulated(ability, 0.7, 40, rng))
        for name in "12345":
            found, error = fit.difference(name, "0")
            scaled.append((found - (ability[int(name)] - ability[0])) / error)
        ties.append(fit.tie)
    assert np.mean(ties) == pytest.approx(0.7, abs=0.03)
    # 1,000 values, 5 of each fit with one reference: a correlation of about 1/2 between them.
    assert abs(np.mean(scaled)) < 0.25 and np.std(scaled) == pytest.approx(1, abs=0.12)
    assert np.mean(np.abs(scaled) < 1.96) == pytest.approx(0.95, abs=0.03)


def test_a_prior_pulls_towards_zero_and_needs_no_links() -> None:
    loose, tight = (bradley_terry(WINS_1987, prior=prior) for prior in (1e-6, 100.0))
    assert loose.ability_N == pytest.approx(bradley_terry(WINS_1987).ability_N, abs=1e-4)
    assert np.abs(tight.ability_N).max() < 0.2 * np.abs(loose.ability_N).max()
    # One win: with x the difference and a prior of 1 on both, 1 / (1 + exp(x)) = x / 2.
    won, _ = bradley_terry([[0, 1, 0], [0, 0, 0], [0, 0, 0]], prior=1.0, names="abc").difference("a", "b")
    assert 1 / (1 + math.exp(won)) == pytest.approx(won / 2, abs=1e-9)


# What it refuses


@pytest.mark.parametrize(
    ("wins", "more", "message"),
    [
        ([[0, 2, 1], [3, 0, 1], [0, 0, 0]], {"names": "xyz"}, "infinite: z never won .*Collect .*prior=0.1"),
        ([[0, 2, 1], [3, 0, 1], [0, 0, 0]], {}, "infinite: 2 never won"),
        ([[0, 2, 0], [3, 0, 0], [1, 0, 0]], {"names": "xyz"}, "infinite: z never lost"),
        ([[0, 2, 0], [3, 0, 0], [0, 0, 0]], {"names": "xyz"}, "z never won; z never lost"),
        (
            [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]],
            {"names": "wxyz"},
            "none of w, x ever lost to one of the others",
        ),
        ([[0, 0], [0, 0]], {"ties": [[0, 4], [4, 0]]}, "All 4 comparisons are ties"),
        ([[0, 5], [0, 0]], {"ties": [[0, 3], [3, 0]]}, "grow without end.* 8 comparisons"),
        ([[0, 0], [0, 0]], {}, "no comparisons of the 2 items"),
        ([[0, 1], [1, 2]], {}, "item against itself"),
        ([[0, -1], [1, 0]], {}, "below 0"),
        ([[0, math.nan], [1, 0]], {}, "below 0 or none"),
        ([[0, 1], [1, 0]], {"ties": [[0, 1], [0, 0]]}, "not symmetric"),
        ([[0, 1], [1, 0]], {"ties": [[0]]}, "square"),
        ([[0]], {}, "at least 2 items"),
        ([[0, 1, 2], [1, 0, 2]], {}, "square"),
        ([[0, 1], [1, 0]], {"names": "aa"}, "2 different ones"),
        ([[0, 1], [1, 0]], {"names": "abc"}, "2 different ones"),
        ([[0, 1], [1, 0]], {"prior": -1.0}, "prior strength is -1"),
    ],
)
def test_refusals(wins: list[list[float]], more: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bradley_terry(wins, **more)


@pytest.mark.parametrize(
    ("row", "message"), [(("a", "a", 1), "compared with itself"), (("a", "b", 0.7), "is 0.7: 1 .the first won")]
)
def test_tally_refuses(row: tuple[str, str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tally([row])
