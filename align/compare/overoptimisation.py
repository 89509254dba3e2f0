"""Over-optimisation: where the score that ppo climbs and a judge it never saw part, and which checkpoint to ship.

A policy that is trained on a proxy of what people want first gains both and then only the proxy (Gao et al. 2022,
arXiv 2210.10760, who draw both against the KL). Pure functions on numpy arrays; the checkpoints come in the order of
training, and the first of them is the reference, at KL 0.

Shapes: C checkpoints, P held-out prompts, M answers of the reference to one prompt, D differences compared at once, R
draws. One answer a prompt and checkpoint; the prompt is the unit of evidence. KL in nats per answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from align.compare.schema import BestOfN, CheckpointFigures, OverOptimisation
from align.compare.statistics import Estimate, mean_with_interval
from reward.statistics import CONFIDENCE, MeanFigure

_DRAWS = 10_000  # of the largest of several t values: the critical value is then good to about 1 %


def simultaneous(differences_DP: ArrayLike, seed: int) -> list[Estimate]:
    """Mean of each row with a 95 % interval; all the intervals together hold with that confidence.

    mean ± q s/√P, with q the 95 % point of the largest |t| of the D rows under their own correlation and P - 1 degrees
    of freedom (Dunnett 1955, JASA 50:1096; Hothorn, Bretz & Westfall 2008, Biometrical Journal 50:346). For one row q
    is Student's. So one may look for the largest of them afterwards: that is what the wider interval pays for.

    A row of equal values has an interval without width; with one prompt low, high and standard_error are nan.
    """
    d_DP = _table(differences_DP, "differences_DP")
    prompts = d_DP.shape[1]
    mean_D = d_DP.mean(1)
    if prompts == 1:
        return [Estimate(float(mean), math.nan, math.nan, math.nan, 1) for mean in mean_D]
    away_DP = d_DP - mean_D[:, None]
    away_DP[np.ptp(d_DP, axis=1) == 0] = 0.0  # rounding of the mean is no spread
    error_D = np.sqrt((away_DP**2).sum(1) / (prompts - 1) / prompts)
    spread = error_D > 0
    q = float(student.ppf((1 + CONFIDENCE) / 2, prompts - 1))
    if spread.sum() > 1:
        unit_DP = away_DP[spread] / (error_D[spread] * math.sqrt(prompts * (prompts - 1)))[:, None]
        rng = np.random.default_rng(seed)
        correlation_DD = unit_DP @ unit_DP.T
        normal_RD = rng.multivariate_normal(np.zeros(len(unit_DP)), correlation_DD, _DRAWS, "ignore", method="eigh")
        scale_R = np.sqrt(rng.chisquare(prompts - 1, _DRAWS) / (prompts - 1))
        q = max(q, float(np.quantile(np.abs(normal_RD).max(1) / scale_R, CONFIDENCE)))
    return [
        Estimate(float(mean_D[i]), float(mean_D[i] - q * error_D[i]), float(mean_D[i] + q * error_D[i]), error, prompts)
        for i, error in enumerate(error_D.tolist())
    ]


def change(values_CP: NDArray[np.float64], one: int, other: int) -> Estimate:
    """Values of checkpoint `other` less those of `one`, prompt by prompt, with Student's interval."""
    return simultaneous(values_CP[[other]] - values_CP[[one]], seed=0)[0]


def fall(gold_CP: ArrayLike, seed: int) -> tuple[int, Estimate]:
    """(the checkpoint of the best mean gold b, gold of the last less gold of b with an interval one may believe).

    b was chosen for its luck too, so a plain interval of the difference would exclude 0 too often. Here the last is
    compared with every checkpoint before it at once (`simultaneous`): where nothing changes, the interval of b lies
    below 0 in at most 2.5 % of runs.
    """
    gold_CP = _table(gold_CP, "gold_CP")
    best = int(gold_CP.mean(1).argmax())
    if best == len(gold_CP) - 1:
        return best, Estimate(0.0, 0.0, 0.0, 0.0, gold_CP.shape[1])
    return best, simultaneous(gold_CP[-1] - gold_CP[:-1], seed)[best]


