"""What goes into and comes out of a label store as files.

In: comparisons in the formats people have (`read_comparisons`), or a whole project (`import_store`). Out: what models
are trained on, a table of the labels, or the whole project (`export_store`).

Every export is the same to the byte on a rerun, appears whole or not at all, and every record in it carries the split
of its comparison: a held-out prompt stays held out. What came from simulated labels says so.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from labeling_ui.database import value_rows
from labeling_ui.schema import COMPARISON, EVENT, GUIDELINE, ITEM, PROJECT
from labeling_ui.store import (
    MOST_ANSWERS,
    Item,
    LabelStore,
    Project,
    Settings,
    _checked_comparison,
    check_judgement,
    shown_digest,
)
from reward.aggregate import Preferences, preferences
from reward.records import (
    ROLES,
    InputError,
    Message,
    Record,
    assistant_answer,
    digest,
    numbered_jsonl,
    prompt_id,
    split_of,
    user_prompt,
    write_atomically,
    write_jsonl,
)

TEST_SHARE = 0.2  # the default of data.test_share
SIDES = ("chosen", "rejected")

# -- comparisons in ---------------------------------------------------------------------------------------------------

PROMPTS = ("prompt", "instruction", "question", "query", "messages", "text")
_ANSWER = re.compile(
    r"(?:(answer|response|completion|output|candidate|reply|option|text)[ _-]?)?(\d+|[a-i])", re.IGNORECASE
)
# Names that an item's payload uses itself.
_TAKEN = frozenset({"comparison_id", "pair"})
# What others said of the answers is no part of a comparison: it would change with every new label.
_LEFT_OUT = _TAKEN | {
    *("annotations", "predictions", "responses", "suggestions", "vectors"),
    *("annotators", "margin", "weight", "simulated", "gold"),
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
    left_out = _TAKEN if convert is _from_own else _LEFT_OUT
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
    if _prompt_column(row) and (columns := _answer_columns(row)):
        return f"columns {_prompt_column(row)}, {', '.join(columns)}", _from_columns
    raise InputError(
        f"{where}: the format cannot be told from the columns {_names(row)}: wanted are prompt, answer_1, answer_2, "
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
    columns = _answer_columns(row)
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
            f"{where}: no answer among the columns {_names(row)}: wanted are answer_1, answer_2, ..., or response1, ..."
        )
    return _riders(row, used) | {"prompt": _prompt(where, row), "answers": answers}


def _answer_columns(row: Record) -> dict[str, str]:
    """Columns of answers, in order, with what tells them apart (1, 2, or a, b); of several sets the largest."""
    sets: dict[str, list[tuple[str, str]]] = {}
    for column in row:
        if match := _ANSWER.fullmatch(column):
            sets.setdefault((match[1] or "").lower(), []).append((match[2].lower(), column))
    largest = max(sets.values(), key=len, default=[])
    return {column: mark for mark, column in sorted(largest)}


def _riders(row: Record, used: set[str]) -> Record:
    prompt = _prompt_column(row)
    gone = {*used, *_LEFT_OUT, prompt, "input" if prompt == "instruction" else prompt}
    return {column: value for column, value in row.items() if column not in gone}


def _prompt_column(row: Record, names: tuple[str, ...] = PROMPTS) -> str | None:
    return next((name for name in names if row.get(name) not in (None, "", [])), None)


def _prompt(where: str, row: Record, names: tuple[str, ...] = PROMPTS) -> list[Message]:
    column = _prompt_column(row, names)
    if column is None:
        raise InputError(f"{where}: no prompt among the columns {_names(row)}: one of {', '.join(names)} is wanted.")
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


def _names(row: Record) -> str:
    return ", ".join(sorted(row)) or "(none)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- labels out -------------------------------------------------------------------------------------------------------


def export_preferences(store: LabelStore, project: Project, folder: str | Path) -> Preferences:
    """Write preferences.jsonl and ties.jsonl, as `reward.aggregate.preferences` makes them; TRL reads the first."""
    found = preferences(store.votes(project), simulated=project.simulated)
    write_jsonl(_place(Path(folder) / "preferences.jsonl"), found.records)
    write_jsonl(_place(Path(folder) / "ties.jsonl"), found.ties)
    return found


def export_rankings(store: LabelStore, project: Project, path: str | Path) -> int:
    """Write a row for each item with a label, ordered by comparison id; returns their number. Gold items are none.

    `{prompt, answers: [text], rankings: [{annotator, ranking}], comparison_id, split, simulated}`; a ranking holds
    groups of indices of answers from best to worst, equals in one group, and may leave answers out. All pairs of a row
    belong into one batch element: its `comparison_id` is the group.

    Raises:
        InputError: the project is judged in pairs.
    """
    if project.settings.mode != "ranking":
        raise InputError(f"Project {project.name} is judged in pairs and has no rankings: export its preferences.")
    given: dict[int, list[Record]] = {}
    for label in store.labels(project):
        given.setdefault(label.item_id, []).append({"annotator": label.annotator, "ranking": label.body["ranking"]})
    rows = [
        {
            "prompt": item.payload["prompt"],
            "answers": [answer["text"] for answer in item.payload["answers"]],
            "rankings": sorted(given[item.id], key=lambda ranking: ranking["annotator"]),
            **_origin(project, item),
        }
        for item in sorted(store.items(project), key=lambda item: item.comparison_id)
        if item.gold is None and item.id in given
    ]
    write_jsonl(_place(path), rows)
    return len(rows)


def export_kto(store: LabelStore, project: Project, path: str | Path) -> int:
    """Write `{prompt, completion, label, split, simulated}`, each answer of a prompt once; returns their number.

    An answer that won is true, one that lost is false. Left out are ties, and answers that did both: they are neither
    good nor bad, and TRL would train them up and down.
    """
    rows: dict[str, Record] = {}
    mixed: set[str] = set()
    for record in preferences(store.votes(project), simulated=project.simulated).records:
        for side in SIDES:
            origin = {name: record[name] for name in ("split", "simulated")}
            row = {"prompt": record["prompt"], "completion": record[side], "label": side == "chosen", **origin}
            key = digest([row["prompt"], row["completion"], row["split"]])
            if rows.setdefault(key, row)["label"] != row["label"]:
                mixed.add(key)
    kept = [row for key, row in rows.items() if key not in mixed]
    write_jsonl(_place(path), kept)
    return len(kept)


def export_demonstrations(store: LabelStore, project: Project, path: str | Path) -> int:
    """Write the better answers that annotators wrote, in the order they were given; returns their number.

    `{prompt, completion, annotator, comparison_id, split, simulated}`.
    """
    # Labels before items: then every label's item is there, even while others add to the store.
    labels = [label for label in store.labels(project) if label.body.get("rewrite")]
    items = {item.id: item for item in store.items(project)}
    rows = [
        {
            "prompt": items[label.item_id].payload["prompt"],
            "completion": assistant_answer(label.body["rewrite"]),
            "annotator": label.annotator,
            **_origin(project, items[label.item_id]),
        }
        for label in labels
    ]
    write_jsonl(_place(path), rows)
    return len(rows)


def _place(path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _origin(project: Project, item: Item) -> Record:
    return {"comparison_id": item.comparison_id, "split": item.payload["split"], "simulated": project.simulated}


COLUMNS = (
    *("item", "split", "annotator", "order", "value", "ranking", "ratings"),
    *("seconds", "comment", "flag", "created"),
)


def export_labels_csv(store: LabelStore, project: Project, path: str | Path) -> int:
    """Write a table of the labels that count, in the order they were given, as CSV in UTF-8; returns their number.

    `order` is the answers from left to right ("1 0"), `value` counts from the left one; a ranking is "2 > 0 = 1".
    A cell that a spreadsheet would run as a formula begins with an apostrophe.
    """
    labels = store.labels(project)
    items = {item.id: item for item in store.items(project)}
    out = io.StringIO(newline="")
    table = csv.writer(out)
    table.writerow(COLUMNS)
    for label in labels:
        item, body = items[label.item_id], label.body
        row = {name: body.get(name) for name in ("value", "seconds", "comment", "flag")} | {
            "item": item.key,
            "split": item.payload["split"],
            "annotator": label.annotator,
            "order": " ".join(map(str, body["order"])),
            "ranking": " > ".join(" = ".join(map(str, group)) for group in body.get("ranking") or []),
            "ratings": json.dumps(body["ratings"], ensure_ascii=False) if body.get("ratings") else "",
            "created": label.created,
        }
        table.writerow([_cell(row[column]) for column in COLUMNS])
    write_atomically(_place(path), out.getvalue())
    return len(labels)


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


# -- a whole project --------------------------------------------------------------------------------------------------

FORMAT = "align-labels"
VERSION = 1
EVENT_FIELDS = ("annotator", "kind", "key", "body", "created")


def export_store(store: LabelStore, project: Project, path: str | Path) -> None:
    """Write the whole project as JSONL: a line on the project, its comparisons, and all that anyone ever did, in order.

    `import_store` into an empty store gives the same project; exported again, the same bytes. Accounts, leases and the
    priorities of `LabelStore.prioritise` are no part of it.
    """
    with store.database.read() as connection:
        row = connection.execute(sa.select(PROJECT).where(PROJECT.c.id == project.id)).one()
        guidelines = (
            sa.select(*GUIDELINE.c["version", "text", "created"])
            .where(GUIDELINE.c.project_id == project.id)
            .order_by(GUIDELINE.c.version)
        )
        header = {
            "format": FORMAT,
            "version": VERSION,
            "name": row.name,
            "simulated": row.simulated,
            "settings": row.settings,
            "created": row.created,
            "guidelines": [dict(each._mapping) for each in connection.execute(guidelines)],
        }
        payloads = sa.select(COMPARISON.c.payload).where(COMPARISON.c.project_id == project.id)
        records = connection.execute(payloads.order_by(COMPARISON.c.id)).scalars().all()
        done = (
            sa.select(ITEM.c.key.label("item"), *EVENT.c[EVENT_FIELDS])
            .join_from(EVENT, ITEM)
            .where(EVENT.c.project_id == project.id)
            .order_by(EVENT.c.id)
        )
        events = [dict(each._mapping) for each in connection.execute(done)]
    write_jsonl(
        _place(path), [header, *({"comparison": record} for record in records), *({"event": event} for event in events)]
    )


@dataclass(frozen=True, slots=True)
class Restored:
    """The project, and how many items and events an import added to it."""

    project: Project
    items: int
    events: int


def import_store(store: LabelStore, path: str | Path) -> Restored:
    """Take in a project that `export_store` wrote; what is there already is not added again.

    A project of that name keeps its settings and gets what it lacks. The file is checked before anything is stored; an
    import that was cut off is completed by another.

    Raises:
        InputError: the file is no such export, a line (named by number) says what no store can hold, or the project is
            there with another mode, another `simulated`, other guidelines or other content under the same name.
    """
    header, records, events = _read_export(path)
    project = _restored_project(store, header)
    added = store.add_items(project, records).added
    numbers = {item.key: item.id for item in store.items(project)}
    rows = [
        {"project_id": project.id, "item_id": numbers[event["item"]]} | {name: event[name] for name in EVENT_FIELDS}
        for event in events
    ]
    with store.database.write() as connection:
        query = sa.select(EVENT).where(EVENT.c.project_id == project.id)
        found = value_rows(connection, query, EVENT.c.key, [row["key"] for row in rows])
        known = {row.key: row._mapping for row in found}
        for row in rows:
            if (before := known.get(row["key"])) and any(
                before[name] != row[name] for name in ("item_id", *EVENT_FIELDS)
            ):
                raise InputError(
                    f"{path}: the key {row['key']} belongs to another event in project {project.name}: labels never "
                    "change; import into another store."
                )
        fresh = [row for row in rows if row["key"] not in known]
        for start in range(0, len(fresh), 1000):
            connection.execute(sa.insert(EVENT), fresh[start : start + 1000])
    store.replay(project)
    return Restored(store.project(project.name), added, len(fresh))


def _restored_project(store: LabelStore, header: Record) -> Project:
    name = header["name"]
    with store.database.write() as connection:
        row = connection.execute(sa.select(PROJECT).where(PROJECT.c.name == name)).one_or_none()
        if row is None:
            values = {column: header[column] for column in ("name", "simulated", "settings", "created")}
            number = connection.execute(sa.insert(PROJECT).values(values).returning(PROJECT.c.id)).scalar_one()
        elif (row.simulated, row.settings["mode"]) != (header["simulated"], header["settings"]["mode"]):
            raise InputError(
                f"Project {name} is there already with another mode, or with labels by people where these are "
                "simulated or the other way round: import into another store."
            )
        else:
            number = row.id
        query = sa.select(GUIDELINE).where(GUIDELINE.c.project_id == number)
        known = {each.version: each.text for each in connection.execute(query)}
        for guideline in header["guidelines"]:
            added = {column: guideline[column] for column in ("version", "text", "created")}
            if added["version"] not in known:
                connection.execute(sa.insert(GUIDELINE).values(added | {"project_id": number}))
            elif known[added["version"]] != added["text"]:
                raise InputError(
                    f"Project {name} is there already with another text as version {added['version']} of its "
                    "guidelines: import into another store."
                )
    return store.project(name)


def _read_export(path: str | Path) -> tuple[Record, list[Record], list[Record]]:
    """(header, comparisons, events) of an export, all checked."""
    lines = numbered_jsonl(path)
    header = lines[0][1]
    if header.get("format") != FORMAT:
        raise InputError(
            f"{path} is no exported project, its first line has the columns {_names(header)}: import comparisons as "
            "comparisons, or export a project first."
        )
    if header.get("version") != VERSION:
        raise InputError(
            f"{path} has version {header.get('version')!r} of the format, and this program knows {VERSION}: update the "
            "program."
        )
    records: list[Record] = []
    names: set[str] = set()
    items: dict[str, Item] = {}
    events: dict[str, Record] = {}
    for number, line in lines:
        try:
            if line is header:
                project = _header_project(header)
            elif isinstance(record := line.get("comparison"), dict):
                records.append(_checked_comparison(record))
                if record["id"] in names:
                    raise InputError(f"The comparison {record['id']} is there twice.")
                names.add(record["id"])
                items.update(_items(project, record))
            elif isinstance(event := line.get("event"), dict):
                _check_event(project, items, events, event)
                events[event["key"]] = event
            else:
                raise InputError(f"The columns are {_names(line)}, but comparison or event is wanted.")
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return header | {"settings": asdict(project.settings)}, records, list(events.values())


def _header_project(header: Record) -> Project:
    try:
        settings = Settings(**{**header["settings"], "criteria": tuple(header["settings"]["criteria"])})
        name, simulated, created = header["name"], header["simulated"], header["created"]
        guidelines = [(each["version"], each["text"], each["created"]) for each in header["guidelines"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"The project's line cannot be read ({error!r}): export the project again.") from None
    texts = [name, created, *(each for _, *rest in guidelines for each in rest)]
    fine = isinstance(simulated, bool) and all(isinstance(text, str) for text in texts) and name.strip()
    if not fine or not guidelines or [version for version, *_ in guidelines] != list(range(1, len(guidelines) + 1)):
        raise InputError("The project's name, guidelines or dates are not as an export has them: export it again.")
    return Project(0, name, simulated, settings, created, guidelines[-1][1], len(guidelines))


def _items(project: Project, record: Record) -> dict[str, Item]:
    """The items of a comparison by key, as `LabelStore.add_items` will make them."""
    found = {}
    answers = record["answers"]
    for group in itertools.combinations(
        range(len(answers)), 2 if project.settings.mode == "pairwise" else len(answers)
    ):
        key = f"{record['id']}:{'-'.join(map(str, group))}"
        payload = {"prompt": record["prompt"], "answers": [answers[i] for i in group]}
        found[key] = Item(0, key, record["id"], group, "", payload)
    return found


def _check_event(project: Project, items: Mapping[str, Item], earlier: Mapping[str, Record], event: Record) -> None:
    """Refuse what no store can hold, and a label of other texts than those in the file."""
    texts = ("item", *(name for name in EVENT_FIELDS if name != "body"))
    if not isinstance(event.get("body"), dict) or not all(
        isinstance(event.get(name), str) and event[name].strip() for name in texts
    ):
        raise InputError(f"An event has the columns {_names(event)}: the texts {', '.join(texts)} and body are wanted.")
    item, body, kind = items.get(event["item"]), event["body"], event["kind"]
    if item is None:
        raise InputError(f"The item {event['item']} is of no comparison above.")
    if event["key"] in earlier:
        raise InputError(f"The key {event['key']} is there twice.")
    if kind == "undo":
        undone = earlier.get(str(body.get("undoes")))
        if undone is None or any(undone[name] != event[name] for name in ("item", "annotator")):
            raise InputError(f"What it takes back, {body.get('undoes')!r}, is nothing the annotator did before.")
        return
    if kind not in ("label", "skip"):
        raise InputError(f"The kind is {kind!r}: label, skip or undo is wanted.")
    order = body.get("order")
    numbers = isinstance(order, list) and all(type(answer) is int for answer in order)
    if not numbers or sorted(order) != list(item.answers):
        raise InputError(f"The order is {order!r}: the item's answers are {list(item.answers)}.")
    if kind == "label":
        # The criteria may have changed since.
        check_judgement(project, item, {**body, "annotator": event["annotator"], "key": event["key"], "ratings": None})
    if body.get("shown", shown := shown_digest(item, order)) != shown:
        raise InputError("The label was given to other texts than those of the comparison above.")
