"""All seven stages on a tiny model: skipping, resuming, lineage, and every artefact loaded by plain calls."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from align import lineage
from align.config import STAGES, Config
from align.config_file import load_config
from align.pipeline import run_pipeline, run_stage
from align.runs import read_info
from reward.records import InputError, prompt_text, read_jsonl
from reward.scoring import score_rows
from tests.conftest import Stopped, stopped_after

CONFIG = """
name: tiny
runs: {runs}
model: {{base: {model}, dtype: float32}}
data: {{demonstrations: {demonstrations}, test_share: 0.3}}
sft: {{max_steps: 20, per_device_train_batch_size: 2, max_length: 128, learning_rate: 1.0e-2, save_steps: 5}}
sample: {{max_new_tokens: 12, answers_per_prompt: 3, batch_size: 16}}
reward: {{max_steps: 6, per_device_train_batch_size: 4, learning_rate: 1.0e-2, save_steps: 2, trust: ignore}}
dpo: {{max_steps: 6, per_device_train_batch_size: 4, learning_rate: 1.0e-2, save_steps: 2}}
ppo: {{total_episodes: 32, per_device_train_batch_size: 8, response_length: 12, learning_rate: 1.0e-3, save_steps: 1,
  keep_policies: 2}}
compare: {{max_new_tokens: 12, checkpoint_prompts: 6, best_of_n: 2}}
"""


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(runs=folder / "runs", model=tiny_model, demonstrations=tiny_demonstrations))
    config = load_config(path)
    run_pipeline(config)
    return config


def copy_of(config: Config, tmp_path: Path, *stages: str) -> Config:
    """The same pipeline elsewhere, with some stages not yet run."""
    shutil.copytree(config.folder("sft").parent, tmp_path / "tiny")
    other = config.model_copy(update={"runs": str(tmp_path)})
    for stage in stages:
        shutil.rmtree(other.folder(stage))
    return other


def test_every_stage_is_done_and_says_what_it_was_made_from(config: Config) -> None:
    for stage in STAGES:
        folder = config.folder(stage)
        assert (folder / "DONE").is_file(), stage
        info = read_info(folder)
        assert info is not None and info["status"] == "done" and info["seconds"] > 0 and info["peak_memory_gib"] > 0
        assert info["simulated_labels"] == (stage not in ("sft", "sample"))
        assert not (folder / "work").exists()
        assert load_config(folder / "config.yaml").model_dump() == config.model_dump()


def test_a_second_run_does_nothing(config: Config) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(config.runs).rglob("*") if path.name != ".lock"}
    run_pipeline(config)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_chain_leads_back_to_labels_and_data(config: Config, tiny_demonstrations: Path) -> None:
    text = lineage.as_text(config.folder("ppo"))
    for stage in ("ppo", "reward", "label", "sample", "sft"):
        assert f"-{stage}" in text
    assert "SIMULATED" in text and str(tiny_demonstrations) in text
    labels = read_info(config.folder("label"))["summary"]
    assert labels["labels_digest"] in text


def test_held_out_prompts_are_never_trained_on(config: Config) -> None:
    """Each stage's own records: what compare asks was on no stage's training side."""
    asked = {row["prompt_id"] for row in read_jsonl(config.folder("compare") / "answers.jsonl")}
    comparisons = read_jsonl(config.folder("sample") / "comparisons.jsonl")
    sides = {row["id"].removeprefix("tiny-"): row["split"] for row in comparisons}
    assert asked and all(sides.get(prompt, "test") == "test" for prompt in asked)
    preferences = read_jsonl(config.folder("label") / "preferences.jsonl")
    trained = {row["comparison_id"].removeprefix("tiny-") for row in preferences if row["split"] == "train"}
    assert trained and not trained & asked


def test_labels_went_through_the_store(config: Config) -> None:
    with sqlite3.connect(config.folder("label") / "labels.sqlite") as database:
        (count,) = database.execute("SELECT count(*) FROM labels").fetchone()
    assert count == read_info(config.folder("label"))["summary"]["labels"] > 0
    for row in read_jsonl(config.folder("label") / "preferences.jsonl"):
        assert row["simulated"] is True and len(row["annotators"]) == 3


# -- plain loading -----------------------------------------------------------------------------------------------------


def ids_of(folder: Path) -> tuple[Any, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is rain?"}]
    return tokenizer, tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def test_sft_loads_with_transformers(config: Config) -> None:
    folder = config.folder("sft") / "model"
    tokenizer, ids = ids_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3
    assert tokenizer.chat_template and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not hasattr(model, "peft_config")  # merged: a whole model


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_policies_load_with_peft_and_with_transformers(config: Config, stage: str) -> None:
    folder = config.folder(stage) / "model"
    _, ids = ids_of(folder)
    base = AutoModelForCausalLM.from_pretrained(config.folder("sft") / "model")
    expected = base(ids).logits
    with_peft = PeftModel.from_pretrained(base, folder)(ids).logits
    assert (with_peft - expected).abs().max() > 1e-4
    alone = AutoModelForCausalLM.from_pretrained(folder)  # finds its base by the adapter's own record
    torch.testing.assert_close(alone(ids).logits, with_peft, atol=1e-6, rtol=0)


def test_reward_loads_with_plain_calls_and_the_same_scores(config: Config) -> None:
    folder = config.folder("reward") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(config.folder("sft") / "model", num_labels=1)
    model = PeftModel.from_pretrained(base, folder)
    preferences = {row["comparison_id"]: row for row in read_jsonl(config.folder("label") / "preferences.jsonl")}
    saved = read_jsonl(config.folder("reward") / "held_out_scores.jsonl")
    assert saved
    by_pair = [row for row in read_jsonl(config.folder("label") / "preferences.jsonl") if row["split"] == "test"]
    for row, scores in zip(by_pair, saved, strict=True):
        assert preferences and row["comparison_id"] == scores["comparison_id"]
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False).removesuffix("\n")
            ids = tokenizer(text, add_special_tokens=False).input_ids
            (found,) = score_rows(model, [ids], tokenizer.pad_token_id)
            assert found == pytest.approx(scores[f"{side}_reward"], abs=1e-5)


def test_preferences_train_in_trl_as_they_are(config: Config, tmp_path: Path) -> None:
    path = config.folder("label") / "preferences.jsonl"
    dataset: Dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer, _ = ids_of(config.folder("sft") / "model")
    arguments = DPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", bf16=False, use_cpu=True
    )
    model = AutoModelForCausalLM.from_pretrained(config.folder("sft") / "model")
    result = DPOTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer).train()
    assert result.metrics["train_loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2 at initialisation


def test_the_policies_along_the_way_are_looked_back_on(config: Config) -> None:
    """What was answered for the verdict is the first and the last point of the course, to the last digit."""
    report = json.loads((config.folder("compare") / "report.json").read_text())
    course = report["overoptimisation"]
    assert (course["proxy_name"], course["gold_name"]) == ("the reward model", "the simulated preference")
    assert [point["step"] for point in course["checkpoints"]] == [0, 1, 3, 4]
    assert course["best_of_n"]["n"] == [1, 2] and len(course["sentences"]) == 3
    prompts = {prompt_text(row["prompt"]) for row in read_jsonl(config.folder("compare") / "answers.jsonl")[:6]}
    for model, point in (("sft", course["checkpoints"][0]), ("ppo", course["checkpoints"][-1])):
        scores = [
            answer["scores"]["simulated preference"]
            for example in report["examples"]
            for answer in example["answers"]
            if answer["model"] == model and example["prompt"] in prompts
        ]
        assert len(scores) == point["gold"]["n"] == 6
        assert point["gold"]["mean"] == pytest.approx(sum(scores) / 6, abs=1e-3)
    assert course["checkpoints"][0]["kl"]["mean"] == 0 < course["checkpoints"][-1]["kl"]["mean"]


def test_the_report_is_there_and_loud_about_simulation(config: Config) -> None:
    report = json.loads((config.folder("compare") / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["base", "sft", "dpo", "ppo"]
    assert any("simulated" in notice for notice in report["notices"])
    assert all("simulated preference" in m["win_rate"] for m in report["models"][1:])
    assert {step["stage"] for step in report["lineage"]} == {"sft", "sample", "label", "reward", "dpo", "ppo"}
    html = (config.folder("compare") / "report.html").read_text()
    assert "simulated" in html and "<svg" in html and "http-equiv" in html


# -- stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sample", "compare"])
def test_generating_stages_go_on_where_they_stopped(
    config: Config, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy_of(config, tmp_path, *(("sample",) if stage == "sample" else ()), "compare")
    from align.generate import Partial

    real, written = Partial.add, []

    def add(self: Partial, *batch: Any) -> None:
        if len(written) == 1:
            raise Stopped
        written.append(batch)
        real(self, *batch)

    monkeypatch.setattr(Partial, "add", add)
    with pytest.raises(Stopped):
        run_stage(other, stage)
    assert not (other.folder(stage) / "DONE").exists()
    monkeypatch.setattr(Partial, "add", real)
    run = run_stage(other, stage)
    assert run.resuming
    name = "comparisons.jsonl" if stage == "sample" else "answers.jsonl"
    assert (other.folder(stage) / name).read_bytes() == (config.folder(stage) / name).read_bytes()


@pytest.mark.parametrize("stage", ["reward", "dpo", "ppo"])
def test_training_stages_resume_to_the_same_weights(config: Config, tmp_path: Path, stage: str) -> None:
    other = copy_of(config, tmp_path, stage)
    with stopped_after(5):
        run_stage(other, stage)
    assert run_stage(other, stage).resuming
    for file in sorted((config.folder(stage) / "model").glob("*.safetensors")):
        assert (other.folder(stage) / "model" / file.name).read_bytes() == file.read_bytes(), file.name


# -- what is refused -------------------------------------------------------------------------------------------------


def test_other_inputs_are_refused_with_what_changed(config: Config) -> None:
    changed = load_config(config.folder("dpo") / "config.yaml", ["dpo.beta=0.3"])
    with pytest.raises(InputError, match=r"dpo.beta: was 0.1, is 0.3.*--force"):
        run_stage(changed, "dpo")
    assert (config.folder("dpo") / "DONE").is_file()


def test_settings_the_trainer_refuses_are_sentences(config: Config, tmp_path: Path) -> None:
    other = copy_of(config, tmp_path, "dpo")
    for override in ("dpo.loss_type=sigmoyd", "dpo.adapter.target_modules=[nope]", "dpo.lr_scheduler_type=wavy"):
        with pytest.raises(InputError):
            run_stage(
                load_config(config.folder("dpo") / "config.yaml", [f"runs={other.runs}", override]), "dpo", force=True
            )
        assert not (other.folder("dpo") / "DONE").exists()


LOSSES = ["hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero"]
LOSSES += ["apo_down", "discopop", "sigmoid_norm"]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_dpo_loss_is_reachable_by_name(config: Config, tmp_path: Path, loss: str) -> None:
    other = copy_of(config, tmp_path, "dpo")
    extra = ["dpo.label_smoothing=0.1"] if loss in ("robust", "exo_pair") else []
    overrides = [f"runs={other.runs}", f"dpo.loss_type={loss}", "dpo.max_steps=1", *extra]
    run = run_stage(load_config(config.folder("dpo") / "config.yaml", overrides), "dpo")
    assert run.info["summary"]["held_out_accuracy"]["n"] > 0
