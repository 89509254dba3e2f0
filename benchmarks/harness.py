"""What the benchmarks share: sides in processes of their own, alternating; medians with their range; the machine.

A measured figure is worth what it can be compared with: every benchmark starts its peer itself, in the same run, turn
by turn, so that whatever else the machine does falls on all sides alike. Ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rounds(sides: Sequence[str], count: int) -> Iterable[tuple[int, str]]:
    """(round, side), every second round backwards: a drift of the machine then favours nobody."""
    for number in range(count):
        for side in sides if number % 2 == 0 else reversed(sides):
            yield number, side


def side_record(script: str, arguments: Sequence[str], threads: int, say: str = "", **environment: str) -> Any:
    """What `script` prints as its last line, as JSON, when run in a process of its own."""
    # Output goes to files, and torch is not imported by the parent: `ru_maxrss` of a child starts at its parent's.
    started = time.perf_counter()
    print(f"{say} ... ", end="", file=sys.stderr, flush=True)
    settings = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [sys.executable, script, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | settings | environment,
            text=True,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            errors.seek(0)
            tail = "\n".join(errors.read().splitlines()[-30:])
            sys.exit(f"failed with status {done.returncode}:\n{tail}")
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return json.loads(lines[-1])


def middle(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median with the range; None without values."""
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "min": min(known), "max": max(known)} if known else None


def spread(value: dict[str, float] | None, divisor: float = 1, digits: int = 2) -> str:
    if value is None:
        return "–"
    low, mid, high = (f"{value[key] / divisor:.{digits}f}" for key in ("min", "median", "max"))
    return f"{mid} [{low}–{high}]"


def ratio(runs: Sequence[dict[str, Any]], first: str, second: str, key: str) -> dict[str, float] | None:
    """`key` of the first side over that of the second, within rounds."""
    mates = {run["round"]: run for run in runs if run["side"] == second}
    pairs = [(run, mates[run["round"]]) for run in runs if run["side"] == first and run["round"] in mates]
    return middle([a[key] / b[key] for a, b in pairs])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|" + " --- |" * len(head))
    return "\n".join(lines)


def finish(name: str, claim: str, result: dict[str, Any], text: str, out: str | None) -> None:
    """One JSON line and the table on standard output; with `out`, the section `name` of that Markdown file anew."""
    print(json.dumps({"benchmark": name, **result}))
    print(text)
    if out is None:
        return
    path = Path(out)
    old = path.read_text("utf-8") if path.exists() else "# Results\n\nWritten by `make bench`; one section a claim.\n"
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    stamp = (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()['cpu']}, {machine()['cores']} cores, Python {machine()['python']}"
    )
    section = f"{start}\n## {name}\n\n{claim}\n\n{stamp}, {versions()}\n\n{text}\n{end}"
    if start in old:
        new = old[: old.index(start)] + section + old[old.index(end) + len(end) :]
    else:
        new = f"{old.rstrip()}\n\n{section}\n"
    path.write_text(new, "utf-8")


def machine() -> dict[str, Any]:
    name = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {"cpu": name or platform.processor(), "cores": os.cpu_count(), "python": platform.python_version()}


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))


def peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def product_rate() -> float:
    """Multiply-adds x 2 a second that this machine reaches in a large f32 product of this model's shapes."""
    import torch

    x, w = torch.randn(1024, 576), torch.randn(1536, 576)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, w)
        best = max(best, 10 * 2 * x.numel() * 1536 / (time.perf_counter() - started))
    return best


def lora(task_type: str, **extra: Any) -> Any:
    """Rank 16 on every linear layer."""
    from peft import LoraConfig

    return LoraConfig(task_type=task_type, r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEAR, **extra)


def base_folder() -> str:
    from align.models import embedded_model

    return str(embedded_model())
