"""How a project goes, for its admin: how far it is, how well annotators agree, and whose labels to trust.

Gold items show how careful someone is. They stay out of progress and out of agreement: everyone gets them, and they
are easier than the rest.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from labeling_ui import agreement
from labeling_ui.agreement import Estimate, SideBias
from labeling_ui.projection import fold
from labeling_ui.store import Event, Item, LabelStore, Project
from reward.aggregate import TIE, Vote

# An item and two of its answers, the lower index first.
PairOfItem = tuple[int, tuple[int, int]]
ROUNDS_OF_EM = 1000


@dataclass(frozen=True, slots=True)
class AnnotatorQuality:
    """One annotator's work on a project; what they took back does not count, gold items do.

    Attributes:
        labels, skips, flags: how many; labels and skips may carry a flag.
        seconds: median time for an item; None: no label tells.
        ties: share of votes on two answers that are ties; None: there are no votes.
        side: how often the left answer of the screen won; of a ranking, the leftmost against the rightmost.
        gold_right, gold_asked: gold items where the better answer won, and all of them; a tie is not right.
        verdict, verdict_after: whether they guess, by their gold items, and after how many that was clear.
    """

    name: str
    labels: int
    skips: int
    flags: int
    seconds: float | None
    ties: float | None
    side: SideBias
    gold_right: int
    gold_asked: int
    verdict: agreement.Verdict
    verdict_after: int


@dataclass(frozen=True, slots=True)
class Quality:
    """How a project goes.

    Attributes:
        given, wanted: labels, gold items left out.
        annotators: by name.
        nominal, ordinal: Krippendorff's alpha of which answer won (first, tie, second) and of the values 1 to 7, on
            pairs of answers that two people or more judged. Intervals take all pairs of one prompt as one witness.
        fleiss: Fleiss' kappa of which answer won.
        cohen: Cohen's kappa of the values, quadratic weights, of every two annotators with two pairs in common.
    """

    given: int
    wanted: int
    annotators: tuple[AnnotatorQuality, ...]
    nominal: Estimate
    ordinal: Estimate
    fleiss: Estimate
    cohen: dict[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one annotator said of two answers: `value` is 1 (first much better) to 7 (second much better)."""

    annotator: str
    value: int
    comment: str | None


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two answers of an item that took different sides; `share`: of the smaller side among all votes, up to 1/2."""

    item_id: int
    key: str
    pair: tuple[int, int]
    share: float
    opinions: tuple[Opinion, ...]


@dataclass(frozen=True, slots=True)
class Remark:
    """Words that an annotator left with an item; `kind`: flag, skip (its reason), comment or better answer."""

    key: str
    annotator: str
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Reliability:
    """How likely an annotator names the side that is right, as Dawid and Skene's model sees it from `votes` votes."""

    annotator: str
    right: float
    votes: int


def quality(store: LabelStore, project: Project, rounds: int = 1000) -> Quality:
    """How the project goes.

    Args:
        rounds: of the bootstrap behind the intervals.
    """
    counting, items = _read(store, project)
    events = [event for event in counting if event.kind != "verdict"]
    normal = [event for event in events if items[event.item_id].gold is None]
    votes = _votes(normal)
    values = [{vote.annotator: vote.value for vote in each} for each in votes.values()]
    sides = [{vote.annotator: _side(vote) for vote in each} for each in votes.values()]
    prompts = [items[item_id].comparison_id for item_id, _ in votes]
    return Quality(
        given=sum(event.kind == "label" for event in normal),
        wanted=sum(item.gold is None for item in items.values()) * project.settings.overlap,
        annotators=tuple(
            _of_annotator(name, [event for event in events if event.annotator == name], items)
            for name in sorted({event.annotator for event in events})
        ),
        nominal=agreement.bootstrap(sides, "nominal", rounds, groups=prompts),
        ordinal=agreement.bootstrap(values, "ordinal", rounds, groups=prompts),
        fleiss=agreement.bootstrap(sides, "fleiss", rounds, groups=prompts),
        cohen=agreement.pairwise_cohen(values, "quadratic"),
    )


def disagreements(store: LabelStore, project: Project) -> list[Disagreement]:
    """Where annotators took different sides, for a reviewer to decide: evenly split first, then the strongest words.

    What a reviewer has decided is left out.
    """
    events, items = _read(store, project)
    comments = {(event.item_id, event.annotator): event.body.get("comment") for event in events}
    done = {event.item_id for event in events if event.kind == "verdict"}
    found = []
    for (item_id, pair), votes in _votes(events).items():
        if item_id in done or items[item_id].gold is not None:
            continue
        smaller = min(sum(vote.value < TIE for vote in votes), sum(vote.value > TIE for vote in votes))
        if smaller:
            opinions = tuple(Opinion(v.annotator, v.value, comments[item_id, v.annotator]) for v in votes)
            found.append(Disagreement(item_id, items[item_id].key, pair, smaller / len(votes), opinions))
    return sorted(found, key=lambda each: (-each.share, -_spread(each.opinions), each.item_id, each.pair))