def parting(proxy_CP: ArrayLike, gold_CP: ArrayLike | None, seed: int) -> int | None:
    """The checkpoint after which the gold falls while the proxy does not; None where that is not settled.

    It is b, the best by mean gold, if from b to the last checkpoint the gold is settled to fall (`fall`), the proxy is
    not settled to fall, and from the reference to the last the proxy is settled to have risen. Where both fall, the
    run went wrong in another way. Only the last checkpoint is held against the best: it is the one that would be
    shipped, and a dip in between that the run recovered from is none.

    Args:
        proxy_CP: score of what the policy was trained on.
        gold_CP: score of a judge that it never saw; None: parting cannot be seen, and the result is None.
    """
    if gold_CP is None:
        return None
    proxy_CP, gold_CP = _same(proxy_CP, gold_CP)
    best, fallen = fall(gold_CP, seed)
    if not fallen.high < 0:  # also where the interval is unknown
        return None
    risen, since = change(proxy_CP, 0, -1), change(proxy_CP, best, -1)
    return best if risen.low > 0 and not since.high < 0 else None


def recommended(proxy_CP: ArrayLike, gold_CP: ArrayLike | None, kl_CP: ArrayLike, seed: int) -> int:
    """The checkpoint to ship; 0, the reference, where none is settled to be better than it.

    Of the checkpoints that the gold settles to be better than the reference (all compared at once, `simultaneous`),
    those that are not settled to be worse than the best of them by a plain paired interval, and of these the one at
    least mean KL, the earlier at equal KL.

    Args:
        gold_CP: None: the proxy is believed in its place.
    """
    proxy_CP, kl_CP = _same(proxy_CP, kl_CP)
    judge_CP = proxy_CP if gold_CP is None else _same(proxy_CP, gold_CP)[1]
    return _choice(judge_CP, kl_CP.mean(1), seed)[0]


def best_of_n(proxy_PM: ArrayLike, gold_PM: ArrayLike | None, ns: Sequence[int]) -> BestOfN:
    """What taking the best by the proxy of n answers of the reference gives, estimated from M answers to each prompt.

    Of all subsets of n among M, the share in which the i-th smallest proxy is the largest is C(i-1, n-1) / C(M, n), so
    the mean over all subsets, which is unbiased, is a weighted sum over the sorted answers. Among equal proxies each is
    taken alike: their gold is averaged. By hand: 1, 2 and 3 at n = 2 give (2 + 2 x 3) / 3 = 2.67.

    KL = log n - (n - 1) / n nats (Stiennon et al. 2020, arXiv 2009.01325, appendix), which is an upper bound where
    answers repeat (Beirami et al. 2024, arXiv 2401.01879).

    Raises:
        ValueError: not one gold for each proxy, or an n outside 1..M.
    """
    proxy_PM = _table(proxy_PM, "proxy_PM")
    most = proxy_PM.shape[1]
    if strange := [n for n in ns if not 1 <= n <= most]:
        raise ValueError(f"n is {strange[0]}, but of {most} answers a prompt 1 to {most} can be drawn.")
    gold_PM = None if gold_PM is None else _same(proxy_PM, gold_PM)[1]
    order_PM = proxy_PM.argsort(axis=1, kind="stable")
    tables = [np.take_along_axis(proxy_PM, order_PM, 1)]
    if gold_PM is not None:
        sorted_PM = np.take_along_axis(gold_PM, order_PM, 1)
        tables.append(np.stack([_tied(*rows) for rows in zip(tables[0], sorted_PM, strict=True)]))
    means = []
    for n in ns:
        weight_M = np.array([math.comb(i, n - 1) / math.comb(most, n) for i in range(most)])
        means.append([float((table @ weight_M).mean()) for table in tables])
    return {
        "n": [*ns],
        "kl": [math.log(n) - (n - 1) / n for n in ns],
        "proxy": [row[0] for row in means],
        "gold": None if gold_PM is None else [row[1] for row in means],
    }


