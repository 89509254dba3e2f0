"""check.json: what has been checked, by the digests of the files that were looked at.

`runs/<name>/check.json` holds, for every stage, the digest of each file, a digest of the settings that matter, and what
was found. A stage that starts with the same files and settings is not checked twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.check.findings import Finding
from align.check.reading import LABELLED
from align.check.templates import model_of
from align.config import STAGES, Config
from align.runs import done_digest, is_done
from reward.records import InputError, digest, file_digest, write_json

SCHEMA = 1
_OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def inputs(config: Config, stage: str) -> tuple[dict[str, str], str]:
    """(sha256 of every file that preflight of the stage looks at, digest of the settings that decide what it finds).

    Finished stages count as files: their folder with the digest of what they wrote.
    """
    data, files = config.data, {}
    places = [data.demonstrations, data.prompts, data.preferences, config.model.chat_template]
    places += [str(config.folder("label") / LABELLED)] if is_done(config.folder("label")) else []
    model = Path(model_of(config, stage))
    places += [str(model / name) for name in _OF_TOKENIZERS]
    for place in places:
        if place is not None and Path(place).is_file():
            files[place] = file_digest(place)
    for folder in [*(config.folder(name) for name in ("sft", "reward")), *map(Path, config.sample.policies)]:
        if is_done(folder):
            files[str(folder)] = done_digest(folder)
    sections = {name: config.section(name).model_dump(mode="json") for name in (stage, "data", "model")}
    label, seed = config.label.source, config.seed
    return files, digest([SCHEMA, sections, label, seed, config.stages, list(STAGES)])


def path_of(config: Config) -> Path:
    return config.folder("sft").parent / "check.json"


def known(config: Config, stage: str) -> dict[str, Any] | None:
    """What check.json says of the stage; None where it says nothing that can be read."""
    said = _read(path_of(config)).get(stage)
    if not isinstance(said, dict) or not said.keys() >= {"files", "settings", "refused", "warned"}:
        return None
    return said if isinstance(said["files"], dict) else None


def keep(config: Config, stage: str, looked_at: tuple[dict[str, str], str], findings: list[Finding]) -> None:
    """Write down what was found, beside what is known of the other stages.

    Raises:
        InputError: the folder cannot be written to.
    """
    files, settings = looked_at
    of = {level: [f.what for f in findings if f.level == level] for level in ("refused", "warned")}
    path = path_of(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        said = _read(path) | {stage: {"settings": settings, "files": files, **of}}
        write_json(path, {"schema": SCHEMA, "stages": dict(sorted(said.items()))})
    except OSError as error:
        raise InputError(
            f"cannot write to {path.parent}: {error.strerror}; set `runs` to a folder you can write to."
        ) from None


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """For people: which files are not what they were, with the beginnings of both digests."""
    return [
        f"{place} (sha256 was {before[place][:12]}, is {now[place][:12]})"
        for place in before
        if place in now and before[place] != now[place]
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    stages = told.get("stages") if isinstance(told, dict) and told.get("schema") == SCHEMA else None
    return stages if isinstance(stages, dict) else {}
