"""Norms and gated activations as one function give the models' numbers and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from align.lean import _Gated, _RMSNorm, lean_layers

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}


def build(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**SHAPE, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0))


def losses(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ids_BS = torch.arange(60).view(4, 15) % 97
    logits = model(input_ids=ids_BS).logits
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).mean()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def changed(model: Any) -> int:
    return sum("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_every_gradient(name: str, checkpointing: bool) -> None:
    plain = build(name)
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    lean = copy.deepcopy(plain)
    lean_layers(lean)
    norms = 2 * (4 if name == "qwen3" else 2) + 1
    assert changed(lean) == norms + 2
    lean_layers(lean)  # again, to no effect
    assert changed(lean) == norms + 2
    if checkpointing:
        lean.enable_input_require_grads()
        lean.gradient_checkpointing_enable()
        lean.train()
    (loss, grads), (wanted, wanted_grads) = losses(lean), losses(plain)
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    assert grads.keys() == wanted_grads.keys() and grads
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted_grads[key], atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3]])
        torch.testing.assert_close(lean(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _RMSNorm.apply(x, weight, 1e-3), (x,))
    gate = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Gated.apply, (gate, up))


def test_what_looks_alike_is_left_alone() -> None:
    class Louder(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * super().forward(x)

    class Halved(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) / 2

    llama = CONFIG_MAPPING["llama"](**SHAPE)
    gemma = CONFIG_MAPPING["gemma3_text"](**SHAPE)
    modules = nn.ModuleList([Louder(llama), Halved(32), Gemma3RMSNorm(32), Gemma3MLP(gemma), nn.RMSNorm(32)])
    half = LlamaRMSNorm(32).bfloat16()
    lean_layers(modules)
    lean_layers(half)
    assert not changed(modules) and not changed(half)


def test_a_trained_norm_and_half_precision_keep_their_own_forward() -> None:
    norm = LlamaRMSNorm(8)
    lean_layers(norm)
    x = torch.randn(3, 8)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    norm.weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(x.bfloat16()), LlamaRMSNorm.forward(norm, x.bfloat16()))


def test_inputs_are_not_changed() -> None:
    torch.manual_seed(0)
    norm, mlp = LlamaRMSNorm(32).requires_grad_(False), LlamaMLP(CONFIG_MAPPING["llama"](**SHAPE))
    lean_layers(norm)
    lean_layers(mlp)
    x = torch.randn(3, 32, requires_grad=True)
    before = x.detach().clone()
    for module in (norm, mlp):
        output = module(x)
        kept = output.detach().clone()
        output.square().sum().backward()
        assert torch.equal(x.detach(), before) and torch.equal(output.detach(), kept)
