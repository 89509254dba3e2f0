"""Training elements of the reward model: answers that are read once, and the pairs among them.

A prompt with K ranked answers has up to K (K - 1) / 2 pairs. Shuffled into a batch of their own, each would pass the
prompt and both answers through the model again, and a model that sees an answer K - 1 times an epoch overfits it
(section 3.5 of arXiv 2203.02155). An element of all pairs of a prompt has each answer once; an element of one pair is
the plain case.

This module imports no model library; `collate` imports torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from reward.records import InputError, Record, digest

if TYPE_CHECKING:
    from torch import Tensor

    from reward.losses import TieModel


@dataclass(frozen=True)
class Labels:
    """What of the labels enters the loss, and how.

    Attributes:
        margin: a record's margin is the gap asked for.
        group_pairs: all pairs of a prompt are one element.
        disagreement: what a record's `weight` (the share of labels behind the winner) is: nothing ("ignore"), the
            probability that the winner is the better one ("soft"), or how much the pair counts ("weight").
        label_smoothing: probability of a wrong label that is assumed of every pair.
        ties: the likelihood that tied pairs enter by; "ignore" leaves them out.
        ensemble: heads, each of which counts the prompts differently if there are several.
        seed: of those counts.
    """

    margin: bool = False
    group_pairs: bool = False
    disagreement: Literal["ignore", "soft", "weight"] = "ignore"
    label_smoothing: float = 0.0
    ties: TieModel = "ignore"
    ensemble: int = 1
    seed: int = 0

    @property
    def plain(self) -> bool:
        """Whether this is the loss that TRL's trainer has itself."""
        same = Labels(margin=self.margin, seed=self.seed)
        return self == same


def elements_of(rows: Sequence[Record], labels: Labels) -> list[Record]:
    """Elements `{answers, prompt_sizes, pairs, outcomes, margins, weights, draws}`, in order of first appearance.

    answers: distinct rows prompt + answer, as tokens; prompt_sizes: how many of them are the prompt's. pairs: (first,
    second) as indices into answers; for each, outcomes: probability of (first, tie, second), margins, and weights with
    mean 1 over all elements. draws: for each head, how much it counts the prompt.

    Args:
        rows: `{prompt_ids, chosen_ids, rejected_ids, margin, weight, tied, prompt_key}`; a tied row has its two
            answers in any order. Missing columns are margin 0, weight 1, tied False, and a prompt known by its tokens.

    Raises:
        InputError: no rows, or only ties.
    """
    if not any(not row.get("tied") for row in rows):
        what = f"all {len(rows)} pairs are ties" if rows else "there are no pairs"
        raise InputError(f"{what}: a reward model learns from preferences, label more comparisons.")
    by_weight = labels.disagreement == "weight"
    mean = sum(_weight(row) for row in rows) / len(rows) if by_weight else 1.0
    groups: dict[tuple[object, ...], Record] = {}
    for number, row in enumerate(rows):
        prompt = tuple(row["prompt_ids"])
        known = row.get("prompt_key", prompt)
        key = (known,) if labels.group_pairs else (known, number)
        element = groups.get(key)
        if element is None:
            names = ("answers", "prompt_sizes", "pairs", "outcomes", "margins", "weights")
            element = groups[key] = {name: [] for name in names} | {"draws": _draws(known, labels)}
        tied = bool(row.get("tied"))
        element["pairs"].append([_index(element, prompt, row[side]) for side in ("chosen_ids", "rejected_ids")])
        element["outcomes"].append(_outcome(row, labels))
        element["margins"].append(float(row.get("margin", 0.0)) if labels.margin and not tied else 0.0)
        element["weights"].append(_weight(row) / mean if by_weight else 1.0)
    return list(groups.values())


def _index(element: Record, prompt: tuple[int, ...], answer: Sequence[int]) -> int:
    row = [*prompt, *answer]
    if row not in element["answers"]:
        element["answers"].append(row)
        element["prompt_sizes"].append(len(prompt))
    return int(element["answers"].index(row))


def _weight(row: Record) -> float:
    return 1.0 if row.get("tied") else float(row.get("weight", 1.0))


def _outcome(row: Record, labels: Labels) -> list[float]:
    if row.get("tied"):
        return [0.0, 1.0, 0.0]
    right = float(row.get("weight", 1.0)) if labels.disagreement == "soft" else 1.0
    right = right * (1 - labels.label_smoothing) + (1 - right) * labels.label_smoothing
    return [right, 0.0, 1 - right]


def _draws(prompt: object, labels: Labels) -> list[float]:
    """The Bayesian bootstrap (Rubin 1981): exponential draws of mean 1, alike for all pairs of a prompt, so that the
    heads disagree where the data would have let them."""
    if labels.ensemble == 1:
        return [1.0]
    draw = random.Random(digest([labels.seed, prompt]))
    return [draw.expovariate(1.0) for _ in range(labels.ensemble)]


def collate(elements: Sequence[Record], pad_id: int, *, segments: bool = False) -> dict[str, Tensor]:
    """One batch of all answers of the elements, padded right, and their pairs.

    Args:
        segments: also `token_type_ids`, 0 on the prompt and 1 on the answer, as encoders read two texts.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(answer) for element in elements for answer in element["answers"]]
    sizes = [size for element in elements for size in element["prompt_sizes"]]
    batch = {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    if segments:
        types = [(torch.arange(len(row)) >= size).long() for row, size in zip(rows, sizes, strict=True)]
        batch["token_type_ids"] = pad_sequence(types, batch_first=True)
    pairs, weights, draws, first = [], [], [], 0
    for element in elements:
        pairs += [[first + a, first + b] for a, b in element["pairs"]]
        weights += [weight / len(elements) / len(element["pairs"]) for weight in element["weights"]]
        draws += [element["draws"]] * len(element["pairs"])
        first += len(element["answers"])
    return batch | {
        "pairs": torch.tensor(pairs),
        "outcomes": torch.tensor([outcome for element in elements for outcome in element["outcomes"]]),
        "margins": torch.tensor([margin for element in elements for margin in element["margins"]]),
        "weights": torch.tensor(weights),
        "draws": torch.tensor(draws),
    }
