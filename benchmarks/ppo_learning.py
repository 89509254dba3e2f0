"""What PPO here learns from as many episodes as TRL's last PPO, on a tiny model with a reward that can be checked.

    python benchmarks/ppo_learning.py --seeds 5 --out result.json

    ours    align.ppo.PPOTrainer
    trl     trl.experimental.ppo.PPOTrainer of trl 1.12.0, the last release that had it

The task: a random Llama of 60,000 weights is to say tokens that end in a vowel. The score of an answer is 4 x the share
of such tokens among its 8, computed by one function from token ids on both sides. TRL wants a model for a reward, so
there the function is dressed as one: a "backbone" whose output at a sequence's last position is the score. Every
sequence is scored by the function itself, no approximation is learned.

The same on both sides: weights at the start (policy, reference and LoRA), prompts, 600 episodes in updates of 24, 4
passes of one optimiser step, LoRA (rank 8 on every linear layer), AdamW at a constant 3e-3, KL coefficient 0.02 on the
k1 estimate, temperature 1 over the whole vocabulary, clip ranges 0.2, value coefficient 0.1, gamma 1, lambda 0.95,
whitened advantages. Nothing stops early: both are given a stop token one past the vocabulary, and TRL, which takes a
sampled padding token for the end of an answer, pads with one past the vocabulary as well. So every answer has 8 tokens,
and what either makes of an answer without a stop token plays no part.

What is left different, because it is part of the designs compared: the value function (a linear head on the policy that
starts at 0 here, or with `--value-adapter` one on an adapter of the critic's own; there a second model, trained whole
as in TRL's examples, or `--trl-value lora` or `frozen`: only LoRA and the head, or only the head), gradient clipping at
norm 1 (here alone), and how random numbers are drawn.

Reported for each seed: score and KL to the reference (nats an answer) over the last three updates, as each trainer logs
them for the episodes it sampled; and over 960 answers sampled afterwards from the final policy, by one sampler for
both sides. Ratios of learning speed are not claimed from so small a model: it answers whether anything is lost.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ppo_vs_trl import TRL, trl_folder

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("ours", "trl")
EPISODES, UPDATES, NEW_TOKENS, LAST = 24, 25, 8, 3
PROMPTS = [f"Tell me about rain, {'very ' * (i % 4)}number {i}." for i in range(48)]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Settings both sides know by the same name.
PPO: dict[str, Any] = {
    "total_episodes": EPISODES * UPDATES,
    "per_device_train_batch_size": EPISODES,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "num_ppo_epochs": 4,
    "response_length": NEW_TOKENS,
    "missing_eos_penalty": None,
    "temperature": 1.0,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "kl_coef": 0.02,
    "kl_estimator": "k1",
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_rewards": False,
}
TRAINER: dict[str, Any] = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


# -- the parent -------------------------------------------------------------------------------------------------------


def main() -> None:
    args = arguments()
    if args.side:
        run_side(args)
        return
    with tempfile.TemporaryDirectory(prefix="ppo-learning-") as folder:
        work = Path(folder)
        child(args, "prepare", work, None)
        runs = {side: child(args, side, work, trl_folder(args.trl) if side == "trl" else None) for side in SIDES}
    for ours, trl in zip(runs["ours"], runs["trl"], strict=True):
        if ours["start"] != trl["start"]:
            sys.exit(f"seed {ours['seed']} starts from other weights: {ours['start']} and {trl['start']}")
    result: dict[str, Any] = {"settings": PPO | {"prompts": len(PROMPTS), "trl_value": args.trl_value}, "runs": runs}
    result["summary"] = summary(runs)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(table(runs, result["summary"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--trl", help=f"folder with trl {TRL} (default: installed once into the cache folder)")
    parser.add_argument(
        "--trl-value", choices=["full", "lora", "frozen"], default="full", help="what of TRL's value model is trained"
    )
    parser.add_argument("--value-adapter", action="store_true", help="here: a critic with an adapter of its own")
    parser.add_argument("--out", help="JSON file for every update of every run")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds is at least 2: the difference needs an error")
    return args


def child(args: argparse.Namespace, side: str, work: Path, trl: Path | None) -> list[dict[str, Any]]:
    """All seeds of one side, in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--work", str(work)]
    command += ["--seeds", str(args.seeds), "--trl-value", args.trl_value]
    command += ["--value-adapter"] if args.value_adapter else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if trl:
        environment |= {"PYTHONPATH": str(trl), "TRL_EXPERIMENTAL_SILENCE": "1"}
    log = work / f"{side}.log"
    with log.open("w") as sink:
        done = subprocess.run(command, env=environment, stdout=sink, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{log.read_text()[-4000:]}")
    return json.loads((work / f"{side}.json").read_text())


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds, and the mean difference ours - TRL's with its standard error over seeds (pairs)."""
    out: dict[str, Any] = {}
    for figure in ("score", "kl", "after_score", "after_kl"):
        columns = {side: [run[figure] for run in runs[side]] for side in SIDES}
        differences = [ours - trl for ours, trl in zip(columns["ours"], columns["trl"], strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        out[figure] = {side: statistics.fmean(column) for side, column in columns.items()}
        out[figure] |= {"difference": statistics.fmean(differences), "standard_error": error}
    return out


def table(runs: dict[str, list[dict[str, Any]]], means: dict[str, Any]) -> str:
    figures = {"score": "score", "kl": "KL", "after_score": "score after", "after_kl": "KL after"}
    heads = ["seed", *(f"{side} {head}" for head in figures.values() for side in SIDES)]
    rows = [
        [str(ours["seed"]), *(f"{run[key]:.2f}" for key in figures for run in (ours, trl))]
        for ours, trl in zip(runs["ours"], runs["trl"], strict=True)
    ]
    rows.append(["mean", *(f"{means[key][side]:.2f}" for key in figures for side in SIDES)])
    lines = ["| " + " | ".join(row) + " |" for row in [heads, *rows]]
    lines.insert(1, "|" + " --- |" * len(heads))
    start = statistics.fmean(run["history"][0]["score"] for side in SIDES for run in runs[side])
    lines += ["", f"{UPDATES} updates of {EPISODES} episodes, score {start:.2f} at the start, {4:.2f} at most."]
    for key in ("score", "after_score"):
        difference, error = means[key]["difference"], means[key]["standard_error"]
        lines.append(f"ours - trl, {figures[key]}: {difference:+.2f}, standard error {error:.2f} over seeds")
    lines.append(verdict(means["after_score"]["difference"], means["after_score"]["standard_error"]))
    return "\n".join(lines)


def verdict(difference: float, error: float) -> str:
    """Of the scores after training, the less noisy ones: what the seeds allow to say."""
    if difference < -2 * error:
        return f"ours is below TRL's by {-difference:.2f}"
    if difference > 2 * error:
        return f"ours is above TRL's by {difference:.2f}"
    return f"no difference: a loss of more than {max(0.0, 2 * error - difference):.2f} is excluded at 2 standard errors"


# -- one side ---------------------------------------------------------------------------------------------------------


def run_side(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    work = Path(args.work)
    if args.side == "prepare":
        prepare(work / "model")
        (work / "prepare.json").write_text("[]")
        return
    runs = [one_run(args, work, seed) for seed in range(args.seeds)]
    (work / f"{args.side}.json").write_text(json.dumps(runs))


def prepare(folder: Path) -> None:
    """The tiny model of the tests, with embeddings wide enough for an adapter to have a say."""
    import torch
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_tiny_model

    make_tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    model.save_pretrained(folder)


def one_run(args: argparse.Namespace, work: Path, seed: int) -> dict[str, Any]:
    task = Task(work / "model")
    started = time.perf_counter()
    if args.side == "ours":
        trainer = build_ours(task, work, seed, args.value_adapter)
        policy = trainer.cast.trained.policy
    else:
        trainer = build_trl(task, work, seed, args.trl_value)
        policy = trainer.policy_model
    start = weights(policy)
    trainer.train()
    seconds = time.perf_counter() - started
    if args.side == "ours":
        history = [{"score": u["objective/score"], "kl": u["objective/kl"]} for u in trainer.history]
    else:
        logs = [log for log in trainer.state.log_history if "objective/scores" in log]
        history = [{"score": u["objective/scores"], "kl": u["objective/kl"]} for u in logs]
    if len(history) != UPDATES:
        raise RuntimeError(f"{len(history)} updates were logged, not {UPDATES}")
    after_score, after_kl = task.measure(policy)
    last = {key: statistics.fmean(update[key] for update in history[-LAST:]) for key in ("score", "kl")}
    after = {"after_score": after_score, "after_kl": after_kl}
    return {"seed": seed, "start": start, **last, **after, "seconds": seconds, "history": history}


def weights(policy: Any) -> dict[str, float]:
    """Sums over the base and the adapter, to see that both sides start from the same."""
    sums = {"base": 0.0, "lora_A": 0.0, "lora_B": 0.0}
    for name, parameter in policy.named_parameters():
        if ".value." in name:
            continue  # the critic's adapter
        part = next((key for key in ("lora_A", "lora_B") if key in name), "base")
        sums[part] += float(parameter.detach().double().abs().sum())
    return sums


class Task:
    """The model's folder, its tokens, and the reward."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokens = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        self.beyond = len(self.tokens)  # one past the vocabulary: neither sampled nor embedded

    def policy(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        policy = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        if policy.config.vocab_size != self.beyond:
            raise RuntimeError(f"the model has {policy.config.vocab_size} tokens, the tokenizer {self.beyond}")
        return policy

    def score(self, answer: list[int]) -> float:
        """4 x the share of the answer's tokens that end in a vowel."""
        if len(answer) != NEW_TOKENS:
            raise RuntimeError(f"an answer of {len(answer)} tokens, not {NEW_TOKENS}")
        return 4 * sum(self.tokens[i][-1] in "aeiou" for i in answer) / len(answer)

    def measure(self, policy: Any) -> tuple[float, float]:
        """Mean score and KL (nats an answer) of 20 answers to every prompt, with the same random numbers every time."""
        import torch

        from align.decode import draw
        from align.logprobs import collate
        from align.ppo.cast import Cast, PolicyWithValue

        policy.eval()
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in PROMPTS] * 20
        torch.manual_seed(0)
        drawn = draw(policy, ids, max_new_tokens=NEW_TOKENS, stop_ids=[self.beyond])
        scores = [self.score(answer.ids) for answer in drawn]
        cast = Cast(PolicyWithValue(policy, 1.0), policy, None)  # type: ignore[arg-type]
        batch = collate([(prompt, answer.ids) for prompt, answer in zip(ids, drawn, strict=True)], 0)
        kl_BT = torch.tensor([answer.logprobs for answer in drawn]) - cast.reference_logprobs(batch)
        return statistics.fmean(scores), float(kl_BT.sum(1).mean())


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=LINEAR)


def build_ours(task: Task, work: Path, seed: int, value_adapter: bool) -> Any:
    import torch

    from align.ppo import PPOConfig, PPOTrainer

    def vowels(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [task.score(answer) for answer in completion_ids]

    policy = task.policy()
    torch.manual_seed(seed)  # of LoRA's weights
    return PPOTrainer(
        model=policy,
        reward=vowels,
        args=PPOConfig(
            output_dir=str(work / "ours"),
            seed=seed,
            stop_token_ids=[task.beyond],
            value_adapter=value_adapter,
            **PPO,
            **TRAINER,
        ),
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
        processing_class=task.tokenizer,
        peft_config=lora(),
    )


def build_trl(task: Task, work: Path, seed: int, value_trained: str) -> Any:
    import torch
    import trl
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    if trl.__version__ != TRL:
        raise RuntimeError(f"this side needs trl {TRL}, found {trl.__version__}")
    ids = [task.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    task.tokenizer.add_special_tokens({"pad_token": "<|beyond|>"})
    task.tokenizer.padding_side = "left"
    if task.tokenizer.pad_token_id != task.beyond:
        raise RuntimeError(f"padding is token {task.tokenizer.pad_token_id}, not {task.beyond}")
    torch.manual_seed(seed)  # of the value head's weights
    policy, reward, value = task.policy(), reward_model(task), value_model(task, value_trained)
    torch.manual_seed(seed)  # of LoRA's weights
    return PPOTrainer(
        args=PPOConfig(
            output_dir=str(work / "trl"),
            seed=seed,
            local_rollout_forward_batch_size=EPISODES,
            num_sample_generations=0,
            logging_steps=1,
            stop_token_id=task.beyond,
            **PPO,
            **TRAINER,
        ),
        processing_class=task.tokenizer,
        model=policy,
        ref_model=None,  # the policy with its adapter off
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        peft_config=lora(),
    )


def reward_model(task: Task) -> Any:
    """The function as TRL's `get_reward` reads a model: `score(backbone(...).hidden_states[-1])` at the last place."""
    import torch
    from transformers.utils import ModelOutput

    class Backbone(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            score_BS1 = torch.full((*input_ids.shape, 1), math.nan)
            score_BS1[:, -1, 0] = torch.tensor([task.score(ids) for ids in input_ids[:, -NEW_TOKENS:].tolist()])
            return ModelOutput(hidden_states=(score_BS1,))

    class Reward(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.score = Backbone(), torch.nn.Identity()

    return Reward()


def value_model(task: Task, trained: str) -> Any:
    """A sequence classifier on the same base."""
    import torch
    from peft import inject_adapter_in_model
    from transformers import AutoModelForSequenceClassification

    value = AutoModelForSequenceClassification.from_pretrained(task.folder, num_labels=1, dtype=torch.float32)
    if trained == "lora":
        value = inject_adapter_in_model(lora(), value)  # in place: a PeftModel hides the attributes TRL looks for
    elif trained == "frozen":
        value.requires_grad_(False)
    value.score.requires_grad_(True)
    return value


if __name__ == "__main__":
    main()
