"""The sampler against `transformers.generate`, plain forward passes, the softmax by hand, and PEFT unmerged."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from scipy.stats import chisquare
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, TopKLogitsWarper, TopPLogitsWarper

from align.decode import Drawn, _inverse, _pick, draw, stop_ids
from align.lora import folded
from align.stepper import Stepper

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21], [33], [40, 41, 42, 43, 44, 45, 46]]
SIZE = 14

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2}

# Every window here is shorter than the longest prompt.
MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "mistral": {**GROUPED, "head_dim": 8, "sliding_window": 5},
    "gemma2": {
        **GROUPED,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "layer_types": None},
    "gpt_neox": SHAPE,
    "gpt2": {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": None},
    "opt": {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "granite": {**GROUPED, "logits_scaling": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7},
    "cohere": {**GROUPED, "logit_scale": 0.3},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    # recurrent layers instead of attention, or beside it
    "qwen3_5_text": {
        **GROUPED,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "falcon_h1": {
        **GROUPED,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "lm_head_multiplier": 0.2,
    },
}


def build(name: str, **changes: Any) -> Any:
    """A random model with weights so large that its answers vary from token to token."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{**MODELS.get(name, SHAPE), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


def cut(ids: list[int], stops: list[int]) -> list[int]:
    """Up to and with the first stop token."""
    ends = [t for t, token in enumerate(ids) if token in stops]
    return ids[: ends[0] + 1] if ends else ids


def padded_left(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    size = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (size - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (size - len(p)) + [1] * len(p) for p in prompts]),
    }


@torch.no_grad()
def logprobs_of(model: Any, prompt: list[int], answer: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The textbook way: one row, one plain forward pass, the model's own logits."""
    logits_SV = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].float()
    logprobs_TV = torch.log_softmax(logits_SV / temperature, -1)[len(prompt) - 1 : -1]
    return logprobs_TV[torch.arange(len(answer)), torch.tensor(answer)]


def ids_of(answers: list[Drawn]) -> list[list[int]]:
    return [answer.ids for answer in answers]


# Greedy, against the library


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_equal_the_librarys(name: str) -> None:
    model = build(name)
    batch, end = padded_left(PROMPTS), len(PROMPTS[0])
    wanted = model.generate(**batch, do_sample=False, max_new_tokens=SIZE)[:, end:].tolist()
    found = draw(model, PROMPTS, max_new_tokens=SIZE, stop_ids=[], temperature=0)
    assert ids_of(found) == wanted
    assert not any(answer.finished for answer in found)

    stops = [wanted[0][3], wanted[1][7]]
    stopped = model.generate(**batch, do_sample=False, max_new_tokens=SIZE, eos_token_id=stops)
    found = draw(model, PROMPTS, max_new_tokens=SIZE, stop_ids=stops, temperature=0)
    assert ids_of(found) == [cut(row[end:].tolist(), stops) for row in stopped]
    assert len({len(answer.ids) for answer in found}) > 1  # some left while others went on
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert answer.finished == (answer.ids[-1] in stops)
        logprobs = logprobs_of(model, prompt, answer.ids)  # greedy tells those at temperature 1
        # (those of recurrent layers round otherwise in one pass than step by step)
        torch.testing.assert_close(torch.tensor(answer.logprobs), logprobs, atol=1e-4, rtol=0)


def test_an_active_adapter_takes_part(llama: Any) -> None:
    model = adapted(build("llama"))
    batch = padded_left(PROMPTS)
    wanted = model.generate(**batch, do_sample=False, max_new_tokens=SIZE)[:, len(PROMPTS[0]) :].tolist()
    assert ids_of(draw(model, PROMPTS, max_new_tokens=SIZE, stop_ids=[], temperature=0)) == wanted
    plain = ids_of(draw(llama, PROMPTS, max_new_tokens=SIZE, stop_ids=[], temperature=0))
    assert plain != wanted
    with model.disable_adapter():
        assert ids_of(draw(model, PROMPTS, max_new_tokens=SIZE, stop_ids=[], temperature=0)) == plain


