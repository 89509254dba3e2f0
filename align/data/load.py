"""Read JSONL in the conventions people have, and hand on records in one convention (see `reward.records`).

What was detected, how many rows came in and went out, and why rows were left out is returned beside the records and
written to the run folder: nothing is dropped in silence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reward.records import (
    ROLES,
    InputError,
    Message,
    Record,
    answer_text,
    assistant_answer,
    numbered_jsonl,
    prompt_id,
    split_of,
    user_prompt,
)


@dataclass
class Loaded:
    """Records of one file, what format it was in, and what was left out.

    dropped: (line number or id, reason, row) of every row left out.
    """

    path: str
    format: str
    records: list[Record]
    dropped: list[Record] = field(default_factory=list)

    def drop(self, record: Record, reason: str) -> None:
        self.dropped.append({"reason": reason, "record": record})

    def counts(self) -> dict[str, Any]:
        reasons = Counter(d["reason"] for d in self.dropped)
        sides = Counter(record["split"] for record in self.records)
        return {"file": self.path, "format": self.format, "rows": dict(sides), "left out": dict(reasons)}

    def sentence(self) -> str:
        """One line for people, such as "300 rows (240 train, 60 test), prompt/completion; left out: 2 identical"."""
        sides = Counter(record["split"] for record in self.records)
        kept = f"{len(self.records)} rows ({sides['train']} train, {sides['test']} test), {self.format}"
        reasons = Counter(d["reason"] for d in self.dropped)
        return kept + ("; left out: " + ", ".join(f"{n} {reason}" for reason, n in reasons.items()) if reasons else "")


def load_demonstrations(
    path: str | Path, test_share: float, max_rows: int | None = None, keep_empty: bool = False
) -> Loaded:
    """Demonstrations `{prompt, completion, split}` from any of

    {messages} | {prompt, completion} | {instruction, input?, output} | any preference format, whose chosen answer is
    then the demonstration. With {messages} the last assistant turn is the completion.

    Raises:
        InputError: columns of none of these formats (named with the columns found), a malformed row (named by line),
            or nothing left.
    """
    rows = _rows(path, max_rows)
    columns = set(rows[0][1])
    if {"chosen", "rejected"} <= columns:
        preferences = load_preferences(path, test_share, max_rows)
        preferences.format += ", chosen answers as demonstrations"
        for record in preferences.records:
            record["completion"] = record.pop("chosen")
            del record["rejected"]
        return preferences
    convert: Callable[[Record, str], Record]
    if "messages" in columns:
        name, convert = "messages", _from_messages
    elif {"prompt", "completion"} <= columns:
        name, convert = "prompt/completion", _from_prompt_completion
    elif {"instruction", "output"} <= columns:
        name, convert = "instruction/input/output", _from_instruction
    else:
        raise _unknown_columns(
            path, columns, "demonstrations", "prompt and completion, messages, or instruction and output"
        )
    loaded = Loaded(str(path), name, [])
    for number, row in rows:
        record = {**row, **convert(row, f"{path}, line {number}")}
        if not keep_empty and not answer_text(record["completion"]).strip():
            loaded.drop(row, "with an empty answer")
        else:
            loaded.records.append(record)
    return _with_sides(loaded, test_share)


def load_prompts(path: str | Path, test_share: float, max_rows: int | None = None) -> Loaded:
    """Prompts `{prompt, split}` from {prompt}, {messages} (turns up to the last user turn) or {instruction, input?}."""
    rows = _rows(path, max_rows)
    columns = set(rows[0][1])
    loaded = Loaded(str(path), next((c for c in ("prompt", "messages", "instruction") if c in columns), ""), [])
    if not loaded.format:
        raise _unknown_columns(path, columns, "prompts", "prompt, messages or instruction")
    for number, row in rows:
        where = f"{path}, line {number}"
        if loaded.format == "instruction":
            prompt = _instruction_prompt(row, where)
        else:
            prompt = conversation(_column(row, loaded.format, where), where)
            while prompt and prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
        loaded.records.append({**row, "prompt": _asks(prompt, where)})
    return _with_sides(loaded, test_share)


def load_preferences(path: str | Path, test_share: float, max_rows: int | None = None) -> Loaded:
    """Preferences `{prompt, chosen, rejected, split}` from any of

    {prompt, chosen, rejected} as text or conversations | {messages, chosen, rejected} | {instruction, input?, chosen,
    rejected} | {chosen, rejected} holding whole dialogues, as "Human: / Assistant:" text or as conversations.

    Pairs whose answers are identical, or whose dialogues do not share their prompt, are left out and counted.

    Raises:
        InputError: columns of none of these formats, a malformed row (named by line), or nothing left.
    """
    rows = _rows(path, max_rows)
    columns = set(rows[0][1])
    if not {"chosen", "rejected"} <= columns:
        raise _unknown_columns(
            path, columns, "preferences", "chosen and rejected, with prompt, messages or instruction"
        )
    name = next((c for c in ("prompt", "messages", "instruction") if c in columns), "")
    loaded = Loaded(str(path), f"{name}/chosen/rejected" if name else "dialogues chosen/rejected", [])
    for number, row in rows:
        where = f"{path}, line {number}"
        if name:
            asked = (
                _instruction_prompt(row, where)
                if name == "instruction"
                else conversation(_column(row, name, where), where)
            )
            prompt = _asks(asked, where)
            chosen, rejected = _answer(row, "chosen", where), _answer(row, "rejected", where)
        else:
            first, second = _dialogue(row, "chosen", where), _dialogue(row, "rejected", where)
            if first[:-1] != second[:-1]:
                loaded.drop(row, "whose chosen and rejected dialogues do not share their prompt")
                continue
            prompt, chosen, rejected = _asks(first[:-1], where), first[-1:], second[-1:]
        if answer_text(chosen).strip() == answer_text(rejected).strip():
            loaded.drop(row, "with identical chosen and rejected")
        elif not answer_text(chosen).strip():
            loaded.drop(row, "with an empty chosen answer")
        else:
            loaded.records.append({**row, "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return _with_sides(loaded, test_share)


def conversation(value: Any, where: str) -> list[Message]:
    """A conversation from text (one user turn) or from a list of {"role", "content"}, checked.

    Raises:
        InputError: neither of the two, an unknown role, or content that is not text.
    """
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{where}: the prompt is empty; give it some text or remove the row.")
        return user_prompt(value)
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise InputError(
            f"{where}: a conversation is text or a list of {{role, content}}, but this is {_short(value)}."
        )
    turns = []
    for turn in value:
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise InputError(f"{where}: role {role!r} is unknown; the roles are {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise InputError(f"{where}: the content of a {role} turn is {_short(content)}, but text is wanted.")
        turns.append({"role": role, "content": content})
    return turns


# Columns of an answer, or of the whole the prompt was taken from.
_ANSWERS = {"completion", "chosen", "rejected", "messages", "instruction", "input", "output"}


def unique_prompts(*groups: Iterable[Record]) -> list[Record]:
    """`{prompt, prompt_id, split}` of all groups, each prompt once, in order of first appearance.

    Columns that are not answers ride along: a reward function may ask for them.

    Raises:
        InputError: two files put one prompt on different sides.
    """
    seen: dict[str, Record] = {}
    for record in (record for group in groups for record in group):
        key = prompt_id(record["prompt"])
        riders = {name: value for name, value in record.items() if name not in _ANSWERS}
        first = seen.setdefault(key, {**riders, "prompt_id": key})
        if first["split"] != record["split"]:
            raise InputError(
                f"the prompt {_short(record['prompt'][-1]['content'])} is {first['split']} in one file and "
                f"{record['split']} in another: give it one split, or none (the hash of the prompt then decides)."
            )
    return list(seen.values())


def only(split: str, records: Sequence[Record], what: str) -> list[Record]:
    """The records of one side.

    Raises:
        InputError: there are none.
    """
    chosen = [record for record in records if record["split"] == split]
    if not chosen:
        raise InputError(
            f"none of the {len(records)} {what} is on the {split} side: give more data or change data.test_share."
        )
    return chosen


def _rows(path: str | Path, max_rows: int | None) -> list[tuple[int, Record]]:
    rows = numbered_jsonl(path)[:max_rows]
    for number, row in rows:
        if row.get("split", "train") not in ("train", "test"):
            raise InputError(f"{path}, line {number}: split is {row['split']!r}, but train or test is wanted.")
    return rows


def _with_sides(loaded: Loaded, test_share: float) -> Loaded:
    sides: dict[str, str] = {}
    for record in loaded.records:
        side = record.setdefault("split", split_of(record["prompt"], test_share))
        if sides.setdefault(prompt_id(record["prompt"]), side) != side:
            raise InputError(
                f"{loaded.path}: the prompt {_short(record['prompt'][-1]['content'])} is on the train side in one row "
                "and on the test side in another: give all rows of a prompt the same split."
            )
    if not loaded.records:
        raise InputError(f"{loaded.path}: no row is left ({loaded.sentence()}).")
    return loaded


def _unknown_columns(path: str | Path, columns: set[str], what: str, wanted: str) -> InputError:
    return InputError(f"{path}: columns {', '.join(sorted(columns))} are not those of {what}; wanted: {wanted}.")


def _column(row: Record, column: str, where: str) -> Any:
    if row.get(column) is None:
        raise InputError(f"{where}: column `{column}` is missing; the row has {', '.join(sorted(row)) or 'none'}.")
    return row[column]


def _text(row: Record, column: str, where: str) -> str:
    value = _column(row, column, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: `{column}` is {_short(value)}, but text is wanted.")
    return value


def _answer(row: Record, column: str, where: str) -> list[Message]:
    value = _column(row, column, where)
    if isinstance(value, str):
        return assistant_answer(value)
    turns = conversation(value, where)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in turns)
        raise InputError(
            f"{where}: `{column}` should be one assistant turn beside its prompt, but its turns are: {roles}."
        )
    return turns


def _asks(prompt: list[Message], where: str) -> list[Message]:
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        last = prompt[-1]["role"] if prompt else "nothing"
        raise InputError(f"{where}: a prompt must end with a user turn, but this one ends with {last}.")
    return prompt


def _from_messages(row: Record, where: str) -> Record:
    turns = conversation(_column(row, "messages", where), where)
    if turns[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: a demonstration must end with an assistant turn, but ends with {turns[-1]['role']}."
        )
    return {"prompt": _asks(turns[:-1], where), "completion": turns[-1:]}


def _from_prompt_completion(row: Record, where: str) -> Record:
    prompt = conversation(_column(row, "prompt", where), where)
    return {"prompt": _asks(prompt, where), "completion": _answer(row, "completion", where)}


def _from_instruction(row: Record, where: str) -> Record:
    return {"prompt": _instruction_prompt(row, where), "completion": assistant_answer(_text(row, "output", where))}


def _instruction_prompt(row: Record, where: str) -> list[Message]:
    instruction = _text(row, "instruction", where).strip()
    extra = "" if row.get("input") is None else _text(row, "input", where).strip()
    if not instruction:
        raise InputError(f"{where}: the instruction is empty; give it some text or remove the row.")
    return user_prompt(f"{instruction}\n\n{extra}" if extra else instruction)


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _dialogue(row: Record, column: str, where: str) -> list[Message]:
    """A whole dialogue that ends with an assistant turn, from a conversation or from Human:/Assistant: text."""
    value = _column(row, column, where)
    if isinstance(value, str):
        parts = _TURN.split(value)
        names, contents = parts[1::2], parts[2::2]
        if len(names) < 2:
            raise InputError(
                f"{where}: `{column}` is text without a prompt: wanted are a `prompt` column beside it, or turns that "
                "begin with Human: and Assistant:."
            )
        if parts[0].strip():
            raise InputError(
                f"{where}: `{column}` has text before its first turn, {_short(parts[0].strip())}: begin it with Human:."
            )
        roles = {"Human": "user", "Assistant": "assistant"}
        turns = [{"role": roles[n], "content": content.strip()} for n, content in zip(names, contents, strict=True)]
    else:
        turns = conversation(value, where)
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{where}: `{column}` must end with an assistant turn, but ends with {turns[-1]['role']}.")
    return turns


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
