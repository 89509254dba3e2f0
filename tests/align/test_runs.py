"""The run folder: what makes it whole, what makes it the same again, and what a crash at any moment leaves behind."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align import cli, pipeline
from align.config_file import load_config
from align.lineage import as_text
from align.runs import Run, done_digest, free_space, is_disk_full, is_done, lineage, open_run, read_info
from reward.records import InputError, write_jsonl

INPUTS = {"seed": 3, "sft.beta": 0.1, "file /data/a.jsonl": "a" * 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "p" / "1-sft"


def go(
    folder: Path, inputs: dict[str, Any] | None = None, *, text: str = "result", finish: bool = True, **more: Any
) -> Run:
    """A stage that writes one file."""
    stage = folder.name.partition("-")[2]
    with open_run(stage, folder, INPUTS if inputs is None else inputs, config_yaml="a: 1\n", **more) as run:
        if not run.finished:
            (folder / "out.txt").write_text(text)
            if finish:
                run.finish({"rows": 1})
    return run


def info(folder: Path) -> dict[str, Any]:
    found = read_info(folder)
    assert found is not None
    return found


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# Whole


def test_a_finished_folder(folder: Path) -> None:
    with open_run("sft", folder, INPUTS, config_yaml="a: 1\n") as run:
        assert (run.finished, run.resuming) == (False, False)
        assert info(folder)["status"] == "running"
        (folder / "model").mkdir()
        (folder / "model/weights").write_bytes(b"\0\1")
        (run.work / "checkpoint").write_text("scratch")
        run.metrics({"step": 1, "loss": 0.5})
        run.metrics({"step": 2, "loss": 0.25})
        assert not is_done(folder)
        run.finish({"rows": 1})
        assert run.finished
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "DONE",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "run.json",
    ]
    assert (folder / "config.yaml").read_text() == "a: 1\n"
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'
    record = info(folder)
    assert (record["status"], record["summary"], record["starts"], record["seed"]) == ("done", {"rows": 1}, 1, 3)
    assert record["inputs"] == INPUTS
    assert record["data"] == {"/data/a.jsonl": "a" * 64}
    assert record["versions"]["python"]
    assert record["peak_memory_gib"] > 0
    assert record["finished_at"] >= record["started_at"]
    done = json.loads((folder / "DONE").read_text())
    assert sorted(done["files"]) == ["model/weights"]  # metrics.jsonl holds times and is left out
    # sha256 of the two bytes 00 01
    assert done["files"]["model/weights"] == "b413f47d13ee2fe6c845b2ee141af81de858df4ec549a58b7970bb96645bc8d2"


def test_done_is_written_last(folder: Path) -> None:
    go(folder)
    done = (folder / "DONE").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= done for path in folder.rglob("*") if path.name != "DONE")


def test_nothing_is_written_after_done_even_if_the_stage_then_fails(folder: Path) -> None:
    with pytest.raises(RuntimeError), open_run("sft", folder, INPUTS, config_yaml="") as run:
        run.finish({})
        before = content(folder)
        raise RuntimeError("while saying goodbye")
    assert content(folder) == before
    assert info(folder)["status"] == "done"


def test_hidden_and_own_files_are_no_outputs(folder: Path) -> None:
    with open_run("sft", folder, INPUTS, config_yaml="") as run:
        (folder / "out.txt").write_text("x")
        (folder / ".out.txt.k3jw").write_text("half a file, left by a kill")
        (run.work / "partial.jsonl").write_text("{}")
        run.finish({})
    assert list(json.loads((folder / "DONE").read_text())["files"]) == ["out.txt"]


def test_digest_is_that_of_the_outputs(tmp_path: Path) -> None:
    folders = [tmp_path / name / "1-sft" for name in "abcd"]
    go(folders[0])
    go(folders[1], {**INPUTS, "seed": 4})  # another way to the same files
    go(folders[2], text="another result")
    with open_run("sft", folders[3], INPUTS, config_yaml="") as run:  # the same bytes under another name
        (folders[3] / "other.txt").write_text("result")
        run.finish({})
    digests = [done_digest(folder) for folder in folders]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


# The same again, or not


def test_same_inputs_again_change_nothing(folder: Path) -> None:
    go(folder)
    before = content(folder)
    run = go(folder, text="never written")
    assert run.finished
    assert run.info["summary"] == {"rows": 1}
    after = content(folder)
    del before[".lock"], after[".lock"]
    assert after == before


def test_force_does_not_redo_what_is_the_same(folder: Path) -> None:
    go(folder)
    assert go(folder, force=True, text="never written").finished
    assert (folder / "out.txt").read_text() == "result"


def test_other_inputs_are_refused_with_both_values(folder: Path) -> None:
    go(folder)
    before = content(folder)
    now = {"seed": 3, "sft.beta": 0.2, "file /data/b.jsonl": "b" * 64, "sft.extra": None}
    with pytest.raises(InputError) as caught:
        go(folder, now)
    assert str(caught.value) == (
        f"{folder} was finished with other inputs (sft.beta: was 0.1, is 0.2; "
        "file /data/a.jsonl: was aaaaaaaaaaaa, is not set; file /data/b.jsonl: was not set, is bbbbbbbbbbbb; "
        "sft.extra: was not set, is null): choose another `name`, or pass --force to redo it."
    )
    del before[".lock"]
    assert before.items() <= content(folder).items()


def test_many_changes_are_counted(folder: Path) -> None:
    go(folder, {f"k{i}": i for i in range(11)})
    with pytest.raises(InputError, match=r"k7: was 7, is -7; and 3 more\)"):
        go(folder, {f"k{i}": -i if i else "x" for i in range(11)})


def test_begun_with_other_inputs_is_refused_too(folder: Path) -> None:
    go(folder, finish=False)
    with pytest.raises(InputError, match=r"was begun with other inputs \(seed: was 3, is 4\)"):
        go(folder, {**INPUTS, "seed": 4})


def test_force_redoes_from_nothing(folder: Path) -> None:
    go(folder)
    (folder / "stale").mkdir()
    (folder / "stale/file").write_text("of the first run")
    (folder / "link").symlink_to(folder.parent)
    run = go(folder, {**INPUTS, "seed": 4}, force=True, text="second")
    assert not run.resuming
    assert (folder / "out.txt").read_text() == "second"
    assert not (folder / "stale").exists()
    assert not (folder / "link").is_symlink()
    assert folder.parent.is_dir()  # the link was removed, not what it pointed to
    assert info(folder)["inputs"]["seed"] == 4
    assert info(folder)["starts"] == 1


def test_leftovers_without_a_run_are_cleared(folder: Path) -> None:
    (folder / "work").mkdir(parents=True)
    (folder / "work/checkpoint").write_text("of nobody")
    with open_run("sft", folder, INPUTS, config_yaml="") as run:
        assert not run.resuming
        assert list(run.work.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_peoples_labels_are_never_removed(tmp_path: Path, force: bool) -> None:
    """The labelling app may have filled the stage's own folder before the stage was ever started."""
    folder = tmp_path / "3-label"
    folder.mkdir()
    for name in ("labels.sqlite", "labels.sqlite-wal"):
        (folder / name).write_text("a day's work")
    if force:
        go(folder)
    go(folder, {"label.min_labels": 2}, force=force, text="new")
    assert (folder / "labels.sqlite").read_text() == (folder / "labels.sqlite-wal").read_text() == "a day's work"
    assert (folder / "out.txt").read_text() == "new"


