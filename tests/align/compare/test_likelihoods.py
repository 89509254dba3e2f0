"""Exact KL, entropy and log-probabilities against plain softmaxes, torch.distributions, sampling and each other."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from align.compare import likelihoods
from align.compare.likelihoods import ADAPTER_OFF, AnswerFigures, answer_figures, perplexity_figure
from align.decode import draw
from align.logprobs import Pair, answer_logprobs
from reward.statistics import mean_with_interval

PAD = 0


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Any:
    return louder(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def adapted(tiny_model: Path) -> Any:
    """An adapter of random weights on all layers and the head, on a base of its own."""
    torch.manual_seed(1)
    base = louder(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    targets = ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(base, config).eval()


def louder(model: Any) -> Any:
    """Large weights, so that distributions are far from flat."""
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1
    return model


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Ragged rows in random order, some of whose answers hold the padding token itself."""
    rolled = random.Random(0)
    sizes = [(2, 1), (8, 7), (5, 40), (3, 2), (5, 13), (8, 25), (6, 5)]
    rows = [([rolled.randrange(3, 300) for _ in range(p)], [rolled.randrange(300) for _ in range(a)]) for p, a in sizes]
    rows[3][1][-1] = PAD
    return rows


def assert_same(found: list[AnswerFigures], wanted: list[AnswerFigures], tolerance: float = 1e-4) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.tokens == b.tokens
        assert tuple(a) == pytest.approx(tuple(b), abs=tolerance)


@torch.no_grad()
def plain(policy: Any, reference: Any, pair: Pair) -> AnswerFigures:
    """One row at a time in float64: the models' own logits, and torch.distributions for entropy and KL."""
    prompt, answer = pair
    ids, here = torch.tensor([prompt + answer]), slice(len(prompt) - 1, -1)
    pi, ref = (Categorical(logits=model(input_ids=ids).logits[0, here].double()) for model in (policy, reference))
    tokens = torch.tensor(answer)
    sums = [pi.log_prob(tokens).sum(), ref.log_prob(tokens).sum(), kl_divergence(pi, ref).sum(), pi.entropy().mean()]
    return AnswerFigures(*(float(value) for value in sums), len(answer))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_two_models_equal_plain_softmaxes(base: Any, adapted: Any, pairs: list[Pair], batch_size: int) -> None:
    found = answer_figures(adapted, base, pairs, PAD, batch_size=batch_size)
    assert_same(found, [plain(adapted, base, pair) for pair in pairs])
    assert all(figures.kl is not None and figures.kl / figures.tokens > 0.05 for figures in found)
    backwards = answer_figures(base, adapted, pairs, PAD, batch_size=batch_size)
    assert_same(backwards, [plain(base, adapted, pair) for pair in pairs])


@pytest.mark.parametrize("size", [1, 2000])
def test_the_tile_does_not_matter(
    base: Any, adapted: Any, pairs: list[Pair], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pairs[3:]
    wanted = answer_figures(adapted, base, pairs, PAD)
    monkeypatch.setattr(likelihoods, "LOGITS", {"cpu": size})
    assert_same(answer_figures(adapted, base, pairs, PAD), wanted, 1e-5)
    assert_same(answer_figures(adapted, ADAPTER_OFF, pairs, PAD), wanted, 1e-5)


def test_adapter_off_equals_two_models(base: Any, adapted: Any, pairs: list[Pair]) -> None:
    found = answer_figures(adapted, ADAPTER_OFF, pairs, PAD, batch_size=3)
    assert_same(found, answer_figures(adapted, base, pairs, PAD))


@pytest.mark.parametrize(("layers", "passed"), [([2], 2), ([1, 2], 1), ([0, 2], 0), (None, 0)])
def test_layers_below_the_adapter_run_once(pairs: list[Pair], layers: Any, passed: int) -> None:
    """None: a whole copy of the embedding is trained beside the upper layer's adapter, so nothing is the same."""
    torch.manual_seed(2)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=320, pad_token_id=0, bos_token_id=None, tie_word_embeddings=False)
    base = louder(LlamaForCausalLM(config)).eval()
    where = {"layers_to_transform": layers or [2], "modules_to_save": None if layers else ["embed_tokens"]}
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **where)
    policy = get_peft_model(copy.deepcopy(base), lora).eval()
    if not layers:
        policy.get_input_embeddings().weight.data += 0.5
    patched = policy.get_base_model().model.layers[0]
    patched.forward = patched.forward  # as accelerate does it
    runs = [0, 0, 0]
    for place, layer in enumerate(policy.get_base_model().model.layers):
        layer.self_attn.register_forward_hook(lambda *_, place=place: runs.__setitem__(place, runs[place] + 1))
    assert_same(answer_figures(policy, ADAPTER_OFF, pairs, PAD), answer_figures(policy, base, pairs, PAD), 1e-6)
    assert runs == [2] * passed + [3] * (3 - passed)
    assert ["forward" in vars(layer) for layer in policy.get_base_model().model.layers] == [True, False, False]


