"""Log-probabilities of given answers: the one forward pass that perplexity, KL, implicit rewards and PPO share.

Shapes: B rows, S positions of prompt + answer (padded right), T answer positions (left-aligned, padded right),
N answer tokens of all rows together, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from align.ppo.maths import token_entropy, token_logprobs

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


# What some configs do to the logits after the matrix.
SCALINGS = ("logit_scale", "lm_head_multiplier", "logits_scaling", "final_logit_softcapping")


def states_before_answers(model: Any, batch: Batch) -> Tensor:
    """`before_answers` of a forward pass that leaves out each row's last token, from which nothing is predicted."""
    attention_BS = batch.attention_BS.clone()
    attention_BS[torch.arange(len(attention_BS)), attention_BS.sum(1) - 1] = False
    return before_answers(hidden_states(model, dataclasses.replace(batch, attention_BS=attention_BS)), batch)


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
# With a frozen head nothing is kept for the backward pass, and logits exist for one block of the vocabulary at a time:
# small enough for a CPU's caches, large enough for its products.
FROZEN_TILE = {"cpu": 1024}
FROZEN_BLOCK = {"cpu": 4096}


def target_logprobs(model: Any, hidden_NH: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities N in nats of the targets, under softmax(logits / temperature) of the model's own head.

    Where the head is a plain frozen matrix, its gradient is taken along in the forward pass: that of a log-probability
    after the hidden state, `(W[target] - softmax(logits) W) / temperature`, depends on nothing that comes later, and it
    is as small as the hidden state. So logits exist for one tile only, once.

    Raises:
        ValueError: the temperature is not positive.
    """
    return token_figures(model, hidden_NH, targets_N, temperature, only_logprobs=True).logprobs_N


class TokenFigures(NamedTuple):
    """What a head says of given tokens, each N. Only the first has a gradient."""

    logprobs_N: Tensor  # nats
    entropy_N: Tensor  # nats
    mean_logit_N: Tensor
    is_top1_N: Tensor  # bool: no other token is likelier


def token_figures(
    model: Any, hidden_NH: Tensor, targets_N: Tensor, temperature: float = 1.0, only_logprobs: bool = False
) -> TokenFigures:
    """As `target_logprobs`, and what trainers log beside it; `only_logprobs` leaves the others 0."""
    head = base_model(model).get_output_embeddings()
    if _is_frozen_matrix(model, head):
        if temperature <= 0:
            raise ValueError(f"The temperature is {temperature}; it must be positive.")
        tile = FROZEN_TILE.get(hidden_NH.device.type, TILE)
        wants_grad = torch.is_grad_enabled() and hidden_NH.requires_grad
        settings = (temperature, tile, only_logprobs, wants_grad)
        return TokenFigures(*_FrozenHead.apply(hidden_NH, head.weight, targets_N, *settings))

    def figures(hidden_NH: Tensor, targets_N: Tensor) -> tuple[Tensor, ...]:
        logits_NV = vocabulary_logits(model, hidden_NH)
        logprobs_N = token_logprobs(logits_NV, targets_N, temperature)
        return logprobs_N, *_extras(logits_NV.detach() / temperature, targets_N, only_logprobs)

    return TokenFigures(*by_tiles(figures, hidden_NH, targets_N))


@torch.no_grad()
def _extras(logits_NV: Tensor, targets_N: Tensor, skip: bool) -> tuple[Tensor, Tensor, Tensor]:
    if skip:
        none_N = logits_NV.new_zeros(len(targets_N))
        return none_N, none_N, none_N.bool()
    return token_entropy(logits_NV, 1.0), logits_NV.mean(-1), logits_NV.argmax(-1) == targets_N


def _is_frozen_matrix(model: Any, head: Any) -> bool:
    """Whether logits are `hidden W^T` and nothing else, of a whole W without gradient."""
    config = base_model(model).config.get_text_config()
    scaled = any(getattr(config, name, None) for name in SCALINGS)
    if scaled or type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    if torch.is_autocast_enabled(head.weight.device.type):
        return False
    return not head.weight.requires_grad and not hasattr(head.weight, "ds_id") and not head._forward_hooks


class _FrozenHead(torch.autograd.Function):
    """TokenFigures of a frozen matrix, by tiles of positions and blocks of the vocabulary, with the gradient of the
    log-probabilities on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        temperature: float,
        tile: int,
        only_logprobs: bool,
        wants_grad: bool,
    ) -> tuple[Tensor, ...]:
        block = FROZEN_BLOCK.get(hidden_NH.device.type, len(weight_VH))
        grad_NH = torch.empty_like(hidden_NH) if wants_grad else None
        parts = []
        for start in range(0, max(len(hidden_NH), 1), tile):
            here = slice(start, start + tile)
            run = _OverVocabulary(hidden_NH[here], targets_N[here], wants_grad, only_logprobs)
            for first in range(0, len(weight_VH), block):
                run.add(weight_VH[first : first + block], first, temperature)
            parts.append(run.figures(len(weight_VH)))
            if grad_NH is not None:
                grad_NH[here] = (weight_VH[targets_N[here]] - run.mean_row()) / temperature
        if grad_NH is not None:
            ctx.save_for_backward(grad_NH)
        figures = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*figures[1:])
        return figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Any) -> tuple[Any, ...]:
        (grad_NH,) = ctx.saved_tensors
        return (grad_NH * grad_N[:, None]).to(grad_NH.dtype), None, None, None, None, None, None


