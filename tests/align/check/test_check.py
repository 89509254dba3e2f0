"""Preflight is silent on sound data, names what is planted by its row, and checks nothing twice that is unchanged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.check import texts
from align.check.command import before_stage, check, told
from align.check.findings import Finding, part
from align.check.reading import Reader, Rows
from align.check.record import path_of
from align.check.stages import check_stage
from align.config import Config
from align.config_file import load_config
from align.pipeline import run_stage
from reward.records import InputError, assistant_answer, user_prompt, write_jsonl
from tests.conftest import CHATML, demonstrations

Row = dict[str, Any]
Make = Callable[..., Config]


def pairs(count: int = 40) -> list[Row]:
    return [
        {
            "prompt": f"Once more: {row['prompt']}",
            "chosen": f"{row['completion']} So it is.",
            "rejected": f"Nobody knows number {i}.",
            "split": "test" if i % 4 == 3 else "train",
        }
        for i, row in enumerate(demonstrations(count))
    ]


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Make:
    """A config on the tiny model, with these rows in its files."""

    def made(*stages: str, model: Path = tiny_model, **more: Any) -> Config:
        data = {key: more.pop(key) for key in ("demonstrations", "prompts", "preferences") if key in more}
        raw: Row = {
            "name": "checked",
            "runs": str(tmp_path / "runs"),
            "stages": [*stages],
            "model": {"base": str(model)},
            "data": more.pop("data", {}),
            "label": {"source": "dataset"} if "preferences" in data else {},
        }
        for key, rows in data.items():
            write_jsonl(tmp_path / f"{key}.jsonl", rows)
            raw["data"][key] = str(tmp_path / f"{key}.jsonl")
        for key, value in more.items():
            raw[key] = {**raw.get(key, {}), **value}
        file = tmp_path / "checked.yaml"
        file.write_text(json.dumps(raw))
        return load_config(file)

    return made


def done(folder: Path) -> Path:
    """A folder as of a finished stage."""
    folder.mkdir(parents=True)
    (folder / "DONE").write_text(json.dumps({"digest": "d" * 64, "files": {}}))
    return folder


# What is sound


def test_sound_data_is_let_through_and_told(make: Make) -> None:
    config = make(
        "sft", "sample", "label", "reward", "dpo", "ppo", demonstrations=demonstrations(), preferences=pairs()
    )
    said: list[str] = []
    check(config, said.append)
    assert [line.partition(":")[0] for line in said] == list(config.stages)
    assert said[0].startswith("sft: demonstrations.jsonl: 40 rows (")
    assert "40 looked at as tokens: 0 too long, the longest other one has" in said[0]
    assert not [line for line in said if line.startswith(("REFUSED", "WARNED"))]


def test_what_another_stage_makes_is_not_looked_for(make: Make) -> None:
    config = make("sft", "sample", "label", "reward", "dpo", demonstrations=demonstrations())
    assert [check_stage(config, stage) for stage in ("label", "reward", "dpo")] == [[], [], []]


def test_labels_that_are_there_are_what_is_checked(make: Make) -> None:
    config = make("label", "dpo", preferences=pairs())
    labelled = [
        {"prompt": user_prompt(row["prompt"]), "split": row["split"]}
        | {side: assistant_answer(row[side]) for side in ("chosen", "rejected")}
        for row in pairs()
    ]
    labelled[7]["chosen"] = assistant_answer("It ends.<|im_end|>")
    folder = done(config.folder("label"))
    write_jsonl(folder / "preferences.jsonl", labelled)
    [found] = check_stage(config, "dpo")
    assert found.level == "refused" and found.what.startswith(f"{folder / 'preferences.jsonl'}, line 8: the assistant")


# Places


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
def test_a_record_is_found_again_in_its_file(kept: list[bool], make: Make) -> None:
    rows = [{"prompt": f"Number {i % 3}?", "completion": "Yes." if keep else ""} for i, keep in enumerate(kept)]
    reader = Reader(make("sft", demonstrations=rows, data={"test_share": 0.5}))
    [read] = reader.of("sft")
    places = [read.place(index) for index in range(len(read.records))]
    wanted = [f"{read.path}, line {i}" for i, keep in enumerate(kept, start=1) if keep]
    assert places == wanted


# Texts


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 9))
def test_a_test_prompt_is_found_in_any_case_and_spacing(draw: random.Random, which: int) -> None:
    sides = ["test" if i == which else "train" for i in range(10)]
    records = [{"prompt": user_prompt(f"What is number {i} like"), "split": side} for i, side in enumerate(sides)]
    copy = "".join(
        (c.upper() if draw.random() < 0.5 else c) if c != " " else draw.choice([" ", "  ", "\n", "\t "])
        for c in records[which]["prompt"][0]["content"]
    )
    clean = Rows("prompt", "data.prompts", records)
    assert texts.of_both_sides("ppo", clean, []) == []
    planted = Rows("prompt", "data.prompts", [*records, {"prompt": user_prompt(copy), "split": "train"}])
    [found] = texts.of_both_sides("ppo", planted, [])
    assert found.level == "refused" and part(1, 11) in found.what


def test_a_test_prompt_of_another_file_is_found(make: Make) -> None:
    rows = [{**row, "split": "train"} for row in demonstrations(8)]
    prompts = [{"prompt": rows[5]["prompt"].upper(), "split": "test"}]
    [found] = check_stage(make("sft", demonstrations=rows, prompts=prompts), "sft")
    assert "demonstrations.jsonl, line 6 is train" in found.what and "prompts.jsonl, line 1 is test" in found.what


def test_exchanged_columns_are_noticed_and_the_right_way_round_is_not(make: Make) -> None:
    rows = [{**row, "chosen_score": 4 + i % 2, "rejected_score": 1} for i, row in enumerate(pairs())]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    turned = [{**row, "chosen_score": row["rejected_score"], "rejected_score": row["chosen_score"]} for row in turned]
    assert check_stage(make("label", "dpo", preferences=rows), "dpo") == []
    found = check_stage(make("label", "dpo", preferences=turned), "dpo")
    assert [finding.level for finding in found] == ["warned", "warned"]
    assert (
        "the chosen answer is the shorter one" in found[0].what
        and "'chosen_score' and 'rejected_score'" in found[1].what
    )


def test_contradictions_are_counted_by_the_pair() -> None:
    def pair(prompt: str, chosen: str, rejected: str) -> Row:
        return {
            "prompt": user_prompt(prompt),
            "chosen": assistant_answer(chosen),
            "rejected": assistant_answer(rejected),
        }

    rows = [pair("Why?", "a", "b"), pair("why? ", "B", "A"), pair("Why?", "a", "c"), pair("When?", "b", "a")]
    [found] = texts.contradicted("dpo", Rows("preference", "data.preferences", rows))
    assert found.level == "refused" and part(2, 4, "pairs") in found.what
    many = rows[:2] + [pair(f"Why {i}?", "a", "b") for i in range(30)]
    [found] = texts.contradicted("dpo", Rows("preference", "data.preferences", many))
    assert found.level == "warned" and part(2, 32, "pairs") in found.what


def test_swapped_copies_of_augmentation_are_no_repeats_and_no_contradictions() -> None:
    row = {"prompt": user_prompt("Why?"), "chosen": assistant_answer("a"), "rejected": assistant_answer("b")}
    rows = Rows("preference", "data.preferences", [row, {**row, "augmented": "swap"}])
    assert texts.repeated("dpo", rows) == [] and texts.contradicted("dpo", rows) == []


# Tokens


def test_a_control_token_that_is_spelt_out_is_text(make: Make, tiny_model: Path, tmp_path: Path) -> None:
    """A tokenizer that splits special tokens in text has nothing to fear from them, and is not refused."""
    from align.check.tokens import control_tokens
    from align.config import ModelSection
    from align.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model), ModelSection())
    of_turns, others = control_tokens(tokenizer)
    assert set(of_turns) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} and others == {}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<file>"]})
    assert set(control_tokens(tokenizer)[1]) == {"<file>"}
    tokenizer.split_special_tokens = True
    assert control_tokens(tokenizer) == ({}, {})


def test_an_answer_that_merges_with_the_prompt_is_said_of_dpo_alone(
    make: Make, tiny_model: Path, tmp_path: Path
) -> None:
    """Here the prompt's last line break is one token with those that the answers begin with."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "merging"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    line = tokenizer.convert_ids_to_tokens(tokenizer("\n")["input_ids"])[0]
    vocabulary, merges = told["model"]["vocab"], told["model"]["merges"]
    vocabulary[line * 2] = max(vocabulary.values()) + 1
    merges.append([line, line])
    tokenizer = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)
    rows = [{**row, "chosen": f"\n\n{row['chosen']}" if i < 3 else row["chosen"]} for i, row in enumerate(pairs())]
    config = make("label", "reward", "dpo", model=folder, preferences=rows)
    assert check_stage(config, "reward") == []
    [found] = check_stage(config, "dpo")
    assert found.level == "warned" and f"as in {part(3, 40, 'rows looked at')}" in found.what
    every = [{**row, "chosen": f"\n\n{row['chosen']}"} for row in pairs()]
    [found] = check_stage(make("label", "dpo", model=folder, preferences=every), "dpo")
    assert found.level == "refused"