def test_afterwards_the_adapter_is_as_it_was(adapted: Any, pairs: list[Pair]) -> None:
    adapted.requires_grad_(False)
    before = answer_logprobs(adapted, pairs, PAD)
    answer_figures(adapted, ADAPTER_OFF, pairs, PAD)
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, answer_logprobs(adapted, pairs, PAD), strict=True))


def test_one_model_alone_has_no_kl(base: Any, adapted: Any, pairs: list[Pair]) -> None:
    found, wanted = answer_figures(base, None, pairs, PAD), answer_figures(base, adapted, pairs, PAD)
    assert found == [figures._replace(ref_logprob=None, kl=None) for figures in wanted]
    logprobs = [float(row.sum()) for row in answer_logprobs(base, pairs, PAD)]
    assert [f.logprob for f in found] == pytest.approx(logprobs, abs=1e-4)


def test_a_model_is_no_way_from_itself(base: Any, pairs: list[Pair]) -> None:
    for figures in answer_figures(base, base, pairs, PAD):
        assert figures.kl == 0 and figures.logprob == figures.ref_logprob


def test_entropy_is_between_nothing_and_log_v(tiny_model: Path, pairs: list[Pair]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    flat, sharp = 0.0, 1e4
    for scale, wanted in ((flat, math.log(model.config.vocab_size)), (sharp, 0.0)):
        model.lm_head.weight.data *= scale or 1
        if not scale:
            kept = model.lm_head.weight.data.clone()
            model.lm_head.weight.data.zero_()
        found = answer_figures(model, None, pairs, PAD)
        assert [f.entropy for f in found] == pytest.approx([wanted] * len(pairs), abs=0.02)
        model.lm_head.weight.data.copy_(kept)


def test_the_mean_over_samples_is_that_of_the_log_ratio() -> None:
    """Answers sampled from pi: both means estimate KL(pi || ref), which on two tokens can be worked out by summing over
    every answer; the exact one varies less."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=11, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    policy, reference = (louder(louder(LlamaForCausalLM(config))).eval() for _ in range(2))
    prompt = [5, 6, 7]
    every = [(prompt, [a, b]) for a in range(11) if a != 1 for b in range(11)] + [(prompt, [1])]
    ratios = [(f.logprob, f.logprob - f.ref_logprob) for f in answer_figures(policy, reference, every, PAD)]
    assert sum(math.exp(logprob) for logprob, _ in ratios) == pytest.approx(1, abs=1e-5)
    true = sum(math.exp(logprob) * ratio for logprob, ratio in ratios)
    torch.manual_seed(1)
    drawn = draw(policy, [prompt] * 4000, max_new_tokens=2, stop_ids=[1], temperature=1.0, top_p=1.0, top_k=0)
    found = answer_figures(policy, reference, [(prompt, a.ids) for a in drawn], PAD, batch_size=500)
    exact = mean_with_interval([f.kl for f in found], resamples=1)
    sampled = mean_with_interval([f.logprob - f.ref_logprob for f in found], resamples=1)
    assert true > 0.1
    assert abs(exact.mean - true) < 4 * exact.standard_error
    assert abs(sampled.mean - true) < 4 * sampled.standard_error
    assert exact.standard_error < 0.7 * sampled.standard_error


def test_progress_and_no_pairs(base: Any, pairs: list[Pair]) -> None:
    seen: list[int] = []
    answer_figures(base, base, pairs, PAD, batch_size=3, on_progress=seen.append)
    assert seen == [3, 6, 7]
    assert answer_figures(base, None, [], PAD) == []


def test_what_is_refused(base: Any, adapted: Any, pairs: list[Pair]) -> None:
    with pytest.raises(ValueError, match=r"Pairs \[1\] have no prompt or no answer"):
        answer_figures(base, None, [pairs[0], ([3], [])], PAD)
    with pytest.raises(ValueError, match=r"Pairs \[0\]"):
        answer_figures(base, None, [([], [3])], PAD)
    with pytest.raises(ValueError, match="'adapter off' and the policy a LlamaForCausalLM"):
        answer_figures(base, ADAPTER_OFF, pairs, PAD)
    with pytest.raises(ValueError, match="The reference is 'base'"):
        answer_figures(adapted, "base", pairs, PAD)
    other = LlamaForCausalLM(LlamaConfig(**{**base.config.to_dict(), "vocab_size": 400}))
    with pytest.raises(ValueError, match="same vocabulary"):
        answer_figures(base, other, pairs, PAD)


def test_perplexity_by_hand() -> None:
    """Losses 1 and 3: e^2, with the loss's standard error 1 times that."""
    found = perplexity_figure([1.0, 3.0], seed=0)
    loss = mean_with_interval([1.0, 3.0])
    assert found["mean"] == pytest.approx(math.e**2) and found["standard_error"] == pytest.approx(math.e**2)
    assert (found["low"], found["high"]) == (pytest.approx(math.exp(loss.low)), pytest.approx(math.exp(loss.high)))
    alone = perplexity_figure([0.5], seed=0)
    assert alone["mean"] == pytest.approx(np.exp(0.5))
    assert (alone["low"], alone["high"], alone["standard_error"], alone["n"]) == (None, None, None, 1)
