"""One process of a real launch dies, or the launch is told to stop: it is over soon and goes on to the same weights."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from align.checkpoints import last_checkpoint
from tests.distributed import test_failures
from tests.distributed.launching import ENVIRONMENT, ROOT, launcher_file
from tests.distributed.test_failures import largest_difference

made, folder = test_failures.made, test_failures.folder  # fixtures

# Rounding in another order; forty steps of Adam move a weight by up to 0.4.
TOLERANCE = 1e-4


def launched(folder: Path, launcher: str, name: str) -> subprocess.Popen[str]:
    """`align run` of the dpo stage under a launcher."""
    file = launcher_file(folder, launcher)
    (folder / "runs" / name).mkdir(exist_ok=True)
    if not (folder / "runs" / name / "3-label").exists():
        (folder / "runs" / name / "3-label").symlink_to(folder / "runs/tiny/3-label")
    overrides = ["stages=[label,dpo]", f"name={name}", "dpo.max_steps=40", "dpo.save_steps=5"]
    command = [sys.executable, "-m", "align", "run", str(folder / "tiny.yaml"), *overrides, "--accelerate", str(file)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def at_first_checkpoint(started: subprocess.Popen[str], run: Path) -> list[psutil.Process]:
    """The launcher and its two processes, first the launcher, then by rank, once a checkpoint is whole."""
    deadline = time.monotonic() + 240
    while not list(run.glob("work/checkpoints/*/COMPLETE")):
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()[0][-3000:]
        time.sleep(0.01)
    (launcher,) = psutil.Process(started.pid).children()
    workers = [child for child in launcher.children() if "RANK" in child.environ()]
    return [launcher, *sorted(workers, key=lambda worker: int(worker.environ()["RANK"]))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "who"),
    [("cpu.yaml", "second"), ("cpu.yaml", "first"), ("zero2.yaml", "second"), ("zero3.yaml", "second")],
)
def test_one_killed_process_ends_the_launch_within_a_minute(folder: Path, launcher: str, who: str) -> None:
    kind = launcher.removesuffix(".yaml")
    if not (folder / f"runs/{kind}-whole/5-dpo/DONE").exists():
        whole = launched(folder, launcher, f"{kind}-whole")
        assert whole.wait(timeout=400) == 0, whole.communicate()[0][-3000:]
    name = f"{kind}-{who}"
    started = launched(folder, launcher, name)
    found = at_first_checkpoint(started, folder / f"runs/{name}/5-dpo")
    killed = time.monotonic()
    found[1 if who == "first" else 2].send_signal(signal.SIGKILL)
    said = started.communicate(timeout=60)[0]
    print(f"{launcher}, {who} killed: over after {time.monotonic() - killed:.1f} s")
    assert started.returncode == 1
    assert not [process for process in found if process.is_running()]
    assert "Signal 9 (SIGKILL) received by PID" in said
    assert "dpo ended with exit code 1 under accelerate launch" in said.splitlines()[-1]
    again = launched(folder, launcher, name)
    assert "resuming from checkpoint-" in again.communicate(timeout=400)[0]
    assert again.returncode == 0
    difference = largest_difference(folder / f"runs/{name}/5-dpo", folder / f"runs/{kind}-whole/5-dpo")
    print(f"{launcher}, {who} killed: gone on to weights that differ by {difference:.1g} at most")
    assert difference <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["cpu.yaml", "zero2.yaml"])
def test_sigterm_to_align_run_reaches_the_processes_and_loses_nothing(folder: Path, launcher: str) -> None:
    name = f"terminated-{launcher.removesuffix('.yaml')}"
    started = launched(folder, launcher, name)
    found = at_first_checkpoint(started, folder / f"runs/{name}/5-dpo")
    started.send_signal(signal.SIGTERM)
    said = started.communicate(timeout=60)[0]
    assert started.returncode == 143, said
    assert not [process for process in found if process.is_running()]
    checkpoint = last_checkpoint(folder / f"runs/{name}/5-dpo/work/checkpoints")
    assert checkpoint and f"SIGTERM came, {checkpoint.name} is written" in said
    assert said.count("align: stopped by SIGTERM; the same command goes on from the last checkpoint.") >= 1


@pytest.mark.slow
def test_processes_do_not_outlive_a_killed_launcher(folder: Path) -> None:
    started = launched(folder, "cpu.yaml", "orphans")
    launcher, *workers = at_first_checkpoint(started, folder / "runs/orphans/5-dpo")
    launcher.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert started.wait(timeout=30) == 143 or started.returncode == 1
    assert last_checkpoint(folder / "runs/orphans/5-dpo/work/checkpoints")
