"""PPO here against TRL's last PPO: episodes per second and peak memory; and peak memory against LoRA SFT.

    python benchmarks/ppo_vs_trl.py --rounds 3 --updates 3 --out result.json

The parent starts every side as a process of its own, alternating within one run, so that whatever else the machine
does falls on all sides alike:

    ours    align.ppo.PPOTrainer: one base for everyone, the reward model as a LoRA adapter on it
    trl     trl.experimental.ppo.PPOTrainer of trl 1.12.0, the last release that had it: the LoRA policy is its own
            reference; the reward model is the same classifier, merged; the value model is that classifier once more,
            trained whole, as in TRL's examples (`--trl-value lora` trains only LoRA and the head of it instead)
    sft     trl.SFTTrainer as installed, for its memory: LoRA on rows of the same length, as many optimiser steps

The same on all sides: base and dtype, LoRA (rank 16 on every linear layer), 16 rows a batch, the optimiser, learning
rate 1e-5, no gradient checkpointing, the number of threads, transformers, PEFT and torch. On both PPO sides also: the
prompts' token ids (about 35 each; checked at the sampler), 16 episodes an update in one mini-batch, 4 passes over them,
temperature 1 over the whole vocabulary, KL coefficient 0.05, and TRL's defaults for clipping, GAE and the value loss.

Equal work: an answer that stops early is less work, and how early depends on sampling. So nothing ever stops: both
sides are given, by a setting each has, a stop token one past the vocabulary, which cannot be sampled, and every answer
has exactly 48 tokens (counted at the sampler, reported as `answer_tokens`). That holds back one difference: where
answers do stop, finished rows leave the batch here, and are computed to the end of the longest answer there. (TRL takes
a sampled padding token for the end of an answer all the same; that masks its numbers and saves it no work.)

Time: a callback on both sides. An update lasts from the log of the one before it (the first: from the start of
training) to its own log; the first one of a process is reported apart as warm-up. Each side's sampler is wrapped from
outside, to time it, to count its tokens and to check its prompts. Nothing in either trainer is replaced.

Memory: `ru_maxrss` of the process at its end (`peak`), and its resident set once the trainer is built and every weight
has been read (`loaded`). Both count the libraries, about 500 MiB. They say nothing about a GPU's memory: this benchmark
is for CPUs, and keeps to them.

What is left different, because it is part of the designs compared: the sampler (a loop of its own with the adapter
folded into the weights here, `generate` there), the value function (a head on the policy here, a second model there),
the vocabulary's logits (of answers only here, of all positions there), gradient clipping (on here, absent there), and,
where the base is bfloat16, the value model's precision (its weights are trained in bfloat16 there).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
from harness import lora, machine, middle, peak, rounds, spread

ROOT = Path(__file__).resolve().parent.parent
TRL = "1.12.0"
SIDES = ("ours", "trl", "sft")
EPISODES, NEW_TOKENS, PROMPT_TOKENS, EPOCHS = 16, 48, 35, 4
SYSTEM = "You are a helpful assistant."
# Settings both PPO sides know by the same name.
PPO: dict[str, Any] = {
    "per_device_train_batch_size": EPISODES,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "num_ppo_epochs": EPOCHS,
    "response_length": NEW_TOKENS,
    "temperature": 1.0,
    "kl_coef": 0.05,
}
TRAINER: dict[str, Any] = {
    "learning_rate": 1e-5,
    "seed": 0,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,  # no autocast: the weights are held in --dtype; TRL's config would switch it on
    "gradient_checkpointing": False,  # TRL's config would ask for it
    "save_strategy": "no",
    "disable_tqdm": True,
}


# -- the parent -------------------------------------------------------------------------------------------------------


def main() -> None:
    args = arguments()
    if args.side:
        run_side(args)
        return
    sides = args.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        sys.exit(f"--sides: {', '.join(sorted(unknown))} is none of {', '.join(SIDES)}")
    with tempfile.TemporaryDirectory(prefix="ppo-vs-trl-") as folder:
        work = Path(folder)
        trl = trl_folder(args.trl) if "trl" in sides else None
        prepared = child(args, "prepare", work, None)
        result: dict[str, Any] = {
            "machine": machine(),
            "options": {key: getattr(args, key) for key in ("rounds", "updates", "dtype", "threads", "trl_value")},
            "prepared": prepared,
            "runs": [],
        }
        for number, side in rounds(sides, args.rounds):
            print(f"round {number + 1} of {args.rounds}: {side} ... ", end="", file=sys.stderr, flush=True)
            started = time.perf_counter()
            load = os.getloadavg()[0]
            run = child(args, side, work, trl) | {"round": number, "load_before": load}
            print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
            result["runs"].append(run)
            result["summary"] = summary(result["runs"])
            if args.out:  # after every run: a kill loses one run, not all
                Path(args.out).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    claim = f"`benchmarks/ppo_vs_trl.py`: PPO here against trl {TRL}'s, and the memory of TRL's LoRA SFT."
    harness.finish("ppo", claim, {"summary": result["summary"]}, table(result), args.results)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3, help="times every side runs (default 3)")
    parser.add_argument("--updates", type=int, default=3, help="updates a run, the first is warm-up (default 3)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the base")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads a process (default: all cores)")
    parser.add_argument("--sides", default=",".join(SIDES), help="which sides run (default ours,trl,sft)")
    parser.add_argument(
        "--trl-value", choices=["full", "lora"], default="full", help="how TRL's value model is trained"
    )
    parser.add_argument("--trl", help=f"folder with trl {TRL} (default: installed once into the cache folder)")
    parser.add_argument("--base", help="folder of another Llama-like model (default: the embedded 135M model)")
    parser.add_argument("--out", help="JSON file for everything measured")
    parser.add_argument("--results", help="Markdown file whose section is written anew")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.updates < 1 or args.rounds < 1:
        parser.error("--updates and --rounds are at least 1")
    return args


def child(args: argparse.Namespace, side: str, work: Path, trl: Path | None) -> dict[str, Any]:
    """One side in a process of its own; what it printed as its last line."""
    command = [sys.executable, str(Path(__file__).resolve()), "--side", side, "--work", str(work)]
    for key in ("updates", "dtype", "trl_value", "base", "threads"):
        if (value := getattr(args, key)) is not None:
            command += ["--" + key.replace("_", "-"), str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if side == "trl":
        environment |= {"PYTHONPATH": str(trl), "TRL_EXPERIMENTAL_SILENCE": "1"}
    # Output goes to files, and torch is never imported here: `ru_maxrss` of a child starts at its parent's.
    log = work / f"{side}.log"
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-30:])
        sys.exit(f"{side} failed with status {done.returncode}:\n{tail}")
    record: dict[str, Any] = json.loads(lines[-1])
    return record


def trl_folder(given: str | None) -> Path:
    """Folder that holds trl 1.12.0 and nothing else; installed on first use."""
    from align.models import cache_folder

    folder = Path(given) if given else cache_folder() / f"trl-{TRL}"
    if not (folder / "trl").is_dir():
        if given:
            sys.exit(f"--trl {folder} holds no trl: pip install --no-deps --target {folder} trl=={TRL}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"trl=={TRL}"]
        subprocess.run(pip, check=True)
    return folder


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians with the range over runs; ratios are within a round, then their median and range."""
    by_side = {side: [run for run in runs if run["side"] == side] for side in SIDES}
    out: dict[str, Any] = {
        side: {key: middle([run[key] for run in own]) for key in FIGURES} for side, own in by_side.items() if own
    }
    for first, second, keys in (("ours", "trl", ("episodes_per_s", "peak")), ("ours", "sft", ("peak",))):
        mates = {run["round"]: run for run in by_side[second]}
        pairs = [(run, mates[run["round"]]) for run in by_side[first] if run["round"] in mates]
        for key in keys if pairs else ():
            out[f"{first}/{second} {key}"] = middle([a[key] / b[key] for a, b in pairs])
    return out


