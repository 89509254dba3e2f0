"""How far every model has moved from the reference, how sure it is, and what it still knows: by forward passes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align import models, progress, training
from align.compare.contestants import Contestant, same_tokens
from align.compare.judging import Answered
from align.compare.likelihoods import ADAPTER_OFF, AnswerFigures, answer_figures, perplexity_figure
from align.config import Config
from align.data.render import answer_ids, prompt_ids
from align.lean import lean_reading
from align.logprobs import Pair, answer_logprobs
from align.sample import sft_model
from reward.records import Record
from reward.statistics import MeanFigure


@dataclass(frozen=True)
class Reference:
    """The model that KL is measured to: a pipeline's SFT model (its base, without sft); elsewhere, the first model."""

    name: str
    path: str
    tokenizer: Any


def reference_of(config: Config, found: Sequence[Contestant]) -> Reference | None:
    """None where the first of models from elsewhere is a file of answers."""
    if config.stages == ["compare"]:
        first = found[0]
        return Reference(first.name, first.path, first.tokenizer) if first.tokenizer is not None else None
    path = sft_model(config)
    return Reference("sft" if "sft" in config.stages else "base", path, models.load_tokenizer(path, config.model))


@dataclass
class Measured:
    """By model: figures of every answer, in the order of the prompts (None for an empty one), and perplexities."""

    answers: dict[str, list[AnswerFigures | None]]
    perplexity: dict[str, MeanFigure]


def measure(
    config: Config,
    found: Sequence[Contestant],
    seen: Answered,
    reference: Reference | None,
    demonstrations: Sequence[Record],
) -> Measured:
    """KL, entropy and perplexity of every model that can be loaded.

    KL is exact at every position of an answer that the policy itself sampled at temperature 1; where answers are not
    sampled so, it is left out, because its mean over them is not KL(pi || reference). Perplexity is compared only
    between models of the reference's tokens.

    Args:
        demonstrations: held out, `{prompt, completion}`.
    """
    whole = config.compare.temperature == 1 and config.compare.top_p == 1 and config.compare.top_k == 0
    rows = [] if reference is None else _rows(config, reference.tokenizer, demonstrations)
    measured = Measured({}, {})
    for one in found:
        if one.tokenizer is None:
            continue
        comparable = reference is not None and same_tokens(one.tokenizer, reference.tokenizer)
        # The base was before the reference: it has not moved away from it.
        moved = whole and one.place != "base" and reference is not None and comparable and one.path != reference.path
        pairs = [(p, a.ids) for p, a in zip(seen.prompt_ids[one.name], seen.answers[one.name], strict=True)]
        told = rows if comparable else []
        with progress.bar(f"compare: {one.name} likelihoods", len(pairs) + len(told)) as report:
            measured.answers[one.name], model = along(
                config, one.path, pairs, one.tokenizer.pad_token_id, reference if moved else None, report
            )
            if told:
                likely = answer_logprobs(
                    models.merged(model), told, one.tokenizer.pad_token_id, on_progress=_after(report, len(pairs))
                )
                losses = [float(-logprobs.mean()) for logprobs in likely]
                measured.perplexity[one.name] = perplexity_figure(losses, config.seed)
        del model
        training.release()
    return measured


def along(
    config: Config,
    path: str,
    pairs: Sequence[Pair],
    pad_id: int,
    reference: Reference | None,
    on_progress: Callable[[int], object] = lambda done: None,
) -> tuple[list[AnswerFigures | None], Any]:
    """(figures of a policy's own answers, None for an empty one; the policy, loaded).

    An adapter on the reference is switched off for the second pass; else the reference is loaded beside the policy.
    """
    model = models.load_policy(path, config.model)
    lean_reading(model)
    other: Any = None
    if reference is not None:
        on_it = hasattr(model, "peft_config") and _base_of(path) == reference.path
        other = ADAPTER_OFF if on_it else models.merged(models.load_policy(reference.path, config.model))
    kept = [pair for pair in pairs if pair[1]]
    found = iter(answer_figures(model, other, kept, pad_id, on_progress=on_progress))
    return [next(found) if answer else None for _, answer in pairs], model


def _base_of(path: str) -> str:
    return str(json.loads((Path(path) / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"])


def _after(report: Callable[[int], object], done: int) -> Callable[[int], object]:
    return lambda count: report(done + count)


def _rows(config: Config, tokenizer: Any, demonstrations: Sequence[Record]) -> list[Pair]:
    """Prompt and answer tokens of the demonstrations of the test side; at most compare.max_prompts."""
    rows = [record for record in demonstrations if record["split"] == "test"]
    pairs = [(prompt_ids(tokenizer, r["prompt"]), answer_ids(tokenizer, r["prompt"], r["completion"])) for r in rows]
    limit = config.sft.max_length
    kept = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= limit]
    if len(kept) < len(pairs):
        progress.say(f"  left out {len(pairs) - len(kept)} of {len(pairs)} demonstrations longer than {limit} tokens")
    return kept[: config.compare.max_prompts]
