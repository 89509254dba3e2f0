"""PPO's arithmetic against numbers worked by hand, properties, loops in plain Python, and TRL.

The loops see Python floats and lists, one row at a time and without padding, and share no code with the module.
Every padded entry handed to the module is NaN, so a mask that leaks is a test that fails.
"""

import math
import statistics
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.ppo import maths

NAN = math.nan
seeds = st.integers(0, 2**31 - 1)
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=4)
discounts = st.floats(0, 1)
cheap = settings(max_examples=25, deadline=None, derandomize=True)


def close(actual: Tensor, expected: Tensor | list | float, tol: float = 1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, atol=tol, rtol=tol)


def answers(row_lengths: list[int], T: int | None = None) -> Tensor:
    return torch.arange(T or max(row_lengths) + 1) < torch.tensor(row_lengths).unsqueeze(1)


def draw(answer_BT: Tensor, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers on the answers and NaN on the padding."""
    noise_BT = scale * torch.randn(answer_BT.shape, generator=torch.Generator().manual_seed(seed))
    return noise_BT.masked_fill(~answer_BT, NAN).to(dtype)


def rows(values_BT: Tensor, answer_BT: Tensor) -> list[list[float]]:
    return [row[keep].tolist() for row, keep in zip(values_BT, answer_BT, strict=True)]


def flat(values_BT: Tensor, answer_BT: Tensor) -> list[float]:
    return values_BT[answer_BT].tolist()


def padded(values_rows: list[list[float]], T: int) -> list[list[float]]:
    return [row + [0.0] * (T - len(row)) for row in values_rows]


# --- means, variances, whitening -------------------------------------------------------------------------------


class TestMoments:
    # 1, 2, 3 and 6: mean 12 / 4 = 3, squared deviations 4 + 1 + 0 + 9 = 14.
    values_BT = torch.tensor([[1.0, 2.0, NAN], [3.0, 6.0, NAN]])
    answer_BT = answers([2, 2], T=3)

    def test_by_hand(self) -> None:
        close(maths.masked_mean(self.values_BT, self.answer_BT), 3.0)
        close(maths.masked_var(self.values_BT, self.answer_BT, unbiased=False), 14 / 4)
        close(maths.masked_var(self.values_BT, self.answer_BT, unbiased=True), 14 / 3)
        # 1 + 4 + 9 + 36 = 50
        assert maths.masked_moments(self.values_BT, self.answer_BT).tolist() == [4, 12, 50]

    @cheap
    @given(lengths.filter(lambda row_lengths: sum(row_lengths) > 1), seeds)
    def test_against_the_standard_library(self, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        values_BT = draw(answer_BT, seed)
        numbers = flat(values_BT, answer_BT)
        close(maths.masked_mean(values_BT, answer_BT), statistics.fmean(numbers))
        close(maths.masked_var(values_BT, answer_BT, unbiased=False), statistics.pvariance(numbers))
        close(maths.masked_var(values_BT, answer_BT, unbiased=True), statistics.variance(numbers))

    def test_a_large_mean_does_not_swallow_the_variance(self) -> None:
        values = torch.tensor([10_000.0, 10_001.0, 10_002.0])
        close(maths.masked_var(values, torch.ones(3, dtype=torch.bool), unbiased=False), 2 / 3)

    def test_half_precision_is_computed_in_float32(self) -> None:
        values = torch.full((1000,), 0.1, dtype=torch.bfloat16)
        mean = maths.masked_mean(values, torch.ones(1000, dtype=torch.bool))
        assert mean.dtype == torch.float32
        close(mean, values[0].item())

    def test_nothing_to_average_is_refused_but_has_moments(self) -> None:
        values, nowhere = torch.ones(3), torch.zeros(3, dtype=torch.bool)
        assert maths.masked_moments(values, nowhere).tolist() == [0, 0, 0]
        for refused in (
            lambda: maths.masked_mean(values, nowhere),
            lambda: maths.masked_var(values, nowhere, unbiased=False),
            lambda: maths.whiten(values, nowhere),
        ):
            with pytest.raises(ValueError, match="mean of nothing"):
                refused()

    def test_unbiased_variance_of_one_number_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at least 2"):
            maths.masked_var(torch.ones(1), torch.ones(1, dtype=torch.bool), unbiased=True)

    @pytest.mark.parametrize(
        "where", [torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 3), torch.ones(3, dtype=torch.bool)]
    )
    def test_a_mask_of_another_shape_or_type_is_refused(self, where: Tensor) -> None:
        with pytest.raises(ValueError, match="The mask is"):
            maths.masked_mean(torch.ones(2, 3), where)


class TestWhiten:
    def test_by_hand(self) -> None:
        # Mean 2, population variance (1 + 0 + 1) / 3 = 2/3: 1 / sqrt(2/3) = 1.2247449.
        values_BT, answer_BT = torch.tensor([[1.0, 2.0, 3.0, NAN]]), answers([3])
        close(maths.whiten(values_BT, answer_BT), [[-1.2247449, 0, 1.2247449, 0]])
        close(maths.whiten(values_BT, answer_BT, shift_mean=False), [[0.7752551, 2, 3.2247449, 0]])

    def test_one_number_or_equal_numbers_become_zero(self) -> None:
        close(maths.whiten(torch.tensor([7.0, 7.0, 7.0]), torch.tensor([True, True, False])), [0.0, 0.0, 0.0])

    @cheap
    @given(st.lists(st.integers(2, 6), min_size=2, max_size=4), seeds)
    def test_mean_0_variance_1_padding_0(self, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        values_BT = 3 * draw(answer_BT, seed) + 5
        whitened_BT = maths.whiten(values_BT, answer_BT)
        numbers = flat(whitened_BT, answer_BT)
        assert statistics.fmean(numbers) == pytest.approx(0, abs=1e-6)
        assert statistics.pvariance(numbers) == pytest.approx(1, abs=1e-6)
        assert not whitened_BT[~answer_BT].any()
        unshifted = flat(maths.whiten(values_BT, answer_BT, shift_mean=False), answer_BT)
        mean = statistics.fmean(flat(values_BT, answer_BT))
        assert unshifted == pytest.approx([number + mean for number in numbers], abs=1e-5)

    @cheap
    @given(st.lists(st.integers(1, 6), min_size=2, max_size=4), seeds)
    def test_halves_with_summed_moments_whiten_as_the_whole(self, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        values_BT = draw(answer_BT, seed)
        halves = [(values_BT[:1], answer_BT[:1]), (values_BT[1:], answer_BT[1:])]
        moments = maths.mean_and_var(sum(maths.masked_moments(*half) for half in halves))
        by_half = torch.cat([maths.whiten(*half, moments=moments) for half in halves])
        close(by_half, maths.whiten(values_BT, answer_BT))


# --- log-probabilities, entropy, KL ----------------------------------------------------------------------------


def loop_logprobs(logits: list[float], temperature: float) -> list[float]:
    scaled = [logit / temperature for logit in logits]
    log_total = math.log(math.fsum(math.exp(logit - max(scaled)) for logit in scaled)) + max(scaled)
    return [logit - log_total for logit in scaled]


class TestTokens:
    def test_by_hand(self) -> None:
        # Odds 1 : 3. At temperature 2 the odds are 1 : sqrt(3), so log 1/(1 + 1.7320508) = -1.0050525.
        logits_NV = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
        targets_N = torch.tensor([0, 1])
        close(maths.token_logprobs(logits_NV, targets_N, 1.0), [math.log(1 / 4), math.log(3 / 4)])
        close(maths.token_logprobs(logits_NV, targets_N, 2.0), [-1.0050525, -1.0050525 + math.log(3) / 2])
        # 1/4 log 4 + 3/4 log 4/3 = 0.3465736 + 0.2157616
        close(maths.token_entropy(logits_NV, 1.0), [0.5623351, 0.5623351])
        # Four equal tokens: log 4 at any temperature.
        close(maths.token_entropy(torch.full((1, 4), 9.0), 0.3), [math.log(4)])

    @cheap
    @given(st.integers(1, 5), st.integers(2, 9), st.floats(0.3, 3), seeds)
    def test_against_the_loop(self, N: int, V: int, temperature: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits_NV = 3 * torch.randn(N, V, generator=generator)
        targets_N = torch.randint(V, (N,), generator=generator)
        expected = [loop_logprobs(row, temperature) for row in logits_NV.tolist()]
        picked = [row[target] for row, target in zip(expected, targets_N.tolist(), strict=True)]
        close(maths.token_logprobs(logits_NV, targets_N, temperature), picked)
        entropies = [-math.fsum(math.exp(logprob) * logprob for logprob in row) for row in expected]
        close(maths.token_entropy(logits_NV, temperature), entropies)

    def test_against_trl(self) -> None:
        trl_utils = pytest.importorskip("trl.trainer.utils")
        generator = torch.Generator().manual_seed(0)
        logits_NV = 4 * torch.randn(50, 100, generator=generator)
        targets_N = torch.randint(100, (50,), generator=generator)
        expected_N = trl_utils.selective_log_softmax(logits_NV, targets_N, temperature=0.7)
        close(maths.token_logprobs(logits_NV, targets_N, 0.7), expected_N, tol=5e-6)
        close(maths.token_entropy(logits_NV, 0.7), trl_utils.entropy_from_logits(logits_NV / 0.7))

    def test_huge_and_forbidden_logits_stay_finite_with_their_gradients(self) -> None:
        logits_NV = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, -math.inf]], requires_grad=True)
        logprobs_N = maths.token_logprobs(logits_NV, torch.tensor([1, 0]), 1.0)
        entropy_N = maths.token_entropy(logits_NV, 1.0)
        close(logprobs_N.detach(), [-1e4, -math.log(2)])
        close(entropy_N.detach(), [0.0, math.log(2)])
        (logprobs_N.sum() + entropy_N.sum()).backward()
        assert logits_NV.grad is not None and logits_NV.grad.isfinite().all()

    @pytest.mark.parametrize("temperature", [0.0, -1.0])
    def test_a_temperature_that_is_not_positive_is_refused(self, temperature: float) -> None:
        with pytest.raises(ValueError, match="must be positive"):
            maths.token_entropy(torch.zeros(1, 2), temperature)
        with pytest.raises(ValueError, match="must be positive"):
            maths.token_logprobs(torch.zeros(1, 2), torch.tensor([0]), temperature)


class TestKLEstimate:
    def test_by_hand(self) -> None:
        # The policy says 1/2 where the reference says 1/4: d = log 2 = 0.6931472.
        # k2 = 0.2402265; k3 = 1/2 - 1 + 0.6931472 = 0.1931472.
        answer_BT = answers([1])
        logprobs_BT, ref_BT = torch.tensor([[-math.log(2), NAN]]), torch.tensor([[-math.log(4), NAN]])
        close(maths.kl_estimate(logprobs_BT, ref_BT, answer_BT, "k1"), [[0.6931472, 0]])
        close(maths.kl_estimate(logprobs_BT, ref_BT, answer_BT, "k2"), [[0.2402265, 0]])
        close(maths.kl_estimate(logprobs_BT, ref_BT, answer_BT, "k3"), [[0.1931472, 0]])

    def test_expectation_over_the_policy_is_the_kl(self) -> None:
        policy, reference = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
        kl = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
        logprobs_BT, ref_BT = torch.tensor([policy]).log(), torch.tensor([reference]).log()
        for estimator in ("k1", "k3"):
            estimate_BT = maths.kl_estimate(logprobs_BT, ref_BT, answers([3], T=3), estimator)
            close((torch.tensor([policy]) * estimate_BT).sum(), kl)

    @pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
    def test_expected_gradients_are_those_documented(self, estimator: maths.KLEstimator) -> None:
        logits_V = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
        ref_V = torch.tensor([-0.5, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
        logprobs_V = logits_V.log_softmax(0)
        estimate_V = maths.kl_estimate(logprobs_V[None], ref_V[None], answers([3], T=3), estimator)[0]
        (actual_V,) = torch.autograd.grad((logprobs_V.exp().detach() * estimate_V).sum(), logits_V, retain_graph=True)
        objective = {
            "k1": 0 * logprobs_V.sum(),
            "k2": (logprobs_V.exp() * (logprobs_V - ref_V)).sum(),
            "k3": (ref_V.exp() * (ref_V - logprobs_V)).sum(),
        }[estimator]
        close(actual_V, torch.autograd.grad(objective, logits_V)[0], tol=1e-12)

    @cheap
    @given(lengths, seeds)
    def test_signs_padding_and_the_loop(self, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        logprobs_BT, ref_BT = draw(answer_BT, seed), draw(answer_BT, seed + 1)
        loop = {
            "k1": lambda p, q: p - q,
            "k2": lambda p, q: (p - q) ** 2 / 2,
            "k3": lambda p, q: math.exp(q) / math.exp(p) - 1 - (q - p),
        }
        for estimator, formula in loop.items():
            kl_BT = maths.kl_estimate(logprobs_BT, ref_BT, answer_BT, estimator)
            pairs = zip(flat(logprobs_BT, answer_BT), flat(ref_BT, answer_BT), strict=True)
            close(kl_BT[answer_BT], [formula(p, q) for p, q in pairs], tol=2e-6)
            assert not kl_BT[~answer_BT].any()
            assert estimator == "k1" or (kl_BT >= 0).all()

    def test_an_unknown_estimator_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'k4'"):
            maths.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), answers([1], T=1), "k4")  # type: ignore[arg-type]


# --- rewards and advantages ------------------------------------------------------------------------------------


class TestRewards:
    def test_by_hand(self) -> None:
        # beta 0.1. Row 0: -0.1 * 1, then -0.1 * 2 + 5 on its last token. Row 1 has a single token: 0.3 - 1.
        kl_BT = torch.tensor([[1.0, 2.0, NAN], [-3.0, NAN, NAN]])
        reward_BT = maths.kl_shaped_rewards(torch.tensor([5.0, -1.0]), kl_BT, answers([2, 1], T=3), 0.1)
        close(reward_BT, [[-0.1, 4.8, 0], [-0.7, 0, 0]])

    @cheap
    @given(lengths, seeds, st.floats(0, 1))
    def test_against_the_loop(self, row_lengths: list[int], seed: int, kl_coef: float) -> None:
        answer_BT = answers(row_lengths)
        kl_BT, score_B = draw(answer_BT, seed), draw(answer_BT, seed + 1)[:, 0]
        expected = []
        for score, kls in zip(score_B.tolist(), rows(kl_BT, answer_BT), strict=True):
            rewards = [-kl_coef * kl for kl in kls]
            rewards[-1] += score
            expected.append(rewards)
        reward_BT = maths.kl_shaped_rewards(score_B, kl_BT, answer_BT, kl_coef)
        close(reward_BT, padded(expected, answer_BT.shape[1]))

    def test_rows_without_answer_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"Rows \[1\] have no answer token"):
            maths.kl_shaped_rewards(torch.zeros(2), torch.zeros(2, 2), answers([2, 0], T=2), 0.1)

    def test_answers_with_a_hole_are_named(self) -> None:
        hole_BT = torch.tensor([[True, True, False], [True, False, True]])
        with pytest.raises(ValueError, match=r"Rows \[1\] have padding before"):
            maths.kl_shaped_rewards(torch.zeros(2), torch.zeros(2, 3), hole_BT, 0.1)
        with pytest.raises(ValueError, match=r"Rows \[1\] have padding before"):
            maths.gae(torch.zeros(2, 3), torch.zeros(2, 3), hole_BT, 1, 1)

    def test_one_score_per_row_or_refused(self) -> None:
        with pytest.raises(ValueError, match="Scores have shape"):
            maths.kl_shaped_rewards(torch.zeros(1), torch.zeros(2, 2), answers([2, 1], T=2), 0.1)

    def test_missing_eos_penalty(self) -> None:
        # 0.5 stopped by itself; 2 ran into the limit and pays 1.5.
        score_B, finished_B = torch.tensor([0.5, 2.0]), torch.tensor([True, False])
        close(maths.missing_eos_penalty(score_B, finished_B, 1.5), [0.5, 0.5])
        close(maths.missing_eos_penalty(score_B, finished_B, 0.0), score_B)
        close(score_B, [0.5, 2.0])  # the argument is not written to
        with pytest.raises(ValueError, match="-1"):
            maths.missing_eos_penalty(score_B, finished_B, -1)


def loop_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation (16) as printed: a sum over every later residual, without the recursion."""
    deltas = [
        reward + gamma * after - now for reward, (now, after) in zip(rewards, pairwise([*values, 0.0]), strict=True)
    ]
    return [
        math.fsum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


class TestGAE:
    def test_by_hand(self) -> None:
        # gamma = lam = 1/2. Rewards 1, 2; values 4, 8; the episode ends after two tokens.
        # delta_1 = 2 + 0 - 8 = -6;  delta_0 = 1 + 8/2 - 4 = 1;  A_0 = 1 + 1/4 * -6 = -1/2.
        advantage_BT, return_BT = maths.gae(
            torch.tensor([[1.0, 2.0, NAN]]), torch.tensor([[4.0, 8.0, NAN]]), answers([2]), 0.5, 0.5
        )
        close(advantage_BT, [[-0.5, -6, 0]])
        close(return_BT, [[3.5, 2, 0]])

    @cheap
    @given(lengths, seeds, discounts, discounts)
    def test_against_the_loop(self, row_lengths: list[int], seed: int, gamma: float, lam: float) -> None:
        answer_BT = answers(row_lengths)
        reward_BT, value_BT = draw(answer_BT, seed), draw(answer_BT, seed + 1)
        advantage_BT, return_BT = maths.gae(reward_BT, value_BT, answer_BT, gamma, lam)
        value_rows = rows(value_BT, answer_BT)
        expected = [
            loop_gae(rewards, values, gamma, lam)
            for rewards, values in zip(rows(reward_BT, answer_BT), value_rows, strict=True)
        ]
        returns = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(expected, value_rows, strict=True)]
        close(advantage_BT, padded(expected, answer_BT.shape[1]), tol=2e-6)
        close(return_BT, padded(returns, answer_BT.shape[1]), tol=2e-6)

    @cheap
    @given(lengths, seeds)
    def test_lam_1_gamma_1_is_return_minus_value(self, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        reward_BT, value_BT = draw(answer_BT, seed), draw(answer_BT, seed + 1)
        advantage_BT, return_BT = maths.gae(reward_BT, value_BT, answer_BT, 1, 1)
        to_go = [[math.fsum(row[t:]) for t in range(len(row))] for row in rows(reward_BT, answer_BT)]
        close(return_BT, padded(to_go, answer_BT.shape[1]), tol=5e-6)
        close((advantage_BT + value_BT)[answer_BT], return_BT[answer_BT])

    @cheap
    @given(lengths, seeds, discounts)
    def test_lam_0_is_the_td_error(self, row_lengths: list[int], seed: int, gamma: float) -> None:
        answer_BT = answers(row_lengths)
        reward_BT, value_BT = draw(answer_BT, seed), draw(answer_BT, seed + 1)
        advantage_BT, _ = maths.gae(reward_BT, value_BT, answer_BT, gamma, 0)
        next_value_BT = torch.nn.functional.pad(value_BT.nan_to_num(0), (0, 1))[:, 1:]
        close(advantage_BT[answer_BT], (reward_BT + gamma * next_value_BT - value_BT)[answer_BT])

    @cheap
    @given(lengths, seeds)
    def test_rows_do_not_see_each_other_or_their_padding(self, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        reward_BT, value_BT = draw(answer_BT, seed), draw(answer_BT, seed + 1)
        together = torch.stack(maths.gae(reward_BT, value_BT, answer_BT, 0.9, 0.8))
        for row, length in enumerate(row_lengths):
            one = slice(row, row + 1), slice(0, length)
            alone = torch.stack(maths.gae(reward_BT[one], value_BT[one], answer_BT[one], 0.9, 0.8))
            assert torch.equal(together[:, row, :length], alone[:, 0])
        order = torch.randperm(len(row_lengths), generator=torch.Generator().manual_seed(seed))
        permuted = maths.gae(reward_BT[order], value_BT[order], answer_BT[order], 0.9, 0.8)
        assert torch.equal(torch.stack(permuted), together[:, order])

    def test_no_gradient_reaches_the_values(self) -> None:
        value_BT = torch.ones(1, 2, requires_grad=True)
        advantage_BT, return_BT = maths.gae(torch.ones(1, 2), value_BT, answers([2], T=2), 1, 1)
        assert not advantage_BT.requires_grad and not return_BT.requires_grad


# --- losses ----------------------------------------------------------------------------------------------------


def loop_policy_loss(new: list[float], old: list[float], advantages: list[float], cliprange: float) -> float:
    total = 0.0
    for new_logprob, old_logprob, advantage in zip(new, old, advantages, strict=True):
        ratio = math.exp(new_logprob) / math.exp(old_logprob)
        kept = min(max(ratio, 1 - cliprange), 1 + cliprange)
        total += min(ratio * advantage, kept * advantage)
    return -total / len(new)


def loop_value_loss(values: list[float], old: list[float], returns: list[float], cliprange: float) -> float:
    total = 0.0
    for value, old_value, target in zip(values, old, returns, strict=True):
        kept = old_value + min(max(value - old_value, -cliprange), cliprange)
        total += max((value - target) ** 2, (kept - target) ** 2)
    return 0.5 * total / len(values)


def finite_differences(loss, at: list[float], *constants) -> list[float]:
    step = 1e-6
    nudged = [[[*at[:i], x + by, *at[i + 1 :]] for by in (step, -step)] for i, x in enumerate(at)]
    return [(loss(up, *constants) - loss(down, *constants)) / (2 * step) for up, down in nudged]


LOSSES = pytest.mark.parametrize("loss", [maths.policy_loss, maths.value_loss])
LOSSES_AND_LOOPS = pytest.mark.parametrize(
    ("loss", "loop"), [(maths.policy_loss, loop_policy_loss), (maths.value_loss, loop_value_loss)]
)


class TestBothLosses:
    """Policy and value loss take the same four (B, T) tensors: what learns, two constants and the mask."""

    @LOSSES_AND_LOOPS
    @cheap
    @given(row_lengths=lengths, seed=seeds, clip=st.floats(0.05, 0.9))
    def test_against_the_loop(self, loss, loop, row_lengths: list[int], seed: int, clip: float) -> None:
        answer_BT = answers(row_lengths)
        inputs = [draw(answer_BT, seed + i, scale=0.7) for i in range(3)]
        expected = loop(*(flat(values_BT, answer_BT) for values_BT in inputs), clip)
        close(loss(*inputs, answer_BT, clip).loss, expected)

    @LOSSES_AND_LOOPS
    @pytest.mark.parametrize("seed", range(5))
    def test_gradient_is_that_of_the_loop_and_0_on_padding(self, loss, loop, seed: int) -> None:
        answer_BT = answers([4, 1, 6])
        inputs = [draw(answer_BT, 10 * seed + i, scale=0.5, dtype=torch.float64) for i in range(3)]
        numbers = [flat(values_BT, answer_BT) for values_BT in inputs]
        inputs[0].requires_grad_()
        (gradient_BT,) = torch.autograd.grad(loss(*inputs, answer_BT, 0.2).loss, inputs[0])
        close(gradient_BT[answer_BT], finite_differences(loop, *numbers, 0.2), tol=1e-7)
        assert torch.equal(gradient_BT[~answer_BT], torch.zeros_like(gradient_BT[~answer_BT]))

    @LOSSES
    @cheap
    @given(row_lengths=st.lists(st.integers(1, 6), min_size=2, max_size=5), seed=seeds)
    def test_micro_batches_add_up_to_the_batch(self, loss, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        inputs = [draw(answer_BT, seed + i, scale=0.5) for i in range(3)]
        inputs[0].requires_grad_()
        whole = loss(*inputs, answer_BT, 0.2)
        (whole_gradient_BT,) = torch.autograd.grad(whole.loss, inputs[0])
        tokens = sum(row_lengths)
        parts = []
        for row in range(len(row_lengths)):
            one = slice(row, row + 1)
            part = loss(*(values_BT[one] for values_BT in inputs), answer_BT[one], 0.2, normaliser=tokens)
            part.loss.backward()
            parts.append(torch.stack([field.detach() for field in part]))
        close(sum(parts), torch.stack([field.detach() for field in whole]))
        close(inputs[0].grad, whole_gradient_BT)

    @LOSSES
    def test_row_order_does_not_matter(self, loss) -> None:
        answer_BT = answers([3, 5, 1])
        inputs = [draw(answer_BT, i, scale=0.5) for i in range(3)]
        order = torch.tensor([2, 0, 1])
        permuted = loss(*(values_BT[order] for values_BT in inputs), answer_BT[order], 0.2)
        close(torch.stack(permuted), torch.stack(loss(*inputs, answer_BT, 0.2)))

    @LOSSES
    def test_only_the_loss_of_the_first_argument_has_a_gradient(self, loss) -> None:
        answer_BT = answers([2])
        inputs = [draw(answer_BT, i).requires_grad_() for i in range(3)]
        result = loss(*inputs, answer_BT, 0.2)
        assert [field.requires_grad for field in result] == [True] + [False] * (len(result) - 1)
        result.loss.backward()
        assert [values_BT.grad is not None for values_BT in inputs] == [True, False, False]

    @LOSSES
    def test_an_empty_micro_batch_counts_0_and_an_empty_batch_is_refused(self, loss) -> None:
        nowhere_BT = answers([0, 0], T=2)
        inputs = [torch.full((2, 2), NAN)] * 3
        assert not torch.stack(loss(*inputs, nowhere_BT, 0.2, normaliser=7)).any()
        with pytest.raises(ValueError, match="mean of nothing"):
            loss(*inputs, nowhere_BT, 0.2)
        with pytest.raises(ValueError, match="normaliser is 0"):
            loss(*inputs, nowhere_BT, 0.2, normaliser=0)


class TestPolicyLoss:
    def test_by_hand(self) -> None:
        # Ratios 2, 1/4 and 1, advantages 1, 1 and -3, epsilon 0.2.
        # min(2, 1.2) = 1.2; min(0.25, 0.8) = 0.25; -3. Loss -(1.2 + 0.25 - 3) / 3 = 1.55 / 3; one token of 3 clipped.
        # KL (ratio - 1 - log ratio): 1 - 0.6931472, -0.75 + 1.3862944, 0; together 0.9431472.
        answer_BT = answers([2, 1])
        new_BT = torch.tensor([[math.log(2), math.log(0.25), NAN], [0.0, NAN, NAN]])
        advantage_BT = torch.tensor([[1.0, 1.0, NAN], [-3.0, NAN, NAN]])
        result = maths.policy_loss(new_BT, torch.zeros(2, 3), advantage_BT, answer_BT, 0.2)
        close(torch.stack(result), [1.55 / 3, 1 / 3, 0.9431472 / 3, 3.25 / 3])

    @cheap
    @given(lengths, seeds)
    def test_before_the_first_update_it_is_minus_the_mean_advantage(self, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        logprobs_BT, advantage_BT = draw(answer_BT, seed), draw(answer_BT, seed + 1)
        result = maths.policy_loss(logprobs_BT, logprobs_BT, advantage_BT, answer_BT, 0.2)
        mean_advantage = statistics.fmean(flat(advantage_BT, answer_BT))
        close(torch.stack(result), [-mean_advantage, 0, 0, 1])

    @pytest.mark.parametrize("advantage", [1.5, -1.5])
    def test_no_pull_beyond_the_clip_and_full_pull_back(self, advantage: float) -> None:
        ratio_BT = torch.tensor([[0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0]], dtype=torch.float64)
        logprobs_BT = ratio_BT.log().requires_grad_()
        answer_BT = answers([7], T=7)
        advantage_BT = torch.full_like(ratio_BT, advantage)
        result = maths.policy_loss(logprobs_BT, torch.zeros(1, 7), advantage_BT, answer_BT, 0.2, normaliser=1)
        (gradient_BT,) = torch.autograd.grad(result.loss, logprobs_BT)
        satisfied_BT = ratio_BT > 1.2 if advantage > 0 else ratio_BT < 0.8
        assert not gradient_BT[satisfied_BT].any()
        close(gradient_BT[~satisfied_BT], -advantage * ratio_BT[~satisfied_BT], tol=1e-12)
        assert result.clip_fraction == satisfied_BT.sum()


class TestValueLoss:
    def test_by_hand(self) -> None:
        # Old values 0, clip 0.5. Value 1, return 2: max(1, (0.5 - 2)^2) = 2.25, clipped.
        # Value 1, return 0: max(1, 0.25) = 1. Value 0.2, return 1: 0.64 both ways. 0.5 * 3.89 / 3.
        answer_BT = answers([2, 1])
        value_BT = torch.tensor([[1.0, 1.0, NAN], [0.2, NAN, NAN]])
        return_BT = torch.tensor([[2.0, 0.0, NAN], [1.0, NAN, NAN]])
        result = maths.value_loss(value_BT, torch.zeros(2, 3), return_BT, answer_BT, 0.5)
        close(torch.stack(result), [0.5 * 3.89 / 3, 1 / 3])

    def test_an_infinite_range_is_half_the_mean_squared_error(self) -> None:
        answer_BT = answers([4, 2])
        value_BT, old_BT, return_BT = (draw(answer_BT, i) for i in range(3))
        result = maths.value_loss(value_BT, old_BT, return_BT, answer_BT, math.inf)
        expected = 0.5 * torch.nn.functional.mse_loss(value_BT[answer_BT], return_BT[answer_BT])
        close(torch.stack(result), [expected.item(), 0])


# --- diagnostics and the controller ----------------------------------------------------------------------------


class TestExplainedVariance:
    def test_by_hand(self) -> None:
        # Returns 0, 2, 4: variance 8/3. Residuals 0, 1, -1 (values 0, 1, 5): variance 2/3. 1 - 1/4.
        return_BT, value_BT = torch.tensor([[0.0, 2.0, 4.0, NAN]]), torch.tensor([[0.0, 1.0, 5.0, NAN]])
        close(maths.explained_variance(value_BT, return_BT, answers([3])), 0.75)

    def test_fixed_points(self) -> None:
        answer_BT = answers([4, 2])
        return_BT = draw(answer_BT, 0)
        close(maths.explained_variance(return_BT + 3, return_BT, answer_BT), 1.0)
        close(maths.explained_variance(torch.full_like(return_BT, 7.0), return_BT, answer_BT), 0.0)
        close(maths.explained_variance(-return_BT, return_BT, answer_BT), -3.0)  # residual 2R: 1 - 4
        assert maths.explained_variance(return_BT, torch.ones_like(return_BT), answer_BT).isnan()


class TestAdaptiveKLCoef:
    def test_by_hand(self) -> None:
        # KL 6.6 against 6 is 10 % too much: e = 0.1, K = 256 / 2560 = 0.1, so the coefficient grows by 1 %.
        assert maths.adaptive_kl_coef(0.2, 6.6, 6, 2560, 256) == pytest.approx(0.202)
        # Ten times the target is clipped to e = 0.2, none at all to -0.2.
        assert maths.adaptive_kl_coef(0.2, 60, 6, 2560, 256) == pytest.approx(0.204)
        assert maths.adaptive_kl_coef(0.2, 0, 6, 2560, 256) == pytest.approx(0.196)
        assert maths.adaptive_kl_coef(0.2, 6, 6, 2560, 256) == 0.2

    def test_against_the_loop_over_a_run(self) -> None:
        coef, expected = 0.1, 0.1
        for kl in [0.0, 2.0, 5.5, 6.1, 9.0, 6.9, -1.0]:
            error = (kl - 6) / 6
            if error > 0.2:
                error = 0.2
            elif error < -0.2:
                error = -0.2
            expected *= 1 + error * 64 / 1000
            coef = maths.adaptive_kl_coef(coef, kl, 6, 1000, 64)
            assert coef == pytest.approx(expected, rel=1e-12)

    @cheap
    @given(st.floats(0, 1e6), st.floats(0.1, 100), st.integers(1, 1000))
    def test_it_pushes_towards_the_target_and_stays_positive(self, kl: float, target: float, n_steps: int) -> None:
        change = maths.adaptive_kl_coef(1.0, kl, target, 1000, n_steps) - 1
        assert change * (kl - target) >= 0
        assert abs(change) <= 0.2 + 1e-12

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0.1, NAN, 6, 1000, 64), "measured KL is nan"),
            ((0.1, math.inf, 6, 1000, 64), "measured KL is inf"),
            ((0.1, 5, 0, 1000, 64), "target KL is 0"),
            ((0.1, 5, 6, 1000, 0), "n_steps is 0 and horizon 1000"),
            ((0.1, 5, 6, 32, 64), "n_steps is 64 and horizon 32"),
        ],
    )
    def test_nonsense_is_refused(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            maths.adaptive_kl_coef(*arguments)
