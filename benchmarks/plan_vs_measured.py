"""Memory of the real training stages against what `align plan` says of them beforehand, on a CPU.

    python benchmarks/plan_vs_measured.py --model embedded --results benchmarks/RESULTS.md

Every stage runs two steps on made-up rows of equal length, in a process of its own. Measured is the largest resident
set of that process (VmHWM) less what was resident once everything that the stage imports was imported. Planned is the
peak of `align.plan` for the same config. Models: the embedded one, and random Llamas of about 0.5 billion weights
(`large`) and 35 million (`small`, for the tests) with the embedded model's tokenizer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness

sys.path.insert(0, str(harness.ROOT))  # the checkout this file lies in, whatever is installed

STAGES = ("sft", "reward", "dpo", "ppo")
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "group",
    "country",
    "problem",
    "hand",
]
RANDOM = {  # hidden size, MLP width, layers, heads of 64, key heads
    "large": (1280, 3584, 24, 20, 5),
    "small": (384, 1024, 10, 6, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--model", choices=["embedded", *RANDOM], default="embedded")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--batch", type=int, default=4, help="rows a forward pass")
    parser.add_argument("--prompt", type=int, default=64, help="words of a prompt")
    parser.add_argument("--answer", type=int, default=32, help="words of an answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    parser.add_argument("--side", nargs=2, metavar=("STAGE", "CONFIG"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measured(*args.side)))
        return
    wanted = args.stages.split(",")
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        file = pipeline_file(args, Path(folder))
        planned = harness.side_record(__file__, ["--side", "plan", str(file)], args.threads, "plan")
        found = {}
        for stage in STAGES:
            if stage == "reward":
                harness.side_record(__file__, ["--side", "label", str(file)], args.threads, "label")
            if stage in wanted or stage == "sft" or (stage == "reward" and "ppo" in wanted):
                found[stage] = harness.side_record(__file__, ["--side", stage, str(file)], args.threads, stage)["bytes"]
    report(args, wanted, planned, found)


def report(args: argparse.Namespace, wanted: list[str], planned: dict[str, Any], found: dict[str, float]) -> None:
    ratios = {stage: planned[stage]["bytes"] / found[stage] for stage in wanted}
    rows = []
    for stage in wanted:
        sizes = [f"{size / 2**20:.0f}" for size in (planned[stage]["bytes"], found[stage])]
        rows.append([stage, planned[stage]["phase"], *sizes, f"{ratios[stage]:.2f}"])
    text = harness.markdown(["stage", "peak at", "planned MiB", "measured MiB", "planned / measured"], rows)
    text += f"\n\nTwo steps of {args.batch} rows, prompts of {args.prompt} words, answers of {args.answer}."
    name = f"plan on {args.model} {args.dtype}"
    claim = f"`benchmarks/plan_vs_measured.py --model {args.model} --dtype {args.dtype}`: peak memory on a CPU."
    harness.finish(name, claim, {"planned": planned, "measured": found, "ratios": ratios}, text, args.results)


def pipeline_file(args: argparse.Namespace, folder: Path) -> Path:
    """A pipeline over made-up pairs that trains every stage for two steps."""
    stream = random.Random(0)

    def text(words: int) -> str:
        return " ".join(stream.choice(WORDS) for _ in range(words))

    lines = [
        {"prompt": text(args.prompt), "chosen": text(args.answer), "rejected": text(args.answer)}
        for _ in range(max(24, 4 * args.batch))
    ]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = {"max_steps": 2, "per_device_train_batch_size": args.batch, "max_length": 512, "save_steps": 1000}
    config = {
        "name": "plan",
        "runs": str(folder / "runs"),
        "stages": ["sft", "label", "reward", "dpo", "ppo"],
        "model": {"base": base(args.model, folder), "dtype": args.dtype},
        "data": {"demonstrations": str(data), "preferences": str(data)},
        "label": {"source": "dataset"},
        "sft": {**steps, "packing": False},
        "reward": {**steps, "probed": 1, "trust": "ignore"},
        "dpo": steps,
        "ppo": {
            "total_episodes": 2 * args.batch,
            "num_mini_batches": 2,
            "num_ppo_epochs": 1,
            "per_device_train_batch_size": args.batch,
            "response_length": args.answer,
            "save_steps": 1000,
        },
    }
    file = folder / "plan.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return file


def base(name: str, folder: Path) -> str:
    if name == "embedded":
        return "smollm2-135m"
    script = [__file__, ["--side", f"make {name}", str(folder / name)], 1, f"random model {name}"]
    return str(harness.side_record(*script)["folder"])


def measured(stage: str, file: str) -> dict[str, Any]:
    """In a process of its own: a stage's memory, the plan of all of them, or a random model."""
    if stage.startswith("make "):
        return {"folder": random_model(*RANDOM[stage.removeprefix("make ")], Path(file))}
    from align import pipeline
    from align.config_file import load_config

    config = load_config(file)
    if stage == "plan":
        from align.plan import planning

        found = planning.plan(config, planning.machine_of(tflops=0.01))
        return {s.stage: {"bytes": s.phase.total, "phase": s.phase.name, "parts": s.phase.parts} for s in found.stages}
    for name in ("align.training", "align.sft", "align.dpo", "align.reward_model", "align.ppo.stage", "align.label"):
        importlib.import_module(name)
    from transformers.models.llama import modeling_llama  # noqa: F401
    from trl import DPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401

    before = status("VmRSS")
    pipeline.run_stage(config, stage)
    return {"bytes": status("VmHWM") - before, "imports": before}


def random_model(hidden: int, width: int, layers: int, heads: int, key_heads: int, folder: Path) -> str:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(harness.base_folder())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def status(key: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
