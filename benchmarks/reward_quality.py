"""Reward models of equal cost: held-out accuracy and calibration here against TRL's RewardTrainer and against words.

    python benchmarks/reward_quality.py --data pairs.jsonl --minutes 25

Sides, each a process of its own:

    ours   TRL's trainer on the shared-prefix forward, lean LoRA layers
    trl    TRL's RewardTrainer, untouched

Both get the same minutes of training on the same pairs in the same order, from the same seed: base, LoRA (rank 16 on
every linear layer), optimiser and learning rate are the same, which falls linearly to zero as the time runs out, after
a warm-up of 5 %; --epochs ends a side before its time. Pairs are split by prompt, or by `tree_id` where they have one.
Held-out pairs are scored by the plain forward, and the two sides compared pair by pair (exact McNemar test). The floor
is TF-IDF with logistic regression on the same split; calibration is measured after a temperature fitted on the other
half of the held-out prompts.
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
import numpy as np

SIDES = ("ours", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--data", required=True, help="JSONL of preference pairs, in any format the label stage takes")
    parser.add_argument("--minutes", type=float, default=25, help="of training, each side")
    parser.add_argument("--epochs", type=float, default=3, help="passes over the pairs at most")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--test-share", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-layer", type=int, default=0, help="LoRA from this layer on, on both sides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run(args)))
        return
    given = ["--data", args.data]
    keys = ("minutes", "epochs", "batch", "learning_rate", "max_length", "test_share", "seed", "first_layer", "threads")
    for key in keys:
        given += ["--" + key.replace("_", "-"), str(getattr(args, key))]
    runs = {
        side: harness.side_record(__file__, ["--side", side, *given], args.threads, side)
        for side in args.sides.split(",")
    }
    report(args, runs)


def report(args: argparse.Namespace, runs: dict[str, dict[str, Any]]) -> None:
    from reward.baselines import words_only
    from reward.calibration import calibration_noise, cross_fitted_temperature, expected_calibration_error
    from reward.statistics import mcnemar, mean_with_interval

    train, test = split(args)
    keys = [record["key"] for record in test]
    words = words_only(train, test).correct_P
    assert words is not None
    correct = {side: np.array(run["gaps"]) > 0 for side, run in runs.items()} | {"TF-IDF": words}
    rows, figures = [], {}
    for side, right in correct.items():
        accuracy = mean_with_interval(right.astype(float), clusters=keys, seed=0)
        figures[side] = {"accuracy": accuracy.record()}
        row = [side, f"{accuracy.mean:.3f} [{accuracy.low:.3f}–{accuracy.high:.3f}]", "–", "–", "–", "–"]
        if side in runs:
            gaps = np.array(runs[side]["gaps"])
            temperature = cross_fitted_temperature(gaps, keys)
            assert temperature is not None
            confidence = 1 / (1 + np.exp(-np.abs(gaps) / temperature))
            before = expected_calibration_error(1 / (1 + np.exp(-np.abs(gaps))), right)
            after, noise = expected_calibration_error(confidence, right), calibration_noise(confidence)
            figures[side] |= {"ece_before": before, "ece": after, "ece_noise": noise, **{
                key: runs[side][key] for key in ("steps", "seconds", "peak")
            }}  # fmt: skip
            row[2:] = [
                f"{before:.3f} → {after:.3f} (noise {noise:.3f})",
                f"{runs[side]['steps'] * args.batch}",
                f"{runs[side]['seconds'] / 60:.1f}",
                f"{runs[side]['peak'] / 2**20:.0f}",
            ]
        rows.append(row)
    text = harness.markdown(
        ["side", "held-out accuracy", "ECE before → after scaling", "pairs seen", "minutes", "peak MiB"], rows
    )
    if set(runs) == set(SIDES):
        b, c = (int((correct[x] & ~correct[y]).sum()) for x, y in (SIDES, SIDES[::-1]))
        figures["mcnemar"] = {"ours_alone": b, "trl_alone": c, "p": mcnemar(b, c)}
        text += f"\n\nRight here alone {b}, there alone {c}: p = {mcnemar(b, c):.3f} (exact McNemar test)."
    text += f"\n\n{len(train)} training pairs, {len(test)} held out, {len(set(keys))} held-out prompts or trees."
    claim = "`benchmarks/reward_quality.py`: reward models of equal training time on the same pairs."
    harness.finish(f"reward quality on {Path(args.data).stem}", claim, {"figures": figures}, text, args.results)


def split(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, test) with their tokens; rows longer than max_length are left out, and pairs of one text."""
    from align import models
    from align.config import ModelSection
    from align.data.load import load_preferences
    from align.data.render import preference_row
    from reward.records import prompt_id, split_of, user_prompt

    tokenizer = models.load_tokenizer(harness.base_folder(), ModelSection())
    found: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for record in load_preferences(args.data, args.test_share).records:
        row = record | preference_row(tokenizer, record)
        if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) >= args.max_length:
            continue
        tree = record.get("tree_id")
        side = record["split"] if tree is None else split_of(user_prompt(str(tree)), args.test_share)
        found[side].append(row | {"key": str(tree) if tree is not None else prompt_id(record["prompt"])})
    random.Random(args.seed).shuffle(found["train"])
    return found["train"], found["test"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One side in this process."""
    import torch
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer

    from align import models
    from align.config import ModelSection
    from align.lean import lean_layers
    from align.lora import lean_lora
    from align.prefix import share_prefixes
    from reward.scoring import score_rows

    torch.set_num_threads(args.threads)
    train, test = split(args)
    tokenizer = models.load_tokenizer(harness.base_folder(), ModelSection())
    torch.manual_seed(args.seed)
    base = models.load_reward_base(harness.base_folder(), ModelSection())
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=base,
            args=RewardConfig(
                output_dir=folder,
                per_device_train_batch_size=args.batch,
                num_train_epochs=args.epochs,
                learning_rate=args.learning_rate,
                seed=args.seed,
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                logging_steps=20,
                disable_tqdm=True,
                max_length=args.max_length,
            ),
            train_dataset=Dataset.from_list(
                [
                    {f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")}
                    for row in train
                ]
            ),
            processing_class=tokenizer,
            peft_config=harness.lora(
                "SEQ_CLS",
                modules_to_save=["score"],
                layers_to_transform=list(range(args.first_layer, base.config.num_hidden_layers)),
            ),
        )
        if args.side == "ours":
            lean_lora(trainer.model)
            lean_layers(trainer.model)
            if reason := share_prefixes(trainer.model):
                sys.exit(f"prefixes are not shared: {reason}")
        budget, started = args.minutes * 60, 0.0

        def share(_: int) -> float:
            """Of the learning rate, by the share of the time or of the steps that is gone, whichever is more."""
            gone = (time.perf_counter() - started) / budget if started else 0.0
            gone = max(gone, trainer.state.global_step / max(trainer.state.max_steps, 1))
            return max(0.0, min(gone / 0.05, 1.0) * (1 - gone)) if started else 0.0

        class Budget(TrainerCallback):
            def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
                control.should_training_stop = time.perf_counter() - started > budget

        trainer.add_callback(Budget())
        trainer.create_optimizer()
        started = time.perf_counter()
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, share)
        trainer.train()
        seconds, peak = time.perf_counter() - started, harness.peak()
        rows = [row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected") for row in test]
        scores = score_rows(trainer.model, rows, tokenizer.pad_token_id, batch_size=8)
    return {
        "gaps": [a - b for a, b in zip(scores[: len(test)], scores[len(test) :], strict=True)],
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "peak": peak,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


if __name__ == "__main__":
    main()
