"""The one place that knows about processes: who is first, who waits, how many there are, and who holds what."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

from align import sharded
from reward.records import InputError

T = TypeVar("T")

PATIENCE = 1800  # seconds, as transformers has it for its ddp_timeout
_patience = PATIENCE
_talk: Any = None  # process groups beside the one that trains
_step: Any = None
_store: Any = None
_speaks: bool | None = None
_peers: list[tuple[str, int]] = []  # machine and process id of every process


def world_size() -> int:
    """Number of processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among them all; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """True on the process that writes files and talks to the user."""
    return rank() == 0


def start(patience: int = PATIENCE) -> None:
    """Join the process group, so that `wait` works before any trainer exists. No-op with one process, or once joined.

    Args:
        patience: seconds after which a collective of training that some process does not come to is given up.

    Raises:
        InputError: the launcher's file asks for FSDP where there is no GPU, or with settings that stages cannot have.
    """
    global _patience, _store
    if world_size() == 1 or _joined():
        return
    _patience = patience
    import torch
    from accelerate import PartialState

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _fsdp_wants_a_gpu()
        _check_fsdp(os.environ)
        sharded.round_only_inside()
    _end_with_launcher()
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=patience))
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _store = torch.distributed.TCPStore(*where, is_master=False, timeout=timedelta(seconds=30))


def leave() -> None:
    """Leave the process group, as every process must before it ends: its threads are running still, and a process that
    ends with them is aborted now and then."""
    global _talk, _step
    if world_size() > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        _talk = _step = None


def wait(in_step: bool = False) -> None:
    """Return when every process has come here, however long that takes; as a part of a training step, not longer than
    a step's other collectives."""
    if world_size() > 1:
        import torch

        torch.distributed.barrier(group=_stepping() if in_step else _talking())


def share(value: T) -> T:
    """The first process's value, on every process (any picklable object; the others' is ignored)."""
    if world_size() > 1:
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=_talking())
        return box[0]
    return value


def collect(value: T, in_step: bool = False) -> list[T]:
    """Every process's value, in their order, on every process (any picklable object without tensors on a GPU).

    `in_step` as for `wait`.
    """
    if world_size() > 1:
        import torch

        values: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(values, value, group=_stepping() if in_step else _talking())
        return values
    return [value]


def any_of(flag: bool) -> bool:
    """Whether it is True on any process, on every process; part of a training step, and cheap enough for each."""
    if world_size() > 1:
        import torch

        flags = torch.tensor([flag], dtype=torch.uint8)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=_stepping())
        return bool(flags)
    return flag


def together(work: Callable[[], T]) -> T:
    """What `work` gives, once it has given something on every process.

    Raises:
        InputError: on every process, if `work` is refused on any; what only some were refused names them.
    """
    if world_size() == 1:
        return work()
    try:
        value, refused = work(), None
    except InputError as error:
        value, refused = None, str(error)
    start()
    told = [(who, sentence) for who, sentence in collect((name(), refused)) if sentence]
    if not told:
        return cast(T, value)
    if len(told) == world_size() and len({sentence for _, sentence in told}) == 1:
        raise InputError(told[0][1])
    raise InputError(f"{told[0][0]}: {told[0][1]}")


def check_same(what: str, values: dict[str, Any]) -> None:
    """
    Raises:
        InputError: `values` differ between the first process and another; both are named with what they have.
    """
    others = collect((name(), values))
    first_name, first = others[0]
    for other_name, other in others[1:]:
        keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if keys:
            key = keys[0]
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(
                f"the processes were started with different {what}: {key} is {_short(first.get(key))} on {first_name} "
                f"and {_short(other.get(key))} on {other_name}{more}. Give all of them the same."
            )


def name() -> str:
    """This process for people: its number and its machine."""
    return f"process {rank()} on {socket.gethostname()}"


