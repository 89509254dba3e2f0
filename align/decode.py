"""The sampler: answers token by token, with the log-probability of every token as it was drawn.

`transformers.generate` keeps finished rows in the batch until the last one ends and tells nothing of what it drew. Here
finished rows leave, adapters are folded into the weights for the time of sampling, and every row draws from a stream of
its own, so that a row's answer does not depend on when the others end.

Shapes: B rows, T answer positions, H hidden size, V vocabulary. Prompts are padded left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.logprobs import base_model, vocabulary_logits


@dataclass
class Drawn:
    """One answer: its tokens (with the stop token where it stopped by itself) and their log-probabilities in nats,
    at the temperature they were drawn at and over the whole vocabulary, whatever top-k and top-p left of it."""

    ids: list[int]
    logprobs: list[float]
    finished: bool


@torch.no_grad()
def draw(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    uniform_BT: Tensor | None = None,
) -> list[Drawn]:
    """One answer to each tokenised prompt, in the order given.

    Args:
        model: a decoder-only language model in eval mode, adapted or not; whatever adapter is active takes part.
        stop_ids: an answer ends with the first of these.
        temperature: 0 is greedy; log-probabilities are then those at temperature 1.
        uniform_BT: all the randomness there is: for each row and position a float64 number between 0 and 1. None:
            torch's own generator (seed it before) makes them, all at the start.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    decoder = base_model(model).get_decoder()
    size = max(map(len, prompts))
    ids_BS = torch.zeros((len(prompts), size), dtype=torch.long)
    attention_BS = torch.zeros((len(prompts), size), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BS[row, size - len(prompt) :] = torch.tensor(prompt)
        attention_BS[row, size - len(prompt) :] = 1
    ids_BS, attention_BS = ids_BS.to(device), attention_BS.to(device)
    if uniform_BT is None:
        uniform_BT = torch.rand((len(prompts), max_new_tokens), device=device, dtype=torch.float64)
    uniform_BT = uniform_BT.to(device)
    stop = torch.tensor(sorted(stop_ids), device=device)
    answers = [Drawn([], [], False) for _ in prompts]
    rows = list(range(len(prompts)))  # the prompts whose answers are still being written
    cache = DynamicCache(config=base_model(model).config)
    position_BS = (attention_BS.cumsum(1) - 1).clamp(min=0)
    for t in range(max_new_tokens):
        hidden_BSH = decoder(
            input_ids=ids_BS,
            attention_mask=attention_BS,
            position_ids=position_BS,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        token_B, logprob_B = _pick(
            vocabulary_logits(model, hidden_BSH[:, -1]), uniform_BT[:, t], temperature, top_p, top_k
        )
        stops_B = torch.isin(token_B, stop)
        for row, token, logprob, stops in zip(
            rows, token_B.tolist(), logprob_B.tolist(), stops_B.tolist(), strict=True
        ):
            answers[row].ids.append(token)
            answers[row].logprobs.append(logprob)
            answers[row].finished = stops
        if bool(stops_B.all()):
            break
        position_BS = position_BS[:, -1:] + 1
        ids_BS = token_B[:, None]
        if bool(stops_B.any()):
            staying = (~stops_B).nonzero()[:, 0]
            rows = [rows[i] for i in staying.tolist()]
            cache.batch_select_indices(staying)
            ids_BS, position_BS = ids_BS[staying], position_BS[staying]
            attention_BS, uniform_BT = attention_BS[staying], uniform_BT[staying]
        attention_BS = torch.cat([attention_BS, attention_BS.new_ones((len(rows), 1))], dim=1)
    return answers


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation config (chat models often
    end a turn with another token than a document)."""
    ids = getattr(getattr(base_model(model), "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    return sorted(i for i in found if i < len(tokenizer))


@contextlib.contextmanager
def folded(model: Any) -> Iterator[bool]:
    """Inside, the active LoRA adapter is folded into the base weights; afterwards they are restored bit for bit.

    An adapter left beside its weights costs more than half of decoding time again, for a product no wider than its
    rank. Unfolding by subtraction would leave rounding in the base after every update, so the originals are set aside:
    for the time of sampling, when no activations are held, the adapted weights exist twice.

    Yields whether anything was folded: quantised weights and layers PEFT cannot fold are left alone.
    """
    layers = _foldable(model)
    if not layers:
        yield False
        return
    originals = [(layer.get_base_layer().weight, layer.get_base_layer().weight.detach().clone()) for layer in layers]
    for layer in layers:
        layer.merge()
    try:
        yield True
    finally:
        for layer in layers:
            layer.unmerge()
        with torch.no_grad():
            for weight, original in originals:
                weight.copy_(original)


def _foldable(model: Any) -> list[Any]:
    """The LoRA layers with an active adapter, if every one of them lies on a plain floating-point linear layer."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.merged and not m.disable_adapters]
    layers = [layer for layer in layers if set(layer.active_adapters) & set(getattr(layer, "lora_A", {}))]
    plain = all(type(m) is Linear and m.get_base_layer().weight.dtype.is_floating_point for m in layers)
    return layers if plain else []


def _pick(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """(token B, its log-probability B in nats), by the inverse of the distribution function."""
    logprobs_BV = torch.log_softmax(logits_BV / temperature if temperature > 0 else logits_BV, dim=-1)
    if temperature == 0:
        token_B = logprobs_BV.argmax(-1)
    elif top_k == 0 and top_p == 1:
        token_B = _inverse(logprobs_BV.exp(), uniform_B)
    else:
        sorted_BV, order_BV = logprobs_BV.sort(-1, descending=True)
        probs_BV = sorted_BV.exp()
        if top_k:
            probs_BV[:, top_k:] = 0
            probs_BV /= probs_BV.sum(-1, keepdim=True)
        before_BV = probs_BV.cumsum(-1) - probs_BV
        probs_BV[before_BV >= top_p] = 0  # the likeliest token always stays: nothing comes before it
        token_B = order_BV.gather(1, _inverse(probs_BV, uniform_B)[:, None])[:, 0]
    return token_B, logprobs_BV.gather(1, token_B[:, None])[:, 0]


def _inverse(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Index B at which the running sum passes `uniform` of the total; a token of probability 0 is never drawn."""
    sums_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    wanted_B1 = (uniform_B * sums_BV[:, -1])[:, None]
    return torch.searchsorted(sums_BV, wanted_B1, right=True)[:, 0].clamp(max=probs_BV.shape[1] - 1)
