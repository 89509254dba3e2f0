"""The arithmetic of PPO on sequences: tensors in, tensors out.

Legend, used in every name below:
    B           rows (sequences) of a batch
    T           answer positions: answers start at column 0 and are padded on the right
    N           positions of any batch, flattened
    V           vocabulary
    answer_BT   bool, True on answer tokens; the stop token is an answer token
    where       bool, any shape, True on the entries that count

Logarithms are natural, so log-probabilities, KL and entropy are in nats. Means are over tokens and local to
the tensors handed in; `normaliser` and `moments` are how a caller makes them global. Computation is in
float32 or better whatever the inputs are. Padding is never read: it may hold NaN, it gets exactly 0 in every
output and exactly 0 gradient.

Every function that takes a mask raises ValueError if the mask is not bool or differs in shape from the
values: broadcasting one against the other is silent and always wrong.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

_WHITEN_EPS = 1e-8
_MAX_KL_ERROR = 0.2  # arXiv 1909.08593, section 2.2


class PolicyLoss(NamedTuple):
    """Scalars. Only `loss` carries a gradient; every field is a sum over tokens divided by the normaliser."""

    loss: Tensor
    clip_fraction: Tensor  # share of tokens whose loss the clip raised, and whose gradient is therefore 0
    approx_kl: Tensor  # KL(old policy || policy), nats per token, k3
    ratio_mean: Tensor  # policy / old policy


class ValueLoss(NamedTuple):
    """Scalars. Only `loss` carries a gradient; every field is a sum over tokens divided by the normaliser."""

    loss: Tensor
    clip_fraction: Tensor  # share of tokens whose loss the clip raised


def masked_mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the entries that count, a scalar.

    Raises:
        ValueError: nothing counts.
    """
    count = where.sum()
    _require_some(count)
    return _inside(values, where).sum() / count


def masked_var(values: Tensor, where: Tensor, unbiased: bool) -> Tensor:
    """Variance of the entries that count, a scalar; divides by their number n, or by n - 1 if `unbiased`.

    Raises:
        ValueError: nothing counts, or a single entry counts and `unbiased` is asked for.
    """
    moments_3 = masked_moments(values, where)
    _, var = mean_and_var(moments_3)
    if unbiased:
        count = moments_3[0]
        if count < 2:
            raise ValueError("The unbiased variance needs at least 2 entries and the mask leaves 1.")
        var = var * count / (count - 1)
    return var.to(_at_least_float32(values.dtype))


def masked_moments(values: Tensor, where: Tensor) -> Tensor:
    """Count, sum and sum of squares of the entries that count: float64, shape (3,).

    They add up over ranks and micro-batches, and one tensor is one all-reduce. float64, because the variance
    is a difference of nearly equal numbers whenever the mean is large. An empty mask gives zeros, so that a
    rank without answers can still take part.
    """
    inside = _inside(values, where).double()
    return torch.stack([where.sum().double(), inside.sum(), inside.square().sum()])


def mean_and_var(moments_3: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance, float64 scalars, from (summed) `masked_moments`.

    Raises:
        ValueError: the count is 0.
    """
    count, total, squares = moments_3
    _require_some(count)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)  # rounding can leave -1e-17


def whiten(
    values: Tensor, where: Tensor, shift_mean: bool = True, moments: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Scale the entries that count to variance 1 and, if `shift_mean`, to mean 0; shape of `values`.

    The variance is the population's (divide by n): [1, 2, 3] becomes [-1.22, 0, 1.22]. The batch is all there
    is to normalise, not a sample of something larger, and n = 1 stays defined.

    Args:
        moments: mean and population variance to use instead of the local ones. With several ranks, sum
            `masked_moments` over them and pass `mean_and_var` of the result.

    Raises:
        ValueError: nothing counts and no moments are given.
    """
    mean, var = moments if moments is not None else mean_and_var(masked_moments(values, where))
    inside = _inside(values, where)
    whitened = (inside - mean) / (var + _WHITEN_EPS) ** 0.5
    return _inside(whitened if shift_mean else whitened + mean, where)


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """Log-probability in nats of each target under softmax(logits / temperature); shape (N,).

    Use the temperature the tokens were sampled at: the PPO ratio is of sampling probabilities.

    Raises:
        ValueError: the temperature is not positive.
    """
    return _log_softmax(logits_NV, temperature).gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits_NV: Tensor, temperature: float) -> Tensor:
    """Entropy in nats of softmax(logits / temperature); shape (N,). Forbidden tokens may have logit -inf.

    Raises:
        ValueError: the temperature is not positive.
    """
    logprobs_NV = _log_softmax(logits_NV, temperature)
    probs_NV = logprobs_NV.exp()
    # p log p tends to 0 with p, but 0 * -inf is NaN, forwards and backwards.
    return -(probs_NV * logprobs_NV.masked_fill(probs_NV == 0, 0)).sum(-1)