# What is refused


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("mamba", {"state_size": 8}, "off"),  # its cache has another name: it would see the last token only
        ("bert", {"is_decoder": False}, "off"),  # looks ahead
        ("hyperclovax", {"num_key_value_heads": 2, "logits_scaling": 0.3}, "off"),  # a scale we take for another
        ("openai-gpt", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}, "size"),  # no cache at all
    ],
)
def test_a_model_drawn_wrongly_is_refused(name: str, changes: dict[str, Any], why: str) -> None:
    if name == "openai-gpt":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**changes)).eval()
    else:
        model = build(name, **changes)
    sentence = rf"answers cannot be drawn from {type(model).__name__}.*{why}.*take another architecture, such as Llama"
    for _ in range(2):  # a refused model stays refused
        with pytest.raises(ValueError, match=sentence):
            draw(model, PROMPTS, max_new_tokens=2, stop_ids=[])


def test_a_model_is_checked_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(llama, PROMPTS, max_new_tokens=1, stop_ids=[])
    assert batches_seen(llama, monkeypatch, max_new_tokens=1, stop_ids=[]) == [4]


def test_empty_prompts_and_broken_weights_are_refused(llama: Any) -> None:
    assert draw(llama, [], max_new_tokens=3, stop_ids=[]) == []
    with pytest.raises(ValueError, match=r"prompt 1 has no token.*start token"):
        draw(llama, [[5], []], max_new_tokens=3, stop_ids=[])
    model = build("llama")
    draw(model, PROMPTS, max_new_tokens=1, stop_ids=[])
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"not numbers at token 0 of the answer to prompt 0.*learning rate"):
            draw(model, PROMPTS, max_new_tokens=2, stop_ids=[], temperature=temperature)


# Log-probabilities


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 5}, {"temperature": 1.3, "top_k": 9, "top_p": 0.7}],
    ids=str,
)
def test_logprobs_are_those_of_a_plain_forward(name: str, how: dict[str, Any]) -> None:
    model = build(name)
    torch.manual_seed(1)
    answers = draw(model, PROMPTS, max_new_tokens=SIZE, stop_ids=range(30), **how)
    assert len({len(answer.ids) for answer in answers}) > 1
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        wanted = logprobs_of(model, prompt, answer.ids, how.get("temperature", 1.0))
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, atol=1e-5, rtol=0)


# The distribution

HALVES = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()


def shares(logits_1V: torch.Tensor, count: int = 8800, **how: Any) -> np.ndarray:
    """Share of the unit interval that each token answers to: uniform numbers in equal steps make it exact."""
    uniform_B = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **how}
    logprobs_1V = (logits_1V / (options["temperature"] or 1)).log_softmax(-1)
    token_B, _ = _pick(logprobs_1V.expand(count, -1), uniform_B, **options)
    return np.bincount(token_B.numpy(), minlength=logits_1V.shape[1]) / count


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({}, [1 / 8, 1 / 2, 1 / 4, 1 / 8]),
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 4 / 22, 1 / 22]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_k": 9}, [1 / 8, 1 / 2, 1 / 4, 1 / 8]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_p": 0.999}, [1 / 8, 1 / 2, 1 / 4, 1 / 8]),
        # Of the likeliest three the first has 4/7 > 0.55: it is the nucleus alone, though 1/2 < 0.55 of all.
        ({"top_k": 3, "top_p": 0.55}, [0, 1, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.75}, [0, 0.8, 0.2, 0]),
    ],
    ids=str,
)
def test_shares_by_hand(how: dict[str, Any], wanted: list[float]) -> None:
    np.testing.assert_allclose(shares(HALVES, **how), wanted, atol=2e-4)


@pytest.mark.parametrize("top_k", [0, 1, 4, 30, 60])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_top_k_and_top_p_equal_the_librarys(top_k: int, top_p: float) -> None:
    torch.manual_seed(2)
    logits_1V = torch.randn(1, 60) * 2
    warped_1V = logits_1V / 0.8
    warped_1V = TopKLogitsWarper(top_k)(None, warped_1V) if top_k else warped_1V
    warped_1V = TopPLogitsWarper(top_p)(None, warped_1V)
    wanted = torch.softmax(warped_1V, -1)[0].numpy()
    found = shares(logits_1V, temperature=0.8, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(found, wanted, atol=2 / 8800)
    assert not found[wanted == 0].any()


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6}], ids=str)
def test_draws_follow_the_models_softmax(how: dict[str, Any]) -> None:
    model, prompt, count = build("llama", vocab_size=24, num_hidden_layers=1), [5], 8000
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / how.get("temperature", 1.0)
    wanted = np.sort(torch.softmax(logits_V, -1).numpy())[::-1].copy()
    order = torch.argsort(logits_V, descending=True).numpy()
    kept = how.get("top_k") or int(np.searchsorted(np.cumsum(wanted), how.get("top_p", 1.1))) + 1
    wanted = wanted[:kept] / wanted[:kept].sum()
    torch.manual_seed(3)
    answers = draw(model, [prompt] * count, max_new_tokens=1, stop_ids=[], **how)
    counts = np.bincount([a.ids[0] for a in answers], minlength=24)[order]
    assert not counts[kept:].any()
    counts = counts[:kept]
    # Total variation of n draws from k cells is below sqrt(k / 4n) in the mean; half as much again is far in the tail.
    assert np.abs(counts / count - wanted).sum() / 2 < 1.5 * math.sqrt(24 / 4 / count)
    likely = wanted * count >= 5
    seen, hoped = [*counts[likely], counts[~likely].sum()], [*wanted[likely], wanted[~likely].sum()]
    seen, hoped = (seen, hoped) if hoped[-1] else (seen[:-1], hoped[:-1])
    assert chisquare(seen, np.array(hoped) * count).pvalue > 0.001
    # and the test can tell: shares a little off are refuted
    off = np.array(hoped) ** 1.3
    assert chisquare(seen, off / off.sum() * count).pvalue < 1e-6


