"""What each stage reads: its first training rows, made by the functions that the stage itself calls.

sft         `align.data.render.demonstration_row`, and TRL's packing
dpo         TRL's own preparation of the pairs, and its collator, as `align.dpo` hands them over
reward      `align.reward_model`'s reading of the pairs
ppo, sample `align.data.render.prompt_ids`

Rows are read and tokenised only until enough of them are found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from align import models
from align.config import Config
from align.data.load import load_demonstrations, only
from align.data.render import demonstration_row, fit, preference_row, prompt_ids
from align.inspect.tokens import Part, Role, Row, tokens_of, visible
from align.runs import Run, done_digest, is_done
from reward.records import InputError, Record, read_jsonl

TRAINED = ("sft", "reward", "dpo", "ppo")
SHOWS = ("sft", "sample", "reward", "dpo", "ppo")
PACKED_AT_ONCE = 1000  # rows that TRL packs with each other: the batch of `datasets`' map


@dataclass(frozen=True)
class Seen:
    """The first rows of a stage.

    source: the file, or what else they come from. trained: what carries loss, as sentences for people.
    too_long: rows passed over because they are longer than the stage allows; limit: what it allows.
    """

    pipeline: str
    stage: str
    source: str
    trained: str
    rows: tuple[Row, ...]
    too_long: int
    limit: str


@dataclass(frozen=True)
class Found:
    """number: of the row among all that were read, from 1. row: its tokens, as the stage makes them."""

    number: int
    record: Record
    row: Record


def seen(config: Config, stage: str, n: int) -> Seen:
    """The first `n` rows of the training side, as `stage` would read them now.

    Raises:
        InputError: the stage reads no tokens; its rows are not there yet; or none of them fits.
    """
    readers: dict[str, Callable[[Config, int], Seen]] = {
        "sft": _sft,
        "sample": _sample,
        "reward": _reward,
        "dpo": _dpo,
        "ppo": _ppo,
    }
    if stage not in readers:
        raise InputError(f"`{stage}` reads no training rows; give one of {', '.join(SHOWS)} to --stage.")
    return readers[stage](config, n)


def _sft(config: Config, n: int) -> Seen:
    section, data = config.sft, config.data
    if data.demonstrations is None:
        raise InputError("sft needs data.demonstrations: the path of a JSONL file of prompts with good answers.")
    tokenizer = _tokenizer(config)
    records = load_demonstrations(data.demonstrations, data.test_share, data.max_rows).records
    wanted = max(n, PACKED_AT_ONCE) if section.packing else n
    found, too_long = _first(
        records,
        lambda record: demonstration_row(tokenizer, record),
        lambda row: len(row["input_ids"]),
        (section.max_length, "sft.max_length", "demonstrations"),
        wanted,
    )
    notes = packed_places(config, [each.row for each in found])
    rows = []
    for each, note in zip(found[:n], notes, strict=False):
        ids, labels = each.row["input_ids"], each.row["labels"]
        start = next((place for place, label in enumerate(labels) if label != -100), len(ids))
        roles: list[Role] = ["context" if label == -100 else "loss" for label in labels]
        parts = (
            Part("prompt", tokens_of(tokenizer, ids[:start], roles[:start]), ""),
            _answer("answer", tokenizer, ids[:start], ids[start:], roles[start:]),
        )
        rows.append(Row(_title("demonstration", each), parts, note))
    return Seen(
        config.name,
        "sft",
        data.demonstrations,
        f"The answer's tokens, up to and including the stop token {visible(str(tokenizer.eos_token))}. The prompt is "
        "read and carries no loss.",
        tuple(rows),
        too_long,
        f"sft.max_length={section.max_length} tokens",
    )


def packed_places(config: Config, rows: Sequence[Record]) -> list[str]:
    """Where TRL's packing puts each of the first rows, for people; "" where that is not known before training.

    Args:
        rows: the first `PACKED_AT_ONCE` rows of training, or all: they are packed with each other alone.
    """
    from align.training import trainer_arguments

    arguments = trainer_arguments(config, config.sft, _run(config, "sft"))
    if not arguments.packing:
        return ["not packed: a row of its own"] * len(rows)
    if arguments.shuffle_dataset or arguments.dataset_num_proc:
        return ["packed with others, after shuffling"] * len(rows)
    spans: dict[int, list[str]] = {}
    for number, owners in enumerate(_packed(rows, arguments.max_length, arguments.packing_strategy), start=1):
        for owner in dict.fromkeys(owners):
            start = owners.index(owner)
            end = start + owners.count(owner)
            spans.setdefault(owner, []).append(
                f"packed row {number}, tokens {start + 1} to {end} of {len(owners)}, shared by {len(set(owners))}"
            )
    return ["; ".join(spans[number]) for number in range(len(rows))]


def _packed(rows: Sequence[Record], max_length: int, strategy: str) -> list[list[int]]:
    """For every packed row, the number of the row that each of its tokens comes from."""
    from datasets import Dataset
    from trl import pack_dataset

    owners = [[number] * len(row["input_ids"]) for number, row in enumerate(rows)]
    return list(pack_dataset(Dataset.from_dict({"owner": owners}), max_length, strategy)["owner"])


def _dpo(config: Config, n: int) -> Seen:
    section, tokenizer = config.dpo, _tokenizer(config)
    found, too_long = _pairs(config, "dpo", tokenizer, preference_row, n)
    rows = [
        Row(
            _title("pair", each),
            (
                Part("prompt", tokens_of(tokenizer, prompt, ["context"] * len(prompt)), "shared by both answers"),
                _answer("chosen", tokenizer, prompt, *chosen),
                _answer("rejected", tokenizer, prompt, *rejected),
            ),
        )
        for each, (prompt, chosen, rejected) in zip(found, dpo_rows(config, tokenizer, found), strict=True)
    ]
    return Seen(
        config.name,
        "dpo",
        str(config.folder("label") / "preferences.jsonl"),
        "The tokens of both answers: those of the chosen one are made likelier against those of the rejected one, "
        "measured from the reference. The prompt is read and carries no loss.",
        tuple(rows),
        too_long,
        f"dpo.max_length={section.max_length} tokens",
    )


Answer = tuple[list[int], list[Role]]  # the ids and what they are for


def dpo_rows(config: Config, tokenizer: Any, found: Sequence[Found]) -> list[tuple[list[int], Answer, Answer]]:
    """(prompt, chosen, rejected) as TRL's trainer tokenises them and its collator masks them.

    `align.dpo` hands conversations over, and TRL renders them by itself: what the template writes behind the stop token
    is then part of an answer, as it is not in sft.
    """
    from datasets import Dataset
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from align.training import trainer_arguments

    arguments = trainer_arguments(config, config.dpo, _run(config, "dpo"), precompute_ref_log_probs=False)
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


def _reward(config: Config, n: int) -> Seen:
    from align.reward_model import scorer_rows
    from align.scorer import Scorer

    section = config.reward
    read, is_encoder = preference_row, False
    if section.base is None:
        tokenizer: Any = _tokenizer(config)
    else:
        other = config.model.model_copy(update={"base": section.base, "quantization": None})
        base = models.base_path(other)
        tokenizer = models.load_reward_tokenizer(base)
        scorer = Scorer(models.load_reward_base(base, other), tokenizer, section.base, max_length=section.max_length)
        read, is_encoder = scorer_rows(scorer), scorer.is_encoder  # type: ignore[assignment]
    found, too_long = _pairs(config, "reward", tokenizer, read, n)
    where = "from the whole row" if is_encoder else "at the last token of the row"
    rows = []
    for each in found:
        prompt = each.row["prompt_ids"]
        parts = [Part("prompt", tokens_of(tokenizer, prompt, ["context"] * len(prompt)), "shared by both answers")]
        for side in ("chosen", "rejected"):
            ids = each.row[f"{side}_ids"]
            roles: list[Role] = ["context"] * len(ids)
            if not is_encoder:
                roles[-1] = "score"
            parts.append(_answer(side, tokenizer, prompt, ids, roles))
        rows.append(Row(_title("pair", each), tuple(part for part in parts if part.tokens)))
    ties = f" Tied pairs are trained on too, by {section.ties}." if section.ties != "ignore" else ""
    return Seen(
        config.name,
        "reward",
        str(config.folder("label") / "preferences.jsonl"),
        f"One score for prompt and answer together, read {where}: the chosen answer's is to be above the rejected "
        f"one's. No token carries a loss of its own.{ties}",
        tuple(rows),
        too_long,
        f"reward.max_length={section.max_length} tokens",
    )


def _sample(config: Config, n: int) -> Seen:
    return _prompts(
        config,
        "sample",
        n,
        f"Nothing: answers of up to {config.sample.max_new_tokens} tokens begin behind the last token shown.",
        config.sample.max_prompts,
    )


def _ppo(config: Config, n: int) -> Seen:
    section = config.ppo
    mixed = " Demonstrations are mixed in (ptx_coef): `--stage sft` shows them." if section.ptx_coef > 0 else ""
    return _prompts(
        config,
        "ppo",
        n,
        "The answer that the policy will write behind the last token shown, up to "
        f"{section.response_length} tokens; a reward model then reads prompt and answer. The prompt carries no "
        f"loss.{mixed}",
    )


def _prompts(config: Config, stage: str, n: int, trained: str, most: int | None = None) -> Seen:
    from align.sample import gather_prompts

    section: Any = config.section(stage)
    tokenizer = _tokenizer(config)
    found, too_long = _first(
        gather_prompts(config),
        lambda record: {"prompt_ids": prompt_ids(tokenizer, record["prompt"])},
        lambda row: len(row["prompt_ids"]),
        (section.max_prompt_length, f"{stage}.max_prompt_length", "prompts"),
        n,
        most,
    )
    rows = []
    for each in found:
        ids = each.row["prompt_ids"]
        part = Part("prompt", tokens_of(tokenizer, ids, ["context"] * len(ids)), "the answer begins here")
        rows.append(Row(_title("prompt", each), (part,)))
    data = config.data
    preferences = data.preferences if config.label.source == "dataset" else None
    source = ", ".join(path for path in (data.prompts, data.demonstrations, preferences) if path)
    limit = f"{stage}.max_prompt_length={section.max_prompt_length} tokens"
    return Seen(config.name, stage, source, trained, tuple(rows), too_long, limit)


# -- what they share --------------------------------------------------------------------------------------------------


def _pairs(
    config: Config, stage: str, tokenizer: Any, read: Callable[[Any, Record], Record], n: int
) -> tuple[list[Found], int]:
    """The first preferences that fit; as `align.reward_model.preference_rows` chooses them."""
    done_digest(config.folder("label"))
    records = read_jsonl(config.folder("label") / "preferences.jsonl")
    section: Any = config.section(stage)

    def size(row: Record) -> int:
        # One more for what a chat template writes after the stop token, as in `align.reward_model`.
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) + 1

    limit = (section.max_length, f"{stage}.max_length", "pairs")
    return _first(records, lambda record: read(tokenizer, record), size, limit, n)


def _first(
    records: list[Record],
    read: Callable[[Record], Record],
    size: Callable[[Record], int],
    limit: tuple[int, str, str],
    n: int,
    most: int | None = None,
) -> tuple[list[Found], int]:
    """(the first `n` rows of the train side that fit, how many before the last of them do not).

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
            found.append(Found(number, record, row))
    if not found:  # the stage's own words for it
        kept, _ = fit(records, lambda record: size(read(record)), limit[0], limit[2], limit[1])
        only("train", kept[:most], limit[2])
    return found, too_long