def sentences(
    names: Sequence[str],
    proxy_CP: ArrayLike,
    gold_CP: ArrayLike | None,
    kl_CP: ArrayLike,
    proxy_name: str,
    gold_name: str | None,
    curve: BestOfN | None,
    seed: int,
) -> list[str]:
    """What the course of a run says, with the figures it rests on: whether it is over-optimised, and what to ship.

    Args:
        names: of the checkpoints, as they read after "ship": "update 12".
        proxy_name, gold_name: of the two judges, as they read after "by": "the reward model".
        curve: of the best of n; None leaves it unsaid.
    """
    proxy_CP, kl_CP = _same(proxy_CP, kl_CP)
    gold_CP = None if gold_CP is None else _same(proxy_CP, gold_CP)[1]
    kl_C = kl_CP.mean(1)
    ship = recommended(proxy_CP, gold_CP, kl_CP, seed)
    if gold_CP is None or gold_name is None:
        first = (
            f"Only {proxy_name}, which the policy was trained on, scored its checkpoints. Without a judge that it "
            f"never saw, over-optimisation cannot be seen, only the KL: {kl_C[-1]:.1f} nats at {names[-1]}."
        )
    else:
        first = _course(names, proxy_CP, gold_CP, kl_C, proxy_name, gold_name, seed)
    judge_CP, judge = (proxy_CP, proxy_name) if gold_CP is None or gold_name is None else (gold_CP, gold_name)
    second = _shipping(names, judge_CP, kl_C, judge, seed)
    if gold_CP is None and ship:
        second += " That is the proxy's own word: ask a judge that the policy never saw, or people, before shipping."
    told = [first, second]
    if curve is not None and (values := curve["proxy"] if gold_CP is None else curve["gold"]) is not None:
        told.append(
            f"For comparison, the best of {curve['n'][-1]} answers of {names[0]} by {proxy_name} gets "
            f"{_plain(values[-1])} by {judge} at {curve['kl'][-1]:.1f} nats, without any training; {names[ship]} gets "
            f"{_plain(float(judge_CP[ship].mean()))} at {kl_C[ship]:.1f}."
        )
    return told


def summarise(
    names: Sequence[str],
    steps: Sequence[int],
    proxy_CP: ArrayLike,
    gold_CP: ArrayLike | None,
    kl_CP: ArrayLike,
    length_CP: ArrayLike,
    proxy_name: str,
    gold_name: str | None,
    best_of_n: BestOfN | None,
    seed: int,
) -> OverOptimisation:
    """All of it, as the report holds it.

    Args:
        names, steps: of the checkpoints, in the order of training, the reference (step 0) first.
        kl_CP: nats per answer to the reference, one sample or the exact KL each; the reference's are 0.
        length_CP: tokens.

    Raises:
        ValueError: tables that do not fit each other, or values that are not finite.
    """
    proxy_CP, kl_CP = _same(proxy_CP, kl_CP)
    length_CP = _same(proxy_CP, length_CP)[1]
    gold_CP = None if gold_CP is None else _same(proxy_CP, gold_CP)[1]
    if not len(names) == len(steps) == len(proxy_CP):
        raise ValueError(f"{len(names)} names and {len(steps)} steps for {len(proxy_CP)} checkpoints: one of each.")

    def mean(values_P: NDArray[np.float64]) -> MeanFigure:
        return cast(MeanFigure, mean_with_interval(values_P, seed=seed).record())

    figures = [
        CheckpointFigures(
            name=names[c],
            step=steps[c],
            proxy=mean(proxy_CP[c]),
            gold=None if gold_CP is None else mean(gold_CP[c]),
            kl=mean(kl_CP[c]),
            length=mean(length_CP[c]),
        )
        for c in range(len(names))
    ]
    return {
        "proxy_name": proxy_name,
        "gold_name": gold_name if gold_CP is not None else None,
        "checkpoints": figures,
        "parting": parting(proxy_CP, gold_CP, seed),
        "recommended": recommended(proxy_CP, gold_CP, kl_CP, seed),
        "best_of_n": best_of_n,
        "sentences": sentences(names, proxy_CP, gold_CP, kl_CP, proxy_name, gold_name, best_of_n, seed),
    }


