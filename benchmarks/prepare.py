"""`align data prepare` as a whole: time and memory at 10,000, 100,000 and a million rows, every step on.

    python benchmarks/prepare.py --rows 10000,100000,1000000

Rows are the made-up English of `near_duplicates.py`, a prompt and an answer each; a tenth of them are near copies of
another. All steps of single rows are on (mending, language, length, quality, personal data), exact and near duplicates,
sides by clusters, and the report. The claim is near linear time, and less than 4 GiB for the process and its two
workers together, looked at four times a second. Time is that of the command, from its start to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import near_duplicates
import psutil

STEPS = {
    "languages": ["en"],
    "quality": ["repetition", "boilerplate", "truncated", "refusal"],
    "scrub": ["email", "phone", "key", "card", "ip"],
    "processes": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rows", default="10000,100000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(make(args) if args.side == "make" else prepare(args)))
        return
    runs = []
    for count in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            given = ["--rows", str(count), "--seed", str(args.seed), "--folder", folder]
            for side in ("make", "prepare"):
                told = harness.side_record(__file__, ["--side", side, *given], 1, f"{count} rows: {side}")
            runs.append({"rows": count, **told})
    table = [
        [f"{run['rows']:,}", f"{run['seconds']:.1f}", f"{1e6 * run['seconds'] / run['rows']:.0f}",
         f"{run['peak'] / 2**20:,.0f}", f"{run['kept']:,}"]
        for run in runs
    ]  # fmt: skip
    head = ["rows", "s", "s for a million", "peak MiB", "rows left"]
    claim = "`benchmarks/prepare.py`: `align data prepare` with every step, from the start of the command to its end."
    harness.finish("prepare", claim, {"runs": runs}, harness.markdown(head, table), args.results)


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Demonstrations of the rows of `near_duplicates.py`, each cut in two, and a config."""
    near_duplicates.make(args)
    with (args.folder / "rows.jsonl").open() as rows, (args.folder / "demonstrations.jsonl").open("w") as out:
        for line in rows:
            words = json.loads(line)["text"].split()
            cut = len(words) // 3
            out.write(json.dumps({"prompt": " ".join(words[:cut]), "completion": " ".join(words[cut:])}) + "\n")
    config = {"name": "p", "runs": str(args.folder / "runs"), "data": {"demonstrations": "demonstrations.jsonl"}}
    (args.folder / "p.yaml").write_text(json.dumps({**config, "prepare": STEPS}))
    return {}


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command in a process of its own; its workers are children of that."""
    started = time.perf_counter()
    process = psutil.Popen(
        [sys.executable, "-m", "align", "data", "prepare", str(args.folder / "p.yaml")], stderr=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, held(process))
        time.sleep(0.25)
    assert process.returncode == 0
    told = json.loads((args.folder / "runs/p/0-prepare/run.json").read_text())["summary"]["demonstrations"]
    return {"seconds": time.perf_counter() - started, "peak": peak, "kept": told["rows out"]}


def held(process: psutil.Popen) -> int:
    """Bytes of a process and its children, pages that several of them share counted once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            total += each.memory_full_info().pss
    return total


if __name__ == "__main__":
    main()
