"""Who is compared: models of this pipeline, any other model or run folder, or a file of answers made elsewhere.

A contestant brings its own tokenizer and chat template, and what is known of the prompts it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align import models, progress
from align.compare.places import OF_PIPELINE
from align.config import Config
from align.data.load import load_demonstrations, load_preferences, load_prompts, only
from align.data.render import fit, prompt_ids
from align.generate import Answer, sample_together
from align.policies import find_policy, run_folder
from align.ppo.rewards import same_tokenizer
from align.runs import Run, lineage
from align.sample import gather_prompts, policy_folder, sft_model
from reward.records import (
    InputError,
    Record,
    answer_text,
    digest,
    file_digest,
    prompt_id,
    read_jsonl,
    write_jsonl,
)

LOADERS = {"demonstrations": load_demonstrations, "prompts": load_prompts, "preferences": load_preferences}


@dataclass
class Contestant:
    """One of the models compared.

    Attributes:
        name: short, as the report calls it; no other has it.
        place: what the config says: base, sft, dpo, ppo, a folder, a hub id, or a JSONL file of answers.
        path: what is loaded; of a file of answers, the file.
        tokenizer: None for a file of answers.
        given: by prompt id, the answers of a file; None where a model answers.
        trained_on: ids of prompts it is known to have been trained on; None where that is not known.
    """

    name: str
    place: str
    path: str
    tokenizer: Any = None
    given: dict[str, str] | None = None
    trained_on: set[str] | None = field(default_factory=set)


def contestants(config: Config) -> list[Contestant]:
    """Those of `compare.models`, the one to beat first, by names of their own.

    Raises:
        InputError: one of them does not exist, is unfinished, or is no policy.
    """
    places = config.compared_models()
    found = [_contestant(config, place) for place in places]
    for number, one in enumerate(found):
        if (same := [other for other in found if other.name == one.name]) and same[0] is not one:
            one.name = f"{one.name} ({number + 1})"
    return found


def _contestant(config: Config, place: str) -> Contestant:
    if place in OF_PIPELINE:
        # Policies of a pipeline are trained on the SFT model's tokens and have its tokenizer.
        tokenizer = models.load_tokenizer(sft_model(config), config.model)
        return Contestant(place, place, policy_folder(config, place), tokenizer)
    path = Path(place)
    if path.is_file():
        return Contestant(path.stem, place, place, given=_answers_in(path), trained_on=None)
    run = run_folder(place)
    if path.is_dir() and not run and not any((path / f).is_file() for f in ("config.json", "adapter_config.json")):
        raise InputError(
            f"{path} is neither a stage's run folder (run.json) nor a model's (config.json, adapter_config.json): give "
            "one of these, a hub id, or a JSONL file of answers."
        )
    if not path.exists() and (path.is_absolute() or place.startswith((".", "~")) or path.suffix == ".jsonl"):
        raise InputError(f"compare.models: {place} does not exist: give a folder, a hub id or a JSONL of answers.")
    found = find_policy(str(run or place), config.model)
    name = f"{found.pipeline}/{found.name}" if run else Path(place).name
    tokenizer = models.load_tokenizer(found.tokenizer, found.section)
    return Contestant(name, place, found.folder, tokenizer, trained_on=trained_prompts(run) if run else None)


def _answers_in(path: Path) -> dict[str, str]:
    """Answers by prompt id of a file of demonstrations, in any format the sft stage reads, or of an answers.jsonl."""
    # The share only decides sides, which do not matter here.
    loaded = load_demonstrations(path, test_share=0.5, keep_empty=True)
    return {prompt_id(record["prompt"]): answer_text(record["completion"]) for record in loaded.records}


def trained_prompts(folder: Path) -> set[str] | None:
    """Ids of the prompts behind a run folder: those of its pipeline's training side, stage by stage.

    None where a file it was trained on is gone or has changed, so that nothing certain can be said.
    """
    found: set[str] = set()
    for entry in lineage(folder):
        stage = Path(entry["folder"])
        if (labels := stage / "preferences.jsonl").is_file():
            found |= {prompt_id(r["prompt"]) for r in read_jsonl(labels) if r.get("split", "train") == "train"}
        data = yaml.safe_load((stage / "config.yaml").read_text("utf-8"))["data"]
        for key, load in LOADERS.items():
            if (file := data.get(key)) not in entry["data"]:
                continue
            if not Path(file).is_file() or file_digest(file) != entry["data"][file]:
                return None
            records = load(file, data["test_share"], data.get("max_rows")).records
            found |= {prompt_id(record["prompt"]) for record in records if record["split"] == "train"}
    return found


def chosen_prompts(config: Config, run: Run, found: Sequence[Contestant]) -> tuple[list[Record], dict[str, int]]:
    """(the prompts that all answer, by model how many were left out because it was trained on them).

    In a pipeline they are those of the test side; where models from elsewhere are compared and nothing is trained, all
    that the files hold. What is left out is counted aloud and kept in dropped.jsonl with its reason.

    Raises:
        InputError: none is left.
    """
    section = config.compare
    records = gather_prompts(config)
    if config.stages != ["compare"]:
        records = only("test", records, "prompts")
    dropped: list[Record] = []

    def leave_out(where: Any, reason: str, advice: str) -> int:
        nonlocal records
        out = [record for record in records if where(record)]
        dropped.extend({"reason": reason, "record": record} for record in out)
        records = [record for record in records if not where(record)]
        if out:
            progress.say(f"  left out {len(out)} prompts: {reason}")
        if not records:
            raise InputError(f"no prompt is left to compare on: all of the last {len(out)} are {reason}. {advice}")
        return len(out)

    seen = {}
    for one in found:
        if one.trained_on and (
            count := leave_out(
                lambda record, ids=one.trained_on: record["prompt_id"] in ids,
                f"in the training data of {one.name}",
                "Give prompts that it has not seen.",
            )
        ):
            seen[one.name] = count
        if one.given is not None:
            leave_out(
                lambda record, ids=one.given: record["prompt_id"] not in ids,
                f"without an answer in {one.place}",
                "Give a file with answers to these prompts.",
            )
    tokenizers = [one.tokenizer for one in found if one.tokenizer is not None]
    if tokenizers:

        def length(record: Record) -> int:
            return max(len(prompt_ids(tokenizer, record["prompt"])) for tokenizer in tokenizers)

        limit = section.max_prompt_length
        _, too_long = fit(records, length, limit, "prompts", "compare.max_prompt_length")
        if too_long:
            leave_out(
                lambda record, ids={r["prompt_id"] for r in too_long}: record["prompt_id"] in ids,
                f"longer than max_prompt_length={limit} tokens",
                "Raise compare.max_prompt_length.",
            )
    if run.writer:
        write_jsonl(run.folder / "dropped.jsonl", dropped)
    return records[: section.max_prompts], seen


def answers_of(
    config: Config, run: Run, one: Contestant, prompts: Sequence[Record], label: str, seed: str = ""
) -> list[Answer]:
    """One answer to every prompt, by all processes together; what was sampled before an interruption is read back.

    Args:
        label: tells this work from other work of the run; a model answers under one label once.
        seed: makes answers of one model to the same prompts different.
    """
    if one.given is not None:
        return [Answer([], one.given[record["prompt_id"]].strip(), True) for record in prompts]
    return sample_together(
        lambda: models.merged(models.load_policy(one.path, config.model)),
        one.tokenizer,
        [prompt_ids(one.tokenizer, record["prompt"]) for record in prompts],
        config.compare,
        f"{config.seed} compare{seed}",  # the same for every model: where two models agree, so do their answers
        run.work / f"answers-{label}",
        f"compare: {one.name} answers",
    )


def differences(found: Sequence[Contestant]) -> list[str]:
    """Sentences on what a reader must know where contestants read prompts differently."""
    first, said = found[0], []
    for one in found[1:]:
        if one.tokenizer is None or first.tokenizer is None:
            continue
        if reason := same_tokenizer(first.tokenizer, one.tokenizer):
            said.append(
                f"{one.name} has another tokenizer than {first.name} ({reason}): lengths are counted in "
                "characters, and perplexities and KL are not compared."
            )
        elif first.tokenizer.chat_template != one.tokenizer.chat_template:
            said.append(f"{one.name} has another chat template than {first.name}: each was asked by its own.")
    return said


def same_tokens(one: Any, other: Any) -> bool:
    """Whether token counts and log-probabilities by two tokenizers can be compared; None is no tokenizer."""
    if one is None or other is None:
        return False
    return one is other or same_tokenizer(one, other) is None


def prompts_digest(prompts: Sequence[Record]) -> str:
    """sha256 over the prompts, in their order."""
    return digest([record["prompt"] for record in prompts])
