"""PPO on `transformers.Trainer`: the loop, resume, logging, launchers and schedulers are the ones users know.

One *update* is: sample `episodes` answers, score them, estimate advantages; then `num_ppo_epochs` passes of
`num_mini_batches` optimiser steps of `gradient_accumulation_steps` forward passes of `per_device_train_batch_size`
rows. The Trainer's "batch" is a step number; what it stands for is found by counting:

    step i  ->  update u = i // steps_per_update, pass, mini-batch, micro-batch

The prompts of update u, its sampling seed and its mini-batches are pure functions of (seed, u), and a checkpoint holds
the rollout in flight, so a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from align.ppo import maths
from align.ppo.cast import Cast
from align.ppo.rollout import Rollout, as_batch, sample_episodes, shape_and_estimate
from reward.records import InputError

STATE = "ppo_state_{rank}.pt"


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of PPO; names follow TRL's last PPOConfig where it had one. See `align.config.PpoSection`."""

    total_episodes: int = field(default=256, metadata={"help": "Episodes in all, over all processes."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over the episodes of an update."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps per pass."})
    response_length: int = field(default=64, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling and of log-probabilities."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty."})
    kl_estimator: maths.KLEstimator = field(default="k1", metadata={"help": "k1, k2 or k3."})
    kl_target: float | None = field(default=None, metadata={"help": "Target KL in nats per answer; None: fixed."})
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which kl_coef adapts."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale shaped rewards to unit variance."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Taken from unfinished answers' score."})

    @property
    def steps_per_update(self) -> int:
        """Forward passes with gradient per update, on each process."""
        return self.num_ppo_epochs * self.num_mini_batches * self.gradient_accumulation_steps

    @property
    def local_episodes(self) -> int:
        """Episodes per update on each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def num_updates(self) -> int:
        """Updates in all; the last one is whole even if it passes total_episodes."""
        return -(-self.total_episodes // (self.local_episodes * self.world_size))

    @property
    def optimizer_steps(self) -> int:
        return self.num_updates * self.num_ppo_epochs * self.num_mini_batches


class PPOTrainer(Trainer):
    """Trains `cast.trained` on prompts.

    Args:
        cast: see `align.ppo.cast`.
        args: a PPOConfig; `max_steps` is set from `total_episodes`.
        prompts: tokenised prompts, all on the training side.
        processing_class: the tokenizer.

    Raises:
        InputError: no prompts, or fewer than an update needs over all processes.
    """

    # The loss is normalised over the whole mini-batch here; the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(self, cast: Cast, args: PPOConfig, prompts: list[list[int]], processing_class: Any) -> None:
        self.episodes = args.local_episodes * args.world_size
        if len(prompts) < self.episodes:
            raise InputError(
                f"ppo has {len(prompts)} prompts, but one update takes {self.episodes} episodes "
                f"(per_device_train_batch_size {args.per_device_train_batch_size} x gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps} x num_mini_batches {args.num_mini_batches} x {args.world_size} "
                "processes): give more prompts or make the update smaller."
            )
        if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
            raise InputError(
                "ppo does not run under ZeRO-3 yet, where no process holds the weights it samples with: use "
                "configs/accelerate/zero2.yaml."
            )
        args.max_steps = args.optimizer_steps
        self.cast, self.prompts = cast, prompts
        self.kl_coef = args.kl_coef
        self.rollout: Rollout | None = None
        self.rollout_update = -1
        self._figures: dict[str, list[float]] = {}
        steps = _Steps(args.num_updates * args.steps_per_update)
        super().__init__(model=cast.trained, args=args, train_dataset=steps, processing_class=processing_class)

    # -- what a step stands for -------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[int]:
        # Not prepared by the accelerator: every process counts every step and picks its own episodes.
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=lambda numbers: {"step": numbers[0]})

    def update_prompts(self, update: int) -> list[list[int]]:
        """This process's prompts of an update: consecutive places in an endless sequence of seeded shuffles."""
        first = update * self.episodes + self.args.process_index * self.args.local_episodes
        chosen = []
        for place in range(first, first + self.args.local_episodes):
            lap, index = divmod(place, len(self.prompts))
            chosen.append(self.prompts[_shuffled(len(self.prompts), f"{self.args.seed} lap {lap}")[index]])
        return chosen

    def micro_batch(self, step: int) -> list[int]:
        """Numbers of the episodes in a step: a slice of the pass's own shuffle."""
        update, within = divmod(step, self.args.steps_per_update)
        per_pass = self.args.num_mini_batches * self.args.gradient_accumulation_steps
        number, micro = divmod(within, per_pass)
        order = _shuffled(self.args.local_episodes, f"{self.args.seed} update {update} pass {number}")
        rows = self.args.per_device_train_batch_size
        return order[micro * rows : (micro + 1) * rows]

    # -- one update -------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Tensor:
        """The PPO loss of one micro-batch: clipped policy loss + vf_coef x clipped value loss."""
        args, step = self.args, inputs["step"]
        update, within = divmod(step, args.steps_per_update)
        if update != self.rollout_update:
            self._roll_out(update)
        assert self.rollout is not None
        indices = self.micro_batch(step)
        r = self.rollout.rows(indices)
        assert r.advantage_BT is not None and r.return_BT is not None
        # Tokens of the whole mini-batch: micro-batches then add up to it, and processes average to it.
        first = within - within % args.gradient_accumulation_steps + update * args.steps_per_update
        mini = [i for s in range(first, first + args.gradient_accumulation_steps) for i in self.micro_batch(s)]
        tokens = self._reduce(self.rollout.answer_BT[mini].sum().float()) / args.world_size
        logprobs_BT, value_BT, _entropy = model(as_batch(r, self.processing_class.pad_token_id))
        logprobs_BT, value_BT = (_widen(x, r.answer_BT.shape[1]) for x in (logprobs_BT, value_BT))
        policy = maths.policy_loss(
            logprobs_BT, r.old_logprobs_BT, r.advantage_BT, r.answer_BT, args.cliprange, normaliser=float(tokens)
        )
        value = maths.value_loss(
            value_BT, r.old_value_BT, r.return_BT, r.answer_BT, args.cliprange_value, normaliser=float(tokens)
        )
        share = args.gradient_accumulation_steps  # the parts are sums over a mini-batch: scale to compare steps
        self._note(
            {
                "loss/policy": policy.loss * share,
                "loss/value": value.loss * share,
                "policy/clip_fraction": policy.clip_fraction * share,
                "policy/approx_kl": policy.approx_kl * share,
                "value/clip_fraction": value.clip_fraction * share,
            }
        )
        return policy.loss + args.vf_coef * value.loss

    @torch.no_grad()
    def _roll_out(self, update: int) -> None:
        """Sample and judge the episodes of an update; adapt the KL coefficient; note the update's figures."""
        args = self.args
        torch.manual_seed(_seed(f"{args.seed} rollout {update} {args.process_index}"))
        r = sample_episodes(self.cast, self.processing_class, self.update_prompts(update), args)
        kl_BT = shape_and_estimate(r, args, self.kl_coef, self._reduce)
        self.rollout, self.rollout_update = r, update
        assert r.return_BT is not None and r.reward_BT is not None
        lengths_B = r.answer_BT.sum(1).float()
        per_answer = {
            "objective/kl": kl_BT.sum(1),
            "objective/score": r.score_B,
            "objective/rlhf_reward": r.reward_BT.sum(1),
            "objective/entropy": r.entropy_BT.sum(1) / lengths_B,
            "episode/length": lengths_B,
            "episode/finished": r.finished_B.float(),
        }
        sums = self._reduce(torch.stack([value.double().sum() for value in per_answer.values()]))
        figures = dict(zip(per_answer, (sums / self.episodes).tolist(), strict=True))
        explained = self._reduce(maths.explained_variance(r.old_value_BT, r.return_BT, r.answer_BT).double())
        figures |= {"value/explained_variance": float(explained) / args.world_size, "objective/kl_coef": self.kl_coef}
        self._note({**figures, "update": float(update), "episodes": float((update + 1) * self.episodes)})
        if args.kl_target is not None:
            self.kl_coef = maths.adaptive_kl_coef(
                self.kl_coef, figures["objective/kl"], args.kl_target, args.kl_horizon, self.episodes
            )
        self.cast.trained.train()

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(tensor, reduction="sum") if self.args.world_size > 1 else tensor

    # -- logging ----------------------------------------------------------------------------------------------------

    def _note(self, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            plain = float(value.detach() if isinstance(value, Tensor) else value)
            self._figures.setdefault(name, []).append(plain)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log with the means of what was noted since the last one (of this process's losses; figures
        under objective/ and episode/ are over all processes)."""
        logs |= {name: sum(values) / len(values) for name, values in self._figures.items()}
        self._figures.clear()
        super().log(logs, start_time)

    # -- saving and resuming ----------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.cast.trained.save(folder)
            self.processing_class.save_pretrained(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the generators, each process keeps its rollout in flight and the KL coefficient."""
        super()._save_rng_state(output_dir)
        assert self.rollout is not None
        state = {"update": self.rollout_update, "kl_coef": self.kl_coef, "rollout": self.rollout.state()}
        torch.save(state, Path(output_dir) / STATE.format(rank=self.args.process_index))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.cast.trained.load(Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE.format(rank=self.args.process_index)
        if not path.is_file():
            raise InputError(f"{path} is missing: resume with as many processes as the checkpoint was written by.")
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self.rollout, self.rollout_update = Rollout(**state["rollout"]), state["update"]
        self.kl_coef = state["kl_coef"]


class _Steps(Dataset[int]):
    """The numbers 0, 1, 2, ...: one a forward pass with gradient."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        return number

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


def _seed(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def _shuffled(count: int, seed: str) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_seed(seed))).tolist()


def _widen(values_BT: Tensor, size: int) -> Tensor:
    """Zero columns on the right up to `size`."""
    return torch.nn.functional.pad(values_BT, (0, size - values_BT.shape[1]))
