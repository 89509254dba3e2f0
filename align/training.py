"""What the training stages share: trainer arguments, progress, metrics, resume, and saving."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback

from align import models, progress, ranks
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

    for model in models:
        lean_lora(model)
        lean_layers(model)
        if section.share_prefixes and (reason := share_prefixes(model)):
            progress.say(f"  {run.stage}: every row is computed whole: {reason}")


def train(trainer: Trainer, run: Run) -> dict[str, float]:
    """Train to the end, from the last complete checkpoint if there is one. Returns the trainer's closing figures."""
    checkpoint = last_checkpoint(Path(trainer.args.output_dir))
    if checkpoint:
        progress.say(f"  {run.stage}: resuming from {checkpoint.name}")
    trainer.remove_callback(PrinterCallback)  # it prints every log as a dict; metrics.jsonl holds them
    with contextlib.ExitStack() as stack:
        trainer.add_callback(_Metrics(run))
        trainer.add_callback(_Bar(run.stage, stack))
        output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return dict(output.metrics)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones, left by a kill, are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text())  # the last file the trainer writes
            found.append((state["global_step"], path))
        except (OSError, ValueError, KeyError):
            if ranks.is_first():
                shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


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
    for name in ("trl", "accelerate", "DeepSpeed", "torch.distributed", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Metrics(TrainerCallback):
    """Every log of the trainer becomes a line of metrics.jsonl."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero:
            self.run.metrics({"step": state.global_step, "epoch": state.epoch, **(logs or {})})


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
