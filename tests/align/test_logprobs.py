"""Answer log-probabilities against plain forwards, the library's own loss, and themselves in other batches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align import logprobs
from align.logprobs import Pair, answer_logprobs, by_length, by_tiles, collate
from align.models import merged

PAD = 0


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Ragged rows in random order, some of whose answers hold the padding token itself."""
    draw = random.Random(0)
    rows = [
        ([draw.randrange(3, 300) for _ in range(draw.randrange(1, 30))], [draw.randrange(300) for _ in range(size)])
        for size in (1, 7, 40, 2, 13, 13, 25, 1, 5, 18)
    ]
    rows[3][1][-1] = PAD
    rows[4][1][0] = PAD
    return rows


@torch.no_grad()
def alone(model: Any, pair: Pair, temperature: float = 1.0) -> torch.Tensor:
    """The textbook way: one row, the model's own logits, log-softmax, the answer's tokens."""
    prompt, answer = pair
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float() / temperature
    logprobs = torch.log_softmax(logits, -1)
    return torch.stack([logprobs[len(prompt) + t - 1, token] for t, token in enumerate(answer)])


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_a_plain_forward_of_each_row(model: Any, pairs: list[Pair], batch_size: int, temperature: float) -> None:
    found = answer_logprobs(model, pairs, PAD, batch_size=batch_size, temperature=temperature)
    assert_same(found, [alone(model, pair, temperature) for pair in pairs])
    assert all(row.dtype == torch.float32 and (row <= 0).all() for row in found)


def test_order_is_kept(model: Any, pairs: list[Pair]) -> None:
    order = [4, 0, 9, 2, 7, 1, 8, 3, 6, 5]
    found = answer_logprobs(model, pairs, PAD, batch_size=4)
    assert_same(answer_logprobs(model, [pairs[i] for i in order], PAD, batch_size=4), [found[i] for i in order])


def test_the_padding_token_does_not_matter(model: Any, pairs: list[Pair]) -> None:
    assert_same(answer_logprobs(model, pairs, PAD), answer_logprobs(model, pairs, 17))


def test_the_loss_of_the_library_is_minus_our_mean(model: Any, pairs: list[Pair]) -> None:
    batch = collate(pairs, PAD)
    labels_BS = batch.ids_BS.masked_fill(~batch.answer_BS, -100)
    with torch.no_grad():
        loss = model(input_ids=batch.ids_BS, attention_mask=batch.attention_BS.long(), labels=labels_BS).loss
    ours = torch.cat(answer_logprobs(model, pairs, PAD))
    torch.testing.assert_close(-ours.mean(), loss, atol=1e-5, rtol=0)


def test_an_active_adapter_counts_and_equals_its_merge(tiny_model: Path, model: Any, pairs: list[Pair]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(base, config)
    with_adapter = answer_logprobs(adapted, pairs, PAD)
    with adapted.disable_adapter():
        assert_same(answer_logprobs(adapted, pairs, PAD), answer_logprobs(model, pairs, PAD))
    assert max((a - b).abs().max() for a, b in zip(with_adapter, answer_logprobs(model, pairs, PAD), strict=True)) > 0.1
    assert_same(with_adapter, [alone(adapted, pair) for pair in pairs])
    assert_same(answer_logprobs(merged(adapted), pairs, PAD), with_adapter, 1e-4)


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    caps = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0}
    config = Gemma2Config(**SHAPE, **caps, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def cohere() -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3))


def granite() -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    scales = {"embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
    return GraniteForCausalLM(GraniteConfig(**SHAPE, **scales, logits_scaling=4.0))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=320, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    )


def falcon_h1() -> Any:
    from transformers import FalconH1Config, FalconH1ForCausalLM

    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    return FalconH1ForCausalLM(FalconH1Config(**SHAPE, **mamba, lm_head_multiplier=0.1))


