"""PPO's arithmetic against numbers worked by hand, properties, loops in plain Python, and TRL.

The loops see Python floats and lists, one row at a time and without padding, and share no code with the module.
Every padded entry handed to the module is NaN, so a mask that leaks is a test that fails.
"""

import math
import statistics
from functools import partial
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


def loop_entropy(logits: list[float], temperature: float) -> float:
    return -math.fsum(math.exp(logprob) * logprob for logprob in loop_logprobs(logits, temperature))


def loop_full_kl(logits: list[float], reference: list[float], temperature: float) -> float:
    pairs = zip(loop_logprobs(logits, temperature), loop_logprobs(reference, temperature), strict=True)
    return math.fsum(math.exp(logprob) * (logprob - ref_logprob) for logprob, ref_logprob in pairs)


def finite_differences(loss, at: list[float], *constants) -> list[float]:
    step = 1e-6
    nudged = [[[*at[:i], x + by, *at[i + 1 :]] for by in (step, -step)] for i, x in enumerate(at)]
    return [(loss(up, *constants) - loss(down, *constants)) / (2 * step) for up, down in nudged]


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
        entropies = [loop_entropy(row, temperature) for row in logits_NV.tolist()]
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

    def test_the_entropys_gradient_by_hand(self) -> None:
        # dH/dz_i = -p_i (log p_i + H). Odds 1 : 3, H = 0.5623351: -1/4 (-1.3862944 + 0.5623351) = 0.2059898,
        # and a constant added to both logits changes nothing, so the two cancel.
        logits_NV = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
        (gradient_NV,) = torch.autograd.grad(maths.token_entropy(logits_NV, 1.0).sum(), logits_NV)
        close(gradient_NV, [[0.2059898, -0.2059898]])

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_the_entropys_gradient_is_that_of_the_loop(self, temperature: float) -> None:
        logits = [0.3, -1.2, 2.0, 0.0, -4.0]
        logits_NV = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
        (gradient_NV,) = torch.autograd.grad(maths.token_entropy(logits_NV, temperature).sum(), logits_NV)
        close(gradient_NV[0], finite_differences(loop_entropy, logits, temperature), tol=1e-8)
        # A forbidden token changes nothing for the others and has no gradient of its own.
        forbidden_NV = torch.tensor([[*logits, -math.inf]], dtype=torch.float64, requires_grad=True)
        (with_forbidden_NV,) = torch.autograd.grad(maths.token_entropy(forbidden_NV, temperature).sum(), forbidden_NV)
        close(with_forbidden_NV, [[*gradient_NV[0].tolist(), 0.0]], tol=1e-12)

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
            maths.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), answers([1], T=1), "k4")

    def test_the_full_kl_is_no_estimate_from_samples(self) -> None:
        with pytest.raises(ValueError, match=r"needs the logits of both models.*see full_kl"):
            maths.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), answers([1], T=1), "full")


