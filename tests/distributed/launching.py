"""Real launches on this machine: a launcher file with a port of its own, and programs that leave no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from align.config import STAGES, StageName
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def launcher_file(folder: Path, accelerate: str) -> Path:
    """One of the repository's, with a port of its own: another launcher may be at work on this machine."""
    own = folder / accelerate
    own.write_text((ROOT / "configs/accelerate" / accelerate).read_text() + f"main_process_port: {free_port()}\n")
    return own


def launch_command(folder: Path, accelerate: str) -> list[str]:
    """What a program, or `-m align ...`, is added to."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher_file(folder, accelerate))]


def launched(folder: Path, accelerate: str, program: Sequence[str], timeout: float) -> str:
    """What a program printed that came to its end under a launcher; no process is left behind, however it ends."""
    process = subprocess.Popen(
        [*launch_command(folder, accelerate), *program],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-6000:]
    return output


def stage_folder(runs: Path, name: str, stage: StageName) -> Path:
    return runs / name / f"{STAGES.index(stage) + 1}-{stage}"
