"""Preflight of one stage: its rows are read as it will read them, and tested as texts and as tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.check import texts
from align.check.adapters import adapter_fits
from align.check.findings import Finding, refused
from align.check.reading import Reader, Rows
from align.check.templates import alike, model_of, places_of, tokenizer_of
from align.check.tokens import Limits, control_tokens, look
from align.config import PREPARE, Config
from align.config_data import DATA_KEYS
from align.data.convert import LOOKED_AT
from align.data.files import open_source
from align.data.formats import recognise
from align.data.kinds import check_possible, kind_of
from align.data.load import only
from align.data.names import Kind
from align.data.turns import CannotHold
from align.runs import is_done
from reward.records import InputError

KINDS: dict[str, Kind] = {"demonstrations": "demonstration", "prompts": "prompt", "preferences": "preference"}
# The sides of its rows that a stage cannot do without.
_SIDES = {"sft": ("train",), "label": ("train", "test"), "reward": ("train", "test"), "dpo": ("train", "test")}


@dataclass(frozen=True)
class Checked:
    """What was looked at and found. `told` is empty where the stage's input is still to be made."""

    stage: str
    told: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def check_stage(config: Config, stage: str) -> list[Finding]:
    """What is wrong with what a stage would train, sample or compare on, as it is on disk now; nothing where another
    stage will make it later."""
    return Preflight(config).examine(stage).findings


class Preflight:
    """Examines the stages of one config; files and tokenizers are read once for all of them."""

    def __init__(self, config: Config) -> None:
        self.given = config
        self.config = config.prepared()
        self.reader = Reader(self.config)
        self._tokenizers: dict[str, Any] = {}  # by the folder of the model
        self._texts: dict[tuple[int, str], list[Finding]] = {}  # by the rows and the tokenizer's folder

    def examine(self, stage: str) -> Checked:
        """Look at everything that the stage reads. What reading itself refuses is a finding too."""
        try:
            if stage == PREPARE:
                return Checked(stage, *_sources(self.given))
            if self.given.prepare is not None and not is_done(self.given.folder(PREPARE)):
                return Checked(stage)
            found = self.reader.of(stage)
            if not found:
                return Checked(stage)
            for side in _SIDES.get(stage, ()):
                only(side, found[0].records, f"{found[0].kind}s")
            if stage == "label":  # its rows are looked at in full by the stages that train on them
                return Checked(stage, [found[0].told], texts.left_out(stage, found[0]))
            tokenizer = self._tokenizer(stage)
            findings = [*alike(self.config, stage, tokenizer), *adapter_fits(self.config, stage)]
            told = []
            for rows in found:
                findings += self._of_texts(stage, rows, tokenizer)
                said, more = self._of_tokens(stage, rows, tokenizer)
                findings += more
                told.append(said)
        except InputError as error:
            return Checked(stage, findings=[refused(stage, str(error))])
        return Checked(stage, told, findings)

    def _tokenizer(self, stage: str) -> Any:
        place = model_of(self.config, stage)
        if place not in self._tokenizers:
            self._tokenizers[place] = tokenizer_of(self.config, stage)
        return self._tokenizers[place]

    def _foreign(self, stage: str) -> bool:
        """Whether the stage's model reads pairs in a way of its own, which is built with the model."""
        return stage == "reward" and self.config.reward.base is not None

    def _of_texts(self, stage: str, rows: Rows, tokenizer: Any) -> list[Finding]:
        key = id(rows), model_of(self.config, stage)
        known = self._texts.get(key)
        if known is None:
            known = [*texts.of_both_sides(stage, rows, self._others()), *texts.left_out(stage, rows)]
            if rows.kind != "prompt":
                known += texts.repeated(stage, rows)
            if rows.kind == "preference":
                known += texts.contradicted(stage, rows)
                known += texts.unlike_only_in_case(stage, rows)
                known += texts.exchanged(stage, rows, self.config.seed)
            known += texts.rendered_before(stage, rows)
            if not self._foreign(stage):
                known += texts.control_tokens_in(stage, rows, *control_tokens(tokenizer))
            if rows.path is not None:  # those of a file live as long as this; an id may be used again else
                self._texts[key] = known
        return [replace(finding, stage=stage) for finding in known]

    def _others(self) -> list[Rows]:
        """All files of the pipeline that hold prompts. One that cannot be read is its own stage's to refuse."""
        try:
            return self.reader.files()
        except InputError:
            return []

    def _of_tokens(self, stage: str, rows: Rows, tokenizer: Any) -> tuple[str, list[Finding]]:
        if self._foreign(stage):
            return rows.told, []
        limits = limits_of(self.config, stage, rows.kind)
        seen = look(stage, rows, tokenizer, limits, self.config.seed)
        longest = f"{seen.longer:,} too long, the longest other one has {seen.longest:,} of {limits.longest:,}"
        return f"{rows.told}; {seen.rows:,} looked at as tokens: {longest}", seen.findings


def limits_of(config: Config, stage: str, kind: Kind) -> Limits:
    """How many tokens the stage takes of rows of this kind, and which key says so."""
    section: Any = config.section(stage)
    key, longest, room = f"{stage}.max_length", 0, 0
    if stage in ("sft", "reward", "dpo"):
        longest = section.max_length
    else:
        room = section.response_length if stage == "ppo" else section.max_new_tokens
        key, longest = f"{stage}.max_prompt_length", section.max_prompt_length
        if kind == "demonstration":  # mixed into ppo: prompt and answer have the room of an episode
            longest, room = longest + room, 0
    return Limits(key, longest, room, places_of(config, stage), config.data.too_long_share)


def _sources(config: Config) -> tuple[list[str], list[Finding]]:
    """(for people, findings): whether what prepare is to read can be read as what it is to become."""
    told, found = [], []
    for key in DATA_KEYS:
        for source in config.sources(key):
            try:
                told.append(f"{source.title}: {_recognised(source.path, KINDS[key])}")
            except InputError as error:
                found.append(refused(PREPARE, str(error)))
    return told, found


def _recognised(path: str, kind: Kind) -> str:
    """What the first rows of a place are."""
    source = open_source(Path(path) if Path(path).exists() else path)
    if source.container == "a hub dataset":
        return "a dataset of the hub, which prepare fetches"
    rows = list(itertools.islice(source.rows(), LOOKED_AT))
    known = recognise(rows)
    for where, row in [] if known.gather else rows:
        try:
            [record, *_] = known.read(row, where)
        except CannotHold:
            continue
        check_possible(kind_of(record), kind)
        break
    return f"{source.container}, read as {known.name}"
