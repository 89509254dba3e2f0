"""The run folder: what a stage was made from, what it did, and a mark that it is whole.

    runs/<pipeline>/<n>-<stage>/
        config.yaml     the fully resolved config
        run.json        status, inputs, parents with content digests, seeds, versions, git commit, time, peak memory
        metrics.jsonl   one line a logging step
        ...             the stage's own files (a model in Hugging Face or PEFT layout, data as JSONL)
        DONE            written last, atomically: the digest of every file the stage produced

A folder without DONE is never read as finished. A stage is identified by its *inputs*: the config keys that change its
result, the digests of its data files and of its parents. The same inputs again are a no-op (finished) or a resume (not
finished); other inputs are refused, with what changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from reward.records import InputError, Record, digest, file_digest, write_atomically, write_json

# Scratch of a stage (checkpoints, partial outputs): kept while it runs, removed when it is done.
WORK = "work"
# metrics.jsonl holds times: the same stage run twice would get two digests.
_NOT_OUTPUT = {"DONE", "run.json", "config.yaml", "metrics.jsonl", ".lock", WORK}
# What every run.json holds from the first moment on.
_INFO_KEYS = {"stage", "inputs", "parents", "data", "started_at", "starts", "seconds", "simulated_labels"}
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "tokenizers", "numpy")


@dataclass
class Run:
    """An open run folder of one stage. `finished` says that there is nothing to do; `resuming` that there is a past."""

    stage: str
    folder: Path
    inputs: dict[str, Any]
    parents: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    resuming: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    writer: bool = True  # False on every process but the first: it reads, it never writes
    watch: _Watch | None = None

    @property
    def work(self) -> Path:
        """Folder for checkpoints and partial outputs."""
        return self.folder / WORK

    def metrics(self, record: Record) -> None:
        """Append one line to metrics.jsonl."""
        if self.writer:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as out:
                out.write(json.dumps(record, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Before resuming at `step`: take out of metrics.jsonl what is about to be logged again, or was cut short."""
        path = self.folder / "metrics.jsonl"
        if not self.writer or not path.exists():
            return
        lines = [line for line in path.read_text("utf-8").split("\n")[:-1] if line]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))

    def measure(self) -> None:
        """Add the time and memory used since the last call to the record."""
        if self.watch:
            self.info["seconds"] = round(self.info["seconds"] + self.watch.lap(), 1)
            self.info["peak_memory_gib"] = max(self.info["peak_memory_gib"], self.watch.peak_gib)

    def finish(self, summary: dict[str, Any]) -> None:
        """Record the summary, write DONE and remove the scratch folder, in this order: a kill loses no checkpoint."""
        if not self.writer:
            return
        self.info |= {"status": "done", "summary": summary, "finished_at": _now()}
        self.info.pop("error", None)
        self.measure()
        write_json(self.folder / "run.json", self.info)
        files = {str(path.relative_to(self.folder)): file_digest(path) for path in _outputs(self.folder)}
        write_json(self.folder / "DONE", {"digest": digest(files), "files": files})
        self.finished = True
        shutil.rmtree(self.work, ignore_errors=True)


@contextlib.contextmanager
def open_run(
    stage: str,
    folder: Path,
    inputs: dict[str, Any],
    *,
    config_yaml: str,
    parents: dict[str, Path] | None = None,
    force: bool = False,
    writer: bool = True,
    labels_simulated: bool = False,
) -> Iterator[Run]:
    """Open the run folder of a stage: new, to be resumed, or finished (`Run.finished`).

    Args:
        inputs: everything that decides the stage's result, as flat JSON: config keys, data digests, parent digests.
        parents: stage name -> folder of the finished stages this one builds on.
        force: start again although the folder was made from other inputs; its content is removed.

    Raises:
        InputError: another process is at work in the folder; the folder was made from other inputs; not writable.
    """
    parent_digests = {name: done_digest(path) for name, path in (parents or {}).items()}
    inputs = {**inputs, **{f"parent {name}": value for name, value in parent_digests.items()}}
    run = Run(stage, folder, inputs, parent_digests, writer=writer)
    if not writer:
        run.finished = is_done(folder)
        run.resuming = run.work.exists()
        yield run
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; set `runs` to a folder you can write to."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is in use by another process; wait for it or choose another `name`.") from None
        previous = read_info(folder)
        if previous is None and is_done(folder) and not force:
            raise InputError(f"{folder} has lost its run.json: remove the folder, or pass --force to redo the stage.")
        # People's labels are never removed: a label database goes only if it is known to be simulated.
        keep = "" if previous and previous["simulated_labels"] else "labels.sqlite"
        if previous and force and not (is_done(folder) and previous["inputs"] == inputs):
            previous = None
        if previous and previous["inputs"] != inputs:
            raise InputError(_what_changed(folder, previous["inputs"], inputs))
        if previous is None:
            _clear(folder, keep)
        run.finished = is_done(folder)
        if run.finished:
            shutil.rmtree(run.work, ignore_errors=True)  # left by a kill right after DONE
            run.info = previous or {}
            yield run
            return
        run.resuming = previous is not None
        run.work.mkdir(exist_ok=True)
        write_atomically(folder / "config.yaml", config_yaml)
        run.info = _describe(run, parents or {}, previous, labels_simulated)
        write_json(folder / "run.json", run.info)
        with _Watch() as run.watch:
            try:
                yield run
            except BaseException as error:
                if not run.finished:  # nothing is written after DONE
                    run.info |= {"status": "failed" if isinstance(error, Exception) else "interrupted"}
                    run.info |= {"error": f"{type(error).__name__}: {error}"[:2000]}
                    run.measure()
                    with contextlib.suppress(OSError):  # the error on its way out matters more than a full disk here
                        write_json(folder / "run.json", run.info)
                raise


