"""Runs stages in processes of their own, ends them at random moments, goes on until they are done, and compares.

    killing.py FOLDER SEED JOB...        a JOB is STAGE:SIGNAL:MOMENT:COUNT, such as dpo:KILL:save:3

FOLDER holds `tiny.yaml`; the runs that nobody disturbs are under `whole`, the others under `ended`. A MOMENT is `any`
or `save`: as soon as a half-written checkpoint is seen. Prints one JSON object a job.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from forking import import_all, start, wait

from align.checkpoints import COMPLETE
from align.config import Config
from align.config_file import load_config

LIMIT = 120.0  # seconds for a run of a tiny stage
# What holds times, places, or the figures of one process.
NOT_COMPARED = {"run.json", "config.yaml", "DONE", ".lock", "metrics.jsonl", "training_args.bin", "labels.sqlite"}
NOT_COMPARED |= {"report.json", "report.html", "model_card.md", "trust.html", "trust.json"}


class Broken(Exception):
    """What was promised did not hold."""


def align(folder: Path, runs: str, stage: str) -> int:
    """Start `align STAGE`; returns the number of the process."""
    arguments = [stage, str(folder / "tiny.yaml"), f"runs={folder / runs}"]
    return start(arguments, folder / "log.txt", {}, {})


def half_written(run: Path) -> bool:
    return any(not (path / COMPLETE).exists() for path in run.glob("work/checkpoints/checkpoint-*"))


def end(pid: int, number: int, moment: str, after: float, run: Path) -> int | None:
    """End a run at a moment; None if it was done before. Otherwise its exit code."""
    started = time.monotonic()
    while time.monotonic() - started < (LIMIT if moment == "save" else after):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            if (code := os.waitstatus_to_exitcode(status)) != 0:
                raise Broken(f"a run that nobody disturbed ended with {code}")
            return None
        if moment == "save" and half_written(run):
            time.sleep(random.uniform(0, 0.01))
            break
        time.sleep(0.0005)
    os.kill(pid, number)
    return wait(pid)


def job(folder: Path, stage: str, number: int, moment: str, count: int) -> dict[str, Any]:
    """End runs of a stage `count` times, going on each time, and compare whenever one is done."""
    whole, ended = (load_config(folder / "tiny.yaml", [f"runs={folder / name}"]) for name in ("whole", "ended"))
    seconds = undisturbed(folder, whole, stage)
    run = ended.folder(stage)
    done = {"signals": 0, "in_a_save": 0, "compared": 0, "resumed": 0}
    while done["signals"] < count or run.exists():
        before = bool(list(run.glob("work/checkpoints/*/" + COMPLETE)))
        pid = align(folder, "ended", stage)
        if done["signals"] < count:
            code = end(pid, number, moment, random.uniform(0, seconds), run)
        else:
            code = None if wait(pid) == 0 else 1
        done["resumed"] += before
        if code is None:
            compare(whole.folder(stage), run)
            shutil.rmtree(run)
            done["compared"] += 1
            continue
        done["signals"] += 1
        done["in_a_save"] += half_written(run)
        check_ended(code, number, run)
    return {
        "stage": stage,
        "signal": signal.Signals(number).name,
        "moment": moment,
        "seconds": round(seconds, 1),
        **done,
    }


def undisturbed(folder: Path, config: Config, stage: str) -> float:
    """Run the stage once by itself, unless it has been; its parents are linked for the runs to be disturbed."""
    started = time.monotonic()
    run = config.folder(stage)
    if not (run / "DONE").exists() and wait(align(folder, "whole", stage)):
        raise Broken(f"{stage} failed by itself")
    if not (run / "SECONDS").exists():
        (run / "SECONDS").write_text(str(time.monotonic() - started))
    place = folder / "ended" / run.parent.name
    place.mkdir(parents=True, exist_ok=True)
    for parent in run.parent.iterdir():
        if parent != run and not (place / parent.name).exists():
            (place / parent.name).symlink_to(parent)
    if (place / run.name).is_symlink():
        (place / run.name).unlink()
    return float((run / "SECONDS").read_text())


def check_ended(code: int, number: int, run: Path) -> None:
    if (run / "DONE").exists():
        return  # it was ended on its way out
    if number == signal.SIGKILL:
        wanted = -number
    else:
        wanted = 128 + number if (run / "run.json").exists() else code  # before that, even Python may not be ready
        info = json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}
        if half_written(run) or info.get("status", "interrupted") not in ("interrupted", "running"):
            raise Broken(f"after SIGTERM {run} is {info.get('status')}, half written: {half_written(run)}")
    if code != wanted:
        raise Broken(f"{run.name}: exit code {code} instead of {wanted}")


def compare(whole: Path, ended: Path) -> None:
    """Every file of the result, byte for byte, and every step's loss."""
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    files = [file for file in files if file.name not in {*NOT_COMPARED, "SECONDS"}]
    if not files:
        raise Broken(f"{whole} holds nothing to compare")
    for file in files:
        if (whole / file).read_bytes() != (ended / file).read_bytes():
            raise Broken(f"{ended / file} is not what it was without a signal")
    if (whole / "metrics.jsonl").exists() and losses(whole) != losses(ended):
        raise Broken(f"{ended / 'metrics.jsonl'}: {losses(ended)} instead of {losses(whole)}")
    if (ended / "work").exists():
        raise Broken(f"{ended / 'work'} was left behind")


def losses(run: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "objective/score", "objective/kl", "loss/policy")
    return [tuple(line.get(name, 0.0) for name in names) for line in lines if {"loss", "objective/kl"} & line.keys()]


if __name__ == "__main__":
    import_all()
    random.seed(int(sys.argv[2]))
    for text in sys.argv[3:]:
        stage, name, moment, count = text.split(":")
        print(json.dumps(job(Path(sys.argv[1]), stage, signal.Signals["SIG" + name], moment, int(count))), flush=True)
