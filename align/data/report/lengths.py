"""How long rows are: in tokens as the stages will read them, or in characters where there is no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from align.config import Config
from align.data.report.schema import Lengths, Limit
from align.data.report.tally import share
from align.plan.rows import Row
from reward.records import InputError, Record, answer_text

FIRST_EDGE = 16  # and then its doubles
OF: tuple[Literal["prompt", "answer", "row"], ...] = ("prompt", "answer", "row")


def sizes_of(records: Sequence[Record], tokenizer: Any | None) -> tuple[list[Row], list[Record], int]:
    """(sizes, the records they belong to, how many records the chat template refuses)."""
    sizes, measured = [], []
    for record in records:
        row = _in_tokens(tokenizer, record) if tokenizer is not None else _in_characters(record)
        if row is not None:
            sizes.append(row)
            measured.append(record)
    return sizes, measured, len(records) - len(sizes)


def _answers(record: Record) -> list[Any]:
    return [record[name] for name in ("completion", "chosen", "rejected") if name in record]


def _in_characters(record: Record) -> Row:
    prompt = sum(len(turn["content"]) for turn in record["prompt"])
    return Row(prompt, tuple(len(answer_text(answer)) for answer in _answers(record)))


def _in_tokens(tokenizer: Any, record: Record) -> Row | None:
    from jinja2 import TemplateError

    from align.data.render import answer_ids, prompt_ids

    try:
        answers = tuple(len(answer_ids(tokenizer, record["prompt"], answer)) for answer in _answers(record))
        return Row(len(prompt_ids(tokenizer, record["prompt"])), answers)
    except (InputError, TemplateError):
        return None


def whole(row: Row) -> int:
    """The prompt with its longest answer, as `max_length` counts it.

    Pairs have one token more, for what a chat template writes behind the stop token (see `align.reward_model`).
    """
    return row.prompt + max(row.answers, default=0) + (len(row.answers) > 1)


def lengths_of(sizes: Sequence[Row]) -> list[Lengths]:
    """Of prompts, of answers and of whole rows; without answers, of prompts alone."""
    values = {
        "prompt": [row.prompt for row in sizes],
        "answer": [size for row in sizes for size in row.answers],
        "row": [whole(row) for row in sizes if row.answers],
    }
    return [_described(of, values[of]) for of in OF if values[of]]


def _described(of: Literal["prompt", "answer", "row"], values: list[int]) -> Lengths:
    edges = [0, FIRST_EDGE]
    while edges[-1] < max(values):
        edges.append(2 * edges[-1])
    # A value on an edge belongs below it: 16 tokens fit into a limit of 16.
    counts = np.bincount(np.searchsorted(edges, np.maximum(values, 1), side="left") - 1, minlength=len(edges) - 1)
    ordered = sorted(values)
    return Lengths(
        of=of,
        n=len(values),
        mean=round(sum(values) / len(values), 1),
        median=ordered[len(values) // 2],
        p95=ordered[min(len(values) - 1, int(0.95 * len(values)))],
        longest=ordered[-1],
        edges=edges,
        counts=[int(count) for count in counts],
    )


def limits_of(config: Config, key: str, sizes: Sequence[Row]) -> list[Limit]:
    """What the stages of the pipeline allow of the rows of a file."""
    found: list[tuple[str, Literal["prompt", "row"], int]] = []
    if key == "demonstrations" and "sft" in config.stages:
        found.append(("sft.max_length", "row", config.sft.max_length))
    if key == "preferences":
        if "reward" in config.stages and config.reward.base is None:  # another base has tokens of its own
            found.append(("reward.max_length", "row", config.reward.max_length))
        if "dpo" in config.stages:
            found.append(("dpo.max_length", "row", config.dpo.max_length))
    if key != "preferences" or config.label.source == "dataset":  # whose prompts are sampled from
        for stage, section in (("sample", config.sample), ("ppo", config.ppo), ("compare", config.compare)):
            if stage in config.stages:
                found.append((f"{stage}.max_prompt_length", "prompt", section.max_prompt_length))
    limits = []
    for name, of, limit in found:
        longer = sum((row.prompt if of == "prompt" else whole(row)) > limit for row in sizes)
        limits.append(Limit(key=name, of=of, limit=limit, longer=longer, share=share(longer, len(sizes)) or 0.0))
    return limits
