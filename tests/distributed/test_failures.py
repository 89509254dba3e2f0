"""What goes wrong between processes: one dies, hangs, or was started with something else; the disk is full.

The tests fork processes that meet as a launcher's would (`forking.py`); for the launcher itself see
test_launcher_failures.py.
"""

from __future__ import annotations

import json
import re
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.checkpoints import last_checkpoint
from align.config_file import load_config
from align.pipeline import run_pipeline, run_stage
from reward.records import InputError
from tests.distributed.launching import ENVIRONMENT, ROOT

CONFIG = """
name: tiny
runs: {folder}/runs
stages: [label, dpo, ppo]
model: {{base: {folder}/model, dtype: float32}}
data: {{preferences: {folder}/pairs/pairs.jsonl}}
label: {{source: dataset}}
dpo: {{max_steps: 8, per_device_train_batch_size: 2, learning_rate: 1.0e-2, save_steps: 2}}
ppo: {{total_episodes: 16, per_device_train_batch_size: 4, response_length: 8, learning_rate: 1.0e-3,
  rewards: [tests.distributed.test_failures:vowels]}}
"""


def vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline on existing pairs, whose label stage is done."""
    folder = tmp_path_factory.mktemp("failures")
    shutil.copytree(tiny_model, folder / "model")
    (folder / "pairs").mkdir()
    rows = [
        {"prompt": f"What is rain? ({i})", "chosen": f"It is water, kindly {i}.", "rejected": f"Go away {i}."}
        for i in range(60)
    ]
    (folder / "pairs/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    run_stage(load_config(folder / "tiny.yaml"), "label")
    return folder


@pytest.fixture
def folder(made: Path) -> Path:
    """The same, with nothing but the label stage done."""
    for left in ("5-dpo", "6-ppo"):
        shutil.rmtree(made / "runs/tiny" / left, ignore_errors=True)
    return made


class Forks:
    """The program of `forking.py`, started once."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "tests/distributed/forking.py")]
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.said = ""

    def run(self, folder: Path, *ranks: list[str], over: list[dict[str, str]] | None = None, **job: Any) -> list[int]:
        """Exit codes of `align` with each rank's arguments; what they said is in `said`, the seconds in `seconds`."""
        log = folder / "said.txt"
        log.unlink(missing_ok=True)
        each = [{"arguments": [rank[0], str(folder / "tiny.yaml"), *rank[1:]]} for rank in ranks]
        for one, mounts in zip(each, over or [{}] * len(each), strict=True):
            one["over"] = mounts
        assert self.process.stdin and self.process.stdout
        # What a launcher's agent does: it holds the place where its processes meet, for longer than any of them lives.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = {"ranks": each, "port": store.port, "log": str(log), "limit": 60, **job}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 300)
        assert ready, "no answer"
        answer = json.loads(self.process.stdout.readline())
        self.said, self.seconds = log.read_text() if log.exists() else "", answer["seconds"]
        assert not answer["signals_left"], self.said
        return answer["codes"]

    @property
    def sentences(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("align: ")]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    assert forks.process.stdin
    forks.process.stdin.close()
    forks.process.wait(timeout=60)


