"""The arithmetic of PPO on sequences: tensors in, tensors out.

Legend, used in every name below:
    B           rows (sequences) of a batch
    T           answer positions: answers start at column 0 and are padded on the right
    N           positions of any batch, flattened
    V           vocabulary
    answer_BT   bool, True on answer tokens; the stop token is an answer token
    where       bool, any shape, True on the entries that count

Logarithms are natural, so log-probabilities, KL and entropy are in nats. Means are over tokens and local to
the tensors handed in; `normaliser`, `moments` and sums of moments are how a caller makes them global.
Computation is in float32 or better whatever the inputs are. Padding is never read: it may hold NaN, it gets
exactly 0 in every output and exactly 0 gradient.

Every function that takes a mask raises ValueError if the mask is not bool or differs in shape from the
values: broadcasting one against the other is silent and always wrong.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "full"]

_WHITEN_EPS = 1e-8
_ROUNDING = 1e-12  # a variance below this share of the mean square is rounding left by equal numbers
_MAX_KL_ERROR = 0.2  # arXiv 1909.08593, section 2.2


class PolicyLoss(NamedTuple):
    """Scalars. Only `loss` carries a gradient; every field is a sum over tokens divided by the normaliser."""

    loss: Tensor
    clip_fraction: Tensor  # share of tokens whose loss the clip raised, and whose gradient is therefore 0
    approx_kl: Tensor  # KL(old policy || policy), nats per token, k3
    ratio_mean: Tensor  # policy / old policy
    # Share of tokens whose loss the dual clip lowered, and whose gradient is therefore 0. None of them is in
    # clip_fraction: there a negative advantage has a ratio below 1, here one above.
    dual_clip_fraction: Tensor


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
        ValueError: the estimator is "full", which no sample can give, or unknown.
    """
    log_ratio_BT = _inside(logprobs_BT, answer_BT) - _inside(ref_logprobs_BT, answer_BT)
    if estimator == "k1":
        return log_ratio_BT
    if estimator == "k2":
        return log_ratio_BT.square() / 2
    if estimator == "k3":
        return torch.expm1(-log_ratio_BT) + log_ratio_BT
    if estimator == "full":
        raise ValueError("The full KL needs the logits of both models, not log-probabilities of tokens; see full_kl.")
    raise ValueError(f"The KL estimator is {estimator!r}; it must be 'k1', 'k2' or 'k3'.")


