"""Checkpoints: whole or invisible, rotated, not trained beyond; and SIGTERM, at once or put off."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from align import stopping
from align.checkpoints import COMPLETE, check_fits, keep_whole, last_checkpoint, remove_incomplete
from align.config_file import load_config
from align.pipeline import run_stage
from align.runs import open_run
from reward.records import InputError


class Line(torch.nn.Module):
    """y = w x, trained towards w = 2 and then beyond it, so that the best checkpoint is not the last."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.w * x - labels) ** 2).mean(), "logits": self.w * x}


class Overshoot(TrainerCallback):
    """After three steps the weight runs away."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step >= 3:
            more["model"].w.data += 5


def line_trainer(folder: Path, steps: int = 5, **settings: Any) -> Trainer:
    rows = [{"x": torch.tensor([1.0]), "labels": torch.tensor([2.0])}] * 4
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(Line(), arguments, train_dataset=rows, eval_dataset=rows)
    keep_whole(trainer)
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_old_checkpoints_go_once_the_new_one_is_whole(tmp_path: Path) -> None:
    trainer = line_trainer(tmp_path, save_total_limit=2)
    there: list[list[str]] = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            there.append(names(tmp_path))

    trainer.callback_handler.callbacks.insert(0, Look())  # before the mark is made
    trainer.train()
    assert there[3] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]  # two whole ones, and the one being written
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    mark = json.loads((tmp_path / "checkpoint-5" / COMPLETE).read_text())
    assert mark == {"step": 5, "processes": 1, "split": "plain data parallel"}


def test_the_best_checkpoint_is_kept_where_one_is_asked_for(tmp_path: Path) -> None:
    trainer = line_trainer(
        tmp_path, save_total_limit=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    trainer.add_callback(Overshoot())
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint)).name
    assert best == "checkpoint-3"
    assert names(tmp_path) == [best, "checkpoint-5"]
    assert abs(float(trainer.model.w) - 2) < 1.5


def test_asked_twice_one_callback_keeps_the_limit(tmp_path: Path) -> None:
    trainer = line_trainer(tmp_path, save_total_limit=1)
    keep_whole(trainer)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-5"]


def test_without_its_mark_a_checkpoint_is_invisible(tmp_path: Path) -> None:
    line_trainer(tmp_path, steps=11).train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-11"  # not 9, which comes last by name
    (tmp_path / "checkpoint-11" / COMPLETE).unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    remove_incomplete(tmp_path)
    assert len(names(tmp_path)) == 10 and not (tmp_path / "checkpoint-11").exists()
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ({"processes": 8, "split": "plain data parallel"}, "written by 8 processes, and now 1 process would go on"),
        ({"processes": 1, "split": "ZeRO-3"}, "written under ZeRO-3, and this is plain data parallel: start it with"),
    ],
)
def test_a_checkpoint_of_another_launch_is_refused(tmp_path: Path, mark: dict[str, Any], said: str) -> None:
    (tmp_path / COMPLETE).write_text(json.dumps(mark))
    with pytest.raises(InputError, match=said) as caught:
        check_fits(tmp_path, line_trainer(tmp_path / "out"))
    assert "--force" in str(caught.value)


def test_a_run_that_has_only_to_be_saved_trains_no_further(
    tiny_model: Path, tiny_demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the last checkpoint and the merged model: the trainer alone would take a ninth step of eight."""
    file = tmp_path / "a.yaml"
    file.write_text(
        f"runs: {tmp_path / 'runs'}\nmodel: {{base: {tiny_model}, dtype: float32}}\n"
        f"data: {{demonstrations: {tiny_demonstrations}, test_share: 0.3}}\n"
        "sft: {max_steps: 8, per_device_train_batch_size: 2, max_length: 128, learning_rate: 1.0e-2, save_steps: 4, "
        "lr_scheduler_type: constant}\n"
    )
    whole = run_stage(load_config(file, ["name=whole"]), "sft")

    class Stopped(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    config = load_config(file, ["name=stopped"])
    with monkeypatch.context() as patch:
        patch.setattr("align.models.merged", stop)
        with pytest.raises(Stopped):
            run_stage(config, "sft")
    again = run_stage(config, "sft")
    assert again.resuming
    for name, tensor in load_file(whole.folder / "model/model.safetensors").items():
        assert torch.equal(tensor, load_file(again.folder / "model/model.safetensors")[name]), name
    steps = [json.loads(line)["step"] for line in (again.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 8
    assert again.info["summary"]["train_loss"] == pytest.approx(whole.info["summary"]["train_loss"], rel=1e-6)


def test_metrics_are_rewound_to_the_checkpoint(tmp_path: Path) -> None:
    with open_run("sft", tmp_path / "1-sft", {}, config_yaml="") as run:
        for step in range(1, 6):
            run.metrics({"step": step, "loss": 1 / step})
        path = tmp_path / "1-sft/metrics.jsonl"
        with path.open("a") as out:
            out.write('{"step": 6, "lo')  # cut short by a kill; the next line would be appended to it
        run.rewind(3)
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
        run.rewind(0)
        assert path.read_text() == ""


def test_scratch_left_by_a_kill_right_after_done_goes_with_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "1-sft"
    with open_run("sft", folder, {}, config_yaml="") as run:
        run.finish({})
    (folder / "work/checkpoints").mkdir(parents=True)
    with open_run("sft", folder, {}, config_yaml="") as run:
        assert run.finished
    assert not (folder / "work").exists()


def test_scratch_is_there_until_done_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while a large model's digest is computed must not cost the checkpoints."""
    folder = tmp_path / "1-sft"
    with pytest.raises(RuntimeError), open_run("sft", folder, {}, config_yaml="") as run:
        (run.work / "checkpoints").mkdir()

        def killed(*_: Any) -> str:
            raise RuntimeError

        monkeypatch.setattr("align.runs.digest", killed)
        run.finish({})
    assert (folder / "work/checkpoints").is_dir() and not (folder / "DONE").exists()


# SIGTERM


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stopping, "_asked", False)
    stopping.listen()
    yield
    signal.signal(signal.SIGTERM, before)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def test_sigterm_stops_at_once_and_only_the_first_time(listening: None) -> None:
    with pytest.raises(stopping.Terminated):
        sigterm()
    sigterm()  # while the first is being handled
    assert stopping.asked()


def test_sigterm_is_put_off_while_something_is_in_hand(listening: None) -> None:
    with stopping.put_off():
        sigterm()
        sigterm()
        assert stopping.asked()
    with pytest.raises(stopping.Terminated):
        stopping.stop_if_asked()
