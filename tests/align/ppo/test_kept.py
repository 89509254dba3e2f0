"""Policies kept along the way: which, what is in them, that keeping changes nothing, and what they are good for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.compare.checkpoints import Point, course, points_along
from align.compare.schema import OverOptimisation
from align.config import Config, GenerationSection
from align.data.render import prompt_ids
from align.generate import Answer, generate
from align.logprobs import answer_logprobs
from align.pipeline import run_stage
from align.ppo.kept import KeepPolicies, kept_policies, updates_kept
from reward.records import InputError, user_prompt

# Which


def test_they_are_evenly_spaced_by_hand() -> None:
    assert updates_kept(3, 20) == [5, 10, 15]
    assert updates_kept(2, 10) == [3, 7]
    assert updates_kept(1, 5) == [3]  # a half is rounded up
    assert updates_kept(4, 5) == [1, 2, 3, 4]


@given(st.integers(2, 300).flatmap(lambda updates: st.tuples(st.integers(1, updates - 1), st.just(updates))))
def test_they_are_so_many_all_different_and_never_an_end(given: tuple[int, int]) -> None:
    count, updates = given
    found = updates_kept(count, updates)
    assert len(found) == count and found[0] >= 1 and found[-1] <= updates - 1
    gaps = [b - a for a, b in zip([0, *found], [*found, updates], strict=True)]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_more_than_there_are_updates_is_refused() -> None:
    with pytest.raises(InputError, match=r"ppo.keep_policies is 4, but of 4 updates 3 come before the last"):
        updates_kept(4, 4)


def test_other_files_are_no_policies(tmp_path: Path) -> None:
    assert kept_policies(tmp_path) == []
    for name in ("update-00012", "update-00003", "update-old", "notes"):
        (tmp_path / "policies" / name).mkdir(parents=True)
    assert [number for number, _ in kept_policies(tmp_path)] == [3, 12]


# What is in them


def keep(trainer: Any, folder: Path, updates: list[int]) -> KeepPolicies:
    folder.mkdir(exist_ok=True)
    callback = KeepPolicies(trainer, folder, folder / "work", updates)
    trainer.add_callback(callback)
    return callback


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name} {name}": w for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights_in(one), weights_in(other)
    assert first.keys() == second.keys() and len(first) > 2
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "whole"])
def test_each_is_what_a_shorter_run_ends_with_and_the_long_run_is_not_touched(
    adapted: bool, make_trainer: Any, tmp_path: Path
) -> None:
    given: dict[str, Any] = {} if adapted else {"peft_config": None, "learning_rate": 1e-3}
    finals = {}
    for updates in (2, 3, 4):
        plain = make_trainer(total_episodes=8 * updates, **given)
        plain.train()
        finals[updates] = tmp_path / f"after-{updates}"
        plain.save_model(str(finals[updates]))
    trainer = make_trainer(total_episodes=32, **given)
    callback = keep(trainer, tmp_path / "run", [2, 3])
    wanted = callback.bytes_wanted
    trainer.train()
    trainer.save_model(str(tmp_path / "run" / "model"))
    kept = kept_policies(tmp_path / "run")
    assert [path.name for _, path in kept] == ["update-00002", "update-00003"]
    for number, path in kept:
        assert_same_bits(path, finals[number])
        assert {file.name for file in path.iterdir()} == {file.name for file in finals[number].iterdir()}
    assert_same_bits(tmp_path / "run" / "model", finals[4])
    size = sum(file.stat().st_size for _, path in kept for file in path.glob("*.safetensors"))
    assert 0.9 * size < wanted <= size and callback.bytes_wanted == 0
    moved = weights_in(kept[0][1]), weights_in(kept[1][1])
    assert any(not torch.equal(moved[0][name], moved[1][name]) for name in moved[0])


def test_what_was_written_beyond_the_checkpoint_is_written_again(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(total_episodes=16)
    for name in ("update-00001", "update-00002", "update-00007"):  # the first is right, and may not be trusted
        (tmp_path / "run" / "policies" / name).mkdir(parents=True)
    half = tmp_path / "run" / "work" / "policy"
    half.mkdir(parents=True)
    (half / "half").touch()
    keep(trainer, tmp_path / "run", [1])
    trainer.train()
    ((number, path),) = kept_policies(tmp_path / "run")
    assert number == 1 and weights_in(path) and not (path / "half").exists() and not half.exists()


# The stage

REWARD = '''
import os

calls = 0

def vowels(completions, **columns):
    """The share of vowels; interrupts the process in the call that the environment names."""
    global calls
    calls += 1
    if calls == int(os.environ.get("STOP_IN", "0")):
        raise KeyboardInterrupt
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in texts]
'''


@pytest.fixture
def make_config(
    tiny_model: Path, tiny_demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """A pipeline of ppo alone, against a reward function; each has a module of its own, which counts from 0."""

    def make(name: str, **ppo: Any) -> Config:
        module = f"reward_of_{name}"
        (tmp_path / f"{module}.py").write_text(REWARD)
        monkeypatch.syspath_prepend(tmp_path)
        settings = {"total_episodes": 40, "per_device_train_batch_size": 8, "response_length": 6, "save_steps": 2}
        return Config.model_validate(
            {
                "name": name,
                "runs": str(tmp_path / "runs"),
                "stages": ["ppo"],
                "model": {"base": str(tiny_model), "dtype": "float32"},
                "data": {"demonstrations": str(tiny_demonstrations)},
                "ppo": settings | {"rewards": [f"{module}:vowels"], "learning_rate": 1e-2} | ppo,
            }
        )

    return make


def files_of(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / "DONE").read_text())["files"])


def test_a_resumed_stage_keeps_the_same_and_they_count_as_its_output(
    make_config: Callable[..., Config], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five updates of two steps with a checkpoint each; killed in the rollout of the fourth, after two were kept."""
    whole = run_stage(make_config("whole", keep_policies=3), "ppo").folder
    cut = make_config("cut", keep_policies=3, save_steps=3)
    monkeypatch.setenv("STOP_IN", "4")
    with pytest.raises(KeyboardInterrupt):
        run_stage(cut, "ppo")
    killed = cut.folder("ppo")
    assert [number for number, _ in kept_policies(killed)] == [1, 3]
    (killed / "policies" / "update-00001" / "mark").touch()
    (killed / "policies" / "update-00003" / "mark").touch()
    monkeypatch.delenv("STOP_IN")
    run_stage(cut, "ppo")

    kept = [f"policies/update-0000{number}" for number in (1, 3, 4)]
    assert sorted({name.rpartition("/")[0] for name in files_of(whole) if name.startswith("policies/")}) == kept
    # The checkpoint was of step 6, after the third update: what was kept until then stays, and nothing is lost.
    assert {name: digest for name, digest in files_of(killed).items() if not name.endswith("mark")} == files_of(whole)
    assert (killed / "policies" / "update-00001" / "mark").exists()
    assert not (whole / "work").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), whole / kept[1])
    points = points_along("base", str(tiny_model), whole)
    assert [point.name for point in points] == ["base", "update 1", "update 3", "update 4", "update 5"]
    assert [Path(point.path) for point in points[1:]] == [*(whole / name for name in kept), whole / "model"]


