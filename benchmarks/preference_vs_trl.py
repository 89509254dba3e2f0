"""DPO and reward training on shared prefixes against TRL as installed: pairs per second, peak memory, the same losses.

    python benchmarks/preference_vs_trl.py --task dpo --data pairs.jsonl --rounds 3 --steps 4

Sides, each a process of its own, alternating:

    ours      TRL's trainer, on the shared-prefix forward, lean LoRA layers and the lean head
    unshared  the same without shared prefixes: what is left is the gain of the head and the layers
    trl       TRL's trainer, untouched

The same on all sides: pairs, order, batches, tokens (TRL's own rendering), base, LoRA (rank 16 on every linear layer),
optimiser and learning rate; the reference's log-probabilities are computed in the step. The first step is warm-up;
pairs per second are those of all further steps over their time. Losses are compared step by step.

`tokens`: of the measured batches as they are padded, as they are, and as they remain when every distinct beginning is
computed once. The floor is the arithmetic of the remaining tokens at the rate this machine reaches in a large product.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

SIDES = ("ours", "unshared", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--task", choices=["dpo", "reward"], required=True)
    parser.add_argument("--data", required=True, help="JSONL of preference pairs, in any format the label stage takes")
    parser.add_argument("--name", help="of the data, in the results (default: the file's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps a run, the first is warm-up")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    sides, runs = args.sides.split(","), []
    for number, side in harness.rounds(sides, args.rounds):
        given = ["--side", side]
        for key in ("task", "data", "steps", "batch", "max_length", "threads"):
            given += ["--" + key.replace("_", "-"), str(getattr(args, key))]
        record = harness.side_record(__file__, given, args.threads, f"round {number + 1} of {args.rounds}: {side}")
        runs.append(record | {"round": number, "side": side})
    report(args, sides, runs)


def report(args: argparse.Namespace, sides: list[str], runs: list[dict[str, Any]]) -> None:
    first = {side: next(run for run in runs if run["side"] == side) for side in sides}
    tokens, floor = runs[0]["tokens"], harness.middle([run["floor_s"] for run in runs])
    rows = []
    for side in sides:
        own = [run for run in runs if run["side"] == side]
        seconds = harness.middle([run["step_s"] for run in own])
        pairs = harness.middle([run["pairs_per_s"] for run in own])
        peak = harness.middle([run["peak"] for run in own])
        off = max(abs(a - b) for a, b in zip(first[side]["losses"], first[sides[-1]]["losses"], strict=True))
        rows.append([side, harness.spread(seconds), harness.spread(pairs, digits=3), harness.spread(peak, 2**20, 0)])
        rows[-1].append(f"{off:.1e}")
    ratios = {
        f"{a}/{b} {key}": harness.ratio(runs, a, b, key)
        for a, b in (("ours", "trl"), ("unshared", "trl"), ("ours", "unshared"))
        if a in sides and b in sides
        for key in ("pairs_per_s", "peak")
    }
    name = f"{args.task} on {args.name or Path(args.data).stem}"
    text = harness.markdown(
        ["side", "s a step", "pairs/s", "peak MiB", f"largest difference of a loss to {sides[-1]}'s"], rows
    )
    shares = f"{tokens['real'] / tokens['shared']:.2f}"
    text += (
        f"\n\n{args.rounds} rounds of {args.steps} steps of {args.batch} pairs, {runs[0]['dtype']}, {args.threads} "
        f"threads. Tokens of the measured steps: {tokens['padded']} padded, {tokens['real']} real, {tokens['shared']} "
        f"distinct (real/distinct {shares}). Arithmetic floor of a step: {harness.spread(floor)} s.\n\n"
    )
    text += "\n".join(f"- {key}: {harness.spread(value)}" for key, value in ratios.items())
    claim = (
        f"`benchmarks/preference_vs_trl.py --task {args.task}`: TRL's own trainer, with and without what is below it."
    )
    harness.finish(name, claim, {"ratios": ratios, "tokens": tokens, "runs": runs}, text, args.results)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One side in this process."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = (dpo if args.task == "dpo" else reward)(args, folder)
        starts: list[float] = []
        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                starts.append(time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.perf_counter())

        trainer.add_callback(Clock())
        batches: list[Any] = []
        model_forward = trainer.compute_loss

        def noting(model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
            real = inputs["attention_mask"].bool()
            batches.append([ids[here].tolist() for ids, here in zip(inputs["input_ids"], real, strict=True)])
            return model_forward(model, inputs, *rest, **kwargs)

        trainer.compute_loss = noting
        trainer.train()
    seconds = [end - start for start, end in zip(starts, ends, strict=True)]
    measured = batches[1:]
    shared = [len({tuple(row[: i + 1]) for row in rows for i in range(len(row))}) for rows in measured]
    tokens = {
        "padded": sum(len(rows) * max(map(len, rows)) for rows in measured),
        "real": sum(len(row) for rows in measured for row in rows),
        "shared": sum(shared),
    }
    model = trainer.model
    trunk = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n)
    # Forward and backward through frozen weights: 2 + 2 a weight and token; DPO passes the reference as well.
    work = tokens["shared"] / len(measured) * trunk * (4 + (2 if args.task == "dpo" else 0))
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "step_s": sum(seconds[1:]) / len(seconds[1:]),
        "pairs_per_s": args.batch * len(seconds[1:]) / sum(seconds[1:]),
        "peak": harness.peak(),
        "tokens": tokens,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "floor_s": work / harness.product_rate(),
    }


def pairs(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """(tokenizer, pairs of at most max_length tokens), always the same ones."""
    from align import models
    from align.config import ModelSection
    from align.data.load import load_preferences
    from align.data.render import preference_row

    tokenizer = models.load_tokenizer(harness.base_folder(), ModelSection())
    records = load_preferences(args.data, 0.2).records
    random.Random(0).shuffle(records)
    kept: list[dict[str, Any]] = []
    for record in records:
        row = preference_row(tokenizer, record)
        if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) < args.max_length:
            kept.append({key: record[key] for key in ("prompt", "chosen", "rejected")} | row)
        if len(kept) == args.steps * args.batch:
            return tokenizer, kept
    sys.exit(f"{args.data} has {len(kept)} pairs that fit, {args.steps * args.batch} are wanted")


def settings(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": args.batch,
        "max_steps": args.steps,
        "learning_rate": 1e-4,
        "seed": 0,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,  # no autocast: the weights are held in the dtype that fits the machine
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_length": args.max_length,
    }


def lean(side: str, model: Any) -> None:
    from align.lean import lean_layers
    from align.lora import lean_lora
    from align.prefix import share_prefixes

    if side == "trl":
        return
    lean_lora(model)
    lean_layers(model)
    if side == "ours" and (reason := share_prefixes(model)):
        sys.exit(f"prefixes are not shared: {reason}")


def dpo(args: argparse.Namespace, folder: str) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from align import models
    from align.config import ModelSection
    from align.heads import lean_head

    tokenizer, rows = pairs(args)
    trainer = DPOTrainer(
        model=models.load_causal_lm(harness.base_folder(), ModelSection()),
        args=DPOConfig(**settings(args, folder)),
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]),
        processing_class=tokenizer,
        peft_config=harness.lora("CAUSAL_LM"),
    )
    if args.side != "trl":
        lean_head(trainer.model)
    lean(args.side, trainer.model)
    return trainer


def reward(args: argparse.Namespace, folder: str) -> Any:
    import torch
    from trl import RewardConfig

    from align import models
    from align.config import ModelSection
    from reward.elements import Labels
    from reward.training import reward_trainer

    tokenizer, rows = pairs(args)
    torch.manual_seed(0)  # the score head is drawn
    trainer = reward_trainer(
        models.load_reward_base(harness.base_folder(), ModelSection()),
        tokenizer,
        rows,
        RewardConfig(**settings(args, folder)),
        harness.lora("SEQ_CLS", modules_to_save=["score"]),
        Labels(),
    )
    lean(args.side, trainer.model)
    return trainer


if __name__ == "__main__":
    main()
