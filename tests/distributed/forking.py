"""Forks processes that run `align`, from one that has imported the libraries: each then costs what its stage costs.

The parent computes nothing itself, for a fork of a process with busy threads would not be safe. As a program it reads
jobs from standard input, one JSON list of ranks a line, and answers each with a JSON object; see `serve`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align import cli
from align.pipeline import STAGES


def import_all() -> None:
    """What the stages import late, so that the forks have it."""
    import datasets
    import peft
    import torch
    import trl

    for stage in STAGES.values():
        __import__(stage.function.partition(":")[0])
    torch.set_num_threads(1)
    # Some libraries hold their classes back until they are asked for.
    _ = datasets.Dataset, peft.PeftModel, trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer


def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str], over: Mapping[str, str]) -> int:
    """Fork a process that runs `align ARGUMENTS`; returns its number.

    Args:
        over: folders that it, alone, finds other folders in place of: another machine with another disk.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(place, 1)
        os.dup2(place, 2)
        os.environ.update(environment)
        mount_over(over)
        sys.argv = ["align", *arguments]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def mount_over(folders: Mapping[str, str]) -> None:
    if not folders:
        return
    new_mount_namespace = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mount_namespace):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for folder, other in folders.items():
        subprocess.run(["mount", "--bind", other, folder], check=True)


def wait(pid: int) -> int:
    """The exit code; minus the signal's number for a process that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Start the ranks of a job together, send the signals it asks for, and wait for all.

    A job is `{ranks: [{arguments, over}], port, log, limit, signals: [[rank, signal, file]]}`: they meet at the port,
    where somebody else must hold a store, and each signal is sent once its file exists. Returns the exit code of each
    rank, None for one that was still there after `limit` seconds or is held by SIGSTOP, which is then killed, and the
    seconds from the last signal, or the start, to the end of each.
    """
    ranks = job["ranks"]
    together = {"WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    together |= {"LOCAL_WORLD_SIZE": str(len(ranks)), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    pids = []
    for number, rank in enumerate(ranks):
        own = {"RANK": str(number), "LOCAL_RANK": str(number)} | together if len(ranks) > 1 else {}
        pids.append(start(rank["arguments"], Path(job["log"]), own, rank.get("over", {})))
    began, signals, ends = time.monotonic(), list(job.get("signals", [])), {}
    last, held = began, set()
    while {*range(len(pids))} - {*ends} - held and time.monotonic() - last < job["limit"]:
        if signals and Path(signals[0][2]).exists():
            number, name, _ = signals.pop(0)
            os.kill(pids[number], signal.Signals[name])
            last = time.monotonic()
            held |= {number} if name == "SIGSTOP" else set()
        for number, pid in enumerate(pids):
            if number not in ends:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    ends[number] = (os.waitstatus_to_exitcode(status), time.monotonic() - last)
        time.sleep(0.002)
    for number, pid in enumerate(pids):
        if number not in ends:
            os.kill(pid, signal.SIGKILL)
            wait(pid)
    of = [ends.get(number, (None, None)) for number in range(len(pids))]
    return {"codes": [code for code, _ in of], "seconds": [seconds for _, seconds in of], "signals_left": len(signals)}


def serve() -> None:
    import_all()
    for line in sys.stdin:
        print(json.dumps(run_job(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