def is_done(folder: Path) -> bool:
    return (folder / "DONE").is_file()


def done_digest(folder: Path) -> str:
    """The content digest of a finished run folder.

    Raises:
        InputError: the folder does not exist or its stage has not finished.
    """
    if not is_done(folder):
        stage = folder.name.partition("-")[2] or folder.name
        state = "has not finished (there is no DONE in it)" if folder.exists() else "does not exist"
        command = "data prepare" if stage == "prepare" else stage
        raise InputError(f"{folder} {state}: run `align {command} CONFIG` first, or `align run CONFIG` for all stages.")
    try:
        return str(json.loads((folder / "DONE").read_text("utf-8"))["digest"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / 'DONE'} is damaged: remove the folder {folder} and run the stage again.") from None


def read_info(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder, None where there is none."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        info = json.loads(path.read_text("utf-8"))
    except ValueError:  # not JSON, or not even text
        info = None
    if not isinstance(info, dict) or not info.keys() >= _INFO_KEYS:
        raise InputError(f"{path} is damaged: remove the folder {folder} and run the stage again.")
    return info


def lineage(folder: Path) -> list[dict[str, Any]]:
    """The chain behind a run folder, itself first: stage, folder, digest, parents (names), data files with sha256."""
    chain: dict[str, dict[str, Any]] = {}

    def visit(path: Path) -> str:
        key = str(path.resolve())
        if key not in chain:
            info = read_info(path)
            if info is None:
                raise InputError(f"{path} is not a run folder: there is no run.json in it.")
            chain[key] = entry = {
                "stage": info["stage"],
                "folder": str(path),
                "digest": done_digest(path) if is_done(path) else "not finished",
                "data": info["data"],
                "summary": info.get("summary", {}),
                "simulated_labels": info["simulated_labels"],
            }
            entry["parents"] = [visit(Path(parent["folder"])) for parent in info["parents"].values()]
            stale = []
            for parent in info["parents"].values():
                now = done_digest(Path(parent["folder"])) if is_done(Path(parent["folder"])) else "not finished"
                if now != parent["digest"]:
                    stale.append(f"{parent['folder']} has changed since (was {parent['digest'][:12]}, is {now[:12]})")
            if stale:
                entry["stale"] = "; ".join(stale)
        return str(chain[key]["stage"])

    visit(folder)
    return list(chain.values())


def free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse to start work whose result cannot fit on the disk.

    Raises:
        InputError: fewer than `needed_bytes` are free where `folder` lies.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise InputError(
            f"{what} needs about {needed_bytes / 2**30:.2f} GiB in {folder}, but {free / 2**30:.2f} GiB are free: "
            "make room or set `runs` to another disk."
        )


def is_disk_full(error: BaseException | None) -> bool:
    """True if an error, or what caused it, is a full disk; torch and safetensors say so only in their message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _what_changed(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [key for key in {**was, **now} if was.get(key, _NOT_SET) != now.get(key, _NOT_SET)]
    changes = "; ".join(
        f"{key}: was {_short(was.get(key, _NOT_SET))}, is {_short(now.get(key, _NOT_SET))}" for key in keys[:8]
    )
    more = f"; and {len(keys) - 8} more" if len(keys) > 8 else ""
    state = "finished" if is_done(folder) else "begun"
    return (
        f"{folder} was {state} with other inputs ({changes}{more}): choose another `name`, or pass --force to redo it."
    )


_NOT_SET = "not set"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text[:12] if len(text) == 64 else text[:60]


def _clear(folder: Path, keep: str = "") -> None:
    """Remove everything but the lock and files that begin with `keep` (a database and its journals).

    DONE goes first, so that a kill in between leaves no folder that lies.
    """
    (folder / "DONE").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name == ".lock" or (keep and path.name.startswith(keep)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _outputs(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in _NOT_OUTPUT and not path.name.startswith(".")
    )


def _describe(run: Run, parents: dict[str, Path], previous: dict[str, Any] | None, simulated: bool) -> dict[str, Any]:
    return {
        "stage": run.stage,
        "status": "running",
        "started_at": previous["started_at"] if previous else _now(),
        "starts": (previous["starts"] if previous else 0) + 1,
        "seconds": previous["seconds"] if previous else 0.0,
        "peak_memory_gib": previous["peak_memory_gib"] if previous else 0.0,
        "simulated_labels": simulated,
        "parents": {
            name: {"folder": str(path.resolve()), "digest": run.parents[name]} for name, path in parents.items()
        },
        "data": {key[5:]: value for key, value in run.inputs.items() if key.startswith("file ")},
        "seed": run.inputs.get("seed"),
        "inputs": run.inputs,
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in ("align-rlhf", *_PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def git_commit() -> str | None:
    """Commit of the code, with "+changes" where the work tree differs; None outside a git checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Watch:
    """Wall time and peak resident memory of a block, sampled twice a second (GiB, this process only)."""

    def __enter__(self) -> _Watch:
        self.started, self.peak_gib = time.monotonic(), round(psutil.Process().memory_info().rss / 2**30, 3)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def lap(self) -> float:
        """Seconds since the start or the last lap."""
        last, self.started = self.started, time.monotonic()
        return self.started - last

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_gib = max(self.peak_gib, round(process.memory_info().rss / 2**30, 3))
            if self._stop.wait(0.5):
                return
