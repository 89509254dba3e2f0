"""The two promises that take minutes: the quickstart, and polite.yaml where its data is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from align.runs import read_info

ROOT = Path(__file__).resolve().parents[2]


def align(*arguments: str, timeout: float) -> dict[str, Any]:
    """Run the command line as a user would; returns wall seconds, peak resident GiB, exit code and stderr."""
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "align", *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            except psutil.NoSuchProcess:
                return
            time.sleep(0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    finally:
        watcher.join()
    seconds = time.monotonic() - started
    print(f"\n{stderr}\nalign {' '.join(arguments)}: {seconds:.0f} s, {peak / 2**30:.2f} GiB")
    return {"seconds": seconds, "gib": peak / 2**30, "code": process.returncode, "stderr": stderr}


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    command = ("run", "configs/quickstart.yaml", f"runs={tmp_path}")
    first = align(*command, timeout=2400)
    assert first["code"] == 0
    assert first["gib"] < 8
    # The target is 15 minutes on two quiet cores; twice that is not noise any more.
    assert first["seconds"] < 1800
    report = json.loads((tmp_path / "quickstart/7-compare/report.json").read_text())
    lows = {model["name"]: model["win_rate"]["simulated preference"]["low"] for model in report["models"][1:]}
    assert max(lows["dpo"], lows["ppo"]) > 0.5, lows
    assert "report.html" in first["stderr"] and "Win rate" in first["stderr"]
    second = align(*command, timeout=120)
    assert second["code"] == 0 and second["seconds"] < 20
    assert second["stderr"].count("already done") == 7


@pytest.mark.slow
def test_polite(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "data/preference/polite.jsonl"
    if not path.is_file():
        pytest.skip("polite.jsonl is not at hand")
    result = align("run", "configs/polite.yaml", f"data.preferences={path}", f"runs={tmp_path}", timeout=2400)
    assert result["code"] == 0
    for stage in ("4-reward", "5-dpo"):
        info = read_info(tmp_path / "polite" / stage)
        assert info is not None
        accuracy = info["summary"]["held_out_accuracy"]
        print(stage, accuracy)
        assert accuracy["rate"] >= (0.95 if stage == "4-reward" else 0.9), (stage, accuracy)
    trust = json.loads((tmp_path / "polite/4-reward/trust.json").read_text())
    after = trust["figures"]["calibration"]["after"]
    print(trust["verdict"], after["error"], after["noise"])
    refused = [check["sentence"] for check in trust["checks"] if not check["passed"] and check["level"] == "refuse"]
    assert not refused, refused
    assert after["error"] <= 0.05
