"""The tokenizer of a stage, and whether stages that build on one another render conversations alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from align import models
from align.check.findings import Finding, refused, warned
from align.config import Config
from align.runs import is_done
from reward.records import InputError, Message

# What every template renders: some refuse a system turn.
_PROBE: list[Message] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Why?"},
]


def model_of(config: Config, stage: str) -> str:
    """Where the model lies that a stage begins with: the SFT model once there is one, else the base."""
    if stage == "reward" and config.reward.base:
        return models.base_path(config.model.model_copy(update={"base": config.reward.base, "quantization": None}))
    if stage != "sft" and "sft" in config.stages and is_done(config.folder("sft")):
        return str((config.folder("sft") / "model").resolve())
    return models.base_path(config.model)


def tokenizer_of(config: Config, stage: str) -> Any:
    """The tokenizer that the stage renders its rows with. The SFT model has that of its base.

    Raises:
        InputError: there is none, or it lacks a chat template that works, a stop token or a token to pad with.
    """
    if stage == "reward" and config.reward.base:
        return models.load_reward_tokenizer(model_of(config, stage))
    tokenizer = models.load_tokenizer(model_of(config, stage), config.model)
    try:
        tokenizer.apply_chat_template(_PROBE[:1], add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"the chat template cannot be used, as it fails on a single user turn ({error}): mend it, or set "
            "model.chat_template to another."
        ) from None
    return tokenizer


def places_of(config: Config, stage: str) -> int | None:
    """Places that the stage's model has for tokens; None where no config.json at hand says it."""
    folder = Path(model_of(config, stage))
    if (folder / "adapter_config.json").is_file():
        folder = Path(models.base_path(config.model))
    try:
        told = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    places = told.get("max_position_embeddings") or (told.get("text_config") or {}).get("max_position_embeddings")
    return int(places) if places else None


def alike(config: Config, stage: str, tokenizer: Any) -> list[Finding]:
    """Where the models of other stages, or of other runs, were trained with another chat template or vocabulary."""
    return [
        finding
        for who, folder in _others(config, stage)
        if (finding := _compared(config, stage, tokenizer, who, folder))
    ] + _dated(stage, tokenizer)


def _others(config: Config, stage: str) -> list[tuple[str, Path]]:
    """(name, folder of the model) of everything finished that the stage builds on or samples from."""
    found = []
    if stage != "sft" and "sft" in config.stages and not (stage == "reward" and config.reward.base):
        found.append(("sft", config.folder("sft")))
    if stage == "ppo" and "reward" in config.ppo.rewards and config.reward.base is None:
        found.append(("reward", config.folder("reward")))
    if stage == "sample":
        found += [(policy, Path(policy)) for policy in config.sample.policies if Path(policy).is_dir()]
    return [(name, folder / "model") for name, folder in found if is_done(folder)]


def _compared(config: Config, stage: str, tokenizer: Any, who: str, folder: Path) -> Finding | None:
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the tokenizer of {who} from {folder}: {str(error).splitlines()[0]}") from None
    if other.chat_template:
        then, now = (str(each.apply_chat_template(_PROBE, tokenize=False)) for each in (other, tokenizer))
        if other.chat_template != tokenizer.chat_template and then != now:
            where = next(
                (i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now))
            )
            start = max(0, where - 20)
            source = f"model.chat_template {config.model.chat_template}" if config.model.chat_template else "this one"
            return refused(
                stage,
                f"{who} was trained with another chat template: {folder} writes {then[start : where + 20]!r}, "
                f"{source} writes {now[start : where + 20]!r}. Set model.chat_template back to what it was, or run "
                f"{who} again.",
            )
    if other.get_vocab() != tokenizer.get_vocab():
        return refused(
            stage,
            f"{who} has another vocabulary ({len(other)} tokens in {folder}, here {len(tokenizer)}): the same text is "
            "other tokens to it; take a run on the same base.",
        )
    return None


def _dated(stage: str, tokenizer: Any) -> list[Finding]:
    if "strftime_now" not in str(tokenizer.chat_template or ""):
        return []
    return [
        warned(
            stage,
            "the chat template writes today's date into prompts, so that stages of different days read different "
            "prompts: set model.chat_template to a copy without strftime_now.",
        )
    ]
