"""What a labelling project is made of: settings, items, what people say of them, and what is kept of that."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from labeling_ui.render import visible
from reward.aggregate import Vote
from reward.records import InputError, Record

LONGEST_NAME, LONGEST_CRITERION = 200, 100


def is_name(text: str, longest: int = LONGEST_NAME) -> bool:
    """Whether it can name something in a list: one line, with nothing in it that hides or turns the text around."""
    return bool(text.strip()) and len(text) <= longest and visible(text) == text and len(text.splitlines()) == 1


# What annotators are told where two models are compared.
PREFERENCE_GUIDELINES = "Which answer would you rather have been given? Neither length nor form is a merit of its own."


@dataclass(frozen=True, slots=True)
class Settings:
    """How a project is judged.

    Attributes:
        mode: pairwise: two answers at a time on a scale of 1 to 7; ranking: all answers of a prompt at once.
        overlap: labels by different annotators that an item wants; it never gets more.
        policy: which item comes next. random: any; least: the one with the fewest labels; active: the one whose
            outcome is least certain.
        random_share: under active, the share of items drawn at random all the same, for an evaluation without bias.
        gold_share: the share of items with a known answer mixed in, where the project has any.
        lease_seconds: how long an item is kept for an annotator who shows no sign of life.
        criteria: what each answer is rated for from 1 to 5 beside the preference; may be empty.
        closed: nothing more is lent; whoever waits for labels goes on with those there are.
    """

    mode: Literal["pairwise", "ranking"] = "pairwise"
    overlap: int = 1
    policy: Literal["random", "least", "active"] = "random"
    random_share: float = 0.2
    gold_share: float = 0.07
    lease_seconds: float = 900.0
    criteria: tuple[str, ...] = ()
    closed: bool = False

    def __post_init__(self) -> None:
        problems = [
            (self.mode in ("pairwise", "ranking"), f"mode is {self.mode!r}: pairwise or ranking is wanted"),
            (self.overlap >= 1, f"overlap is {self.overlap}: at least 1 label an item is wanted"),
            (self.policy in ("random", "least", "active"), f"policy is {self.policy!r}: random, least or active"),
            (0 <= self.random_share <= 1, f"random_share is {self.random_share}: a share from 0 to 1 is wanted"),
            (0 <= self.gold_share <= 0.5, f"gold_share is {self.gold_share}: a share from 0 to 0.5 is wanted"),
            (self.lease_seconds >= 10, f"lease_seconds is {self.lease_seconds}: at least 10 are wanted"),
            (_are_criteria(self.criteria), f"criteria: up to 8 different names of {LONGEST_CRITERION} letters at most"),
        ]
        for fine, problem in problems:
            if not fine:
                raise InputError(f"A project's {problem}.")


def _are_criteria(criteria: Sequence[str]) -> bool:
    return len(set(criteria)) == len(criteria) <= 8 and all(is_name(each, LONGEST_CRITERION) for each in criteria)


@dataclass(frozen=True, slots=True)
class Project:
    """A set of items and their labels. `simulated` says that a program gives the labels, never a person."""

    id: int
    name: str
    simulated: bool
    settings: Settings
    created: str
    instructions: str
    guidelines: int  # version of the instructions


@dataclass(frozen=True, slots=True)
class Item:
    """What is judged at once: some answers of one comparison.

    Attributes:
        id: number in this store.
        key: "<comparison id>:<first>-<second>...", the same in every store.
        answers: indices of the answers in the comparison, ascending.
        digest: sha256 of the whole comparison.
        payload: `{comparison_id, pair: indices, prompt, split, answers}` and the comparison's extra columns.
        gold: the indices of the better and the worse answer; None: nobody knows.
    """

    id: int
    key: str
    comparison_id: str
    answers: tuple[int, ...]
    digest: str
    payload: Record
    gold: tuple[int, ...] | None = None

    @property
    def pair(self) -> tuple[int, ...]:
        return self.answers


class Judgement(TypedDict):
    """One person's judgement of one item as it was on the screen.

    item_id: the item. annotator: who. key: idempotency key, unique in the project: sent again, it stores nothing.
    order: indices of the answers from left to right.
    value: pairwise: 1 (left much better), 2, 3, 4 (tie), 5, 6, 7 (right much better).
    ranking: groups of answer indices from best to worst, equals in one group; answers may be left out.
    ratings: for each criterion, the rating 1 to 5 of answers by index (as text, for JSON's sake).
    seconds: time spent looking at it. comment, flag, rewrite: words. rewrite: a better answer.
    """

    item_id: int
    annotator: str
    key: str
    order: Sequence[int]
    value: NotRequired[int | None]
    ranking: NotRequired[list[list[int]] | None]
    ratings: NotRequired[dict[str, dict[str, int]] | None]
    seconds: NotRequired[float | None]
    comment: NotRequired[str | None]
    flag: NotRequired[str | None]
    rewrite: NotRequired[str | None]


SAID = ("order", "value", "ranking", "ratings", "seconds", "comment", "flag", "rewrite")


@dataclass(frozen=True, slots=True)
class Event:
    """Something a person did: `kind` is label, skip, undo, or verdict (of a reviewer, which overrides all labels).

    `body` is what they said, in what order it was shown, the sha256 of the text shown, the version of the guidelines,
    and the lease they held.
    """

    id: int
    item_id: int
    annotator: str
    kind: str
    key: str
    body: dict[str, Any]
    created: str

    def votes(self) -> list[tuple[tuple[int, int], Vote]]:
        """What it says of pairs of answers (first < second), in the pair's own order."""
        if self.kind not in ("label", "verdict"):
            return []
        if (value := self.body.get("value")) is not None:
            left, right = self.body["order"]
            return [((min(left, right), max(left, right)), Vote(self.annotator, value if left < right else 8 - value))]
        ranks = {answer: rank for rank, group in enumerate(self.body["ranking"]) for answer in group}
        found = []
        for first, second in itertools.combinations(sorted(ranks), 2):
            # A ranking says which, not how much: the distance stands for the strength, up to "much better".
            steps = max(-3, min(3, ranks[second] - ranks[first]))
            found.append(((first, second), Vote(self.annotator, 4 - steps)))
        return found


@dataclass(frozen=True)
class Imported:
    """How many items an import added, how many were there already, and how many pairs have one text on both sides:
    people are not asked which of two equal texts is better."""

    added: int = 0
    there: int = 0
    identical: int = 0

    def sentence(self) -> str:
        """The three numbers in words."""
        said = f"{self.added} items added, {self.there} already there"
        if self.identical:
            said += f", {self.identical} left out because both answers are the same text"
        return f"{said}."
