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
from align.decode import draw, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    """Answers to one batch of tokenised prompts.

    What a model's own generation config asks for beyond the section (Qwen2.5 ships a repetition penalty) is left out:
    answers would come from another distribution than the one whose log-probabilities we compute.
    """
    drawn = draw(
        model,
        prompts,
        max_new_tokens=section.max_new_tokens,
        stop_ids=stop_ids(model, tokenizer),
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
    )
    return [Answer(a.ids, tokenizer.decode(a.ids, skip_special_tokens=True).strip(), a.finished) for a in drawn]


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
