"""The shape of the figures in `trust.json`: what was measured about a reward model, on held-out pairs only.

A share is from 0 to 1, a length is in characters, a reward in the model's own unit. Every interval is at 95 % and takes
prompts as the units of evidence. A figure that could not be measured is None, and `why` beside it says why.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from reward.statistics import MeanFigure

SCHEMA: Literal[1] = 1


class Counts(TypedDict):
    """Pairs; the prompts of the held-out ones; and how many of these prompts are among the training prompts too."""

    train: int
    test: int
    prompts: int
    shared_prompts: int


class Rewards(TypedDict):
    """Mean and standard deviation over the held-out answers, each counted once."""

    mean: float
    deviation: float


class Ceiling(TypedDict):
    """How far people agree with each other, and the model with one person's vote, on the same pairs."""

    agreement: MeanFigure | None
    model: MeanFigure | None  # also where agreement is None, if votes are recorded
    pairs: int
    why: str | None


class BaselineFigure(TypedDict):
    """A floor: its accuracy, and the model's accuracy minus its own over the same pairs.

    p: McNemar's exact p-value of equal accuracy, over pairs as if they were independent.
    """

    name: str
    rule: str
    accuracy: MeanFigure | None
    difference: MeanFigure | None
    p: float | None


class Group(TypedDict):
    """Accuracy on the pairs of one source, one annotator, one step of margin or length."""

    name: str
    pairs: int
    accuracy: MeanFigure


class Groups(TypedDict):
    rows: list[Group]
    why: str | None


class BinFigure(TypedDict):
    """Pairs of like confidence; low to high is the exact interval of their accuracy."""

    confidence: float
    accuracy: float
    low: float
    high: float
    n: int


class CalibrationSide(TypedDict):
    """noise: the error that perfectly calibrated confidences of this number would show on average."""

    error: float
    noise: float
    brier: float
    bins: list[BinFigure]


class CalibrationFigure(TypedDict):
    """Before: sigmoid(gap). After: sigmoid(gap / T), with T for each half of the prompts fitted on the other half.

    temperature: T fitted on all held-out pairs, for use elsewhere; nothing here is measured with it.
    """

    temperature: float
    halves: list[float] | None
    before: CalibrationSide
    after: CalibrationSide | None
    why: str | None


class CorrelationFigure(TypedDict):
    """Spearman's correlation; None where reward or length is constant. n counts prompts."""

    rho: float | None
    low: float | None
    high: float | None
    n: int


class Point(TypedDict):
    """One answer of the plot of reward against length."""

    length: int
    reward: float
    chosen: bool


class LengthFigure(TypedDict):
    """What reward has to do with length.

    overall: over all held-out answers. within: both centred on the mean of their prompt, so that only differences
    between answers to one prompt count.
    matched: pairs whose longer answer is at most 10 % longer. chosen_longer, chosen_shorter: the pairs of that kind.
    beyond: mean of the accuracies on chosen_longer and on chosen_shorter, pairs of equal length counting in both; a
    model that knows length alone has at most 0.5 there, however well it does overall. None where one kind is missing.
    """

    overall: CorrelationFigure
    within: CorrelationFigure
    matched: Group | None
    chosen_longer: Group | None
    chosen_shorter: Group | None
    beyond: MeanFigure | None
    points: list[Point]


class Spread(TypedDict):
    """Answers unlike the training data, and how often the heads disagree more on them than on the chosen answer.

    mean: standard deviation over heads, averaged over the answers. wider: share of prompts.
    """

    name: str
    sentence: str
    mean: float
    wider: MeanFigure


class SpreadFigure(TypedDict):
    """Standard deviation over heads; None with one head. inside: averaged over one chosen answer a prompt."""

    inside: float | None
    outside: list[Spread]
    why: str | None


class ProbeFigure(TypedDict):
    """raised: share of answers whose reward rises. change: mean change, in standard deviations of held-out rewards.

    n: answers changed; those that the change leaves as they were, or that become too long, are left out.
    """

    name: str
    sentence: str
    liking: str
    kind: Literal["empty of use", "padding"]
    n: int
    raised: MeanFigure | None
    change: MeanFigure | None


class EditFigure(TypedDict):
    """flipped: share of pairs whose order turns round when one of the two answers is edited so."""

    name: str
    sentence: str
    n: int
    flipped: MeanFigure | None


class Figures(TypedDict):
    """Everything that was measured."""

    schema: Literal[1]
    simulated: bool  # whether a program made any of the labels
    seed: int
    heads: int
    pairs: Counts
    rewards: Rewards
    accuracy: MeanFigure
    ceiling: Ceiling
    baselines: list[BaselineFigure]
    by_source: Groups
    by_annotator: Groups
    by_margin: Groups
    by_length: Groups
    calibration: CalibrationFigure
    length: LengthFigure
    spread: SpreadFigure
    probes: list[ProbeFigure]
    edits: list[EditFigure]