def kl_estimate(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, answer_BT: Tensor, estimator: KLEstimator) -> Tensor:
    """KL(policy || reference) per answer token, from tokens the policy sampled; (B, T), nats.

    With d = log policy - log reference (http://joschu.net/blog/kl-approx.html):
        k1 = d                  unbiased, of either sign, high variance
        k2 = d**2 / 2           biased, never negative
        k3 = exp(-d) - 1 + d    unbiased, never negative

    These are values for rewards and logs. As a loss to differentiate they differ: the expected gradient of k1
    is 0, of k2 that of KL(policy || reference), of k3 that of KL(reference || policy).

    Raises:
        ValueError: the estimator is none of the three.
    """
    log_ratio_BT = _inside(logprobs_BT, answer_BT) - _inside(ref_logprobs_BT, answer_BT)
    if estimator == "k1":
        return log_ratio_BT
    if estimator == "k2":
        return log_ratio_BT.square() / 2
    if estimator == "k3":
        return torch.expm1(-log_ratio_BT) + log_ratio_BT
    raise ValueError(f"The KL estimator is {estimator!r}; it must be 'k1', 'k2' or 'k3'.")


@torch.no_grad()
def kl_shaped_rewards(score_B: Tensor, kl_BT: Tensor, answer_BT: Tensor, kl_coef: float) -> Tensor:
    """Reward per token: -kl_coef * kl, plus the score on the last answer token; (B, T), no gradient.

    The per-token form of arXiv 1909.08593, equation (2).

    Args:
        score_B: reward model's score of the whole sequence.
        kl_BT: nats per token, from `kl_estimate`.
        kl_coef: beta, in units of score per nat.

    Raises:
        ValueError: a row has no answer token to carry its score, or answers are not left-aligned.
    """
    _require_left_aligned(answer_BT)
    length_B = answer_BT.sum(1)
    if (length_B == 0).any():
        rows = (length_B == 0).nonzero().flatten().tolist()
        raise ValueError(f"Rows {rows} have no answer token to carry their score; drop them from the batch.")
    if score_B.shape != length_B.shape:
        raise ValueError(f"Scores have shape {tuple(score_B.shape)}; one per row is {tuple(length_B.shape)}.")
    reward_BT = -kl_coef * _inside(kl_BT, answer_BT)
    last_B1 = (length_B - 1).unsqueeze(1)
    return reward_BT.scatter_add(1, last_B1, score_B.unsqueeze(1).to(reward_BT.dtype))