class TestFullKL:
    def test_by_hand(self) -> None:
        # Odds 1 : 1 against 1 : 3: 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4) = (0.6931472 - 0.4054651) / 2.
        # At temperature 2 the reference's odds are 1 : sqrt(3): -log 2 - 1/2 (-1.0050525 - 0.4557464).
        even_NV, odds_NV = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]])
        close(maths.full_kl(even_NV, odds_NV, 1.0), [0.1438410])
        close(maths.full_kl(even_NV, odds_NV, 2.0), [0.0372522])
        # Not symmetric: 1/4 log(1/4 / 1/2) + 3/4 log(3/4 / 1/2).
        close(maths.full_kl(odds_NV, even_NV, 1.0), [-0.6931472 / 4 + 3 * 0.4054651 / 4])

    @cheap
    @given(st.integers(1, 5), st.integers(2, 9), st.floats(0.3, 3), seeds)
    def test_against_the_loop_and_never_negative(self, N: int, V: int, temperature: float, seed: int) -> None:
        logits_NV, ref_NV = 2 * torch.randn(2, N, V, generator=torch.Generator().manual_seed(seed))
        kl_N = maths.full_kl(logits_NV, ref_NV, temperature)
        pairs = zip(logits_NV.tolist(), ref_NV.tolist(), strict=True)
        close(kl_N, [loop_full_kl(logits, reference, temperature) for logits, reference in pairs], tol=2e-6)
        assert (kl_N >= 0).all()
        assert (maths.full_kl(logits_NV, logits_NV + 1e-4 * ref_NV, temperature) >= 0).all()  # where rounding shows

    @cheap
    @given(st.integers(2, 9), seeds)
    def test_it_is_the_expectation_of_k1(self, V: int, seed: int) -> None:
        logits_NV, ref_NV = torch.randn(2, 1, V, generator=torch.Generator().manual_seed(seed))
        tokens_V = torch.arange(V)
        logprobs_V = maths.token_logprobs(logits_NV.expand(V, V), tokens_V, 0.7)
        ref_V = maths.token_logprobs(ref_NV.expand(V, V), tokens_V, 0.7)
        k1_V = maths.kl_estimate(logprobs_V, ref_V, torch.ones(V, dtype=torch.bool), "k1")
        close(maths.full_kl(logits_NV, ref_NV, 0.7), [float((logprobs_V.exp() * k1_V).sum())])

    def test_equal_logits_or_shifted_ones_have_none(self) -> None:
        logits_NV = 5 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
        assert not maths.full_kl(logits_NV, logits_NV, 0.7).any()
        close(maths.full_kl(logits_NV, logits_NV + 3, 0.7), [0.0] * 20)

    def test_gradients_are_those_of_the_loop(self) -> None:
        logits, reference = [0.3, -1.2, 2.0, 0.0], [1.0, 0.5, -0.7, 0.2]
        policy_NV = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
        ref_NV = torch.tensor([reference], dtype=torch.float64, requires_grad=True)
        kl = maths.full_kl(policy_NV, ref_NV, 0.7).sum()
        policy_gradient_NV, ref_gradient_NV = torch.autograd.grad(kl, [policy_NV, ref_NV])
        close(policy_gradient_NV[0], finite_differences(loop_full_kl, logits, reference, 0.7), tol=1e-8)
        by_reference = finite_differences(lambda at: loop_full_kl(logits, at, 0.7), reference)
        close(ref_gradient_NV[0], by_reference, tol=1e-8)

    def test_a_sum_that_rounds_below_0_keeps_its_gradient(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits_NV = torch.randn(200, 50, generator=generator)
        ref_NV = logits_NV + 1e-5 * torch.randn(200, 50, generator=generator)
        logits_NV.requires_grad_()
        kl_N = maths.full_kl(logits_NV, ref_NV, 1.0)
        (gradient_NV,) = torch.autograd.grad(kl_N.sum(), logits_NV)
        assert (kl_N == 0).any() and gradient_NV.any(-1).all()

    def test_forbidden_tokens(self) -> None:
        # By both: 1/2 against 1/2. By the policy alone: 1/2 against 1/3. By the reference alone: infinite.
        inf = math.inf
        logits_NV = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, -inf]], requires_grad=True)
        ref_NV = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, 0.0]])
        kl_N = maths.full_kl(logits_NV, ref_NV, 1.0)
        close(kl_N.detach(), [0.0, math.log(3 / 2)])
        (gradient_NV,) = torch.autograd.grad(kl_N.sum(), logits_NV)
        close(gradient_NV, torch.zeros(2, 3))  # the ratio is the same at every token left
        assert maths.full_kl(torch.zeros(1, 2), torch.tensor([[0.0, -inf]]), 1.0) == inf

    def test_half_precision_is_computed_in_float32(self) -> None:
        logits_NV, ref_NV = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert maths.full_kl(logits_NV, ref_NV, 1.0).dtype == torch.float32
        close(maths.full_kl(logits_NV, ref_NV, 1.0), maths.full_kl(logits_NV.float(), ref_NV.float(), 1.0))

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match=r"shape \(2, 3\) and the reference's \(2, 4\)"):
            maths.full_kl(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)
        with pytest.raises(ValueError, match=r"shape \(2, 3\) and the reference's \(3,\)"):
            maths.full_kl(torch.zeros(2, 3), torch.zeros(3), 1.0)
        with pytest.raises(ValueError, match="must be positive"):
            maths.full_kl(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)


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


def loop_overlong(length: int, limit: int, buffer: int) -> float:
    """Equation (13) as printed: a reward, never positive."""
    if length <= limit - buffer:
        return 0.0
    if length <= limit:
        return ((limit - buffer) - length) / buffer
    return -1.0


