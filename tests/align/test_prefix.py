"""Rows laid out as one sequence: the same hidden states, losses and gradients as rows one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from align import prefix
from align.lean import lean_reading
from align.prefix import Layout, lay_out, layout_of, share_prefixes
from reward.scoring import score_rows

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A window of 5 is shorter than every prompt below: without it, sharing would look right where it is not.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


def tiny(kind: str, auto: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    """A model whose weights are large enough that what a token sees matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **ARCHITECTURES.get(kind, {}), **settings})
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def batch(side: str = "right", groups: int = 3, answers: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, mask, labels) BS: every prompt `answers` times, ragged; prompts begin alike too, one answer is short."""
    chance = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=chance).tolist()

    head = tokens(4)
    pairs = [
        (prompt, tokens(int(torch.randint(1, 9, (), generator=chance))))
        for prompt in [head + tokens(3 + 4 * i) for i in range(groups)]
        for _ in range(answers)
    ]
    # All answer 1 first, then all answer 2: rows that share do not stand side by side.
    pairs = [pair for k in range(answers) for pair in pairs[k::answers]]
    size = max(len(p) + len(a) for p, a in pairs) + 1
    ids, mask = torch.zeros((len(pairs), size), dtype=torch.long), torch.zeros((len(pairs), size), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(pairs):
        first = 0 if side == "right" else size - len(prompt) - len(answer)
        last = first + len(prompt) + len(answer)
        ids[row, first:last], mask[row, first:last] = torch.tensor(prompt + answer), 1
        labels[row, last - len(answer) : last] = torch.tensor(answer)
    return ids, mask, labels


def logprobs_and_gradients(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    answer = labels[:, 1:] != -100
    logprobs = logits.log_softmax(-1)[answer].gather(1, labels[:, 1:][answer][:, None])[:, 0]
    weights = torch.linspace(-1, 1, len(logprobs))
    (logprobs * weights).sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(plain: Any, shared: Any, data: tuple[Tensor, Tensor, Tensor]) -> None:
    wanted, wanted_grads = logprobs_and_gradients(plain, *data)
    found, found_grads = logprobs_and_gradients(shared, *data)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert found_grads.keys() == wanted_grads.keys()
    for name, gradient in wanted_grads.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found_grads[name], gradient, atol=1e-5 * scale, rtol=0, msg=name)


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Layout]]:
    """The layouts that were really run through a decoder; empty where the plain forward was taken."""
    seen: list[Layout] = []
    packed = prefix._packed

    def noting(decoder: Any, layout: Layout, **kwargs: Any) -> Any:
        seen.append(layout)
        return packed(decoder, layout, **kwargs)

    monkeypatch.setattr(prefix, "_packed", noting)
    yield seen


# -- exactness --------------------------------------------------------------------------------------------------------


# GPT-2 counts positions from the padding on: with padding on the left, its plain forward itself is another one.
SIDES = [(kind, side) for kind in ARCHITECTURES for side in ("right", "left") if (kind, side) != ("gpt2", "left")]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("kind", "side"), SIDES)
def test_logprobs_and_every_gradient_are_the_plain_forwards(
    kind: str, side: str, checkpointing: bool, laid_out: list[Layout]
) -> None:
    plain = tiny(kind).train()
    shared = copy.deepcopy(plain)
    assert share_prefixes(shared) is None
    if checkpointing:
        for model in (plain, shared):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    laid_out.clear()
    data = batch(side)
    assert_alike(plain, shared, data)
    assert len(laid_out) == 1 and len(laid_out[0].ids_P) < int(data[1].sum())


@pytest.mark.parametrize("answers", range(2, 9))
def test_any_number_of_answers(answers: int, laid_out: list[Layout]) -> None:
    plain = tiny("llama")
    shared = copy.deepcopy(plain)
    assert share_prefixes(shared) is None
    laid_out.clear()
    data = batch(groups=2, answers=answers, seed=answers)
    assert_alike(plain, shared, data)
    distinct = {tuple(row[: i + 1]) for row in rows_of(data) for i in range(len(row))}
    assert len(laid_out[0].ids_P) == len(distinct)  # every distinct beginning once, and nothing else


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_portable_attentions(implementation: str) -> None:
    plain = tiny("llama", attn_implementation=implementation)
    shared = copy.deepcopy(plain)
    assert share_prefixes(shared) is None
    assert_alike(plain, shared, batch())


def test_under_an_adapter_on_and_off() -> None:
    plain = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    shared = copy.deepcopy(plain)
    assert share_prefixes(shared) is None
    assert_alike(plain, shared, batch())
    with torch.no_grad(), plain.disable_adapter(), shared.disable_adapter():
        ids, mask, _ = batch()
        wanted, found = (m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (plain, shared))
        torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-5, rtol=0)


def test_a_classifier_scores_the_last_token() -> None:
    plain = tiny("qwen2", AutoModelForSequenceClassification, num_labels=1)
    shared = copy.deepcopy(plain)
    assert share_prefixes(shared) is None
    ids, mask, _ = batch()
    scores = []
    for model in (plain, shared):
        score = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
        score.square().sum().backward()
        scores.append(score.detach())
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=0)
    for (name, mine), theirs in zip(shared.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5, msg=name)


def test_a_model_that_is_only_read_shares_what_its_rows_begin_with(laid_out: list[Layout]) -> None:
    """Scoring does not say that it wants no cache; a model set up for reading needs none."""
    plain = tiny("llama", AutoModelForSequenceClassification, num_labels=1).eval()
    read = copy.deepcopy(plain)
    lean_reading(read)
    ids, mask, _ = batch(answers=4)
    rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    laid_out.clear()  # share_prefixes tried one
    scores = score_rows(read, rows, 0, groups=[i // 4 for i in range(len(rows))])
    assert scores == pytest.approx(score_rows(plain, rows, 0), abs=1e-5)
    assert len(laid_out) == 1 and len(laid_out[0].ids_P) < mask.sum()
    assert any("forward" in vars(m) for m in read.modules() if m.__class__.__name__.endswith("RMSNorm"))


def test_a_copy_computes_with_its_own_weights() -> None:
    """The reference of full fine-tuning is a deep copy of a policy that may share prefixes already."""
    model = tiny("llama").eval()
    assert share_prefixes(model) is None
    twin = copy.deepcopy(model)
    ids, mask, _ = batch()
    with torch.no_grad():
        before = twin(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin(input_ids=ids, attention_mask=mask, use_cache=False).logits, before)


# -- the layout -------------------------------------------------------------------------------------------------------


def rows_of(data: tuple[Tensor, Tensor, Tensor]) -> list[list[int]]:
    ids, mask, _ = data
    return [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]


def test_by_hand() -> None:
    layout = lay_out([[5, 6, 7], [5, 6, 8, 9], [4]], starts=[0, 1, 2], columns=5)
    assert layout.ids_P.tolist() == [4, 5, 6, 7, 8, 9]  # in lexicographic order: 4; 5 6 7; 5 6 8 9
    assert layout.position_P.tolist() == [0, 0, 1, 2, 2, 3]
    assert layout.place_BS.tolist() == [[1, 2, 3, 0, 0], [0, 1, 2, 4, 5], [0, 0, 0, 0, 0]]
    whole, single, shared = layout.groups
    assert whole.query_GQ.tolist() == [[1, 2, 3]] and whole.whole
    assert single.query_GQ.tolist() == [[0]]
    assert shared.query_GQ.tolist() == [[4, 5]] and shared.key_GK.tolist() == [[1, 2, 4, 5]] and not shared.whole
    assert shared.mask(None).tolist() == [[[[True, True, True, False], [True, True, True, True]]]]
    assert shared.mask(2).tolist() == [[[[False, True, True, False], [False, False, True, True]]]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=9), st.integers(1, 6))
def test_every_token_sees_its_own_beginning_and_nothing_else(rows: list[list[int]], window: int) -> None:
    """Attention that counts what it sees: each place's answer is the sum over its row's beginning, or its window."""
    layout = lay_out(rows, [0] * len(rows), max(map(len, rows)))
    assert len(layout.ids_P) == len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})
    value = torch.stack([layout.ids_P.double(), layout.position_P.double() ** 2], -1)[None, None]

    def summing(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        size = query.shape[2]
        seen = torch.ones(size, size).tril() if mask is None else mask
        return (seen.double() @ value).transpose(1, 2)

    for asked in (None, window):
        found = layout.attend(summing, value, value, value, asked)[0, :, 0]
        for row, places in zip(rows, layout.place_BS.tolist(), strict=True):
            for i in range(len(row)):
                seen = range(max(0, i + 1 - (asked or len(row))), i + 1)
                wanted = [sum(row[j] for j in seen), sum(j**2 for j in seen)]
                assert found[places[i]].tolist() == wanted


def test_left_out_where_nothing_would_be_saved() -> None:
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    assert layout_of(ids, torch.ones_like(ids)) is None
    assert layout_of(ids, None) is None
    holes = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
    same = ids[:1].repeat(2, 1)
    assert layout_of(same, holes) is None  # padding between tokens is nobody's batch; nor is a row of nothing
    assert layout_of(same, torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])) is None
    found = layout_of(same, None)
    assert found is not None and found.ids_P.tolist() == [3, 4, 5, 6]


def test_calls_that_ask_for_more_are_plain(laid_out: list[Layout]) -> None:
    model = tiny("llama").eval()
    assert share_prefixes(model) is None
    laid_out.clear()
    ids, mask, _ = batch()
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=mask).past_key_values is not None
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        assert output.hidden_states[0].shape[:2] == ids.shape
        positions = torch.arange(ids.shape[1])[None].repeat(len(ids), 1)
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, use_cache=False)
    assert model.generate(ids[:, :5], max_new_tokens=3, min_new_tokens=3).shape[1] == 8
    assert not laid_out


# -- who is refused ---------------------------------------------------------------------------------------------------


def refused(model: Any) -> str:
    before = model.config._attn_implementation if hasattr(model, "config") else None
    reason = share_prefixes(model)
    assert reason is not None
    assert before is None or model.config._attn_implementation == before
    assert "forward" not in vars(model.get_base_model().get_decoder() if hasattr(model, "peft_config") else model)
    return reason


def test_architectures_that_cannot_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", d_model=16, d_ff=16, d_kv=4, num_heads=2, num_layers=1, vocab_size=97)
    )
    assert "encoder-decoder" in refused(t5)
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=97)
    )
    assert "carry state" in refused(mamba)
    tuned = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "learns a prompt" in refused(tuned)
    bloom = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bloom", hidden_size=32, n_head=4, n_layer=1, vocab_size=97)
    )
    assert "does not take rows laid out as one" in refused(bloom)
    bert = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bert", **{**SMALL, "is_decoder": False, "num_hidden_layers": 2})
    )
    assert "off its own" in refused(bert)


def test_a_window_that_attention_is_not_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window longer than what is tried, only the keyword shows whether it would be kept."""
    model = tiny("mistral", sliding_window=64)
    attend = Layout.attend
    monkeypatch.setattr(Layout, "attend", lambda self, a, q, k, v, window: attend(self, a, q, k, v, None))
    assert "how far back" in refused(model)
    monkeypatch.undo()
    assert share_prefixes(model) is None


def test_once_is_enough() -> None:
    model = tiny("llama")
    assert share_prefixes(model) is None and share_prefixes(model) is None
    assert model.config._attn_implementation == "shared_prefix|sdpa"


def test_a_saved_config_does_not_know_of_it(tmp_path: Any) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "before")
    assert share_prefixes(model) is None
    model.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "config.json").read_text() for name in ("before", "after"))
    assert before == after