def test_a_stage_without_the_updates_or_the_disk_for_it_is_refused(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="keep_policies is 5, but of 5 updates 4 come before the last"):
        run_stage(make_config("many", keep_policies=5), "ppo")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("usage", (), {"free": 100})())
    with pytest.raises(InputError, match=r"ppo with keep_policies: 2 needs about 0\.\d+ GiB"):
        run_stage(make_config("full", keep_policies=2), "ppo")


# What they are good for


def without_repeats(answers: list[Answer]) -> list[float]:
    """Who is asked instead of the reward: a reader who wants every token of an answer to be a new one."""
    return [len({*answer.ids}) / len(answer.ids) for answer in answers]


@pytest.fixture
def looked_back(make_trainer: Any, base: Any, tokenizer: Any, vowels: Any, tmp_path: Path) -> Callable[..., Any]:
    """Train with the vowel reward, keep policies, and let them answer 48 prompts that were not trained on."""

    def run(gold: Callable[[list[Answer]], list[float]], **settings: Any) -> OverOptimisation:
        questions = [{"prompt": f"Tell me about rain, {'very ' * (i % 4)}number {i}."} for i in range(64)]
        shared = {"per_device_train_batch_size": 32, "num_ppo_epochs": 4, "response_length": 12, "kl_coef": 0.0}
        trainer = make_trainer(train_dataset=questions, **shared | settings)
        updates = trainer.args.num_updates
        keep(trainer, tmp_path, updates_kept(5, updates))
        trainer.train()
        trainer.save_model(str(tmp_path / "model"))
        held_out = [prompt_ids(tokenizer, user_prompt(f"What is number {i} about rain?")) for i in range(48)]
        section = GenerationSection(max_new_tokens=trainer.args.response_length, batch_size=48)

        def policy(path: str) -> Any:
            plain = copy.deepcopy(base)
            return PeftModel.from_pretrained(plain, path).eval() if path else plain.eval()

        def answer(path: str, label: str) -> list[Answer]:
            ((indices, answers),) = generate(policy(path), tokenizer, held_out, section, "held out")
            return [found for _, found in sorted(zip(indices, answers, strict=True), key=lambda pair: pair[0])]

        def kl(path: str, answers: list[Answer]) -> list[float]:
            pairs = [(prompt, each.ids) for prompt, each in zip(held_out, answers, strict=True)]
            own, reference = (answer_logprobs(policy(p), pairs, tokenizer.pad_token_id) for p in (path, ""))
            return [float((a - b).sum()) for a, b in zip(own, reference, strict=True)]

        kept = [Point(f"update {n}", n, str(path)) for n, path in kept_policies(tmp_path)]
        return course(
            [Point("base", 0, ""), *kept, Point(f"update {updates}", updates, str(tmp_path / "model"))],
            answer,
            lambda answers: vowels([each.ids for each in answers]),
            gold,
            kl,
            proxy_name="the vowel reward",
            gold_name="a reader of repeats",
            seed=0,
        )

    return run