class TestOverlongPenalty:
    def test_by_hand(self) -> None:
        # Limit 10, buffer 4, penalty 2: nothing up to 6 tokens, then 2/4 for each further one, 2 from 10 on.
        length_B = torch.tensor([1, 6, 7, 8, 10, 12])
        close(maths.overlong_penalty(length_B, 10, 4, 2.0), [0.0, 0, 0.5, 1, 2, 2])
        close(maths.overlong_penalty(length_B, 10, 4, 0.0), [0.0] * 6)
        # The whole limit as buffer: 1/10 a token.
        close(maths.overlong_penalty(torch.tensor([0, 3, 10]), 10, 10, 1.0), [0.0, 0.3, 1])
        # A buffer of 1: all or nothing.
        close(maths.overlong_penalty(torch.tensor([9, 10]), 10, 1, 1.0), [0.0, 1])

    @cheap
    @given(st.integers(1, 300), st.data(), st.floats(0, 10))
    def test_against_the_loop_rising_and_within_bounds(self, limit: int, data: st.DataObject, penalty: float) -> None:
        buffer = data.draw(st.integers(1, limit))
        length_B = torch.arange(limit + 20)
        penalty_B = maths.overlong_penalty(length_B, limit, buffer, penalty)
        close(penalty_B, [-penalty * loop_overlong(length, limit, buffer) for length in length_B.tolist()])
        assert (penalty_B.diff() >= 0).all()
        assert ((penalty_B >= 0) & (penalty_B <= torch.tensor(penalty))).all()
        close(maths.overlong_penalty(length_B.float(), limit, buffer, penalty), penalty_B)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((10, 0, 1.0), "buffer is 0 tokens and the limit 10"),
            ((10, 11, 1.0), "buffer is 11 tokens and the limit 10"),
            ((10, 4, -1.0), "it is -1.0"),
            ((10, 4, NAN), "it is nan"),
            ((10, 4, math.inf), "it is inf"),
        ],
    )
    def test_nonsense_is_refused(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            maths.overlong_penalty(torch.tensor([5]), *arguments)


class TestClipScores:
    def test_by_hand(self) -> None:
        # Two of five lie outside 2; the two on the bound do not.
        score_B = torch.tensor([-5.0, -2.0, 0.5, 2.0, 2.5])
        clipped_B, fraction = maths.clip_scores(score_B, 2.0)
        close(clipped_B, [-2.0, -2, 0.5, 2, 2])
        close(fraction, 2 / 5)
        close(score_B, [-5.0, -2.0, 0.5, 2.0, 2.5])  # the argument is not written to

    @cheap
    @given(st.integers(1, 9), st.floats(0.1, 3), seeds)
    def test_against_the_loop(self, B: int, bound: float, seed: int) -> None:
        score_B = torch.randn(B, generator=torch.Generator().manual_seed(seed))
        clipped_B, fraction = maths.clip_scores(score_B, bound)
        expected = [max(-bound, min(bound, score)) for score in score_B.tolist()]
        close(clipped_B, expected)
        close(fraction, sum(abs(score) > bound for score in score_B.tolist()) / B)
        again_B, _ = maths.clip_scores(clipped_B, bound)
        assert torch.equal(again_B, clipped_B)
        close(maths.clip_scores(-score_B, bound)[0], -clipped_B)

    def test_half_precision_is_clipped_in_float32_and_infinity_is_no_bound(self) -> None:
        score_B = torch.tensor([1.0, -1.0], dtype=torch.bfloat16)
        clipped_B, fraction = maths.clip_scores(score_B, 0.1)
        assert clipped_B.dtype == fraction.dtype == torch.float32
        close(clipped_B, [0.1, -0.1])
        unclipped_B, none = maths.clip_scores(score_B, math.inf)
        assert torch.equal(unclipped_B, score_B.float()) and none == 0

    @pytest.mark.parametrize("bound", [0.0, -2.0, NAN])
    def test_a_bound_that_is_not_positive_is_refused(self, bound: float) -> None:
        with pytest.raises(ValueError, match=f"bound on scores is {bound}"):
            maths.clip_scores(torch.zeros(2), bound)


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


def loop_policy_loss(
    new: list[float],
    old: list[float],
    advantages: list[float],
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> float:
    total = 0.0
    for new_logprob, old_logprob, advantage in zip(new, old, advantages, strict=True):
        ratio = math.exp(new_logprob) / math.exp(old_logprob)
        kept = min(max(ratio, 1 - cliprange), 1 + (cliprange if cliprange_high is None else cliprange_high))
        objective = min(ratio * advantage, kept * advantage)
        if dual_clip is not None and advantage < 0:
            objective = max(objective, dual_clip * advantage)
        total += objective
    return -total / len(new)


def loop_value_loss(values: list[float], old: list[float], returns: list[float], cliprange: float) -> float:
    total = 0.0
    for value, old_value, target in zip(values, old, returns, strict=True):
        kept = old_value + min(max(value - old_value, -cliprange), cliprange)
        total += max((value - target) ** 2, (kept - target) ** 2)
    return 0.5 * total / len(values)


# Bounds so tight that a few tokens of every draw meet each of them.
VARIANTS = {
    "higher": {"cliprange_high": 0.5},
    "dual": {"dual_clip": 1.1},
    "higher-dual": {"cliprange_high": 0.05, "dual_clip": 1.5},
}
PAIRS = {
    "policy": (maths.policy_loss, loop_policy_loss),
    **{
        f"policy-{name}": (partial(maths.policy_loss, **v), partial(loop_policy_loss, **v))
        for name, v in VARIANTS.items()
    },
    "value": (maths.value_loss, loop_value_loss),
}
LOSSES = pytest.mark.parametrize("loss", [loss for loss, _ in PAIRS.values()], ids=list(PAIRS))
LOSSES_AND_LOOPS = pytest.mark.parametrize(("loss", "loop"), list(PAIRS.values()), ids=list(PAIRS))


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
        close(torch.stack(result), [1.55 / 3, 1 / 3, 0.9431472 / 3, 3.25 / 3, 0])

    def test_clip_higher_by_hand(self) -> None:
        # Ratios 1.25, 1.5 and 0.5, advantages 1, 1 and -1, epsilon 0.2 below and 0.28 above.
        # 1.25 is within now; min(1.5, 1.28) = 1.28; min(-0.5, -0.8) = -0.8. Loss -(1.25 + 1.28 - 0.8) / 3.
        new_BT = torch.tensor([[1.25, 1.5, 0.5]]).log()
        advantage_BT = torch.tensor([[1.0, 1.0, -1.0]])
        result = maths.policy_loss(new_BT, torch.zeros(1, 3), advantage_BT, answers([3], 3), 0.2, cliprange_high=0.28)
        close(torch.stack([result.loss, result.clip_fraction, result.dual_clip_fraction]), [-1.73 / 3, 2 / 3, 0])

    def test_dual_clip_by_hand(self) -> None:
        # c = 3. Ratios 5, 2, 0.5 and 5, advantages -2, -2, -2 and 1, epsilon 0.2.
        # max(min(-10, -2.4), -6) = -6, bounded; max(-4, -6) = -4; max(-1.6, -6) = -1.6, clipped; min(5, 1.2), clipped.
        new_BT = torch.tensor([[5.0, 2.0, 0.5, 5.0]]).log()
        advantage_BT = torch.tensor([[-2.0, -2.0, -2.0, 1.0]])
        result = maths.policy_loss(new_BT, torch.zeros(1, 4), advantage_BT, answers([4], 4), 0.2, dual_clip=3.0)
        close(torch.stack([result.loss, result.clip_fraction, result.dual_clip_fraction]), [10.4 / 4, 2 / 4, 1 / 4])

    @cheap
    @given(lengths, seeds)
    def test_none_is_the_loss_without_the_variants(self, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        inputs = [draw(answer_BT, seed + i) for i in range(3)]
        plain = torch.stack(maths.policy_loss(*inputs, answer_BT, 0.2))
        for same in ({"cliprange_high": 0.2}, {"dual_clip": math.inf}, {"cliprange_high": None, "dual_clip": None}):
            assert torch.equal(torch.stack(maths.policy_loss(*inputs, answer_BT, 0.2, **same)), plain)

    @cheap
    @given(lengths, seeds, st.floats(1.01, 5))
    def test_the_dual_clip_is_for_negative_advantages_alone(
        self, row_lengths: list[int], seed: int, dual_clip: float
    ) -> None:
        answer_BT = answers(row_lengths)
        new_BT, old_BT, advantage_BT = (draw(answer_BT, seed + i) for i in range(3))
        for sign in (1, -1):
            arguments = new_BT, old_BT, sign * advantage_BT.abs(), answer_BT, 0.2
            plain, dual = maths.policy_loss(*arguments), maths.policy_loss(*arguments, dual_clip=dual_clip)
            bounded = [
                sign < 0 and math.exp(new - old) > dual_clip
                for new, old in zip(flat(new_BT, answer_BT), flat(old_BT, answer_BT), strict=True)
            ]
            close(dual.dual_clip_fraction, statistics.fmean(bounded))
            assert dual.loss < plain.loss if any(bounded) else dual.loss == plain.loss
            assert dual.clip_fraction == plain.clip_fraction

    @pytest.mark.parametrize(
        ("bound", "message"),
        [
            ({"cliprange_high": -0.1}, "cliprange_high is -0.1; .* None for 0.2"),
            ({"cliprange_high": NAN}, "cliprange_high is nan"),
            ({"dual_clip": 1.0}, "dual_clip is 1.0"),
            ({"dual_clip": 0.5}, "dual_clip is 0.5"),
            ({"dual_clip": NAN}, "dual_clip is nan"),
        ],
    )
    def test_bounds_that_make_no_sense_are_refused(self, bound: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            maths.policy_loss(*[torch.zeros(1, 1)] * 3, answers([1], 1), 0.2, **bound)

    @cheap
    @given(lengths, seeds)
    def test_before_the_first_update_it_is_minus_the_mean_advantage(self, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        logprobs_BT, advantage_BT = draw(answer_BT, seed), draw(answer_BT, seed + 1)
        result = maths.policy_loss(logprobs_BT, logprobs_BT, advantage_BT, answer_BT, 0.2)
        mean_advantage = statistics.fmean(flat(advantage_BT, answer_BT))
        close(torch.stack(result), [-mean_advantage, 0, 0, 1, 0])

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

    def test_each_bound_ends_the_pull_where_it_says(self) -> None:
        ratio_BT = torch.tensor([[0.5, 0.79, 0.81, 1.21, 1.27, 1.29, 1.99, 2.01, 9.0]], dtype=torch.float64)
        answer_BT = answers([9], T=9)
        for advantage, satisfied_BT in ((1.5, ratio_BT > 1.28), (-1.5, (ratio_BT < 0.8) | (ratio_BT > 2))):
            logprobs_BT = ratio_BT.log().requires_grad_()
            advantage_BT = torch.full_like(ratio_BT, advantage)
            result = maths.policy_loss(
                logprobs_BT, torch.zeros(1, 9), advantage_BT, answer_BT, 0.2, 1, cliprange_high=0.28, dual_clip=2
            )
            (gradient_BT,) = torch.autograd.grad(result.loss, logprobs_BT)
            assert not gradient_BT[satisfied_BT].any()
            close(gradient_BT[~satisfied_BT], -advantage * ratio_BT[~satisfied_BT], tol=1e-12)
            assert result.clip_fraction + result.dual_clip_fraction == satisfied_BT.sum()


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

    def test_the_rounding_of_equal_returns_is_not_explained(self) -> None:
        answer_BT = answers([4, 2])
        constant_BT = torch.full(answer_BT.shape, 0.1, dtype=torch.float64)
        _, var = maths.mean_and_var(maths.masked_moments(constant_BT, answer_BT))
        assert 0 < var < 1e-16
        assert maths.explained_variance(draw(answer_BT, 0), constant_BT, answer_BT).isnan()

    @cheap
    @given(st.lists(st.integers(2, 6), min_size=2, max_size=4), seeds)
    def test_against_the_standard_library_and_sums_over_halves(self, row_lengths: list[int], seed: int) -> None:
        answer_BT = answers(row_lengths)
        value_BT, return_BT = draw(answer_BT, seed), draw(answer_BT, seed + 1)
        residual_BT = return_BT - value_BT
        whole = maths.explained_variance(value_BT, return_BT, answer_BT)
        ratio = statistics.pvariance(flat(residual_BT, answer_BT)) / statistics.pvariance(flat(return_BT, answer_BT))
        close(whole, 1 - ratio)
        halves = [slice(0, 1), slice(1, None)]
        sums = [
            sum(maths.masked_moments(values_BT[half], answer_BT[half]) for half in halves)
            for values_BT in (return_BT, residual_BT)
        ]
        explained = maths.variance_explained(*sums)
        assert explained.dtype == torch.float64
        close(explained, float(whole))

    def test_ranks_with_constant_returns_can_differ_from_one_another(self) -> None:
        # Returns 1, 1 on one rank and 3, 3 on the other, each without variance; together mean 2, variance 1.
        # Residuals 0, 0 and 1, 1: variance 1/4.
        def moments(*numbers: float) -> Tensor:
            return maths.masked_moments(torch.tensor(numbers), torch.ones(len(numbers), dtype=torch.bool))

        assert maths.variance_explained(moments(1, 1), moments(0, 0)).isnan()
        close(maths.variance_explained(moments(1, 1) + moments(3, 3), moments(0, 0) + moments(1, 1)), 0.75)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="mean of nothing"):
            maths.variance_explained(torch.zeros(3), torch.zeros(3))
        with pytest.raises(ValueError, match="mean of nothing"):
            maths.explained_variance(torch.zeros(1, 2), torch.zeros(1, 2), answers([0], T=2))
        with pytest.raises(ValueError, match="4 returns and 2 residuals"):
            maths.variance_explained(torch.tensor([4.0, 1, 1]), torch.tensor([2.0, 1, 1]))


class TestCorrelation:
    def test_by_hand(self) -> None:
        # x 1, 2, 3 and y 2, 2, 5: means 2 and 3; deviations -1, 0, 1 and -1, -1, 2.
        # Covariance sum 1 + 0 + 2 = 3, square sums 2 and 6: 3 / sqrt(12).
        sums_6 = maths.paired_moments(torch.tensor([1, 2, 3]), torch.tensor([2.0, 2.0, 5.0]))
        assert sums_6.dtype == torch.float64
        assert sums_6.tolist() == [3, 6, 9, 14, 33, 21]
        assert maths.correlation(sums_6) == pytest.approx(0.8660254)

    @cheap
    @given(st.integers(2, 12), seeds)
    def test_against_the_standard_library(self, n: int, seed: int) -> None:
        x_B, y_B = torch.randn(2, n, generator=torch.Generator().manual_seed(seed))
        expected = statistics.correlation(x_B.tolist(), y_B.tolist())
        assert maths.correlation(maths.paired_moments(x_B, y_B)) == pytest.approx(expected, abs=1e-6)
        # Units do not matter, the order of the two neither; turning one round changes the sign.
        assert maths.correlation(maths.paired_moments(3 * x_B + 100, y_B)) == pytest.approx(expected, abs=1e-4)
        assert maths.correlation(maths.paired_moments(y_B, x_B)) == pytest.approx(expected, abs=1e-6)
        assert maths.correlation(maths.paired_moments(-x_B, y_B)) == pytest.approx(-expected, abs=1e-6)

    @cheap
    @given(st.integers(2, 12), st.integers(0, 12), seeds)
    def test_sums_over_halves_are_those_of_the_whole(self, n: int, cut: int, seed: int) -> None:
        x_B, y_B = torch.randn(2, n, generator=torch.Generator().manual_seed(seed))
        halves = maths.paired_moments(x_B[:cut], y_B[:cut]) + maths.paired_moments(x_B[cut:], y_B[cut:])
        close(halves, maths.paired_moments(x_B, y_B), tol=1e-12)
        assert maths.correlation(halves) == pytest.approx(maths.correlation(maths.paired_moments(x_B, y_B)), abs=1e-9)

    @cheap
    @given(st.integers(2, 12), seeds)
    def test_a_straight_line_is_1_and_never_more(self, n: int, seed: int) -> None:
        x_B = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for slope in (0.3, -7.0):
            r = maths.correlation(maths.paired_moments(x_B, slope * x_B + 2))
            assert r == pytest.approx(math.copysign(1, slope), abs=1e-9)
            assert abs(r) <= 1

    @pytest.mark.parametrize(
        ("x", "y"),
        [
            ([], []),
            ([1.0], [2.0]),
            ([0.1] * 7, [0.0, 1, 2, 3, 4, 5, 6]),  # in float64 both constants leave a variance of 1e-17 or so
            ([0.0, 1, 2, 3, 4, 5, 6], [1 / 3] * 7),
            ([0.0, 0.0], [1.0, 2.0]),
            ([NAN, 1.0], [1.0, 2.0]),
            ([math.inf, 1.0], [1.0, 2.0]),
        ],
    )
    def test_nothing_to_correlate_is_nan(self, x: list[float], y: list[float]) -> None:
        assert math.isnan(maths.correlation(maths.paired_moments(*torch.tensor([x, y], dtype=torch.float64))))

    def test_numbers_without_a_partner_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"x has shape \(3,\) and y \(1,\)"):
            maths.paired_moments(torch.zeros(3), torch.zeros(1))


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
