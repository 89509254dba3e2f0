"""Stage 0 from its files to the stages that read what it wrote, in real run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config import Config
from align.config_file import load_config
from align.data.prepare.working import ALONE, CHUNK
from align.pipeline import run_pipeline, run_stage
from align.runs import lineage
from reward.records import InputError, prompt_id, read_jsonl
from tests.align.data.prepare.test_deciding import sentence
from tests.conftest import write_jsonl


def config_of(folder: Path, model: Path, **keys: Any) -> Config:
    path = folder / "pipeline.yaml"
    whole = {"name": "p", "runs": str(folder / "runs"), "model": {"base": str(model), "dtype": "float32"}, **keys}
    path.write_text(yaml.safe_dump(whole))
    return load_config(path)


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": sentence(n, 20), "completion": sentence(n + 5000, 20)} for n in range(start, start + count)]


def prepared(config: Config, file: str = "demonstrations.jsonl") -> list[dict[str, Any]]:
    return read_jsonl(config.folder("prepare") / file)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Demonstrations with something for every step."""
    good = rows(30)
    bad = [
        {"prompt": " What is rain?​ ", "completion": "Itâ€™s water.\r\n"},
        {"prompt": good[0]["prompt"], "completion": good[0]["completion"].upper()},
        {"prompt": good[1]["prompt"], "completion": good[1]["completion"] + " indeed"},
        {"prompt": "Who wrote this, ann.bee@example.org?", "completion": "   "},
        {"prompt": "How do I reach you?", "completion": "Write to ann.bee@example.org, please, whenever you like."},
        {"prompt": sentence(9000, 20), "completion": sentence(9001, 20)},
    ]
    return write_jsonl(tmp_path / "rows.jsonl", [*good, *bad])


def test_every_step_leaves_its_trace(broken: Path, tmp_path: Path, tiny_model: Path) -> None:
    test_set = write_jsonl(tmp_path / "exam.jsonl", [{"prompt": "Say: " + sentence(9000, 20)}])
    section = {"scrub": ["email"], "decontaminate": [str(test_set)]}
    config = config_of(tmp_path, tiny_model, data={"demonstrations": str(broken)}, prepare=section)
    run = run_stage(config, "prepare")
    kept = prepared(config)
    assert run.info["summary"] == {"demonstrations": {"rows in": 36, "rows out": 32}}
    assert len(kept) == 32 and {row["split"] for row in kept} == {"train", "test"}
    assert kept[30]["prompt"][0]["content"] == "What is rain?"
    assert kept[30]["completion"][0]["content"] == "It’s water."
    assert kept[31]["completion"][0]["content"].startswith("Write to <email>, please")

    dropped = {
        row["where"].rpartition(" ")[2]: (row["step"], row["reason"]) for row in prepared(config, "dropped.jsonl")
    }
    assert dropped.keys() == {"32", "33", "34", "36"}
    assert dropped["32"] == ("exact duplicates", "that say the same as another")
    assert dropped["33"] == ("near duplicates", "that nearly say the same as another")
    assert dropped["34"][1] == "with an empty answer"
    assert "exam" in dropped["36"][1]
    assert all(
        {"file", "where", "step", "reason", "detail", "record"} == row.keys()
        for row in prepared(config, "dropped.jsonl")
    )

    changed = {row["where"].rpartition(" ")[2]: row for row in prepared(config, "changed.jsonl")}
    assert changed["31"]["before"]["completion"][0]["content"] == "Itâ€™s water.\r\n"
    assert changed["35"]["steps"] == ["scrub"] and changed["35"]["before"] is None  # an address is not kept
    for name in ("dropped.jsonl", "changed.jsonl", "data_report.json", "data_report.html"):
        assert "ann.bee" not in (config.folder("prepare") / name).read_text("utf-8")


