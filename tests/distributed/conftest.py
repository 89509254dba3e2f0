"""One pipeline in one process, and its stages again under launchers, from the very same parents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from align.config import STAGES
from tests.conftest import demonstrations, write_jsonl
from tests.distributed.launching import launched
from tests.distributed.stages import run

ROOT = Path(__file__).resolve().parents[2]
# Gradients are clipped in every step. 13 packed rows, or 52 pairs, do not fill the last step of an epoch; of the 13 one
# is left over where two processes take four at a time, so that one of them has nothing of its own.
CONFIG = """
name: alone
runs: {runs}
model: {{base: {model}, dtype: float32}}
data: {{demonstrations: {demonstrations}, test_share: 0.3}}
sft: {{max_length: 128, {training}}}
sample: {{max_new_tokens: 12, answers_per_prompt: 3, batch_size: 8}}
reward: {{group_pairs: true, ties: davidson, ensemble: 3, trust: ignore, {training}}}
dpo: {{{training}}}
ppo: {{total_episodes: 32, per_device_train_batch_size: 8, response_length: 12, learning_rate: 0.001, keep_policies: 1}}
compare: {{max_new_tokens: 12, checkpoint_prompts: 4, best_of_n: 1, batch_size: 4}}
"""
TRAINING = "num_train_epochs: 2, per_device_train_batch_size: 8, learning_rate: 1.0e-2, max_grad_norm: 0.15"
# Without what else makes the batches of two processes differ most: pairs of a prompt together, ties, several heads.
PLAIN = "reward.group_pairs=false reward.ties=ignore reward.ensemble=1"

Launch = Callable[[str, Sequence[str]], None]


@pytest.fixture(scope="session")
def pipeline(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a pipeline, `alone`, all of whose stages one process has run."""
    folder = tmp_path_factory.mktemp("equality")
    rows = demonstrations(40)
    for number, row in enumerate(rows):
        row["completion"] += " Really," * (number % 5) + " yes."  # every process is given other numbers of tokens
    write_jsonl(folder / "demonstrations.jsonl", rows)
    path = folder / "alone.yaml"
    places = {"runs": folder / "runs", "model": tiny_model, "demonstrations": folder / "demonstrations.jsonl"}
    path.write_text(CONFIG.format(training=TRAINING, **places))
    for stage in STAGES:
        run(path, f"{stage} alone")
    return path


def link_parents(path: Path, job: str) -> None:
    """Whatever of `alone` comes before a job's stage becomes its pipeline's own."""
    stage, name = job.split()[:2]
    folder = path.parent / "runs" / name
    folder.mkdir(parents=True)
    for number, other in enumerate(STAGES[: STAGES.index(stage)], start=1):
        (folder / f"{number}-{other}").symlink_to(f"../alone/{number}-{other}")


@pytest.fixture(scope="session")
def launch(pipeline: Path) -> Launch:
    """Run jobs (see `stages.py`) under one launch of a file of configs/accelerate, or in this process: `alone`."""

    def start(accelerate: str, jobs: Sequence[str]) -> None:
        for job in jobs:
            link_parents(pipeline, job)
        if accelerate == "alone":
            for job in jobs:
                run(pipeline, job)
            return
        launched(pipeline.parent, accelerate, [str(Path(__file__).with_name("stages.py")), str(pipeline), *jobs], 900)

    return start


@pytest.fixture(scope="session")
def two_processes(pipeline: Path, launch: Launch) -> Path:
    """The short tests' one launch of two CPU processes; the folder of its pipelines, with `alone` among them."""
    per_device = "per_device_train_batch_size=4"
    jobs = [f"sft two-sft sft.{per_device}", "sample two-sample", f"reward two-reward reward.{per_device}"]
    jobs += ["dpo two-dpo dpo.per_device_train_batch_size=2 dpo.gradient_accumulation_steps=2", "compare two-compare"]
    launch("cpu.yaml", jobs)
    return pipeline.parent / "runs"
