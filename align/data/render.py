"""From conversations to tokens, with a mask that says which tokens are the answer.

The mask is found by rendering, not by searching for markers: the chat template is applied to the prompt (with its
generation prompt) and to the whole conversation; what the second adds to the first is the answer. It runs up to and
including the stop token, so that a model trained on it learns to stop; what a template writes after the stop token (a
newline, mostly) is not part of the answer, because generation never produces it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from reward.records import InputError, Message, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """Tokens of a prompt up to the point where the assistant begins to answer."""
    rendered = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)
    return list(rendered["input_ids"])


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answer: Sequence[Message]) -> list[int]:
    """Tokens of an answer after `prompt_ids`, up to and including the stop token.

    Raises:
        InputError: the template renders the prompt differently once an answer follows, or never writes a stop token.
    """
    before = prompt_ids(tokenizer, prompt)
    rendered = tokenizer.apply_chat_template([*prompt, *answer], return_dict=True)
    whole = list(rendered["input_ids"])
    tail = whole[len(before) :]
    if whole[: len(before)] != before:
        alone = str(tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False))
        text = str(tokenizer.apply_chat_template([*prompt, *answer], tokenize=False))
        if not text.startswith(alone):
            border = next((i for i, (a, b) in enumerate(zip(alone, text, strict=False)) if a != b), len(text))
            start = max(0, border - 20)
            raise InputError(
                "the chat template renders a prompt differently once an answer follows, so the answer's tokens cannot "
                f"be told apart; at the border it writes {alone[start : border + 20]!r} alone and "
                f"{text[start : border + 20]!r} with the answer. Set model.chat_template."
            )
        # Same text, other tokens: the answer's first characters (a newline, mostly) merged with the prompt's last
        # token. Generation starts from the prompt's own tokens and never sees that merge, so neither does training.
        tail = tokenizer(text[len(alone) :], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id not in tail:
        raise InputError(
            f"the chat template writes no stop token ({tokenizer.eos_token}) after an answer, so the model would never "
            "learn to stop: set model.chat_template to one that does."
        )
    stop = len(tail) - 1 - tail[::-1].index(tokenizer.eos_token_id)
    return tail[: stop + 1]


def demonstration_row(tokenizer: PreTrainedTokenizerBase, record: Record) -> Record:
    """`{input_ids, labels}` of a demonstration; labels are -100 everywhere but on answer tokens."""
    before = prompt_ids(tokenizer, record["prompt"])
    answer = answer_ids(tokenizer, record["prompt"], record["completion"])
    return {"input_ids": before + answer, "labels": [-100] * len(before) + answer}


def preference_row(tokenizer: PreTrainedTokenizerBase, record: Record) -> Record:
    """`{prompt_ids, chosen_ids, rejected_ids}` of a preference; chosen and rejected are answer tokens only."""
    return {
        "prompt_ids": prompt_ids(tokenizer, record["prompt"]),
        "chosen_ids": answer_ids(tokenizer, record["prompt"], record["chosen"]),
        "rejected_ids": answer_ids(tokenizer, record["prompt"], record["rejected"]),
    }


def pair_length(row: Record) -> int:
    """Tokens of a `preference_row` as max_length counts them, of the longer answer.

    One more for what a chat template writes after the stop token, which TRL's own rendering keeps.
    """
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) + 1


def fit(
    records: Sequence[Record],
    length: Callable[[Record], int],
    limit: int,
    what: str,
    key: str,
) -> tuple[list[Record], list[Record]]:
    """(records of at most `limit` tokens, longer ones). Longer ones are for the caller to report.

    Raises:
        InputError: nothing is left; names the limit, the longest and the config key to raise.
    """
    kept: list[Record] = []
    too_long: list[Record] = []
    longest = 0
    for record in records:
        tokens = length(record)
        longest = max(longest, tokens)
        (kept if tokens <= limit else too_long).append(record)
    if records and not kept:
        raise InputError(
            f"all {len(records)} {what} are longer than {key}={limit} tokens (the longest has {longest}): raise {key}."
        )
    return kept, too_long
