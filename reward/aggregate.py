"""From several people's votes on a pair of answers to one preference record, or to an honest tie.

Plain majority is what most published preference data was made with, and every other rule is compared with it. The
other two weigh votes by how reliable their annotators are (`reward.reliability`). A tie is never broken by a coin: a
tie used as a win teaches the models noise, so ties leave as records of their own.

This module imports neither torch nor the label store: a pair is a plain record and its votes are plain numbers.
"""

from __future__ import annotations

import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from reward.records import InputError, Record, assistant_answer

if TYPE_CHECKING:
    from reward.reliability import Ballots

Method = Literal["majority", "dawid-skene", "bradley-terry"]

TIE = 4
LOWEST, HIGHEST = 1, 7
# Probabilities or sums of trust nearer than this are equal; else the last bit would be the coin that breaks a tie.
EQUAL = 1e-6
# An annotator whose votes name the better answer so little more often than the worse (or less often) tells next to
# nothing: 60 against 40 in 100.
TELLS_LITTLE = 0.2


@dataclass(frozen=True, slots=True)
class Vote:
    """One person's view of a pair, in the pair's own order and not in the order of the screen.

    `value` is 1 (first answer much better), 2, 3, 4 (tie), 5, 6, 7 (second answer much better).
    """

    annotator: str
    value: int

    def __post_init__(self) -> None:
        if not LOWEST <= self.value <= HIGHEST:
            raise InputError(
                f"The vote of {self.annotator} is {self.value}: a whole number from {LOWEST} (first answer much "
                f"better) to {HIGHEST} (second answer much better) is wanted."
            )

    @property
    def strength(self) -> int:
        """Signed steps away from a tie, -3 to 3; positive speaks for the first answer."""
        return TIE - self.value


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the votes on one pair say together.

    Attributes:
        winner: 0 for the first answer, 1 for the second, None for a tie.
        share: part of the votes behind the winner, a tied vote counting half for each side; 0.5 for a tie.
        margin: mean strength of all votes towards the winner, in steps from 0 to 3; 0 for a tie.
        n: number of votes.
        annotators: who voted, sorted.
    """

    winner: int | None
    share: float
    margin: float
    n: int
    annotators: tuple[str, ...]


def majority(votes: Sequence[Vote]) -> Verdict:
    """The side that more people took; a tie if the sides are equal or more than half of the votes are ties.

    Votes 2, 3 and 6: the first answer wins with share 2/3 and margin (2 + 1 - 2) / 3 = 1/3. Where a minority feels
    more strongly than the majority (3, 3 and 7: (1 + 1 - 3) / 3 < 0) the margin is 0, for a margin below zero
    would ask the reward model to prefer the loser.

    Raises:
        InputError: one annotator voted twice, which would count one opinion as two.
    """
    assert votes, "a verdict needs at least one vote"
    annotators = _annotators(votes)
    n = len(votes)
    first = sum(vote.strength > 0 for vote in votes)
    second = sum(vote.strength < 0 for vote in votes)
    ties = n - first - second
    if first == second or 2 * ties > n:
        return Verdict(winner=None, share=0.5, margin=0.0, n=n, annotators=annotators)
    winner, behind, sign = (0, first, 1) if first > second else (1, second, -1)
    strength = sign * sum(vote.strength for vote in votes)
    return Verdict(winner, (behind + ties / 2) / n, max(0, strength) / n, n, annotators)


def _annotators(votes: Sequence[Vote]) -> tuple[str, ...]:
    """Who voted, sorted; refuses two votes of one person."""
    annotators = tuple(sorted(vote.annotator for vote in votes))
    for annotator, following in pairwise(annotators):
        if annotator == following:
            raise InputError(
                f"Annotator {annotator} voted twice on one pair: pass only the vote that counts, one per annotator."
            )
    return annotators


@dataclass(frozen=True, slots=True)
class Preferences:
    """All pairs of a project after voting; every pair is in exactly one of the four.

    Attributes:
        records: preference records `{prompt, chosen, rejected, chosen_index, margin, weight, annotators, strengths,
            comparison_id, pair, split, simulated}`; `margin` and `weight` are the verdict's margin and share,
            `strengths` what each of the annotators said, -3 to 3 and positive for chosen, `pair` the two answer indices
            in the comparison, and `chosen_index` the place of the chosen one among the two.
        ties: `{prompt, answers, annotators, strengths, comparison_id, pair, split, simulated}`; strengths are positive
            for the first of the answers.
        identical: number of pairs whose two texts are equal, left out whatever the votes say.
        unlabelled: number of pairs without a vote.
        reliability: of the annotators that could be compared with others on the train side, from 1 (never errs) over 0
            (tells nothing) to -1 (has it reversed); empty for majority, which asks nobody how good they are.
    """

    records: list[Record]
    ties: list[Record]
    identical: int
    unlabelled: int
    reliability: dict[str, float] = field(default_factory=dict)

    @property
    def uninformative(self) -> list[str]:
        """Annotators whose votes tell next to nothing of which answer is better, or have it reversed."""
        return [annotator for annotator, trust in self.reliability.items() if trust < TELLS_LITTLE]


# A pair and its votes, by annotator.
Judged = tuple[Record, list[Vote]]


def preferences(
    pairs: Iterable[tuple[Record, Sequence[Vote]]], *, simulated: bool, method: Method = "majority"
) -> Preferences:
    """Preference and tie records from pairs and their votes, ordered by comparison id and pair.

    Args:
        pairs: a pair is `{comparison_id, pair: [i, j], prompt, split, answers: [{text}, {text}]}`; its votes are in
            the order of `answers`. The order in which pairs come does not matter.
        simulated: whether the votes were made by a program; every record carries it, so that no checkpoint can
            pass for one trained on people's labels.
        method: majority: one vote each. dawid-skene, bradley-terry: votes weighed by how reliable their annotators are
            (`reward.reliability`). Reliability is judged on the train side alone and applied to both; an annotator
            who is new on the test side counts like the average.

    Raises:
        InputError: one annotator voted twice on a pair, the method is unknown, or reliability cannot be judged: nobody
            on the train side shares a pair (for bradley-terry: a prompt) with anybody else.
    """
    if method not in (known := typing.get_args(Method)):
        raise InputError(f"The method of aggregation is {method}: one of {', '.join(known)} is wanted.")
    judged: list[Judged] = []
    identical = unlabelled = 0
    for item, votes in sorted(pairs, key=lambda each: (each[0]["comparison_id"], list(each[0]["pair"]))):
        if item["answers"][0]["text"] == item["answers"][1]["text"]:
            identical += 1
        elif not votes:
            unlabelled += 1
        else:
            judged.append((item, sorted(votes, key=lambda vote: vote.annotator)))
    reliability: dict[str, float] = {}
    if method == "majority":
        verdicts = [majority(votes) for _, votes in judged]
    else:
        verdicts, reliability = _weighed(judged, method)
    records: list[Record] = []
    ties: list[Record] = []
    for (item, votes), verdict in zip(judged, verdicts, strict=True):
        answers = [assistant_answer(answer["text"]) for answer in item["answers"]]
        origin = {
            "annotators": list(verdict.annotators),
            "strengths": [-vote.strength if verdict.winner == 1 else vote.strength for vote in votes],
            "comparison_id": item["comparison_id"],
            "pair": list(item["pair"]),
            "split": item["split"],
            "simulated": simulated,
        }
        if verdict.winner is None:
            ties.append({"prompt": item["prompt"], "answers": answers, **origin})
            continue
        records.append(
            {
                "prompt": item["prompt"],
                "chosen": answers[verdict.winner],
                "rejected": answers[1 - verdict.winner],
                "chosen_index": verdict.winner,
                "margin": verdict.margin,
                "weight": verdict.share,
                **origin,
            }
        )
    return Preferences(records, ties, identical, unlabelled, reliability)


def _weighed(judged: Sequence[Judged], method: Method) -> tuple[list[Verdict], dict[str, float]]:
    """(verdicts of a model of the annotators, their reliability); the model is fitted on the train side alone."""
    if not judged:
        return [], {}
    from reward import reliability  # numpy and scipy: only who asks for them waits for them

    def shared(item: Record) -> Hashable:
        """Within which votes inform on each other: Bradley-Terry's scores connect all pairs of a group."""
        return item["comparison_id"] if method == "bradley-terry" else (item["comparison_id"], *item["pair"])

    voices: dict[Hashable, set[str]] = {}
    for item, votes in judged:
        found = _annotators(votes)
        if item["split"] == "train":
            voices.setdefault(shared(item), set()).update(found)
    # Who judges alone agrees with themselves, which says nothing.
    compared = [each for each in judged if each[0]["split"] == "train" and len(voices[shared(each[0])]) > 1]
    if not compared:
        raise InputError(
            f"{method} judges annotators by each other, but on the train side no two of them judged the same "
            f"{'prompt' if method == 'bradley-terry' else 'pair of answers'}: collect two labels or more for each, or "
            "take the majority (label.aggregate: majority)."
        )
    known = sorted({vote.annotator for _, votes in compared for vote in votes})
    numbers = {annotator: number for number, annotator in enumerate(known)}
    fit = reliability.fit_crowd_bradley_terry if method == "bradley-terry" else reliability.fit_dawid_skene
    model = fit(_ballots(compared, numbers), len(known) + 1)  # the last stands for whoever is not known
    *trust, newcomer = model.trust_A.tolist()
    trusted = dict(zip(known, trust, strict=True))

    verdicts: dict[int, Verdict] = {}
    for split in sorted({item["split"] for item, _ in judged}):  # apart: not even a rounding error crosses over
        numbered = [(n, each) for n, each in enumerate(judged) if each[0]["split"] == split]
        better = model.better(_ballots([each for _, each in numbered], numbers)).tolist()
        for (n, (_, votes)), first in zip(numbered, better, strict=True):
            verdicts[n] = _verdict(votes, first, [trusted.get(vote.annotator, newcomer) for vote in votes])
    return [verdicts[n] for n in range(len(judged))], trusted


