"""Likelihoods of preference labels given rewards. Pure: tensors in, tensors out.

    P  pairs of a batch
    M  heads of the reward model, each with an opinion of its own
    3  outcomes of a pair: the first answer is chosen, a tie, the second is chosen

The gap of a pair is the reward of its first answer minus that of its second, so gap 0 says that the model has no
opinion. All logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

TieModel = Literal["ignore", "davidson", "rao-kupper"]
Likelihood = Callable[[Tensor], Tensor]


def bradley_terry(gap_PM: Tensor) -> Tensor:
    """Log-probabilities PM3 of the outcomes without ties: P(first) = sigmoid(gap) (Bradley & Terry 1952).

    The column of ties is zero and means nothing: no tie may be given to this likelihood.
    """
    return torch.stack([logsigmoid(gap_PM), torch.zeros_like(gap_PM), logsigmoid(-gap_PM)], dim=-1)


def davidson(gap_PM: Tensor, tie_share: float) -> Tensor:
    """Log-probabilities PM3 with ties: P(tie) is to the geometric mean of both sides as nu to 1 (Davidson 1970).

    P(first) : P(tie) : P(second) = e^(gap/2) : nu : e^(-gap/2). `nu` is set so that two answers of equal reward tie
    with probability `tie_share`: nu / (2 + nu) = tie_share.
    """
    nu = 2 * tie_share / (1 - tie_share)
    level = torch.full_like(gap_PM, math.log(nu))
    return torch.log_softmax(torch.stack([gap_PM / 2, level, -gap_PM / 2], dim=-1), dim=-1)


def rao_kupper(gap_PM: Tensor, tie_share: float) -> Tensor:
    """Log-probabilities PM3 with ties where the gap is below a threshold of notice (Rao & Kupper 1967).

    P(first) = sigmoid(gap - eta), P(second) = sigmoid(-gap - eta), and the rest ties. `eta` is set so that two answers
    of equal reward tie with probability `tie_share`: tanh(eta / 2) = tie_share.
    """
    eta = 2 * math.atanh(tie_share)
    # 1 - sigmoid(gap - eta) - sigmoid(-gap - eta), without the cancellation.
    tie_PM = math.log(math.expm1(2 * eta)) - softplus(eta - gap_PM) - softplus(eta + gap_PM)
    return torch.stack([logsigmoid(gap_PM - eta), tie_PM, logsigmoid(-gap_PM - eta)], dim=-1)


def likelihood(ties: TieModel, tie_share: float) -> Likelihood:
    """The likelihood of a tie model; `tie_share`, in (0, 1), is the share of ties among all labelled pairs."""
    if ties == "ignore" or tie_share == 0:
        return bradley_terry
    model = davidson if ties == "davidson" else rao_kupper
    return lambda gap_PM: model(gap_PM, tie_share)


def preference_loss(
    reward_RM: Tensor,
    pairs_P2: Tensor,
    outcome_P3: Tensor,
    *,
    margin_P: Tensor,
    weight_P: Tensor,
    draw_PM: Tensor,
    likelihood: Likelihood = bradley_terry,
    center_rewards_coefficient: float | None = None,
) -> Tensor:
    """The mean over heads of the weighted cross-entropy between labels and rewards, a scalar.

    Args:
        reward_RM: rewards of the R distinct answers, of every head.
        pairs_P2: (first, second) as indices into the R answers.
        outcome_P3: probability of each outcome as the labels have it; a plain label is (1, 0, 0).
        margin_P: gap that a winning first answer is asked for beyond zero (equation 2 of arXiv 2307.09288).
        weight_P: share of each pair in the batch, 1 in all.
        draw_PM: how much each head counts each pair: ones, or a bootstrap's draws with mean one.
        center_rewards_coefficient: weight of the squared sum of a pair's rewards (equation 2 of arXiv 2312.09244).
    """
    first_PM, second_PM = reward_RM[pairs_P2[:, 0]], reward_RM[pairs_P2[:, 1]]
    logprob_PM3 = likelihood(first_PM - second_PM - margin_P[:, None])
    loss_PM = -(outcome_P3[:, None, :] * logprob_PM3).sum(-1)
    loss_P = (draw_PM * loss_PM).mean(1)
    if center_rewards_coefficient is not None:
        loss_P = loss_P + center_rewards_coefficient * ((first_PM + second_PM) ** 2).mean(1)
    return (weight_P * loss_P).sum()
