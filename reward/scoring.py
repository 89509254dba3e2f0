"""Scores of a reward model: one scalar per prompt and answer, read at the answer's last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


@torch.no_grad()
def score(
    model: Any,
    rows: Sequence[list[int]],
    pad_id: int,
    *,
    batch_size: int = 16,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[float]:
    """Rewards of tokenised prompt + answer rows, in the order given.

    Args:
        model: a sequence classifier with one label, as plain transformers + PEFT load it.
        rows: tokens of prompt and answer, the answer with its stop token where it has one.
        pad_id: the padding token; rows are padded right, so the score sits on the last token before it.

    Raises:
        ValueError: the model has another number of labels than one.
    """
    if model.config.num_labels != 1:
        raise ValueError(f"a reward model has one label, but this one has {model.config.num_labels}: train it with 1.")
    # The classifier reads the last token that is not its config's padding token, whatever the rows are padded with.
    model.config.get_text_config().pad_token_id = pad_id
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        ids_BS = pad_sequence([torch.tensor(rows[i]) for i in indices], batch_first=True, padding_value=pad_id)
        sizes_B1 = torch.tensor([[len(rows[i])] for i in indices])
        attention_BS = (torch.arange(ids_BS.shape[1])[None, :] < sizes_B1).long()
        logits_B1 = model(input_ids=ids_BS.to(device), attention_mask=attention_BS.to(device)).logits
        for index, value in zip(indices, logits_B1[:, 0].float().tolist(), strict=True):
            scores[index] = value
        on_progress(start + len(indices))
    return scores
