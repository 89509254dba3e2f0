"""Rollouts: answers sampled by the policy, scored, and turned into advantages."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.config import GenerationSection
from align.generate import Answer, generate_batch
from align.logprobs import Batch, Pair, collate
from align.ppo import maths
from align.ppo.cast import Cast

if TYPE_CHECKING:
    from align.ppo.trainer import PPOConfig


@dataclass
class Rollout:
    """The episodes of one update on this process: B rows, T answer positions (left-aligned, padded right)."""

    prompts: list[list[int]]
    answers: list[list[int]]
    finished_B: Tensor
    score_B: Tensor  # of the reward model, before any penalty
    old_logprobs_BT: Tensor  # nats, under the policy that sampled
    ref_logprobs_BT: Tensor
    old_value_BT: Tensor
    entropy_BT: Tensor
    answer_BT: Tensor
    reward_BT: Tensor | None = None  # KL-shaped
    advantage_BT: Tensor | None = None
    return_BT: Tensor | None = None

    @property
    def pairs(self) -> list[Pair]:
        return list(zip(self.prompts, self.answers, strict=True))

    def rows(self, indices: list[int]) -> Rollout:
        """The episodes with these numbers, still padded to this rollout's T."""
        picked: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            picked[field.name] = [value[i] for i in indices] if isinstance(value, list) else value[indices]
        return Rollout(**picked)

    def state(self) -> dict[str, Any]:
        """Plain lists and tensors, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@torch.no_grad()
def sample_episodes(cast: Cast, tokenizer: Any, prompts: list[list[int]], args: PPOConfig) -> Rollout:
    """Sample an answer to every prompt and let everyone in the cast look at it once.

    The old log-probabilities are recomputed in the training forward, not taken from the sampler, so that the ratio of
    the first pass is exactly 1.
    """
    how = GenerationSection(max_new_tokens=args.response_length, temperature=args.temperature)
    cast.trained.eval()
    answers: list[Answer] = generate_batch(cast.trained.policy, tokenizer, prompts, how)
    pairs = [(prompt, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
    size, count = max(len(answer) for _, answer in pairs), len(pairs)
    device = next(cast.trained.parameters()).device
    names = ("old_logprobs_BT", "ref_logprobs_BT", "old_value_BT", "entropy_BT")
    seen = {name: torch.zeros((count, size), device=device) for name in names}
    answer_BT = torch.zeros((count, size), dtype=torch.bool, device=device)
    score_B = torch.zeros(count, device=device)
    rows = args.per_device_train_batch_size
    for start in range(0, count, rows):
        batch = collate(pairs[start : start + rows], tokenizer.pad_token_id, device)
        part, width = slice(start, start + rows), batch.answer_BT.shape[1]
        logprobs_BT, value_BT, entropy_BT = cast.trained(batch)
        views = (logprobs_BT, cast.reference_logprobs(batch), value_BT, entropy_BT)
        for name, view_BT in zip(names, views, strict=True):
            seen[name][part, :width] = view_BT
        answer_BT[part, :width] = batch.answer_BT
        score_B[part] = cast.scores(batch)
    finished_B = torch.tensor([answer.finished for answer in answers], device=device)
    return Rollout([p for p, _ in pairs], [a for _, a in pairs], finished_B, score_B, answer_BT=answer_BT, **seen)


def shape_and_estimate(rollout: Rollout, args: PPOConfig, kl_coef: float, reduce: Any) -> Tensor:
    """Fill in reward, advantage and return; returns the KL per token (BT, nats).

    Args:
        reduce: sums a tensor over all processes, so that whitening is over the whole update, not one process's part.
    """
    r = rollout
    score_B = r.score_B
    if args.missing_eos_penalty is not None:
        score_B = maths.missing_eos_penalty(score_B, r.finished_B, args.missing_eos_penalty)
    kl_BT = maths.kl_estimate(r.old_logprobs_BT, r.ref_logprobs_BT, r.answer_BT, args.kl_estimator)
    reward_BT = maths.kl_shaped_rewards(score_B, kl_BT, r.answer_BT, kl_coef)
    if args.whiten_rewards:
        moments = maths.mean_and_var(reduce(maths.masked_moments(reward_BT, r.answer_BT)))
        reward_BT = maths.whiten(reward_BT, r.answer_BT, shift_mean=False, moments=moments)
    advantage_BT, return_BT = maths.gae(reward_BT, r.old_value_BT, r.answer_BT, args.gamma, args.lam)
    moments = maths.mean_and_var(reduce(maths.masked_moments(advantage_BT, r.answer_BT)))
    r.advantage_BT = maths.whiten(advantage_BT, r.answer_BT, moments=moments)
    r.reward_BT, r.return_BT = reward_BT, return_BT
    return kl_BT


def as_batch(rollout: Rollout, pad_id: int) -> Batch:
    """The rollout's rows as one forward batch, whose answers are padded to the rollout's T."""
    batch = collate(rollout.pairs, pad_id, rollout.answer_BT.device)
    batch.answer_BT = rollout.answer_BT
    return batch