def _answer(name: str, tokenizer: Any, before: list[int], ids: list[int], roles: Sequence[Role]) -> Part:
    return Part(name, tokens_of(tokenizer, ids, roles, before), _stops(tokenizer, ids, roles))


def _stops(tokenizer: Any, ids: list[int], roles: Sequence[Role]) -> str:
    stop, name = tokenizer.eos_token_id, visible(str(tokenizer.eos_token))
    if stop is None or stop not in ids:
        return "no stop token"
    behind = ids[::-1].index(stop)
    if not behind:
        return f"the stop token {name} last"
    trained = " with loss" if roles[-1] == "loss" else ""
    return f"the stop token {name}, and {behind} behind it{trained}, which the chat template writes"


def _title(what: str, found: Found) -> str:
    comparison = found.record.get("comparison_id")
    return f"{what} {found.number}" + (f" ({visible(str(comparison))})" if comparison else "")


def _tokenizer(config: Config) -> Any:
    """The SFT model's, or the base's before there is one: sft saves it as it is."""
    sft = config.folder("sft")
    made = "sft" in config.stages and is_done(sft)
    return models.load_tokenizer(str(sft / "model") if made else models.base_path(config.model), config.model)


def _run(config: Config, stage: str) -> Run:
    """A run folder that nothing is written to: the trainer's arguments ask where it would be."""
    return Run(stage, config.folder(stage), {}, writer=False)
