"""Agreement against published examples, against other formulas for the same figure, and against simulated people."""

from __future__ import annotations

import math
from random import Random
from statistics import mean

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, rankdata

from labeling_ui.agreement import (
    Estimate,
    bootstrap,
    cohen,
    fleiss,
    krippendorff,
    pairwise_cohen,
    sequential_test,
    side_bias,
    wilson,
)

# The same examples on every run, and no failure because a machine was busy.
deterministic = settings(derandomize=True, deadline=None)
values = st.integers(1, 7)
pairs_of_values = st.lists(st.tuples(values, values), min_size=2, max_size=40)
units_of_values = st.lists(st.dictionaries(st.sampled_from("abcde"), values, max_size=5), min_size=1, max_size=25)


def table(*rows: str) -> list[dict[str, int]]:
    """Units from one line of digits for each annotator; a dot: not judged."""
    return [{str(n): int(v) for n, v in enumerate(unit) if v != "."} for unit in zip(*rows, strict=True)]


# Krippendorff


KRIPPENDORFF_2011 = table("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_example_with_missing_data(level: str, published: float) -> None:
    """Section C and D of "Computing Krippendorff's Alpha-Reliability": 4 observers, 12 units, the last not pairable."""
    assert krippendorff(KRIPPENDORFF_2011, level) == pytest.approx(published, abs=0.0005)


def test_alpha_by_hand() -> None:
    """Sides f f, f s, s s, s s: 3 f and 5 s; seen 2, by chance 2 * 3 * 5 / 7, alpha 1 - 14 / 30."""
    assert krippendorff(table("1122", "1222")) == pytest.approx(1 - 14 / 30, abs=1e-12)


def slow_alpha(units: list[dict[str, int]], level: str) -> float:
    """From variances: 1 - within / total, where nominal values are one-hot and ordinal ones their mid-ranks."""
    rated = [list(unit.values()) for unit in units if len(unit) >= 2]
    flat = np.array([value for unit in rated for value in unit], dtype=float)
    points = {
        "interval": flat[:, None],
        "ordinal": rankdata(flat)[:, None],
        "nominal": (flat[:, None] == np.unique(flat)).astype(float),
    }[level]
    within, start = 0.0, 0
    for unit in rated:
        within += len(unit) * points[start : start + len(unit)].var(axis=0, ddof=1).sum()
        start += len(unit)
    return float(1 - within / (len(flat) * points.var(axis=0, ddof=1).sum()))


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
@deterministic
@given(units=units_of_values)
def test_alpha_is_one_minus_variance_within_over_variance_in_all(level: str, units: list[dict[str, int]]) -> None:
    assume(len({value for unit in units if len(unit) > 1 for value in unit.values()}) > 1)
    assert krippendorff(units, level) == pytest.approx(slow_alpha(units, level), abs=1e-9)


@deterministic
@given(units_of_values, st.permutations(range(1, 8)))
def test_alpha_knows_no_names_and_nominal_alpha_no_numbers(units: list[dict[str, int]], other: list[int]) -> None:
    renamed = [{name * 2: other[value - 1] for name, value in unit.items()} for unit in reversed(units)]
    assert krippendorff(renamed) == pytest.approx(krippendorff(units), abs=1e-12, nan_ok=True)
    mirrored = [{name: 8 - value for name, value in unit.items()} for unit in units]
    assert krippendorff(mirrored, "ordinal") == pytest.approx(krippendorff(units, "ordinal"), abs=1e-12, nan_ok=True)


def test_nothing_to_compute_is_not_a_number() -> None:
    assert math.isnan(krippendorff([])) and math.isnan(krippendorff([{"a": 1}, {"b": 2}]))
    assert math.isnan(krippendorff([{"a": 3, "b": 3}] * 5)) and math.isnan(fleiss([{"a": 3, "b": 3}] * 5))
    assert math.isnan(fleiss([])) and math.isnan(cohen([])) and math.isnan(cohen([(2, 2)] * 3))


def test_perfect_and_opposite() -> None:
    assert krippendorff(table("1357", "1357"), "ordinal") == 1
    assert krippendorff(table("1717", "7171"), "ordinal") < 0


# Fleiss


def test_fleiss_published_table() -> None:
    """14 psychiatrists, 10 patients, 5 categories; 0.210 in print."""
    rows = ["0000e", "02642", "00356", "03920", "22811", "77000", "32630", "25322", "65210", "02237"]
    units = []
    for row in rows:
        given_ = [category for category, count in enumerate(row) for _ in range(int(count, 16))]
        units.append({str(person): category for person, category in enumerate(given_)})
    assert fleiss(units) == pytest.approx(0.210, abs=0.0005)


def test_fleiss_by_hand() -> None:
    """3 of 4 agree; chance (3 / 8)² + (5 / 8)² = 34 / 64."""
    assert fleiss(table("1122", "1222")) == pytest.approx((3 / 4 - 34 / 64) / (1 - 34 / 64), abs=1e-12)


@deterministic
@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.lists(values, min_size=n, max_size=n), min_size=2)))
def test_fleiss_differs_from_alpha_by_the_small_sample_alone(rows: list[list[int]]) -> None:
    """With equally many values a unit and N in all, alpha = kappa + (1 - kappa) / N."""
    units = [dict(zip("abcde", row, strict=False)) for row in rows]
    kappa, count = fleiss(units), sum(map(len, units))
    assert krippendorff(units) == pytest.approx(kappa + (1 - kappa) / count, abs=1e-9, nan_ok=True)


