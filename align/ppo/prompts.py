"""What PPO reads: prompts with their columns, and demonstrations to mix in, as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        _check_columns(row, ("prompt",), what)
        prompt = row["prompt"]
        talk = not isinstance(prompt, str)
        if talk and not isinstance(prompt, (list, tuple)):
            raise InputError(
                f"prompt {index} of {what} is {prompt!r}, a {type(prompt).__name__}: give text or a conversation."
            )
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


def read_demonstrations(dataset: Any, tokenizer: Any) -> list[Pair]:
    """(prompt tokens, answer tokens) of rows `{prompt, completion}`, both text or both conversations."""
    demonstrations: list[Pair] = []
    for index, row in enumerate(dataset):
        _check_columns(row, ("prompt", "completion"), "ptx_dataset")
        before, after = row["prompt"], row["completion"]
        is_text, is_talk = (all(isinstance(x, kind) for x in (before, after)) for kind in (str, (list, tuple)))
        if not (is_text or is_talk):
            raise InputError(
                f"demonstration {index} of ptx_dataset has a {type(before).__name__} as `prompt` and a "
                f"{type(after).__name__} as `completion`: give two texts or two conversations."
            )
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no stop token to put behind the answers of ptx_dataset: set one.")
        if is_text:
            answer = tokenizer(after, add_special_tokens=False)["input_ids"]
            pair = list(tokenizer(before)["input_ids"]), [*answer, tokenizer.eos_token_id]
        elif tokenizer.chat_template:
            pair = prompt_ids(tokenizer, before), answer_ids(tokenizer, before, after)
        else:
            raise InputError(
                "ptx_dataset has conversations, but the tokenizer has no chat template: set one, or give text."
            )
        if not pair[0]:
            raise InputError(f"the prompt of demonstration {index} of ptx_dataset has no tokens: leave it out.")
        demonstrations.append(pair)
    return demonstrations


def check_context(sizes: Sequence[int], room: int, config: Any, what: str) -> None:
    """Refuse rows that pass the model's context.

    Args:
        sizes: tokens of each row of `what` as it stands.
        room: tokens of answer that are to follow.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for index, size in enumerate(sizes):
        if context is not None and size + room > context:
            if not room:
                raise InputError(f"row {index} of {what} has {size} tokens, and the model's context is {context}.")
            raise InputError(
                f"prompt {index} of {what} has {size} tokens, and with response_length {room} it passes the model's "
                f"context of {context}: leave out such prompts or lower response_length."
            )


def _check_columns(row: Any, wanted: Sequence[str], what: str) -> None:
    names = " and ".join(f"`{name}`" for name in wanted)
    if not isinstance(row, Mapping):
        raise InputError(f"the rows of {what} are of the type {type(row).__name__}: give dicts with {names}.")
    if any(name not in row for name in wanted):
        raise InputError(f"{what} has the columns {', '.join(row)}; ppo wants {names}, text or a conversation.")