def test_simulated_labels_are_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "3-label"
    go(folder, finish=False, labels_simulated=True)
    (folder / "labels.sqlite").write_text("of another seed")
    go(folder, {"seed": 4}, force=True, labels_simulated=True)
    assert not (folder / "labels.sqlite").exists()


def test_a_changed_parent_is_a_changed_input(tmp_path: Path) -> None:
    parent, child = tmp_path / "1-sft", tmp_path / "2-sample"
    go(parent)
    old = done_digest(parent)
    go(child, parents={"sft": parent})
    assert info(child)["parents"] == {"sft": {"folder": str(parent), "digest": old}}
    go(parent, {"seed": 9}, force=True, text="new")
    wanted = rf"parent sft: was {old[:12]}, is {done_digest(parent)[:12]}\)"
    with pytest.raises(InputError, match=wanted):
        go(child, parents={"sft": parent})


def test_what_does_not_change_the_result_may_change(
    tmp_path: Path, tiny_model: Path, tiny_demonstrations: Path
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"runs: r\nmodel: {{base: {tiny_model}}}\ndata: {{demonstrations: {tiny_demonstrations}}}\n")
    config = load_config(file)
    inputs = pipeline.stage_inputs(config, "sft")
    neutral = ["report_to=[tensorboard]", "logging_steps=10", "save_steps=5", "save_total_limit=3", "run_name=x"]
    other = load_config(file, [f"sft.{o}" for o in neutral] + ["dpo.beta=0.5", "runs=elsewhere", "name=q"])
    folder = config.folder("sft")
    go(folder, inputs, finish=False)
    assert go(folder, pipeline.stage_inputs(other, "sft")).resuming
    for override in ("sft.learning_rate=1e-3", "seed=1", "data.max_rows=5", "sft.adapter=null", "sft.adam_beta1=0.8"):
        with pytest.raises(InputError, match=override.partition("=")[0]):
            go(folder, pipeline.stage_inputs(load_config(file, [override]), "sft"))


