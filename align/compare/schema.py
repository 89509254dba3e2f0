"""The shape of `report.json`: what the compare stage measures and the report shows.

Every figure is measured on the held-out prompts unless it says otherwise. A figure that could not be measured is None
or absent, never a stand-in. Nothing in it depends on the time or the machine: same inputs and seeds, same bytes.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from reward.statistics import MeanFigure

SCHEMA: Literal[2] = 2


class ShareFigure(TypedDict):
    """A share in [0, 1] of n, with its 95 % interval."""

    rate: float
    low: float
    high: float
    n: int


class WinRateFigure(TypedDict):
    """Wins over the first model by one judge; shares in [0, 1], ties counting half; low to high is at 95 %."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    n: int
    p: float  # two-sided exact sign test of "neither is preferred", ties left out
    p_adjusted: float  # by Holm's method, over every model and judge of the report
    unjudged: int  # prompts on which the judge gave no verdict; not among n


class BiasFigure(TypedDict):
    """A judge that saw every pair in both orders: does it look at the side?"""

    first: float  # share of verdicts for the side shown first; 0.5 without bias
    consistent: float  # share of prompts with one verdict in both orders
    p: float
    n: int


class AgreementFigure(TypedDict):
    """How often a judge says what people say, over pairs on which both see a difference."""

    people: str  # which judge people are here
    share: ShareFigure
    kappa: float | None  # Cohen's, over all pairs both judged, ties a category of their own


class Judge(TypedDict):
    """Who compared the answers, and how far it can be believed."""

    name: str
    description: str
    independent: bool  # no compared model was optimised against its opinion
    asked: NotRequired[int]  # questions put to a judge that can fail
    failed: NotRequired[int]  # of those, answered with nonsense or not at all
    bias: NotRequired[BiasFigure]
    agreement: NotRequired[AgreementFigure]
    trust: NotRequired[str]  # what a reward model's own trust report says of it, in a sentence
    sentences: list[str]  # its reliability in words


class Prompts(TypedDict):
    """The prompts every model answered; digest is sha256 over them."""

    n: int
    split: Literal["test", "all"]
    digest: str
    seen: NotRequired[dict[str, int]]  # by model: prompts left out because it was trained on them


class TextFigures(TypedDict):
    """What can be read off a model's answers as texts."""

    distinct_1: float  # different words over words, over all answers
    distinct_2: float  # the same of word pairs
    self_similarity: MeanFigure | None  # of an answer with those to other prompts, 0..1; near 1 is collapse
    refusals: ShareFigure
    empty: ShareFigure
    bleu: float | None  # corpus BLEU, 0..100, against held-out demonstrations of the same prompts
    rouge_l: MeanFigure | None  # F1 of the longest common subsequence, 0..1, against the same
    references: int  # prompts with a demonstration


class TaskFigure(TypedDict):
    """A model on a task with labels. Precision, recall and F1 are means over classes."""

    accuracy: ShareFigure
    f1: float | None
    precision: float | None
    recall: float | None
    n: int


class Ability(TypedDict):
    """A model's Bradley-Terry strength in logits, the first model's being 0, with its 95 % interval."""

    strength: float
    low: float
    high: float


class ModelFigures(TypedDict):
    """Everything measured about one model; the first of the report is the one to beat."""

    name: str
    path: str
    win_rate: NotRequired[dict[str, WinRateFigure]]  # by judge; absent or empty for the first model
    equal_length: NotRequired[dict[str, MeanFigure]]  # by judge: the win rate, were answers as long as the first's
    scores: NotRequired[dict[str, MeanFigure]]  # by judge that gives every answer a score
    ability: NotRequired[Ability]  # where three models or more were compared pair by pair
    kl: MeanFigure | None  # nats per answer, to the reference; None where undefined
    kl_per_token: MeanFigure | None  # nats per token of the answer
    entropy: MeanFigure | None  # nats per token, of the model's own distribution along its answers
    length: MeanFigure | None  # tokens per answer; characters where the models do not share a tokenizer
    finished: float | None  # share of answers that ended with the stop token; None for a file of answers
    perplexity: MeanFigure | None  # on held-out demonstrations
    text: NotRequired[TextFigures]
    tasks: NotRequired[dict[str, TaskFigure]]
    lm_eval: NotRequired[dict[str, MeanFigure]]  # by "task/metric"


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


class CheckpointFigures(TypedDict):
    """One policy along the way, on held-out prompts."""

    name: str  # "update 12"
    step: int
    proxy: MeanFigure  # score of what it was trained on
    gold: MeanFigure | None  # score of a judge it never saw
    kl: MeanFigure  # nats per answer, to the reference
    length: MeanFigure


class BestOfN(TypedDict):
    """The best by the proxy of n answers of the reference: what re-ranking buys, without any training."""

    n: list[int]
    kl: list[float]  # log n - (n - 1) / n nats
    proxy: list[float]
    gold: list[float] | None


class OverOptimisation(TypedDict):
    """Reward against KL along the training: where the proxy and the held-out judge part, and what to ship."""

    proxy_name: str
    gold_name: str | None
    checkpoints: list[CheckpointFigures]
    parting: int | None  # index of the checkpoint after which the gold falls while the proxy rises
    recommended: int  # index of the checkpoint to ship
    best_of_n: BestOfN | None
    sentences: list[str]


class Answer(TypedDict):
    """One model's answer to an example prompt, with each judge's score, and its outcome against the first model."""

    model: str
    text: str
    scores: dict[str, float]
    outcomes: NotRequired[dict[str, float]]  # by judge: 1 preferred to the first model's answer, 0.5 tie, 0 not


class Example(TypedDict):
    """One held-out prompt with the answers side by side. Examples come worst regression first."""

    prompt: str
    answers: list[Answer]


class LineageStep(TypedDict):
    """One finished stage: its folder, content digest, what it was made from, and sha256 by data file."""

    stage: str
    folder: str
    digest: str
    parents: list[str]
    data: dict[str, str]
    labels: NotRequired[dict[str, Any]]  # of a label stage: labels, annotators, simulated


class Report(TypedDict):
    """The whole of `report.json`."""

    schema: Literal[2]
    pipeline: str
    notices: list[str]  # what a reader must know before believing a figure; shown as banners
    verdict: list[str]
    judges: list[Judge]  # the first is the one whose verdict is told first
    prompts: Prompts
    reference: str | None  # the model that KL is measured to
    length_unit: Literal["tokens", "characters"]
    models: list[ModelFigures]
    ppo: NotRequired[PpoCourse]
    overoptimisation: NotRequired[OverOptimisation]
    examples: list[Example]
    lineage: list[LineageStep]
    seeds: dict[str, Any]
    versions: dict[str, Any]
    settings: dict[str, Any]
