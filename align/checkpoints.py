"""Checkpoints that are whole or invisible, and the room they need.

The trainer writes a checkpoint file by file, on every process its own, and rotates the old ones away while others may
still be writing. Here a checkpoint counts once `COMPLETE` is in it, which the first process writes when all have
written their part and the disk has it; only then do older ones go. A kill at any moment leaves the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from align import ranks
from align.runs import is_disk_full
from reward.records import InputError, write_json

COMPLETE = "COMPLETE"
# Adam keeps two float32 numbers for every weight it trains.
_ADAM_BYTES = 8


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint of a trainer when it is whole, and rotates in the trainer's place.

    Add it last: what it does before a save depends on what other callbacks have decided.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse, before anything is written, what cannot fit."""
        if control.should_save and state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            missing = bytes_wanted(folder, self.trainer) - shutil.disk_usage(folder).free
            if missing > 0:
                raise InputError(_no_room(folder, self.trainer, state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir)
        checkpoint = folder / f"checkpoint-{state.global_step}"
        ranks.wait(in_step=True)
        if state.is_world_process_zero:
            _flush(checkpoint)
            write_json(checkpoint / COMPLETE, {"step": state.global_step, **written_by(self.trainer)})
            rotate_checkpoints(str(folder), self.limit, state.best_model_checkpoint)


def keep_whole(trainer: Any) -> None:
    """Let a built trainer's checkpoints be whole or invisible; once more, and it is the last callback again."""
    known = trainer.pop_callback(WholeCheckpoints)
    trainer.add_callback(known or WholeCheckpoints(trainer))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def remove_incomplete(folder: Path) -> None:
    """Remove what a kill has left half written; nobody may be writing."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path)


def written_by(trainer: Any) -> dict[str, Any]:
    """How many processes hold a trainer's state, and how it is split over them."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None) if trainer.is_deepspeed_enabled else None
    split = f"ZeRO-{plugin.zero_stage}" if plugin else "FSDP" if trainer.is_fsdp_enabled else "plain data parallel"
    return {"processes": trainer.args.world_size, "split": split}


def check_fits(checkpoint: Path, trainer: Any) -> None:
    """
    Raises:
        InputError: the checkpoint was written by another number of processes, or under another kind of launcher.
    """
    was, now = json.loads((checkpoint / COMPLETE).read_text("utf-8")), written_by(trainer)
    if was["processes"] != now["processes"]:
        raise InputError(
            f"{checkpoint} was written by {_processes(was['processes'])}, and now {_processes(now['processes'])} would "
            "go on: an optimiser step would have other rows. Start as many as before, or pass --force to begin again."
        )
    if was["split"] != now["split"]:
        raise InputError(
            f"{checkpoint} was written under {was['split']}, and this is {now['split']}: start it with the launcher "
            "file it was begun with, or pass --force to begin again."
        )


@contextmanager
def disk_full_is_said(trainer: Any) -> Iterator[None]:
    """
    Raises:
        InputError: in place of a full disk's error, with how much is missing. What was half written is removed.
    """
    try:
        yield
    except Exception as error:
        folder = Path(trainer.args.output_dir)
        if not ranks.is_first() or not (is_disk_full(error) or _short_write(error, folder, trainer)):
            raise
        remove_incomplete(folder)
        raise InputError(_no_room(folder, trainer, trainer.state.global_step)) from error


def _short_write(error: Exception, folder: Path, trainer: Any) -> bool:
    """torch's writer loses the reason of a write that failed, and tells of a stream or a position; the disk knows."""
    told = "inline_container" in str(error) or "iostream error" in str(error)
    return told and shutil.disk_usage(folder).free < bytes_wanted(folder, trainer)


def bytes_wanted(folder: Path, trainer: Any) -> int:
    """What the next checkpoint takes: as much as the last one, or before the first at least the weights that are
    trained with the optimiser's numbers for them."""
    last = last_checkpoint(folder)
    if last:
        return sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    # ZeRO-3 leaves a process a part of each weight, and ds_numel says how large the whole is.
    return sum(getattr(p, "ds_numel", p.numel()) * (p.element_size() + _ADAM_BYTES) for p in trained)


def _no_room(folder: Path, trainer: Any, step: int) -> str:
    wanted, free, last = bytes_wanted(folder, trainer), shutil.disk_usage(folder).free, last_checkpoint(folder)
    again = f"it goes on from {last.name}" if last else "it begins again"
    # A first checkpoint takes more than its weights; where they alone would fit, nobody knows how much.
    missing = f"{_size(wanted - free)} more" if wanted > free else "more"
    return (
        f"the disk is full: checkpoint-{step} needs {'about' if last else 'at least'} {_size(wanted)} in {folder} and "
        f"{_size(free)} are free. Make {missing} room and run the same command again; {again}."
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _flush(folder: Path) -> None:
    """Return when the disk has every file: a power cut may otherwise leave the mark and lose what it stands for."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