BELOW_ONE = 1 - 2**-53  # the largest number torch's generator gives


def inverse(probs: list[float], uniform: float) -> int:
    return int(_inverse(torch.tensor([probs]), torch.tensor([uniform], dtype=torch.float64))[0])


def test_the_inverse_at_its_edges() -> None:
    halves = [0.0, 0.5, 0.0, 0.25, 0.25, 0.0, 0.0]
    assert inverse(halves, 0.0) == 1
    assert inverse(halves, 0.5 - 2**-53) == 1
    assert inverse(halves, 0.5) == 3  # each token's stretch is closed below and open above
    assert inverse(halves, 0.75) == 4
    assert inverse(halves, BELOW_ONE) == 4
    assert inverse([1.0], 0.0) == inverse([1.0], BELOW_ONE) == 0
    # What is left by top-k and top-p is not normalised: `uniform` counts from the total.
    assert [inverse([0.0, 0.3, 0.1], u) for u in (0.0, 0.74, 0.76, BELOW_ONE)] == [1, 1, 2, 2]


def test_a_token_of_probability_0_is_never_drawn() -> None:
    torch.manual_seed(4)
    probs_BV = torch.rand(400, 5000).exp().log2() * (torch.rand(400, 5000) < 0.01)
    probs_BV[:, 77] += 1e-30  # and at least one that is not 0, however small
    edges = torch.tensor([0.0, 2**-53, 0.5, BELOW_ONE], dtype=torch.float64).repeat(50)
    uniform_B = torch.cat([edges, torch.rand(200, dtype=torch.float64)])
    token_B = _inverse(probs_BV, uniform_B)
    assert (probs_BV.gather(1, token_B[:, None]) > 0).all()
    alone_BV = torch.zeros(4, 9)
    alone_BV[:, 4] = 1e-38
    assert _inverse(alone_BV, edges[:4]).tolist() == [4] * 4


def test_a_forbidden_token_is_never_drawn_through_logits() -> None:
    logits_1V = HALVES.clone()
    logits_1V[0, 1] = -math.inf
    for how in ({}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}):
        assert shares(logits_1V, **how)[1] == 0


# Rows that leave