def refused(forks: Forks, codes: list[int]) -> str:
    """The one sentence with which all ended."""
    assert codes == [2] * len(codes), forks.said
    assert "Traceback" not in forks.said and len(forks.sentences) == 1, forks.said
    return forks.sentences[0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/adapter_model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and any("lora_B" in name and a[name].abs().max() > 1e-3 for name in a)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# -- started with something else ---------------------------------------------------------------------------------------


@pytest.mark.processes
def test_different_configs_are_refused_with_both(forks: Forks, folder: Path) -> None:
    said = refused(forks, forks.run(folder, ["dpo"], ["dpo", "dpo.beta=0.3"]))
    host = socket.gethostname()
    assert f"different configs: dpo.beta is 0.1 on process 0 on {host} and 0.3 on process 1 on {host}." in said


@pytest.mark.processes
def test_an_unknown_key_on_all_is_told_once_and_on_one_names_it(forks: Forks, folder: Path) -> None:
    said = refused(forks, forks.run(folder, *[["dpo", "dpo.lerning_rate=1"]] * 2))
    assert "did you mean `learning_rate`?" in said and "process" not in said
    said = refused(forks, forks.run(folder, ["dpo"], ["dpo", "dpo.lerning_rate=1"]))
    assert said.startswith(f"align: process 1 on {socket.gethostname()}: ") and "`learning_rate`?" in said


@pytest.fixture
def other_disk(tmp_path: Path) -> Callable[[Path], dict[str, str]]:
    """Makes a folder whose content one process, as on another machine, finds in place of another folder's."""
    tried = ["unshare", "--mount", "mount", "--bind", str(tmp_path), str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(tried, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")

    def make(folder: Path) -> dict[str, str]:
        other = tmp_path / folder.name
        shutil.copytree(folder, other)
        return {str(folder): str(other)}

    return make


@pytest.mark.processes
def test_a_machine_without_the_data_or_with_other_data(
    forks: Forks, folder: Path, tmp_path: Path, other_disk: Callable[[Path], dict[str, str]]
) -> None:
    elsewhere = other_disk(folder / "pairs")
    with (tmp_path / "pairs/pairs.jsonl").open("a") as out:
        out.write(json.dumps({"prompt": "One more?", "chosen": "Yes.", "rejected": "No."}) + "\n")
    said = refused(forks, forks.run(folder, ["label", "name=x"], ["label", "name=x"], over=[{}, elsewhere]))
    assert re.search(r"different data: file \S+pairs.jsonl is \w{12} on process 0 .* and \w{12} on process 1", said)
    (tmp_path / "pairs/pairs.jsonl").unlink()
    said = refused(forks, forks.run(folder, ["label", "name=x"], ["label", "name=x"], over=[{}, elsewhere]))
    assert said.startswith(f"align: process 1 on {socket.gethostname()}: data.preferences: ")
    assert "pairs.jsonl does not exist" in said
    assert not (folder / "runs/x").exists()


@pytest.mark.processes
def test_what_only_the_second_process_refuses_ends_both(
    forks: Forks, folder: Path, tmp_path: Path, other_disk: Callable[[Path], dict[str, str]]
) -> None:
    """In the middle of the stage, while the first is in training: one sentence, exit code 2, and nobody waits."""
    elsewhere = other_disk(folder / "runs/tiny/3-label")
    (tmp_path / "3-label/preferences.jsonl").write_text("")
    codes = forks.run(folder, ["dpo"], ["dpo"], over=[{}, elsewhere])
    assert codes[1] == 2 and codes[0] not in (0, None), forks.said
    assert len(forks.sentences) == 1 and "preferences.jsonl is empty" in forks.said, forks.said
    assert "Traceback" not in forks.said, forks.said


@pytest.mark.processes
def test_fewer_prompts_than_the_processes_want(forks: Forks, folder: Path) -> None:
    said = refused(forks, forks.run(folder, *[["ppo", "data.max_rows=6"]] * 2))
    assert re.search(r"ppo has \d prompts, but one update takes 8 episodes .* x 2 processes\)", said)


# -- the processes of a checkpoint -------------------------------------------------------------------------------------


def first_checkpoint(folder: Path) -> str:
    return str(folder / "runs/tiny/5-dpo/work/checkpoints/checkpoint-2/COMPLETE")


@pytest.fixture(scope="module")
def undisturbed(forks: Forks, made: Path) -> Path:
    """The dpo stage of two processes, to its end."""
    assert forks.run(made, ["dpo", "name=whole"], ["dpo", "name=whole"]) == [2, 2]  # it has no parent yet
    (made / "runs/whole").mkdir(exist_ok=True)
    (made / "runs/whole/3-label").symlink_to(made / "runs/tiny/3-label")
    assert forks.run(made, ["dpo", "name=whole"], ["dpo", "name=whole"]) == [0, 0], forks.said
    return made / "runs/whole/5-dpo"


@pytest.mark.processes
def test_sigterm_to_one_process_stops_all_after_the_same_step(forks: Forks, folder: Path, undisturbed: Path) -> None:
    run = folder / "runs/tiny/5-dpo"
    codes = forks.run(folder, ["dpo"], ["dpo"], signals=[[1, "SIGTERM", first_checkpoint(folder)]])
    assert codes == [143, 143], forks.said
    assert forks.sentences == ["align: stopped by SIGTERM; the same command goes on from the last checkpoint."]
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    checkpoint = last_checkpoint(run / "work/checkpoints")
    assert checkpoint and f"SIGTERM came, {checkpoint.name} is written" in forks.said

    said = refused(forks, forks.run(folder, ["dpo"]))
    assert "was written by 2 processes, and now 1 process would go on" in said and "--force" in said
    said = refused(forks, forks.run(folder, *[["dpo"]] * 3))
    assert "was written by 2 processes, and now 3 processes would go on" in said

    assert forks.run(folder, ["dpo"], ["dpo"]) == [0, 0], forks.said
    assert f"resuming from {checkpoint.name}" in forks.said
    assert largest_difference(run, undisturbed) == 0


@pytest.mark.processes
@pytest.mark.parametrize("dead", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_with_a_sentence(
    forks: Forks, folder: Path, undisturbed: Path, dead: int
) -> None:
    codes = forks.run(folder, ["dpo"], ["dpo"], signals=[[dead, "SIGKILL", first_checkpoint(folder)]])
    assert codes[dead] == -9 and codes[1 - dead] == 1, forks.said
    assert forks.seconds[1 - dead] < 30
    gone = f"process {dead} on {socket.gethostname()} has ended"
    wanted = f"align: {gone}; the same command goes on from the last checkpoint."
    assert forks.sentences == [wanted], forks.said
    assert "Traceback" not in forks.said
    assert forks.run(folder, ["dpo"], ["dpo"]) == [0, 0], forks.said
    assert largest_difference(folder / "runs/tiny/5-dpo", undisturbed) == 0


@pytest.mark.processes
def test_a_process_that_hangs_is_given_up(forks: Forks, folder: Path) -> None:
    stopped = [[1, "SIGSTOP", first_checkpoint(folder)]]
    codes = forks.run(folder, *[["dpo", "dpo.ddp_timeout=5", "dpo.max_steps=100"]] * 2, signals=stopped, limit=40)
    assert codes == [1, None], forks.said  # the second is held still; a launcher would kill it now
    assert forks.sentences == [
        "align: another process of this launch has ended or does not answer; "
        "the same command goes on from the last checkpoint."
    ]


@pytest.mark.processes
def test_two_runs_cannot_write_one_folder(forks: Forks, folder: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / "runs/tiny/5-dpo")], env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout and holder.stdout.readline()
        said = refused(forks, forks.run(folder, ["dpo"]))
        assert "5-dpo is in use by another process; wait for it or choose another `name`." in said
        codes = forks.run(folder, ["dpo"], ["dpo"])
        assert codes[0] == 2 and codes[1] == 1 and len(forks.sentences) == 1, forks.said
        assert "is in use by another process" in forks.sentences[0]
        assert "Traceback" not in forks.said
    finally:
        holder.kill()
        holder.wait()


HOLD = """
import sys, time
from pathlib import Path
from align.runs import open_run
with open_run("dpo", Path(sys.argv[1]), {}, config_yaml=""):
    print("held", flush=True)
    time.sleep(120)
"""


# -- disks and ports ---------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def on_disk(folder: Path, disk: Path) -> tuple[list[str], Path]:
    (disk / "tiny").mkdir()
    (disk / "tiny/3-label").symlink_to(folder / "runs/tiny/3-label")
    return ["dpo", f"runs={disk}"], disk / "tiny/5-dpo"


def leave_free(disk: Path, count: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - count))
    return filler


@pytest.mark.processes
def test_a_disk_that_is_full_at_the_second_checkpoint(forks: Forks, folder: Path, disk: Path) -> None:
    command, run = on_disk(folder, disk)
    checkpoint = run / "work/checkpoints/checkpoint-2"
    assert forks.run(folder, command, signals=[[0, "SIGTERM", str(checkpoint / "COMPLETE")]]) == [143]
    last = last_checkpoint(checkpoint.parent)
    assert last is not None
    size = sum(path.stat().st_size for path in last.iterdir())
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    filler = leave_free(disk, size // 2)
    said = refused(forks, forks.run(folder, command))
    found = re.search(
        r"checkpoint-\d+ needs about ([\d.]+) MiB in \S+ and ([\d.]+) MiB are free. Make ([\d.]+) MiB more room", said
    )
    assert found, said
    needed, free, missing = map(float, found.groups())
    assert needed == pytest.approx(size / 2**20, abs=0.01) and missing == pytest.approx(needed - free, abs=0.02)
    assert said.endswith(f"run the same command again; it goes on from {last.name}.")
    assert {path.name: path.read_bytes() for path in last.iterdir()} == before  # it survives
    assert list(last.parent.glob("checkpoint-*")) == [last]
    filler.unlink()
    assert forks.run(folder, command) == [0], forks.said
    assert f"resuming from {last.name}" in forks.said


@pytest.mark.processes
def test_a_disk_that_fills_up_inside_the_first_checkpoint(forks: Forks, folder: Path, disk: Path) -> None:
    """The weights and the optimiser's numbers would fit, the files around them do not."""
    command, run = on_disk(folder, disk)
    adapter = 4 * sum(tensor.numel() for tensor in adapter_shapes(folder))
    filler = leave_free(disk, 3 * adapter + 60_000)
    said = refused(forks, forks.run(folder, command))
    assert "the disk is full: checkpoint-2 needs at least 0." in said and said.endswith("again; it begins again.")
    assert not list((run / "work/checkpoints").glob("checkpoint-*"))
    filler.unlink()
    assert forks.run(folder, command) == [0], forks.said


def adapter_shapes(folder: Path) -> list[torch.Tensor]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), lora)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.processes
def test_a_disk_that_cannot_be_written(forks: Forks, folder: Path, disk: Path) -> None:
    command, run = on_disk(folder, disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = refused(forks, forks.run(folder, command))
    where = run.parent  # the record of what was checked comes first
    assert said == f"align: cannot write to {where}: Read-only file system; set `runs` to a folder you can write to."


def test_a_port_in_use_is_said_before_anything_is_started(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = tmp_path / "two.yaml"
        file.write_text((ROOT / "configs/accelerate/cpu.yaml").read_text() + f"main_process_port: {port}\n")
        with pytest.raises(InputError, match=rf"port {port}, at which .*two\.yaml are to meet.*set main_process_port"):
            run_pipeline(load_config(folder / "tiny.yaml", ["stages=[label,dpo]"]), accelerate=file)
