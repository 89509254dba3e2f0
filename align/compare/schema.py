"""The shape of `report.json`: what the compare stage measures and the report shows.

Every figure is measured on the held-out prompts. A figure that could not be measured
is None, never a stand-in.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from reward.statistics import MeanFigure

SCHEMA = 1


class WinRateFigure(TypedDict):
    """Wins over the base by one judge; shares in [0, 1], ties counting half; low to high is at 95 %."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    n: int


class Judge(TypedDict):
    """Who compared the answers, and how, in words for the reader."""

    name: str
    description: str


class Prompts(TypedDict):
    """The prompts every model answered; digest is sha256 over them."""

    n: int
    split: Literal["test"]
    digest: str


class ModelFigures(TypedDict):
    """Everything measured about one model: "base", "sft", "dpo", "ppo"."""

    name: str
    path: str
    win_rate: NotRequired[dict[str, WinRateFigure]]  # by judge; absent or empty for the base
    equal_length: NotRequired[dict[str, MeanFigure]]  # by judge: the win rate, were answers as long as the base's
    reward: MeanFigure | None  # the reward model's score
    preference: MeanFigure | None  # the simulated preference's score, where labels were simulated
    kl: MeanFigure | None  # nats per answer, to the SFT reference; None where undefined
    length: MeanFigure | None  # tokens per answer
    finished: float  # share of answers that ended with the stop token
    perplexity: MeanFigure | None  # on held-out demonstrations


class Finding(TypedDict):
    """What a PPO run's figures say is wrong: who is to blame, how sure, and the sentence with numbers and remedy."""

    check: str
    culprit: str
    severity: str
    sentence: str


class PpoCourse(TypedDict):
    """The PPO run behind the policy: one entry an update, on training prompts, and its diagnosis."""

    score: list[float]  # mean over the update's answers
    kl: list[float]  # nats per answer
    findings: list[Finding]


class Answer(TypedDict):
    """One model's answer to an example prompt, with each judge's score."""

    model: str
    text: str
    scores: dict[str, float]


class Example(TypedDict):
    """One held-out prompt with the answers side by side."""

    prompt: str
    answers: list[Answer]


class LineageStep(TypedDict):
    """One finished stage: its folder, content digest, what it was made from, and sha256 by data file."""

    stage: str
    folder: str
    digest: str
    parents: list[str]
    data: dict[str, str]


class Report(TypedDict):
    """The whole of `report.json`."""

    schema: Literal[1]
    pipeline: str
    created: str
    notices: list[str]  # what a reader must know before believing a figure; shown as banners
    verdict: list[str]
    judges: list[Judge]
    prompts: Prompts
    models: list[ModelFigures]
    ppo: NotRequired[PpoCourse]
    examples: list[Example]
    lineage: list[LineageStep]
    seeds: dict[str, Any]
    versions: dict[str, Any]
    settings: dict[str, Any]
