"""Optimiser steps of one size, however many processes share them.

An epoch's rows rarely fill its last step. One process then trains on the few that are left, while several are given
rows of the epoch's beginning again, so that none of them waits for ever; accumulated, the few count as much as a whole
batch. Three runs of one config would be three runs. Here every step has all its rows: what the last one lacks is drawn
as the next epoch would draw it. The same seed then takes the same rows in the same steps on any number of processes
and with any accumulation, as long as the product of the three sizes stays what it was.
"""

from __future__ import annotations

import math
from typing import Any


def rows_per_step(arguments: Any) -> int:
    """Rows of an optimiser step, over all processes and accumulated batches; `arguments` are a trainer's."""
    return int(arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size)


def whole_steps(trainer: Any) -> None:
    """Fill the last step of every epoch of a built trainer. Left alone: `dataloader_drop_last`, and sampling that is
    not the shuffling default."""
    from torch.utils.data import RandomSampler

    if trainer.args.dataloader_drop_last or trainer.args.train_sampling_strategy != "random":
        return
    loader_of = trainer.get_train_dataloader

    def sampler(dataset: Any) -> RandomSampler:
        step = rows_per_step(trainer.args)
        # torch draws what is missing from a permutation of its own; accelerate brings the seed and the epoch.
        return RandomSampler(dataset, num_samples=math.ceil(len(dataset) / step) * step)

    def loader() -> Any:
        found = loader_of()
        # From the number of rows accelerate infers how much of the last batch is copies, and leaves out of the metrics
        # what was measured on them; here nothing is.
        found.dataset.total_dataset_length = len(found) * found.total_batch_size
        return found

    trainer._get_train_sampler, trainer.get_train_dataloader = sampler, loader
