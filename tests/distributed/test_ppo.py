"""PPO on two real CPU processes, plain and under ZeRO-2 and ZeRO-3, against the same run in one process.

This file is also the program that the launcher starts: see `main`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)

from align import ranks
from align.checkpoints import last_checkpoint
from align.ppo.config import PPOConfig
from align.ppo.trainer import PPOTrainer
from reward.records import InputError
from tests.distributed.launching import launched

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 8  # optimiser steps of a run: 2 updates x 2 passes x 2 mini-batches
LEARNING_RATE = 1e-3
# What rounding in another order may do to a weight that 8 steps of Adam can move by 8e-3; measured: 5e-7.
TOLERANCE = 5e-6


def vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / 4 for text in completions]


def settings(out: Path, **changed: Any) -> PPOConfig:
    """Two updates of 8 episodes, over however many processes there are."""
    defaults: dict[str, Any] = {
        "total_episodes": 16,
        "per_device_train_batch_size": 4 // ranks.world_size(),
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "response_length": 12,
        "stop_token_ids": list(range(0, 330, 7)),  # answers of very different lengths
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "whiten_rewards": True,
        "kl_target": 0.05,
        "vf_coef": 0.5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return PPOConfig(output_dir=str(out), **(defaults | changed))


def make_trainer(folder: Path, out: Path, *, whole: bool = False, reward: Any = vowels, **changed: Any) -> PPOTrainer:
    """A trainer on the model in `folder`: of a LoRA adapter, with demonstrations mixed in, or of every weight."""
    set_seed(0)
    args = settings(out, **({} if whole else {"ptx_coef": 0.1}), **changed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    prompts = [{"prompt": f"Tell me about rain, {'very ' * (i % 4)}number {i}."} for i in range(24)]
    ptx = [{"prompt": f"What is rain? ({i})", "completion": f" Water{', kindly' * (i % 3)}."} for i in range(10)]
    # After the settings, as the ppo stage does it: under ZeRO-3 the model is split as it is loaded.
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=LINEAR)
    trainer = PPOTrainer(
        model,
        reward,
        args,
        prompts,
        eval_dataset=prompts[:3],
        processing_class=tokenizer,
        ptx_dataset=None if whole else ptx,
        peft_config=None if whole else lora,
    )
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        # Else every weight of a tiny model is small enough to be held whole after its first use.
        plugin.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return trainer


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.steps:
            raise Killed


def finish(trainer: PPOTrainer, out: Path, evaluate: bool = False, resume: Path | None = None) -> None:
    """Train, save the model, and keep what the test looks at."""
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    # On three prompts, and on fewer than there are processes.
    evaluated = trainer.evaluate() | trainer.evaluate([{"prompt": "What is rain?"}], None, "one") if evaluate else {}
    trainer.save_model(str(out / "model"))
    assert trainer.rollout is not None and trainer.state.global_step == STEPS
    result = {"rollout": trainer.rollout.state(), "history": trainer.history, "evaluated": evaluated}
    torch.save(result, out / f"result_{trainer.args.process_index}.pt")


def run_lora(folder: Path, out: Path) -> None:
    finish(make_trainer(folder, out, save_strategy="steps", save_steps=3), out, evaluate=True)


def run_resumed(folder: Path, out: Path) -> None:
    """The same run, killed in the middle of its second update and started again from a checkpoint in its first."""
    trainer = make_trainer(folder, out, save_strategy="steps", save_steps=3)
    trainer.add_callback(KillAfter(5))
    with contextlib.suppress(Killed):
        trainer.train()
    assert trainer.state.global_step == 5
    checkpoint = last_checkpoint(out)
    assert checkpoint is not None and checkpoint.name == "checkpoint-3"
    finish(make_trainer(folder, out, save_strategy="steps", save_steps=3), out, resume=checkpoint)


def run_uneven(folder: Path, out: Path) -> None:
    """The answers of the second process end at their first token, those of the first at the length limit."""
    trainer = make_trainer(folder, out, response_length=40)
    trainer.stop_ids = list(range(400)) if ranks.world_size() > 1 and not ranks.is_first() else [399]
    faulthandler.dump_traceback_later(90, exit=True)  # nobody may wait for ever
    finish(trainer, out)
    faulthandler.cancel_dump_traceback_later()


def run_whole(folder: Path, out: Path) -> None:
    """Every weight trained, a reference of its own, and a reward model of its own."""
    finish(make_trainer(folder, out, whole=True, reward=str(folder / "scorer")), out)


def refused(make: Callable[[], object]) -> str:
    try:
        make()
    except InputError as error:
        return str(error)
    raise AssertionError("not refused")


def run_refused_warmup(folder: Path, out: Path) -> None:
    sentence = refused(lambda: make_trainer(folder, out, critic_warmup_updates=2))
    assert sentence.startswith("critic_warmup_updates is 2, but DeepSpeed's optimiser"), sentence


def run_refused_scorer(folder: Path, out: Path) -> None:
    made = made_of(folder, out)  # with the settings: from here on models are split as they are loaded
    scorer = AutoModelForSequenceClassification.from_pretrained(folder / "scorer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "scorer")
    assert ranks.is_split(scorer)
    sentence = refused(lambda: PPOTrainer(reward=scorer, reward_processing_classes=tokenizer, **made))
    assert sentence.startswith("ZeRO-3 split the reward model `scorer` as it was loaded"), sentence


def made_of(folder: Path, out: Path) -> dict[str, Any]:
    prompts = [{"prompt": f"What is rain? ({i})"} for i in range(8)]
    return {"model": str(folder / "policy"), "args": settings(out), "train_dataset": prompts}


def main() -> None:
    """`test_ppo.py FOLDER OUT RUN...`: the runs named, each into a folder of its own under OUT."""
    folder, out, *names = sys.argv[1:]
    ranks.start()
    for name in names:
        globals()[f"run_{name}"](Path(folder), Path(out) / name)
        ranks.wait()
    if ranks.is_first():
        (Path(out) / "DONE").write_text(" ".join(names))


# -- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy`, whose logits differ enough to be learned from, and `scorer`, a reward model with one label."""
    folder = tmp_path_factory.mktemp("ppo")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    with torch.no_grad():
        policy.get_input_embeddings().weight.mul_(10)
        torch.nn.init.normal_(scorer.score.weight)
    for name, model in (("policy", policy), ("scorer", scorer)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The runs in one process."""
    run_lora(folder, folder / "alone/lora")
    run_whole(folder, folder / "alone/whole")
    return folder / "alone"


def launch(folder: Path, accelerate: str, *names: str) -> Path:
    """The runs on two processes; none of them is left behind, however it ends."""
    out = folder / accelerate.removesuffix(".yaml")
    output = launched(folder, accelerate, [__file__, str(folder), str(out), *names], 400)
    assert (out / "DONE").read_text() == " ".join(names), output[-6000:]
    return out


def result(folder: Path, process: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"result_{process}.pt", weights_only=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "model").glob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def check_same_run(mine: Path, theirs: Path, tolerance: float) -> None:
    """Prompts, answers, rewards and advantages of the last update, the figures of all, and the weights."""
    one, other = result(mine), result(theirs)
    a, b = one["rollout"], other["rollout"]
    assert a["prompts"] == b["prompts"] and a["answers"] == b["answers"]
    for name in ("score_B", "reward_BT", "advantage_BT", "return_BT"):  # rewards and advantages are whitened
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0)
    assert len(one["history"]) == len(other["history"]) == 2
    for x, y in zip(one["history"], other["history"], strict=True):
        assert x.keys() == y.keys()
        own = {"episode/distinct"}  # of each process's own answers
        assert {k: x[k] for k in x.keys() - own} == pytest.approx({k: y[k] for k in x.keys() - own}, rel=1e-4, abs=1e-5)
    a, b = weights(mine), weights(theirs)
    assert a.keys() == b.keys() and any("value_head" in name for name in a)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=lambda text, name=name: name + text)


def check_processes(alone: Path, two: Path) -> None:
    check_same_run(alone / "lora", two / "lora", TOLERANCE)
    check_same_run(two / "lora", two / "resumed", 0)
    ours, theirs = (result(folder / "lora")["evaluated"] for folder in (alone, two))
    assert ours.keys() == theirs.keys() >= {"eval_objective/score", "one_objective/score"}
    compared = [name for name in ours if not name.endswith("episode/distinct")]
    assert {k: ours[k] for k in compared} == pytest.approx({k: theirs[k] for k in compared}, rel=1e-4, abs=1e-5)
    first, second = result(two / "lora"), result(two / "lora", process=1)
    assert first["history"] == second["history"] and first["rollout"]["answers"] == second["rollout"]["answers"]
    # The answers were of different lengths, and each process's part alone has another mean: there was something to do.
    lengths_B = first["rollout"]["answer_BT"].sum(1)
    assert len(lengths_B.unique()) > 2
    halves = zip(first["rollout"]["advantage_BT"].chunk(2), first["rollout"]["answer_BT"].chunk(2), strict=True)
    means = [float(advantage_BT[answer_BT].mean()) for advantage_BT, answer_BT in halves]
    assert abs(means[0]) > 0.01 and abs(float(first["rollout"]["advantage_BT"].sum())) < 1e-4
    answers = result(two / "uneven")["rollout"]["answers"]
    assert [len(answer) for answer in answers] == [40] * 4 + [1] * 4


def check_loads(folder: Path, saved: Path) -> None:
    """Plain PEFT and safetensors, in this one process."""
    adapter = load_file(saved / "model/adapter_model.safetensors")
    changed = [name for name, tensor in adapter.items() if "lora_B" in name and tensor.abs().max() > 1e-3]
    assert len(changed) == 2 * len(LINEAR)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "policy"), saved / "model")
    ids = AutoTokenizer.from_pretrained(saved / "model")("What is rain?", return_tensors="pt").input_ids
    adapted = model(ids).logits
    with model.disable_adapter():
        assert (model(ids).logits - adapted).abs().max() > 1e-4
    head = load_file(saved / "model/value_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {"weight": (1, 32), "bias": (1,)}
    assert head["weight"].abs().max() > 1e-3


@pytest.mark.processes
def test_plain_data_parallel_makes_the_update_of_one_process(folder: Path, alone: Path) -> None:
    two = launch(folder, "cpu.yaml", "lora", "resumed", "uneven")
    check_processes(alone, two)
    check_loads(folder, two / "lora")


@pytest.mark.processes
def test_zero_2_makes_the_update_of_one_process(folder: Path, alone: Path) -> None:
    two = launch(folder, "zero2.yaml", "lora", "resumed", "uneven", "refused_warmup")
    check_processes(alone, two)
    check_loads(folder, two / "lora")


@pytest.mark.processes
def test_zero_3_makes_the_update_of_one_process(folder: Path, alone: Path) -> None:
    two = launch(folder, "zero3.yaml", "lora", "resumed", "uneven", "whole", "refused_scorer")
    check_processes(alone, two)
    check_loads(folder, two / "lora")
    check_same_run(alone / "whole", two / "whole", TOLERANCE)
    model = AutoModelForCausalLM.from_pretrained(two / "whole/model")
    before = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert (model.lm_head.weight - before.lm_head.weight).abs().max() > 1e-3


def test_fsdp_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU accelerate leaves FSDP off, so what the Trainer says of it is put in by hand."""
    prepare = PPOTrainer.create_accelerator_and_postprocess

    def with_fsdp(self: PPOTrainer) -> None:
        prepare(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(PPOTrainer, "create_accelerator_and_postprocess", with_fsdp)
    with pytest.raises(InputError, match="FSDP leaves each process a part"):
        PPOTrainer(reward=vowels, **made_of(folder, tmp_path))


if __name__ == "__main__":
    main()
