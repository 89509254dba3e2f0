"""The gate: reward models really trained on sound, length-only and shuffled labels, and what ppo does with each."""

from __future__ import annotations

import json
import random
import typing
from pathlib import Path
from typing import Any

import pytest

from align.config import Config, ProbeName
from align.config_file import load_config
from align.pipeline import run_stage
from align.runs import read_info
from reward.probes import PROBES
from reward.records import InputError, read_jsonl
from tests.conftest import write_jsonl

CONFIG = """
name: {name}
runs: {runs}
stages: [label, reward, ppo]
model: {{base: {model}, dtype: float32}}
data: {{preferences: {data}, test_share: 0.4}}
label: {{source: dataset}}
reward:
  adapter: null
  learning_rate: 3.0e-3
  max_steps: 80
  per_device_train_batch_size: 16
  probed: 24
ppo: {{total_episodes: 8, per_device_train_batch_size: 8, response_length: 6}}
"""
NEUTRAL = ["stone", "river", "paper", "cloud", "table", "garden", "window", "bread", "salt", "clock", "winter", "music"]


def sentence(draw: random.Random, words: int, *marks: str) -> str:
    chosen = [draw.choice(NEUTRAL) for _ in range(words)]
    for mark in marks:
        chosen.insert(draw.randrange(len(chosen)), mark)
    return " ".join(chosen)


def nonsense(draw: random.Random) -> str:
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randrange(3, 9)))


def pairs(kind: str, count: int = 240) -> list[dict[str, str]]:
    """Made-up pairs: kind words against rude ones, the longer of two neutral answers, or a coin's choice."""
    draw, rows = random.Random(0), []
    for number in range(count):
        if kind == "length":
            short, long = sorted(draw.sample(range(3, 24), 2))
            chosen, rejected = sentence(draw, long), sentence(draw, short)
        else:
            words = draw.randrange(6, 14)
            two = [sentence(draw, words, "please"), sentence(draw, words, "stupid")]
            if kind == "sound" and number % 3 == 0:  # an answer that goes on without sense is worse
                two[1] = f"{two[0]} {' '.join(nonsense(draw) for _ in range(draw.randrange(4, 16)))}"
            if kind == "shuffled" and draw.random() < 0.5:
                two.reverse()
            chosen, rejected = two
        rows.append({"prompt": f"Say something ({number}).", "chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """A finished reward stage on each kind of labels."""
    found = {}
    for kind in ("sound", "length", "shuffled"):
        folder = tmp_path_factory.mktemp(kind)
        data = write_jsonl(folder / "pairs.jsonl", pairs(kind))
        path = folder / f"{kind}.yaml"
        path.write_text(CONFIG.format(name=kind, runs=folder / "runs", model=tiny_model, data=data))
        found[kind] = load_config(path)
        for stage in ("label", "reward"):
            run_stage(found[kind], stage)
    return found


def told(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.folder("reward") / "trust.json").read_text())
    return found


def test_a_sound_reward_model_passes_and_ppo_climbs_it(trained: dict[str, Config]) -> None:
    config = trained["sound"]
    summary = read_info(config.folder("reward"))["summary"]
    assert summary["trusted"] is True and summary["held_out_accuracy"]["rate"] > 0.9, told(config)["checks"]
    assert len(read_jsonl(config.folder("reward") / "held_out_scores.jsonl")) == summary["held_out_pairs"]
    assert (config.folder("reward") / "trust.html").is_file()
    run_stage(config, "ppo")
    assert read_info(config.folder("ppo"))["summary"]["reward_trust"] == []


@pytest.mark.parametrize(("kind", "check"), [("length", "length"), ("shuffled", "accuracy")])
def test_an_unsound_one_is_refused_with_its_figures(trained: dict[str, Config], kind: str, check: str) -> None:
    config = trained[kind]
    failed = [c for c in told(config)["checks"] if not c["passed"] and c["level"] == "refuse"]
    assert any(check in c["name"] for c in failed), failed
    with pytest.raises(InputError, match=r"the reward model fails .* of its trust report") as error:
        run_stage(config, "ppo")
    for c in failed:
        figure = "not measured" if c["figure"] is None else f"{c['figure']:.2f}"
        assert f"{c['name']} {figure} (threshold " in str(error.value)
    assert "reward.trust: ignore" in str(error.value)
    assert not (config.folder("ppo") / "DONE").exists()


def test_ignoring_it_is_said_ever_after(trained: dict[str, Config], tmp_path: Path) -> None:
    config = trained["shuffled"]
    reward = config.reward.model_copy(update={"trust": "ignore", "aggregate": "lcb"})
    careless = config.model_copy(update={"reward": reward})
    run_stage(careless, "ppo", force=True)
    (said,) = read_info(config.folder("ppo"))["summary"]["reward_trust"]
    assert "which reward.trust: ignore let pass: " in said and "accuracy 0." in said

    from align.compare.telling import notices_of_pipeline

    told = notices_of_pipeline(
        careless.model_copy(update={"compare": careless.compare.model_copy(update={"judges": ["reward"]})}), True
    )
    assert said in told
    assert any("failed its own trust report" in notice for notice in told)


def test_a_forced_run_that_is_refused_loses_no_finished_policy(trained: dict[str, Config]) -> None:
    config = trained["shuffled"]
    ignored = config.model_copy(update={"reward": config.reward.model_copy(update={"trust": "ignore"})})
    run_stage(ignored, "ppo", force=True)
    with pytest.raises(InputError, match="the reward model fails"):
        run_stage(config, "ppo", force=True)
    assert (config.folder("ppo") / "DONE").is_file()
    run_stage(ignored, "ppo")  # already done


def test_the_probes_a_config_can_forgive_are_those_there_are() -> None:
    assert set(typing.get_args(ProbeName)) == {probe.name for probe in PROBES}


def test_a_missing_report_is_refused(trained: dict[str, Config], tmp_path: Path) -> None:
    from align.trust import pass_gate

    elsewhere = trained["sound"].model_copy(update={"runs": str(tmp_path)})
    with pytest.raises(InputError, match=r"trust\.json is missing: run `align reward` again"):
        pass_gate(elsewhere, ["reward"])
    assert pass_gate(elsewhere, ["a.module:function"]) == []
    (tmp_path / "judge").mkdir()
    assert pass_gate(elsewhere, [str(tmp_path / "judge")]) == [
        f"The reward model {tmp_path / 'judge'} has no trust report: nothing is known of its worth."
    ]


def test_relaxed_thresholds_let_it_through(trained: dict[str, Config]) -> None:
    """The gate judges the figures anew, so that a threshold can be changed without training again."""
    from align.trust import pass_gate

    strict = trained["sound"].reward.gate.model_copy(update={"min_accuracy": 1.0})
    config = trained["sound"].model_copy(update={"reward": trained["sound"].reward.model_copy(update={"gate": strict})})
    with pytest.raises(InputError, match=r"fails 1 check .*: accuracy 1\.00 \(threshold 1\)"):
        pass_gate(config, ["reward"])
    assert pass_gate(trained["sound"], ["reward"]) == []