def full_kl(logits_NV: Tensor, ref_logits_NV: Tensor, temperature: float) -> Tensor:
    """KL(policy || reference) in nats, exact: the expectation of k1 over the whole vocabulary; shape (N,).

    Both are softmax(logits / temperature), as in `token_logprobs`. Forbidden tokens may have logit -inf: those
    the policy forbids count 0, and one that only the reference forbids makes the KL infinite, its gradient NaN.
    Both arguments have a gradient.

    Raises:
        ValueError: the temperature is not positive, or the two shapes differ.
    """
    if logits_NV.shape != ref_logits_NV.shape:
        raise ValueError(
            f"The policy's logits have shape {tuple(logits_NV.shape)} and the reference's "
            f"{tuple(ref_logits_NV.shape)}; both need the same positions and the same vocabulary."
        )
    logprobs_NV = _log_softmax(logits_NV, temperature)
    ref_logprobs_NV = _log_softmax(ref_logits_NV, temperature)
    probs_NV = logprobs_NV.exp()
    # Where the policy has no mass the difference may be infinite or NaN, and 0 times it NaN, also backwards.
    log_ratio_NV = (logprobs_NV - ref_logprobs_NV).masked_fill(probs_NV == 0, 0)
    kl_N = (probs_NV * log_ratio_NV).sum(-1)
    # Rounding can leave -1e-8. A plain clamp would cut the gradient there.
    return kl_N - kl_N.detach().clamp(max=0)


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
    *,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, arXiv 1707.06347 equation (7), negated; a mean over answer tokens.

    Two optional bounds. Clip-higher, arXiv 2503.14476 equation (10): the ratio's upper bound is a number of its
    own, so that unlikely tokens can gain more than 1 + epsilon. Dual clip, arXiv 1912.09729 equation (5): where
    the advantage A is negative the objective is max(min(...), c A). PPO's clip leaves that side open, so a
    single token much likelier now than when it was sampled can outweigh all others.

    Args:
        old_logprobs_BT: of the policy that sampled the answers, constant over the PPO epochs; no gradient.
        advantage_BT: no gradient.
        cliprange: epsilon; the ratio policy / old policy gains nothing by leaving 1 +- epsilon.
        cliprange_high: epsilon_high; the upper bound is 1 + epsilon_high. None: epsilon.
        dual_clip: c, above 1; a token of negative advantage A loses at most -c A. None: no such bound.
        normaliser: number of tokens to divide by, by default the answer tokens here. With the count of the
            whole batch, the losses and gradients of its micro-batches add up to the batch's. Where data
            parallelism averages gradients over ranks, pass the global count divided by the number of ranks.

    Raises:
        ValueError: no answer token and no normaliser, a normaliser that is not positive, cliprange_high below 0,
            or dual_clip not above 1.
    """
    if cliprange_high is None:
        cliprange_high = cliprange
    elif not cliprange_high >= 0:
        raise ValueError(f"cliprange_high is {cliprange_high}; it must be 0 or more, or None for {cliprange}.")
    if dual_clip is None:
        dual_clip = math.inf
    elif not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be above 1, or ratios of 1 would be clipped.")
    logprobs_BT = _inside(logprobs_BT, answer_BT)
    old_logprobs_BT = _inside(old_logprobs_BT, answer_BT).detach()
    advantage_BT = _inside(advantage_BT, answer_BT).detach()

    ratio_BT = (logprobs_BT - old_logprobs_BT).exp()
    unclipped_BT = -advantage_BT * ratio_BT
    clipped_BT = -advantage_BT * ratio_BT.clamp(1 - cliprange, 1 + cliprange_high)
    surrogate_BT = torch.maximum(unclipped_BT, clipped_BT)
    ceiling_BT = torch.where(advantage_BT < 0, -advantage_BT * dual_clip, math.inf)
    kl_BT = kl_estimate(old_logprobs_BT, logprobs_BT.detach(), answer_BT, "k3")
    return PolicyLoss(
        loss=_token_mean(torch.minimum(surrogate_BT, ceiling_BT), answer_BT, normaliser),
        clip_fraction=_token_mean(clipped_BT > unclipped_BT, answer_BT, normaliser),
        approx_kl=_token_mean(kl_BT, answer_BT, normaliser),
        ratio_mean=_token_mean(ratio_BT.detach(), answer_BT, normaliser),
        dual_clip_fraction=_token_mean(surrogate_BT > ceiling_BT, answer_BT, normaliser),
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
    """1 - Var(return - value) / Var(return) over the answer tokens here, a scalar; see `variance_explained`.

    Raises:
        ValueError: no answer token.
    """
    residual_BT = _inside(return_BT, answer_BT) - _inside(value_BT, answer_BT)
    explained = variance_explained(masked_moments(return_BT, answer_BT), masked_moments(residual_BT, answer_BT))
    return explained.to(residual_BT.dtype)


def variance_explained(return_moments_3: Tensor, residual_moments_3: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return), a float64 scalar, from `masked_moments` summed over all ranks.

    1 is a perfect value head up to a constant, 0 no better than a constant, below 0 worse. NaN where all
    returns are equal: there is nothing to explain. An average of the ranks' own figures would be another
    number, as each measures against its own mean return.

    Args:
        return_moments_3: of the returns.
        residual_moments_3: of return - value, over the same tokens.

    Raises:
        ValueError: the counts are 0, or differ.
    """
    returns, residuals = float(return_moments_3[0]), float(residual_moments_3[0])
    if returns != residuals:
        raise ValueError(f"The moments are of {returns:.0f} returns and {residuals:.0f} residuals; sum both alike.")
    _, return_var = mean_and_var(return_moments_3)
    _, residual_var = mean_and_var(residual_moments_3)
    return torch.where(_varies(return_moments_3), 1 - residual_var / return_var, math.nan)


