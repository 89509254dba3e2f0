"""How a row of each format becomes records; `align.data.formats` says which reader reads which format.

A reader takes a row and its place, and gives records of the kind that the format holds by itself. Columns that it does
not use ride along. It raises `InputError` for what is malformed, and `CannotHold` for a sound row that says more than a
record can.
"""

from __future__ import annotations

import json
from typing import Any

from align.data.kinds import OWN
from align.data.turns import (
    CannotHold,
    answer_of,
    asks,
    check_measures,
    conversation,
    dialogue_of,
    instruction_of,
    pair_of,
    prompt_of,
    short,
    text_of,
)
from labeling_ui.comparisons import answer_columns, read_comparisons
from reward.records import InputError, Message, Record, assistant_answer, digest

# What the readers share


def _rest(row: Record, *used: str) -> Record:
    """The columns that ride along: those that were not used, and that no record has for its own."""
    return {column: value for column, value in row.items() if column not in used and column not in OWN}


_WEIGHTED = frozenset({"role", "content", "from", "value", "weight"})


def _plain(turns: Any) -> None:
    """Leave a row out whose turns say more than a role and a text, such as tool calls."""
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict):
            for key, value in turn.items():
                if key not in _WEIGHTED and value not in (None, [], {}):
                    raise CannotHold(f"with `{key}` in a turn, which no record holds")


def _weighed(turns: Any) -> None:
    """Leave a row out whose weights train other answers than the last one, which is all that a demonstration trains."""
    weights = [t.get("weight") for t in turns if isinstance(t, dict) and t.get("role", t.get("from")) in _ANSWERING]
    if weights and weights[-1] is not None and weights[-1] != 1:
        raise CannotHold("whose last answer has a weight other than 1")
    if any(weight not in (None, 0) for weight in weights[:-1]):
        raise CannotHold("with a weight on an answer before the last: a demonstration trains the last one alone")


def _without_tools(row: Record) -> None:
    if used := [name for name in ("tools", "functions") if row.get(name)]:
        raise CannotHold(f"with `{used[0]}`, which no record holds")


def _turns_record(turns: list[Message], where: str) -> Record:
    """A demonstration where the turns end with an answer, else a prompt."""
    if turns[-1]["role"] == "assistant":
        return {"prompt": asks(turns[:-1], where), "completion": turns[-1:]}
    return {"prompt": asks(turns, where)}


# TRL


def from_prompt(row: Record, where: str) -> list[Record]:
    _plain(row["prompt"])
    turns = prompt_of(row, "prompt", where)
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return [{"prompt": asks(turns, where), **_rest(row, "prompt")}]


def from_completion(row: Record, where: str) -> list[Record]:
    _plain(row["prompt"])
    _plain(row["completion"])
    _without_tools(row)
    prompt = asks(prompt_of(row, "prompt", where), where)
    record = {"prompt": prompt, "completion": answer_of(row, "completion", where, prompt)}
    return [record | _rest(row, "prompt", "completion")]


_TRUTHS = {"true": True, "false": False}


def from_unpaired(row: Record, where: str) -> list[Record]:
    label = row["label"]
    truth = _TRUTHS.get(label.lower()) if isinstance(label, str) else label
    if not isinstance(truth, bool):
        raise InputError(f"{where}: `label` is {short(label)}, but true or false is wanted.")
    [record] = from_completion(row, where)
    return [{**record, "label": truth}]


def from_messages(row: Record, where: str) -> list[Record]:
    _without_tools(row)
    _plain(row["messages"])
    turns = conversation(row["messages"], where)
    _weighed(row["messages"])
    return [_turns_record(turns, where) | _rest(row, "messages")]


def from_pair(column: str, row: Record, where: str) -> list[Record]:
    _without_tools(row)
    for name in (column, "chosen", "rejected"):
        _plain(row.get(name))
    prompt, chosen, rejected = pair_of(row, column, where)
    used = ("input", "system", "history") if column == "instruction" else ()
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected} | _rest(row, column, "chosen", "rejected", *used)
    ]


def from_text(row: Record, where: str) -> list[Record]:
    return [_turns_record(dialogue_of(row, "text", where), where) | _rest(row, "text")]


# Alpaca, ShareGPT, OpenAI


def from_instruction(row: Record, where: str) -> list[Record]:
    record: Record = {"prompt": instruction_of(row, where)}
    if row.get("output") is not None:
        record["completion"] = assistant_answer(text_of(row, "output", where))
    return [record | _rest(row, "instruction", "input", "output", "system", "history")]


_FROM = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_ANSWERING = {name for name, role in _FROM.items() if role == "assistant"}


