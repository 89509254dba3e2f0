"""Settings of PPO, as a `transformers.TrainingArguments`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from align.ppo.diagnosis import Settings
from align.ppo.maths import KLEstimator
from reward.records import InputError
from reward.scoring import Aggregate


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of PPO; names follow TRL's last PPOConfig where it had one. docs/ppo.md explains each.

    An update takes per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches episodes on each
    process: `gradient_accumulation_steps` counts, as everywhere in the Trainer, the forward passes of one optimiser
    step, and any `num_mini_batches` fits.
    """

    # What a Trainer logs by itself is the mean loss; every update logs a whole record of its own.
    logging_strategy: str = field(
        default="no", metadata={"help": "The Trainer's own log lines; each update logs a record anyway."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})

    total_episodes: int = field(default=256, metadata={"help": "Episodes in all, over all processes."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over the episodes of an update."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimiser steps per pass."})
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Answers sampled at a time; None: all of an update's."}
    )
    response_length: int = field(default=64, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling and of log-probabilities."})
    stop_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Tokens that end an answer; None: the model's and tokenizer's own."}
    )
    old_logprobs: str = field(
        default="auto",
        metadata={
            "help": "What the ratio and the KL are taken against: 'recomputed' by a forward pass, as the 'rollout' "
            "drew, or 'auto': the latter in float32, where the two are equal to rounding."
        },
    )

    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward in their sum; None: 1 each."}
    )
    reward_aggregate: Aggregate = field(
        default="mean",
        metadata={"help": "How a reward model's heads become one score: their mean, min, or lower confidence bound."},
    )
    lcb_coefficient: float = field(
        default=1.0, metadata={"help": "Standard deviations over heads that the bound lies below their mean."}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "Scores are clipped to +- this."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Taken from unfinished answers' score."})
    overlong_penalty: float | None = field(
        default=None, metadata={"help": "Most that is taken from the score of a long answer."}
    )
    overlong_buffer: int = field(
        default=16, metadata={"help": "Tokens before response_length over which overlong_penalty grows."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale shaped rewards to unit variance."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Shift and scale advantages to mean 0 and variance 1."}
    )

    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty."})
    kl_estimator: KLEstimator = field(
        default="k1", metadata={"help": "k1, k2, k3, or full: over the whole vocabulary."}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "Target KL in nats per answer; None: kl_coef is fixed."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which kl_coef adapts."})

    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    cliprange_high: float | None = field(default=None, metadata={"help": "Upper clip range; None: cliprange."})
    dual_clip: float | None = field(
        default=None, metadata={"help": "Bound of the ratio where the advantage is negative."}
    )
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of the loss on demonstrations (PPO-ptx)."})
    early_stop_kl: float | None = field(
        default=None, metadata={"help": "End an update once a mini-batch's approx_kl (nats per token) is above."}
    )
    critic_warmup_updates: int = field(default=0, metadata={"help": "First updates that train the critic only."})
    value_adapter: bool = field(default=False, metadata={"help": "A LoRA adapter of the critic's own."})
    share_prefixes: bool = field(
        default=True,
        metadata={"help": "Compute once what the rows of a batch begin with alike."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        checks: list[tuple[str, bool, str]] = [
            ("total_episodes", self.total_episodes >= 1, "at least 1"),
            ("num_ppo_epochs", self.num_ppo_epochs >= 1, "at least 1"),
            ("num_mini_batches", self.num_mini_batches >= 1, "at least 1"),
            ("rollout_batch_size", self.rollout_batch_size is None or self.rollout_batch_size >= 1, "at least 1"),
            ("response_length", self.response_length >= 1, "at least 1"),
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("old_logprobs", self.old_logprobs in ("auto", "recomputed", "rollout"), "auto, recomputed or rollout"),
            (
                "old_logprobs",
                self.old_logprobs != "rollout" or not self._needs_forward,
                "auto or recomputed with value_adapter or the full KL, which need that forward pass anyway",
            ),
            ("kl_estimator", self.kl_estimator in ("k1", "k2", "k3", "full"), "k1, k2, k3 or full"),
            ("stop_token_ids", self.stop_token_ids != [], "at least one token, or None for the model's own"),
            ("reward_aggregate", self.reward_aggregate in ("mean", "min", "lcb"), "mean, min or lcb"),
            ("lcb_coefficient", 0 <= self.lcb_coefficient < math.inf, "at least 0"),
            ("reward_clip", self.reward_clip is None or self.reward_clip > 0, "above 0"),
            ("missing_eos_penalty", (self.missing_eos_penalty or 0) >= 0, "at least 0"),
            ("overlong_penalty", (self.overlong_penalty or 0) >= 0, "at least 0"),
            (
                "overlong_buffer",
                self.overlong_penalty is None or 1 <= self.overlong_buffer <= self.response_length,
                f"between 1 and response_length ({self.response_length})",
            ),
            ("kl_target", self.kl_target is None or self.kl_target > 0, "above 0"),
            ("kl_coef", 0 <= self.kl_coef < math.inf, "at least 0"),
            ("kl_coef", self.kl_target is None or self.kl_coef > 0, "above 0 for kl_target to adapt it"),
            (
                "kl_horizon",
                self.kl_target is None or self.kl_horizon >= self.local_episodes * self.world_size,
                f"at least the {self.local_episodes * self.world_size} episodes of an update",
            ),
            ("gamma", 0 < self.gamma <= 1, "above 0 and at most 1"),
            ("lam", 0 <= self.lam <= 1, "between 0 and 1"),
            ("cliprange", self.cliprange > 0, "above 0"),
            ("cliprange_high", self.cliprange_high is None or self.cliprange_high > 0, "above 0"),
            ("dual_clip", self.dual_clip is None or self.dual_clip > 1, "above 1"),
            ("cliprange_value", self.cliprange_value > 0, "above 0"),
            ("vf_coef", self.vf_coef >= 0, "at least 0"),
            ("entropy_coef", self.entropy_coef >= 0, "at least 0"),
            ("ptx_coef", self.ptx_coef >= 0, "at least 0"),
            ("early_stop_kl", self.early_stop_kl is None or self.early_stop_kl > 0, "above 0"),
            ("critic_warmup_updates", self.critic_warmup_updates >= 0, "at least 0"),
        ]
        for name, holds, wanted in checks:
            if not holds:
                raise InputError(f"`{name}` is {getattr(self, name)}, but {wanted} is wanted.")

    @property
    def _needs_forward(self) -> bool:
        return self.value_adapter or self.kl_estimator == "full"

    def trusts_sampler(self, dtype: Any) -> bool:
        """Whether log-probabilities, values and entropies of a rollout are the sampler's, for a policy of that dtype.

        With 'auto' they are where nothing is rounded to half precision: there the sampler's folded weights and cached
        keys give the training forward's numbers to a few millionths.
        """
        if self.old_logprobs == "auto":
            return str(dtype) == "torch.float32" and not (self.bf16 or self.fp16 or self._needs_forward)
        return self.old_logprobs == "rollout"

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
        """Optimiser steps in all, if no update is stopped early."""
        return self.num_updates * self.num_ppo_epochs * self.num_mini_batches

    @property
    def health(self) -> Settings:
        """What the diagnosis needs to know."""
        names = Settings.__dataclass_fields__
        return Settings(**{name: getattr(self, name) for name in names})
