"""Lean LoRA layers and products of few rows give PEFT's and torch's numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from align import lora
from align.lora import FEW_ROWS, folded, for_few_rows, lean_lora

X = torch.linspace(-2, 2, 4 * 5 * 6).reshape(4, 5, 6)


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=bias), nn.Linear(8, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(bias: bool = True, **settings: Any) -> tuple[Any, Any]:
    """(as PEFT computes it, lean), with the same weights and an adapter far from zero."""
    torch.manual_seed(0)
    plain = get_peft_model(Net(bias), LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"], **settings))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    lean = copy.deepcopy(plain)
    lean_lora(lean)
    return plain, lean


def results(model: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_(True)
    output = model(x)
    (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), grads | {"input": x.grad}


@pytest.fixture
def lean_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original = lora._lean_adapter

    def noting(layer: Any, x: Tensor) -> str | None:
        adapter = original(layer, x)
        if adapter is not None:
            calls.append(adapter)
        return adapter

    monkeypatch.setattr(lora, "_lean_adapter", noting)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 5, 6), (20, 6), (6,)])
def test_outputs_and_gradients_are_pefts(bias: bool, shape: tuple[int, ...], lean_calls: list[str]) -> None:
    plain, lean = pair(bias)
    x = X.flatten()[: torch.Size(shape).numel()].view(shape)
    (wanted, wanted_grads), (found, found_grads) = results(plain, x), results(lean, x)
    assert lean_calls == ["default"] * 2
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert found_grads.keys() == wanted_grads.keys() and len(found_grads) == 5
    for name, gradient in wanted_grads.items():
        torch.testing.assert_close(found_grads[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, bias = drawn(4, 5), drawn(4)
    inputs = [drawn(3, 5).requires_grad_(), drawn(2, 5).requires_grad_(), drawn(4, 2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, a, b: lora._Adapted.apply(x, weight, bias, a, b, 1.5), inputs)


def test_only_what_is_asked_for_has_a_gradient() -> None:
    """The first layer's input is data: its gradient would be a product for nothing."""
    _, lean = pair()
    lean(X).sum().backward()
    frozen = [p for n, p in lean.named_parameters() if "lora" not in n]
    assert all(p.grad is None for p in frozen)


def test_calls_that_are_not_plain_are_pefts_own(lean_calls: list[str]) -> None:
    plain, lean = pair()
    with plain.disable_adapter(), lean.disable_adapter():
        torch.testing.assert_close(lean(X), plain(X))
    with folded(plain), folded(lean):
        torch.testing.assert_close(lean(X), plain(X))
    for model in (plain, lean):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
        model.base_model.set_adapter(["default", "other"])
        model.train()
    assert not lean_calls
    torch.testing.assert_close(lean(X), plain(X))
    assert lean_calls == ["default"]  # of the second layer, which the other adapter does not have
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lean(X).dtype == torch.bfloat16
    assert lean_calls == ["default"]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_other_kinds_of_layers_are_left_alone(settings: dict[str, Any], lean_calls: list[str]) -> None:
    plain, lean = pair(**settings)
    outputs = []
    for model in (plain.train(), lean.train()):
        torch.manual_seed(1)
        outputs.append(model(X))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not lean_calls
    lean.eval()(X)
    assert bool(lean_calls) == ("lora_dropout" in settings)  # dropout counts only while training


def test_a_trained_base_keeps_its_gradient(lean_calls: list[str]) -> None:
    plain, lean = pair()
    for model in (plain, lean):
        model.get_base_model().first.base_layer.weight.requires_grad_(True)
    (_, wanted), (_, found) = results(plain, X), results(lean, X)
    assert lean_calls == ["default"] and wanted.keys() == found.keys() and len(found) == 6


def test_bfloat16_weights_with_a_float32_adapter(lean_calls: list[str]) -> None:
    plain, lean = pair()
    for model in (plain, lean):
        for layer in (model.get_base_model().first, model.get_base_model().second):
            layer.base_layer.bfloat16()
    torch.testing.assert_close(lean(X.bfloat16()), plain(X.bfloat16()))
    assert not lean_calls


# -- few rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    net, x = Net(bias), torch.randn(rows, 1, 6)
    wanted = net(x)
    with for_few_rows(net):
        found = net(x)
        assert found.is_contiguous() and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert "forward" not in vars(net.first)


def test_few_rows_are_over_when_something_breaks() -> None:
    net = Net()
    with pytest.raises(KeyError), for_few_rows(net):
        raise KeyError
    assert "forward" not in vars(net.first)
