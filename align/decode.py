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
from align.stepper import Stepper, supported


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
    on_token: Callable[[Sequence[Drawn]], object] = lambda answers: None,
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
        on_token: called with the answers so far after every token; what it raises ends the sampling.

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
    if uniform_BT is None:
        uniform_BT = torch.rand((len(prompts), max_new_tokens), device=device, dtype=torch.float64)
    uniform_BT = uniform_BT.to(device)
    stop = torch.tensor(sorted(stop_ids), device=device)
    answers = [Drawn([], [], False) for _ in prompts]
    rows = list(range(len(prompts)))  # the prompts whose answers are still being written
    with for_few_rows(model):
        held = _Held(model, list(places), max_new_tokens - 1)
        for t in range(max_new_tokens):
            hidden_BH = held.hidden_BH
            logits_BV = vocabulary_logits(model, hidden_BH)
            if temperature not in (0, 1):
                logits_BV /= temperature
            logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
            if t == 0 and len(places) < len(prompts):
                held.keep(place_B)
                hidden_BH, logprobs_BV = hidden_BH[place_B], logprobs_BV[place_B]
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
            on_token(answers)
            if bool(stops_B.all()) or t + 1 == max_new_tokens:
                break
            if bool(stops_B.any()):
                staying = (~stops_B).nonzero()[:, 0]
                rows = [rows[i] for i in staying.tolist()]
                held.keep(staying)
                token_B, uniform_BT = token_B[staying], uniform_BT[staying]
            held.read(token_B)
    return answers


class _Held:
    """The rows as the model remembers them: in its own cache, or, past the prompts, in a stepper where one is known.

    hidden_BH: last hidden states after what was read.

    Args:
        prompts: tokens, all different; they are read at once, and what they begin with alike once where that is safe.
        room: how many tokens follow the prompts at most.
    """

    def __init__(self, model: Any, prompts: Sequence[tuple[int, ...]], room: int) -> None:
        self.model, self.cache, self.room = model, _new_cache(model), room
        self.stepper: Stepper | None = None
        device = next(model.parameters()).device
        # Padding stands between the common beginning and the rest: where layers count a window in columns, it must not.
        common = _common(prompts) if supported(model) else 0
        rest = max(map(len, prompts)) - common
        ids_BS = torch.zeros((len(prompts), rest), dtype=torch.long)
        self.attention_BS = torch.ones((len(prompts), common + rest), dtype=torch.long)
        for row, tokens in enumerate(prompts):
            padding = rest + common - len(tokens)
            ids_BS[row, padding:] = torch.tensor(tokens[common:])
            self.attention_BS[row, common : common + padding] = 0
        self.attention_BS = self.attention_BS.to(device)
        self.position_BS = (self.attention_BS.cumsum(1) - 1).clamp(min=0)
        if common:
            ids_1S = torch.tensor([prompts[0][:common]], device=device)
            _next_hidden(model, self.cache, ids_1S, self.attention_BS[:1, :common], self.position_BS[:1, :common])
            self.cache.reorder_cache(torch.zeros(len(prompts), dtype=torch.long, device=device))
        self.hidden_BH = _next_hidden(
            model, self.cache, ids_BS.to(device), self.attention_BS, self.position_BS[:, common:]
        )

    def read(self, token_B: Tensor) -> None:
        """One more token of every row."""
        self.position_BS = self.position_BS[:, -1:] + 1
        if self.stepper is None and _steps(self.model):
            self.stepper, self.cache = Stepper(self.model, self.cache, self.attention_BS, self.room), None
        if self.stepper is not None:
            self.hidden_BH = self.stepper.step(token_B, self.position_BS[:, 0])
            return
        self.attention_BS = torch.cat([self.attention_BS, self.attention_BS.new_ones((len(token_B), 1))], dim=1)
        self.hidden_BH = _next_hidden(self.model, self.cache, token_B[:, None], self.attention_BS, self.position_BS)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may come more than once before the first step."""
        self.attention_BS, self.position_BS = self.attention_BS[rows], self.position_BS[rows]
        if self.stepper is not None:
            self.stepper.keep(rows)
        else:
            self.cache.reorder_cache(rows)  # unlike `batch_select_indices`, recurrent layers have it too


def _common(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with alike, where that is worth a pass; each keeps one of its own."""
    first, last = min(prompts), max(prompts)  # in lexicographic order, what these two share all share
    size = min(map(len, prompts)) - 1
    shared = next((i for i in range(size) if first[i] != last[i]), size)
    return shared if len(prompts) > 1 and shared >= 4 else 0


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


_STEPPED: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _steps(model: Any) -> bool:
    """Whether a stepper gives the hidden states of the model's own forward: tried once for each model."""
    base = base_model(model)
    if not supported(model):
        return False
    if base not in _STEPPED:
        device = next(base.parameters()).device
        size = min(base.config.get_text_config().vocab_size, 1000)
        ids_BS = torch.randint(1, size, (2, 6), generator=torch.Generator().manual_seed(0)).to(device)
        attention_BS = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], device=device)
        position_BS = (attention_BS.cumsum(1) - 1).clamp(min=0)
        caches = _new_cache(model), _new_cache(model)
        for cache in caches:
            _next_hidden(model, cache, ids_BS[:, :5], attention_BS[:, :5], position_BS[:, :5])
        wanted_BH = _next_hidden(model, caches[0], ids_BS[:, 5:], attention_BS, position_BS[:, 5:]).float()
        found_BH = Stepper(model, caches[1], attention_BS[:, :5], 1).step(ids_BS[:, 5], position_BS[:, 5]).float()
        exact = next(base.parameters()).dtype == torch.float32
        _STEPPED[base] = bool((found_BH - wanted_BH).norm() < (1e-4 if exact else 0.05) * wanted_BH.norm())
    return _STEPPED[base]


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


_BLOCK = 256


def _inverse(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Index B at which the running sum passes `uniform` of the total; a token of probability 0 is never drawn.

    Sums of blocks come first, so that the running sum, in float64, is taken over one block of the vocabulary only.
    """
    size = probs_BV.shape[1]
    if tail := -size % _BLOCK:
        probs_BV = torch.nn.functional.pad(probs_BV, (0, tail))
    blocks_BnK = probs_BV.unflatten(1, (-1, _BLOCK))
    sums_Bn = blocks_BnK.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted_B1 = (uniform_B * sums_Bn[:, -1])[:, None]
    block_B1 = _passed(sums_Bn, wanted_B1)
    before_B1 = torch.where(block_B1 > 0, sums_Bn.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    inside_BK = blocks_BnK[torch.arange(len(probs_BV), device=probs_BV.device), block_B1[:, 0]].cumsum(
        -1, dtype=torch.float64
    )
    index_B1 = block_B1 * _BLOCK + _passed(inside_BK, wanted_B1 - before_B1)
    return index_B1[:, 0].clamp(max=size - 1)  # sums that are not numbers are passed nowhere; `draw` says so


def _passed(sums_Bn: Tensor, wanted_B1: Tensor) -> Tensor:
    """The first index B1 whose running sum is above `wanted`; rounding may leave it none, then the last that adds."""
    below_B1 = torch.nextafter(sums_Bn[:, -1:], torch.zeros_like(wanted_B1))
    found_B1 = torch.searchsorted(sums_Bn, torch.minimum(wanted_B1, below_B1), right=True)
    return found_B1.clamp(max=sums_Bn.shape[1] - 1)
