"""Conversations and answers out of the columns of a row, checked turn by turn.

Every function takes the row's place in its file ("d.jsonl, line 7") for its messages, and raises `InputError` for what
is malformed. `CannotHold` is for a row that is sound, and says more than a record can: it is left out and listed.
"""

from __future__ import annotations

import re
from typing import Any

from reward.records import ROLES, InputError, Message, Record, assistant_answer, user_prompt


class CannotHold(ValueError):
    """A sound row that has no place in what it is to become; the message follows "2 rows", as in "with a tie"."""


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
        raise InputError(f"{where}: a conversation is text or a list of {{role, content}}, but this is {short(value)}.")
    turns = []
    for turn in value:
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise InputError(f"{where}: role {role!r} is unknown; the roles are {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise InputError(f"{where}: the content of a {role} turn is {short(content)}, but text is wanted.")
        turns.append({"role": role, "content": content})
    return turns


def prompt_of(row: Record, column: str, where: str) -> list[Message]:
    """The prompt in a column: text, turns, or text of Human: and Assistant: turns that ends where the answer begins."""
    value = column_of(row, column, where)
    if isinstance(value, str) and (turns := _open_dialogue(value)):
        return turns
    return conversation(value, where)


def asks(prompt: list[Message], where: str) -> list[Message]:
    """The prompt, which must end with a turn that wants an answer."""
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        last = prompt[-1]["role"] if prompt else "nothing"
        raise InputError(f"{where}: a prompt must end with a user turn, but this one ends with {last}.")
    return prompt


def answer_of(row: Record, column: str, where: str, prompt: list[Message]) -> list[Message]:
    """One assistant turn from text or turns; where the turns repeat the whole prompt first, what follows it."""
    value = column_of(row, column, where)
    if isinstance(value, str):
        return assistant_answer(value)
    turns = conversation(value, where)
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in conversation(value, where))
        raise InputError(
            f"{where}: `{column}` should be one assistant turn beside its prompt, but its turns are: {roles}."
        )
    return turns


def instruction_of(row: Record, where: str) -> list[Message]:
    """The turns of an instruction: `system` and `history` ([[user, assistant], ...]) first, where there are any.

    An input stands below its instruction, after an empty line.
    """
    instruction = text_of(row, "instruction", where)
    extra = "" if row.get("input") is None else text_of(row, "input", where).strip()
    if not instruction.strip():
        raise InputError(f"{where}: the instruction is empty; give it some text or remove the row.")
    system = "" if row.get("system") is None else text_of(row, "system", where)
    turns = [{"role": "system", "content": system}] if system.strip() else []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(
                f"{where}: `history` holds {short(pair)}, but pairs [user, assistant] of texts are wanted."
            )
        turns += [*user_prompt(pair[0]), *assistant_answer(pair[1])]
    return turns + user_prompt(f"{instruction.strip()}\n\n{extra}" if extra else instruction)


def pair_of(row: Record, column: str, where: str) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected); `column` is that of the prompt, or "" for chosen and rejected as whole dialogues.

    Raises:
        CannotHold: the answers are identical, the better one is empty, or the dialogues do not share their prompt.
    """
    if column:
        asked = instruction_of(row, where) if column == "instruction" else prompt_of(row, column, where)
        prompt = asks(asked, where)
        chosen, rejected = (answer_of(row, side, where, prompt) for side in ("chosen", "rejected"))
    else:
        first, second = (dialogue_of(row, side, where) for side in ("chosen", "rejected"))
        if first[:-1] != second[:-1]:
            raise CannotHold("whose chosen and rejected dialogues do not share their prompt")
        prompt, chosen, rejected = asks(first[:-1], where), first[-1:], second[-1:]
    if chosen[0]["content"].strip() == rejected[0]["content"].strip():
        raise CannotHold("with identical chosen and rejected")
    if not chosen[0]["content"].strip():
        raise CannotHold("with an empty chosen answer")
    return prompt, chosen, rejected


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_NAMES = {"Human": "user", "Assistant": "assistant"}


def dialogue_of(row: Record, column: str, where: str) -> list[Message]:
    """A whole dialogue that ends with an assistant turn, from a conversation or from Human:/Assistant: text."""
    value = column_of(row, column, where)
    if isinstance(value, str):
        before, turns = _spoken(value)
        if len(turns) < 2:
            raise InputError(
                f"{where}: `{column}` is text without a prompt: wanted are a `prompt` column beside it, or turns that "
                "begin with Human: and Assistant:."
            )
        if before:
            raise InputError(
                f"{where}: `{column}` has text before its first turn, {short(before)}: begin it with Human:."
            )
    else:
        turns = conversation(value, where)
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{where}: `{column}` must end with an assistant turn, but ends with {turns[-1]['role']}.")
    return turns


def _spoken(text: str) -> tuple[str, list[Message]]:
    """(text before the first turn, turns) of Human:/Assistant: text."""
    before, *parts = _TURN.split(text)
    named = zip(parts[::2], parts[1::2], strict=True)
    return before.strip(), [{"role": _NAMES[name], "content": content.strip()} for name, content in named]


def _open_dialogue(text: str) -> list[Message] | None:
    """The turns of "Human: ... Assistant:", whose last turn is still to be written; None for any other text."""
    before, turns = _spoken(text)
    fine = len(turns) > 1 and not before and turns[0]["role"] == "user" and turns[-2]["role"] == "user"
    return turns[:-1] if fine and turns[-1] == {"role": "assistant", "content": ""} else None


def column_of(row: Record, column: str, where: str) -> Any:
    """The value of a column that must be there and not null."""
    if row.get(column) is None:
        raise InputError(f"{where}: column `{column}` is missing; the row has {', '.join(sorted(row)) or 'none'}.")
    return row[column]


def text_of(row: Record, column: str, where: str) -> str:
    """The text in a column."""
    value = column_of(row, column, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: `{column}` is {short(value)}, but text is wanted.")
    return value


def check_measures(answers: list[Record], where: str) -> None:
    """Refuse answers whose rank or score is there and no number."""
    for answer in answers:
        for measure in ("rank", "score"):
            value = answer.get(measure)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise InputError(f"{where}: the {measure} of an answer is {short(value)}, but a number is wanted.")


def short(value: Any) -> str:
    """A value for a message, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