WORDS = {"flag": "flag", "skip": "reason", "comment": "comment", "better answer": "rewrite"}


def remarks(store: LabelStore, project: Project) -> list[Remark]:
    """The words beside the labels and skips that count, the newest first."""
    events, items = _read(store, project)
    return [
        Remark(items[event.item_id].key, event.annotator, kind, event.body[name])
        for event in reversed(events)
        for kind, name in WORDS.items()
        if event.body.get(name)
    ]


def reliability(store: LabelStore, project: Project) -> list[Reliability]:
    """Each annotator's reliability, the lowest first, from those pairs of answers that two people or more judged.

    Nobody says which side is right: Dawid and Skene (1979) find, by expectation maximisation, the sides and the
    annotators' errors that explain the votes best. Few people, or few votes, make it a guess.
    """
    events, items = _read(store, project)
    votes = _votes(event for event in events if items[event.item_id].gold is None)
    rows = [
        (f"{item_id} {pair}", vote.annotator, _side(vote))
        for (item_id, pair), each in votes.items()
        if len(each) >= 2
        for vote in each
    ]
    if not rows:
        return []
    import pandas as pd
    from crowdkit.aggregation import DawidSkene

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls pandas in ways that pandas 4 will not know
        model = DawidSkene(n_iter=ROUNDS_OF_EM, tol=1e-9).fit(pd.DataFrame(rows, columns=["task", "worker", "label"]))
    assert model.priors_ is not None and model.errors_ is not None
    shares = {side: float(share) for side, share in model.priors_.items()}
    errors = model.errors_.to_dict("index")  # (annotator, what they said) to {what was true: probability}
    found = [
        Reliability(name, sum(p * errors[name, side][side] for side, p in shares.items() if (name, side) in errors), n)
        for name, n in Counter(name for _, name, _ in rows).items()
    ]
    return sorted(found, key=lambda each: (each.right, each.annotator))


def _read(store: LabelStore, project: Project) -> tuple[list[Event], dict[int, Item]]:
    """The labels, skips and verdicts that count, in order and by the rule of the store's projection; and all items."""
    stacks: dict[tuple[int, str], list[Event]] = {}
    for event in store.events(project):
        fold(stacks.setdefault((event.item_id, event.annotator), []), event)
    counting = sorted((stack[-1] for stack in stacks.values() if stack), key=lambda event: event.id)
    # Items after events: then every event's item is there, even while others add to the store.
    return counting, {item.id: item for item in store.items(project)}


def _votes(events: Iterable[Event]) -> dict[PairOfItem, list[Vote]]:
    """What annotators said, not reviewers."""
    found: dict[PairOfItem, list[Vote]] = {}
    for event in events:
        for pair, vote in event.votes() if event.kind == "label" else []:
            found.setdefault((event.item_id, pair), []).append(vote)
    return found


def _side(vote: Vote) -> int:
    """-1: the first answer won; 0: a tie; 1: the second."""
    return (vote.value > TIE) - (vote.value < TIE)


def _spread(opinions: Sequence[Opinion]) -> int:
    values = [opinion.value for opinion in opinions]
    return max(values) - min(values)


def _of_annotator(name: str, events: Sequence[Event], items: Mapping[int, Item]) -> AnnotatorQuality:
    labels = [event for event in events if event.kind == "label"]
    votes = [vote for event in labels for _, vote in event.votes()]
    seconds = [event.body["seconds"] for event in labels if event.body.get("seconds") is not None]
    hits = [_hit(event, gold) for event in labels if (gold := items[event.item_id].gold) is not None]
    verdict, after = agreement.sequential_test(hits)
    return AnnotatorQuality(
        name=name,
        labels=len(labels),
        skips=len(events) - len(labels),
        flags=sum(bool(event.body.get("flag")) for event in events),
        seconds=median(seconds) if seconds else None,
        ties=sum(vote.value == TIE for vote in votes) / len(votes) if votes else None,
        side=agreement.side_bias([_screen_value(event) for event in labels]),
        gold_right=sum(hits),
        gold_asked=len(hits),
        verdict=verdict,
        verdict_after=after,
    )


def _hit(event: Event, gold: tuple[int, ...]) -> bool:
    """Whether the better answer of a gold item won."""
    better, worse = gold
    vote = dict(event.votes()).get((min(gold), max(gold)))
    return vote is not None and _side(vote) == (-1 if better < worse else 1)


def _screen_value(event: Event) -> int:
    """The value as it was given, from left to right. One for a ranking too, for its pairs are no separate choices."""
    if event.body.get("value") is not None:
        return int(event.body["value"])
    ranked = {answer for group in event.body["ranking"] for answer in group}
    shown = [answer for answer in event.body["order"] if answer in ranked]
    left, right = shown[0], shown[-1]
    vote = dict(event.votes())[min(left, right), max(left, right)]
    return vote.value if left < right else 8 - vote.value
