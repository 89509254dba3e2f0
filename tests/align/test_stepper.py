"""The stepper against the models' own token-by-token forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM

from align import decode
from align.decode import draw
from align.lora import folded
from align.stepper import Stepper, supported

PROMPTS = [list(range(5, 17)), [20, 21], [33], [20, 21], list(range(40, 47)), [20, 21]]
SIZE = 14
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama ": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"head_dim": 8, "sliding_window": None},
}  # fmt: skip


def build(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name.strip()](**{**SHAPE, **MODELS.get(name, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that leaving one out is seen
            parameter.normal_(std=0.25).add_(1.0 if parameter.ndim == 1 and parameter.mean() == 1 else 0.0)
    return model


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step of a stepper."""
    seen: list[int] = []
    original = Stepper.step

    def step(self: Any, token_B: Tensor, position_B: Tensor) -> Tensor:
        seen.append(len(token_B))
        return original(self, token_B, position_B)

    monkeypatch.setattr(Stepper, "step", step)
    return seen


def both(model: Any, monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[list[Any], list[Any]]:
    """Answers drawn (with a stepper, with the model's own cache)."""
    torch.manual_seed(1)
    options = {"max_new_tokens": SIZE, "stop_ids": [], **how}
    options["uniform_BT"] = torch.rand((len(PROMPTS), options["max_new_tokens"]), dtype=torch.float64)
    ours = draw(model, PROMPTS, **options)
    with monkeypatch.context() as patch:
        patch.setattr(decode, "supported", lambda _: False)
        return ours, draw(model, PROMPTS, **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_and_their_logprobs_are_the_models_own(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch, stepped: list[int]
) -> None:
    model = build(name)
    ours, own = both(model, monkeypatch, temperature=temperature)
    assert len(stepped) >= SIZE - 1
    assert [a.ids for a in ours] == [a.ids for a in own]
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=2e-5, rtol=1e-5)


def test_rows_leave_at_any_time(monkeypatch: pytest.MonkeyPatch, stepped: list[int]) -> None:
    model = build("llama")
    for every in (3, 7, 50):
        ours, own = both(model, monkeypatch, stop_ids=list(range(0, 300, every)))
        assert [a.ids for a in ours] == [a.ids for a in own]
    assert len(set(stepped)) > 2


def test_what_all_prompts_begin_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    begun = [[7, 8, 9, 10, 11, *prompt] for prompt in PROMPTS]
    read: list[tuple[int, ...]] = []
    original = decode._next_hidden

    def noting(model: Any, cache: Any, ids_BS: Tensor, *rest: Any) -> Tensor:
        read.append(tuple(ids_BS.shape))
        return original(model, cache, ids_BS, *rest)

    alone = [draw(model, [prompt], max_new_tokens=SIZE, stop_ids=[], temperature=0)[0] for prompt in begun]
    monkeypatch.setattr(decode, "_next_hidden", noting)
    together = draw(model, begun, max_new_tokens=SIZE, stop_ids=[], temperature=0)
    assert read == [(1, 5), (4, 12)]
    assert [a.ids for a in together] == [a.ids for a in alone]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=2e-5, rtol=1e-5)
    for prompts in ([[3, 4, 5, 6, 7]], [[3, 4, 5, 6, 7], [3, 4, 5, 6]], [[3, 4, 5, 6, 7, 8], [3, 4, 5, 6, 7, 9, 1]]):
        assert [len(a.ids) for a in draw(model, prompts, max_new_tokens=2, stop_ids=[])] == [2] * len(prompts)


def test_an_adapter_must_be_folded(monkeypatch: pytest.MonkeyPatch, stepped: list[int]) -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert not supported(model)
    beside = draw(model, PROMPTS, max_new_tokens=SIZE, stop_ids=[], temperature=0)
    assert not stepped
    with folded(model):
        assert supported(model)
        inside = draw(model, PROMPTS, max_new_tokens=SIZE, stop_ids=[], temperature=0)
    assert stepped and [a.ids for a in inside] == [a.ids for a in beside]
    with model.disable_adapter():
        assert supported(model)
        off = draw(model, PROMPTS, max_new_tokens=SIZE, stop_ids=[], temperature=0)
    assert [a.ids for a in off] != [a.ids for a in beside]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 5}),
        (
            "qwen2",
            {
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "sliding_window": 4,
                "use_sliding_window": True,
            },
        ),
        ("llama", {"hidden_act": "gelu"}),
        ("gemma2", {"head_dim": 8}),
        ("granite", {}),
    ],
    ids=str,
)
def test_others_keep_their_own_forward(name: str, changes: dict[str, Any], stepped: list[int]) -> None:
    model = build(name, **changes)
    assert not supported(model)
    assert len(draw(model, PROMPTS, max_new_tokens=3, stop_ids=[])) == len(PROMPTS)
    assert not stepped


def test_a_llama_that_computes_something_else_keeps_its_own_forward(
    monkeypatch: pytest.MonkeyPatch, stepped: list[int]
) -> None:
    model = build("llama")
    layer = model.model.layers[1]
    original = layer.mlp.forward
    monkeypatch.setattr(layer.mlp, "forward", lambda x: 1.01 * original(x))
    assert isinstance(model, LlamaForCausalLM) and supported(model)
    ours, own = both(model, monkeypatch, temperature=0.0)
    assert len(stepped) == 1  # the trial
    assert [a.logprobs for a in ours] == [a.logprobs for a in own]


def test_half_precision_agrees_to_its_rounding(monkeypatch: pytest.MonkeyPatch, stepped: list[int]) -> None:
    model = build("llama").bfloat16()
    ours, own = both(model, monkeypatch, max_new_tokens=2)
    assert stepped
    first, second = ([a.logprobs[0] for a in answers] for answers in (ours, own))
    assert first == second  # the prompts' own forward
    torch.testing.assert_close([a.logprobs[1] for a in ours], [a.logprobs[1] for a in own], atol=0.3, rtol=0.1)
