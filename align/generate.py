"""Sampling answers to many prompts, in batches of similar length, on any number of processes, again and again alike."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align import progress, ranks
from align.config import GenerationSection
from align.decode import draw, stop_ids
from align.training import release

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


def sample_together(
    load: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    section: GenerationSection,
    seed: str,
    folder: Path,
    what: str,
) -> list[Answer]:
    """One answer to every prompt, in their order, on every process; all processes must come here.

    They share the batches out among them. What was sampled before a kill is read back from `folder`, whatever the
    number of processes was then. Nobody's answers depend on who sampled them.

    Args:
        load: makes the model; not called where there is nothing left to sample.
        folder: where batches are kept until the stage is done; all processes must see it.
        what: the progress bar's name.
    """
    done = Partial(folder).batches
    left = [number for number in range(len(batches(prompts, section.batch_size))) if number not in done]
    mine = left[ranks.rank() :: ranks.world_size()]
    ranks.wait()  # nobody adds to the folder while another still looks at what is missing
    if mine:
        partial = Partial(folder)
        with ranks.loading_whole():
            model = load()
        with progress.bar(what, len(mine)) as report:
            sampled = generate(model, tokenizer, prompts, section, seed, mine)
            for count, (number, (indices, answers)) in enumerate(zip(mine, sampled, strict=True), start=1):
                partial.add(number, [[i, a.ids, a.text, a.finished] for i, a in zip(indices, answers, strict=True)])
                report(count)
        del model
        release()
    ranks.wait()
    rows = sorted((row for rows in Partial(folder).batches.values() for row in rows), key=lambda row: row[0])
    return [Answer(ids, text, finished) for _, ids, text, finished in rows]


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    section: GenerationSection,
    seed: str,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], list[Answer]]]:
    """(indices, answers) batch by batch; with `numbers`, of these batches only.

    Every batch is seeded by (seed, number of the batch), so it has the same answers whatever was sampled before it.
    """
    model.eval()
    every = batches(prompts, section.batch_size)
    for number in range(len(every)) if numbers is None else numbers:
        torch.manual_seed(int(hashlib.sha256(f"{seed} {number}".encode()).hexdigest()[:15], 16))
        indices = every[number]
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
    """Batches written so far, by their numbers. Each process writes those it adds to a file of its own in `folder`; a
    line that a kill cut short is not counted."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.batches = folder / f"{ranks.rank()}.jsonl", dict[int, list[Any]]()
        for path in folder.glob("*.jsonl"):
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError):
                    number, rows = json.loads(line)
                    self.batches[number] = rows

    def add(self, number: int, rows: list[Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write("\n" + json.dumps([number, rows], ensure_ascii=False))  # what was cut short ends here
        self.batches[number] = rows
