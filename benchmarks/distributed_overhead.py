"""What a second process costs: two processes of one thread against one process of two, the same rows a step.

    python benchmarks/distributed_overhead.py --rounds 3 --steps 6

Sides, alternating:

    one    one process of `--threads` threads, `--batch` pairs a step
    two    two processes of half the threads each under `accelerate launch` with configs/accelerate/cpu.yaml, half the
           pairs each: torch's own data parallel over gloo

Both train DPO as the dpo stage does (TRL's trainer, shared prefixes, lean layers and head), LoRA of rank 16 on every
linear layer, on pairs made of the quickstart's demonstrations. The first step is warm-up; pairs per second are those of
all further steps over their time. Losses are compared step by step.

`in collectives` is the share of that time in which a gradient's all-reduce is under way (backward passes go on
meanwhile) or the process stands in another collective, waiting for the other one included; `transfer` is what an
all-reduce of as many bytes takes of it when both come at the same moment. The difference is waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

SIDES = ("two", "one")
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier", "all_gather_object")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--base", help="folder of the model (default: the embedded one)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps a run, the first is warm-up")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step, over all processes")
    parser.add_argument("--threads", type=int, default=2, help="over all processes")
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--record", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch % 2 or args.threads % 2:
        parser.error(f"--batch is {args.batch} and --threads is {args.threads}: two processes want even numbers.")
    if args.record:
        train(args)
        return
    if args.side:
        print(start(args))
        return
    runs = []
    for number, side in harness.rounds(SIDES, args.rounds):
        given = ["--side", side, *(["--base", args.base] if args.base else [])]
        for key in ("steps", "batch", "threads"):
            given += ["--" + key, str(getattr(args, key))]
        threads = args.threads if side == "one" else args.threads // 2
        record = harness.side_record(__file__, given, threads, f"round {number + 1} of {args.rounds}: {side}")
        runs.append(record | {"round": number, "side": side})
    report(args, runs)


def report(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    off = max(abs(a - b) for run in runs[1:] for a, b in zip(run["losses"], runs[0]["losses"], strict=True))
    rows = []
    for side in SIDES:
        own = [run for run in runs if run["side"] == side]
        figures = {key: harness.middle([run[key] for run in own]) for key in own[0] if key != "losses"}
        seconds, speed = (harness.spread(figures[key], digits=3) for key in ("step_s", "pairs_per_s"))
        rows.append([side, seconds, speed, *(harness.spread(figures[key], 0.01, 1) for key in ("shared", "transfer"))])
    gain = harness.ratio(runs, "two", "one", "pairs_per_s")
    text = harness.markdown(["side", "s a step", "pairs/s", "in collectives %", "transfer %"], rows)
    text += (
        f"\n\n{args.rounds} rounds of {args.steps} steps of {args.batch} pairs, {runs[0]['mebibytes']:.1f} MiB of "
        f"gradients. Largest difference of a loss: {off:.1e}.\n\n- two/one pairs_per_s: {harness.spread(gain)}"
    )
    claim = (
        "`benchmarks/distributed_overhead.py`: two processes of one thread reach at least 0.8 of the throughput of one "
        "process of two threads at the same global batch."
    )
    harness.finish("distributed overhead", claim, {"ratio": gain, "difference": off, "runs": runs}, text, args.results)


def start(args: argparse.Namespace) -> str:
    """One side, in processes of its own; returns its record."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable]
        if args.side == "two":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            file = str(harness.ROOT / "configs/accelerate/cpu.yaml")
            command += ["-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", port]
        command += [__file__, "--record", str(record), "--steps", str(args.steps), "--batch", str(args.batch)]
        command += ["--threads", str(args.threads), *(["--base", args.base] if args.base else [])]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return record.read_text()


