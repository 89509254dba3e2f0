"""The sampler: answers token by token, with the log-probability of every token as it was drawn.

`transformers.generate` keeps finished rows in the batch until the last one ends and tells nothing of what it drew. Here
finished rows leave, adapters are folded into the weights for the time of sampling, and every row draws from a stream of
its own, so that a row's answer does not depend on when the others end.

Shapes: B rows, T answer positions, H hidden size, V vocabulary. Prompts are padded left.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from align.logprobs import base_model, vocabulary_logits
from align.lora import for_few_rows


@dataclass
class Drawn:
    """One answer: its tokens (with the stop token where it stopped by itself) and their log-probabilities in nats,
    at the temperature they were drawn at and over the whole vocabulary, whatever top-k and top-p left of it.

    observed: what `observe` said of the state before each token; empty without it.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool
    observed: list[list[float]] = field(default_factory=list)


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
    observe: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[Drawn]:
    """One answer to each tokenised prompt, in the order given.

    Args:
        model: a decoder-only language model in eval mode, adapted or not; whatever adapter is active takes part.
        stop_ids: an answer ends with the first of these.
        temperature: 0 is greedy; log-probabilities are then those at temperature 1.
        uniform_BT: all the randomness there is: for each row and position a float64 number between 0 and 1. None:
            torch's own generator (seed it before) makes them, all at the start.
        observe: called with the last hidden states BH and the log-probabilities BV from which a token is drawn; what it
            returns, a few figures a row, is kept with the answers.

    Raises:
        ValueError: a prompt is empty, the logits are not numbers, or the model is none that can be drawn from here.
    """
    if not prompts:
        return []
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no token, but an answer follows at least one: give it a start token.")
    _refuse_strangers(model, prompts[0])
    device = next(model.parameters()).device
    # Prompts that are asked for several answers are read once.
    places: dict[tuple[int, ...], int] = {}
    place_B = torch.tensor([places.setdefault(tuple(prompt), len(places)) for prompt in prompts], device=device)
    size = max(map(len, prompts))
    ids_BS = torch.zeros((len(places), size), dtype=torch.long)
    attention_BS = torch.zeros((len(places), size), dtype=torch.long)
    for tokens, row in places.items():
        ids_BS[row, size - len(tokens) :] = torch.tensor(tokens)
        attention_BS[row, size - len(tokens) :] = 1
    ids_BS, attention_BS = ids_BS.to(device), attention_BS.to(device)
    if uniform_BT is None:
        uniform_BT = torch.rand((len(prompts), max_new_tokens), device=device, dtype=torch.float64)
    uniform_BT = uniform_BT.to(device)
    stop = torch.tensor(sorted(stop_ids), device=device)
    answers = [Drawn([], [], False) for _ in prompts]
    rows = list(range(len(prompts)))  # the prompts whose answers are still being written
    cache = _new_cache(model)
    position_BS = (attention_BS.cumsum(1) - 1).clamp(min=0)
    with for_few_rows(model):
        for t in range(max_new_tokens):
            hidden_BH = _next_hidden(model, cache, ids_BS, attention_BS, position_BS)
            logits_BV = vocabulary_logits(model, hidden_BH)
            logprobs_BV = torch.log_softmax(logits_BV / temperature if temperature > 0 else logits_BV, dim=-1)
            if t == 0 and len(places) < len(prompts):
                cache.reorder_cache(place_B)
                hidden_BH, logprobs_BV, attention_BS, position_BS = (
                    x[place_B] for x in (hidden_BH, logprobs_BV, attention_BS, position_BS)
                )
            if observe is not None:
                for row, figures in zip(rows, observe(hidden_BH, logprobs_BV).tolist(), strict=True):
                    answers[row].observed.append(figures)
            token_B, logprob_B = _pick(logprobs_BV, uniform_BT[:, t], temperature, top_p, top_k)
            stops_B = torch.isin(token_B, stop)
            for row, token, logprob, stops in zip(
                rows, token_B.tolist(), logprob_B.tolist(), stops_B.tolist(), strict=True
            ):
                if math.isnan(logprob):
                    raise ValueError(
                        f"the model's logits are not numbers at token {t} of the answer to prompt {row}: its weights "
                        "have diverged (lower the learning rate) or overflow in float16 (take bfloat16 or float32)."
                    )
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
                cache.reorder_cache(staying)  # unlike `batch_select_indices`, recurrent layers have it too
                ids_BS, position_BS = ids_BS[staying], position_BS[staying]
                attention_BS, uniform_BT = attention_BS[staying], uniform_BT[staying]
            attention_BS = torch.cat([attention_BS, attention_BS.new_ones((len(rows), 1))], dim=1)
    return answers


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=base_model(model).config)