# key in a run -> (heading, divisor, digits)
FIGURES: dict[str, tuple[str, float, int]] = {
    "warm_up_s": ("warm-up s", 1, 1),
    "update_s": ("update s", 1, 1),
    "episodes_per_s": ("episodes/s", 1, 3),
    "answer_tokens_per_s": ("answer tokens/s", 1, 1),
    "sampling_s": ("of it sampling s", 1, 1),
    "loaded": ("loaded MiB", 2**20, 0),
    "peak": ("peak MiB", 2**20, 0),
}


def table(result: dict[str, Any]) -> str:
    figures = result["summary"]
    rows = [["median [min–max]", *(heading for heading, _, _ in FIGURES.values())]]
    for side in (side for side in SIDES if side in figures):
        cells = [spread(figures[side][key], divisor, digits) for key, (_, divisor, digits) in FIGURES.items()]
        rows.append([side, *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    settings = result["runs"][0]["settings"]
    options = result["options"]
    head = (
        f"{result['machine']['cpu']}, {options['threads']} threads, {settings['dtype']}, {options['rounds']} rounds of "
        f"{options['updates']} updates; torch {settings['torch']}, transformers {settings['transformers']}, "
        f"TRL's value model: {options['trl_value']}"
    )
    ratios = [f"{name}: {spread(value, 1, 2)}" for name, value in figures.items() if "/" in name]
    return "\n".join([head, "", *lines, "", *ratios])


# -- one side ---------------------------------------------------------------------------------------------------------


def run_side(args: argparse.Namespace) -> None:
    """Run one side in this process and print what was measured as one line of JSON, the last one."""
    import torch

    torch.set_num_threads(args.threads)
    work = Path(args.work)
    if args.side == "prepare":
        print(json.dumps(prepare(args, work)))
        return
    meter = Meter(json.loads((work / "prompts.json").read_text()))
    torch.manual_seed(0)
    trainer = {"ours": build_ours, "trl": build_trl, "sft": build_sft}[args.side](args, work, meter)
    touch_weights()
    loaded, peak_loaded = resident(), peak()
    with meter.watching(args.side):
        trainer.train()
    print(json.dumps(meter.record(args.side) | {"loaded": loaded, "peak_loaded": peak_loaded, "peak": peak()}))


class Meter:
    """Takes times and counts tokens from outside: by a callback, and by a wrapper around the sampler."""

    def __init__(self, prompts: list[dict[str, Any]]) -> None:
        self.prompts = prompts
        self.known = {tuple(prompt["ids"]) for prompt in prompts}
        self.settings: dict[str, Any] = {}
        self.ticks: list[float] = []  # start of training, then the end of every update
        self.sampling_s: list[float] = []
        self.answer_tokens: list[int] = []

    def tick(self) -> None:
        self.ticks.append(time.perf_counter())

    def callback(self, steps_per_update: int | None = None) -> Any:
        """Ticks at the log of every update, or every `steps_per_update` optimiser steps."""
        from transformers import TrainerCallback

        meter = self

        class Ticks(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                meter.tick()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if steps_per_update is None and {"update", "episode"} & set(logs or ()):
                    meter.tick()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if steps_per_update and state.global_step % steps_per_update == 0:
                    meter.tick()

        return Ticks()

    @contextlib.contextmanager
    def watching(self, side: str) -> Iterator[None]:
        """Wraps the side's sampler; SFT has none."""
        owner, name, read = self._sampler(side)
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            output = original(*args, **kwargs)
            self.sampling_s.append(time.perf_counter() - started)
            read(output, *args, **kwargs)
            return output

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def _sampler(self, side: str) -> tuple[Any, str, Callable[..., None]]:
        """Where the side's sampler is looked up, under which name, and what reads its output."""
        if side == "ours":
            from align.ppo import rollout

            return rollout, "sample_answers", self._drawn
        from transformers import GenerationMixin

        return GenerationMixin, "generate", self._generated

    def _drawn(self, answers: Any, policy: Any, prompts: Any, *_: Any, **__: Any) -> None:
        self._count(prompts, sum(len(answer.ids) for answer in answers))

    def _generated(self, output: Any, *_: Any, input_ids: Any, attention_mask: Any, **__: Any) -> None:
        prompts = [ids[real.bool()].tolist() for ids, real in zip(input_ids, attention_mask, strict=True)]
        self._count(prompts, len(prompts) * (output.sequences.shape[1] - input_ids.shape[1]))

    def _count(self, prompts: list[list[int]], tokens: int) -> None:
        if strange := [ids for ids in prompts if tuple(ids) not in self.known]:
            raise RuntimeError(f"a prompt with other tokens than those prepared was sampled from: {strange[0]}")
        self.answer_tokens.append(tokens)

    def record(self, side: str) -> dict[str, Any]:
        seconds = [after - before for before, after in zip(self.ticks, self.ticks[1:], strict=False)]
        steady = statistics.median(seconds[1:] or seconds)
        calls = len(self.answer_tokens) // len(seconds)  # of `generate` in an update
        tokens = sum(self.answer_tokens) / len(seconds) if calls else None
        if side != "sft" and tokens != EPISODES * NEW_TOKENS:
            raise RuntimeError(f"{tokens} answer tokens an update, not {EPISODES} x {NEW_TOKENS}: not equal work")
        sampling = statistics.median(self.sampling_s[calls:] or self.sampling_s) * calls if calls else None
        return {
            "side": side,
            "seconds": seconds,
            "warm_up_s": seconds[0] if len(seconds) > 1 else None,
            "update_s": steady,
            "episodes_per_s": None if side == "sft" else EPISODES / steady,
            "answer_tokens_per_s": tokens / steady if tokens else None,
            "sampling_s": sampling,
            "answer_tokens": tokens,
            "settings": self.settings,
        }


def prepare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Prompts, and a reward model with a seeded adapter and head: as an adapter for us, merged for TRL."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    from align.data.render import prompt_ids

    tokenizer, base = load_tokenizer(args), base_folder(args)
    source = (ROOT / "configs" / "quickstart" / "prompts.jsonl").read_text("utf-8").splitlines()
    prompts: list[dict[str, Any]] = []
    for line in source:
        talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": json.loads(line)["prompt"]}]
        prompts.append({"prompt": talk, "ids": prompt_ids(tokenizer, talk)})
    prompts.sort(key=lambda prompt: abs(len(prompt["ids"]) - PROMPT_TOKENS))
    prompts = prompts[: EPISODES * min(args.updates, len(prompts) // EPISODES)]
    (work / "prompts.json").write_text(json.dumps(prompts))

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = get_peft_model(model, lora("SEQ_CLS", modules_to_save=["score"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or ".score.modules_to_save" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(work / "reward")
    model.merge_and_unload().save_pretrained(work / "reward-merged")
    lengths = [len(prompt["ids"]) for prompt in prompts]
    return {"prompts": len(prompts), "prompt_tokens": middle(lengths)}  # type: ignore[arg-type]


def build_ours(args: argparse.Namespace, work: Path, meter: Meter) -> Any:
    from datasets import Dataset

    from align.ppo import PPOConfig, PPOTrainer

    policy = load_policy(args, meter)
    return PPOTrainer(
        model=policy,
        reward=str(work / "reward"),
        args=PPOConfig(
            output_dir=str(work / "ours"),
            total_episodes=EPISODES * args.updates,
            stop_token_ids=[never(policy)],
            missing_eos_penalty=None,
            **PPO,
            **TRAINER,
        ),
        train_dataset=Dataset.from_dict({"prompt": [prompt["prompt"] for prompt in meter.prompts]}),
        processing_class=load_tokenizer(args),
        peft_config=lora("CAUSAL_LM"),
        callbacks=[meter.callback()],
    )


def build_trl(args: argparse.Namespace, work: Path, meter: Meter) -> Any:
    import trl
    from datasets import Dataset
    from peft import inject_adapter_in_model
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    if trl.__version__ != TRL:
        raise RuntimeError(f"this side needs trl {TRL}, found {trl.__version__}")
    policy = load_policy(args, meter)
    meter.settings["trl"] = trl.__version__

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(work / "reward-merged", dtype=policy.dtype)

    value = classifier()
    if args.trl_value == "lora":
        # In place: the trainer looks for the classifier's own attributes, which a PeftModel hides.
        value = inject_adapter_in_model(lora("SEQ_CLS"), value)
        value.score.requires_grad_(True)
    return PPOTrainer(
        args=PPOConfig(
            output_dir=str(work / "trl"),
            total_episodes=EPISODES * args.updates,
            local_rollout_forward_batch_size=EPISODES,
            num_sample_generations=0,
            stop_token_id=never(policy),
            missing_eos_penalty=None,
            **PPO,
            **TRAINER,
        ),
        processing_class=load_tokenizer(args),
        model=policy,
        ref_model=None,  # the policy with its adapter off
        reward_model=classifier(),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": [prompt["ids"] for prompt in meter.prompts]}),
        callbacks=[meter.callback()],
        peft_config=lora("CAUSAL_LM"),
    )


def build_sft(args: argparse.Namespace, work: Path, meter: Meter) -> Any:
    import trl
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    policy = load_policy(args, meter)
    meter.settings["trl"] = trl.__version__
    chance, rows = random.Random(0), []
    for prompt in meter.prompts:  # memory and time do not depend on which tokens an answer has
        answer = [chance.randrange(policy.config.vocab_size) for _ in range(NEW_TOKENS)]
        rows.append({"input_ids": prompt["ids"] + answer, "labels": [-100] * len(prompt["ids"]) + answer})
    return SFTTrainer(
        model=policy,
        args=SFTConfig(
            output_dir=str(work / "sft"),
            per_device_train_batch_size=EPISODES,
            max_steps=EPOCHS * args.updates,
            **TRAINER,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(args),
        peft_config=lora("CAUSAL_LM"),
        callbacks=[meter.callback(steps_per_update=EPOCHS)],
    )


# -- what the sides share ---------------------------------------------------------------------------------------------


def base_folder(args: argparse.Namespace) -> str:
    from align.models import embedded_model

    return args.base or str(embedded_model())


def load_tokenizer(args: argparse.Namespace) -> Any:
    from align import models
    from align.config import ModelSection

    return models.load_tokenizer(base_folder(args), ModelSection())


def load_policy(args: argparse.Namespace, meter: Meter) -> Any:
    """The causal language model in --dtype; notes the settings."""
    import peft
    import torch
    import transformers

    from align import models
    from align.config import ModelSection

    policy = models.load_causal_lm(base_folder(args), ModelSection(dtype=args.dtype))
    meter.settings |= {
        "dtype": str(policy.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    return policy


def never(policy: Any) -> int:
    """A stop token that the policy has no logit for."""
    return int(policy.config.vocab_size)


def touch_weights() -> None:
    """Read every weight once: they are mapped from their files, and not resident before they are read."""
    import torch

    for thing in gc.get_objects():
        if issubclass(type(thing), torch.nn.Parameter):
            thing.detach().sum()


def resident() -> int:
    """Resident set now, in bytes (0 where /proc is missing)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