def test_a_policy_without_kl_is_found_to_climb_past_what_it_stands_for(looked_back: Any) -> None:
    """The policy learns to say vowels, and at the end the same ones over and over: from 0.3 to 2.7 of 4 by the reward.

    On the way there its answers repeat themselves less than the base's, 0.75 against 0.53, and at the end more, 0.43.
    """
    found = looked_back(without_repeats, total_episodes=32 * 20)
    gold = [point["gold"]["mean"] for point in found["checkpoints"]]
    proxy = [point["proxy"]["mean"] for point in found["checkpoints"]]
    assert found["parting"] is not None and 0 < found["parting"] < 6, gold
    assert gold[found["parting"]] == max(gold) > gold[0] + 0.1 and gold[-1] < max(gold) - 0.1
    assert proxy[-1] > proxy[found["parting"]] + 0.5
    assert 0 < found["recommended"] <= found["parting"]
    assert found["sentences"][0].endswith("the policy is over-optimised.")
    assert found["checkpoints"][-1]["kl"]["mean"] > found["checkpoints"][2]["kl"]["mean"] > 0


def test_an_honest_run_is_not(looked_back: Any, vowels: Any) -> None:
    """With a KL penalty, and a judge that wants what the reward wants."""
    settings = {"kl_coef": 0.02, "response_length": 8, "num_ppo_epochs": 2, "learning_rate": 2e-2}
    found = looked_back(lambda answers: vowels([each.ids for each in answers]), total_episodes=32 * 12, **settings)
    assert found["parting"] is None
    assert found["checkpoints"][-1]["proxy"]["mean"] > found["checkpoints"][0]["proxy"]["mean"] + 0.3
    assert found["sentences"][0].startswith("No over-optimisation")
