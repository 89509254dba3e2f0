"""All stages on a 4-bit base: every adapter above the SFT model's, every artefact loaded as it was held."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import load_peft_weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align import models, quantised
from align.config import Config, ModelSection
from align.config_file import load_config
from align.pipeline import run_pipeline, run_stage
from align.policies import find_policy
from align.ppo.cast import AdapterReward, _is_adapter_on, build_cast
from align.scorer import Scorer
from align.speakers import answer, find_places, load_speakers
from reward.records import InputError, file_digest, read_jsonl
from reward.scoring import head_scores
from tests.conftest import stopped_after
from tests.quantising import EIGHT, FOUR, below_of, logits, plain_settings, section

pytest.importorskip("bitsandbytes")


PIPELINE = """
name: tiny
runs: {runs}
model: {{base: {model}, dtype: float32, quantization: {{load_in_4bit: true}}}}
data: {{demonstrations: {demonstrations}, test_share: 0.3}}
sft: {{max_steps: 8, per_device_train_batch_size: 2, max_length: 128, learning_rate: 1.0e-2}}
sample: {{max_new_tokens: 8, answers_per_prompt: 2, batch_size: 64}}
reward: {{max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1.0e-2, trust: ignore, probed: 4}}
dpo: {{max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1.0e-2, save_steps: 2}}
ppo: {{total_episodes: 16, per_device_train_batch_size: 8, response_length: 8, learning_rate: 1.0e-3, save_steps: 1,
  keep_policies: 1, old_logprobs: recomputed}}
compare: {{max_new_tokens: 8, max_prompts: 4, checkpoint_prompts: 2}}
"""


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished pipeline on a 4-bit base."""
    folder = tmp_path_factory.mktemp("pipeline")
    path = folder / "tiny.yaml"
    path.write_text(PIPELINE.format(runs=folder / "runs", model=tiny_model, demonstrations=tiny_demonstrations))
    config = load_config(path)
    run_pipeline(config)
    return config


def test_every_stage_learnt_above_an_sft_model_that_stays(config: Config) -> None:
    """The adapter of each stage has moved from zero; what lies below it is the sft stage's, bit for bit."""
    done = json.loads((config.folder("sft") / "DONE").read_text())
    for file in (config.folder("sft") / "model").iterdir():
        assert done["files"][f"model/{file.name}"] == file_digest(file)
    wanted = below_of(models.load_causal_lm(str(config.folder("sft") / "model"), config.model))
    for stage in ("sft", "reward", "dpo", "ppo"):
        folder = config.folder(stage) / "model"
        weights = load_peft_weights(str(folder), device="cpu")
        assert not any("below" in name for name in weights)
        assert all(w.abs().max() > 0 and w.dtype == torch.float32 for n, w in weights.items() if "lora_B" in n), stage
        load = models.load_reward_model if stage == "reward" else models.load_policy
        found = below_of(load(str(folder), config.model))
        for name in wanted if stage != "sft" else ():
            assert torch.equal(found[f"base_model.model.{name}"], wanted[name])


def test_training_begins_at_the_reference(config: Config) -> None:
    """DPO's implicit rewards and PPO's KL are 0 before the first step, but for rounding."""
    first = read_jsonl(config.folder("dpo") / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/rejected"]) < 1e-5
    first = read_jsonl(config.folder("ppo") / "metrics.jsonl")[0]
    assert abs(first["objective/kl"]) < 1e-5


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_policies_load_with_transformers_and_peft(config: Config, stage: str) -> None:
    """The recipe of docs/models.md, and its one adapter for serving."""
    folder = config.folder(stage) / "model"
    wanted = logits(models.load_policy(str(folder), ModelSection(dtype="float32")))  # how it is held is found by itself
    model = AutoModelForCausalLM.from_pretrained(
        config.folder("sft") / "model", quantization_config=plain_settings(), dtype=torch.float32
    )
    assert (logits(model) - wanted).abs().max() > 1e-4
    model = PeftModel.from_pretrained(model, folder, adapter_name=stage)
    model.base_model.set_adapter(["default", stage])
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)

    base = AutoModelForCausalLM.from_pretrained(
        config.model.base, quantization_config=plain_settings(), dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, config.folder("sft") / "model", adapter_name="sft")
    model.load_adapter(str(folder), adapter_name=stage)
    model.add_weighted_adapter(["sft", stage], [1.0, 1.0], "whole", combination_type="cat")
    model.set_adapter("whole")
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)