def train(args: argparse.Namespace) -> None:
    """In every process of a side; the first writes the record."""
    import torch

    from align import ranks

    world = ranks.world_size()
    torch.set_num_threads(args.threads // world)
    ranks.start()
    with tempfile.TemporaryDirectory() as folder:
        trainer = dpo(args, folder, world)
        clock = Clock()
        trainer.add_callback(clock.callback(trainer))
        clock.watch_collectives()
        trainer.train()
    steps = len(clock.ends) - 1
    seconds = clock.ends[-1] - clock.ends[0]
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    result = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "step_s": seconds / steps,
        "pairs_per_s": args.batch * steps / seconds,
        "shared": clock.seconds_in_collectives(clock.ends[0]) / seconds,
        "transfer": steps * clock.transfer(count) / seconds,
        "mebibytes": 4 * count / 2**20,
    }
    if ranks.is_first():
        Path(args.record).write_text(json.dumps(result))
    ranks.leave()


class Clock:
    """Ends of steps, and when collectives were under way, on this process's clock."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.spans: list[tuple[float, float]] = []

    def callback(self, trainer: Any) -> Any:
        from torch.nn.parallel import DistributedDataParallel
        from transformers import TrainerCallback

        clock = self

        class Ends(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                if isinstance(trainer.model_wrapped, DistributedDataParallel):
                    trainer.model_wrapped.register_comm_hook(None, clock.reduced)

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.ends.append(time.perf_counter())

        return Ends()

    def reduced(self, _, bucket):  # torch refuses other annotations than its own
        """DDP's own all-reduce of the mean, with its beginning and end noted."""
        import torch

        started = time.perf_counter()
        sent = torch.distributed.all_reduce(bucket.buffer().div_(torch.distributed.get_world_size()), async_op=True)

        def done(future: Any) -> Any:
            self.spans.append((started, time.perf_counter()))
            return future.value()[0]

        return sent.get_future().then(done)

    def watch_collectives(self) -> None:
        """From now on those that Python code waits in are noted too."""
        import torch

        for name in COLLECTIVES:
            setattr(torch.distributed, name, self.noting(getattr(torch.distributed, name)))

    def noting(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = collective(*given, **named)
            if not named.get("async_op"):
                self.spans.append((started, time.perf_counter()))
            return result

        return noted

    def seconds_in_collectives(self, since: float) -> float:
        """Seconds after `since` in which at least one was under way, up to the last step's end."""
        total, until = 0.0, since
        for started, ended in sorted(self.spans):
            started, ended = max(started, until), min(ended, self.ends[-1])
            if ended > started:
                total, until = total + ended - started, ended
        return total

    def transfer(self, count: int) -> float:
        """Seconds of an all-reduce of `count` floats that every process comes to at once; the best of five."""
        import torch

        from align import ranks

        if ranks.world_size() == 1:
            return 0.0
        best, sent = float("inf"), torch.zeros(count)
        for _ in range(5):
            torch.distributed.barrier()
            started = time.perf_counter()
            torch.distributed.all_reduce(sent)
            best = min(best, time.perf_counter() - started)
        return best


def dpo(args: argparse.Namespace, folder: str, world: int) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from align import models
    from align.config import ModelSection
    from align.heads import lean_head
    from align.lean import lean_layers
    from align.lora import lean_lora
    from align.prefix import share_prefixes

    base, section = args.base or harness.base_folder(), ModelSection(dtype="float32")
    trainer = DPOTrainer(
        model=models.load_causal_lm(base, section),
        args=DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch // world,
            max_steps=args.steps,
            learning_rate=1e-4,
            seed=0,
            data_seed=0,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            max_length=512,
        ),
        train_dataset=Dataset.from_list(pairs(args.steps * args.batch)),
        processing_class=models.load_tokenizer(base, section),
        peft_config=harness.lora("CAUSAL_LM"),
    )
    for make_lean in (lean_head, lean_lora, lean_layers):
        make_lean(trainer.model)
    if reason := share_prefixes(trainer.model):
        sys.exit(f"prefixes are not shared: {reason}")
    return trainer


def pairs(count: int) -> list[dict[str, Any]]:
    """The quickstart's demonstrations, each against the answer to another."""
    lines = (harness.ROOT / "configs/quickstart/demonstrations.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)
    chosen = [rows[number % len(rows)] for number in range(count)]
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True)
    ]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
