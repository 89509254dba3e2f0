"""Scores of a reward model: a number for each prompt and answer, from every head, with their mean and spread."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from reward.records import Message

if TYPE_CHECKING:
    from torch import Tensor

Text = str | list[Message]  # plain, or a conversation
Aggregate = Literal["mean", "min", "lcb"]
Progress = Callable[[int], object]


class RewardScores(NamedTuple):
    """Scores of N answers by M heads, in reward units.

    Attributes:
        mean: over heads, of shape (N,): the model's score.
        std: standard deviation over heads (with M - 1), of shape (N,); zero with one head.
        per_head: of shape (N, M).
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    per_head: NDArray[np.float64]

    @classmethod
    def of(cls, per_head_NM: NDArray[np.float64]) -> RewardScores:
        several = per_head_NM.shape[1] > 1
        std_N = per_head_NM.std(axis=1, ddof=1) if several else np.zeros(len(per_head_NM))
        return cls(per_head_NM.mean(axis=1), std_N, per_head_NM)

    def aggregated(self, how: Aggregate, lcb_coefficient: float = 1.0) -> NDArray[np.float64]:
        """One score (N,) an answer: the mean, the least head's, or the mean minus `lcb_coefficient` x std.

        The last two are the pessimism of arXiv 2310.02743 against climbing one model's errors; with one head all
        three are the same.
        """
        if how == "mean":
            return self.mean
        return self.per_head.min(axis=1) if how == "min" else self.mean - lcb_coefficient * self.std


class Reader(Protocol):
    """A loaded reward model with the way it reads prompt and answer.

    Attributes:
        model: a sequence classifier, an output a head.
        pad_id: what rows are padded with; None where the model has no padding token.
    """

    model: Any
    pad_id: int | None

    def rows(
        self, prompts: Sequence[Text], answers: Sequence[Text], finished: Sequence[bool] | None = None
    ) -> list[dict[str, list[int]]]:
        """The model's inputs for each answer, one row each."""


def score(
    model: Reader,
    prompts: Sequence[Text],
    answers: Sequence[Text],
    *,
    finished: Sequence[bool] | None = None,
    batch_size: int = 16,
    on_progress: Progress = lambda done: None,
) -> RewardScores:
    """Scores of `answers` to `prompts`, one each, in the order given.

    Args:
        prompts: plain texts, or conversations.
        answers: plain texts, or lists of one assistant message.
        finished: whether an answer ended with the stop token; without it, all did.

    Raises:
        InputError: an answer cannot be read by the model.
        ValueError: not as many answers as prompts.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"there are {len(prompts)} prompts and {len(answers)} answers: give one answer a prompt.")
    rows = model.rows(prompts, answers, finished)
    own: dict[str, Any] = {
        "batch_size": batch_size,
        "on_progress": on_progress,
        "groups": [str(prompt) for prompt in prompts],
    }
    return RewardScores.of(head_scores(model.model, rows, model.pad_id, **own))


def score_rows(model: Any, rows: Sequence[list[int]], pad_id: int, **how: Any) -> list[float]:
    """The mean over heads for each tokenised row, in the order given; see `head_scores`."""
    found: list[float] = head_scores(model, [{"input_ids": row} for row in rows], pad_id, **how).mean(axis=1).tolist()
    return found


def head_scores(
    model: Any,
    rows: Sequence[Mapping[str, list[int]]],
    pad_id: int | None,
    *,
    batch_size: int = 16,
    groups: Sequence[Hashable] | None = None,
    on_progress: Progress = lambda done: None,
) -> NDArray[np.float64]:
    """Scores (N, M) of tokenised rows, in the order given.

    Args:
        model: a sequence classifier with one label, as plain transformers + PEFT load it, or one whose head was
            widened to several outputs.
        rows: `{input_ids}` of prompt and answer, the answer with its stop token where it has one; an encoder's with
            `token_type_ids`.
        groups: names of rows that begin alike, which then come together, so that a model that computes shared prefixes
            once finds them.
        pad_id: the padding token; rows are padded right, so the score sits on the last token before it. None: any
            token will do that no row ends in, for it is masked and read over.

    Raises:
        ValueError: the model has another number of labels than one.
    """
    import torch

    if model.config.num_labels != 1:
        raise ValueError(f"a reward model has one label, but this one has {model.config.num_labels}: train it with 1.")
    if pad_id is None:
        ends = {row["input_ids"][-1] for row in rows}
        pad_id = next(token for token in range(len(ends) + 1) if token not in ends)
    # The classifier reads the last token that is not its config's padding token, whatever the rows are padded with.
    model.config.get_text_config().pad_token_id = pad_id
    model.eval()
    device = next(model.parameters()).device
    order = _order([len(row["input_ids"]) for row in rows], groups)
    scores: list[list[float]] = [[]] * len(rows)
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            inputs = {name: value.to(device) for name, value in _padded([rows[i] for i in indices], pad_id).items()}
            for index, heads in zip(indices, model(**inputs).logits.float().tolist(), strict=True):
                scores[index] = heads
            on_progress(start + len(indices))
    return np.array(scores, dtype=np.float64).reshape(len(rows), -1 if rows else 1)


def _order(sizes: Sequence[int], groups: Sequence[Hashable] | None) -> list[int]:
    """Long rows first, so that memory runs out at the beginning if at all, and the rows of a group together."""
    names = list(range(len(sizes))) if groups is None else groups
    longest: dict[Hashable, int] = {}
    first: dict[Hashable, int] = {}
    for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
        longest[name] = max(size, longest.get(name, 0))
        first.setdefault(name, place)
    return sorted(range(len(sizes)), key=lambda i: (-longest[names[i]], first[names[i]], -sizes[i]))


def _padded(rows: Sequence[Mapping[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    columns = {"input_ids": pad_id, **({"token_type_ids": 0} if "token_type_ids" in rows[0] else {})}
    inputs = {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=fill)
        for name, fill in columns.items()
    }
    ones = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
    return inputs | {"attention_mask": pad_sequence(ones, batch_first=True)}