def _course(
    names: Sequence[str],
    proxy_CP: NDArray[np.float64],
    gold_CP: NDArray[np.float64],
    kl_C: NDArray[np.float64],
    proxy_name: str,
    gold_name: str,
    seed: int,
) -> str:
    """The sentence on whether proxy and gold part."""
    prompts = proxy_CP.shape[1]
    if prompts == 1:
        return "The checkpoints were asked one prompt, which settles nothing."
    over = f"over {prompts} prompts"
    best, fallen = fall(gold_CP, seed)
    since = change(proxy_CP, best, -1)
    if (apart := parting(proxy_CP, gold_CP, seed)) is not None:
        still = "still rises" if since.low > 0 else "is not settled to fall"
        return (
            f"From {names[apart]} on (KL {kl_C[apart]:.1f} nats) {proxy_name} {still} ({_signed(since.mean)}) while "
            f"{gold_name}, which the policy never saw, falls ({_with_range(fallen)}, {over}): the policy is "
            "over-optimised."
        )
    risen = change(proxy_CP, 0, -1)
    if fallen.high < 0:
        return (
            f"From {names[best]} on {gold_name} falls ({_with_range(fallen)}, {over}), but {proxy_name} gains nothing "
            f"settled by it ({_signed(since.mean)}; {_signed(risen.mean)} since {names[0]}): that is no "
            "over-optimisation but a run that went wrong."
        )
    gold = change(gold_CP, 0, -1)
    course = (
        f"from {names[0]} to {names[-1]} (KL {kl_C[-1]:.1f} nats) {proxy_name} moves by {_with_range(risen)} and "
        f"{gold_name}, which the policy never saw, by {_with_range(gold)}, {over}"
    )
    if fallen.mean < 0:
        return (
            f"No over-optimisation is settled: {course}. Its best is {names[best]}, and the fall since "
            f"({_with_range(fallen)}) may be chance."
        )
    return f"No over-optimisation is seen: {course}, and its last checkpoint is its best."


def _choice(judge_CP: NDArray[np.float64], kl_C: NDArray[np.float64], seed: int) -> tuple[int, int]:
    """(the checkpoint to ship, the best of those settled to be better than the reference); 0 and 0 without any."""
    if len(judge_CP) == 1:
        return 0, 0
    gains = simultaneous(judge_CP[1:] - judge_CP[0], seed)
    better = [c for c, gain in enumerate(gains, start=1) if gain.low > 0]
    if not better:
        return 0, 0
    best = max(better, key=lambda c: float(judge_CP[c].mean()))
    as_good = [c for c in better if not change(judge_CP, c, best).low > 0]
    return min(as_good, key=lambda c: float(kl_C[c])), best


def _shipping(
    names: Sequence[str], judge_CP: NDArray[np.float64], kl_C: NDArray[np.float64], judge: str, seed: int
) -> str:
    """The sentence on what to ship."""
    ship, best = _choice(judge_CP, kl_C, seed)
    if not ship:
        return (
            f"Ship {names[0]}, the policy before the training: with all checkpoints compared at once, none is "
            f"settled to be better by {judge}."
        )
    gain = simultaneous(judge_CP[1:] - judge_CP[0], seed)[ship - 1]
    told = f"Ship {names[ship]}: by {judge} it is better than {names[0]} ({_with_range(gain)})"
    if best == ship:
        return f"{told}, at {kl_C[ship]:.1f} nats."
    return (
        f"{told} and not settled to be worse than the best, {names[best]}, at {kl_C[ship]:.1f} nats instead of "
        f"{kl_C[best]:.1f}."
    )


def _tied(proxy_M: NDArray[np.float64], gold_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gold in the order of sorted proxies, its mean wherever proxies are equal."""
    group_M = np.cumsum(np.diff(proxy_M, prepend=proxy_M[0]) > 0)
    return (np.bincount(group_M, weights=gold_M) / np.bincount(group_M))[group_M]


def _with_range(estimate: Estimate) -> str:
    return f"{_signed(estimate.mean)}, 95 % {_signed(estimate.low)} to {_signed(estimate.high)}"


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) >= 0.095 or value == 0 else f"{value:+.1g}"


def _plain(value: float) -> str:
    return _signed(value).lstrip("+")


def _table(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}: rows of at least one value each are wanted.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are nan or infinite.")
    return array


def _same(one: ArrayLike, other: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _table(one, "scores"), _table(other, "values")
    if first.shape != second.shape:
        raise ValueError(f"one table is {first.shape} and another {second.shape}: one value for each score is wanted.")
    return first, second
