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
from typing import Any

from align import models
from align.config import Config
from align.data.load import load_demonstrations
from align.data.render import demonstration_row, pair_length, preference_row, prompt_ids
from align.inspect.rows import PACKED_AT_ONCE, Found, dpo_rows, first, packed_places, tokenizer_of
from align.inspect.tokens import Part, Role, Row, tokens_of, visible
from align.runs import done_digest
from reward.records import InputError, Record, read_jsonl

TRAINED = ("sft", "reward", "dpo", "ppo")
SHOWS = ("sft", "sample", "reward", "dpo", "ppo")


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
    tokenizer = tokenizer_of(config)
    records = load_demonstrations(data.demonstrations, data.test_share, data.max_rows).records
    wanted = max(n, PACKED_AT_ONCE) if section.packing else n
    found = first(
        records,
        lambda record: demonstration_row(tokenizer, record),
        lambda row: len(row["input_ids"]),
        (section.max_length, "sft.max_length", "demonstrations"),
        wanted,
    )
    notes = packed_places(config, [each.row for each in found])
    rows = []
    for each, note in zip(found[:n], notes[:n], strict=True):
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
        found[:n][-1].skipped,
        f"sft.max_length={section.max_length} tokens",
    )


def _dpo(config: Config, n: int) -> Seen:
    section, tokenizer = config.dpo, tokenizer_of(config)
    found = _pairs(config, "dpo", tokenizer, preference_row, n)
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
        found[-1].skipped,
        f"dpo.max_length={section.max_length} tokens",
    )


def _reward(config: Config, n: int) -> Seen:
    from align.reward_model import scorer_rows
    from align.scorer import Scorer

    section = config.reward
    read, is_encoder = preference_row, False
    if section.base is None:
        tokenizer: Any = tokenizer_of(config)
    else:
        other = config.model.model_copy(update={"base": section.base, "quantization": None})
        base = models.base_path(other)
        tokenizer = models.load_reward_tokenizer(base)
        scorer = Scorer(models.load_reward_base(base, other), tokenizer, section.base, max_length=section.max_length)
        read, is_encoder = scorer_rows(scorer), scorer.is_encoder  # type: ignore[assignment]
    found = _pairs(config, "reward", tokenizer, read, n)
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
        found[-1].skipped,
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
    tokenizer = tokenizer_of(config)
    found = first(
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
    return Seen(config.name, stage, source, trained, tuple(rows), found[-1].skipped, limit)


# -- what they share --------------------------------------------------------------------------------------------------


def _pairs(config: Config, stage: str, tokenizer: Any, read: Callable[[Any, Record], Record], n: int) -> list[Found]:
    """The first preferences that fit; as `align.reward_model.preference_rows` chooses them."""
    done_digest(config.folder("label"))
    records = read_jsonl(config.folder("label") / "preferences.jsonl")
    section: Any = config.section(stage)
    limit = (section.max_length, f"{stage}.max_length", "pairs")
    return first(records, lambda record: read(tokenizer, record), pair_length, limit, n)


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
