"""Which items are worth a person's label: those whose answers a reward model is least sure to order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align import progress
from labeling_ui.store import LabelStore, Project


def uncertainty(per_head_KM: NDArray[np.float64]) -> float:
    """How unsure M heads are of the order of an item's K answers, from 0 to 1/2: that of its least certain pair.

    A head's view of a pair is p = sigmoid(r_i - r_j). Several heads are unsure where they disagree: the standard
    deviation of p over them, which more labels can lower. One head can only be undecided: sqrt(p (1 - p)), the standard
    deviation of the label it expects.
    """
    found = 0.0
    for first, second in itertools.combinations(per_head_KM, 2):
        p_M = 1 / (1 + np.exp(-(first - second)))
        found = max(found, float(p_M.std() if len(p_M) > 1 else np.sqrt(p_M[0] * (1 - p_M[0]))))
    return found


def prioritise(store: LabelStore, project: Project, run: str) -> int:
    """Order a project's items by the uncertainty of the reward model in `run`; returns how many were scored.

    Args:
        run: a finished reward stage's folder, a reward model's, or a hub id.

    Raises:
        InputError: as `align.score.model_place` and the loading of the model.
    """
    from align.lean import lean_reading
    from align.score import model_place
    from align.scorer import Scorer
    from reward.scoring import score

    items = [item for item in store.items(project) if item.gold is None]
    reader = Scorer.load(model_place(run))
    lean_reading(reader.model)
    prompts: Sequence[Any] = [item.payload["prompt"] for item in items for _ in item.payload["answers"]]
    texts = [answer["text"] for item in items for answer in item.payload["answers"]]
    with progress.bar("label: uncertainty of the items", len(texts)) as report:
        per_head_NM = score(reader, prompts, texts, on_progress=report).per_head
    borders = np.cumsum([len(item.payload["answers"]) for item in items])[:-1]
    parts = np.split(per_head_NM, borders) if items else []
    store.prioritise(project, {item.key: uncertainty(part) for item, part in zip(items, parts, strict=True)})
    return len(items)
