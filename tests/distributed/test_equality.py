"""One global batch and seed train the same model on one process or two, plain or under ZeRO, accumulated or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import PLAIN, Launch
from tests.distributed.launching import stage_folder

# What rounding in another order may do to a weight; measured: 9e-6, and 2e-2 where the last steps of the epochs have
# other rows. Adam moves weights by up to 0.2 in these runs.
TOLERANCE = 1e-4
# And to what else is logged: norms of gradients and rewards of single answers grow as the runs go on; measured: 4e-4.
LOGGED = 1e-3
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
# Logged as the mean over the batches of a step; ratios of sums and extremes are other ones for other batches.
OF_BATCHES = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "min_reward", "max_reward"}
OF_BATCHES |= {"accuracy", "margin", "mean_reward", "spread", "pairs"}
# Of each process's own answers.
OWN = {"episode/distinct"}


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "model").glob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def check_same(
    runs: Path,
    stage: str,
    name: str,
    alone: str = "alone",
    *,
    other_batches: bool = False,
    of_weights: float = TOLERANCE,
) -> None:
    """The same loss, gradient norm and metrics at every step, over all processes, and the same weights at the end."""
    ours, theirs = stage_folder(runs, name, stage), stage_folder(runs, alone, stage)
    left_out = TIMES | OWN | (OF_BATCHES if other_batches else set())
    mine, others = curve(ours), curve(theirs)
    assert [line["step"] for line in mine] == [line["step"] for line in others]
    for line, other in zip(mine, others, strict=True):
        assert line.keys() == other.keys()
        if abs(other.get("rewards/margins", 1)) < 1e-6:  # before the first change the sign of a margin is rounding's
            line, other = ({k: v for k, v in each.items() if k != "rewards/accuracies"} for each in (line, other))
        seen, wanted = (
            {k: v for k, v in each.items() if k not in left_out and not isinstance(v, list)} for each in (line, other)
        )
        assert seen == pytest.approx(wanted, abs=LOGGED, rel=LOGGED), f"{stage} {name}, step {line['step']}"
        if "loss" in wanted:
            assert seen["loss"] == pytest.approx(wanted["loss"], abs=TOLERANCE), f"{stage} {name}, step {line['step']}"
    trained, wanted = weights(ours), weights(theirs)
    assert trained.keys() == wanted.keys()
    for key, weight in trained.items():
        torch.testing.assert_close(weight, wanted[key], atol=of_weights, rtol=0, msg=lambda text, key=key: key + text)
    adapters = [weight for key, weight in trained.items() if "lora_B" in key]
    assert all(weight.abs().max() > 1e-3 for weight in adapters) and bool(adapters) == (stage != "sft")


def check_processes(runs: Path, stage: str, name: str, count: int) -> None:
    assert json.loads((stage_folder(runs, name, stage) / "run.json").read_text())["processes"] == count


@pytest.mark.processes
def test_two_processes_train_what_one_trains(two_processes: Path) -> None:
    for stage in ("sft", "reward", "dpo"):
        check_same(two_processes, stage, f"two-{stage}", other_batches=stage == "dpo")
        check_processes(two_processes, stage, f"two-{stage}", 2)


def test_the_runs_have_what_made_them_unequal(pipeline: Path) -> None:
    """Clipped gradients, rows left over at the end of an epoch, and more than one epoch."""
    runs = pipeline.parent / "runs"
    for stage in ("sft", "reward", "dpo"):
        lines = [line for line in curve(stage_folder(runs, "alone", stage)) if "loss" in line]
        assert max(line["grad_norm"] for line in lines) > 0.15
        assert lines[-1]["epoch"] == 2.0
    tokens = [line["num_tokens"] for line in curve(stage_folder(runs, "alone", "sft")) if "num_tokens" in line]
    assert len(tokens) == 4 and len({b - a for a, b in zip([0, *tokens], tokens, strict=False)}) > 1


@pytest.mark.processes
def test_zero_3_trains_what_one_process_trains(pipeline: Path, launch: Launch) -> None:
    """What ends an SFT stage, a whole model made by the first process alone, included."""
    per_device = "per_device_train_batch_size=4"
    launch("zero3.yaml", [f"sft short3-sft sft.{per_device}", f"dpo short3-dpo dpo.{per_device}"])
    for stage in ("sft", "dpo"):
        check_same(pipeline.parent / "runs", stage, f"short3-{stage}")


@pytest.fixture(scope="session")
def plain(launch: Launch) -> str:
    """The name of a reward stage that one process trained on pairs alone, with one head."""
    launch("alone", [f"reward plain {PLAIN}"])
    return "plain"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("accelerate", ["alone", "cpu.yaml", "zero1.yaml", "zero2.yaml", "zero3.yaml"])
def test_every_stage_in_every_way(pipeline: Path, plain: str, launch: Launch, accelerate: str, steps: int) -> None:
    """{1 process, 2, ZeRO-1, -2, -3} x every stage that trains x gradient accumulation."""
    count = 1 if accelerate == "alone" else 2
    if (count, steps) == (1, 1):
        pytest.skip("this is what all others are compared with")
    way, per_device = f"{accelerate.removesuffix('.yaml')}-by-{steps}", 8 // count // steps
    jobs = []
    for stage in ("sft", "reward", "dpo", "ppo"):
        sizes = f"{stage}.per_device_train_batch_size={per_device} {stage}.gradient_accumulation_steps={steps}"
        jobs.append(f"{stage} {way}-{stage} {sizes}")
    sizes = f"reward.per_device_train_batch_size={per_device} reward.gradient_accumulation_steps={steps}"
    launch(accelerate, [*jobs, f"reward {way}-plain {PLAIN} {sizes}"])
    runs = pipeline.parent / "runs"
    check_same(runs, "reward", f"{way}-plain", plain, other_batches=steps > 1)
    for stage in ("sft", "reward", "dpo", "ppo"):
        check_same(runs, stage, f"{way}-{stage}", other_batches=steps > 1)
        check_processes(runs, stage, f"{way}-{stage}", count)
