"""How long preflight takes: 100,000 pairs, and the quickstart's data.

Pairs are made up by a seed: prompts of about 40 words, answers of about 60. The claim is 60 s for 100,000 pairs on two
cores, and less than 3 % of a quickstart run (12 minutes).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

QUICKSTART_SECONDS = 720.0


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    args = parser.parse_args()
    from align.config_file import load_config

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        write_pairs(data, args.rows)
        megabytes = data.stat().st_size / 1e6
        raw: dict[str, Any] = {
            "runs": f"{folder}/runs",
            "model": {"base": harness.base_folder()},
            "data": {"preferences": str(data)},
            "label": {"source": "dataset"},
            "stages": ["label", "reward", "dpo"],
        }
        file = Path(folder) / "pairs.yaml"
        file.write_text(json.dumps(raw))
        pairs = seconds(load_config(file))
        quickstart = harness.ROOT / "configs" / "quickstart.yaml"
        small = seconds(load_config(quickstart, [f"runs={folder}/quick"]))
    rows = [
        [f"{args.rows:,} pairs ({megabytes:.0f} MB), label, reward and dpo", *told(pairs), "60 s"],
        ["quickstart, all stages", *told(small), f"{100 * small[0] / QUICKSTART_SECONDS:.1f} % of 12 min; 3 %"],
    ]
    text = harness.markdown(["what", "seconds", "CPU seconds", "claim"], rows)
    text += f"\n\nPeak memory of the process: {harness.peak() / 2**30:.2f} GiB."
    claim = "`benchmarks/check.py`: preflight in one process, imports included in the first figure."
    result = {"rows": args.rows, "pairs_s": pairs, "quickstart_s": small, "peak_bytes": harness.peak()}
    harness.finish("check", claim, result, text, args.results)


def seconds(config: Any) -> tuple[float, float]:
    """(seconds, CPU seconds) of one check."""
    started, busy = time.perf_counter(), time.process_time()
    from align.check.command import check

    check(config, lambda line: None)
    return time.perf_counter() - started, time.process_time() - busy


def told(took: tuple[float, float]) -> list[str]:
    return [f"{figure:.1f}" for figure in took]


def write_pairs(path: Path, count: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(length // 2, length * 3 // 2)))

    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = {"prompt": f"{number} {text(40)}?", "chosen": text(60), "rejected": text(60)}
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