# Cohen


def test_cohen_published_table() -> None:
    """50 grant proposals read by two people: 20 and 15 alike, 5 and 10 not; kappa 0.4."""
    pairs = [(1, 1)] * 20 + [(1, 2)] * 5 + [(2, 1)] * 10 + [(2, 2)] * 15
    assert cohen(pairs) == pytest.approx(0.4, abs=1e-12)


@deterministic
@given(pairs_of_values)
def test_quadratic_kappa_is_the_concordance_correlation(pairs: list[tuple[int, int]]) -> None:
    """Lin (1989): 2 cov / (var + var + (difference of means)²), with population moments."""
    x, y = np.array(pairs, dtype=float).T
    spread = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    assume(spread > 0)
    expected = 2 * ((x - x.mean()) * (y - y.mean())).mean() / spread
    assert cohen(pairs, "quadratic") == pytest.approx(expected, abs=1e-9)


@deterministic
@given(pairs_of_values)
def test_linear_kappa_is_made_of_the_six_yes_or_no_questions(pairs: list[tuple[int, int]]) -> None:
    """|a - b| counts the thresholds between a and b, so disagreements add up over "above 1?", ..., "above 6?"."""
    seen = chance = 0.0
    for threshold in range(1, 7):
        x = np.array([a > threshold for a, _ in pairs])
        y = np.array([b > threshold for _, b in pairs])
        seen += (x != y).mean()
        chance += x.mean() * (1 - y.mean()) + y.mean() * (1 - x.mean())
    assume(chance > 0)
    assert cohen(pairs, "linear") == pytest.approx(1 - seen / chance, abs=1e-9)


def test_pairwise_cohen_takes_what_two_people_share() -> None:
    units = table("1234567", "1234566", "7......")
    found = pairwise_cohen(units, "quadratic")
    assert found.keys() == {("0", "1")}  # with the third they share one unit, which says nothing
    assert found["0", "1"] == cohen([(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 6)], "quadratic")
    assert found["0", "1"] > pairwise_cohen(units)["0", "1"]


# Bootstrap


def simulated(units: int, rng: Random, right: float = 0.8) -> list[dict[str, int]]:
    """Two annotators who name the true one of two sides with probability `right`, and the other one else.

    They agree with probability r² + (1 - r)² on sides of equal frequency: alpha is (2 r - 1)².
    """
    return [
        {name: truth if rng.random() < right else 1 - truth for name in "ab"}
        for truth in (rng.randrange(2) for _ in range(units))
    ]


def test_bootstrap_interval_covers_the_truth() -> None:
    """95 % of 200 intervals, give or take 4 standard deviations of 1.5 %."""
    rng, truth = Random(3), (2 * 0.8 - 1) ** 2
    estimates = [bootstrap(simulated(150, rng), "nominal", rounds=200, seed=n) for n in range(200)]
    assert all(each.low <= each.value <= each.high and each.units == 150 for each in estimates)
    assert 0.89 <= mean(each.low <= truth <= each.high for each in estimates) <= 0.995
    # The standard deviation of a kappa of 150 pairs is about sqrt(1 - 0.36²) / sqrt(150) = 0.076.
    assert mean(each.high - each.low for each in estimates) == pytest.approx(2 * 1.96 * 0.076, rel=0.1)


def test_bootstrap_is_the_plain_one_over_units() -> None:
    """Drawing kinds of units is drawing units: the same interval as a loop that draws units one by one."""
    rng = Random(5)
    units = [{name: rng.randint(1, 7) if rng.random() < 0.4 else 3 for name in "abc"} for _ in range(40)]
    for level in ("nominal", "ordinal", "interval"):
        slow = sorted(krippendorff(rng.choices(units, k=40), level) for _ in range(1500))
        fast = bootstrap(units, level, rounds=1500)
        assert fast.value == krippendorff(units, level)
        assert [fast.low, fast.high] == pytest.approx([slow[37], slow[1462]], abs=0.03)


def test_bootstrap_draws_groups_whole() -> None:
    """Each unit repeated 9 times in its group tells no more than once: the interval is that of single units."""
    units = simulated(60, Random(8))
    once = bootstrap(units, "fleiss", rounds=1000)
    repeated = [unit for unit in units for _ in range(9)]
    groups = [n for n in range(60) for _ in range(9)]
    whole = bootstrap(repeated, "fleiss", rounds=1000, groups=groups)
    assert whole.units == 540
    assert whole.high - whole.low == pytest.approx(once.high - once.low, rel=0.1)
    alone = bootstrap(repeated, "fleiss", rounds=1000)
    assert alone.high - alone.low == pytest.approx((once.high - once.low) / 3, rel=0.15)