def test_the_stages_read_what_was_prepared(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows(40))
    write_jsonl(tmp_path / "b.jsonl", [{"messages": turns(row)} for row in rows(40, 100)])
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 2}, {"path": str(tmp_path / "b.jsonl"), "weight": 1}]
    config = config_of(
        tmp_path,
        tiny_model,
        stages=["sft"],
        prepare={"demonstrations": sources},
        sft={"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 1024},
    )
    with pytest.raises(InputError, match=r"0-prepare does not exist: run `align data prepare CONFIG` first"):
        run_stage(config, "sft")
    run_pipeline(config)
    kept = prepared(config)
    assert [sum(row["source"] == name for row in kept) for name in ("a.jsonl", "b.jsonl")] == [40, 20]
    info = json.loads((config.folder("sft") / "run.json").read_text())
    assert info["status"] == "done" and info["parents"].keys() == {"prepare"}
    assert sum(info["summary"]["data"]["rows"].values()) == 60
    chain = {entry["stage"]: entry for entry in lineage(config.folder("sft"))}
    assert {*chain["prepare"]["data"]} == {str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")}
    run_pipeline(config)  # a no-op

    write_jsonl(tmp_path / "b.jsonl", [{"messages": turns(row)} for row in rows(41, 100)])
    with pytest.raises(InputError, match=r"0-prepare was finished with other inputs .*b\.jsonl"):
        run_pipeline(config)


def turns(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def test_all_files_share_their_sides(tmp_path: Path, tiny_model: Path) -> None:
    told = rows(30)
    write_jsonl(tmp_path / "d.jsonl", told)
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": row["prompt"] + " please"} for row in told])
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": sentence(n)} for n, r in enumerate(told)]
    write_jsonl(tmp_path / "f.jsonl", pairs)
    data = {"demonstrations": "d.jsonl", "prompts": "p.jsonl", "preferences": "f.jsonl"}
    config = config_of(tmp_path, tiny_model, data=data, prepare={})
    run_stage(config, "prepare")
    found = [prepared(config, f"{key}.jsonl") for key in data]
    assert [len(each) for each in found] == [30, 30, 30]
    assert len({tuple(row["split"] for row in each) for each in found}) == 1


def test_processes_and_runs_change_nothing(tmp_path: Path, tiny_model: Path) -> None:
    """More rows than one process takes alone, by one and by two: the same bytes."""
    count = ALONE + 2 * CHUNK + 7
    write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": f"What is {n}?", "completion": sentence(n, 9)} for n in range(count)]
    )
    written = []
    for processes in (1, 2):
        section = {"processes": processes, "near_duplicates": None, "split": "hash"}
        config = config_of(
            tmp_path,
            tiny_model,
            data={"demonstrations": "rows.jsonl"},
            prepare=section,
            runs=str(tmp_path / f"r{processes}"),
        )
        run_stage(config, "prepare")
        folder = config.folder("prepare")
        names = ("demonstrations.jsonl", "dropped.jsonl", "changed.jsonl")
        written.append([(folder / name).read_bytes() for name in names])
    assert written[0] == written[1] and written[0][0].count(b"\n") == count


def test_paraphrases_are_marked_and_train_only(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows(60))
    section = {"augment": {"templates": ["Please answer: {prompt}"], "share": 0.5}}
    config = config_of(tmp_path, tiny_model, data={"demonstrations": "rows.jsonl"}, prepare=section)
    run_stage(config, "prepare")
    found = prepared(config)
    made = [row for row in found if "augmented" in row]
    assert len(found) - len(made) == 60 and 10 < len(made) < 40
    assert all(row["split"] == "train" and row["prompt"][-1]["content"].startswith("Please answer: ") for row in made)
    assert not {prompt_id(row["prompt"]) for row in made} & {
        prompt_id(row["prompt"]) for row in found if row not in made
    }


def test_nothing_left_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows(3))
    config = config_of(tmp_path, tiny_model, data={"demonstrations": "rows.jsonl"}, prepare={"min_answer_chars": 5000})
    with pytest.raises(
        InputError, match=r"^demonstrations: no row is left of 3 \(3 .*loosen the steps of `prepare`\.$"
    ):
        run_stage(config, "prepare")
    assert not (config.folder("prepare") / "DONE").exists()


def test_mended_data_is_read_again_without_force(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, rows(3))
    file.write_text(file.read_text() + '{"prompt": ')
    config = config_of(tmp_path, tiny_model, data={"demonstrations": "rows.jsonl"}, prepare={})
    with pytest.raises(InputError, match=r"rows\.jsonl, line 4: not valid JSON"):
        run_stage(config, "prepare")
    write_jsonl(file, rows(4))
    assert run_stage(config, "prepare").finished and len(prepared(config)) == 4


def test_nothing_to_prepare_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(InputError, match="prepare has nothing to prepare"):
        run_stage(config_of(tmp_path, tiny_model, prepare={}), "prepare")
