"""The launcher files that want more than this machine has: several machines, an optimiser beside the GPU, one GPU.

Two launchers on one machine, each told to be a machine of its own, meet as two machines do; there are no GPUs, so what
is "offloaded" lies in the same memory. Ways, saving and figures are those of the real thing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.distributed.conftest import Launch, link_parents
from tests.distributed.launching import ENVIRONMENT, ROOT, launch_command
from tests.distributed.test_equality import TOLERANCE, check_processes, check_same

pytestmark = [pytest.mark.slow, pytest.mark.processes]
TRAINED = ("sft", "reward", "dpo", "ppo")


def jobs_of(way: str, per_device: int) -> list[str]:
    return [f"{stage} {way}-{stage} {stage}.per_device_train_batch_size={per_device}" for stage in TRAINED]


def check_all(pipeline: Path, way: str, processes: int) -> None:
    # DeepSpeed's own Adam for CPUs rounds otherwise than torch's; measured: 1.03e-4.
    of_weights = 5e-4 if "offload" in way else TOLERANCE
    for stage in TRAINED:
        check_same(pipeline.parent / "runs", stage, f"{way}-{stage}", of_weights=of_weights)
        check_processes(pipeline.parent / "runs", stage, f"{way}-{stage}", processes)


@pytest.mark.parametrize(("accelerate", "processes"), [("zero3_offload.yaml", 2), ("single_gpu.yaml", 1)])
def test_the_file_trains_what_one_process_trains(
    pipeline: Path, launch: Launch, accelerate: str, processes: int
) -> None:
    way = accelerate.removesuffix(".yaml")
    launch(accelerate, jobs_of(way, 8 // processes))
    check_all(pipeline, way, processes)


def test_two_machines_train_what_one_process_trains(pipeline: Path, tmp_path: Path) -> None:
    jobs = jobs_of("machines", 4)
    for job in jobs:
        link_parents(pipeline, job)
    port = str(free_port())
    started = []
    for rank in ("0", "1"):
        folder = tmp_path / rank
        folder.mkdir()
        meeting = ["--num_processes", "2", "--machine_rank", rank, "--main_process_port", port]
        program = [str(Path(__file__).with_name("stages.py")), str(pipeline), *jobs]
        command = [*launch_command(folder, "multi_node.yaml"), *meeting, *program]
        with (folder / "log").open("w") as log:
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
    try:
        codes = [process.wait(timeout=900) for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert codes == [0, 0], "\n".join((tmp_path / rank / "log").read_text()[-3000:] for rank in ("0", "1"))
    check_all(pipeline, "machines", 2)