@pytest.mark.parametrize("make", [gemma2, cohere, granite, gpt2, falcon_h1])
def test_other_architectures_equal_their_own_forward(make: Any, pairs: list[Pair]) -> None:
    """Caps, scales and windows of the vocabulary's logits are those of the model's own forward."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # large weights, so that a cap or a scale shows
        parameter.data *= 8 if parameter.ndim > 1 else 1
    assert_same(answer_logprobs(model, pairs, PAD, batch_size=4), [alone(model, pair) for pair in pairs], 2e-5)


def test_the_cap_of_gemma2_matters_here(pairs: list[Pair]) -> None:
    torch.manual_seed(0)
    model = gemma2().eval()
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.ndim > 1 else 1
    capped = torch.cat(answer_logprobs(model, pairs, PAD))
    model.config.final_logit_softcapping = None
    assert (capped - torch.cat(answer_logprobs(model, pairs, PAD))).abs().max() > 0.1


# Tiles


def weighted(hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Three outputs of one vocabulary product: with gradient, without, and of another type."""
    logits_NV = hidden_NH @ MATRIX_HV
    logprobs_N = torch.log_softmax(logits_NV, -1).gather(1, targets_N[:, None])[:, 0]
    return logprobs_N, logits_NV.detach().mean(-1), logits_NV.argmax(-1) == targets_N


