"""Ten ways in which a run on the bare libraries trains on something else than was meant, with exit code 0.

Each is reproduced with TRL 1.16 (h, i and j also with PEFT and transformers) on a tiny model, and then shown to be
refused here, or to be impossible. The letters are those of docs/check.md.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    extract_prompt,
    get_peft_config,
)

from align import models
from align.check.stages import check_stage
from align.config import AdapterSection, Config, ModelSection
from align.config_file import load_config
from align.data.render import demonstration_row
from reward.records import InputError
from tests.conftest import write_jsonl

pytestmark = pytest.mark.oracle

Row = dict[str, Any]


def settings(folder: Path, **more: Any) -> Row:
    return {
        "output_dir": str(folder / "bare"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


def ours(folder: Path, model: Path, stage: str, rows: list[Row], **more: Any) -> Config:
    """Our config of the same work on the same rows."""
    key = "demonstrations" if stage == "sft" else "preferences"
    data = write_jsonl(folder / "rows.jsonl", rows)
    raw = {
        "runs": str(folder / "runs"),
        "model": {"base": str(model)},
        "data": {key: str(data)},
        "label": {"source": "dataset"},
        "stages": ["sft"] if stage == "sft" else ["label", stage],
        **more,
    }
    file = folder / "ours.yaml"
    file.write_text(json.dumps(raw))
    return load_config(file)


def refused(config: Config, stage: str) -> str:
    """All that is refused of the stage, as one text."""
    found = [finding.what for finding in check_stage(config, stage) if finding.level == "refused"]
    assert found
    return "\n".join(found)


def pairs(count: int = 4, **more: Any) -> list[Row]:
    """Sound pairs, the last of them on the test side."""
    return [
        {
            "prompt": f"What is salt, number {i}?",
            "chosen": f"A mineral, {i}.",
            "rejected": f"A river, {i}.",
            "split": "test" if i == count - 1 else "train",
            **more,
        }
        for i in range(count)
    ]


def without_split(rows: list[Row]) -> Dataset:
    return Dataset.from_list([{key: value for key, value in row.items() if key != "split"} for row in rows])


def test_a_messages_train_on_the_user(tiny_model: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Tell me a secret."}, {"role": "assistant", "content": "No."}]
    trainer = SFTTrainer(
        str(tiny_model),
        args=SFTConfig(**settings(tmp_path, completion_only_loss=True)),
        train_dataset=Dataset.from_list([{"messages": talk}] * 2),
    )
    trainer.train()
    [labels, _] = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])["labels"]
    assert "Tell me a secret." in trainer.processing_class.decode(labels[labels != -100])

    row = demonstration_row(
        models.load_tokenizer(str(tiny_model), ModelSection()), {"prompt": talk[:1], "completion": talk[1:]}
    )
    trained = [token for token in row["labels"] if token != -100]
    assert trainer.processing_class.decode(trained) == "No.<|im_end|>"
    assert check_stage(ours(tmp_path, tiny_model, "sft", [{"messages": talk, "split": "train"}]), "sft") == []
    with pytest.raises(InputError, match="`completion_only_loss` cannot be set: the loss is always on answer tokens"):
        ours(tmp_path, tiny_model, "sft", [{"messages": talk}], sft={"completion_only_loss": True})


def test_b_a_misnamed_prompt_is_guessed_from_the_answers(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"question": "What colour is it?", "chosen": "The sky is blue.", "rejected": "The sky is green."}] * 2
    trainer = DPOTrainer(str(tiny_model), args=DPOConfig(**settings(tmp_path)), train_dataset=Dataset.from_list(rows))
    trainer.train()
    assert trainer.processing_class.decode(trainer.train_dataset[0]["prompt_ids"]).strip() == "The sky is"

    assert "`chosen` is text without a prompt: wanted are a `prompt` column beside it" in refused(
        ours(tmp_path, tiny_model, "dpo", rows), "dpo"
    )


def test_c_a_prompt_is_cut_within_a_word(tiny_model: Path, tmp_path: Path) -> None:
    row = {"chosen": "The sky is blue and vast", "rejected": "The sky is blue"}
    assert extract_prompt(row)["prompt"] == "The sky is blu"

    assert "is text without a prompt" in refused(ours(tmp_path, tiny_model, "dpo", [row] * 2), "dpo")


def test_d_pairs_that_are_too_long_go_unsaid(tiny_model: Path, tmp_path: Path) -> None:
    rows = pairs(6)
    for row in rows[:4]:
        row["chosen"] *= 20
    bare = RewardTrainer(
        str(tiny_model), args=RewardConfig(**settings(tmp_path, max_length=60)), train_dataset=without_split(rows)
    )
    assert len(bare.train_dataset) == 2
    long = [{**row, "prompt": row["prompt"] * 20} for row in rows]
    emptied = DPOTrainer(
        str(tiny_model), args=DPOConfig(**settings(tmp_path, max_length=40)), train_dataset=without_split(long)
    )
    assert len(emptied.train_dataset) == 0
    with pytest.raises(ValueError, match="num_samples should be a positive integer"):  # nor does this name max_length
        emptied.train()

    for stage, of, limit, share in (("reward", rows, 90, "4 of 6"), ("dpo", long, 40, "6 of 6")):
        said = refused(ours(tmp_path, tiny_model, stage, of, **{stage: {"max_length": limit}}), stage)
        assert f"{stage}.max_length={limit} leaves out {share} rows looked at" in said


def test_e_identical_answers_are_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{**row, "rejected": row["chosen"]} for row in pairs()]
    trainer = DPOTrainer(str(tiny_model), args=DPOConfig(**settings(tmp_path)), train_dataset=without_split(rows))
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-6)

    assert "no row is left" in (said := refused(ours(tmp_path, tiny_model, "dpo", rows), "dpo"))
    assert "4 with identical chosen and rejected" in said


def test_f_roles_of_another_convention_go_into_the_template(tiny_model: Path, tmp_path: Path) -> None:
    talk = [{"role": "human", "content": "Why?"}, {"role": "gpt", "content": "So."}]
    trainer = SFTTrainer(
        str(tiny_model),
        args=SFTConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list([{"messages": talk}] * 2),
    )
    trainer.train()
    assert "<|im_start|>gpt" in trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])

    said = refused(ours(tmp_path, tiny_model, "sft", [{"messages": talk}]), "sft")
    assert "role 'human' is unknown; the roles are system, user, assistant, tool." in said


@pytest.mark.slow
@pytest.mark.processes
def test_g_unknown_keys_are_passed_over_under_a_launcher(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_jsonl(data / "train.jsonl", [{"prompt": "Why?", "completion": "So."}] * 4)
    config = tmp_path / "bare.yaml"
    keys = settings(tmp_path, model_name_or_path=str(tiny_model), dataset_name=str(data), lerning_rate=0.5)
    config.write_text(json.dumps(keys))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
    done = subprocess.run(
        [*launch, "trl.scripts.sft", "--config", str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bare" / "model.safetensors").is_file()

    with pytest.raises(InputError, match="in `sft`, unknown key `lerning_rate`: did you mean `learning_rate`"):
        ours(tmp_path, tiny_model, "sft", pairs(), sft={"lerning_rate": 0.5})


def test_h_a_reward_adapter_of_the_default_kind(tiny_model: Path, tmp_path: Path) -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):  # says nothing of the task type
        RewardTrainer(
            str(tiny_model),
            args=RewardConfig(**settings(tmp_path)),
            train_dataset=without_split(pairs()),
            peft_config=adapter,
        ).train()

    with pytest.raises(InputError, match="`task_type` cannot be set: the stage decides it"):
        ours(tmp_path, tiny_model, "reward", pairs(), reward={"adapter": {"task_type": "CAUSAL_LM"}})
    made = models.lora_config(AdapterSection(), "SEQ_CLS", modules_to_save=["score"])
    assert (made.task_type, made.modules_to_save) == ("SEQ_CLS", ["score"])


def test_i_a_list_of_one_module_becomes_an_expression(tiny_model: Path, tmp_path: Path) -> None:
    asked = ModelConfig(use_peft=True, lora_target_modules=["q_proj"], lora_task_type="CAUSAL_LM")
    bare = get_peft_config(asked)
    assert bare is not None and bare.target_modules == "q_proj"
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), bare)

    listed = AdapterSection(target_modules=["q_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), models.lora_config(listed, "CAUSAL_LM"))
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj"}
    text = ours(tmp_path, tiny_model, "dpo", pairs(), dpo={"adapter": {"target_modules": "q_proj"}})
    assert "reads as a regular expression" in refused(text, "dpo")


def test_j_padding_with_the_stop_token_unlearns_it(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "padded-with-stop"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    stop = tokenizer.eos_token_id
    row = tokenizer("So.<|im_end|>")["input_ids"]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row}])
    assert row[-1] == stop and batch["labels"][0, -1] == -100

    mended = models.load_tokenizer(str(folder), ModelSection())
    assert mended.pad_token_id not in (None, mended.eos_token_id)
    record = {
        "prompt": [{"role": "user", "content": "Why?"}],
        "completion": [{"role": "assistant", "content": "So."}],
    }
    short, long = (
        demonstration_row(mended, {**record, "completion": [{"role": "assistant", "content": text}]})
        for text in ("So.", "So it is, and so it was.")
    )
    trainer = SFTTrainer(
        str(folder),
        args=SFTConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list([short, long]),
        processing_class=mended,
    )
    labels = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])["labels"]
    assert [int((line == stop).sum()) for line in labels] == [1, 1]
    trained = [line[line != -100] for line in labels]
    assert [int(line[-1]) for line in trained] == [stop, stop]
    assert torch.equal(trained[1], torch.tensor([token for token in long["labels"] if token != -100]))
    rows = [{"prompt": "Why?", "completion": "So.", "split": "train"}]
    assert check_stage(ours(tmp_path, folder, "sft", rows), "sft") == []
