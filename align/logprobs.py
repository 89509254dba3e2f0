"""Log-probabilities of given answers: the one forward pass that perplexity, KL, implicit rewards and PPO share.

Shapes: B rows, S positions of prompt + answer (padded right), T answer positions (left-aligned, padded right),
N answer tokens of all rows together, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.ppo.maths import token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pair = tuple[list[int], list[int]]  # (prompt tokens, answer tokens)


@dataclass
class Batch:
    """Prompts with their answers.

    ids_BS: tokens, padded right. attention_BS: True on real tokens. answer_BS: True on answer tokens.
    answer_BT: the same answers left-aligned; True where row b has a t-th answer token.
    """

    ids_BS: Tensor
    attention_BS: Tensor
    answer_BS: Tensor
    answer_BT: Tensor

    @property
    def targets_N(self) -> Tensor:
        """Answer tokens of all rows, row by row."""
        return self.ids_BS[self.answer_BS]

    def spread(self, values_N: Tensor) -> Tensor:
        """Values of answer tokens, as BT; zero where there is no token."""
        values_BT = values_N.new_zeros(self.answer_BT.shape)
        values_BT[self.answer_BT] = values_N
        return values_BT


def collate(pairs: Sequence[Pair], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Rows `prompt + answer` padded right to the longest."""
    size = max(len(prompt) + len(answer) for prompt, answer in pairs)
    answer_size = max(len(answer) for _, answer in pairs)
    ids_BS = torch.full((len(pairs), size), pad_id, dtype=torch.long)
    attention_BS = torch.zeros((len(pairs), size), dtype=torch.bool)
    answer_BS = torch.zeros((len(pairs), size), dtype=torch.bool)
    answer_BT = torch.zeros((len(pairs), answer_size), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids_BS[row, :end] = torch.tensor(prompt + answer)
        attention_BS[row, :end] = True
        answer_BS[row, len(prompt) : end] = True
        answer_BT[row, : len(answer)] = True
    return Batch(*(t.to(device) for t in (ids_BS, attention_BS, answer_BS, answer_BT)))


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Last hidden states BSH of the decoder, with whatever adapter is active on `model`."""
    decoder = base_model(model).get_decoder()
    output = decoder(input_ids=batch.ids_BS, attention_mask=batch.attention_BS.long(), use_cache=False)
    return output.last_hidden_state


def before_answers(hidden_BSH: Tensor, batch: Batch) -> Tensor:
    """Hidden states NH from which each answer token is predicted: those one position before it.

    Two-dimensional on purpose: a 3-D slice times the vocabulary matrix makes a batched product that copies that matrix
    for every row.
    """
    return hidden_BSH[:, :-1][batch.answer_BS[:, 1:]]


def vocabulary_logits(model: Any, hidden_NH: Tensor) -> Tensor:
    """Logits NV in f32 as the model's own forward makes them, including its scaling or soft cap where it has one."""
    model = base_model(model)
    logits_NV = model.get_output_embeddings()(hidden_NH).float()
    config = model.config.get_text_config()
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere and Falcon-H1 multiply
        if scale := getattr(config, name, None):
            logits_NV = logits_NV * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides
        logits_NV = logits_NV / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma-2
        logits_NV = torch.tanh(logits_NV / cap) * cap
    return logits_NV


# Positions whose logits are held at a time; beyond it, tiles are computed again in the backward pass.
TILE = 2048


def by_tiles(
    function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, tile: int | None = None
) -> tuple[Tensor, ...]:
    """`function` of N positions at a time, joined: its logits exist for one tile only, in the backward pass too.

    Up to one tile it is called as it is, and what it holds is kept for the backward pass.
    """
    size = TILE if tile is None else tile
    if len(inputs[0]) <= size:
        return function(*inputs)
    parts = []
    for tiles in zip(*(values.split(size) for values in inputs), strict=True):
        parts.append(checkpoint(function, *tiles, use_reentrant=False) if torch.is_grad_enabled() else function(*tiles))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model under a PEFT wrapper (adapters stay in force), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def answer_logprobs(
    model: Any,
    pairs: Sequence[Pair],
    pad_id: int,
    *,
    batch_size: int = 16,
    temperature: float = 1.0,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[Tensor]:
    """Log-probabilities in nats of every answer token, one f32 tensor per pair, in the order given.

    Rows are grouped by length, so that little padding is computed.
    """
    model.eval()
    device = next(model.parameters()).device
    result: list[Tensor] = [torch.empty(0)] * len(pairs)
    done = 0
    for indices in by_length(pairs, batch_size):
        batch = collate([pairs[i] for i in indices], pad_id, device)
        hidden_NH = before_answers(hidden_states(model, batch), batch)
        (logprobs_N,) = by_tiles(
            lambda hidden, targets: (token_logprobs(vocabulary_logits(model, hidden), targets, temperature),),
            hidden_NH,
            batch.targets_N,
        )
        logprobs_BT = batch.spread(logprobs_N)
        for row, index in enumerate(indices):
            result[index] = logprobs_BT[row][batch.answer_BT[row]].cpu()
        done += len(indices)
        on_progress(done)
    return result


def by_length(pairs: Sequence[Pair], batch_size: int) -> Iterator[list[int]]:
    """Indices of the pairs in batches of similar length, longest first (so that memory peaks at once)."""
    order = sorted(range(len(pairs)), key=lambda i: -(len(pairs[i][0]) + len(pairs[i][1])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
