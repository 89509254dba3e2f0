"""The rows that a stage reads, through the functions by which the stage itself reads them.

A file that several stages read is read once. Where a record came from is found out only when there is something to say
about it: the file is then gone through again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.config import Config
from align.data.files import open_source
from align.data.load import Loaded, load_demonstrations, load_preferences, load_prompts, only, unique_prompts
from align.data.names import Kind
from align.data.turns import short
from align.runs import is_done
from reward.records import InputError, Message, Record, read_jsonl

LABELLED = "preferences.jsonl"  # in the folder of the label stage


def key_of(turns: Sequence[Message]) -> bytes:
    """16 bytes that name turns by what they say, whatever their case and white space."""
    said = "\0".join(f"{turn['role']}\1{' '.join(turn['content'].casefold().split())}" for turn in turns)
    return hashlib.blake2b(said.encode(), digest_size=16).digest()


@dataclass
class Rows:
    """Records of one kind as a stage reads them.

    path: the file they are from; None for prompts gathered from several files.
    key: the config key that names the file, or the file's own path.
    dropped: rows that reading left out, `{reason, record}`, in the file's order.
    told: how many there are, for people.
    """

    kind: Kind
    key: str
    records: list[Record]
    path: Path | None = None
    dropped: list[Record] = field(default_factory=list)
    told: str = ""
    _keys: dict[str, list[bytes]] = field(default_factory=dict, repr=False)

    def keys(self, column: str) -> list[bytes]:
        """`key_of` of a column of every record, made once."""
        if column not in self._keys:
            self._keys[column] = [key_of(record[column]) for record in self.records]
        return self._keys[column]

    def place(self, index: int) -> str:
        """Where a record stands, such as "d.jsonl, line 7"; gathered prompts are named by how they begin."""
        if self.path is None:
            return f"the prompt {short(self.records[index]['prompt'][-1]['content'])}"
        gone = [dropped["record"] for dropped in reversed(self.dropped)]
        number = -1
        for where, row in open_source(self.path).rows():
            if gone and row == gone[-1]:  # reading drops rows by what they say, so equal rows were dropped alike
                gone.pop()
                continue
            number += 1
            if number == index:
                return where
        raise AssertionError(f"{self.path} has no record {index}")


class Reader:
    """Reads the files of a config, each once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._known: dict[str, Rows] = {}

    def of(self, stage: str) -> list[Rows]:
        """What a stage reads as it is on disk now; nothing where another stage makes it later.

        Raises:
            InputError: a file is missing or malformed, or the config names none, as the stage itself would say.
        """
        config = self.config
        if stage == "sft":
            needed = "sft needs data.demonstrations: the path of a JSONL file of prompts with good answers."
            return [self.demonstrations(needed)]
        if stage == "sample" or config.stages == ["compare"]:
            return [self.gathered()]
        if stage == "compare":
            return [of_side(self.gathered(), "test")]
        if stage == "ppo":
            mixed = "ppo.ptx_coef mixes demonstrations in: set data.demonstrations."
            more = [self.demonstrations(mixed)] if config.ppo.ptx_coef > 0 else []
            return [of_side(self.gathered(), "train"), *more]
        if stage == "label":
            return [self.preferences()] if config.label.source == "dataset" else []
        if stage in ("reward", "dpo"):
            if is_done(config.folder("label")):
                return [self.labelled()]
            return [self.preferences()] if config.label.source == "dataset" else []
        return []

    def demonstrations(self, needed: str) -> Rows:
        path = self.config.data.demonstrations
        if path is None:
            raise InputError(needed)
        return self._file("demonstration", "data.demonstrations", path)

    def preferences(self) -> Rows:
        path = self.config.data.preferences
        if path is None:
            raise InputError(
                "label.source is dataset, but data.preferences is not set: give the path of a JSONL file of pairs."
            )
        return self._file("preference", "data.preferences", path)

    def labelled(self) -> Rows:
        """The preferences of the finished label stage."""
        path = self.config.folder("label") / LABELLED
        if str(path) not in self._known:
            records = read_jsonl(path)
            self._known[str(path)] = Rows(
                "preference", str(path), records, path, told=f"{len(records)} pairs, labelled"
            )
        return self._known[str(path)]

    def gathered(self) -> Rows:
        """Every prompt the pipeline knows, once, as `align.sample.gather_prompts` gathers them."""
        if "prompts" not in self._known:
            files = self.files()
            if not files:
                raise InputError("there are no prompts: set data.prompts, data.demonstrations or data.preferences.")
            records = unique_prompts(*(rows.records for rows in files))
            named = ", ".join(rows.key for rows in files)
            self._known["prompts"] = Rows("prompt", named, records, told=f"{len(records)} prompts of {named}")
        return self._known["prompts"]

    def files(self) -> list[Rows]:
        """The files of records that the pipeline knows prompts from, in the order in which prompts are gathered."""
        data = self.config.data
        found = []
        if data.prompts:
            found.append(self._file("prompt", "data.prompts", data.prompts))
        if data.demonstrations:
            found.append(self._file("demonstration", "data.demonstrations", data.demonstrations))
        if self.config.label.source == "dataset" and data.preferences:
            found.append(self._file("preference", "data.preferences", data.preferences))
        return found

    def _file(self, kind: Kind, key: str, path: str) -> Rows:
        if key not in self._known:
            if not Path(path).is_file():
                raise InputError(f"{key}: {path} does not exist: give the path of a JSONL file.")
            load = {"demonstration": load_demonstrations, "prompt": load_prompts, "preference": load_preferences}[kind]
            data = self.config.data
            loaded: Loaded = load(path, data.test_share, data.max_rows)
            told = f"{Path(path).name}: {loaded.sentence()}"
            self._known[key] = Rows(kind, key, loaded.records, Path(path), loaded.dropped, told)
        return self._known[key]


def of_side(rows: Rows, side: str) -> Rows:
    """The prompts of one side, train or test.

    Raises:
        InputError: there are none.
    """
    records = only(side, rows.records, f"{rows.kind}s")
    return Rows(rows.kind, rows.key, records, told=f"{len(records)} prompts of the {side} side of {rows.key}")
