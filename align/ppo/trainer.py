"""PPO on `transformers.Trainer`: the loop, resume, logging, launchers and schedulers are the ones users know.

One *update* is: sample `episodes` answers, score them, estimate advantages; then `num_ppo_epochs` passes of
`num_mini_batches` optimiser steps of `gradient_accumulation_steps` forward passes of `per_device_train_batch_size`
rows. The Trainer's "batch" is a step number; what it stands for is found by counting:

    step i  ->  update u = i // steps_per_update, pass, mini-batch, micro-batch

The prompts of update u, the random numbers of each answer and the mini-batches are pure functions of the seed and of
places counted over all processes. Each process samples its part of the update's episodes, then all hold all of them: a
mini-batch is a slice of one shuffle that is dealt to the processes. So two processes make the update that one would
make. A checkpoint holds the rollout in flight, so a resumed run continues exactly. An update that is stopped early
skips to the next one's first number.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import SCHEDULER_NAME

from align import ranks
from align.checkpoints import keep_whole
from align.config import ModelSection
from align.decode import stop_ids
from align.lean import lean_layers
from align.logprobs import Batch, Pair, base_model, collate
from align.lora import lean_lora
from align.ppo import maths
from align.ppo.cast import belongs, build_cast, is_peft
from align.ppo.config import PPOConfig
from align.ppo.diagnosis import Finding, diagnose
from align.ppo.figures import figures_of
from align.ppo.prompts import Prompt, check_context, read_demonstrations, read_prompts
from align.ppo.rewards import ModelReward
from align.ppo.rollout import Rollout, as_batch, filler, joined, sample_episodes, shape_and_estimate
from align.prefix import share_prefixes
from reward.records import InputError

STATE = "ppo_state_{rank}.pt"


class PPOTrainer(Trainer):
    """Trains a policy on prompts against a reward.

    Args:
        model: a hub id or folder, a `PreTrainedModel`, or a `PeftModel` whose adapter "default" is trained.
        reward: what to climb, one or a list. Each is a function `f(prompts, completions, **columns) -> list[float]`
            as TRL's reward_funcs; `package.module:function`; or a reward model: a sequence classifier with one label,
            as folder, hub id or loaded. A folder with a reward adapter on the policy's own base shares that base.
        args: a PPOConfig; its `max_steps` is set from `total_episodes`.
        train_dataset: rows with `prompt`, text or a conversation; other columns are handed to reward functions.
        eval_dataset: likewise; `evaluate` samples an answer to each.
        processing_class: the tokenizer; None: the model's own.
        reward_processing_classes: tokenizers of rewards given as loaded models, None for the others.
        ptx_dataset: rows `{prompt, completion}`, mixed in with `ptx_coef`.
        peft_config: a LoraConfig; without it every weight is trained and a frozen copy is the reference.

    Raises:
        InputError: no prompts or fewer than an update needs, prompts without tokens or beyond the context, no stop
            token, a reward that does not fit.
    """

    # The loss is normalised over the whole mini-batch here; the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        reward: Any,
        args: PPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        ptx_dataset: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if isinstance(model, (str, Path)):
            from align import models

            section = ModelSection(base=str(model))
            with ranks.loading_whole():
                model = models.load_causal_lm(models.base_path(section), section)
        if processing_class is None:
            from transformers import AutoTokenizer

            processing_class = AutoTokenizer.from_pretrained(base_model(model).name_or_path)
        self.stop_ids = args.stop_token_ids or stop_ids(model, processing_class)
        if not self.stop_ids:
            raise InputError("neither the tokenizer nor the model has a stop token: set stop_token_ids.")
        self.episodes = args.local_episodes * args.world_size
        self.prompts = read_prompts(train_dataset, processing_class, "train_dataset")
        self.eval_prompts = (
            read_prompts(eval_dataset, processing_class, "eval_dataset") if eval_dataset is not None else []
        )
        self._check_sizes(args, base_model(model).config)
        self.ptx = read_demonstrations(ptx_dataset or [], processing_class)
        check_context([len(p) + len(a) for p, a in self.ptx], 0, base_model(model).config, "ptx_dataset")
        if bool(self.ptx) != (args.ptx_coef > 0):
            raise InputError(
                f"ptx_coef is {args.ptx_coef} and there are {len(self.ptx)} demonstrations: PPO-ptx needs both, "
                "a positive ptx_coef and a ptx_dataset."
            )
        rewards = list(reward) if isinstance(reward, (list, tuple)) else [reward]
        if reward_processing_classes is not None and not isinstance(reward_processing_classes, (list, tuple)):
            reward_processing_classes = [reward_processing_classes]
        set_seed(args.seed)  # new adapters are drawn: by the seed, whatever was drawn before
        with ranks.gathered(model), ranks.loading_whole():  # a reference copied and rewards loaded here stay whole
            self.cast = build_cast(
                model,
                rewards,
                processing_class,
                peft_config=peft_config,
                temperature=args.temperature,
                value_adapter=args.value_adapter,
                reward_weights=args.reward_weights,
                reward_tokenizers=reward_processing_classes,
                batch_size=args.per_device_train_batch_size,
                aggregate=args.reward_aggregate,
                lcb_coefficient=args.lcb_coefficient,
            )
        for prompts in filter(None, (self.prompts, self.eval_prompts)):
            self.cast.rewards.check({name for prompt in prompts for name in prompt.columns})
        args.max_steps = args.optimizer_steps
        args.ignore_data_skip = True  # the next step's number is part of our own state
        self.kl_coef = args.kl_coef
        self.rollout: Rollout | None = None
        self.rollout_update = -1
        self.next_step = 0
        self.history: list[dict[str, float]] = []  # one record an update
        self.findings: list[Finding] = []
        self.tell: Callable[[str], object] = logging.getLogger(__name__).warning  # where new findings are said
        self._figures: dict[str, float] = {}  # of the rollout in flight
        self._minis: list[dict[str, float]] = []  # of the update's mini-batches so far
        self._mini: dict[str, float] = {}
        super().__init__(
            model=self.cast.trained,
            args=args,
            train_dataset=_Steps(args.num_updates * args.steps_per_update),
            eval_dataset=_Steps(len(self.eval_prompts)) if self.eval_prompts else None,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._check_launcher()
        # Where FSDP reads which layers to gather at a time; else the whole model would be gathered in every step.
        self.cast.trained._no_split_modules = base_model(self.cast.trained.policy)._no_split_modules
        if self.cast.reference is not self.cast.trained.policy:
            self.cast.reference.to(args.device)
        self.add_callback(_Course(self))
        keep_whole(self)
        self.prefixes = self._make_lean()

    def _make_lean(self) -> str | None:
        """Compute nothing twice; returns why prefixes are not shared, if they are not."""
        if is_peft(self.cast.trained.policy):
            lean_lora(self.cast.trained.policy)
        models = [self.cast.trained.policy, self.cast.reference]
        for model in models:
            lean_layers(model)
        if not self.args.share_prefixes:
            return "share_prefixes is off"
        return next(filter(None, map(share_prefixes, models)), None)

    def _check_launcher(self) -> None:
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise InputError(
                "ppo samples with whole weights, and version 1 of FSDP leaves each process a part of them: set "
                "fsdp_version: 2 in the launcher's file, or launch ppo as plain data parallel or with DeepSpeed."
            )
        if self.is_fsdp_enabled and self.args.load_best_model_at_end:
            raise InputError(
                "load_best_model_at_end reads whole weights into a model that FSDP has split: leave it out, or launch "
                "ppo as plain data parallel or with DeepSpeed."
            )
        if self.is_deepspeed_enabled and self.args.critic_warmup_updates:
            raise InputError(
                f"critic_warmup_updates is {self.args.critic_warmup_updates}, but DeepSpeed's optimiser steps all "
                "weights together and would move the policy too: set it to 0, or launch ppo as plain data parallel."
            )
        for name, reward in zip(self.cast.rewards.names, self.cast.rewards.rewards, strict=True):
            if isinstance(reward, ModelReward) and ranks.is_split(reward.model):
                raise InputError(
                    f"ZeRO-3 split the reward model `{name}` as it was loaded, and nothing gathers it again: give its "
                    "folder or hub id, and ppo loads it whole, or load it before the PPOConfig is made."
                )

    def _check_sizes(self, args: PPOConfig, config: Any) -> None:
        if args.max_steps not in (-1, args.optimizer_steps):
            raise InputError(
                f"max_steps is {args.max_steps}, but total_episodes decides how long ppo trains: {args.total_episodes} "
                f"episodes are {args.optimizer_steps} optimiser steps. Leave max_steps out."
            )
        if len(self.prompts) < self.episodes:
            raise InputError(
                f"ppo has {len(self.prompts)} prompts, but one update takes {self.episodes} episodes "
                f"(per_device_train_batch_size {args.per_device_train_batch_size} x gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps} x num_mini_batches {args.num_mini_batches} x {args.world_size} "
                "processes): give more prompts or make the update smaller."
            )
        for what, prompts in (("train_dataset", self.prompts), ("eval_dataset", self.eval_prompts)):
            check_context([len(prompt.ids) for prompt in prompts], args.response_length, config, what)

    # -- what a step stands for -------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[int]:
        # Not prepared by the accelerator: every process counts every step and picks its own episodes.
        return DataLoader(
            self.train_dataset,
            batch_size=1,
            sampler=_Count(self),
            collate_fn=lambda numbers: {"step": numbers[0]},
        )

    def places(self, update: int) -> range:
        """Numbers, in the whole run, of the episodes of an update that this process samples."""
        first = update * self.episodes + self.args.process_index * self.args.local_episodes
        return range(first, first + self.args.local_episodes)

    def update_prompts(self, update: int) -> list[Prompt]:
        """This process's prompts of an update: consecutive places in an endless sequence of seeded shuffles."""
        count, seed = len(self.prompts), f"{self.args.seed}"
        return [self.prompts[_place(count, place, seed)] for place in self.places(update)]

    def mini_batch(self, step: int) -> list[int]:
        """Numbers of the episodes in a step's mini-batch, over all processes: a slice of the pass's own shuffle."""
        update, within = divmod(step, self.args.steps_per_update)
        number, mini = divmod(within // self.args.gradient_accumulation_steps, self.args.num_mini_batches)
        order = _shuffled(self.episodes, f"{self.args.seed} update {update} pass {number}")
        size = self.episodes // self.args.num_mini_batches
        return order[mini * size : (mini + 1) * size]

    def micro_batch(self, step: int) -> list[int]:
        """Numbers of this process's episodes in a step: its share of the mini-batch.

        What processes pass through the model at a time is of similar length: the mini-batch's gradient is the same,
        less padding is computed, and nobody waits for the longest.
        """
        chosen = self.mini_batch(step)
        if self.rollout is not None:
            lengths = [len(prompt) + len(answer) for prompt, answer in self.rollout.pairs]
            chosen = sorted(chosen, key=lambda i: -lengths[i])
        rows, micro = self.args.per_device_train_batch_size, step % self.args.gradient_accumulation_steps
        first = (micro * self.args.world_size + self.args.process_index) * rows
        return chosen[first : first + rows]

    # -- one update -------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Tensor:
        """The PPO loss of one micro-batch: its share of the mini-batch's."""
        args, step = self.args, inputs["step"]
        update = step // args.steps_per_update
        if update != self.rollout_update:
            self._roll_out(update)
        assert self.rollout is not None
        r = self.rollout.rows(self.micro_batch(step))
        assert r.advantage_BT is not None and r.return_BT is not None
        # A process's share of the mini-batch's tokens: micro-batches then add up to its mean, and processes average.
        tokens = float(self.rollout.answer_BT[self.mini_batch(step)].sum()) / args.world_size
        ptx, ptx_tokens = self._ptx_batch(step)
        warming_up = update < args.critic_warmup_updates
        output = model(
            as_batch(r, self.processing_class),
            ptx,
            with_entropy=args.entropy_coef > 0,
            critic_only=warming_up,
        )
        size = r.answer_BT.shape[1]
        logprobs_BT, value_BT, entropy_BT = (_widen(x, size) for x in output[:3])
        policy = maths.policy_loss(
            logprobs_BT,
            r.old_logprobs_BT,
            r.advantage_BT,
            r.answer_BT,
            args.cliprange,
            tokens,
            cliprange_high=args.cliprange_high,
            dual_clip=args.dual_clip,
        )
        value = maths.value_loss(value_BT, r.old_value_BT, r.return_BT, r.answer_BT, args.cliprange_value, tokens)
        entropy = entropy_BT.sum() / tokens
        ptx_loss = output.ptx_nll / ptx_tokens if self.ptx else output.ptx_nll
        of_policy = policy.loss - args.entropy_coef * entropy + args.ptx_coef * ptx_loss
        loss = args.vf_coef * value.loss + (0.0 if warming_up else 1.0) * of_policy
        with torch.no_grad():
            ratio_max = (logprobs_BT - r.old_logprobs_BT)[r.answer_BT].max().exp()
        parts = {
            "loss/policy": policy.loss,
            "loss/value": value.loss,
            "policy/clip_fraction": policy.clip_fraction,
            "policy/approx_kl": policy.approx_kl,
            "policy/ratio_mean": policy.ratio_mean,
            "value/clip_fraction": value.clip_fraction,
        }
        if args.dual_clip is not None:
            parts["policy/dual_clip_fraction"] = policy.dual_clip_fraction
        if args.entropy_coef > 0:
            parts["loss/entropy"] = -entropy
        if self.ptx:
            parts["loss/ptx"] = ptx_loss
        if not self._minis:  # before the update's first optimiser step the policy is the one that sampled
            drift_BT = torch.where(r.answer_BT, r.sampled_logprobs_BT - logprobs_BT.detach(), 0)
            parts["sampling/kl"], parts["sampling/mismatch"] = drift_BT.sum() / tokens, drift_BT.abs().sum() / tokens
        self._note(parts, ratio_max)
        return loss

    def _ptx_batch(self, step: int) -> tuple[Batch | None, float]:
        """(this micro-batch's demonstrations, a process's share of the answer tokens of the mini-batch's), from
        their own seeded shuffles."""
        if not self.ptx:
            return None, 0.0
        args, rows = self.args, self.args.per_device_train_batch_size

        def pairs(first: int, count: int) -> list[Pair]:
            places = range(first, first + count)
            return [self.ptx[_place(len(self.ptx), place, f"{args.seed} ptx")] for place in places]

        first = step - step % args.gradient_accumulation_steps
        size = self.episodes // args.num_mini_batches
        tokens = sum(len(answer) for _, answer in pairs(first * args.world_size * rows, size))
        mine = pairs((step * args.world_size + args.process_index) * rows, rows)
        return collate(mine, filler(self.processing_class), args.device), tokens / args.world_size

    @torch.no_grad()
    def _roll_out(self, update: int) -> None:
        """Sample and judge the episodes of an update, and adapt the KL coefficient for the next."""
        args, prompts = self.args, self.update_prompts(update)
        seeds = [_seed(f"{args.seed} answer {place}") for place in self.places(update)]
        # As launchers wrap the training forward: in mixed precision the first ratio would not be 1 otherwise.
        with ranks.gathered(self.model_wrapped), self.accelerator.autocast():
            r = sample_episodes(self.cast, self.processing_class, prompts, args, self.stop_ids, seeds)
        clipped = shape_and_estimate(r, args, self.kl_coef, self._reduce)
        self.rollout, self.rollout_update = joined(ranks.collect(r.to("cpu"), in_step=True)).to(args.device), update
        self._figures = figures_of(r, self._reduce) | {"objective/kl_coef": self.kl_coef}
        if args.reward_clip is not None:
            self._figures["objective/score_clipped"] = float(self._reduce(clipped)) / args.world_size
        if args.kl_target is not None:
            self.kl_coef = maths.adaptive_kl_coef(
                self.kl_coef, self._figures["objective/kl"], args.kl_target, args.kl_horizon, self.episodes
            )
        self.cast.trained.train()

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(tensor, reduction="sum") if self.args.world_size > 1 else tensor

    # -- the course of a run ----------------------------------------------------------------------------------------

    def _note(self, parts: Mapping[str, Tensor], ratio_max: Tensor) -> None:
        """Add a micro-batch's share to the figures of its mini-batch."""
        for name, part in parts.items():
            self._mini[name] = self._mini.get(name, 0.0) + float(part.detach())
        self._mini["policy/ratio_max"] = max(self._mini.get("policy/ratio_max", 0.0), float(ratio_max))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._mini["grad_norm"] = math.nan if norm is None else float(norm)
        self._mini["learning_rate"] = self._get_learning_rate()  # of this step; afterwards it is the next one's
        return norm

    def _before_step(self) -> None:
        """While only the critic trains the policy has no gradient: with one of zero, weight decay would move it."""
        if self.rollout_update < self.args.critic_warmup_updates:
            for name, parameter in self.cast.trained.policy.named_parameters():
                if not belongs(name, "value"):
                    parameter.grad = None

    def _mini_batch_done(self) -> None:
        """After an optimiser step: stop the update early where it went far enough, and close it where it is over."""
        args, update = self.args, self.rollout_update
        self._minis.append(self._mini)
        self._mini = {}
        if args.early_stop_kl is not None:
            kl = torch.tensor(self._minis[-1]["policy/approx_kl"], dtype=torch.float64, device=args.device)
            if float(self._reduce(kl)) / args.world_size > args.early_stop_kl:
                self.next_step = (update + 1) * args.steps_per_update
        if self.next_step == (update + 1) * args.steps_per_update:
            self._close_update()

    def _close_update(self) -> None:
        everywhere = ranks.collect(self._minis, in_step=True)
        drift = {name: [minis[0].pop(name) for minis in everywhere] for name in ("sampling/kl", "sampling/mismatch")}
        names = list(self._minis[-1])
        rows = [[[mini[name] for name in names] for mini in minis] for minis in everywhere]
        by_process = torch.tensor(rows, dtype=torch.float64)  # processes, mini-batches, names
        table = by_process.mean(0)
        means = dict(zip(names, table.mean(0).tolist(), strict=True))
        means["policy/ratio_max"] = float(by_process[..., names.index("policy/ratio_max")].max())
        means["policy/approx_kl_last"] = float(table[-1, names.index("policy/approx_kl")])
        means |= {name: sum(values) / len(values) for name, values in drift.items()}
        means["policy/passes"] = len(self._minis) / self.args.num_mini_batches
        record = {**self._figures, **means}
        record |= {"update": self.rollout_update, "episodes": (self.rollout_update + 1) * self.episodes}
        self._minis = []
        self.history.append(record)
        told = {finding.check for finding in self.findings}
        self.findings = diagnose(self.history, self.args.health)
        for finding in self.findings:
            if finding.check not in told and self.is_world_process_zero():
                self.tell(finding.sentence)
        self.log({name: value for name, value in record.items() if not math.isnan(value)})

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """An answer to each prompt of `eval_dataset` (default: the one given at first), scored; the same figures as a
        rollout's, over all processes, with the prefix. The answers are drawn with the same seeds every time.

        Raises:
            InputError: there is no eval_dataset.
        """
        prompts = self.eval_prompts
        if eval_dataset is not None:
            prompts = read_prompts(eval_dataset, self.processing_class, "eval_dataset")
            sizes, config = [len(prompt.ids) for prompt in prompts], self.cast.trained.config
            check_context(sizes, self.args.response_length, config, "eval_dataset")
        if not prompts:
            raise InputError("there is nothing to evaluate on: give an eval_dataset.")
        mine = list(range(len(prompts)))[self.args.process_index :: self.args.world_size]
        seeds = [_seed(f"{self.args.seed} evaluate {i}") for i in mine or [0]]
        with ranks.gathered(self.model_wrapped), self.accelerator.autocast():
            r = sample_episodes(
                self.cast, self.processing_class, [prompts[i] for i in mine or [0]], self.args, self.stop_ids, seeds
            )
        figures = figures_of(r if mine else r.rows([]), self._reduce)  # more processes than prompts: none counts twice
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items() if not math.isnan(value)}
        self.log(metrics)
        control: Any = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        self.cast.trained.train()
        return metrics

    # -- saving and resuming ----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy (PEFT or Hugging Face layout), the value head and the tokenizer; call it on every rank."""
        with ranks.gathered(self.model_wrapped, trained_only=True):
            if self.args.should_save:
                folder = Path(output_dir or self.args.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                self.cast.trained.save(folder)
                self.processing_class.save_pretrained(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the generators, each process keeps the place in the run and the rollout in flight."""
        super()._save_rng_state(output_dir)
        assert self.rollout is not None
        state = {
            "next_step": self.next_step,
            "update": self.rollout_update,
            "kl_coef": self.kl_coef,
            "rollout": self.rollout.state(),
            "figures": self._figures,
            "minis": self._minis,
            "history": self.history,
        }
        torch.save(state, Path(output_dir) / STATE.format(rank=self.args.process_index))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP the Trainer would write every weight as well, those of the frozen base too."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """FSDP splits the weights here; those of a checkpoint are whole, so they are read before."""
        if self.is_fsdp_enabled and resume_from_checkpoint is not None:
            self.cast.trained.load(Path(resume_from_checkpoint))
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            self.cast.trained.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.cast.trained.load(Path(str(self.state.best_model_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The one thing read from every checkpoint, also from the last of a run that only has to be saved."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE.format(rank=self.args.process_index)
        if not path.is_file():
            raise InputError(f"{path} is missing: resume with as many processes as the checkpoint was written by.")
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.rollout, self.rollout_update = Rollout(**state["rollout"]).to(self.args.device), state["update"]
        self.kl_coef, self.next_step = state["kl_coef"], state["next_step"]
        self._figures, self._minis, self.history = state["figures"], state["minis"], state["history"]
        self._mini = {}
        self.findings = diagnose(self.history, self.args.health)


class _Course(TrainerCallback):
    """Tells the trainer when an optimiser step is about to be taken, and when it is done."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._mini_batch_done()


class _Steps(Dataset[int]):
    """The numbers 0, 1, 2, ...: one a forward pass with gradient."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        return number


class _Count(Sampler[int]):
    """Step numbers from where the trainer stands; the trainer may move on to the next update's in between."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.trainer.train_dataset)

    def __iter__(self) -> Iterator[int]:
        while self.trainer.next_step < len(self):
            self.trainer.next_step += 1
            yield self.trainer.next_step - 1


def _seed(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


@functools.lru_cache(maxsize=8)  # asked for once a place, and a shuffle of a million takes a tenth of a second
def _shuffled(count: int, seed: str) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_seed(seed))).tolist()


def _place(count: int, place: int, seed: str) -> int:
    """What lies at a place of an endless sequence of seeded shuffles of 0..count-1."""
    lap, index = divmod(place, count)
    return _shuffled(count, f"{seed} lap {lap}")[index]


def _widen(values_BT: Tensor, size: int) -> Tensor:
    """Zero columns on the right up to `size`."""
    return torch.nn.functional.pad(values_BT, (0, size - values_BT.shape[1]))