def batches_seen(model: Any, monkeypatch: pytest.MonkeyPatch, **how: Any) -> list[int]:
    """Rows in each forward pass of a drawing, the model's own or a stepper's."""
    seen: list[int] = []
    original = Stepper.step

    def step(stepper: Any, token_B: Tensor, position_B: Tensor) -> Tensor:
        seen.append(len(token_B))
        return original(stepper, token_B, position_B)

    monkeypatch.setattr(Stepper, "step", step)

    def note(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        seen.append(len(options["input_ids"]))

    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        draw(model, PROMPTS, **how)
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", {}),
        ("llama", {"temperature": 1.4, "top_p": 0.9, "top_k": 20}),
        ("mistral", {}),
        ("gemma3_text", {}),
        ("falcon_h1", {"temperature": 0.8}),
    ],
    ids=str,
)
def test_an_answer_does_not_depend_on_when_the_others_end(name: str, how: dict[str, Any]) -> None:
    model = build(name)
    torch.manual_seed(5)
    uniform_BT = torch.rand((len(PROMPTS), SIZE), dtype=torch.float64)
    options = {"max_new_tokens": SIZE, "uniform_BT": uniform_BT, **how}
    whole = draw(model, PROMPTS, stop_ids=[], **options)
    assert all(len(answer.ids) == SIZE for answer in whole)  # nobody could stop, so nobody left
    # Every choice of stop tokens leaves of each answer what it was, cut; first those with which row 3 is left alone.
    first = [answer.ids[0] for answer in whole[:3]]
    for stops in (first, [whole[0].ids[0]], [whole[3].ids[5]], list(range(0, 97, 5)), list(range(1, 97, 9))):
        for answer, full in zip(draw(model, PROMPTS, stop_ids=stops, **options), whole, strict=True):
            assert answer.ids == cut(full.ids, stops)
            assert answer.finished == (answer.ids[-1] in stops)
            torch.testing.assert_close(answer.logprobs, full.logprobs[: len(answer.ids)], atol=2e-5, rtol=0)
    # Without companions, and in another order, it is the same too.
    for row, prompt in enumerate(PROMPTS):
        (answer,) = draw(model, [prompt], stop_ids=[], **{**options, "uniform_BT": uniform_BT[row : row + 1]})
        assert answer.ids == whole[row].ids
    turned = draw(model, PROMPTS[::-1], stop_ids=[], **{**options, "uniform_BT": uniform_BT.flip(0)})
    assert ids_of(turned) == ids_of(whole)[::-1]


def test_torchs_generator_gives_one_stream_a_row_all_at_the_start(llama: Any) -> None:
    torch.manual_seed(6)
    uniform_BT = torch.rand((len(PROMPTS), SIZE), dtype=torch.float64)
    after = torch.rand(1)
    given = draw(llama, PROMPTS, max_new_tokens=SIZE, stop_ids=[], uniform_BT=uniform_BT)
    for stops in ([], [given[0].ids[0]], list(range(97))):
        torch.manual_seed(6)
        answers = draw(llama, PROMPTS, max_new_tokens=SIZE, stop_ids=stops)
        assert ids_of(answers) == [cut(answer.ids, stops) for answer in given]
        assert torch.equal(torch.rand(1), after)  # what comes next does not depend on the answers' lengths either


def test_finished_rows_are_not_computed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    uniform_BT = torch.rand((len(PROMPTS), SIZE), dtype=torch.float64)
    stops = list(range(0, 97, 6))
    options = {"max_new_tokens": SIZE, "stop_ids": stops, "uniform_BT": uniform_BT}
    sizes = [len(answer.ids) for answer in draw(llama, PROMPTS, **options)]
    assert len(set(sizes)) > 2
    assert batches_seen(llama, monkeypatch, **options) == [sum(size > t for size in sizes) for t in range(max(sizes))]


# Adapters folded


def adapted(model: Any, scale: float = 0.1, **changes: Any) -> Any:
    """`model` with a random LoRA adapter that matters."""
    torch.manual_seed(8)
    config = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(model, LoraConfig(**config)).eval()
    randomise(model, "default", scale)
    return model


def randomise(model: Any, adapter: str, scale: float = 0.1) -> None:
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name and ("lora_A" in name or "lora_B" in name):
            torch.nn.init.normal_(parameter, std=scale)


def lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    batch = padded_left(PROMPTS)
    return model(**batch).logits[batch["attention_mask"].bool()]


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()}


