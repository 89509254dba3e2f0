"""What a rollout's figures are: what is logged, and what the diagnosis looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align.ppo import maths
from align.ppo.rollout import Rollout


def figures_of(r: Rollout, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The figures of a rollout over all processes, by the names docs/ppo.md explains.

    Args:
        reduce: sums a tensor over all processes.
    """
    lengths_B = r.answer_BT.sum(1).float()
    per_answer = {
        "objective/score": r.score_B,
        "objective/kl": r.kl_BT.sum(1),
        "objective/entropy": r.entropy_BT.sum(1) / lengths_B,
        "episode/length": lengths_B,
        "episode/finished": r.finished_B.float(),
        "episode/distinct": torch.full_like(lengths_B, _distinct(r.answers)),
        **{f"reward/{name}": scores_B for name, scores_B in r.parts.items()},
    }
    if r.reward_BT is not None:
        per_answer["objective/rlhf_reward"] = r.reward_BT.sum(1)
    moments = torch.stack([maths.masked_moments(x, ~x.isnan()) for x in per_answer.values()])
    if r.return_BT is not None:
        critic = [maths.masked_moments(x, r.answer_BT) for x in (r.return_BT, r.return_BT - r.old_value_BT)]
        moments = torch.cat([moments, torch.stack(critic)])
    sums = reduce(moments)
    figures: dict[str, float] = {}
    for name, (count, total, squares) in zip(per_answer, sums.tolist(), strict=False):
        mean = total / count if count else math.nan
        figures[name] = mean
        if name in ("objective/score", "objective/kl") or name.startswith("reward/"):
            std = max(squares / count - mean**2, 0.0) ** 0.5 if count else math.nan
            # Of the KL, the standard error of the mean: it tells a negative estimate from a negative KL.
            figures[f"{name}_std"] = std / count**0.5 if name == "objective/kl" else std
    if r.return_BT is not None:
        returns, errors = sums[len(per_answer) :]
        figures["value/explained_variance"] = float(maths.variance_explained(returns, errors))
        figures["return/std"] = float(maths.mean_and_var(returns)[1] ** 0.5)
    figures["episode/score_length_r"] = maths.correlation(reduce(maths.paired_moments(r.score_B, lengths_B)))
    return figures


def _distinct(answers: Sequence[list[int]]) -> float:
    """Share of different ones among all runs of four tokens; 1 where answers are shorter than that."""
    grams = [tuple(answer[i : i + 4]) for answer in answers for i in range(len(answer) - 3)]
    return len(set(grams)) / len(grams) if grams else 1.0
