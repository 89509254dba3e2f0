"""Stage 2, sample: several answers to every prompt, from one or several policies, ready to be compared.

Writes comparisons.jsonl: `{id, prompt, split, answers: [{text, model, sampling}]}`. Answers that say the same are kept
once; a prompt with fewer than two different answers is left out and counted. Both sides of the split are sampled: the
test side's comparisons become the held-out preferences that reward and dpo are measured on.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from align import models, progress, ranks
from align.config import Config
from align.data.load import load_demonstrations, load_prompts, unique_prompts
from align.data.render import fit, prompt_ids
from align.generate import Answer, sample_together
from align.runs import Run, done_digest, read_info
from reward.records import InputError, Record, digest, write_jsonl


def run_sample(config: Config, run: Run) -> dict[str, Any]:
    """Sample; returns how many comparisons, answers, duplicates and unfinished answers there are."""
    section = config.sample
    prompts = gather_prompts(config)
    base = sft_model(config)
    tokenizer = models.load_tokenizer(base, config.model)
    kept, too_long = fitting_prompts(run, tokenizer, prompts, section.max_prompt_length)
    kept = kept[: section.max_prompts]
    counts = {record["split"]: 0 for record in kept} | Counter(record["split"] for record in kept)
    progress.say(
        f"  {len(kept)} prompts {counts}, {section.answers_per_prompt} answers each from {', '.join(section.policies)}"
    )

    answers: dict[str, list[Record]] = {record["prompt_id"]: [] for record in kept}
    unfinished = 0
    for number, (policy, share) in enumerate(_shares(section.policies, section.answers_per_prompt)):
        rows = [record for record in kept for _ in range(share)]
        found = _answers(config, run, number, policy, tokenizer, rows)
        sampling = {key: getattr(section, key) for key in ("temperature", "top_p", "top_k", "max_new_tokens")}
        for row, answer in zip(rows, found, strict=True):
            unfinished += not answer.finished
            own = {**sampling, "seed": config.seed, "finished": answer.finished}
            answers[row["prompt_id"]].append({"text": answer.text, "model": policy, "sampling": own})
    if not ranks.is_first():
        return {}

    comparisons, duplicates, alone = [], 0, 0
    for record in kept:
        different = {answer["text"]: answer for answer in reversed(answers[record["prompt_id"]])}
        duplicates += len(answers[record["prompt_id"]]) - len(different)
        if len(different) < 2:
            alone += 1
            continue
        texts = sorted(different.values(), key=lambda a: digest(a["text"]))  # an order that tells nothing of the model
        comparisons.append(
            {
                "id": f"{config.name}-{record['prompt_id']}",
                "prompt": record["prompt"],
                "split": record["split"],
                "answers": texts,
            }
        )
    if not comparisons:
        raise InputError(
            f"no prompt of {len(kept)} got two different answers: raise sample.temperature or answers_per_prompt."
        )
    write_jsonl(run.folder / "comparisons.jsonl", comparisons)
    return {
        "comparisons": dict(Counter(comparison["split"] for comparison in comparisons)),
        "answers": sum(len(comparison["answers"]) for comparison in comparisons),
        "duplicates_dropped": duplicates,
        "prompts_without_two_answers": alone,
        "prompts_too_long": len(too_long),
        "unfinished_answers": unfinished,
    }


def _answers(config: Config, run: Run, number: int, policy: str, tokenizer: Any, rows: list[Record]) -> list[Answer]:
    """One answer of a policy to each of the prompts, by all processes together."""
    path = policy_folder(config, policy)
    return sample_together(
        lambda: models.merged(models.load_policy(path, config.model)),
        tokenizer,
        [prompt_ids(tokenizer, record["prompt"]) for record in rows],
        config.sample,
        f"{config.seed} sample {number} {policy}",
        run.work / f"policy-{number}",
        f"sample: {policy}",
    )


def gather_prompts(config: Config) -> list[Record]:
    """Every prompt the pipeline knows, once: the demonstrations' and those of data.prompts, or the preferences'."""
    data = config.data
    groups = []
    if data.prompts:
        groups.append(load_prompts(data.prompts, data.test_share, data.max_rows).records)
    if data.demonstrations:
        groups.append(load_demonstrations(data.demonstrations, data.test_share, data.max_rows).records)
    if config.label.source == "dataset" and data.preferences:
        from align.data.load import load_preferences

        groups.append(load_preferences(data.preferences, data.test_share, data.max_rows).records)
    if not groups:
        raise InputError("there are no prompts: set data.prompts, data.demonstrations or data.preferences.")
    return unique_prompts(*groups)


def fitting_prompts(run: Run, tokenizer: Any, records: list[Record], limit: int) -> tuple[list[Record], list[Record]]:
    """(prompts of at most `limit` tokens, longer ones); the longer ones are counted aloud and kept in dropped.jsonl."""
    key = f"{run.stage}.max_prompt_length"
    kept, too_long = fit(records, lambda r: len(prompt_ids(tokenizer, r["prompt"])), limit, "prompts", key)
    if too_long:
        progress.say(f"  left out {len(too_long)} prompts longer than max_prompt_length={limit} tokens")
    if run.writer:
        reason = f"longer than max_prompt_length={limit} tokens"
        write_jsonl(run.folder / "dropped.jsonl", [{"reason": reason, "record": record} for record in too_long])
    return kept, too_long


def sft_model(config: Config) -> str:
    """The model every stage after sft stands on: the sft stage's, or the base itself in a pipeline without sft."""
    if "sft" not in config.stages:
        return models.base_path(config.model)
    done_digest(config.folder("sft"))
    return str((config.folder("sft") / "model").resolve())


def policy_folder(config: Config, policy: str) -> str:
    """Where a policy lies: base, sft, dpo, ppo of this pipeline, or the folder of any finished run."""
    if policy == "base":
        return models.base_path(config.model)
    if policy == "sft":
        return sft_model(config)
    folder = config.folder(policy) if policy in ("dpo", "ppo") else Path(policy)
    done_digest(folder)
    if (read_info(folder) or {}).get("stage") not in ("sft", "dpo", "ppo"):
        raise InputError(
            f"{folder} holds no policy: give base, sft, or the folder of a finished sft, dpo or ppo stage."
        )
    return str((folder / "model").resolve())


def _shares(policies: list[str], answers: int) -> list[tuple[str, int]]:
    """How many answers each policy gives: 5 answers of 2 policies are 3 and 2."""
    each, extra = divmod(answers, len(policies))
    if each == 0:
        raise InputError(
            f"sample.policies names {len(policies)} policies, but answers_per_prompt is {answers}: raise it."
        )
    return [(policy, each + (index < extra)) for index, policy in enumerate(policies)]