def speaks() -> bool:
    """Whether this process is to tell people why the run ends: the first that asks, so that they are told once."""
    global _speaks
    if _store is None:
        return is_first()
    if _speaks is None:
        try:  # the launcher's own store, which outlives its processes
            _speaks = _store.add("align/told", 1) == 1
        except (RuntimeError, OSError):
            _speaks = is_first()
    return _speaks


def lost_another(error: BaseException) -> bool:
    """Whether an error is that of a collective which another process has left, or did not come to in time."""
    if world_size() == 1:
        return False
    import torch

    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def said_of_missing() -> str:
    """Who of this machine's processes has ended, as the beginning of a sentence; empty where none is known to have."""
    gone = []
    for number, (host, pid) in enumerate(_peers):
        if host == socket.gethostname() and not _lives(pid):
            gone.append(f"process {number} on {host}")
    return f"{' and '.join(gone)} has ended" if gone else ""


def _lives(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _joined() -> bool:
    import torch

    return bool(torch.distributed.is_initialized())


def _talking() -> Any:
    """The group for everything but training, over CPUs and with all the patience there is: the others wait in it while
    the first process judges and writes. Made when first wanted, as is the next one."""
    global _talk, _peers
    if _talk is None:
        import torch

        _talk = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
        _peers = collect((socket.gethostname(), os.getpid()))
    return _talk


def _stepping() -> Any:
    """The group for what belongs to a step of training, with as much patience as training itself."""
    global _step
    if _step is None:
        import torch

        _step = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=_patience))
    return _step


def _fsdp_wants_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "FSDP wants GPUs, and there are none: accelerate would leave it out without a word. Give the launcher "
            "configs/accelerate/cpu.yaml or zero3.yaml."
        )


# The launcher's variables for its settings of FSDP, what stages want of them, and what another value would mean.
_FSDP = {
    "FSDP_VERSION": ("2", "version 1 does not let a process hold the whole weights for a while"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "no later stage could load what this one saves"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "only the first process would load any weights to measure with"),
}


def _check_fsdp(settings: Mapping[str, str]) -> None:
    for variable, (wanted, otherwise) in _FSDP.items():
        got = settings.get(variable)
        if got != wanted:
            key = variable.lower()
            raise InputError(
                f"{key} is {_short(got)} in the launcher's file, and {otherwise}: write `{key}: {wanted}` under "
                "fsdp_config, as configs/accelerate/fsdp2.yaml has it."
            )


def _end_with_launcher() -> None:
    """Have Linux send SIGTERM when torch's launcher dies: killed, it leaves its processes to go on unseen."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        prctl_set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(prctl_set_parent_death_signal, int(signal.SIGTERM))


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text[:12] if len(text) == 64 else text[:60]


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
    """Whether this process holds but a part of the weights: ZeRO-3, FSDP2."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters()) or _is_sharded(model)


def _is_sharded(model: Any) -> bool:
    return world_size() > 1 and bool(sharded.units(model))


@contextlib.contextmanager
def gathered(model: Any, trained_only: bool = False) -> Iterator[None]:
    """Inside, every process holds the whole weights; what is written to them is lost afterwards.

    Only ZeRO-3 and FSDP2 split weights, and there each layer's hooks gather it for the time of its own forward pass,
    which all processes must then make together. Inside, the hooks are off: each process may sample for as long as its
    own answers take. Otherwise this does nothing. All processes must come here.

    Args:
        model: what the launcher made of the model, or the model.
        trained_only: only the weights with gradients, to be saved; no forward pass can be made.
    """
    if _is_sharded(model):
        with sharded.whole_trained(model) if trained_only else sharded.whole_units(model):
            yield
        return
    parts = [p for p in model.parameters() if hasattr(p, "ds_id") and (p.requires_grad or not trained_only)]
    if not parts:
        yield
        return
    import deepspeed

    offload = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    with deepspeed.zero.GatheredParameters(parts):
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
