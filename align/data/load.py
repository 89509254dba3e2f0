"""Read data in the conventions people have, and hand on records in one convention (see `reward.records`).

What was detected, how many rows came in and went out, and why rows were left out is returned beside the records and
written to the run folder: nothing is dropped in silence.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data.files import Placed, open_source
from align.data.names import Kind
from align.data.turns import (
    CannotHold,
    answer_of,
    asks,
    column_of,
    conversation,
    instruction_of,
    pair_of,
    prompt_of,
    short,
    text_of,
)
from reward.records import InputError, Record, answer_text, assistant_answer, prompt_id, split_of


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
        wanted = "prompt and completion, messages, or instruction and output"
        raise _unknown_columns(path, rows[0], "demonstration", wanted)
    loaded = Loaded(str(path), name, [])
    for where, row in rows:
        record = {**row, **convert(row, where)}
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
        raise _unknown_columns(path, rows[0], "prompt", "prompt, messages or instruction")
    for where, row in rows:
        if loaded.format == "instruction":
            prompt = instruction_of(row, where)
        else:
            prompt = prompt_of(row, loaded.format, where)
            while prompt and prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
        loaded.records.append({**row, "prompt": asks(prompt, where)})
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
        wanted = "chosen and rejected, with prompt, messages or instruction"
        raise _unknown_columns(path, rows[0], "preference", wanted)
    name = next((c for c in ("prompt", "messages", "instruction") if c in columns), "")
    loaded = Loaded(str(path), f"{name}/chosen/rejected" if name else "dialogues chosen/rejected", [])
    for where, row in rows:
        try:
            prompt, chosen, rejected = pair_of(row, name, where)
        except CannotHold as reason:
            loaded.drop(row, str(reason))
        else:
            loaded.records.append({**row, "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return _with_sides(loaded, test_share)


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
                f"the prompt {short(record['prompt'][-1]['content'])} is {first['split']} in one file and "
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


def _rows(path: str | Path, max_rows: int | None) -> list[Placed]:
    rows = list(itertools.islice(open_source(path).rows(), max_rows))
    for where, row in rows:
        if row.get("split", "train") not in ("train", "test"):
            raise InputError(f"{where}: split is {row['split']!r}, but train or test is wanted.")
    return rows


def _with_sides(loaded: Loaded, test_share: float) -> Loaded:
    sides: dict[str, str] = {}
    for record in loaded.records:
        side = record.setdefault("split", split_of(record["prompt"], test_share))
        if sides.setdefault(prompt_id(record["prompt"]), side) != side:
            raise InputError(
                f"{loaded.path}: the prompt {short(record['prompt'][-1]['content'])} is on the train side in one row "
                "and on the test side in another: give all rows of a prompt the same split."
            )
    if not loaded.records:
        raise InputError(f"{loaded.path}: no row is left ({loaded.sentence()}).")
    return loaded


def _unknown_columns(path: str | Path, first: Placed, kind: Kind, wanted: str) -> InputError:
    where, row = first
    said = f"{path}: columns {', '.join(sorted(row))} are not those of {kind}s; wanted: {wanted}."
    known = _convertible(row, where, kind)
    return InputError(f"{said} It reads as {known}: `align data convert IN OUT --to {kind}` first." if known else said)


def _convertible(row: Record, where: str, kind: Kind) -> str | None:
    """The format of a row that `align data convert` can make a record of."""
    from align.data.formats import format_of
    from align.data.kinds import become, check_possible, kind_of

    known = format_of(row)
    if known is None:
        return None
    if known.gather:
        return known.name
    try:
        [record, *_] = known.read(row, where)
        check_possible(kind_of(record), kind)
    except (InputError, CannotHold):
        return None
    return known.name if any(not isinstance(made, CannotHold) for made in become(record, kind)) else None


def _from_messages(row: Record, where: str) -> Record:
    turns = conversation(column_of(row, "messages", where), where)
    if turns[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: a demonstration must end with an assistant turn, but ends with {turns[-1]['role']}."
        )
    return {"prompt": asks(turns[:-1], where), "completion": turns[-1:]}


def _from_prompt_completion(row: Record, where: str) -> Record:
    prompt = asks(prompt_of(row, "prompt", where), where)
    return {"prompt": prompt, "completion": answer_of(row, "completion", where, prompt)}


def _from_instruction(row: Record, where: str) -> Record:
    return {"prompt": instruction_of(row, where), "completion": assistant_answer(text_of(row, "output", where))}
