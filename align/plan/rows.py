"""How long the rows are that a stage reads: counted in the pipeline's own data, or assumed from its limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align import models
from align.config import Config
from align.data.load import load_demonstrations, load_preferences, load_prompts
from align.data.render import answer_ids, prompt_ids
from align.plan.memory import Tokens
from reward.records import InputError, Record

READ = 512  # rows of a file whose tokens are counted, evenly spaced
ASSUMED = 10_000  # rows, where no file says how many


@dataclass(frozen=True)
class Row:
    """Tokens of a prompt and of its answers."""

    prompt: int
    answers: tuple[int, ...]

    @property
    def longest(self) -> int:
        return self.prompt + max(self.answers)

    @property
    def total(self) -> int:
        return self.prompt + sum(self.answers)


@dataclass(frozen=True)
class Rows:
    """The rows of a stage.

    sizes: some of them, the longest first. count: how many there are in training. common: tokens all prompts begin
    with. limit: what packing fills a row up to; 0 without packing. source: where this is known from, for people.
    """

    sizes: tuple[Row, ...]
    count: int
    common: int
    limit: int
    source: str

    def batch(self, rows: int) -> list[Row]:
        """The largest batch of so many rows."""
        repeats = -(-rows // len(self.sizes))
        return sorted(self.sizes * repeats, key=lambda row: -row.total)[:rows] if repeats > 1 else [*self.sizes[:rows]]

    @property
    def mean(self) -> float:
        """Tokens of a row, its prompt once."""
        return sum(row.total for row in self.sizes) / len(self.sizes)

    @property
    def mean_answers(self) -> float:
        return sum(sum(row.answers) for row in self.sizes) / len(self.sizes)


def tokens_of(batch: Sequence[Row], common: int, share: bool) -> Tokens:
    """What a forward pass over all answers of these rows reads.

    Shared, as `align.prefix` lays rows out: what all prompts begin with once, each prompt once, each answer once; rows
    that share a beginning attend under a mask. Else padded to the longest row.
    """
    answers = sum(sum(row.answers) for row in batch)
    rows = sum(len(row.answers) for row in batch)
    longest = max(row.longest for row in batch)
    common = min(common, min(row.prompt for row in batch))
    places = common + sum(row.total - common for row in batch)
    if not share or rows < 2 or places > 0.96 * rows * longest:
        plain = rows * longest
        padded = len({row.prompt + answer for row in batch for answer in row.answers}) > 1
        return Tokens(plain, plain, plain, rows * longest * longest if padded else 0, answers, packed=False)
    queries, keys, masked = 0, 0, 0
    for row in batch:
        for number, answer in enumerate(row.answers):
            own = answer + (row.prompt - common if number == 0 else 0)
            queries, keys = queries + own, keys + row.prompt + answer
            if number or common:  # a row that shares nothing has the plain causal mask
                masked += own * (row.prompt + answer)
    return Tokens(places, queries, keys, masked, answers, packed=True)


def packed_tokens(batch: Sequence[Row], limit: int, count: int) -> Tokens:
    """What TRL's packing makes of so many packed rows: one sequence, in which a mask keeps conversations apart.

    As many of the longest conversations as fit into a row of `limit` tokens are taken to be in each, `count` in all.
    """
    left, places, answers = count, 0, 0
    for row in batch:
        packed = min(max(1, limit // row.total), left)
        left, places, answers = left - packed, places + packed * row.total, answers + packed * sum(row.answers)
    return Tokens(places, places, places, places * places, answers, packed=False)


def demonstration_rows(config: Config, tokenizer: Any) -> Rows:
    section = config.sft
    limit = section.max_length if section.packing else 0

    def one(record: Record) -> Row:
        answer = answer_ids(tokenizer, record["prompt"], record["completion"])
        return Row(len(prompt_ids(tokenizer, record["prompt"])), (len(answer),))

    return _rows(config.data.demonstrations, config, tokenizer, load_demonstrations, one, section.max_length, limit)


def preference_rows(config: Config, tokenizer: Any, max_length: int) -> Rows:
    """Of `data.preferences`, or what sampling and labelling will make of the prompts."""

    def one(record: Record) -> Row:
        answers = (len(answer_ids(tokenizer, record["prompt"], record[side])) for side in ("chosen", "rejected"))
        return Row(len(prompt_ids(tokenizer, record["prompt"])), tuple(answers))

    if config.label.source == "dataset":
        return _rows(config.data.preferences, config, tokenizer, load_preferences, one, max_length, 0)
    sample = config.sample
    prompts = prompt_rows(config, tokenizer, sample.max_prompt_length, sample.max_new_tokens)
    pairs = sample.answers_per_prompt * (sample.answers_per_prompt - 1) // 2
    asked = min(prompts.count, sample.max_prompts or prompts.count)
    sizes = tuple(Row(row.prompt, row.answers * 2) for row in prompts.sizes)
    source = f"{prompts.source}, {pairs} pairs a prompt of answers of {sample.max_new_tokens} tokens"
    return Rows(sizes, asked * pairs, prompts.common, 0, source)


def prompt_rows(config: Config, tokenizer: Any, max_prompt_length: int, answer: int) -> Rows:
    """Prompts of `data.prompts`, else of the demonstrations or preferences, with an answer of `answer` tokens each."""

    def one(record: Record) -> Row:
        return Row(len(prompt_ids(tokenizer, record["prompt"])), (answer,))

    data = config.data
    preferences = data.preferences if config.label.source == "dataset" else None
    given = [(data.prompts, load_prompts), (data.demonstrations, load_demonstrations), (preferences, load_preferences)]
    path, load = next(((p, load) for p, load in given if p), (None, load_prompts))
    return _rows(path, config, tokenizer, load, one, max_prompt_length + answer, 0, (max_prompt_length, (answer,)))


def _rows(
    path: str | None,
    config: Config,
    tokenizer: Any,
    load: Callable[..., Any],
    one: Callable[[Record], Row],
    max_length: int,
    limit: int,
    assumed: tuple[int, tuple[int, ...]] | None = None,
) -> Rows:
    """Rows of a file that fit; where the file or the tokenizer is not at hand, rows as long as the stage allows."""
    if path is None or tokenizer is None or not Path(path).is_file():
        prompt, answers = assumed or (max_length // 2, (max_length - max_length // 2,) * (1 if limit else 2))
        missing = "no data file is set" if path is None else "the data file or the tokenizer is not at hand"
        return Rows(
            (Row(prompt, answers),), ASSUMED, 0, limit, f"assumed, as {missing}: {ASSUMED:,} of the longest rows"
        )
    records = [r for r in load(path, config.data.test_share, config.data.max_rows).records if r["split"] == "train"]
    read = records[:: max(1, len(records) // READ)]
    sizes = sorted((one(record) for record in read), key=lambda row: -row.total)
    fitting = tuple(row for row in sizes if row.longest <= max_length)
    if not fitting:
        raise InputError(
            f"no row of {path} has at most {max_length} tokens (the shortest has {sizes[-1].longest}): "
            "raise max_length."
        )
    count = round(len(records) * len(fitting) / len(sizes))
    return Rows(
        fitting, count, _common(tokenizer, read), limit, f"{len(read)} of {len(records):,} rows of {Path(path).name}"
    )


def _common(tokenizer: Any, records: Sequence[Record]) -> int:
    """How many tokens the prompts begin with alike."""
    prompts = sorted(prompt_ids(tokenizer, record["prompt"]) for record in records[:32])
    first, last = prompts[0], prompts[-1]  # what these two share, all share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def tokenizer_of(config: Config) -> Any:
    """The base's tokenizer; None where it is not at hand, as beside a config.json alone."""
    try:
        return models.load_tokenizer(models.base_path(config.model), config.model)
    except InputError:
        return None
