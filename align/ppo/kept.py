"""The policies that ppo keeps along the way, so that compare can look back at where the reward was over-climbed.

`<run>/policies/update-00012/` is the policy after 12 updates, in the layout of `<run>/model`: the one that sampled the
answers of the record `update: 12`. Number 0 would be the reference, and the last is the stage's own model.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from reward.records import InputError

if TYPE_CHECKING:
    from align.ppo.trainer import PPOTrainer

POLICIES, PREFIX = "policies", "update-"


def updates_kept(count: int, updates: int) -> list[int]:
    """Numbers of updates after which a policy is kept: `count` of them, evenly spaced between 0 and `updates`.

    Neither end is among them. By hand: 3 of 20 are after 5, 10 and 15; 2 of 10 after 3 and 7.

    Raises:
        InputError: there are not so many updates before the last.
    """
    if count > updates - 1:
        raise InputError(
            f"ppo.keep_policies is {count}, but of {updates} updates {updates - 1} come before the last, whose policy "
            f"is the stage's own model: keep {updates - 1} at most, or raise ppo.total_episodes."
        )
    return [(2 * i * updates + count + 1) // (2 * (count + 1)) for i in range(1, count + 1)]  # halves are rounded up


def kept_policies(folder: Path) -> list[tuple[int, Path]]:
    """(updates done, folder of the policy) of a ppo run folder, in order; empty where none was kept."""
    found = [(path.name.removeprefix(PREFIX), path) for path in (folder / POLICIES).glob(f"{PREFIX}*")]
    return sorted((int(number), path) for number, path in found if number.isdigit())


class KeepPolicies(TrainerCallback):
    """Writes the policy away after each of the updates given; the training itself is not touched.

    Each appears whole or not at all: it is written into `scratch` and then renamed. What a run that was killed has
    written beyond its last checkpoint is removed when it resumes, and written again.

    Args:
        folder: the run folder.
        scratch: a folder on the same disk whose content may be lost.
        updates: numbers of updates, as `updates_kept` gives them.
    """

    def __init__(self, trainer: PPOTrainer, folder: Path, scratch: Path, updates: Sequence[int]) -> None:
        self.trainer, self.folder, self.scratch, self.updates = trainer, folder, scratch, set(updates)

    @property
    def bytes_wanted(self) -> int:
        """Disk that those still to be written take, but for tokenizers: the trained weights, once each."""
        trained = [p for p in self.trainer.cast.trained.parameters() if p.requires_grad]
        # ZeRO-3 leaves a process a part of each weight, and ds_numel says how large the whole is.
        size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in trained)
        return size * len(self.updates - {number for number, _ in kept_policies(self.folder)})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        done = len(self.trainer.history)
        for number, path in kept_policies(self.folder):
            if number not in self.updates or number > done:
                shutil.rmtree(path)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        done = len(self.trainer.history)
        if "update" not in (logs or {}) or done not in self.updates:
            return
        partial = self.scratch / "policy"
        if state.is_world_process_zero:
            shutil.rmtree(partial, ignore_errors=True)
        self.trainer.save_model(str(partial))  # on every process: together they hold the weights
        if state.is_world_process_zero:
            (self.folder / POLICIES).mkdir(exist_ok=True)
            partial.rename(self.folder / POLICIES / f"{PREFIX}{done:05d}")