def paired_moments(x_B: Tensor, y_B: Tensor) -> Tensor:
    """n and the sums of x, y, x^2, y^2 and xy: float64, shape (6,), for `correlation`.

    They add up over ranks like `masked_moments`, and no pairs give zeros.

    Raises:
        ValueError: the shapes differ.
    """
    if x_B.shape != y_B.shape:
        raise ValueError(f"x has shape {tuple(x_B.shape)} and y {tuple(y_B.shape)}; they must come in pairs.")
    x_B, y_B = x_B.double(), y_B.double()
    sums = [x_B, y_B, x_B.square(), y_B.square(), x_B * y_B]
    return torch.stack([x_B.new_tensor(x_B.numel()), *(values_B.sum() for values_B in sums)])


def correlation(sums_6: Tensor) -> float:
    """Pearson's r in [-1, 1] from (summed) `paired_moments`; NaN below 2 pairs, or where x or y is constant."""
    x_3, y_3 = sums_6[[0, 1, 3]], sums_6[[0, 2, 4]]
    if sums_6[0] < 2 or not (_varies(x_3) and _varies(y_3)):
        return math.nan
    (mean_x, var_x), (mean_y, var_y) = mean_and_var(x_3), mean_and_var(y_3)
    covariance = sums_6[5] / sums_6[0] - mean_x * mean_y
    return float((covariance / (var_x.sqrt() * var_y.sqrt())).clamp(-1, 1))


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


def overlong_penalty(length_B: Tensor, limit: int, buffer: int, penalty: float) -> Tensor:
    """What to subtract from each score for length, >= 0, in units of score; shape (B,).

    The soft overlong punishment of arXiv 2503.14476 equation (13), where it is negative and `penalty` is 1:
        0                                               up to limit - buffer tokens
        penalty * (length - (limit - buffer)) / buffer  from there to the limit
        penalty                                         beyond

    Args:
        length_B: answer tokens of each row.
        limit: L_max, tokens.
        buffer: L_cache, tokens below the limit over which the penalty rises.
        penalty: at the limit.

    Raises:
        ValueError: buffer is not in 1..limit, or the penalty is negative or not finite.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"The buffer is {buffer} tokens and the limit {limit}; 1 <= buffer <= limit must hold.")
    if not 0 <= penalty < math.inf:
        raise ValueError(f"The penalty is subtracted from the score: it is {penalty} and must be finite, 0 or more.")
    over_B = (length_B - (limit - buffer)).to(_at_least_float32(length_B.dtype))
    return penalty * (over_B / buffer).clamp(0, 1)


def clip_scores(score_B: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Scores (B,) clamped to [-bound, bound], and the share of them that lay outside, a scalar.

    Raises:
        ValueError: the bound is not positive.
    """
    if not bound > 0:
        raise ValueError(f"The bound on scores is {bound}; it must be positive.")
    score_B = score_B.to(_at_least_float32(score_B.dtype))
    return score_B.clamp(-bound, bound), (score_B.abs() > bound).to(score_B.dtype).mean()


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


def _varies(moments_3: Tensor) -> Tensor:
    """Whether the numbers differ at all, a bool scalar; False if one of them is NaN or infinite."""
    _, var = mean_and_var(moments_3)
    return var > _ROUNDING * moments_3[2] / moments_3[0]


def _token_mean(values_BT: Tensor, answer_BT: Tensor, normaliser: float | None) -> Tensor:
    if normaliser is None:
        return masked_mean(values_BT, answer_BT)
    if normaliser <= 0:
        raise ValueError(f"The normaliser is {normaliser} tokens; it must be positive.")
    return _inside(values_BT, answer_BT).sum() / normaliser


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"The temperature is {temperature}; it must be positive.")
    logits_NV = logits_NV.to(_at_least_float32(logits_NV.dtype))
    # A division by 1 would copy the largest tensor of a training step.
    return torch.log_softmax(logits_NV if temperature == 1 else logits_NV / temperature, dim=-1)
