"""What the training stages share: trainer arguments, progress, metrics, resume, and saving."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback

from align import checkpoints, models, progress, ranks, stopping
from align.config import Config, TrainerSection
from align.runs import Run
from reward.records import InputError

if TYPE_CHECKING:
    from transformers import Trainer

# What a line of metrics.jsonl or a bar's status does not need.
_NOISE = {"total_flos", "epoch", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def trainer_arguments(config: Config, section: TrainerSection, run: Run, **own: Any) -> Any:
    """The trainer's config object: the user's keys, then what the run folder decides.

    Raises:
        InputError: the trainer's config class refuses a value.
    """
    import torch

    module, _, name = section.config_class.rpartition(".")
    config_class = getattr(importlib.import_module(module), name)
    dtype, gpu = models.data_type(config.model), torch.cuda.is_available()
    arguments = section.trainer_arguments() | {
        "output_dir": str(run.work / "checkpoints"),
        "seed": config.seed,
        "data_seed": config.seed,
        "disable_tqdm": True,
        "use_cpu": not gpu,
        "bf16": section.bf16 if section.bf16 is not None else gpu and dtype == torch.bfloat16,
        "save_strategy": "steps",
        "dataloader_pin_memory": gpu,
        **own,
    }
    with refused_settings(run.stage):
        return config_class(**arguments)


@contextlib.contextmanager
def refused_settings(stage: str) -> Iterator[None]:
    """Around the building of a trainer: what the libraries refuse there is a setting, so it is the user's to mend.

    Raises:
        InputError: in place of the libraries' own errors.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise InputError(f"{stage}: the trainer refuses its settings: {error}") from error


def make_lean(section: TrainerSection, run: Run, *models: Any) -> None:
    """Under a built trainer's models: nothing is computed twice. What cannot be spared is said."""
    from align.lean import lean_layers
    from align.lora import lean_lora
    from align.prefix import share_prefixes
    from align.quantised import keep_precision

    for model in models:
        keep_precision(model)
        lean_lora(model)
        lean_layers(model)
        if section.share_prefixes and (reason := share_prefixes(model)):
            progress.say(f"  {run.stage}: every row is computed whole: {reason}")


def train(trainer: Trainer, run: Run) -> dict[str, float]:
    """Train to the end, from the last whole checkpoint if there is one. Returns the trainer's closing figures.

    Raises:
        InputError: the checkpoint does not fit this launch, or the disk is full.
        Terminated: SIGTERM came; the step in hand was finished and a checkpoint written.
    """
    checkpoint = _resumed_from(trainer, run)
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dict; metrics.jsonl holds them
    with contextlib.ExitStack() as stack:
        trainer.add_callback(_Metrics(run))
        trainer.add_callback(_Bar(run.stage, stack))
        asked = _StopWhenAsked()
        trainer.add_callback(asked)
        trainer.add_callback(_NothingLeft())
        checkpoints.keep_whole(trainer)
        output = None
        with checkpoints.disk_full_is_said(trainer), stopping.put_off(), contextlib.suppress(_Trained):
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if asked.stopped:
        progress.say(f"  {run.stage}: SIGTERM came, checkpoint-{trainer.state.global_step} is written")
        raise stopping.Terminated
    stopping.stop_if_asked()
    metrics = dict(output.metrics) if output else {}
    return metrics | _mean_loss(trainer.state) if checkpoint else metrics


def _mean_loss(state: Any) -> dict[str, float]:
    """Mean loss over the logged optimiser steps, with those before a stop, which a resumed trainer's closing figure
    leaves out. A line of the log is a mean over the steps since the one before."""
    total, before = 0.0, 0
    for line in state.log_history:
        if "loss" in line:
            total, before = total + line["loss"] * (line["step"] - before), line["step"]
    return {"train_loss": total / before} if before else {}


def _resumed_from(trainer: Trainer, run: Run) -> Path | None:
    """The checkpoint to go on from, the same on every process, with what came after it tidied away."""
    folder = Path(trainer.args.output_dir)
    if ranks.is_first():
        checkpoints.remove_incomplete(folder)
    checkpoint = ranks.share(checkpoints.last_checkpoint(folder))
    if checkpoint:
        checkpoints.check_fits(checkpoint, trainer)
        progress.say(f"  {run.stage}: resuming from {checkpoint.name}")
    run.rewind(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    return checkpoint


def release(*holders: Any) -> None:
    """Give memory back between two models; call it after deleting the last reference."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def calm_libraries() -> Iterator[None]:
    """Keep the libraries' own bars and advice off the screen: what the user must know, the stages say."""
    import datasets
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed guesses, with a warning
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "DeepSpeed", "torch.distributed", "peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Metrics(TrainerCallback):
    """Every log of the trainer becomes a line of metrics.jsonl."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = {} if logs is None else logs
        closing = "train_runtime" in logs  # of a stopped run it would sum up a part
        if "train_loss" in logs:  # the trainer's own dict: what was not logged before is in it from this process alone
            losses = ranks.collect(logs["train_loss"])
            logs["train_loss"] = sum(losses) / len(losses)
        if state.is_world_process_zero and not (closing and stopping.asked()):
            self.run.metrics({"step": state.global_step, "epoch": state.epoch, **logs})


class _Trained(Exception):
    """There is no step left to train."""


class _NothingLeft(TrainerCallback):
    """Resumed from its last checkpoint, the trainer would take one more step before it looks at the number of steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _Trained


class _StopWhenAsked(TrainerCallback):
    """After SIGTERM on any process: all save after the same step, and end."""

    stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if ranks.any_of(stopping.asked()):
            self.stopped = control.should_save = control.should_training_stop = True


class _Bar(TrainerCallback):
    """The trainer's steps as one of our progress bars."""

    def __init__(self, what: str, stack: contextlib.ExitStack) -> None:
        self.what, self.stack, self.status = what, stack, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report = self.stack.enter_context(progress.bar(f"{self.what}: training", state.max_steps))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        figures = [(k, v) for k, v in (logs or {}).items() if isinstance(v, float) and k not in _NOISE]
        self.status = " ".join(f"{key} {value:.3g}" for key, value in figures[:3])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(state.global_step, self.status)
