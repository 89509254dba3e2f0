"""What can be told of rows only from their tokens, on a sample drawn by the seed of the pipeline.

Rows become tokens by the functions of `align.data.render`, by which the stages make them: what is looked at here is
what would be trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jinja2 import TemplateError

from align.check.findings import Finding, part, refused, warned
from align.check.reading import Rows
from align.data.render import demonstration_row, pair_length, preference_row, prompt_ids
from reward.records import InputError, Message, Record, answer_text

SAMPLE = 2000  # rows whose tokens are looked at, of each file
TURNS = 200  # of them whose every turn is looked for in what the template writes
MERGED = 0.5  # of the pairs: so many whose answer runs into the prompt's last token are the template's doing
SAID_TOO_LONG = 0.05
_NAMES_THE_SPEAKER = re.compile(r"assistant|model|response|answer|gpt|\bbot\b|\bai\b", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """How many tokens a stage takes.

    key, longest: the config key of the limit, and its value; longer rows are left out by the stage.
    room: tokens that are to be generated behind a row.
    context: places that the model has; None where its config does not say.
    share: the largest share of the rows that may be left out.
    """

    key: str
    longest: int
    room: int
    context: int | None
    share: float


@dataclass
class Seen:
    """What was looked at: how many rows, how many are too long, and the tokens of the longest that stays."""

    rows: int = 0
    longer: int = 0
    longest: int = 0
    findings: list[Finding] = field(default_factory=list)


def look(stage: str, rows: Rows, tokenizer: Any, limits: Limits, seed: int) -> Seen:
    """Tokenise a sample and test it. Raises nothing for what rows hold: it becomes a finding."""
    indices = drawn(len(rows.records), seed)
    sizes: list[int] = []
    problems = _Problems(stage, rows, len(indices))
    for index in indices:
        record = rows.records[index]
        try:
            sizes.append(_size(stage, rows, record, tokenizer, partial(problems.add, index)))
        except (InputError, TemplateError) as error:
            problems.add(index, "refused by the template", told=str(error).rstrip("."))
    found = problems.findings()
    if not problems.counts("refused by the template"):
        found += _unwritten(stage, rows, tokenizer, indices[:TURNS])
    found += _too_long(stage, rows, sizes, limits)
    fitting = [size for size in sizes if size <= limits.longest]
    found += _past_context(stage, rows, fitting, limits)
    return Seen(len(indices), len(sizes) - len(fitting), max(fitting, default=0), found)


def drawn(count: int, seed: int) -> list[int]:
    """Indices of at most `SAMPLE` of so many rows, in order."""
    return sorted(random.Random(seed).sample(range(count), SAMPLE)) if count > SAMPLE else list(range(count))


Note = Callable[..., None]


def _size(stage: str, rows: Rows, record: Record, tokenizer: Any, note: Note) -> int:
    """Tokens of a row as its stage counts them; what is wrong with them is noted."""
    if rows.kind == "prompt":
        return len(prompt_ids(tokenizer, record["prompt"]))
    if rows.kind == "demonstration":
        row = demonstration_row(tokenizer, record)
        trained = [token for token in row["labels"] if token != -100]
        _trained(tokenizer, trained, answer_text(record["completion"]), note, "completion")
        return len(row["input_ids"])
    row = preference_row(tokenizer, record)
    if row["chosen_ids"] == row["rejected_ids"]:
        note("the same tokens")
    for side in ("chosen", "rejected"):
        _trained(tokenizer, row[f"{side}_ids"], answer_text(record[side]), note, side)
        if stage == "dpo" and _merges(tokenizer, record, side, row["prompt_ids"]):
            note("merged", side)
    return pair_length(row)


def _trained(tokenizer: Any, ids: Sequence[int], text: str, note: Note, side: str) -> None:
    """Compare the tokens that carry loss with the text they should say, by decoding them."""
    if not ids or ids[-1] != tokenizer.eos_token_id:
        note("no stop token", side)
        return
    answer = ids[:-1]
    said = tokenizer.decode(answer, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text.strip() and side == "rejected":
        return  # an answer that says nothing may well be the worse one
    if not text.strip() or not said.strip():
        note("nothing trained", side)
        return
    if tokenizer.unk_token_id is not None and (unknown := list(answer).count(tokenizer.unk_token_id)):
        note("unknown characters", side, unknown)
    begins = said.find(text.strip())
    if begins < 0 and _bare(text) not in _bare(said):
        note("other text", side, said.strip()[:60])
    before = said[: max(begins, 0)].strip()
    if before:
        marks = {str(tokenizer.convert_ids_to_tokens(i)) for i in set(answer) & set(tokenizer.all_special_ids)}
        of_a_turn = _NAMES_THE_SPEAKER.search(before) or any(mark in before for mark in marks)
        note("prompt trained" if of_a_turn else "more than the answer trained", side, before)


def _bare(text: str) -> str:
    return "".join(text.split())


def _merges(tokenizer: Any, record: Record, side: str, before: list[int]) -> bool:
    """Whether TRL's DPO, which renders pairs itself, begins this answer within the prompt's last token."""
    whole = tokenizer.apply_chat_template([*record["prompt"], *record[side]], return_dict=True)["input_ids"]
    return list(whole[: len(before)]) != before


# What is said of a row, by what is wrong with it: `side` is the answer's column, `told` what was noted of the row, and
# `count` how many rows are alike.
_SAID: dict[str, tuple[Literal["refused", "warned"], str]] = {
    "refused by the template": ("refused", "{told} ({count})."),
    "no stop token": (
        "refused",
        "no stop token is trained at the end of the {side}, as in {count}: the model would never learn to stop; set "
        "model.chat_template to one that writes it.",
    ),
    "nothing trained": (
        "refused",
        "0 tokens of the {side} carry loss beside the stop token, as in {count}: the chat template leaves the answer "
        "out, or it is empty; mend the row or set model.chat_template.",
    ),
    "prompt trained": (
        "refused",
        "{told!r} before the {side} would be trained on, as in {count}, and a prompt would be sampled from without it: "
        "the chat template does not heed add_generation_prompt; set model.chat_template to one that does.",
    ),
    "more than the answer trained": (
        "warned",
        "the chat template writes {told!r} before the {side}, and it is trained on, as in {count}.",
    ),
    "the same tokens": (
        "refused",
        "chosen and rejected are the same tokens, as in {count}: nothing can be learnt from them; take them out.",
    ),
    "unknown characters": (
        "warned",
        "{told} characters of the {side} become the tokenizer's unknown token, as in {count}: the model cannot learn "
        "to write them.",
    ),
    "merged": (
        "warned",
        "the {side} begins with white space that merges with the prompt's last token, as in {count}, and DPO would "
        "train on that token of the prompt: take the white space off the answers, or, where it is the template's, set "
        "model.chat_template to one whose prompt ends on a token.",
    ),
    "other text": ("warned", "the {side} is trained as {told!r}, which is not what the row says, as in {count}."),
}


@dataclass
class _Problems:
    """What was noted of rows: by sort, the rows and what was told of the first."""

    stage: str
    rows: Rows
    looked_at: int
    _noted: dict[str, dict[int, tuple[str, Any]]] = field(default_factory=dict)

    def add(self, index: int, sort: str, side: str = "", told: Any = None) -> None:
        self._noted.setdefault(sort, {}).setdefault(index, (side, told))

    def counts(self, sort: str) -> int:
        return len(self._noted.get(sort, {}))

    def findings(self) -> list[Finding]:
        found = []
        for sort, noted in self._noted.items():
            index, (side, told) = next(iter(noted.items()))
            level, sentence = _SAID[sort]
            if sort == "merged" and len(noted) > MERGED * self.looked_at:
                level = "refused"
            count = part(len(noted), self.looked_at, "rows looked at")
            said = sentence.format(side=side, told=told, count=count)
            found.append(Finding(level, self.stage, f"{self.rows.place(index)}: {said}"))
        return found


def _unwritten(stage: str, rows: Rows, tokenizer: Any, indices: Sequence[int]) -> list[Finding]:
    """Turns of prompts that the chat template does not write."""
    gone: dict[str, list[int]] = {}
    for index in indices:
        prompt = rows.records[index]["prompt"]
        text = _bare(str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))).casefold()
        for turn in prompt:
            if _bare(turn["content"]).casefold() not in text:
                gone.setdefault(turn["role"], []).append(index)
    found = []
    for role, missing in gone.items():
        what = (
            f"{rows.place(missing[0])}: the chat template leaves out what a {role} turn says, in "
            f"{part(len(set(missing)), len(indices), 'rows looked at')} of {rows.key}"
        )
        if role in ("user", "system"):
            found.append(refused(stage, f"{what}: set model.chat_template to one that writes it, or drop such turns."))
        else:  # templates of models that think leave former thoughts out, and mean it
            found.append(warned(stage, f"{what}; where that is not meant, set model.chat_template."))
    return found


def _too_long(stage: str, rows: Rows, sizes: Sequence[int], limits: Limits) -> list[Finding]:
    longer = sum(size > limits.longest for size in sizes)
    if not sizes or longer <= min(SAID_TOO_LONG, limits.share) * len(sizes):
        return []
    what = (
        f"{limits.key}={limits.longest} leaves out {part(longer, len(sizes), 'rows looked at')} of {rows.key}; the "
        f"longest has {max(sizes):,} tokens"
    )
    if longer > limits.share * len(sizes):
        room = f"raise {limits.key}, shorten the rows, or allow more by data.too_long_share={limits.share:g}"
        return [refused(stage, f"{what}: {room}.")]
    return [warned(stage, f"{what}.")]


def _past_context(stage: str, rows: Rows, sizes: Sequence[int], limits: Limits) -> list[Finding]:
    if limits.context is None or not sizes or max(sizes) + limits.room <= limits.context:
        return []
    past = sum(size + limits.room > limits.context for size in sizes)
    behind = f" with {limits.room} tokens of answer behind it" if limits.room else ""
    return [
        refused(
            stage,
            f"{part(past, len(sizes), 'rows looked at')} of {rows.key} pass the model's context of {limits.context:,} "
            f"tokens (the longest has {max(sizes):,}{behind}): lower {limits.key} to "
            f"{max(limits.context - limits.room, 0):,} at most.",
        )
    ]


def control_tokens(tokenizer: Any) -> tuple[dict[str, int], dict[str, int]]:
    """(tokens that begin or end turns and rows, the further special ones), text to id.

    The former are what the chat template writes around turns, and the tokens of beginning, end and padding. A
    tokenizer that spells special tokens out where they stand in text has none.
    """
    special = {str(token.content): int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    read = {text: i for text, i in special.items() if text.strip() and i in tokenizer(f"a{text}a")["input_ids"]}
    turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written = {*prompt_ids(tokenizer, turns[:1]), *tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]}
    written |= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    of_turns = {text: i for text, i in read.items() if i in written}
    return of_turns, {text: i for text, i in read.items() if text not in of_turns}