def _mapped(value: Any, where: str) -> Any:
    """Turns {from, value} as turns {role, content}."""
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{where}: a conversation is a list of {{from, value}}, but this is {short(value)}.")
    _plain(turns)
    mapped = []
    for turn in turns:
        name = turn.get("from", turn.get("role"))
        if not isinstance(name, str) or name not in _FROM:
            raise InputError(f"{where}: a turn is from {name!r}, which is unknown; known are {', '.join(_FROM)}.")
        mapped.append({"role": _FROM[name], "content": turn.get("value", turn.get("content"))})
    return mapped


def from_sharegpt(row: Record, where: str) -> list[Record]:
    _without_tools(row)
    turns = conversation(_mapped(row["conversations"], where), where)
    if system := row.get("system"):
        if turns[0]["role"] == "system":
            raise CannotHold("with a column `system` beside a system turn")
        turns = [{"role": "system", "content": text_of({"system": system}, "system", where)}, *turns]
    rest = _rest(row, "conversations", "system", "chosen", "rejected")
    if row.get("chosen") is None or row.get("rejected") is None:
        _weighed(row["conversations"])
        return [_turns_record(turns, where) | rest]
    given = {side: row[side] for side in ("chosen", "rejected")}
    sides = {side: text if isinstance(text, str) else _mapped(text, where) for side, text in given.items()}
    prompt, chosen, rejected = pair_of({"prompt": turns, **sides}, "prompt", where)
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} | rest]


def from_openai_pair(row: Record, where: str) -> list[Record]:
    asked = row["input"]
    _without_tools(asked)
    pair = {"prompt": asked.get("messages"), "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    for turns in pair.values():
        _plain(turns)
    prompt, chosen, rejected = pair_of(pair, "prompt", where)
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return [record | _rest(row, "input", "preferred_output", "non_preferred_output")]


# Several answers

_LISTS = ("answers", "completions", "responses")
_TEXTS = ("text", "response", "answer", "completion", "content")
_MEASURES = {"overall_score": "score"}


def from_several_answers(row: Record, where: str) -> list[Record]:
    column = next(name for name in _LISTS if row.get(name) is not None)
    instructed = row.get("prompt") is None
    prompt = asks(instruction_of(row, where) if instructed else prompt_of(row, "prompt", where), where)
    if not isinstance(row[column], list):
        raise InputError(f"{where}: `{column}` is {short(row[column])}, but a list of answers is wanted.")
    answers = [_one_answer(answer, column, where) for answer in row[column]]
    used = ["id", "prompt", column]
    used += ["instruction", "input", "system", "history"] if instructed else []
    for name, measure in (("ranks", "rank"), ("scores", "score")):
        if (given := row.get(name)) is not None:
            if not isinstance(given, list) or len(given) != len(answers):
                raise InputError(f"{where}: `{name}` is {short(given)}, but one for each of `{column}` is wanted.")
            answers = [{**answer, measure: value} for answer, value in zip(answers, given, strict=True)]
            used.append(name)
    check_measures(answers, where)
    number = row.get("id")
    number = digest({"prompt": prompt, "answers": answers})[:16] if number in (None, "") else str(number)
    return [{"id": number, "prompt": prompt, "answers": answers} | _rest(row, *used)]


def _one_answer(answer: Any, column: str, where: str) -> Record:
    given = {"text": answer} if isinstance(answer, str) else answer
    name = next((name for name in _TEXTS if isinstance(given, dict) and isinstance(given.get(name), str)), None)
    if name is None:
        raise InputError(
            f"{where}: `{column}` holds {short(answer)}, but texts, or objects with one of {', '.join(_TEXTS)}, are "
            "wanted."
        )
    more = {_MEASURES.get(key, key): value for key, value in given.items() if key != name and value is not None}
    return {"text": given[name]} | more


def from_labelling_tool(row: Record, where: str) -> list[Record]:
    """Argilla, Label Studio and columns answer_1, answer_2, ...: as the labelling app takes them in."""
    given = row
    for inner in ("data", "metadata", "fields"):
        given = given | (row[inner] if isinstance(row.get(inner), dict) else {})
    if sum(given[column] not in (None, "") for column in answer_columns(given)) == 1:
        raise CannotHold("with one answer, which is no choice")
    try:
        [record], _ = read_comparisons(json.dumps(row).encode(), "row")
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('row, line 1: ')}") from None
    kept = {"prompt": record["prompt"], "answers": record["answers"]}
    return [{"id": record["id"], **kept, **_rest(record, "id", *([] if given.get("split") else ["split"]))}]
