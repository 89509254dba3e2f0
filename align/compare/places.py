"""What `compare.models` and `compare.judges` name outside the pipeline, looked at without loading anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.config import POLICIES, Config
from align.config_file import config_of
from align.policies import run_folder
from align.runs import done_digest
from reward.records import InputError, file_digest

OF_PIPELINE = ("base", *POLICIES)
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


def run_folders(config: Config) -> list[str]:
    """Run folders of compared models from elsewhere: parents of the stage, as the pipeline's own are."""
    places = [place for place in config.compared_models() if place not in OF_PIPELINE]
    return [str(folder) for place in places if (folder := run_folder(place))]


def weights_and_files(config: Config) -> dict[str, Any]:
    """Digests of what else is compared or judges: files of answers, and the weights of plain model folders."""
    inputs: dict[str, Any] = {}
    for place in config.compare.judges or []:
        if judge := run_folder(place):
            inputs[f"judge {place}"] = done_digest(judge)
    for place in [*config.compared_models(), *(config.compare.judges or [])]:
        path = Path(place)
        if place in OF_PIPELINE or run_folder(place) or not path.exists():
            continue
        for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
            inputs[f"file {file}"] = file_digest(file)
    for task in config.compare.tasks:
        if Path(task).is_file():
            inputs[f"file {task}"] = file_digest(task)
    return inputs


def free_comparison(given: Sequence[str]) -> Config:
    """The config of `align compare MODEL MODEL... KEY=VALUE...`: one stage, in a run folder named after the models.

    Raises:
        InputError: fewer than two models, no prompts, or an override that does not fit.
    """
    places = [each for each in given if not OVERRIDE.match(each)]
    overrides = [each for each in given if OVERRIDE.match(each)]
    if len(places) < 2:
        raise InputError(
            f"compare has {len(places)} model ({', '.join(places)}), and at least 2 are wanted: give a pipeline's YAML "
            "file, or two models, such as `align compare runs/a/5-dpo runs/b/6-ppo data.prompts=prompts.jsonl`."
        )
    raw: dict[str, Any] = {
        "name": "-against-".join(_slug(place) for place in reversed(places)),
        "stages": ["compare"],
        "model": {"base": places[0]},
        "compare": {"models": places},
    }
    config = config_of(raw, overrides)
    if not config.data.prompts and not config.data.demonstrations:
        raise InputError("compare needs prompts: add data.prompts=FILE (JSONL with a prompt a line).")
    return config


def _slug(place: str) -> str:
    """A short name for a run folder: the last parts of a path that say something."""
    folder = run_folder(place)
    path = folder or Path(place)
    parts = [path.parent.name, path.name] if folder else [path.stem if path.suffix == ".jsonl" else path.name]
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts)).strip("-._") or "model"
