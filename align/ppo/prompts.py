"""What PPO reads: prompts with their columns, and demonstrations to mix in, as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from align.data.render import answer_ids, prompt_ids
from align.logprobs import Pair
from reward.records import InputError


@dataclass
class Prompt:
    """A prompt as the dataset gave it (text or conversation), its tokens, and the dataset's other columns."""

    ids: list[int]
    prompt: Any
    columns: dict[str, Any] = field(default_factory=dict)


def read_prompts(dataset: Any, tokenizer: Any, what: str) -> list[Prompt]:
    """The rows of a prompt-only dataset, tokenised; text as it is, conversations by the chat template."""
    prompts: list[Prompt] = []
    for index, row in enumerate(dataset):
        if "prompt" not in row:
            raise InputError(f"{what} has the columns {', '.join(row)}; ppo wants `prompt`, text or a conversation.")
        prompt = row["prompt"]
        talk = not isinstance(prompt, str)
        if talk and not tokenizer.chat_template:
            raise InputError(
                f"{what} has conversations, but the tokenizer has no chat template: set one, or give text."
            )
        ids = prompt_ids(tokenizer, prompt) if talk else list(tokenizer(prompt)["input_ids"])
        if not ids:
            raise InputError(f"prompt {index} of {what} ({prompt!r}) has no tokens: leave it out.")
        prompts.append(Prompt(ids, prompt, {name: value for name, value in row.items() if name != "prompt"}))
    if not prompts:
        raise InputError(f"{what} is empty: ppo needs prompts.")
    return prompts


def read_demonstration(row: Mapping[str, Any], tokenizer: Any) -> Pair:
    """(prompt tokens, answer tokens) of `{prompt, completion}`, text or conversations."""
    if "prompt" not in row or "completion" not in row:
        raise InputError(f"ptx_dataset has the columns {', '.join(row)}; `prompt` and `completion` are wanted.")
    if isinstance(row["prompt"], str):
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        return list(tokenizer(row["prompt"])["input_ids"]), [*answer, tokenizer.eos_token_id]
    return prompt_ids(tokenizer, row["prompt"]), answer_ids(tokenizer, row["prompt"], row["completion"])
