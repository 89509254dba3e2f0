"""Weights that FSDP2 has split over the processes, made whole for a while: to compute with, or to be saved. And what
accelerate rounds under FSDP2 that it rounds nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any


def units(model: Any) -> list[Any]:
    """The modules of `model` whose weights FSDP2 gathers and frees together; none where it has not been at work."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def whole_units(model: Any) -> Iterator[None]:
    """Inside, every process holds the whole weights, in the precision that a forward pass has; what is written to them
    is lost afterwards.

    FSDP2's hooks around a forward pass are off inside: they would free a layer once it has run, and wait for the other
    processes to gather the next. So each process may run what it likes without the others. All processes must come
    here, and none in the middle of a training step's own forward or backward pass.
    """
    split = units(model)
    places = [(unit, name) for unit in split for name in ("_forward_pre_hooks", "_forward_hooks")]
    hooks = [vars(unit)[name] for unit, name in places]
    for unit in split:
        unit.unshard()
    for unit, name in places:
        setattr(unit, name, OrderedDict())
    try:
        yield
    finally:
        for (unit, name), held in zip(places, hooks, strict=True):
            setattr(unit, name, held)
        for unit in split:
            unit.reshard()


@contextlib.contextmanager
def whole_trained(model: Any) -> Iterator[None]:
    """Inside, every process holds the weights with gradients whole and as the optimiser has them, to be saved; no
    forward pass can be made. All processes must come here.

    The units' own gathering is for forward passes: in mixed precision it gives rounded weights, and a state dict splits
    them again.
    """
    from torch.nn import Parameter

    places = [(m, name, p) for m in model.modules() for name, p in m.named_parameters(recurse=False) if p.requires_grad]
    split = [(module, name, part) for module, name, part in places if hasattr(part, "full_tensor")]
    whole = {part: Parameter(part.full_tensor()) for _, _, part in split}  # what is tied stays one
    for module, name, part in split:
        setattr(module, name, whole[part])
    try:
        yield
    finally:
        for module, name, part in split:
            setattr(module, name, part)


def round_only_inside() -> None:
    """From now on mixed precision under FSDP2 is that of the forward and backward pass alone, as it is without FSDP.

    accelerate also rounds what a model returns and the gradients while they are summed over processes. What is returned
    are log-probabilities and rewards: in bfloat16, -121 has -120.5 and -121.5 beside it, and DPO's loss is of the
    differences between such numbers.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from torch import float32

    accelerates = FullyShardedDataParallelPlugin.set_mixed_precision

    def set_mixed_precision(self: Any, *args: Any, **kwargs: Any) -> None:
        accelerates(self, *args, **kwargs)
        policy = self.mixed_precision_policy
        self.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=float32, output_dtype=None)

    FullyShardedDataParallelPlugin.set_mixed_precision = set_mixed_precision
