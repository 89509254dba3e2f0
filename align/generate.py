"""Sampling answers to many prompts, in batches of similar length, reproducibly and resumably."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.config import GenerationSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What a model's own generation_config.json may ask for and the section has no key for (Qwen2.5 ships a repetition
# penalty): with it answers would come from another distribution than the one whose log-probabilities we compute.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_p": None,
    "min_length": 0,
    "min_new_tokens": None,
    "guidance_scale": None,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}


@dataclass
class Answer:
    """One sampled answer. `finished` says that the model stopped by itself; `ids` then end with the stop token."""

    ids: list[int]
    text: str
    finished: bool


def batches(prompts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Indices of the prompts in batches of similar length: the unit of seeding and of resuming."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    section: GenerationSection,
    seed: str,
    skip: int = 0,
) -> Iterator[tuple[list[int], list[Answer]]]:
    """(indices, answers) batch by batch, leaving out the first `skip` batches.

    Every batch is seeded by (seed, number of the batch), so a resumed run gives the answers the first one would have.
    """
    model.eval()
    for number, indices in enumerate(batches(prompts, section.batch_size)):
        if number >= skip:
            torch.manual_seed(int(hashlib.sha256(f"{seed} {number}".encode()).hexdigest()[:15], 16))
            yield indices, generate_batch(model, tokenizer, [prompts[i] for i in indices], section)


def generate_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], section: GenerationSection
) -> list[Answer]:
    """Answers to one batch of tokenised prompts (padded left)."""
    device = next(model.parameters()).device
    size = max(map(len, prompts))
    ids_BS = torch.full((len(prompts), size), tokenizer.pad_token_id, dtype=torch.long)
    attention_BS = torch.zeros((len(prompts), size), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BS[row, size - len(prompt) :] = torch.tensor(prompt)
        attention_BS[row, size - len(prompt) :] = 1
    how: dict[str, Any] = {"do_sample": False}
    if section.temperature > 0:
        how = {"do_sample": True, "temperature": section.temperature, "top_p": section.top_p, "top_k": section.top_k}
    output_BS = model.generate(
        input_ids=ids_BS.to(device),
        attention_mask=attention_BS.to(device),
        max_new_tokens=section.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(_NEUTRAL | how),
    )
    return [as_answer(row, tokenizer) for row in output_BS[:, size:].tolist()]


def as_answer(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Answer:
    """An answer from generated tokens: what follows the stop token is cut."""
    finished = tokenizer.eos_token_id in ids
    if finished:
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
    return Answer(ids, tokenizer.decode(ids, skip_special_tokens=True).strip(), finished)


class Partial:
    """Batches written so far, one a line; a line that a kill cut short is not counted."""

    def __init__(self, path: Path) -> None:
        self.path, self.batches = path, []
        if path.exists():
            whole = [line for line in path.read_text("utf-8").split("\n")[:-1] if line]
            self.batches = [json.loads(line) for line in whole]
            path.write_text("".join(line + "\n" for line in whole), "utf-8")

    def add(self, batch: list[Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(batch, ensure_ascii=False) + "\n")
        self.batches.append(batch)