class _OverVocabulary:
    """Sums over the vocabulary that a softmax needs, block by block, so that a block's logits stay in the caches.

    With m the largest logit so far, every sum is of terms times exp(logit - m); as m grows, the sums shrink with it.
    (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018.)
    """

    def __init__(self, hidden_NH: Tensor, targets_N: Tensor, wants_rows: bool, only_logprobs: bool) -> None:
        count, f32 = len(hidden_NH), {"dtype": torch.float32, "device": hidden_NH.device}
        self.hidden_NH, self.targets_N, self.only_logprobs = hidden_NH, targets_N, only_logprobs
        self.largest_N = torch.full((count,), -torch.inf, **f32)
        self.total_N = torch.zeros(count, **f32)  # of exp(logit - m)
        self.spread_N = torch.zeros(count, **f32)  # of exp(logit - m) (logit - m)
        self.logits_N = torch.zeros(count, **f32)  # of the logits
        self.chosen_N = torch.zeros(count, **f32)  # the target's logit
        self.rows_NH = torch.zeros_like(hidden_NH, dtype=torch.float32) if wants_rows else None  # of exp(..) W[row]

    def add(self, weight_vH: Tensor, first: int, temperature: float) -> None:
        """Take in the rows `first` and following of the matrix."""
        logits_Nv = (self.hidden_NH @ weight_vH.T).float()
        if temperature != 1:
            logits_Nv /= temperature
        place_N = self.targets_N - first
        inside_N = (place_N >= 0) & (place_N < len(weight_vH))
        own_N = logits_Nv.gather(1, place_N.clamp(0, len(weight_vH) - 1)[:, None])[:, 0]
        self.chosen_N = torch.where(inside_N, own_N, self.chosen_N)
        largest_N = torch.maximum(self.largest_N, logits_Nv.amax(-1))
        shrink_N = (self.largest_N - largest_N).exp_()
        if not self.only_logprobs:
            self.logits_N += logits_Nv.sum(-1)
        logits_Nv.sub_(largest_N[:, None])
        if self.only_logprobs:
            terms_Nv = logits_Nv.exp_()
        else:
            terms_Nv = logits_Nv.exp()
            # Terms so far are of another m: exp(l - m) (l - m) = shrink exp(l - m') (l - m' + m' - m).
            moved_N = torch.where(self.total_N > 0, self.total_N * (self.largest_N - largest_N), 0.0)
            self.spread_N = (self.spread_N + moved_N) * shrink_N + torch.linalg.vecdot(terms_Nv, logits_Nv)
        self.total_N = self.total_N * shrink_N + terms_Nv.sum(-1)
        if self.rows_NH is not None:
            self.rows_NH *= shrink_N[:, None]
            if weight_vH.dtype == torch.float32:
                self.rows_NH.addmm_(terms_Nv, weight_vH)
            else:
                self.rows_NH += terms_Nv.to(weight_vH.dtype) @ weight_vH
        self.largest_N = largest_N

    def figures(self, size: int) -> tuple[Tensor, ...]:
        """The parts of TokenFigures."""
        logprobs_N = self.chosen_N - self.largest_N - self.total_N.log()
        if self.only_logprobs:
            none_N = torch.zeros_like(logprobs_N)
            return logprobs_N, none_N, none_N, none_N.bool()
        entropy_N = self.total_N.log() - self.spread_N / self.total_N
        return logprobs_N, entropy_N, self.logits_N / size, self.chosen_N >= self.largest_N

    def mean_row(self) -> Tensor:
        """The matrix's mean row NH under the softmax."""
        assert self.rows_NH is not None
        return self.rows_NH / self.total_N[:, None]


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
    together: int = 1,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[Tensor]:
    """Log-probabilities in nats of every answer token, one f32 tensor per pair, in the order given.

    Rows are grouped by length, so that little padding is computed.

    Args:
        together: so many consecutive pairs stay in one batch, where `share_prefixes` finds what they have in common.
    """
    model.eval()
    device = next(model.parameters()).device
    result: list[Tensor] = [torch.empty(0)] * len(pairs)
    done = 0
    for indices in by_length(pairs, batch_size, together):
        batch = collate([pairs[i] for i in indices], pad_id, device)
        hidden_NH = states_before_answers(model, batch)
        logprobs_BT = batch.spread(target_logprobs(model, hidden_NH, batch.targets_N, temperature))
        for row, index in enumerate(indices):
            result[index] = logprobs_BT[row][batch.answer_BT[row]].cpu()
        done += len(indices)
        on_progress(done)
    return result


def by_length(pairs: Sequence[Pair], batch_size: int, together: int = 1) -> Iterator[list[int]]:
    """Indices of the pairs in batches of similar length, longest first (so that memory peaks at once); of every
    `together` consecutive pairs, all are in the same batch."""
    runs = [range(first, min(first + together, len(pairs))) for first in range(0, len(pairs), together)]
    runs.sort(key=lambda run: -max(len(pairs[i][0]) + len(pairs[i][1]) for i in run))
    count = max(1, batch_size // together)
    for start in range(0, len(runs), count):
        yield [i for run in runs[start : start + count] for i in run]