def test_a_changed_data_file_is_a_changed_input(tmp_path: Path, tiny_model: Path) -> None:
    file, data = tmp_path / "p.yaml", tmp_path / "d.jsonl"
    file.write_text(f"model: {{base: {tiny_model}}}\ndata: {{demonstrations: d.jsonl}}\n")
    write_jsonl(data, [{"prompt": "a", "completion": "b"}])
    before = pipeline.stage_inputs(load_config(file), "sft")
    write_jsonl(data, [{"prompt": "a", "completion": "c"}])
    after = pipeline.stage_inputs(load_config(file), "sft")
    assert {key for key in before if before[key] != after[key]} == {f"file {data}"}


# Interrupted


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("no luck"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_status_of_a_stage_that_stopped(folder: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), open_run("sft", folder, INPUTS, config_yaml="") as run:
        (run.work / "checkpoint").write_text("step 5")
        raise error
    record = info(folder)
    assert record["status"] == status
    assert record["error"] == f"{type(error).__name__}: {error}"
    assert not is_done(folder)

    with open_run("sft", folder, INPUTS, config_yaml="") as run:
        assert (run.finished, run.resuming) == (False, True)
        assert (run.work / "checkpoint").read_text() == "step 5"
        assert info(folder)["status"] == "running"
        run.finish({})
    record = info(folder)
    assert (record["status"], record["starts"]) == ("done", 2)
    assert "error" not in record


def test_time_adds_up_over_starts(folder: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError), open_run("sft", folder, INPUTS, config_yaml=""):
            time.sleep(0.12)
            raise RuntimeError
    assert 0.2 <= info(folder)["seconds"] < 2
    go(folder)
    assert 0.2 <= info(folder)["seconds"] < 2


KILLED_AT = {
    "before its files": "align.runs.write_json = die",
    "between two files": "die()",
    "between files and run.json": "run.finish = die",
    "between run.json and DONE": "align.runs.digest = die",
    "while DONE is written": "import pathlib; pathlib.Path.replace = die",
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_killed_at_any_moment_it_never_looks_finished(folder: Path, moment: str) -> None:
    """A real process, really killed: SIGKILL leaves no time to tidy up."""
    early = moment == "before its files"
    script = f"""
        import os, signal
        from pathlib import Path
        import align.runs

        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        folder = Path({str(folder)!r})
        {KILLED_AT[moment] if early else "pass"}
        with align.runs.open_run("sft", folder, {INPUTS!r}, config_yaml="") as run:
            (folder / "one.txt").write_text("one")
            {"pass" if early else KILLED_AT[moment]}
            (folder / "two.txt").write_text("two")
            run.finish({{}})
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not is_done(folder)
    with pytest.raises(InputError, match="has not finished"):
        done_digest(folder)

    run = go(folder)  # and the next start, by which the lock is free again, makes it whole
    assert run.resuming is not early
    assert is_done(folder)
    assert not [name for name in json.loads((folder / "DONE").read_text())["files"] if "DONE" in name]


def test_killed_while_a_forced_redo_clears_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(folder)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "iterdir", stop)
    with pytest.raises(KeyboardInterrupt):
        go(folder, {"seed": 4}, force=True)
    assert not is_done(folder)  # its files are still there, but it no longer claims to be whole


# Two at once


@pytest.fixture
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process at work in the folder."""
    script = (
        "import sys; from pathlib import Path; from align.runs import open_run\n"
        f"with open_run('sft', Path({str(folder)!r}), {INPUTS!r}, config_yaml='') as run:\n"
        "    print('open', flush=True); sys.stdin.readline()\n"
        f"    (Path({str(folder)!r}) / 'out.txt').write_text('theirs'); run.finish({{}})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    yield process
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_in_use_is_refused(folder: Path, other_process: subprocess.Popen[str], force: bool) -> None:
    with pytest.raises(InputError, match=r"1-sft is in use by another process; wait for it or choose another `name`"):
        go(folder, {"seed": 4}, force=force)
    other_process.communicate("\n")
    assert other_process.returncode == 0
    assert (folder / "out.txt").read_text() == "theirs"
    assert go(folder).finished


def test_a_helper_process_of_a_launcher_neither_locks_nor_writes(folder: Path) -> None:
    with open_run("sft", folder, INPUTS, config_yaml="") as first:
        before = content(folder)
        with open_run("sft", folder, INPUTS, config_yaml="", writer=False) as second:
            second.metrics({"step": 1})
            second.finish({"rows": 2})
            assert not second.finished
        assert content(folder) == before
        first.finish({"rows": 1})
    with open_run("sft", folder, INPUTS, config_yaml="", writer=False) as second:
        assert second.finished


# Parents and lineage


def test_a_parent_that_is_not_done(tmp_path: Path) -> None:
    parent, child = tmp_path / "1-sft", tmp_path / "2-sample"
    with pytest.raises(InputError) as caught:
        go(child, parents={"sft": parent})
    assert str(caught.value) == (
        f"{parent} does not exist: run `align sft CONFIG` first, or `align run CONFIG` for all stages."
    )
    go(parent, finish=False)
    with pytest.raises(InputError, match=r"1-sft has not finished \(there is no DONE in it\): run `align sft CONFIG`"):
        go(child, parents={"sft": parent})
    assert not child.exists()


def test_lineage(tmp_path: Path) -> None:
    sft, label, dpo = tmp_path / "1-sft", tmp_path / "3-label", tmp_path / "5-dpo"
    go(sft)
    with open_run(
        "label", label, {"file /d/q.jsonl": "e" * 64}, config_yaml="", parents={"sft": sft}, labels_simulated=True
    ) as run:
        run.finish({"labels": 12, "labels_digest": "c" * 64})
    go(dpo, {"seed": 0}, parents={"sft": sft, "label": label}, finish=False)

    chain = lineage(dpo)
    assert [entry["stage"] for entry in chain] == ["dpo", "sft", "label"]  # each once, though sft is reached twice
    assert [entry["parents"] for entry in chain] == [["sft", "label"], [], ["sft"]]
    assert [entry["digest"] for entry in chain] == ["not finished", done_digest(sft), done_digest(label)]
    assert not any("stale" in entry for entry in chain)

    text = as_text(dpo)
    assert text.splitlines()[:3] == [f"dpo  {dpo}", "    digest   not finished", "    made of  sft, label"]
    assert "    data     /data/a.jsonl  sha256 " + "a" * 64 in text
    assert "    data     /d/q.jsonl  sha256 " + "e" * 64 in text
    assert "    labels   SIMULATED: no person judged these answers" in text
    assert "    labels   12, sha256 " + "c" * 64 in text
    assert "WARNING" not in text


def test_lineage_warns_of_every_parent_that_changed_since(tmp_path: Path) -> None:
    sft, label, dpo = tmp_path / "1-sft", tmp_path / "3-label", tmp_path / "5-dpo"
    go(sft)
    go(label)
    was = done_digest(sft)
    go(dpo, parents={"sft": sft, "label": label})
    go(sft, {"seed": 8}, force=True, text="new")
    go(label, {"seed": 8}, force=True, finish=False)
    warning = next(line for line in as_text(dpo).splitlines() if "WARNING" in line)
    assert f"{sft} has changed since (was {was[:12]}, is {done_digest(sft)[:12]})" in warning
    assert f"{label} has changed since (was {was[:12]}, is not finished" in warning


def test_lineage_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run folder: there is no run\.json in it"):
        lineage(tmp_path)


# Damage, and disks


@pytest.mark.parametrize("damage", [b"", b'{"status": "ru', b"[]", b"{}", b"\xff\xfe\x00", b'"text"'])
def test_a_damaged_run_json(folder: Path, damage: bytes) -> None:
    go(folder)
    (folder / "run.json").write_bytes(damage)
    for attempt in (lambda: go(folder), lambda: lineage(folder)):
        with pytest.raises(
            InputError, match=r"run\.json is damaged: remove the folder .*1-sft and run the stage again"
        ):
            attempt()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff"])
def test_a_damaged_done(folder: Path, tmp_path: Path, damage: bytes) -> None:
    go(folder)
    (folder / "DONE").write_bytes(damage)
    with pytest.raises(InputError, match="DONE is damaged: remove the folder"):
        go(tmp_path / "2-sample", parents={"sft": folder})


def test_a_finished_folder_without_run_json_is_not_believed(folder: Path) -> None:
    """Nobody knows what it was made from, so it may not be taken for what is asked for."""
    go(folder)
    (folder / "run.json").unlink()
    with pytest.raises(InputError, match=r"has lost its run\.json"):
        go(folder)
    assert not go(folder, force=True, text="new").resuming
    assert (folder / "out.txt").read_text() == "new"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError) as caught:
        go(tmp_path / "file" / "p" / "1-sft")
    assert str(caught.value).startswith(f"cannot write to {tmp_path / 'file'}")
    assert str(caught.value).endswith("Not a directory; set `runs` to a folder you can write to.")


def test_free_space(tmp_path: Path) -> None:
    free_space(tmp_path, 0, "sft")
    with pytest.raises(InputError) as caught:
        free_space(tmp_path, 2**70, "sft")
    start = re.escape(f"sft needs about {2**40:.2f} GiB in {tmp_path}, but ")
    found = re.fullmatch(start + r"([\d.]+) GiB are free: make room or set `runs` to another disk\.", str(caught.value))
    assert found is not None
    # Other tests write meanwhile.
    assert float(found[1]) == pytest.approx(shutil.disk_usage(tmp_path).free / 2**30, rel=0.3)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter: No space left on device"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("28"), False),
        (None, False),
    ],
)
def test_is_disk_full(error: BaseException | None, full: bool) -> None:
    assert is_disk_full(error) is full
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) is full


