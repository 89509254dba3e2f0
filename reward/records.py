"""Preference records and the small file operations every stage shares.

A stage reads and writes JSONL with TRL's column names, so that any file is usable by TRL directly:

    demonstration  {prompt, completion, split}
    prompt         {prompt, split}
    comparison     {id, prompt, split, answers: [{text, model, sampling}]}
    preference     {prompt, chosen, rejected, margin, weight, annotators, strengths, chosen_index, comparison_id, split}

`prompt`, `completion`, `chosen` and `rejected` are conversations: lists of {"role", "content"}. Extra columns ride
along; that is how a checkpoint can name the labels and people behind it. `split` is "train" or "test": it is a
property of the prompt, fixed when the prompt enters the project and carried by every record made from it.

This module imports neither torch nor any of the model libraries.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Message = dict[str, str]
Record = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")


class InputError(ValueError):
    """The user's input is wrong. The message is one complete sentence: what, got, wanted, how to fix.

    The command line prints it without a traceback and exits with code 2.
    """


def read_jsonl(path: str | Path) -> list[Record]:
    """All records of a JSONL file, in order.

    Raises:
        InputError: the file is missing, empty, not UTF-8, or a line (named by number) is not a JSON object.
    """
    return [record for _, record in numbered_jsonl(path)]


def numbered_jsonl(path: str | Path) -> list[tuple[int, Record]]:
    """(line number from 1, record) of all records, in order; raises as `read_jsonl` does."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {what}: give the path of a JSONL file.")
    records = list(iter_jsonl(path))
    if not records:
        raise InputError(f"{path} is empty: a JSONL file with one JSON object per line is wanted.")
    return records


def iter_jsonl(path: Path) -> Iterator[tuple[int, Record]]:
    """(line number from 1, record) for every non-blank line."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8."
                ) from None
            if not line:
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                    "one complete JSON object per line is wanted."
                ) from None
            except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
                raise InputError(f"{path}, line {number}: JSON that cannot be read ({error}).") from None
            if not isinstance(record, dict):
                raise InputError(
                    f"{path}, line {number}: a JSON {type(record).__name__}, but an object like "
                    '{"prompt": ...} is wanted on every line.'
                )
            if "\\ud" in line.lower() and not _is_text(json.dumps(record, ensure_ascii=False)):
                raise InputError(
                    f"{path}, line {number}: holds half of a character (a lone \\ud800 to \\udfff escape); write the "
                    "whole character instead."
                )
            yield number, record


def _is_text(text: str) -> bool:
    """False for text with half of a surrogate pair, which JSON can spell but no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_jsonl(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSONL; the file appears whole or not at all."""
    write_atomically(Path(path), "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON document, indented for people; the file appears whole or not at all."""
    write_atomically(Path(path), json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader, or the next start after a crash, sees the old text or the new."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        # mkstemp makes files private; a run folder is as readable as the user's umask says.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces), as 64 hex digits."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes, as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prompt_text(prompt: Sequence[Message]) -> str:
    """The conversation as plain text, one "role: content" paragraph a turn; the identity of a prompt."""
    return "\n\n".join(f"{message['role']}: {message['content'].strip()}" for message in prompt)


def prompt_id(prompt: Sequence[Message]) -> str:
    """16 hex digits that name a prompt by its content, the same in every file and on every machine."""
    return hashlib.sha256(prompt_text(prompt).casefold().encode()).hexdigest()[:16]


def split_of(prompt: Sequence[Message], test_share: float) -> str:
    """The side of a prompt, "train" or "test", decided by its content alone.

    The first 8 hex digits of `prompt_id` are read as a number in [0, 1); below `test_share` is "test". Adding or
    reordering data therefore never moves a prompt across the border.
    """
    return "test" if int(prompt_id(prompt)[:8], 16) / 2**32 < test_share else "train"


def user_prompt(text: str, system: str | None = None) -> list[Message]:
    """A one-turn conversation from plain text."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": text}]


def assistant_answer(text: str) -> list[Message]:
    """A completion in conversational form from plain text."""
    return [{"role": "assistant", "content": text}]


def answer_text(completion: Sequence[Message] | str) -> str:
    """The text of a completion, given as a string or as one assistant message."""
    return completion if isinstance(completion, str) else "\n\n".join(m["content"] for m in completion)
