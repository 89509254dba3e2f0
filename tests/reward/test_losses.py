"""Likelihoods of labels: by hand, by what any likelihood must hold to, and against each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.losses import bradley_terry, davidson, likelihood, preference_loss, rao_kupper

deterministic = settings(derandomize=True, deadline=None)
gaps = st.floats(-12, 12).map(lambda gap: torch.tensor([[gap]], dtype=torch.float64))
shares = st.floats(0.01, 0.9)
MODELS = [davidson, rao_kupper]


@pytest.mark.parametrize("model", MODELS)
@deterministic
@given(gap=gaps, share=shares)
def test_outcomes_are_probabilities_and_swapping_mirrors_them(model: Any, gap: torch.Tensor, share: float) -> None:
    found = model(gap, share)[0, 0]
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-9)
    assert model(-gap, share)[0, 0].flip(0).tolist() == pytest.approx(found.tolist(), abs=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_equal_rewards_tie_as_often_as_said_and_large_gaps_never(model: Any) -> None:
    gaps = torch.tensor([[0.0], [30.0]], dtype=torch.float64)
    tie = model(gaps, 0.25)[:, 0, 1].exp()
    assert tie.tolist() == pytest.approx([0.25, 0.0], abs=1e-5)


def test_davidson_among_decided_pairs_is_bradley_terry() -> None:
    gap = torch.linspace(-5, 5, 11, dtype=torch.float64)[:, None]
    found = davidson(gap, 0.3)
    decided = found[..., 0] - torch.logaddexp(found[..., 0], found[..., 2])
    assert torch.allclose(decided, bradley_terry(gap)[..., 0], atol=1e-12)


def test_by_hand() -> None:
    gap = torch.tensor([[1.0]], dtype=torch.float64)
    # Davidson, tie share 1/2: nu = 2; e^0.5 : 2 : e^-0.5
    parts = [math.exp(0.5), 2.0, math.exp(-0.5)]
    assert davidson(gap, 0.5).exp()[0, 0].tolist() == pytest.approx([part / sum(parts) for part in parts])
    # Rao-Kupper, tie share 1/2: theta = 3; P(first) = 1 / (1 + 3 e^-1)
    first, second = 1 / (1 + 3 * math.exp(-1)), 1 / (1 + 3 * math.exp(1))
    assert rao_kupper(gap, 0.5).exp()[0, 0].tolist() == pytest.approx([first, 1 - first - second, second])


def test_without_ties_every_model_is_bradley_terry() -> None:
    gap = torch.tensor([[0.3], [-2.0]])
    for ties in ("ignore", "davidson", "rao-kupper"):
        assert torch.equal(likelihood(ties, 0.0)(gap), bradley_terry(gap))


def loss(reward: list[list[float]], outcome: list[float], **how: Any) -> float:
    reward_RM = torch.tensor(reward, dtype=torch.float64)
    own = {
        "margin_P": torch.zeros(1, dtype=torch.float64),
        "weight_P": torch.ones(1, dtype=torch.float64),
        "draw_PM": torch.ones(1, reward_RM.shape[1], dtype=torch.float64),
    }
    pairs, outcomes = torch.tensor([[0, 1]]), torch.tensor([outcome], dtype=torch.float64)
    return float(preference_loss(reward_RM, pairs, outcomes, **(own | how)))


def test_a_soft_label_is_least_where_the_model_says_the_same() -> None:
    at = [loss([[math.log(share / (1 - share))], [0.0]], [0.8, 0.0, 0.2]) for share in (0.7, 0.8, 0.9)]
    assert at[1] < min(at[0], at[2])
    assert at[1] == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))


def test_a_margin_shifts_the_gap_and_draws_weigh_the_heads() -> None:
    shifted = loss([[2.0], [0.5]], [1, 0, 0], margin_P=torch.tensor([1.0], dtype=torch.float64))
    assert shifted == pytest.approx(math.log1p(math.exp(-0.5)))
    draws = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    two = loss([[1.0, 3.0], [0.0, 0.0]], [1, 0, 0], draw_PM=draws)
    assert two == pytest.approx((2 * math.log1p(math.exp(-1)) + 0.5 * math.log1p(math.exp(-3))) / 2)


@pytest.mark.parametrize("model", MODELS)
def test_a_tie_pulls_the_rewards_together_whichever_comes_first(model: Any) -> None:
    reward = torch.tensor([[1.5], [0.0]], dtype=torch.float64, requires_grad=True)
    found = preference_loss(
        reward,
        torch.tensor([[0, 1]]),
        torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64),
        margin_P=torch.zeros(1),
        weight_P=torch.ones(1),
        draw_PM=torch.ones(1, 1),
        likelihood=lambda gap: model(gap, 0.2),
    )
    found.backward()
    assert reward.grad is not None and reward.grad[0] > 0 > reward.grad[1]


def test_gradients_are_finite_where_the_model_is_sure() -> None:
    reward = torch.tensor([[80.0], [-80.0]], requires_grad=True)
    for outcome in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]):
        for model in MODELS:
            value = -(torch.tensor(outcome) * model(reward[:1] - reward[1:], 0.2)[0, 0]).sum()
            (gradient,) = torch.autograd.grad(value, reward)
            assert torch.isfinite(value) and torch.isfinite(gradient).all()
