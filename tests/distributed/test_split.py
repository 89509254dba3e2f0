"""sample and compare share their prompts out among the processes, and write what one process writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import Launch
from tests.distributed.launching import stage_folder
from tests.distributed.stages import SAMPLED

WRITTEN = {"sample": ["comparisons.jsonl", "dropped.jsonl"], "compare": ["answers.jsonl", "dropped.jsonl"]}


def check_same(runs: Path, stage: str, name: str) -> None:
    for file in WRITTEN[stage]:
        written, wanted = ((stage_folder(runs, each, stage) / file).read_text() for each in (name, "alone"))
        assert written == wanted.replace('"id": "alone-', f'"id": "{name}-'), file
    if stage == "compare":
        ours, theirs = (report(stage_folder(runs, each, stage) / "report.json") for each in (name, "alone"))
        assert_same_report(ours, theirs)
        assert ours["overoptimisation"]["best_of_n"]


def assert_same_report(ours: Any, theirs: Any, where: str = "") -> None:
    """All the same, figures to the rounding of sums: the launcher gives a process fewer threads than it has alone, and
    KL is a sum of small differences."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_same_report(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, value in enumerate(theirs):
            assert_same_report(ours[number], value, f"{where}/{number}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6), where
    else:
        assert ours == theirs, where


def report(path: Path) -> dict[str, Any]:
    told = json.loads(path.read_text())
    return {key: value for key, value in told.items() if key not in ("pipeline", "lineage")}


def sampled(runs: Path, name: str, rank: int) -> set[tuple[str, int]]:
    return {(work, number) for work, number in json.loads((runs / name / SAMPLED.format(rank)).read_text())}


def check_shared_out(runs: Path, name: str) -> None:
    """Each batch was sampled by one of the processes, and neither had less to do than the other by more than one of
    each model's batches."""
    first, second = sampled(runs, name, 0), sampled(runs, name, 1)
    assert first and second and not first & second
    for work in {work for work, _ in first | second}:
        numbers = [sorted(number for other, number in mine if other == work) for mine in (first, second)]
        assert numbers[0] == list(range(0, sum(map(len, numbers)), 2)), work
        assert numbers[1] == list(range(1, sum(map(len, numbers)), 2)), work


@pytest.mark.processes
@pytest.mark.parametrize("stage", ["sample", "compare"])
def test_two_processes_write_what_one_writes(two_processes: Path, stage: str) -> None:
    check_same(two_processes, stage, f"two-{stage}")
    check_shared_out(two_processes, f"two-{stage}")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("accelerate", ["zero2.yaml", "zero3.yaml"])
def test_deepspeeds_launchers_do_so_too(pipeline: Path, launch: Launch, accelerate: str) -> None:
    name = accelerate.removesuffix(".yaml")
    launch(accelerate, [f"sample {name}-sample", f"compare {name}-compare"])
    for stage in ("sample", "compare"):
        check_same(pipeline.parent / "runs", stage, f"{name}-{stage}")
        check_shared_out(pipeline.parent / "runs", f"{name}-{stage}")
