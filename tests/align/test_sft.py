"""The sft stage, really run on the tiny model: what is trained on, what is saved, and that a resume changes nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align import training
from align.config import Config
from align.data.load import load_demonstrations
from align.logprobs import answer_logprobs
from align.pipeline import run_stage
from align.runs import Run, is_done
from reward.records import InputError, read_jsonl
from reward.scoring import score_rows

Make = Callable[..., Config]


@pytest.fixture
def make(tiny_model: Path, tiny_demonstrations: Path, tmp_path: Path) -> Make:
    def make(name: str = "test", base: Path = tiny_model, data: Path = tiny_demonstrations, **sft: Any) -> Config:
        defaults: dict[str, Any] = {
            "adapter": {"r": 8, "lora_dropout": 0.1},
            "learning_rate": 1e-2,
            "max_steps": 30,
            "max_length": 128,
            "per_device_train_batch_size": 2,
        }
        return Config.model_validate(
            {
                "name": name,
                "runs": str(tmp_path / "runs"),
                "model": {"base": str(base), "dtype": "float32"},
                "data": {"demonstrations": str(data)},
                "sft": defaults | sft,
            }
        )

    return make


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "model.safetensors")


def same_weights(a: Run, b: Run) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# The whole stage


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = Config.model_validate(
        {
            "name": "whole",
            "runs": str(tmp_path_factory.mktemp("runs")),
            "model": {"base": str(tiny_model), "dtype": "float32"},
            "data": {"demonstrations": str(tiny_demonstrations)},
            "sft": {"adapter": {"r": 8}, "learning_rate": 1e-2, "max_steps": 30, "max_length": 128},
        }
    )
    return run_stage(config, "sft")


def test_held_out_loss_falls(trained: Run) -> None:
    """An adapter cannot do more here: behind frozen random embeddings (deviation 0.02, 32 wide) no logit passes
    0.02 * 32 = 0.64, so the loss stays above log(393) - 2 * 0.64 whatever is learned."""
    summary = trained.info["summary"]
    loss = summary["held_out_loss"]
    assert loss["after"] < loss["before"] - 0.4
    assert summary["held_out_perplexity"]["after"] < summary["held_out_perplexity"]["before"] / 1.4
    assert summary["held_out_rows"] >= 3
    assert summary["data"]["rows"]["train"] + summary["data"]["rows"]["test"] == 40
    assert read_jsonl(trained.folder / "metrics.jsonl")[-1]["step"] == 30


def test_the_merged_model_is_whole_and_plain(trained: Run, tiny_model: Path, tiny_demonstrations: Path) -> None:
    folder = trained.folder / "model"
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not (folder / "adapter_config.json").exists()
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert model.config.pad_token_id == tokenizer.pad_token_id
    # its loss, by hand from the conversations, is the one the stage reports
    held_out = [r for r in load_demonstrations(tiny_demonstrations, 0.2).records if r["split"] == "test"]
    total = count = 0.0
    for record in held_out:
        before = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, tokenize=False)
        text = before + record["completion"][0]["content"] + "<|im_end|>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < start, -100)).loss
        total, count = total + loss.item() * (ids.shape[1] - start), count + ids.shape[1] - start
    assert total / count == pytest.approx(trained.info["summary"]["held_out_loss"]["after"], abs=1e-4)


def test_scratch_is_removed_and_no_adapter_is_left(trained: Run) -> None:
    assert is_done(trained.folder) and not trained.work.exists()
    assert {p.name for p in trained.folder.iterdir()} >= {"model", "dropped.jsonl", "metrics.jsonl", "config.yaml"}


def test_a_base_padded_with_its_stop_token_gives_a_model_padded_with_another(
    make: Make, tiny_model: Path, tmp_path: Path
) -> None:
    """As hub models come: the saved model's config has to say what its tokenizer says, or classifiers read padding."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base.config.pad_token_id = base.generation_config.pad_token_id = tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = run_stage(make(base=tmp_path / "base", max_steps=1), "sft").folder / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.pad_token != tokenizer.eos_token
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    rows = [[5, 6, 7, tokenizer.eos_token_id], [8, 9]]
    wanted = [plain(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert score_rows(plain, rows, tokenizer.pad_token_id) == pytest.approx(wanted, abs=1e-6)


def test_without_an_adapter_every_weight_is_trained(make: Make, tiny_model: Path) -> None:
    run = run_stage(make(adapter=None), "sft")
    before, after = load_file(tiny_model / "model.safetensors"), weights(run)
    assert before.keys() == after.keys()
    assert [key for key in before if torch.equal(before[key], after[key])] == []
    assert AutoModelForCausalLM.from_pretrained(run.folder / "model").config.pad_token_id is not None
    loss = run.info["summary"]["held_out_loss"]
    assert loss["after"] < loss["before"] - 2


def test_with_an_adapter_only_the_linear_layers_change(trained: Run, tiny_model: Path) -> None:
    before, after = load_file(tiny_model / "model.safetensors"), weights(trained)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "_proj." in key}


def test_rows_too_long_are_left_out_counted_and_written(make: Make, tmp_path: Path) -> None:
    rows = [{"prompt": f"Why {i}?", "completion": "Because."} for i in range(30)]
    rows.append({"prompt": "Long?", "completion": "word " * 200, "topic": "length"})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_stage(make(data=data, max_steps=1, max_length=64), "sft")
    reason = "longer than max_length=64 tokens"
    assert run.info["summary"]["data"]["left out"] == {reason: 1}
    [dropped] = read_jsonl(run.folder / "dropped.jsonl")
    assert dropped["reason"] == reason and dropped["record"]["topic"] == "length"
    assert set(dropped["record"]) == {"prompt", "completion", "topic", "split"}
    with pytest.raises(InputError, match=r"sft\.max_length=4 leaves out 31 of 31 rows looked at"):
        run_stage(make("short", data=data, max_length=4), "sft")


def test_no_demonstrations_is_a_sentence(make: Make) -> None:
    config = make()
    config.data.demonstrations = None
    with pytest.raises(InputError, match=r"sft needs data\.demonstrations"):
        run_stage(config, "sft")


# What the trainer sees


class Stop(Exception):
    pass


@pytest.fixture
def trainer_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], Any]:
    """The trainer that the stage builds, just before its first step."""

    def trainer_of(config: Config) -> Any:
        caught = []

        def catch(trainer: Any, run: Run) -> None:
            caught.append(trainer)
            raise Stop

        monkeypatch.setattr(training, "train", catch)
        with pytest.raises(Stop):
            run_stage(config, "sft")
        monkeypatch.undo()
        return caught[0]

    return trainer_of


