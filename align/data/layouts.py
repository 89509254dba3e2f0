"""The layouts that records are written in, for other programs: what each can hold, and how it says it.

A layout never changes a text. A record that it cannot hold as it is raises `CannotHold` and is listed.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from align.data.kinds import COLUMNS
from align.data.names import KINDS, Kind, LayoutName
from align.data.turns import CannotHold, prompt_of
from labeling_ui.checks import MOST_ANSWERS
from reward.records import InputError, Message, Record

# Columns of ours beside a kind's own that tables and TRL's columns keep; jsonl keeps all columns, the others none.
SIDE_COLUMNS = ("split",)
HOLDS: dict[LayoutName, tuple[Kind, ...]] = {
    "jsonl": KINDS,
    "trl": ("demonstration", "prompt", "preference", "unpaired"),
    "alpaca": ("demonstration", "prompt", "preference"),
    "sharegpt": ("demonstration", "prompt", "preference"),
    "openai": ("demonstration", "preference"),
    "hh": ("demonstration", "preference"),
    "csv": KINDS,
    "parquet": KINDS,
}


def check_held(layout: LayoutName, kind: Kind) -> None:
    """Refuse a kind of record that a layout has no place for."""
    if kind not in HOLDS[layout]:
        fitting = ", ".join(name for name, kinds in HOLDS.items() if kind in kinds)
        raise InputError(
            f"--format {layout} has no place for {kind} records, but for {', '.join(HOLDS[layout])}: choose a layout "
            f"that has ({fitting}), or another kind with --to."
        )


def laid_out(layout: LayoutName, kind: Kind, record: Record) -> Record:
    """The row of a record.

    Raises:
        CannotHold: the layout cannot say all of it, or would say it differently when read again.
    """
    if layout == "jsonl":
        return record
    write: dict[LayoutName, Callable[[Kind, Record], Record]] = {
        "trl": _trl,
        "alpaca": _alpaca,
        "sharegpt": _sharegpt,
        "openai": _openai,
        "hh": _hh,
        "csv": _csv,
        "parquet": _parquet,
    }
    return write[layout](kind, record)


def _trl(kind: Kind, record: Record) -> Record:
    return {name: record[name] for name in (*COLUMNS[kind], *SIDE_COLUMNS) if name in record}


def _text(completion: list[Message]) -> str:
    return completion[0]["content"]


def _alpaca(kind: Kind, record: Record) -> Record:
    turns = list(record["prompt"])
    row: Record = {}
    if turns[0]["role"] == "system":
        row["system"] = turns.pop(0)["content"]
        if not row["system"].strip():
            raise CannotHold("with an empty system turn, which alpaca cannot hold")
    roles = [turn["role"] for turn in turns]
    if roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise CannotHold("whose turns are not user and assistant in turn, as alpaca has them")
    texts = [turn["content"] for turn in turns]
    if not texts[-1].strip():
        raise CannotHold("with an empty instruction, which alpaca cannot hold")
    row |= {"instruction": texts[-1], "input": ""}
    if len(texts) > 1:
        row["history"] = [list(pair) for pair in zip(texts[:-1:2], texts[1:-1:2], strict=True)]
    if kind == "demonstration":
        return row | {"output": _text(record["completion"])}
    return row | {side: _text(record[side]) for side in ("chosen", "rejected") if kind == "preference"}


_FROM = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


def _said(turns: list[Message]) -> list[Record]:
    return [{"from": _FROM[turn["role"]], "value": turn["content"]} for turn in turns]


def _sharegpt(kind: Kind, record: Record) -> Record:
    answer = record["completion"] if kind == "demonstration" else []
    row: Record = {"conversations": _said([*record["prompt"], *answer])}
    return row | {side: _said(record[side])[0] for side in ("chosen", "rejected") if kind == "preference"}


def _openai(kind: Kind, record: Record) -> Record:
    prompt = record["prompt"]
    if any(turn["role"] == "tool" for turn in prompt):
        raise CannotHold("with a tool turn, which OpenAI's files hold beside its call alone")
    if kind == "preference":
        sides = {"preferred_output": record["chosen"], "non_preferred_output": record["rejected"]}
        return {"input": {"messages": prompt}, **sides}
    # Weight 0: a demonstration trains its last answer alone.
    earlier = [turn | ({"weight": 0} if turn["role"] == "assistant" else {}) for turn in prompt]
    return {"messages": [*earlier, *record["completion"]]}


_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def _hh(kind: Kind, record: Record) -> Record:
    if kind == "demonstration":
        return {"text": _dialogue([*record["prompt"], *record["completion"]])}
    return {side: _dialogue([*record["prompt"], *record[side]]) for side in ("chosen", "rejected")}


def _dialogue(turns: list[Message]) -> str:
    for turn in turns:
        if turn["role"] not in _SPEAKERS:
            raise CannotHold(f"with a {turn['role']} turn, which hh text cannot hold")
        if turn["content"] != turn["content"].strip():
            raise CannotHold("with white space around a turn, which hh text cannot hold")
        if any(f"\n\n{name}:" in turn["content"] for name in _SPEAKERS.values()):
            raise CannotHold("with a turn that holds the beginning of another, which hh text cannot hold")
    return "".join(f"\n\n{_SPEAKERS[turn['role']]}: {turn['content']}" for turn in turns)


def _csv(kind: Kind, record: Record) -> Record:
    [*before, last] = record["prompt"]
    if before or last["role"] != "user":
        raise CannotHold("with more than one user turn in the prompt, which a table cannot hold")
    if not last["content"].strip() or prompt_of({"prompt": last["content"]}, "prompt", "") != [last]:
        raise CannotHold(
            "with a prompt that is empty or reads as Human: and Assistant: turns, which a table cannot hold"
        )
    row: Record = {"id": record["id"]} if kind == "comparison" else {}
    row["prompt"] = last["content"]
    for name in COLUMNS[kind][1:]:
        if name == "label":
            row[name] = "true" if record[name] else "false"
        elif name in ("completion", "chosen", "rejected"):
            row[name] = _text(record[name])
    if kind == "comparison":
        row |= _answer_cells(record["answers"])
    return row | {name: record.get(name, "") for name in SIDE_COLUMNS}


def _answer_cells(answers: list[Record]) -> Record:
    cells: Record = {}
    for number, answer in enumerate(answers, start=1):
        more = {name for name, value in answer.items() if name not in ("text", "model") and value is not None}
        if more:
            raise CannotHold(f"whose answers have {', '.join(sorted(more))}, which a table cannot hold")
        if not answer["text"]:
            raise CannotHold("with an empty answer, which a table cannot hold")
        cells |= {f"answer_{number}": answer["text"], f"model_{number}": answer.get("model") or ""}
    return cells


def _parquet(kind: Kind, record: Record) -> Record:
    row = _trl(kind, record)
    if kind == "comparison":
        for answer in record["answers"]:
            if more := {k for k, v in answer.items() if k not in ("text", "model", "rank", "score") and v is not None}:
                raise CannotHold(f"whose answers have {', '.join(sorted(more))}, which this table has no column for")
    return row


# Files


Writer = Callable[[Record], object]


@contextmanager
def open_writer(path: Path, layout: LayoutName, kind: Kind, packed: bool) -> Iterator[Writer]:
    """Writes rows to the file one by one; `packed` is gzip."""
    if layout == "parquet":
        with _parquet_writer(path, kind) as write:
            yield write
        return
    with path.open("wb") as raw, _gzip(raw) if packed else _as_it_is(raw) as out:
        if layout == "csv":
            text = io.TextIOWrapper(out, encoding="utf-8", newline="")
            table = csv.DictWriter(text, _csv_columns(kind), restval="", quoting=csv.QUOTE_ALL)
            table.writeheader()
            yield table.writerow
            text.flush()
            text.detach()
        else:

            def write(row: Record) -> None:
                out.write(json_line(row))

            yield write


def json_line(row: Record) -> bytes:
    """One line of JSONL.

    Raises:
        CannotHold: a number in it is none, which JSON cannot say.
    """
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError:
        raise CannotHold("with a number that is none (NaN or infinite), which JSON cannot hold") from None


@contextmanager
def _gzip(raw: IO[bytes]) -> Iterator[Any]:
    # Without the time, so that the same rows give the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        yield packed


@contextmanager
def _as_it_is(raw: IO[bytes]) -> Iterator[Any]:
    yield raw


def _csv_columns(kind: Kind) -> list[str]:
    if kind != "comparison":
        return [*COLUMNS[kind], *SIDE_COLUMNS]
    answers = [f"{name}_{number}" for number in range(1, MOST_ANSWERS + 1) for name in ("answer", "model")]
    return ["id", "prompt", *answers, *SIDE_COLUMNS]


ROWS_AT_ONCE = 256


@contextmanager
def _parquet_writer(path: Path, kind: Kind) -> Iterator[Writer]:
    import pyarrow
    import pyarrow.parquet

    string = pyarrow.string()
    turns = pyarrow.list_(pyarrow.struct([("role", string), ("content", string)]))
    measured = [(name, pyarrow.float64()) for name in ("rank", "score")]
    kinds = {
        "id": string,
        "label": pyarrow.bool_(),
        "answers": pyarrow.list_(pyarrow.struct([("text", string), ("model", string), *measured])),
    }
    columns = (*COLUMNS[kind], *SIDE_COLUMNS)
    schema = pyarrow.schema([(name, kinds.get(name, string if name in SIDE_COLUMNS else turns)) for name in columns])
    held: list[Record] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(held, schema))
            held.clear()

        def write(row: Record) -> None:
            held.append(row)
            if len(held) == ROWS_AT_ONCE:
                flush()

        yield write
        flush()
