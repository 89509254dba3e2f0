"""Reference log-probabilities of preference pairs: computed once, and kept by what they are of.

The reference of DPO never changes, so its log-probability of an answer depends on its weights and on the tokens alone.
They are kept in the cache folder under a digest of both: a second epoch, a resumed run and a run with another learning
rate or beta read them instead of passing every pair through the model again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from align import models, progress, ranks
from align.logprobs import Pair, answer_logprobs, base_model
from align.quantised import is_quantised

FORMAT = 1


def reference_logprobs(
    model: Any,
    rows: Sequence[tuple[Pair, Pair]],
    pad_id: int,
    *,
    batch_size: int = 16,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[tuple[float, float]]:
    """Summed log-probability in nats of (chosen, rejected) for each of the rows.

    All processes must come here; each computes its share of what is not yet known.

    Args:
        model: the reference, whole on every process; an adapter on it is switched off.
        rows: ((prompt, chosen), (prompt, rejected)), as tokens.
        on_progress: called with the number of answers of this process that are done.
    """
    path = models.cache_folder() / "reference-logprobs" / f"{weights_digest(model)}.json"
    known = _read(path)
    keys = [tuple(_key(pair) for pair in row) for row in rows]
    missing = [i for i, key in enumerate(keys) if not all(side in known for side in key)]
    mine = missing[ranks.rank() :: ranks.world_size()]
    pairs = [pair for i in mine for pair in rows[i]]
    if pairs:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
            found = answer_logprobs(model, pairs, pad_id, batch_size=batch_size, together=2, on_progress=on_progress)
        sums = {_key(pair): float(row.double().sum()) for pair, row in zip(pairs, found, strict=True)}
    else:
        sums = {}
    fresh: dict[str, float] = {}
    for part in ranks.collect(sums):
        fresh |= part
    if fresh and ranks.is_first():
        _write(path, _read(path) | fresh)  # read again: another run may have added to it meanwhile
    known |= fresh
    return [(known[chosen], known[rejected]) for chosen, rejected in keys]


def weights_digest(model: Any) -> str:
    """32 hex digits of all that a forward pass depends on: a model's class, settings and weights, LoRA adapters left
    out, and how it computes."""
    base = base_model(model)
    settings = {key: value for key, value in base.config.to_dict().items() if not key.startswith("_")}
    device = next(base.parameters()).device.type
    precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as held"
    how = [FORMAT, type(base).__name__, settings, device, precision, torch.__version__]
    digest = hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode())
    weights = dict(base.named_parameters())
    if is_quantised(base):
        weights = base.state_dict()  # with the constants of quantised blocks, which are no parameters
    for name, parameter in sorted(weights.items()):
        if ".lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _key(pair: Pair) -> str:
    return hashlib.sha256(json.dumps(pair).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, float]:
    """What is known; nothing where the file is missing or was damaged, since it can be computed again."""
    try:
        values = json.loads(path.read_text("utf-8"))
        return {str(key): float(value) for key, value in values.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(path: Path, values: dict[str, float]) -> None:
    """Whole or not at all. Without a place to keep them, the values are good for this run all the same."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            part = Path(file.name)
            json.dump(values, file)
        part.replace(path)
    except OSError as error:
        if part:
            part.unlink(missing_ok=True)
        progress.say(f"  the reference's log-probabilities are not kept for the next run: {error}")