def _next_logits(model: Any, cache: Any, ids_BS: Tensor, attention_BS: Tensor, position_BS: Tensor) -> Tensor:
    return vocabulary_logits(model, _next_hidden(model, cache, ids_BS, attention_BS, position_BS))


def _next_hidden(model: Any, cache: Any, ids_BS: Tensor, attention_BS: Tensor, position_BS: Tensor) -> Tensor:
    """Hidden states BH of the last of these tokens; `attention_BS` spans those in the cache too."""
    decoder = base_model(model).get_decoder()
    output = decoder(
        input_ids=ids_BS,
        attention_mask=attention_BS,
        position_ids=position_BS,
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state[:, -1]


_KNOWN: weakref.WeakSet[Any] = weakref.WeakSet()


def _refuse_strangers(model: Any, prompt: list[int]) -> None:
    """Draw only from a model whose logits, with padding, cache and a row that left, are those of its own forward.

    Some take the cache under another name and forget all but the last token, some count padding as positions, some
    scale their logits in a way of their own: without an error, answers would come from another distribution. Three
    passes over four tokens tell, once for each model.

    Raises:
        ValueError: they are not.
    """
    name, model = type(base_model(model)).__name__, base_model(model)
    if model in _KNOWN:
        return
    advice = "take another architecture, such as Llama, Qwen, Mistral or Gemma"
    ids_S = torch.tensor((prompt * 4)[:4], device=next(model.parameters()).device)
    ids_BS = torch.stack([ids_S, ids_S.roll(1)])  # of the second row, the first token is padding
    attention_BS = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], device=ids_S.device)
    position_BS = (attention_BS.cumsum(1) - 1).clamp(min=0)
    try:
        wanted_V = model(input_ids=ids_S[None], use_cache=False).logits[0, -1].float()
        cache = _new_cache(model)
        _next_logits(model, cache, ids_BS, attention_BS[:, :4], position_BS[:, :4])
        cache.reorder_cache(torch.tensor([1], device=ids_S.device))
        found_V = _next_logits(model, cache, ids_S[None, 3:], attention_BS[1:], position_BS[1:, 4:])[0]
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"answers cannot be drawn from {name} ({error}): {advice}.") from error
    found_V, wanted_V = found_V - found_V.mean(), wanted_V - wanted_V.mean()
    off = float((found_V - wanted_V).norm() / wanted_V.norm())
    if off > 0.3:  # rounding to bfloat16 makes a few hundredths
        raise ValueError(
            f"answers cannot be drawn from {name}: token by token, its logits are {off:.0%} off those of its own "
            f"forward pass; {advice}."
        )
    _KNOWN.add(model)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation config (chat models often
    end a turn with another token than a document)."""
    ids = getattr(getattr(base_model(model), "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    return sorted(i for i in found if 0 <= i < len(tokenizer))


def _pick(
    logprobs_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """(token B, its log-probability B in nats), by the inverse of the distribution function."""
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
        if top_p < 1:
            before_BV = probs_BV.cumsum(-1, dtype=torch.float64) - probs_BV
            probs_BV[before_BV >= top_p] = 0  # the likeliest token always stays: nothing comes before it
        token_B = order_BV.gather(1, _inverse(probs_BV, uniform_B)[:, None])[:, 0]
    return token_B, logprobs_BV.gather(1, token_B[:, None])[:, 0]


def _inverse(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Index B at which the running sum passes `uniform` of the total; a token of probability 0 is never drawn."""
    sums_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    wanted_B1 = (uniform_B * sums_BV[:, -1])[:, None]
    return torch.searchsorted(sums_BV, wanted_B1, right=True)[:, 0].clamp(max=probs_BV.shape[1] - 1)
