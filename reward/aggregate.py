"""From several people's votes on a pair of answers to one preference record, or to an honest tie.

Plain majority: it is what most published preference data was made with, and every other rule is compared with it.
A tie is never broken by a coin: a tie used as a win teaches the models noise, so ties leave as records of their own.

This module imports neither torch nor the label store: a pair is a plain record and its votes are plain numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from reward.records import InputError, Record, assistant_answer

TIE = 4
LOWEST, HIGHEST = 1, 7


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
    annotators = tuple(sorted(vote.annotator for vote in votes))
    for annotator, following in pairwise(annotators):
        if annotator == following:
            raise InputError(
                f"Annotator {annotator} voted twice on one pair: pass only the vote that counts, one per annotator."
            )
    n = len(votes)
    first = sum(vote.strength > 0 for vote in votes)
    second = sum(vote.strength < 0 for vote in votes)
    ties = n - first - second
    if first == second or 2 * ties > n:
        return Verdict(winner=None, share=0.5, margin=0.0, n=n, annotators=annotators)
    winner, behind, sign = (0, first, 1) if first > second else (1, second, -1)
    strength = sign * sum(vote.strength for vote in votes)
    return Verdict(winner, (behind + ties / 2) / n, max(0, strength) / n, n, annotators)


@dataclass(frozen=True, slots=True)
class Preferences:
    """All pairs of a project after voting; every pair is in exactly one of the four.

    Attributes:
        records: preference records `{prompt, chosen, rejected, margin, weight, annotators, comparison_id, pair,
            split, simulated}`; `margin` and `weight` are the verdict's margin and share, `pair` the two answer
            indices in the comparison.
        ties: `{prompt, answers, annotators, comparison_id, pair, split, simulated}`.
        identical: number of pairs whose two texts are equal, left out whatever the votes say.
        unlabelled: number of pairs without a vote.
    """

    records: list[Record]
    ties: list[Record]
    identical: int
    unlabelled: int


def preferences(pairs: Iterable[tuple[Record, Sequence[Vote]]], *, simulated: bool) -> Preferences:
    """Preference and tie records from pairs and their votes, ordered by comparison id and pair.

    Args:
        pairs: a pair is `{comparison_id, pair: [i, j], prompt, split, answers: [{text}, {text}]}`; its votes are in
            the order of `answers`. The order in which pairs come does not matter.
        simulated: whether the votes were made by a program; every record carries it, so that no checkpoint can
            pass for one trained on people's labels.
    """
    records: list[Record] = []
    ties: list[Record] = []
    identical = unlabelled = 0
    for item, votes in sorted(pairs, key=lambda each: (each[0]["comparison_id"], list(each[0]["pair"]))):
        texts = [answer["text"] for answer in item["answers"]]
        if texts[0] == texts[1]:
            identical += 1
            continue
        if not votes:
            unlabelled += 1
            continue
        verdict = majority(votes)
        origin = {
            "annotators": list(verdict.annotators),
            "comparison_id": item["comparison_id"],
            "pair": list(item["pair"]),
            "split": item["split"],
            "simulated": simulated,
        }
        if verdict.winner is None:
            answers = [assistant_answer(text) for text in texts]
            ties.append({"prompt": item["prompt"], "answers": answers, **origin})
            continue
        records.append(
            {
                "prompt": item["prompt"],
                "chosen": assistant_answer(texts[verdict.winner]),
                "rejected": assistant_answer(texts[1 - verdict.winner]),
                "margin": verdict.margin,
                "weight": verdict.share,
                **origin,
            }
        )
    return Preferences(records, ties, identical, unlabelled)
