"""Runs a program with FSDP2 over CPU processes: `fsdp_on_cpus.py PROGRAM ARGUMENT...`.

torch's own FSDP2 runs over gloo, but accelerate takes its settings only where there are GPUs: without them it leaves
FSDP out without a word, and align refuses to start. Both are lifted here, for tests and for nothing else. What is
split, gathered, stepped and saved is then torch's, accelerate's and transformers' own doing, as it is on GPUs; and so
that the forward passes are those of GPUs too, what align has for CPUs alone stays out.

For each model that is split for training, every process prints what `SPLIT` matches.
"""

from __future__ import annotations

import re
import runpy
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from align import heads, lean, ranks, sharded

SPLIT = re.compile(r"^FSDP2: (\d+) of (\d+) weights held here, gathered in (\d+) parts$", re.MULTILINE)


def let_accelerate_split() -> None:
    """accelerate's list of the kinds of launches under which FSDP counts, with CPU processes on it."""
    made = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


def tell_what_is_split() -> None:
    prepare = Accelerator._prepare_fsdp2

    def prepared(self: Accelerator, *args: Any) -> tuple[Any, ...]:
        result = prepare(self, *args)
        for model in (one for one in result if isinstance(one, torch.nn.Module)):
            weights: list[Any] = list(model.parameters())  # each a DTensor, or the next line fails
            here, all_of_them = sum(p.to_local().numel() for p in weights), sum(p.numel() for p in weights)
            parts = len(sharded.units(model))
            print(
                f"\nFSDP2: {here} of {all_of_them} weights held here, gathered in {parts} parts\n", end="", flush=True
            )
        return result

    Accelerator._prepare_fsdp2 = prepared


if __name__ == "__main__":
    let_accelerate_split()
    tell_what_is_split()
    ranks._fsdp_wants_a_gpu = lambda: None
    heads.lean_head = lean.lean_layers = lambda model: None  # before the stages import them
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
