"""The one place that knows about processes: who is first, who waits, how many there are, and who holds what."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def world_size() -> int:
    """Number of processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among them all; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """True on the process that writes files and talks to the user."""
    return rank() == 0


def start() -> None:
    """Join the process group, so that `wait` works before any trainer exists. No-op with one process."""
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Leave the process group, as every process must before it ends: its threads are running still, and a process that
    ends with them is aborted now and then."""
    if world_size() > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def wait() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier()


def share(value: T) -> T:
    """The first process's value, on every process (any picklable object; the others' is ignored)."""
    if world_size() > 1:
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
    return value


def collect(value: T) -> list[T]:
    """Every process's value, in their order, on every process (any picklable object without tensors on a GPU)."""
    if world_size() > 1:
        import torch

        values: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(values, value)
        return values
    return [value]


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Inside, every process loads models whole; with ZeRO-3 in its settings, transformers splits them as it loads.

    For models that no engine will gather: those that are only scored with.
    """
    from transformers.integrations import deepspeed as integration

    settings = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = settings


def is_split(model: Any) -> bool:
    """Whether this process holds but a part of the weights: ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def gathered(model: Any, trained_only: bool = False) -> Iterator[None]:
    """Inside, every process holds the whole weights; what is written to them is lost afterwards.

    Only ZeRO-3 splits weights, and there each layer's hooks gather it for the time of its own forward pass, which all
    processes must then make together. Inside, the hooks are off: each process may sample for as long as its own answers
    take. Otherwise this does nothing. All processes must come here.

    Args:
        model: what the launcher made of the model, or the model.
        trained_only: only the weights with gradients, to be saved; no forward pass can be made.
    """
    split = [p for p in model.parameters() if hasattr(p, "ds_id") and (p.requires_grad or not trained_only)]
    if not split:
        yield
        return
    import deepspeed

    offload = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    with deepspeed.zero.GatheredParameters(split):
        if offload is None or trained_only:
            yield
            return
        for parameter in model.parameters():
            parameter.ds_active_sub_modules.clear()
        for hook in [*offload.forward_hooks, *offload.backward_hooks]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            coordinator = offload.param_coordinator
            if not coordinator.is_invalid_trace():  # it foresaw a forward pass without the ones made here
                coordinator._invalidate_trace()
            offload._register_deepspeed_module(offload.module)
