"""Rollouts: answers sampled by the policy, scored, and turned into advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from align.decode import Drawn, draw
from align.logprobs import Batch, Pair, by_length, collate
from align.lora import folded
from align.ppo import maths
from align.ppo.cast import Cast, Views
from align.ppo.prompts import Prompt
from align.ppo.rewards import Episodes

if TYPE_CHECKING:
    from align.ppo.config import PPOConfig


@dataclass
class Rollout:
    """Episodes of one update: B rows, T answer positions (left-aligned, padded right)."""

    prompts: list[list[int]]
    answers: list[list[int]]
    finished_B: Tensor
    score_B: Tensor  # weighted sum of the rewards, before clipping and penalties
    parts: dict[str, Tensor]  # each reward's own scores B; NaN where it does not apply
    sampled_logprobs_BT: Tensor  # nats, as the sampler drew them
    old_logprobs_BT: Tensor  # nats: what the ratio and the KL are taken against; these, or a training forward's
    ref_logprobs_BT: Tensor
    old_value_BT: Tensor
    entropy_BT: Tensor
    kl_BT: Tensor  # nats, by the estimator of the reward
    answer_BT: Tensor
    reward_BT: Tensor | None = None  # KL-shaped
    advantage_BT: Tensor | None = None
    return_BT: Tensor | None = None

    @property
    def pairs(self) -> list[Pair]:
        return list(zip(self.prompts, self.answers, strict=True))

    def rows(self, indices: list[int]) -> Rollout:
        """The episodes with these numbers, still padded to this rollout's T."""
        return self._each(lambda value: [value[i] for i in indices] if isinstance(value, list) else value[indices])

    def to(self, device: torch.device | str) -> Rollout:
        return self._each(lambda value: value if isinstance(value, list) else value.to(device))

    def _each(self, function: Callable[[Any], Any]) -> Rollout:
        changed: dict[str, Any] = {}
        for name, value in self.state().items():
            if isinstance(value, dict):
                changed[name] = {key: function(scores) for key, scores in value.items()}
            else:
                changed[name] = None if value is None else function(value)
        return Rollout(**changed)

    def state(self) -> dict[str, Any]:
        """Plain lists, dicts and tensors, for a checkpoint."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


def joined(parts: Sequence[Rollout]) -> Rollout:
    """The episodes of several processes as one rollout, padded to the longest answer of all."""
    size = max(part.answer_BT.shape[1] for part in parts)

    def join(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, list):
            return [entry for value in values for entry in value]
        if isinstance(first, dict):
            return {name: torch.cat([value[name] for value in values]) for name in first}
        if isinstance(first, Tensor) and first.ndim == 2:
            return torch.cat([pad(value, (0, size - value.shape[1])) for value in values])
        return None if first is None else torch.cat(values)

    return Rollout(**{part.name: join([getattr(r, part.name) for r in parts]) for part in fields(Rollout)})


@torch.no_grad()
def sample_episodes(
    cast: Cast,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    args: PPOConfig,
    stop_ids: Sequence[int],
    seeds: Sequence[int] | None = None,
) -> Rollout:
    """Sample an answer to every prompt and let everyone in the cast look at it once; `seeds` as `sample_answers`."""
    cast.trained.eval()
    watched = args.trusts_sampler(next(cast.trained.policy.parameters()).dtype)
    observe = cast.judge_states if watched else None
    answers = sample_answers(cast.trained.policy, [p.ids for p in prompts], args, stop_ids, seeds, observe)
    pairs = [(prompt.ids, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
    size, count = max(len(answer.ids) for answer in answers), len(pairs)
    device = next(cast.trained.parameters()).device
    names = ("old_logprobs_BT", "ref_logprobs_BT", "old_value_BT", "entropy_BT", "kl_BT")
    seen = {name: torch.zeros((count, size), device=device) for name in names}
    answer_BT = torch.zeros((count, size), dtype=torch.bool, device=device)
    sampled_BT = torch.zeros((count, size), device=device)
    observed_BT2 = torch.zeros((count, size, 2), device=device)
    for row, answer in enumerate(answers):
        sampled_BT[row, : len(answer.ids)] = torch.tensor(answer.logprobs, device=device)
        if watched:
            observed_BT2[row, : len(answer.ids)] = torch.tensor(answer.observed, device=device)
    for indices in by_length(pairs, args.per_device_train_batch_size):
        batch = collate([pairs[i] for i in indices], filler(tokenizer), device)
        width = batch.answer_BT.shape[1]
        if watched:
            value_BT, entropy_BT = observed_BT2[indices, :width].unbind(-1)
            views = Views(sampled_BT[indices, :width], cast.reference_logprobs(batch), value_BT, entropy_BT, None)
        else:
            views = cast.look(batch, with_full_kl=args.kl_estimator == "full")
        kl_BT = views.kl_BT
        if kl_BT is None:
            kl_BT = maths.kl_estimate(views.logprobs_BT, views.ref_logprobs_BT, batch.answer_BT, args.kl_estimator)
        told = (views.logprobs_BT, views.ref_logprobs_BT, views.value_BT, views.entropy_BT, kl_BT)
        for name, view_BT in zip(names, told, strict=True):
            seen[name][indices, :width] = view_BT
        answer_BT[indices, :width] = batch.answer_BT
    with torch.autocast(device.type, enabled=False):  # mixed precision is the policy's
        total, parts = cast.rewards(_episodes(tokenizer, prompts, answers))
    return Rollout(
        prompts=[prompt for prompt, _ in pairs],
        answers=[answer for _, answer in pairs],
        finished_B=torch.tensor([answer.finished for answer in answers], device=device),
        score_B=torch.tensor(total, device=device),
        parts={name: torch.tensor(scores, device=device) for name, scores in parts.items()},
        sampled_logprobs_BT=sampled_BT,
        answer_BT=answer_BT,
        **seen,
    )


def sample_answers(
    policy: Any,
    prompts: Sequence[list[int]],
    args: PPOConfig,
    stop_ids: Sequence[int],
    seeds: Sequence[int] | None = None,
    observe: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[Drawn]:
    """An answer to each tokenised prompt, in the order given, by batches of similar length.

    Args:
        seeds: one for each prompt, of its answer's own stream: in whatever batch and process it is drawn, the answer
            is the same. None: torch's own generator draws for all of them.
        observe: as `draw` takes it.
    """
    answers: list[Drawn | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = args.rollout_batch_size or len(order)
    with folded(policy):
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            drawn = draw(
                policy,
                [prompts[i] for i in indices],
                max_new_tokens=args.response_length,
                stop_ids=stop_ids,
                temperature=args.temperature,
                uniform_BT=_uniform([seeds[i] for i in indices], args.response_length) if seeds else None,
                observe=observe,
            )
            for index, answer in zip(indices, drawn, strict=True):
                answers[index] = answer
    return [answer for answer in answers if answer is not None]


def _uniform(seeds: Sequence[int], size: int) -> Tensor:
    """Numbers between 0 and 1, a row BT a seed, in float64."""
    streams = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(size, generator=stream, dtype=torch.float64) for stream in streams])


def shape_and_estimate(rollout: Rollout, args: PPOConfig, kl_coef: float, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Fill in reward, advantage and return; returns the share of scores that were clipped, a scalar of this process.

    Args:
        reduce: sums a tensor over all processes, so that whitening is over the whole update, not one process's part.
    """
    r = rollout
    score_B, clipped = r.score_B, r.score_B.new_zeros(())
    if args.reward_clip is not None:
        score_B, clipped = maths.clip_scores(score_B, args.reward_clip)
    if args.missing_eos_penalty is not None:
        score_B = maths.missing_eos_penalty(score_B, r.finished_B, args.missing_eos_penalty)
    if args.overlong_penalty is not None:
        score_B = score_B - maths.overlong_penalty(
            r.answer_BT.sum(1), args.response_length, args.overlong_buffer, args.overlong_penalty
        )
    reward_BT = maths.kl_shaped_rewards(score_B, r.kl_BT, r.answer_BT, kl_coef)
    if args.whiten_rewards:
        moments = maths.mean_and_var(reduce(maths.masked_moments(reward_BT, r.answer_BT)))
        reward_BT = maths.whiten(reward_BT, r.answer_BT, shift_mean=False, moments=moments)
    advantage_BT, return_BT = maths.gae(reward_BT, r.old_value_BT, r.answer_BT, args.gamma, args.lam)
    if args.whiten_advantages:
        moments = maths.mean_and_var(reduce(maths.masked_moments(advantage_BT, r.answer_BT)))
        advantage_BT = maths.whiten(advantage_BT, r.answer_BT, moments=moments)
    r.reward_BT, r.advantage_BT, r.return_BT = reward_BT, advantage_BT, return_BT
    return clipped


def as_batch(rollout: Rollout, tokenizer: Any) -> Batch:
    """The rollout's rows as one forward batch, whose answers are padded to the rollout's T."""
    batch = collate(rollout.pairs, filler(tokenizer), rollout.answer_BT.device)
    batch.answer_BT = rollout.answer_BT
    return batch


def filler(tokenizer: Any) -> int:
    """What pads rows. Masks say what is real, so any token does where a tokenizer has none for it."""
    return (tokenizer.eos_token_id or 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _episodes(tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[Drawn]) -> Episodes:
    texts = [tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers]
    talks = [not isinstance(prompt.prompt, str) for prompt in prompts]
    completions: list[Any] = [
        [{"role": "assistant", "content": text}] if talk else text for text, talk in zip(texts, talks, strict=True)
    ]
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return Episodes(
        prompts=[prompt.prompt for prompt in prompts],
        completions=completions,
        prompt_ids=[prompt.ids for prompt in prompts],
        completion_ids=[answer.ids for answer in answers],
        finished=[answer.finished for answer in answers],
        columns={name: [prompt.columns.get(name) for prompt in prompts] for name in names},
    )
