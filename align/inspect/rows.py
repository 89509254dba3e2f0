"""The first rows of a stage, made by its own functions and those of TRL that it hands them to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from align import models
from align.config import Config
from align.data.load import only
from align.data.render import fit
from align.inspect.tokens import Role
from align.runs import Run, is_done
from reward.records import Record

PACKED_AT_ONCE = 1000  # rows that TRL packs with each other: the batch of `datasets`' map
Answer = tuple[list[int], list[Role]]  # the ids and what they are for


@dataclass(frozen=True)
class Found:
    """number: of the row among all that were read, from 1. skipped: how many before it are longer than the stage
    allows. row: its tokens, as the stage makes them."""

    number: int
    skipped: int
    record: Record
    row: Record


def first(
    records: list[Record],
    read: Callable[[Record], Record],
    size: Callable[[Record], int],
    limit: tuple[int, str, str],
    n: int,
    most: int | None = None,
) -> list[Found]:
    """The first `n` rows of the train side that fit.

    Args:
        limit: (tokens, config key, what the rows are called).
        most: rows of both sides that the stage takes at most.
    """
    found: list[Found] = []
    too_long = passed = 0
    for number, record in enumerate(records, start=1):
        if len(found) == n or passed == most:
            break
        row = read(record)
        if size(row) > limit[0]:
            too_long += 1
            continue
        passed += 1
        if record["split"] == "train":
            found.append(Found(number, too_long, record, row))
    if not found:  # the stage's own words for it
        kept, _ = fit(records, lambda record: size(read(record)), limit[0], limit[2], limit[1])
        only("train", kept[:most], limit[2])
    return found


def tokenizer_of(config: Config) -> Any:
    """The SFT model's, or the base's before there is one: sft saves it as it is."""
    sft = config.folder("sft")
    made = "sft" in config.stages and is_done(sft)
    return models.load_tokenizer(str(sft / "model") if made else models.base_path(config.model), config.model)


def run_of(config: Config, stage: str) -> Run:
    """A run folder that nothing is written to: the trainer's arguments ask where it would be."""
    return Run(stage, config.folder(stage), {}, writer=False)


def packed_places(config: Config, rows: Sequence[Record]) -> list[str]:
    """Where TRL's packing puts each of the first rows of training, for people; "" behind the first `PACKED_AT_ONCE`.

    Args:
        rows: at least `PACKED_AT_ONCE`, or all that there are: so many are packed with each other alone.
    """
    from align.training import trainer_arguments

    arguments = trainer_arguments(config, config.sft, run_of(config, "sft"))
    if not arguments.packing:
        return ["not packed: a row of its own"] * len(rows)
    if arguments.shuffle_dataset or arguments.dataset_num_proc:
        return ["packed with others, after shuffling"] * len(rows)
    spans: dict[int, list[str]] = {}
    together = rows[:PACKED_AT_ONCE]
    for number, owners in enumerate(_packed(together, arguments.max_length, arguments.packing_strategy), start=1):
        for owner in dict.fromkeys(owners):
            start = owners.index(owner)
            end = start + owners.count(owner)
            spans.setdefault(owner, []).append(
                f"packed row {number}, tokens {start + 1} to {end} of {len(owners)}, shared by {len(set(owners))}"
            )
    return ["; ".join(spans.get(number, ())) for number in range(len(rows))]


def _packed(rows: Sequence[Record], max_length: int, strategy: str) -> list[list[int]]:
    """For every packed row, the number of the row that each of its tokens comes from."""
    from datasets import Dataset
    from trl import pack_dataset

    owners = [[number] * len(row["input_ids"]) for number, row in enumerate(rows)]
    return list(pack_dataset(Dataset.from_dict({"owner": owners}), max_length, strategy)["owner"])


def dpo_rows(config: Config, tokenizer: Any, found: Sequence[Found]) -> list[tuple[list[int], Answer, Answer]]:
    """(prompt, chosen, rejected) as TRL's trainer tokenises them and its collator masks them.

    `align.dpo` hands conversations over, and TRL renders them by itself: what the template writes behind the stop token
    is then part of an answer, as it is not in sft.
    """
    from datasets import Dataset
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from align.training import trainer_arguments

    arguments = trainer_arguments(config, config.dpo, run_of(config, "dpo"), precompute_ref_log_probs=False)
    pairs = Dataset.from_list([{key: each.record[key] for key in ("prompt", "chosen", "rejected")} for each in found])
    # Of the trainer, the preparation of rows reads the tokenizer alone; a whole one would need the model.
    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), pairs, tokenizer, arguments, "train"
    ).to_list()
    collate = DataCollatorForPreference(
        tokenizer.pad_token_id, max_length=arguments.max_length, truncation_mode=arguments.truncation_mode
    )
    rows = []
    for pair in prepared:
        batch, border = collate([pair]), len(pair["prompt_ids"])
        answers: list[Answer] = []
        for side in (0, 1):
            size = int(batch["attention_mask"][side].sum())
            ids, mask = (batch[name][side][border:size].tolist() for name in ("input_ids", "completion_mask"))
            answers.append((ids, ["loss" if trained else "context" for trained in mask]))
        rows.append((pair["prompt_ids"], answers[0], answers[1]))
    return rows
