"""What an ensemble of reward heads costs: seconds a step and peak memory of four heads against one.

    python benchmarks/reward_ensemble.py --data pairs.jsonl --rounds 3

Sides, each a process of its own, alternating; the same pairs, batches, base, LoRA (rank 16 on every linear layer) and
optimiser. The first step is warm-up.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import preference_vs_trl as pairs_of


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--data", required=True, help="JSONL of preference pairs, in any format the label stage takes")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps a run, the first is warm-up")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    runs = []
    for number, side in harness.rounds(["1", str(args.heads)], args.rounds):
        given = ["--side", side]
        for key in ("data", "steps", "batch", "max_length", "threads"):
            given += ["--" + key.replace("_", "-"), str(getattr(args, key))]
        say = f"round {number + 1} of {args.rounds}: {side} heads"
        runs.append(harness.side_record(__file__, given, args.threads, say) | {"round": number, "side": side})
    rows = []
    for side in ("1", str(args.heads)):
        own = [run for run in runs if run["side"] == side]
        figures = [harness.middle([run[key] for run in own]) for key in ("step_s", "peak")]
        rows.append([side, harness.spread(figures[0]), harness.spread(figures[1], 2**20, 0)])
    ratios = {key: harness.ratio(runs, str(args.heads), "1", key) for key in ("step_s", "peak")}
    text = harness.markdown(["heads", "s a step", "peak MiB"], rows)
    text += f"\n\n{args.rounds} rounds of {args.steps} steps of {args.batch} pairs of {Path(args.data).stem}.\n\n"
    text += "\n".join(f"- {args.heads} heads over 1, {key}: {harness.spread(value)}" for key, value in ratios.items())
    claim = "`benchmarks/reward_ensemble.py`: what several heads on one base cost."
    harness.finish("reward ensemble", claim, {"ratios": ratios, "runs": runs}, text, args.results)


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import TrainerCallback
    from trl import RewardConfig

    from align import models
    from align.config import ModelSection
    from reward.elements import Labels
    from reward.training import reward_trainer

    torch.set_num_threads(args.threads)
    tokenizer, rows = pairs_of.pairs(args)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = reward_trainer(
            models.load_reward_base(harness.base_folder(), ModelSection(), heads=args.side),
            tokenizer,
            rows,
            RewardConfig(**pairs_of.settings(args, folder)),
            harness.lora("SEQ_CLS", modules_to_save=["score"]),
            Labels(ensemble=args.side),
        )
        pairs_of.lean("ours", trainer.model)
        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        trainer.add_callback(Clock())
        trainer.train()
    return {"step_s": (ends[-1] - ends[0]) / (len(ends) - 1), "peak": harness.peak()}


if __name__ == "__main__":
    main()
