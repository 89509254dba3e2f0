"""Stages ended at random moments, SIGKILL and SIGTERM: nothing is lost, and what comes out is what would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
name: tiny
runs: {folder}/whole
model: {{base: {model}, dtype: float32}}
data: {{demonstrations: {demonstrations}, test_share: 0.3}}
sft: {{max_steps: 8, per_device_train_batch_size: 2, max_length: 128, learning_rate: 1.0e-2, save_steps: 2,
  adapter: {{lora_dropout: 0.1}}}}
sample: {{max_new_tokens: 12, answers_per_prompt: 3, batch_size: 8}}
reward: {{max_steps: 6, per_device_train_batch_size: 4, learning_rate: 1.0e-2, save_steps: 2, save_total_limit: 2,
  lr_scheduler_type: constant, trust: ignore}}
dpo: {{max_steps: 6, per_device_train_batch_size: 4, learning_rate: 1.0e-2, save_steps: 2,
  adapter: {{lora_dropout: 0.1}}}}
ppo: {{total_episodes: 32, per_device_train_batch_size: 8, response_length: 12, learning_rate: 1.0e-3, save_steps: 1,
  keep_policies: 2}}
compare: {{max_new_tokens: 12, checkpoint_prompts: 6, best_of_n: 2, batch_size: 4}}
"""
STAGES = ("sft", "sample", "reward", "dpo", "ppo", "compare")
TRAINED = ("sft", "reward", "dpo", "ppo")


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    text = CONFIG.format(folder=folder, model=tiny_model, demonstrations=tiny_demonstrations)
    (folder / "tiny.yaml").write_text(text)
    return folder


def end_at_moments(folder: Path, seed: int, jobs: list[str], timeout: float) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "tests/distributed/killing.py"), str(folder), str(seed), *jobs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
    assert ended.returncode == 0, ended.stderr[-3000:] + log[-3000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


def jobs_of(kills: int, saves: int, terminations: int) -> list[str]:
    """For each stage: so many kills at any moment and, where it trains, while a checkpoint is written."""
    jobs = []
    for stage in STAGES:
        anywhere = kills if stage in TRAINED else max(kills + saves, 1)
        if anywhere:
            jobs.append(f"{stage}:KILL:any:{anywhere}")
        if stage in TRAINED:
            jobs.append(f"{stage}:KILL:save:{saves}")
        if stage in ("sample", "dpo", "ppo"):
            jobs.append(f"{stage}:TERM:any:{terminations}")
        if stage == "sample":
            jobs.append("label:KILL:any:1")
    return jobs


@pytest.mark.processes
def test_ended_once_or_twice_each_stage_gives_what_it_would_have(folder: Path) -> None:
    done = end_at_moments(folder, 0, jobs_of(kills=0, saves=1, terminations=1), 300)
    assert all(job["compared"] >= 1 for job in done)
    saves = [job for job in done if job["moment"] == "save"]
    assert {job["stage"] for job in saves} == set(TRAINED)
    assert sum(job["in_a_save"] for job in saves) >= 2  # a checkpoint of a tiny model takes a hundredth of a second


@pytest.mark.slow
def test_ended_twenty_times_each_stage_gives_what_it_would_have(folder: Path) -> None:
    done = end_at_moments(folder, 1, jobs_of(kills=14, saves=6, terminations=6), 3000)
    for job in done:
        print(json.dumps(job))
    assert sum(job["in_a_save"] for job in done) >= 10
    assert sum(job["resumed"] for job in done) >= 20