def test_a_template_other_than_that_of_the_sft_model_is_refused(make: Make, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other.jinja"
    other.write_text("{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + CHATML)
    config = make("sft", "label", "dpo", demonstrations=demonstrations(), preferences=pairs())
    shutil.copytree(tiny_model, done(config.folder("sft")) / "model")
    assert check_stage(config, "dpo") == []
    model = config.model.model_copy(update={"chat_template": str(other)})
    changed = config.model_copy(update={"model": model})
    [found] = check_stage(changed, "dpo")
    assert found.level == "refused"
    assert found.what.startswith("sft was trained with another chat template") and "Be kind." in found.what


def test_a_sampled_policy_of_another_vocabulary_is_refused(make: Make, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = done(tmp_path / "other-run")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(other / "model")
    prompts = [{"prompt": row["prompt"]} for row in demonstrations(12)]
    config = make("sample", prompts=prompts, sample={"policies": ["base", str(other)]})
    assert check_stage(config, "sample") == []
    tokenizer.add_tokens(["entirely"])
    tokenizer.save_pretrained(other / "model")
    [found] = check_stage(config, "sample")
    assert found.level == "refused" and f"{other} has another vocabulary" in found.what


# The record


def test_what_was_checked_and_is_unchanged_is_not_checked_again(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    rows = demonstrations(12)
    config = make("sft", demonstrations=[*rows, rows[0]])
    check(config, print)
    kept = json.loads(path_of(config).read_text())
    [warning] = kept["stages"]["sft"]["warned"]
    assert "line 13, which says what line 1 says" in warning and kept["stages"]["sft"]["refused"] == []
    kept["stages"]["sft"]["warned"] = ["Only the record says this."]
    path_of(config).write_text(json.dumps(kept))
    capsys.readouterr()
    before_stage(config, "sft")
    assert capsys.readouterr().err.splitlines() == ["  sft: Only the record says this."]


def test_a_file_that_has_changed_since_is_said_and_checked_again(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make("sft", demonstrations=demonstrations(12))
    check(config, print)
    hostile = demonstrations(12)
    hostile[4]["prompt"] = "Say<|im_end|> it."
    config = make("sft", demonstrations=hostile)
    capsys.readouterr()
    with pytest.raises(InputError, match=r"^sft: .*demonstrations.jsonl, line 5: the user turn holds <\|im_end\|>"):
        before_stage(config, "sft")
    said = capsys.readouterr().err
    assert "changed since it was checked, so it is checked again" in said and "sha256 was" in said
    with pytest.raises(InputError, match="line 5"):  # what was refused is never taken as checked
        before_stage(config, "sft")
    before_stage(make("sft", demonstrations=demonstrations(12)), "sft")


def test_a_stage_refuses_before_it_makes_anything(make: Make) -> None:
    hostile = pairs()
    hostile[6]["rejected"] = "It ends.<|im_end|>"
    config = make("label", "dpo", preferences=hostile)
    run_stage(config, "label")
    with pytest.raises(InputError, match=r"^dpo: .*3-label/preferences.jsonl, line 7: the assistant turn holds"):
        run_stage(config, "dpo")
    assert not config.folder("dpo").exists()


def test_a_damaged_record_is_as_none(make: Make) -> None:
    config = make("sft", demonstrations=demonstrations(12))
    path_of(config).parent.mkdir(parents=True)
    for content in ("", "[]", '{"schema": 1, "stages": []}', '{"schema": 1, "stages": {"sft": 3}}', "\x00"):
        path_of(config).write_text(content)
        before_stage(config, "sft")
    assert json.loads(path_of(config).read_text())["stages"]["sft"]["refused"] == []


def test_the_same_inputs_give_the_same_record(make: Make) -> None:
    config = make("sft", "label", "dpo", demonstrations=demonstrations(12), preferences=pairs())
    check(config, lambda line: None)
    first = path_of(config).read_bytes()
    check(config, lambda line: None)
    assert path_of(config).read_bytes() == first


def test_the_end_counts_what_is_refused(make: Make) -> None:
    config = make("sft", "label", "dpo", demonstrations=demonstrations(3), preferences=[], sft={"max_length": 4})
    said: list[str] = []
    with pytest.raises(InputError, match=r"^2 things are refused \(1 of sft, 1 of label\)|things are refused \("):
        check(config, said.append)
    assert said[-1].startswith(("REFUSED", "WARNED"))


def test_what_several_stages_share_is_said_once() -> None:
    found = [Finding("warned", "reward", "x."), Finding("refused", "dpo", "y."), Finding("warned", "dpo", "x.")]
    assert told(found) == ["REFUSED dpo: y.", "WARNED reward, dpo: x."]


def test_before_stage_runs_where_sources_are_still_to_be_prepared(make: Make) -> None:
    config = make("prepare", "sft", demonstrations=demonstrations(12), prepare={})
    assert check_stage(config, "sft") == [] and check_stage(config, "prepare") == []
