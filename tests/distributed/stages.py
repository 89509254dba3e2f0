"""The program that the tests start under a launcher: `stages.py CONFIG JOB...` runs stage after stage.

A launch costs half a minute before anything happens, so one launch runs many stages. A JOB is
`STAGE NAME [KEY=VALUE]...` in one argument: the stage of the pipeline NAME, with these overrides.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align import ranks
from align.config_file import load_config
from align.generate import Partial
from align.pipeline import run_stage

SAMPLED = "sampled-{}.json"  # the numbers of the batches that a process sampled for a pipeline's stage


def run(path: Path, job: str) -> None:
    stage, name, *overrides = job.split()
    config = load_config(path, [f"name={name}", *overrides])
    unset_hf_deepspeed_config()  # what a process that has just been started knows of ZeRO-3: nothing yet
    numbers: list[tuple[str, int]] = []
    add = Partial.add

    def noted(self: Partial, number: int, rows: list[Any]) -> None:
        numbers.append((self.path.parent.name, number))
        add(self, number, rows)

    Partial.add = noted
    try:
        run_stage(config, stage)
    finally:
        Partial.add = add
    (Path(config.runs) / name / SAMPLED.format(ranks.rank())).write_text(json.dumps(numbers))


def hold_nothing_whole() -> None:
    """Under ZeRO-3: DeepSpeed keeps small weights whole after their first use, and all of a tiny model's are small."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return
    from accelerate.utils import DeepSpeedPlugin

    made = DeepSpeedPlugin.__post_init__

    def post_init(self: DeepSpeedPlugin) -> None:
        made(self)
        if self.zero_stage == 3:
            self.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = post_init


if __name__ == "__main__":
    hold_nothing_whole()
    try:
        for one in sys.argv[2:]:
            run(Path(sys.argv[1]), one)
    finally:
        ranks.leave()