def assert_restored(model: Any, before: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert not any(layer.merged for layer in lora_layers(model))
    assert torch.equal(logits_of(model), logits)


def two_adapters(model: Any) -> Any:
    """The active one and an inactive one, as PPO's critic has."""
    model = adapted(model)
    model.add_adapter("value", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model, "value", 0.2)
    return model


def both_active(model: Any) -> Any:
    model = two_adapters(model)
    model.base_model.set_adapter(["default", "value"])
    return model


FOLDED: dict[str, Callable[[], Any]] = {
    "lora": lambda: adapted(build("llama")),
    "rank-stabilised": lambda: adapted(build("llama"), use_rslora=True, r=9, lora_alpha=6),
    "dora": lambda: adapted(build("llama"), use_dora=True),
    "dropout": lambda: adapted(build("llama"), lora_dropout=0.3),
    "some layers": lambda: adapted(build("llama"), target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    "ranks by pattern": lambda: adapted(build("llama"), rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 9}),
    "head untied": lambda: adapted(build("llama"), target_modules=["q_proj", "lm_head"]),
    "embeddings too": lambda: adapted(build("llama"), target_modules=["q_proj", "embed_tokens"]),
    "saved module": lambda: adapted(build("llama"), modules_to_save=["norm"]),
    "transposed": lambda: adapted(build("gpt2"), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "one inactive": lambda: two_adapters(build("llama")),
    "both active": lambda: both_active(build("llama")),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded_equals_unmerged_and_leaves_no_trace(name: str) -> None:
    model = FOLDED[name]()
    before, logits = snapshot(model), logits_of(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with model.disable_adapter():
        assert (logits_of(model) - logits).abs().max() > 0.1
    with folded(model) as done:
        assert done
        assert all(layer.merged for layer in lora_layers(model) if set(layer.active_adapters) & set(layer.lora_A))
        torch.testing.assert_close(logits_of(model), logits, atol=1e-5, rtol=1e-5)
        inside = draw(model, PROMPTS, max_new_tokens=SIZE, stop_ids=[7], temperature=0)
    assert_restored(model, before, logits)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert ids_of(inside) == ids_of(draw(model, PROMPTS, max_new_tokens=SIZE, stop_ids=[7], temperature=0))
    with pytest.raises(KeyError, match="stop"), folded(model):
        raise KeyError("stop")
    assert_restored(model, before, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored_where_peft_alone_would_round(dtype: torch.dtype) -> None:
    model = adapted(build("llama").to(dtype))
    before, logits = snapshot(model), logits_of(model)
    for _ in range(3):
        with folded(model) as done:
            assert done
    assert_restored(model, before, logits)
    model.merge_adapter()
    model.unmerge_adapter()
    after = snapshot(model)
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_the_adapter_can_be_trained_and_folded_again() -> None:
    model = adapted(build("llama"))
    base = {name: value for name, value in snapshot(model).items() if "lora_" not in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([PROMPTS[0]])
    losses = []
    for _ in range(3):
        with folded(model):
            draw(model, PROMPTS, max_new_tokens=2, stop_ids=[])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    after = snapshot(model)
    assert all(torch.equal(after[name], value) for name, value in base.items())
    logits = logits_of(model)
    with folded(model):
        torch.testing.assert_close(logits_of(model), logits, atol=1e-5, rtol=1e-5)


def test_a_fold_that_fails_halfway_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(build("llama"))
    before, logits = snapshot(model), logits_of(model)

    def fail() -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(lora_layers(model)[5], "merge", fail)
        with pytest.raises(MemoryError), folded(model):
            raise AssertionError("the body is not reached")
    assert_restored(model, before, logits)


def test_adapters_may_be_switched_off_inside() -> None:
    """PEFT then unmerges by subtraction; the originals come back all the same."""
    model = adapted(build("llama"))
    before, logits = snapshot(model), logits_of(model)
    with model.disable_adapter():
        plain = logits_of(model)
    with folded(model):
        with model.disable_adapter():
            torch.testing.assert_close(logits_of(model), plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits_of(model), logits, atol=1e-5, rtol=1e-5)
    assert_restored(model, before, logits)


class RoundsItsWeight(torch.nn.Linear):
    """As layers that are quantised in the forward pass do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, (self.weight * 4).round() / 4)


def with_another_layer_type() -> Any:
    model = adapted(build("llama"))
    lora_layers(model)[4].__class__ = type("Linear8bitLt", (LoraLinear,), {})
    return model


def with_rounded_weights() -> Any:
    model = build("llama")
    model.model.layers[1].self_attn.q_proj.__class__ = RoundsItsWeight
    return adapted(model)


def with_a_tied_head() -> Any:
    """Folding the head's adapter into the matrix it shares would change the input embeddings too."""
    model = build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return adapted(model, target_modules=["q_proj", "lm_head"])


UNFOLDED: dict[str, Callable[[], Any]] = {
    "no adapter": lambda: build("llama"),
    "another layer type": with_another_layer_type,
    "rounded in the forward pass": with_rounded_weights,
    "tied head": with_a_tied_head,
    "bias of its own": lambda: adapted(build("llama"), lora_bias=True),
    "only after certain tokens": lambda: adapted(build("llama"), alora_invocation_tokens=[5, 6]),
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_what_cannot_be_folded_is_left_alone(name: str) -> None:
    model = UNFOLDED[name]()
    before, logits = snapshot(model), logits_of(model)
    with folded(model) as done:
        assert done is False
        assert_restored(model, before, logits)
    assert_restored(model, before, logits)


def test_integer_weights_are_left_alone() -> None:
    model = adapted(build("llama"))
    weight = lora_layers(model)[0].get_base_layer().weight
    weight.requires_grad_(False)
    weight.data = weight.data.mul(10).to(torch.int8)
    before = snapshot(model)
    with folded(model) as done:
        assert done is False
        assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())


def test_nothing_is_folded_with_adapters_off_or_folded_already() -> None:
    model = adapted(build("llama"))
    before, logits = snapshot(model), logits_of(model)
    with model.disable_adapter():
        plain = logits_of(model)
        with folded(model) as done:
            assert done is False
            assert torch.equal(logits_of(model), plain)
    with folded(model), folded(model) as again:
        assert again is False
        torch.testing.assert_close(logits_of(model), logits, atol=1e-5, rtol=1e-5)
    assert_restored(model, before, logits)


def live_bytes() -> int:
    """Of all tensors that anything still holds, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_no_copy_outlives_the_folding() -> None:
    model = adapted(build("llama"))
    layers = lora_layers(model)
    originals = sum(layer.get_base_layer().weight.nbytes for layer in layers)
    gc.disable()  # so that nothing of other tests is freed between two counts
    try:
        before = live_bytes()
        with folded(model):
            assert live_bytes() == before + originals  # each adapted weight twice, and nothing else
        assert live_bytes() == before
        with pytest.raises(KeyError) as caught, folded(model):
            raise KeyError
        assert live_bytes() == before  # though the traceback still holds the frames
        assert caught.value is not None
    finally:
        gc.enable()


# Stop tokens


class Tokenizer:
    def __init__(self, eos_token_id: int | None) -> None:
        self.eos_token_id = eos_token_id

    def __len__(self) -> int:
        return 97


@pytest.mark.parametrize(
    ("tokenizers", "models", "wanted"),
    [
        (2, None, [2]),
        (2, 2, [2]),
        (2, 7, [2, 7]),
        (7, [2, 96, 7], [2, 7, 96]),
        (2, [97, 151_645, -1], [2]),  # beyond the vocabulary: left from the model this one was made of
        (None, [7, 5], [5, 7]),
        (None, None, []),
        (0, [], [0]),
    ],
)
def test_stop_ids_are_the_tokenizers_and_the_generation_configs(tokenizers: Any, models: Any, wanted: Any) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=models))
    assert stop_ids(model, Tokenizer(tokenizers)) == wanted


def test_stop_ids_without_a_generation_config_and_through_an_adapter() -> None:
    assert stop_ids(SimpleNamespace(), Tokenizer(3)) == [3]
    assert stop_ids(SimpleNamespace(generation_config=None), Tokenizer(3)) == [3]
    model = build("llama")
    model.generation_config.eos_token_id = [11, 12]
    assert stop_ids(adapted(model), Tokenizer(3)) == [3, 11, 12]


# -- several answers to a prompt --------------------------------------------------------------------------------------


def test_a_prompt_with_several_answers_is_read_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from align import decode

    sizes: list[tuple[int, ...]] = []
    original = decode._next_hidden

    def noting(model: Any, cache: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(tuple(ids.shape))
        return original(model, cache, ids, *rest)

    repeated = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    uniform = torch.rand((5, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw(llama, PROMPTS[:1], max_new_tokens=1, stop_ids=[])  # what is unknown is tried first, on tokens of its own
    monkeypatch.setattr(decode, "_next_hidden", noting)
    together = draw(llama, repeated, max_new_tokens=SIZE, stop_ids=range(30), uniform_BT=uniform)
    assert sizes[0][0] == 3
    for row, (prompt, answer) in enumerate(zip(repeated, together, strict=True)):
        alone = draw(llama, [prompt], max_new_tokens=SIZE, stop_ids=range(30), uniform_BT=uniform[row : row + 1])[0]
        assert answer.ids == alone.ids and answer.finished == alone.finished
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert len({tuple(together[row].ids) for row in (0, 2, 4)}) > 1


def test_what_is_observed_is_of_the_state_before_each_token(llama: Any) -> None:
    def observe(hidden: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        return torch.stack([hidden.sum(1), logprobs.amax(1)], dim=1)

    answers = draw(llama, PROMPTS, max_new_tokens=SIZE, stop_ids=range(30), temperature=0, observe=observe)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.observed) == len(answer.ids)
        ids = torch.tensor([[*prompt, *answer.ids]])
        states = llama.get_decoder()(ids).last_hidden_state[0, len(prompt) - 1 : -1]
        wanted = observe(states, llama(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1))
        torch.testing.assert_close(torch.tensor(answer.observed), wanted.detach(), atol=1e-3, rtol=1e-3)