def test_the_reward_model_scores_alike_wherever_it_is_loaded(config: Config) -> None:
    """As it was held in its run, by plain calls, and as an adapter on the policy's base in ppo."""
    folder = config.folder("reward") / "model"
    saved = read_jsonl(config.folder("reward") / "held_out_scores.jsonl")
    rows = [row for row in read_jsonl(config.folder("label") / "preferences.jsonl") if row["split"] == "test"]
    wanted = [row["chosen_reward"] for row in saved]
    reader = Scorer.load(folder, dtype=torch.float32)
    tokens = [reader.row(row["prompt"], row["chosen"]) for row in rows]
    found = head_scores(reader.model, tokens, reader.pad_id, batch_size=4)[:, 0]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)

    sft = str(config.folder("sft") / "model")
    tokenizer = AutoTokenizer.from_pretrained(sft)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    cast = build_cast(models.load_causal_lm(sft, config.model), [str(folder)], tokenizer, peft_config=lora)
    (judge,) = cast.rewards.rewards
    assert isinstance(judge, AdapterReward) and judge.model is cast.trained.policy
    ids = [row["input_ids"] for row in tokens]
    episodes: Any = type("Episodes", (), {"prompt_ids": [i[:3] for i in ids], "completion_ids": [i[3:] for i in ids]})
    assert judge(episodes) == pytest.approx(wanted, abs=1e-5)

    plain = AutoModelForSequenceClassification.from_pretrained(
        sft, quantization_config=plain_settings(), dtype=torch.float32, num_labels=1
    )
    plain = PeftModel.from_pretrained(plain, folder, adapter_name="reward")
    plain.base_model.set_adapter(["default", "reward"])
    quantised.compute_alike(plain)
    row = torch.tensor([ids[0]])
    assert float(plain.eval()(input_ids=row).logits[0, 0]) == pytest.approx(wanted[0], abs=1e-5)


def test_a_reward_model_of_another_base_is_not_hung_on_the_policys(config: Config) -> None:
    """The same weights, but whole: on them the adapter gives other rewards than those it was trained to give."""
    base, folder = str(config.model.base), config.folder("reward") / "model"
    whole = models.load_causal_lm(base, section(None))
    assert quantised.same_base(str(folder), models.load_causal_lm(str(config.folder("sft") / "model"), config.model))
    assert not quantised.same_base(str(folder), whole)
    assert not quantised.same_base(str(folder), models.load_causal_lm(base, section(EIGHT)))
    whole.name_or_path = str(config.folder("sft") / "model")
    assert not _is_adapter_on(folder, whole)
    assert quantised.same_base("somewhere/else", whole)


def test_the_base_is_quantised_for_its_pipeline_and_not_for_others(config: Config, tmp_path: Path) -> None:
    """What a run wrote is loaded as it was held there, whatever the reader's own config says."""
    unaware, other = ModelSection(dtype="float32"), section(EIGHT)
    kept = sorted((config.folder("ppo") / "policies").iterdir())
    for folder in (config.folder("sft") / "model", config.folder("ppo") / "model", *kept):
        for reader in (unaware, other):
            assert quantised.as_held(str(folder), reader).quantization == FOUR
    assert quantised.as_held(config.model.base, other).quantization == EIGHT  # what no run wrote
    plain = config.model_copy(update={"model": section(None, base=config.model.base), "runs": str(tmp_path)})
    run_stage(plain.model_copy(update={"stages": ["sft"]}), "sft")
    folder = str(plain.folder("sft") / "model")
    assert not quantised.is_quantised(models.load_policy(folder, section()))
    assert quantised.is_quantised(models.load_policy(folder, section(base=folder)))  # unless it is their own base


def test_compare_measured_every_model_against_sft(config: Config) -> None:
    report = json.loads((config.folder("compare") / "report.json").read_text())
    by_name = {model["name"]: model for model in report["models"]}
    assert list(by_name) == ["base", "sft", "dpo", "ppo"]
    assert all(model["perplexity"]["mean"] > 1 for model in by_name.values())
    assert by_name["dpo"]["kl"]["mean"] > 0
    assert [point["step"] for point in report["overoptimisation"]["checkpoints"]] == [0, 1, 2]


def test_chat_talks_to_a_policy_beside_what_it_was_made_from(config: Config) -> None:
    places = find_places(str(config.folder("ppo")))
    assert [place.name for place in places] == ["sft", "ppo"]
    speakers = load_speakers(places)
    assert speakers[0].model is speakers[1].model and quantised.is_quantised(speakers[0].model)
    wanted = logits(models.load_policy(find_policy(str(config.folder("ppo"))).folder, config.model))
    with speakers[1].speaking() as model:
        assert torch.equal(logits(model), wanted)
    with speakers[0].speaking() as model:
        assert torch.equal(logits(model), logits(models.load_policy(places[0].folder, config.model)))
    assert len(answer(speakers[1], [5, 9, 40], 4, 1.0, 0).text) >= 0


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_an_interrupted_stage_goes_on_to_the_same_weights(config: Config, tmp_path: Path, stage: str) -> None:
    shutil.copytree(config.folder("sft").parent, tmp_path / "tiny", symlinks=True)
    other = config.model_copy(update={"runs": str(tmp_path)})
    shutil.rmtree(other.folder(stage))
    with stopped_after(3):
        run_stage(other, stage)
    assert run_stage(other, stage).resuming
    (file,) = (config.folder(stage) / "model").glob("adapter_model.safetensors")
    assert (other.folder(stage) / "model" / file.name).read_bytes() == file.read_bytes()


def test_an_sft_adapter_that_could_not_stay_below_is_refused_before_training(config: Config, tmp_path: Path) -> None:
    other = load_config(config.folder("sft") / "config.yaml", [f"runs={tmp_path}", "sft.adapter.use_dora=true"])
    with pytest.raises(InputError, match=r"sft: .* is not plain LoRA .*keep to plain LoRA on linear layers"):
        run_stage(other, "sft")