MATRIX_HV = torch.randn(8, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("count", [0, 1, 6, 7, 21, 23])
@pytest.mark.parametrize("tile", [1, 2, 7, 22, 100, None])
def test_tiles_equal_the_whole(count: int, tile: int | None) -> None:
    torch.manual_seed(count)
    start_NH, targets_N, weight_N = torch.randn(count, 8), torch.randint(30, (count,)), torch.randn(count)

    def run(tiled: bool) -> tuple[Any, ...]:
        hidden_NH = start_NH.clone().requires_grad_()
        outputs = by_tiles(weighted, hidden_NH, targets_N, tile=tile) if tiled else weighted(hidden_NH, targets_N)
        loss = (outputs[0] * weight_N).sum() + outputs[0].exp().sum()
        return outputs, *torch.autograd.grad(loss, [hidden_NH, MATRIX_HV])

    (wanted, *wanted_grads), (found, *found_grads) = run(tiled=False), run(tiled=True)
    assert [part.shape for part in found] == [(count,)] * 3
    assert [part.dtype for part in found] == [torch.float32, torch.float32, torch.bool]
    assert [part.requires_grad for part in found] == [True, False, False]
    for a, b in zip((*found, *found_grads), (*wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for a, b in zip(by_tiles(weighted, start_NH, targets_N, tile=tile), wanted, strict=True):
            torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=1e-6)


def test_logits_exist_for_one_tile_only() -> None:
    """Up to one tile what is held is kept; beyond it every tile is computed twice, and never is more than one held."""
    sizes: list[int] = []

    def head(hidden_NH: torch.Tensor) -> tuple[torch.Tensor]:
        sizes.append(len(hidden_NH))
        return (torch.log_softmax(hidden_NH @ MATRIX_HV, -1)[:, 0],)

    def held(count: int) -> int:
        """Numbers kept for the backward pass that are of the vocabulary's width."""
        kept: list[int] = []

        def keep(value: torch.Tensor) -> torch.Tensor:
            if value.shape[-1:] == (30,) and value.shape[0] != 8:
                kept.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            (logprobs_N,) = by_tiles(head, torch.randn(count, 8, requires_grad=True), tile=5)
        forward = sum(kept)
        logprobs_N.sum().backward()
        return forward

    assert held(5) == 5 * 30 and sizes == [5]
    sizes.clear()
    assert held(12) == 0
    assert sorted(sizes) == [2, 2, 5, 5, 5, 5]
    MATRIX_HV.grad = None


def test_the_tile_does_not_matter_to_logprobs(model: Any, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answer_logprobs(model, pairs, PAD)
    for tile in (1, 9, 64):
        monkeypatch.setattr(logprobs, "TILE", tile)
        assert_same(answer_logprobs(model, pairs, PAD), wanted)


def test_empty_answers_give_empty_rows(model: Any, pairs: list[Pair]) -> None:
    found = answer_logprobs(model, [pairs[0], ([5, 6], []), pairs[1]], PAD)
    assert_same(found, [alone(model, pairs[0]), torch.empty(0), alone(model, pairs[1])])
    assert [len(row) for row in answer_logprobs(model, [([5], []), ([6, 7], [])], PAD)] == [0, 0]
    assert answer_logprobs(model, [], PAD) == []


def test_an_empty_prompt_is_not_scored_silently(model: Any) -> None:
    """Nothing precedes the first token, so it has no log-probability."""
    with pytest.raises((RuntimeError, ValueError, AssertionError, IndexError)):
        answer_logprobs(model, [([], [5, 6, 7])], PAD)


def test_progress_counts_rows_and_no_gradient_is_kept(model: Any, pairs: list[Pair]) -> None:
    seen: list[int] = []
    found = answer_logprobs(model, pairs, PAD, batch_size=4, on_progress=seen.append)
    assert seen == [4, 8, 10]
    assert not any(row.requires_grad for row in found)


def test_batches_are_longest_first_and_complete(pairs: list[Pair]) -> None:
    batches = list(by_length(pairs, 4))
    sizes = [len(pairs[i][0]) + len(pairs[i][1]) for batch in batches for i in batch]
    assert sizes == sorted(sizes, reverse=True)
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))


def test_collate_by_hand() -> None:
    batch = collate([([1, 2], [3]), ([4], [5, 6, 7])], pad_id=0)
    assert batch.ids_BS.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert batch.attention_BS.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.answer_BS.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert batch.answer_BT.tolist() == [[True, False, False], [True, True, True]]
    assert batch.targets_N.tolist() == [3, 5, 6, 7]
    assert batch.spread(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[1.0, 0.0, 0.0], [2.0, 3.0, 4.0]]


# -- the head ---------------------------------------------------------------------------------------------------------


def head_figures(model: Any, hidden: torch.Tensor, targets: torch.Tensor, **how: Any) -> tuple[Any, torch.Tensor]:
    hidden = hidden.clone().requires_grad_(True)
    figures = logprobs.token_figures(model, hidden, targets, **how)
    (figures.logprobs_N * torch.linspace(-1, 2, len(targets))).sum().backward()
    assert hidden.grad is not None
    return figures, hidden.grad


@pytest.mark.parametrize("tile", [3, 256])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_frozen_head_takes_its_gradient_along(
    tiny_model: Path, tile: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as by autograd through the whole vocabulary, which a head that is trained needs."""
    monkeypatch.setattr(logprobs, "FROZEN_TILE", {"cpu": tile})
    trained = AutoModelForCausalLM.from_pretrained(tiny_model)
    frozen = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    assert logprobs._is_frozen_matrix(frozen, frozen.lm_head)
    assert not logprobs._is_frozen_matrix(trained, trained.lm_head)
    hidden = torch.randn((10, trained.config.hidden_size), generator=torch.Generator().manual_seed(0)) * 3
    targets = torch.arange(10) * 7
    wanted, wanted_grad = head_figures(trained, hidden, targets, temperature=temperature)
    found, found_grad = head_figures(frozen, hidden, targets, temperature=temperature)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_grad, wanted_grad, atol=1e-6, rtol=1e-4)
    assert trained.lm_head.weight.grad is not None and frozen.lm_head.weight.grad is None
    only, _ = head_figures(frozen, hidden, targets, temperature=temperature, only_logprobs=True)
    assert torch.equal(only.logprobs_N, found.logprobs_N) and not only.entropy_N.any()
    with torch.no_grad():
        assert torch.equal(logprobs.target_logprobs(frozen, hidden, targets, temperature), found.logprobs_N)
    with pytest.raises(ValueError, match="must be positive"):
        logprobs.target_logprobs(frozen, hidden, targets, 0.0)


@pytest.mark.parametrize("name", logprobs.SCALINGS)
def test_a_head_that_scales_is_no_plain_matrix(tiny_model: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    setattr(model.config, name, 2.0)
    assert not logprobs._is_frozen_matrix(model, model.lm_head)
    hidden = torch.randn((4, model.config.hidden_size))
    targets = torch.tensor([1, 2, 3, 4])
    wanted = logprobs.vocabulary_logits(model, hidden).log_softmax(-1)[torch.arange(4), targets]
    torch.testing.assert_close(logprobs.target_logprobs(model, hidden, targets), wanted)
