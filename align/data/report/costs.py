"""What training on these rows will cost: tokens in all passes, and the time of one GPU that everybody knows.

The arithmetic is that of `align.plan`. Its rate for a CPU is measured, and differs from one run to the next; a report
must not. So time is told for one GPU by its data sheet, and `align plan CONFIG` tells it for the machine at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.config import Config, EpochSection, PpoSection
from align.data.report.lengths import whole
from align.data.report.schema import Cost, Costs
from align.plan import rates
from align.plan.memory import Layout, Precision
from align.plan.rows import Row, Rows
from align.plan.shapes import Base, read_base
from align.plan.stages import TRAINING, Job, rows_trained, seconds
from reward.records import InputError

GPU = "a100"
MACHINE = "one A100 with 80 GB"


@dataclass(frozen=True)
class Train:
    """The train side of a file: how many rows there are, and the tokens of some."""

    rows: int
    sizes: Sequence[Row]


def costs_of(config: Config, files: Mapping[str, Train], in_tokens: bool) -> Costs:
    """Of every training stage of the pipeline.

    Args:
        files: by key: demonstrations, prompts, preferences.
        in_tokens: whether sizes are tokens; of characters nothing is said.
    """
    rate, base = rates.gpu_rate(GPU), _base(config) if in_tokens else None
    told = Costs(machine=MACHINE, rate=rate.source, stages=[], missing={})
    for stage in (stage for stage in config.stages if stage in TRAINING):
        if not in_tokens:
            told["missing"][stage] = "there is no tokenizer to count with"
            continue
        rows = _rows(config, stage, files)
        if isinstance(rows, str):
            told["missing"][stage] = rows
            continue
        told["stages"].append(_cost(config, stage, rows, base, rate))
    return told


def _base(config: Config) -> Base | None:
    try:
        return read_base(config.model)
    except InputError:
        return None


def _rows(config: Config, stage: str, files: Mapping[str, Train]) -> Rows | str:
    """The rows of a stage, or why they are not known."""
    section: Any = config.section(stage)
    if isinstance(section, PpoSection):
        known = [files[key] for key in ("prompts", "demonstrations", "preferences") if key in files]
        sizes = [row.prompt for train in known[:1] for row in train.sizes if row.prompt <= section.max_prompt_length]
        limit, answers = 0, (section.response_length,)
        fitting = sorted((Row(prompt, answers) for prompt in sizes), key=lambda row: -row.total)
        count = section.total_episodes
    else:
        key = "demonstrations" if stage == "sft" else "preferences"
        if key == "preferences" and config.label.source != "dataset":
            return "its pairs are labelled later"
        if stage == "reward" and config.reward.base:
            return "its own base has tokens of its own"
        train = files.get(key, Train(0, ()))
        fitting = sorted((row for row in train.sizes if whole(row) <= section.max_length), key=lambda row: -row.total)
        count = round(train.rows * len(fitting) / max(1, len(train.sizes)))
        limit = section.max_length if stage == "sft" and section.packing else 0
    if not fitting or not count:
        return "none of its rows is among those looked at"
    return Rows(tuple(fitting), count, 0, limit, "data report")


def _cost(config: Config, stage: str, rows: Rows, base: Base | None, rate: rates.Rate) -> Cost:
    section: Any = config.section(stage)
    job = _job(config, stage, rows, base)
    if isinstance(section, EpochSection):
        passes = rows_trained(job) / rows.count
    else:
        passes = float(section.num_ppo_epochs)
    return Cost(
        stage=stage,
        rows=rows.count,
        tokens_a_row=round(rows.mean, 1),
        passes=round(passes, 3),
        tokens=round(rows.count * passes * rows.mean),
        seconds=None if base is None else round(seconds(job, rate), 3),
    )


def _job(config: Config, stage: str, rows: Rows, base: Base | None) -> Job:
    """The stage in 16 bits on one GPU. Without the base's shape, its rows can be counted but not its arithmetic."""
    section: Any = config.section(stage)

    def adapter(name: str) -> Any:
        own = getattr(config.section(name), "adapter", None)
        return base.adapter(own, config.reward.ensemble if name == "reward" else 0) if base and own else None

    climbed = adapter("reward") if stage == "ppo" and "reward" in config.ppo.rewards else None
    shape: Any = base.shape if base else None
    return Job(
        stage,
        shape,
        Precision(16.0, 2),
        Layout(gpu=True),
        rows,
        section.per_device_train_batch_size,
        adapter(stage),
        section,
        section.gradient_checkpointing,
        climbed,
    )