def test_labels_are_on_answers_and_their_stop_token_only(
    make: Make, trainer_of: Callable[[Config], Any], tiny_model: Path, tiny_demonstrations: Path
) -> None:
    trainer = trainer_of(make(packing=False))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    seen = set()
    for row in trainer.train_dataset:
        pairs = list(zip(row["input_ids"], row["labels"], strict=True))
        size = sum(label == -100 for _, label in pairs)
        assert all(label == -100 for _, label in pairs[:size])
        assert all(label == token for token, label in pairs[size:])
        assert row["labels"][-1] == tokenizer.eos_token_id
        prompt, answer = (tokenizer.decode([token for token, _ in part]) for part in (pairs[:size], pairs[size:]))
        question = prompt.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        seen.add((question, answer))
    wanted = {
        (r["prompt"][0]["content"], r["completion"][0]["content"] + "<|im_end|>")
        for r in load_demonstrations(tiny_demonstrations, 0.2).records
        if r["split"] == "train"  # and no test prompt
    }
    assert seen == wanted

    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset.select(range(4))])
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 4  # one stop token a row, padding hides none


def pieces(batch: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of every conversation in a packed batch, told apart by positions that start again."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    starts = [i for i, position in enumerate(batch["position_ids"][0].tolist()) if position == 0] + [len(ids)]
    result = []
    for start, end in itertools.pairwise(starts):
        border = next(i for i in range(start, end) if labels[i] != -100)
        assert labels[border:end] == ids[border:end]
        result.append((ids[start:border], ids[border:end]))
    return result


def test_packed_conversations_do_not_see_each_other(make: Make, trainer_of: Callable[[Config], Any]) -> None:
    """The loss of a packed batch, in the trainer and in training mode, is that of its conversations one by one."""
    packed = trainer_of(make("packed", packing=True, adapter={"r": 8}))
    plain = trainer_of(make("plain", packing=False, adapter={"r": 8}))
    model = packed.model
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():  # an adapter that does something, and attention that looks around
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    found = []
    for batch in packed.get_train_dataloader():
        pairs = pieces(batch)
        assert len(pairs) > 2  # more conversations than rows: something is packed
        found += pairs
        model.train()
        with torch.no_grad():
            loss = packed.compute_loss(model, dict(batch)).item()
        one_by_one = torch.cat(answer_logprobs(model, pairs, 0, batch_size=1))
        assert loss == pytest.approx(-one_by_one.mean().item(), abs=1e-4)
        # and the test can tell: as one long conversation the loss is another
        with torch.no_grad():
            mixed = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss.item()
        assert abs(mixed - loss) > 1e-3
    rows = [(r["input_ids"], r["labels"]) for r in plain.train_dataset]
    # All of them; what fills the last step (align.batches) is there twice.
    assert {tuple(a + b) for a, b in found} == {tuple(ids) for ids, _ in rows}
    assert len(rows) <= len(found) < 2 * len(rows)


# Resume


@pytest.mark.parametrize("packing", [True, False])
def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    make: Make, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    options: dict[str, Any] = {"max_steps": 11, "save_steps": 3, "packing": packing}
    whole = run_stage(make("whole", **options), "sft")

    step_end = training._Bar.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        step_end(self, args, state, control, **rest)
        if state.global_step == 8:
            raise KeyboardInterrupt

    config = make("cut", **options)
    folder = config.folder("sft")
    with monkeypatch.context() as patch:
        patch.setattr(training._Bar, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config, "sft")
    assert not is_done(folder) and json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    checkpoints = folder / "work" / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-6"]
    (checkpoints / "checkpoint-9").mkdir()  # as a kill leaves it: begun, without its last file
    (checkpoints / "checkpoint-9" / "adapter_model.safetensors").write_bytes(b"half")

    resumed = run_stage(config, "sft")
    assert resumed.resuming and is_done(folder)
    assert same_weights(resumed, whole)
    losses = {}
    for run in (whole, resumed):
        lines = [line for line in read_jsonl(run.folder / "metrics.jsonl") if "loss" in line]
        losses[run.folder] = {line["step"]: line["loss"] for line in lines}
    assert losses[whole.folder] == losses[folder]
    assert resumed.info["summary"]["held_out_loss"] == whole.info["summary"]["held_out_loss"]


def test_a_finished_run_is_not_trained_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(max_steps=1)
    first = run_stage(config, "sft")
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    assert run_stage(config, "sft").folder == first.folder
    with pytest.raises(InputError, match=r"sft\.learning_rate"):
        run_stage(make(max_steps=1, learning_rate=1e-3), "sft")


def test_the_seed_decides(make: Make) -> None:
    first, again = (run_stage(make(name, max_steps=2), "sft") for name in ("a", "b"))
    assert same_weights(first, again)
    config = make("c", max_steps=2)
    config.seed = 1
    assert not same_weights(first, run_stage(config, "sft"))