def _verdict(votes: Sequence[Vote], first: float, trust: Sequence[float]) -> Verdict:
    """From the probability that the first answer is better and how far each vote is trusted, -1 to 1.

    A tie as with `majority`, but by trust: if both sides are equal, or if more than half of the trust behind the votes
    calls it one. How likely a model holds a tie is not asked: Dawid and Skene's third truth gathers hard pairs as well,
    on which people take both sides. That is disagreement, and belongs into a weight near 1/2.
    """
    n, annotators = len(votes), _annotators(votes)
    counted = [max(0.0, each) for each in trust]
    ties = sum(each for each, vote in zip(counted, votes, strict=True) if not vote.strength)
    nobody_chose = not any(vote.strength for vote in votes)
    if nobody_chose or abs(2 * first - 1) < EQUAL or 2 * ties > sum(counted) + EQUAL:
        return Verdict(winner=None, share=0.5, margin=0.0, n=n, annotators=annotators)
    winner, share, sign = (0, first, 1) if first > 0.5 else (1, 1 - first, -1)
    strength = sign * sum(each * vote.strength for each, vote in zip(counted, votes, strict=True))
    # Rounding must not carry it past the scale.
    margin = min(max(0.0, strength) / sum(counted), float(HIGHEST - TIE)) if any(counted) else 0.0
    return Verdict(winner, share, margin, n, annotators)


def _ballots(judged: Sequence[Judged], numbers: Mapping[str, int]) -> Ballots:
    """The votes as numbers; an annotator without a number gets the one after the last."""
    import numpy as np

    from reward.reliability import Ballots

    groups: dict[str, dict[int, int]] = {}  # the answers of each comparison, numbered as they come
    pairs, cast = [], []
    for number, (item, votes) in enumerate(judged):
        answers = groups.setdefault(item["comparison_id"], {})
        pairs.append([answers.setdefault(answer, len(answers)) for answer in item["pair"]])
        for vote in votes:
            side = 1 - (vote.strength > 0) + (vote.strength < 0)  # 0 the first answer, 1 a tie, 2 the second
            cast.append((number, numbers.get(vote.annotator, len(numbers)), side))
    place = {comparison: number for number, comparison in enumerate(groups)}
    group_P = np.array([place[item["comparison_id"]] for item, _ in judged])
    (first_P, second_P), (pair_V, annotator_V, side_V) = np.array(pairs).T, np.array(cast).T
    return Ballots(pair_V, annotator_V, side_V, group_P, first_P, second_P)