def test_bootstrap_is_the_same_on_every_run() -> None:
    units = simulated(30, Random(1))
    one, other = (bootstrap(each, "nominal", seed=4) for each in (units, units[::-1]))
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-12)
    assert bootstrap(units, "nominal", seed=4) == one != bootstrap(units, "nominal", seed=5)


def test_bootstrap_of_too_little() -> None:
    assert bootstrap([], "nominal").units == 0
    alone = bootstrap([{"a": 1}, {"b": 1, "c": 2}], "nominal")
    assert (alone.value, alone.units) == (0.0, 1)
    assert math.isnan(alone.low) and math.isnan(alone.high)


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(math.nan, math.nan, math.nan, 0), "not enough labels by two people on the same item"),
        (Estimate(math.nan, math.nan, math.nan, 7), "everyone gave one and the same value on 7 items"),
        (Estimate(0.9, 0.7, 0.95, 50), "strong agreement (50 items; chance would be 0)"),
        (Estimate(0.7, 0.5, 0.8, 50), "good agreement (50"),
        (Estimate(0.5, 0.4, 0.6, 50), "moderate agreement (50"),
        (Estimate(0.3, 0.1, 0.4, 50), "weak agreement (50"),
        (Estimate(0.1, 0.05, 0.2, 50), "hardly more than chance (50"),
        (Estimate(0.9, -0.1, 1.0, 4), "strong agreement, and chance alone cannot be ruled out on 4 items"),
        (Estimate(0.9, math.nan, math.nan, 1), "strong agreement, and chance alone cannot be ruled out on 1 items"),
        (Estimate(-0.5, -0.8, -0.2, 50), "less agreement than by chance"),
        (Estimate(-1.5, -2.0, 0.2, 3), "hardly more than chance, and chance alone cannot be ruled out"),
    ],
)
def test_words(estimate: Estimate, words: str) -> None:
    assert estimate.words().startswith(words)


# The screen's side


@deterministic
@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_against_scipy(drawn: tuple[int, int]) -> None:
    hits, count = drawn
    assume(count > 0)
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_side_bias_leaves_ties_out() -> None:
    found = side_bias([1, 2, 3, 4, 4, 5, 7])
    assert (found.left, found.count) == (3, 5)
    assert not found.biased and not side_bias([4, 4]).biased and not side_bias([]).biased
    assert side_bias([1] * 20 + [7] * 5).biased and side_bias([1] * 5 + [7] * 20).biased
    assert not side_bias([1] * 13 + [7] * 12).biased


# Who guesses


def answers(rng: Random, right: float, count: int = 400) -> list[bool]:
    return [rng.random() < right for _ in range(count)]


def test_sequential_test_by_hand() -> None:
    """A hit weighs log(0.5 / 0.85) = -0.531, a miss log(0.5 / 0.15) = 1.204; thresholds are -2.986 and 4.554."""
    assert sequential_test([True] * 10) == ("fine", 6)
    assert sequential_test([False] * 10) == ("guessing", 4)
    assert sequential_test([True, False] * 2) == ("open", 4)  # 1.347
    assert sequential_test([]) == ("open", 0)
    assert sequential_test([False] * 4 + [True] * 100) == ("guessing", 4)  # a verdict stands


def test_sequential_test_keeps_its_errors_and_is_quick() -> None:
    """Wald: the careful are called guessing at most alpha / (1 - beta), guessers fine at most beta / (1 - alpha)."""
    rng, count = Random(11), 3000
    careful = [sequential_test(answers(rng, 0.85)) for _ in range(count)]
    guessing = [sequential_test(answers(rng, 0.5)) for _ in range(count)]
    assert not any(verdict == "open" for verdict, _ in careful + guessing)
    wrong = mean(verdict == "guessing" for verdict, _ in careful)
    missed = mean(verdict == "fine" for verdict, _ in guessing)
    # Above 4 standard deviations it is no accident; below a tenth of what is allowed, the thresholds are wrong.
    assert 0.001 < wrong < 0.0105 + 4 * math.sqrt(0.0105 / count)
    assert 0.005 < missed < 0.0505 + 4 * math.sqrt(0.05 / count)
    # By Wald's equation 4.554 / 0.337 = 13.5 and 2.986 / 0.270 = 11 items, and what overshoots the threshold.
    assert mean(after for _, after in guessing) == pytest.approx(14, abs=2)
    assert mean(after for _, after in careful) == pytest.approx(11.5, abs=2)
    assert sorted(after for _, after in guessing)[int(0.99 * count)] <= 60


def test_coin_flippers_are_found_among_the_careful() -> None:
    rng = Random(12)
    verdicts = {f"coin-{n}": sequential_test(answers(rng, 0.5, 60))[0] for n in range(100)}
    verdicts |= {f"careful-{n}": sequential_test(answers(rng, 0.95, 60))[0] for n in range(100)}
    found = [name for name, verdict in verdicts.items() if verdict == "guessing"]
    assert len(found) >= 90 and all(name.startswith("coin") for name in found)
