"""The shape of `data_report.json`.

A share is from 0 to 1. A figure that could not be measured is None. Nothing in it depends on the time, the machine or
the order in which files were read: same rows and seed, same bytes.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from align.data.names import Kind

SCHEMA: Literal[1] = 1
SAMPLED = 2_000  # rows of a file whose tokens, language and openings are looked at: shares are good to 2 points
UNTOLD = "hard to tell"  # in place of a language


class StepFigures(TypedDict):
    """What one step of preparation did to one file."""

    step: str
    rows_in: int
    rows_out: int
    left_out: dict[str, int]  # rows by reason, most first
    changed: int
    examples: list[dict[str, str]]  # {before, after}, {kept, left out} or {reason, text}, cut to 300 characters


class Group(TypedDict):
    """Rows, or answers, that have something in common."""

    name: str
    rows: int
    share: float


class Lengths(TypedDict):
    """How long prompts, answers, or whole rows (the prompt with its longest answer) are, over the sample.

    edges, counts: how many are above one edge and up to the next.
    """

    of: Literal["prompt", "answer", "row"]
    n: int
    mean: float
    median: int
    p95: int
    longest: int
    edges: list[int]
    counts: list[int]


class Limit(TypedDict):
    """A length in tokens that a stage allows, and how many of the sampled rows are longer."""

    key: str
    of: Literal["prompt", "row"]
    limit: int
    longer: int
    share: float


class Pairs(TypedDict):
    """Whether the longer answer is chosen, and whether labels of one pair agree; rows made by augmentation left out."""

    longer: int  # pairs whose chosen answer is the longer one, in characters
    shorter: int
    equal: int
    longer_share: float | None  # of those that differ in length
    labelled_again: int  # pairs (a prompt with its two answers) that have several labels
    agreeing: int  # of those, the ones whose labels all say the same
    agreement: float | None


class FileFigures(TypedDict):
    """One file of records as the stages will read it."""

    key: str
    kind: Kind
    rows: int
    train: int
    test: int
    augmented: int
    steps: list[StepFigures]
    sampled: int
    unit: Literal["tokens", "characters"]
    lengths: list[Lengths]
    limits: list[Limit]
    unrendered: int  # sampled rows that the chat template refuses; their lengths are missing
    sources: list[Group]
    languages: list[Group]
    openings: list[Group]  # of sampled (chosen) answers: their first three words
    pairs: Pairs | None


class Cost(TypedDict):
    """What a training stage will read.

    tokens: over all passes, the prompt of a pair once. seconds: of training, on the machine of `Costs`.
    """

    stage: str
    rows: int
    tokens_a_row: float
    passes: float
    tokens: int
    seconds: float | None


class Costs(TypedDict):
    """machine, rate: what the seconds stand on, for people."""

    machine: str
    rate: str
    stages: list[Cost]
    missing: dict[str, str]  # stage -> why nothing can be said


class Look(TypedDict):
    """Something to look at: what was found, and from where on it is told."""

    file: str
    what: str
    threshold: str


class Told(TypedDict):
    """The whole report. schema: 1."""

    schema: Literal[1]
    pipeline: str
    seed: int
    look_at: list[Look]
    files: list[FileFigures]
    costs: Costs
