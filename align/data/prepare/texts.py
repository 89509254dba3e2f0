"""The texts inside a record: all changed alike, or read as prose, without code and addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from reward.records import Message, Record

# A fenced block runs to its closing fence, or to the end where it is never closed; "~~~ The end ~~~" begins none. Each
# pattern reads a text once.
_FENCED = (
    r"^[ \t]*(?P<fence>`{3,}|~{3,}(?=[ \t]*[\w+#.-]*[ \t]*$))[^`\n]*(?![^\n])"
    r"(?:\n(?![ \t]*(?P=fence))[^\n]*)*+(?:\n[ \t]*(?P=fence)[^\n]*)?"
)
FENCED = re.compile(_FENCED, re.MULTILINE)
CODE = re.compile(_FENCED + r"|`[^`\n]+`", re.MULTILINE)
_ADDRESS = re.compile(r"(?:https?://|www\.)[^\s<>\"')\]]+")

_CONVERSATIONS = ("prompt", "completion", "chosen", "rejected")


def with_texts(record: Record, change: Callable[[str], str]) -> Record:
    """The record with every turn and every answer of a comparison changed; the very same object where none is."""
    made: Record = {}
    for name in _CONVERSATIONS:
        if name in record and (turns := _changed(record[name], "content", change)) is not record[name]:
            made[name] = turns
    if "answers" in record and (answers := _changed(record["answers"], "text", change)) is not record["answers"]:
        made["answers"] = answers
    return {**record, **made} if made else record


def _changed(items: list[dict[str, Any]], key: str, change: Callable[[str], str]) -> list[dict[str, Any]]:
    texts = [change(item[key]) for item in items]
    if all(text == item[key] for text, item in zip(texts, items, strict=True)):
        return items
    return [{**item, key: text} for item, text in zip(items, texts, strict=True)]


def answer_of(record: Record) -> list[Message]:
    """What a row teaches to say, its completion or chosen answer; no turn for prompts and comparisons."""
    turns: list[Message] = record.get("completion") or record.get("chosen") or []
    return turns


def answer_text_of(record: Record) -> str:
    """The text of `answer_of`."""
    return "\n\n".join(turn["content"] for turn in answer_of(record))


def outside(pattern: re.Pattern[str], text: str, change: Callable[[str], str]) -> str:
    """The text with everything changed that the pattern (`CODE`, `FENCED`) does not match."""
    if "`" not in text and "~~~" not in text:
        return change(text)
    parts, start = [], 0
    for found in pattern.finditer(text):
        parts += [change(text[start : found.start()]), found.group()]
        start = found.end()
    return "".join([*parts, change(text[start:])])


def prose(text: str) -> str:
    """The text without code and addresses, each of which leaves a space."""
    if "`" in text or "~~~" in text:
        text = CODE.sub(" ", text)
    return _ADDRESS.sub(" ", text) if "http" in text or "www." in text else text
