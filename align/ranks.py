"""The one place that knows about processes: who is first, who waits, and how many there are."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


def world_size() -> int:
    """Number of processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """True on the process that writes files and talks to the user."""
    return int(os.environ.get("RANK", "0")) == 0


def start() -> None:
    """Join the process group, so that `wait` works before any trainer exists. No-op with one process."""
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


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
