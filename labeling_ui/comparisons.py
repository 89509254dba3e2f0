"""Comparisons in the formats people have: our own, TRL preferences, exports of Argilla and Label Studio, tables."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labeling_ui.checks import MOST_ANSWERS
from reward.records import ROLES, InputError, Message, Record, digest, prompt_id, split_of, user_prompt

TEST_SHARE = 0.2  # the default of data.test_share
SIDES = ("chosen", "rejected")
PROMPTS = ("prompt", "instruction", "question", "query", "messages", "text")
_ANSWER = re.compile(
    r"(?:(answer|response|completion|output|candidate|reply|option|text)[ _-]?)?(\d+|[a-i])", re.IGNORECASE
)
# Names that an item's payload uses itself.
_TAKEN = frozenset({"comparison_id", "pair"})
# What others said of the answers is no part of a comparison: it would change with every new label.
LEFT_OUT = _TAKEN | {
    *("annotations", "predictions", "responses", "suggestions", "vectors"),
    *("annotators", "strengths", "chosen_index", "margin", "weight", "simulated", "gold"),
}


def read_comparisons(
    source: str | Path | bytes, name: str | None = None, test_share: float = TEST_SHARE
) -> tuple[list[Record], str]:
    """Comparisons as `LabelStore.add_items` takes them, and one sentence on what was found in the file.

    Formats, told from the first row, in JSONL, a JSON list, or CSV (with commas, semicolons or tabs):

    `{id, prompt, split, answers: [{text, ...}]}`; TRL preferences `{prompt, chosen, rejected}`, or `{chosen, rejected}`
    as whole dialogues; Argilla records `{fields: {...}}` and Label Studio tasks `{data: {...}}`, whose labels are left
    out; columns such as prompt, answer_1, answer_2, ... (answer_a, response1, ... too), with model_1, ... beside them.

    An id is kept as text; without one it is a digest of the content, so that the same file gives the same ids. A split
    is kept; without one the hash of the prompt decides, as everywhere in the project. Other columns ride along. Answers
    of preferences are named chosen and rejected in their column `source`, which no annotator sees.

    Args:
        source: a path, or the content of a file.
        name: how messages call the file.
        test_share: share of prompts held out where the file says nothing.

    Raises:
        InputError: the file is missing, empty, not UTF-8 or in none of these formats (the message names its columns), a
            row is malformed or has fewer than 2 or more than 9 answers, two rows of one id differ, or a prompt is on
            both sides. The message names the line, or the number of the record in a JSON list.
    """
    raw, name = _content(source, name)
    rows, container = _rows(_decoded(raw, name), name)
    form, convert = _format(*rows[0])
    found: dict[str, tuple[str, Record]] = {}
    sides: dict[str, tuple[str, str]] = {}
    repeated = 0
    for where, row in rows:
        record = _finished(convert(where, row), where, test_share)
        first, side = sides.setdefault(prompt_id(record["prompt"]), (where, record["split"]))
        if side != record["split"]:
            raise InputError(
                f"{where}: the prompt is on the {record['split']} side here, and on the {side} side in {first}: give "
                "all rows of a prompt the same split."
            )
        first, known = found.setdefault(record["id"], (where, record))
        if known is not record:
            if digest(known) != digest(record):
                raise InputError(
                    f"{where}: the id {record['id']} is that of {first} too, which says something else: give every "
                    "comparison an id of its own."
                )
            repeated += 1
    records = [record for _, record in found.values()]
    count = Counter(record["split"] for record in records)
    said = f"{name}: {len(records)} comparisons ({count['train']} train, {count['test']} test), "
    said += f"read as {form} ({container})"
    if repeated:
        said += f"; {repeated} repeated rows left out"
    left_out = _TAKEN if convert is _from_own else LEFT_OUT
    if unused := {column for _, row in rows for column in row if column in left_out}:
        said += f"; not used: {', '.join(sorted(unused))}"
    return records, f"{said}."


def _content(source: str | Path | bytes, name: str | None) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, name or "the file"
    path = Path(source)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}: give the path of a JSONL, JSON or CSV file of comparisons.")
    return path.read_bytes(), name or path.name


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}, line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8.") from None


def _rows(text: str, name: str) -> tuple[list[tuple[str, Record]], str]:
    """((file and line, row) of all rows, in order; "JSON", "JSONL" or "CSV")."""
    start = text.lstrip()[:1]
    if start == "[":
        values = _json(text, name, 1)
        rows, container = [(f"{name}, record {number}", row) for number, row in enumerate(values, 1)], "JSON"
    elif start == "{":
        # Not splitlines: JSON may hold other line separators of Unicode as they are.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows, container = [(f"{name}, line {number}", _json(line, name, number)) for number, line in lines], "JSONL"
    else:
        rows, container = _csv_rows(text, name), "CSV"
    if not rows:
        raise InputError(f"{name} is empty: a JSONL, JSON or CSV file with one comparison a row is wanted.")
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f'{where}: {_short(row)}, but an object like {{"prompt": ...}} is wanted.')
    if "\\ud" in text.lower():
        for where, row in rows:
            _refuse_half_characters(where, row)
    return rows, container


def _json(text: str, name: str, line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name}, line {line + error.lineno - 1}: not valid JSON ({error.msg} at column {error.colno}); one JSON "
            "object on every line is wanted, or one list of all of them."
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deeply, NaN, or a number of thousands of digits
        raise InputError(f"{name}, line {line}: JSON that cannot be read ({error}).") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _refuse_half_characters(where: str, row: Record) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: holds half of a character (a lone \\ud800 to \\udfff escape); write the whole character instead."
        ) from None


def _csv_rows(text: str, name: str) -> list[tuple[str, Record]]:
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[str, Record]] = []
    header: list[str] = []
    last = 0
    try:
        for cells in reader:
            # A row with line breaks in its cells is named by the line it begins on.
            where, last = f"{name}, line {last + 1}", reader.line_num
            if not any(cells):
                continue
            if not header:
                header = [cell.strip().lower() for cell in cells]
                if twice := [column for column, count in Counter(header).items() if count > 1]:
                    raise InputError(f"{where}: the column {twice[0]!r} is there twice: give each a name of its own.")
            elif len(cells) != len(header):
                raise InputError(
                    f"{where}: {len(cells)} cells, but the header has {len(header)}: put quotes around cells with "
                    f"{delimiter!r} or a line break in them."
                )
            else:
                rows.append((where, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise InputError(f"{name}, line {last + 1}: not valid CSV ({error}).") from None
    return rows


Convert = Callable[[str, Record], Record]


def _format(where: str, row: Record) -> tuple[str, Convert]:
    if isinstance(row.get("answers"), list):
        return "comparisons", _from_own
    if row.keys() >= set(SIDES):
        prompt = _prompt_column(row)
        return f"preferences {f'with {prompt}' if prompt else 'of whole dialogues'}", _from_preference
    if isinstance(row.get("fields"), dict):
        return "an Argilla export", _from_argilla
    if isinstance(row.get("data"), dict):
        return "a Label Studio export", _from_label_studio
    if _prompt_column(row) and (columns := answer_columns(row)):
        return f"columns {_prompt_column(row)}, {', '.join(columns)}", _from_columns
    raise InputError(
        f"{where}: the format cannot be told from the columns {listed(row)}: wanted are prompt, answer_1, answer_2, "
        "...; or prompt, chosen, rejected; or id, prompt, answers; or an export of Argilla (fields) or Label Studio "
        "(data)."
    )


def _from_own(where: str, row: Record) -> Record:
    answers = row.get("answers")
    texts = isinstance(answers, list) and all(
        isinstance(answer, dict) and isinstance(answer.get("text"), str) for answer in answers
    )
    if not texts:
        raise InputError(f'{where}: "answers" must be a list of objects like {{"text": ...}}.')
    prompt = _prompt(where, row, ("prompt",))
    # As it is, not as it was read: the same comparison may be in the store already.
    kept = row["prompt"] if isinstance(row["prompt"], list) else prompt
    return {column: value for column, value in row.items() if column not in _TAKEN} | {"prompt": kept}


def _from_preference(where: str, row: Record) -> Record:
    if _prompt_column(row):
        prompt = _prompt(where, row)
        texts = [_completion(where, row, side, prompt) for side in SIDES]
    else:
        chosen, rejected = (_dialogue(where, row, side) for side in SIDES)
        prompt = _asking(where, chosen[:-1])
        if rejected[:-1] != prompt:
            raise InputError(
                f"{where}: the dialogues chosen and rejected do not share all turns before the last: remove the row, "
                "or put what they share into a column prompt."
            )
        texts = [chosen[-1]["content"], rejected[-1]["content"]]
    answers = [{"text": text, "source": side} for text, side in zip(texts, SIDES, strict=True)]
    return _riders(row, set(SIDES)) | {"prompt": prompt, "answers": answers}


def _from_argilla(where: str, row: Record) -> Record:
    fields, metadata = row.get("fields"), row.get("metadata") or {}
    if not isinstance(fields, dict) or not isinstance(metadata, dict):
        raise InputError(f"{where}: `fields` and `metadata` of an Argilla record must be objects of columns.")
    number = row["external_id"] if row.get("id") is None and "external_id" in row else row.get("id")
    riders = {"metadata": metadata} if metadata else {}
    return _from_columns(where, {**fields, **riders, "id": number, "split": metadata.get("split")})


def _from_label_studio(where: str, row: Record) -> Record:
    data = row.get("data")
    if not isinstance(data, dict):
        raise InputError(f"{where}: `data` of a Label Studio task must be an object of columns, not {_short(data)}.")
    return _from_columns(where, {**data, "id": row.get("id", data.get("id"))})


def _from_columns(where: str, row: Record) -> Record:
    answers = []
    columns = answer_columns(row)
    used = set(columns)
    for column, mark in columns.items():
        models = [name for name in (f"{column}_model", f"model_{mark}", f"model{mark}") if name in row]
        used.update(models)
        if (text := row[column]) in (None, ""):
            continue
        if not isinstance(text, str):
            raise InputError(f"{where}: `{column}` is {_short(text)}, but text is wanted.")
        model = next((row[name] for name in models if row[name] not in (None, "")), None)
        answers.append({"text": text} if model is None else {"text": text, "model": model})
    if not answers:
        raise InputError(
            f"{where}: no answer among the columns {listed(row)}: wanted are answer_1, answer_2, ..., or response1, ..."
        )
    return _riders(row, used) | {"prompt": _prompt(where, row), "answers": answers}


def answer_columns(row: Record) -> dict[str, str]:
    """Columns of answers, in order, with what tells them apart (1, 2, or a, b); of several sets the largest."""
    sets: dict[str, list[tuple[str, str]]] = {}
    for column in row:
        if match := _ANSWER.fullmatch(column):
            sets.setdefault((match[1] or "").lower(), []).append((match[2].lower(), column))
    largest = max(sets.values(), key=len, default=[])
    return {column: mark for mark, column in sorted(largest)}


def _riders(row: Record, used: set[str]) -> Record:
    prompt = _prompt_column(row)
    gone = {*used, *LEFT_OUT, prompt, "input" if prompt == "instruction" else prompt}
    return {column: value for column, value in row.items() if column not in gone}


def _prompt_column(row: Record, names: tuple[str, ...] = PROMPTS) -> str | None:
    return next((name for name in names if row.get(name) not in (None, "", [])), None)


def _prompt(where: str, row: Record, names: tuple[str, ...] = PROMPTS) -> list[Message]:
    column = _prompt_column(row, names)
    if column is None:
        raise InputError(f"{where}: no prompt among the columns {listed(row)}: one of {', '.join(names)} is wanted.")
    value, more = row[column], row.get("input")
    if column == "instruction" and isinstance(value, str) and isinstance(more, str) and more.strip():
        value = f"{value.strip()}\n\n{more.strip()}"
    return _asking(where, _conversation(where, column, value))


def _conversation(where: str, column: str, value: Any) -> list[Message]:
    """A conversation from text (one user turn) or from turns."""
    if isinstance(value, str) and value.strip():
        return user_prompt(value)
    fine = isinstance(value, list) and all(
        isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str) for turn in value
    )
    if not fine or not value:
        raise InputError(
            f"{where}: `{column}` is {_short(value)}, but text is wanted, or a list of turns {{role, content}} with "
            f"the roles {', '.join(ROLES)}."
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _asking(where: str, prompt: list[Message]) -> list[Message]:
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        last = prompt[-1]["role"] if prompt else "nothing"
        raise InputError(f"{where}: a prompt must end with a user turn, but this one ends with {last}.")
    return prompt


def _completion(where: str, row: Record, side: str, prompt: list[Message]) -> str:
    """The text of an answer beside its prompt, whose turns some datasets repeat before it."""
    if isinstance(row.get(side), str):
        return str(row[side])
    turns = _conversation(where, side, row.get(side))
    if turns[-1]["role"] != "assistant" or turns[:-1] not in ([], prompt):
        roles = ", ".join(turn["role"] for turn in turns)
        raise InputError(
            f"{where}: `{side}` should be one assistant turn, alone or after the turns of the prompt, but its turns "
            f"are: {roles}."
        )
    return turns[-1]["content"]


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _dialogue(where: str, row: Record, side: str) -> list[Message]:
    """A whole dialogue that ends with an assistant turn, from turns or from "Human: / Assistant:" text."""
    value = row.get(side)
    if isinstance(value, str):
        before, *parts = _TURN.split(value)
        if before.strip() or len(parts) < 4:
            raise InputError(
                f"{where}: `{side}` is text without a prompt: wanted are a column prompt beside it, or turns that "
                "begin with Human: and Assistant:."
            )
        named = zip(parts[::2], parts[1::2], strict=True)
        turns = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()} for who, text in named]
    else:
        turns = _conversation(where, side, value)
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{where}: `{side}` must end with an assistant turn, but ends with {turns[-1]['role']}.")
    return turns


def _finished(record: Record, where: str, test_share: float) -> Record:
    count = len(record["answers"])
    if not 2 <= count <= MOST_ANSWERS:
        raise InputError(
            f"{where}: {count} answers, but at least 2 are needed for a choice, and more than {MOST_ANSWERS} nobody "
            "can compare."
        )
    number, split = record.pop("id", None), record.pop("split", None)
    if split in (None, ""):
        split = split_of(record["prompt"], test_share)
    if split not in ("train", "test"):
        raise InputError(f"{where}: the split is {split!r}, but train, test or none is wanted.")
    if number in (None, ""):
        number = digest(record)[:16]
    if not isinstance(number, str) and type(number) is not int:
        raise InputError(f"{where}: the id is {_short(number)}, but a text or a whole number is wanted.")
    return {"id": str(number), "prompt": record.pop("prompt"), "split": split, **record}


def listed(row: Record) -> str:
    """The columns of a row, for a message."""
    return ", ".join(sorted(row)) or "(none)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
