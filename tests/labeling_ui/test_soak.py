"""The long runs of `make soak` in their short form: they end with an error where a promise is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def figures(script: str, *arguments: str) -> Any:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("cap", [1, 3])
def test_no_item_is_over_its_cap(cap: int) -> None:
    (found,) = figures("labeling_caps.py", "--seeds", "1", "--caps", str(cap))["caps"]
    assert (found["labels"], found["over"], found["missing"], found["twice"]) == (100 * cap, 0, 0, 0)


def test_no_acknowledged_label_is_lost_to_sigkill() -> None:
    found = figures("labeling_kill.py", "--kills", "2", "--labels", "200")
    assert found["kills"] == 2 and found["acknowledged"] >= 200 and found["lost"] == found["doubled"] == 0


def test_labels_are_saved_while_many_work() -> None:
    found = figures("labeling_load.py", "--seconds", "3", "--items", "2000", "--annotators", "20")
    # Generous: other tests run beside it. The figures that count are those of `make soak` on a quiet machine.
    assert found["one label a second"]["p95_ms"] < 1000 and found["no pause"]["labels_per_s"] > 20
