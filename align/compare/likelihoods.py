"""What two models make of the same answers: exact KL, entropy and log-probabilities, by one forward pass of each.

Shapes: B rows, S positions, N answer tokens of all rows of a batch together, n of them in one tile, H hidden size,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from align.logprobs import Pair, base_model, by_length, by_tiles, collate, states_before_answers, vocabulary_logits
from align.ppo.cast import switched
from align.ppo.maths import full_kl, token_entropy, token_logprobs
from align.stepper import DECODERS
from reward.statistics import MeanFigure, mean_with_interval

ADAPTER_OFF: Literal["adapter off"] = "adapter off"

# Logits a model holds at a time: large enough for a CPU's products, small enough beside its caches and a GPU's memory.
LOGITS = {"cpu": 2**23}
LOGITS_ELSEWHERE = 2**26


class AnswerFigures(NamedTuple):
    """One answer under the policy and, where there is one, the reference."""

    logprob: float  # log pi(answer), nats
    ref_logprob: float | None  # log ref(answer), nats
    kl: float | None  # nats per answer, along its positions
    entropy: float  # nats per token: the mean over its positions
    tokens: int


@torch.no_grad()
def answer_figures(
    policy: Any,
    reference: Any,
    pairs: Sequence[Pair],
    pad_id: int,
    *,
    batch_size: int = 16,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[AnswerFigures]:
    """Figures of every answer, in the order given; they do not depend on the batch size beyond rounding.

    The KL of an answer y to a prompt x is summed over its positions, at each of them over the whole vocabulary:

        kl(x, y) = sum_t sum_v pi(v | x, y_<t) (log pi(v | x, y_<t) - log ref(v | x, y_<t))

    Given the states it is exact and never negative. Over answers that pi sampled at temperature 1, from its whole
    vocabulary, its mean is KL(pi || ref) between distributions over answers of at most that many tokens, by the chain
    rule of relative entropy (Cover & Thomas 2006, theorem 2.5.3); the same expectation as that of log pi(y) -
    log ref(y), with a variance that is never larger and mostly far smaller (arXiv 2504.10637).

    Args:
        reference: a model with the policy's tokens; `ADAPTER_OFF`, where the policy is a `PeftModel` and the
            reference its base; or None, and there is neither ref_logprob nor kl.
        pairs: prompt and answer tokens, the stop token included where the answer has one.
        on_progress: called with the number of pairs done.

    Raises:
        ValueError: an empty prompt or answer, a policy without an adapter to switch off, or vocabularies of two sizes.
    """
    if empty := [i for i, (prompt, answer) in enumerate(pairs) if not prompt or not answer]:
        raise ValueError(f"Pairs {empty[:5]} have no prompt or no answer; at least one token of each is wanted.")
    if isinstance(reference, str) and (reference != ADAPTER_OFF or not hasattr(policy, "disable_adapter")):
        raise ValueError(
            f"The reference is {reference!r} and the policy a {type(policy).__name__}; wanted are a model, None, or "
            f"{ADAPTER_OFF!r} with a PeftModel."
        )
    other = policy if isinstance(reference, str) else reference

    def off() -> contextlib.AbstractContextManager[None]:
        return switched(policy, None) if isinstance(reference, str) else contextlib.nullcontext()

    policy.eval()
    if other is not None:
        other.eval()
    device = next(policy.parameters()).device

    def figures(hidden_nH: Tensor, ref_nH: Tensor, targets_n: Tensor) -> tuple[Tensor, ...]:
        logits_nV = vocabulary_logits(policy, hidden_nH)
        own = token_logprobs(logits_nV, targets_n, 1.0), token_entropy(logits_nV, 1.0)
        if other is None:
            return own
        with off():  # an adapter may be on the head too
            ref_nV = vocabulary_logits(other, ref_nH)
        return *own, token_logprobs(ref_nV, targets_n, 1.0), full_kl(logits_nV, ref_nV, 1.0)

    below = _below_adapter(policy) if isinstance(reference, str) else []
    places = base_model(policy).config.get_text_config().vocab_size
    tile = max(1, LOGITS.get(device.type, LOGITS_ELSEWHERE) // places)
    result: list[AnswerFigures] = [AnswerFigures(0.0, None, None, 0.0, 0)] * len(pairs)
    done = 0
    for indices in by_length(pairs, batch_size):
        batch = collate([pairs[i] for i in indices], pad_id, device)
        with _kept(below) as kept:
            hidden_NH = ref_NH = states_before_answers(policy, batch)
        if other is not None:
            with off(), _given(below, kept):
                ref_NH = states_before_answers(other, batch)
        rows = by_tiles(figures, hidden_NH, ref_NH, batch.targets_N, tile=tile)
        sums = [batch.spread(values_N.double()).sum(1).tolist() for values_N in rows]
        for row, index in enumerate(indices):
            tokens = len(pairs[index][1])
            logprob, entropy, *compared = (values_B[row] for values_B in sums)
            ref_logprob, kl = compared or (None, None)
            result[index] = AnswerFigures(logprob, ref_logprob, kl, entropy / tokens, tokens)
        done += len(indices)
        on_progress(done)
    return result


# Below an adapter on the upper layers, the model is its own reference: those layers run once for both.


def _below_adapter(model: Any) -> list[Any]:
    """The layers before the first one that an adapter changes; none where the embedding or a stranger has one.

    Only of decoders known to hand nothing but the hidden state from layer to layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    decoder = base_model(model).get_decoder()
    if type(decoder).__name__ not in DECODERS or type(decoder).__module__.split(".")[0] != "transformers":
        return []

    def changed(module: Any) -> bool:
        return any(isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for part in module.modules())

    if any(changed(part) for name, part in decoder.named_children() if name not in ("layers", "norm")):
        return []
    return list(itertools.takewhile(lambda layer: not changed(layer), decoder.layers))


@contextlib.contextmanager
def _kept(layers: list[Any]) -> Iterator[list[Any]]:
    """A list that holds, after a forward pass, what the last of the layers put out."""
    kept: list[Any] = []
    hooks = [layer.register_forward_hook(lambda *told: kept.append(told[-1])) for layer in layers[-1:]]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _given(layers: list[Any], kept: list[Any]) -> Iterator[None]:
    """For the time of a block the layers compute nothing and put out what was kept."""
    own = [vars(layer).get("forward") for layer in layers]  # where accelerate or another has put one
    try:
        for layer in layers:
            layer.forward = lambda *_, **__: kept[0]
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def perplexity_figure(losses: Sequence[float], seed: int) -> MeanFigure:
    """exp of the mean over demonstrations of their loss in nats per token, and of the ends of its interval.

    Each demonstration counts alike, however long. The standard error is the loss's times the perplexity (delta method).

    Raises:
        ValueError: no losses, or one that is not finite.
    """
    loss = mean_with_interval(losses, seed=seed).record()
    mean, error = math.exp(loss["mean"]), loss["standard_error"]
    ends = {end: None if loss[end] is None else math.exp(loss[end]) for end in ("low", "high")}
    figure = {"mean": mean, **ends, "standard_error": None if error is None else mean * error, "n": loss["n"]}
    return cast(MeanFigure, figure)