@pytest.fixture
def full_disk_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_demonstrations: Path) -> Path:
    """A pipeline whose sft stage is our own: it writes one line to metrics.jsonl."""

    def train(config: Any, run: Run) -> dict[str, Any]:
        run.metrics({"step": 1})
        return {}

    monkeypatch.setattr("align.sft.run_sft", train)
    file = tmp_path / "p.yaml"
    file.write_text(f"runs: {tmp_path / 'runs'}\ndata: {{demonstrations: {tiny_demonstrations}}}\n")
    return file


def test_a_full_disk_is_one_sentence_and_exit_code_2(
    full_disk_sft: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(full_disk_sft)
    folder = config.folder("sft")
    go(folder, pipeline.stage_inputs(config, "sft"), finish=False)  # begun, so that the next start keeps what is there
    (folder / "metrics.jsonl").symlink_to("/dev/full")  # every write to it fails with a real ENOSPC
    monkeypatch.setattr(sys, "argv", ["align", "sft", str(full_disk_sft)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == (
        "align: the disk is full: make room and run the same command again; it goes on where it stopped."
    )
    assert "Traceback" not in said
    assert not is_done(folder)
    assert info(folder)["status"] == "failed"
    assert "No space left on device" in info(folder)["error"]

    (folder / "metrics.jsonl").unlink()  # room was made
    cli.main()
    assert is_done(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_before_done(small_disk: Path) -> None:
    folder = small_disk / "1-sft"
    with pytest.raises(OSError) as caught, open_run("sft", folder, INPUTS, config_yaml="") as run:
        with (folder / "model").open("wb", buffering=0) as out:
            try:
                while True:
                    out.write(b"\0" * 4096)
            except OSError:
                pass
        run.finish({})  # nothing fits any more, not even run.json
    assert is_disk_full(caught.value)
    assert not is_done(folder)
    (folder / "model").unlink()
    assert info(folder)["status"] in ("running", "failed")  # the last run.json that could be written, still whole
    assert go(folder).resuming
    assert is_done(folder)