@torch.no_grad()
def gae(reward_BT: Tensor, value_BT: Tensor, answer_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages, and the returns the value head is to learn; both (B, T), no gradient.

    arXiv 1506.02438: the one-step residual of equations (11)-(12), delta_t = r_t + gamma V_{t+1} - V_t,
    summed as in equation (16), A_t = delta_t + gamma lam A_{t+1}. The return is A_t + V_t. The episode ends
    with the last answer token, also where the length limit cut it: the value after it is 0.

    Args:
        value_BT: V_t, the value before the token at t is chosen.

    Raises:
        ValueError: answers are not left-aligned.
    """
    _require_left_aligned(answer_BT)
    reward_BT, value_BT = _inside(reward_BT, answer_BT), _inside(value_BT, answer_BT)
    # Padding is 0 by now, so it ends each row's episode without a case of its own.
    advantage_BT = torch.zeros_like(value_BT)
    next_value_B = next_advantage_B = value_BT.new_zeros(len(value_BT))
    for t in reversed(range(value_BT.shape[1])):
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        next_advantage_B = delta_B + gamma * lam * next_advantage_B
        next_value_B = value_BT[:, t]
        advantage_BT[:, t] = next_advantage_B
    return advantage_BT, advantage_BT + value_BT


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantage_BT: Tensor,
    answer_BT: Tensor,
    cliprange: float,
    normaliser: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, arXiv 1707.06347 equation (7), negated; a mean over answer tokens.

    Args:
        old_logprobs_BT: of the policy that sampled the answers, constant over the PPO epochs; no gradient.
        advantage_BT: no gradient.
        cliprange: epsilon; the ratio policy / old policy gains nothing by leaving 1 +- epsilon.
        normaliser: number of tokens to divide by, by default the answer tokens here. With the count of the
            whole batch, the losses and gradients of its micro-batches add up to the batch's. Where data
            parallelism averages gradients over ranks, pass the global count divided by the number of ranks.

    Raises:
        ValueError: no answer token and no normaliser, or a normaliser that is not positive.
    """
    logprobs_BT = _inside(logprobs_BT, answer_BT)
    old_logprobs_BT = _inside(old_logprobs_BT, answer_BT).detach()
    advantage_BT = _inside(advantage_BT, answer_BT).detach()

    ratio_BT = (logprobs_BT - old_logprobs_BT).exp()
    unclipped_BT = -advantage_BT * ratio_BT
    clipped_BT = -advantage_BT * ratio_BT.clamp(1 - cliprange, 1 + cliprange)
    kl_BT = kl_estimate(old_logprobs_BT, logprobs_BT.detach(), answer_BT, "k3")
    return PolicyLoss(
        loss=_token_mean(torch.maximum(unclipped_BT, clipped_BT), answer_BT, normaliser),
        clip_fraction=_token_mean(clipped_BT > unclipped_BT, answer_BT, normaliser),
        approx_kl=_token_mean(kl_BT, answer_BT, normaliser),
        ratio_mean=_token_mean(ratio_BT.detach(), answer_BT, normaliser),
    )


def value_loss(
    value_BT: Tensor,
    old_value_BT: Tensor,
    return_BT: Tensor,
    answer_BT: Tensor,
    cliprange_value: float,
    normaliser: float | None = None,
) -> ValueLoss:
    """Half the squared error of the value head, the larger of as-is and clipped; a mean over answer tokens.

    The clipped value stays within cliprange_value of the rollout's (openai/baselines ppo2; the PPO paper has
    no such clip). `math.inf` turns the clip off.

    Args:
        old_value_BT: values at rollout time, constant over the PPO epochs; no gradient.
        return_BT: targets, from `gae`; no gradient.
        cliprange_value: in units of value.
        normaliser: as in `policy_loss`.

    Raises:
        ValueError: no answer token and no normaliser, or a normaliser that is not positive.
    """
    value_BT = _inside(value_BT, answer_BT)
    old_value_BT = _inside(old_value_BT, answer_BT).detach()
    return_BT = _inside(return_BT, answer_BT).detach()

    value_clipped_BT = value_BT.clamp(old_value_BT - cliprange_value, old_value_BT + cliprange_value)
    unclipped_BT = (value_BT - return_BT).square()
    clipped_BT = (value_clipped_BT - return_BT).square()
    return ValueLoss(
        loss=0.5 * _token_mean(torch.maximum(unclipped_BT, clipped_BT), answer_BT, normaliser),
        clip_fraction=_token_mean(clipped_BT > unclipped_BT, answer_BT, normaliser),
    )


def explained_variance(value_BT: Tensor, return_BT: Tensor, answer_BT: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return) over answer tokens, a scalar.

    1 is a perfect value head up to a constant, 0 no better than a constant, below 0 worse. NaN where all
    returns are equal: there is nothing to explain.

    Raises:
        ValueError: no answer token.
    """
    return_var = masked_var(return_BT, answer_BT, unbiased=False)
    residual_BT = _inside(return_BT, answer_BT) - _inside(value_BT, answer_BT)
    residual_var = masked_var(residual_BT, answer_BT, unbiased=False)
    return torch.where(return_var > 0, 1 - residual_var / return_var, math.nan)


def missing_eos_penalty(score_B: Tensor, finished_B: Tensor, penalty: float) -> Tensor:
    """Scores (B,), less `penalty` where the answer hit the length limit before its stop token.

    Raises:
        ValueError: the penalty is negative and would pay for not stopping.
    """
    if penalty < 0:
        raise ValueError(f"The penalty is subtracted from the score: it is {penalty} and must be 0 or more.")
    _require_mask_of(score_B, finished_B)
    score_B = score_B.to(_at_least_float32(score_B.dtype))
    return torch.where(finished_B, score_B, score_B - penalty)


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, n_steps: int) -> float:
    """The KL coefficient for the next batch: the proportional controller of arXiv 1909.08593 section 2.2.

        e = clip((kl - target) / target, -0.2, 0.2)
        kl_coef <- kl_coef * (1 + e * n_steps / horizon)

    n_steps / horizon is the paper's K_beta: over `horizon` sequences the coefficient moves by at most
    about 20 %.

    Args:
        kl: measured KL(policy || reference), global mean, nats per sequence.
        target: wanted KL, same units.
        horizon: in sequences.
        n_steps: sequences seen since the last call, all ranks together.

    Raises:
        ValueError: kl is not finite, target is not positive, or n_steps is not in 1..horizon.
    """
    if not math.isfinite(kl):
        raise ValueError(f"The measured KL is {kl}; the controller needs a finite number of nats.")
    if target <= 0:
        raise ValueError(f"The target KL is {target} nats; it must be positive.")
    if not 1 <= n_steps <= horizon:
        raise ValueError(f"n_steps is {n_steps} and horizon {horizon}; 1 <= n_steps <= horizon must hold.")
    error = min(max((kl - target) / target, -_MAX_KL_ERROR), _MAX_KL_ERROR)
    return kl_coef * (1 + error * n_steps / horizon)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _inside(values: Tensor, where: Tensor) -> Tensor:
    """`values` in float32 or better, exactly 0 outside `where`. A select, not a product: NaN * 0 is NaN."""
    _require_mask_of(values, where)
    return torch.where(where, values.to(_at_least_float32(values.dtype)), 0)


def _require_mask_of(values: Tensor, where: Tensor) -> None:
    if where.dtype != torch.bool or where.shape != values.shape:
        raise ValueError(
            f"The mask is {where.dtype} of shape {tuple(where.shape)}; "
            f"it must be torch.bool of the values' shape {tuple(values.shape)}."
        )


def _require_left_aligned(answer_BT: Tensor) -> None:
    starts_again_BT = answer_BT[:, 1:] & ~answer_BT[:, :-1]
    if starts_again_BT.any():
        rows = starts_again_BT.any(1).nonzero().flatten().tolist()
        raise ValueError(f"Rows {rows} have padding before an answer token; answers must be left-aligned.")


def _require_some(count: Tensor) -> None:
    if count == 0:
        raise ValueError("There is no mean of nothing: the mask leaves 0 entries, at least 1 is needed.")


def _token_mean(values_BT: Tensor, answer_BT: Tensor, normaliser: float | None) -> Tensor:
    if normaliser is None:
        return masked_mean(values_BT, answer_BT)
    if normaliser <= 0:
        raise ValueError(f"The normaliser is {normaliser} tokens; it must be positive.")
    return _inside(values_BT, answer_BT).sum() / normaliser


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"The temperature is {temperature}; it must be positive.")
    return torch.log_softmax(logits_NV.to(_at_least_float32(logits_NV.dtype)) / temperature, dim=-1)
