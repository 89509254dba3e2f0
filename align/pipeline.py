"""The pipeline: its stages in order, each from a config (and its parents' run folders) to one run folder.

    0 prepare  files of `data`           -> the same, cleaned, mixed and split; only where the section is there
    1 sft      demonstrations            -> SFT model, the base of everything after it
    2 sample   prompts x policies        -> comparisons
    3 label    comparisons or a dataset  -> preferences
    4 reward   preferences               -> reward model (adapter + score head on the SFT model)
    5 dpo      preferences               -> policy (adapter on the SFT model)
    6 ppo      prompts x rewards         -> policy (adapter on the SFT model)
    7 compare  held-out prompts x models -> report.html, report.json

A stage runs alone (`run_stage`) or after the others (`run_pipeline`), in this process or, under a launcher, in many.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align import progress, ranks
from align.config import DATA_KEYS, POLICIES, PREPARE, Config
from align.runs import Run, done_digest, is_done, open_run
from reward.records import InputError, file_digest

# Keys that change how a stage runs or reports, not what comes out: they may differ between a start and its resumption.
NEUTRAL_KEYS = {"logging_steps", "save_steps", "save_total_limit", "report_to", "run_name", "dataloader_num_workers"}
NEUTRAL_KEYS |= {"ddp_timeout", "processes", "too_long_share"}
# What decides how people are asked, not what they said: their labels are an input of the stage by themselves.
NEUTRAL_KEYS |= {"finish", "labels", "guidelines", "lease_seconds", "gold_share", "policy", "criteria", "blind_pairs"}
NEUTRAL_KEYS |= {"uncertain_by", "parallel", "timeout", "retries", "api_key_env"}


TRAINED = ("sft", "reward", "dpo", "ppo")  # their data is checked before they begin

# What decides how the reward model is used, not what it is.
USE_OF_REWARD = ("reward.trust", "reward.aggregate", "reward.lcb_coefficient")


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    function: "module:name" of `(config, run) -> summary`, imported only when the stage runs.
    parents: the finished stages it reads.
    files: the config keys of `data` whose files it reads.
    many: whether `align run --accelerate` starts it on many processes.
    """

    function: str
    parents: Callable[[Config], list[str]]
    files: Sequence[str] = ()
    many: bool = False


def _on_sft(*others: str) -> Callable[[Config], list[str]]:
    return lambda config: [*(["sft"] if "sft" in config.stages else []), *others]


def _sampled(config: Config) -> list[str]:
    sft = ["sft"] if "sft" in config.stages else []
    return [*sft, *(policy for policy in config.sample.policies if policy not in ("base", "sft"))]


def _labelled(config: Config) -> list[str]:
    """People may judge what `sample` made here, or what was imported into their database."""
    asked = config.label.source == "simulated" or (config.label.source == "people" and "sample" in config.stages)
    return ["sample"] if asked else []


def _trained_on(config: Config) -> list[str]:
    return ["label"] if config.reward.base else _on_sft("label")(config)


def _rewarded(config: Config) -> list[str]:
    return _on_sft(*(["reward"] if "reward" in config.ppo.rewards else []))(config)


def _compared(config: Config) -> list[str]:
    trained = [name for name in config.compared_models() if name in POLICIES]
    elsewhere = importlib.import_module("align.compare.places").run_folders(config)
    return [*trained, *(["reward"] if "reward" in config.stages else []), *elsewhere]


STAGES = {
    "prepare": Stage(
        "align.data.prepare.stage:run_prepare", lambda c: [], ["demonstrations", "prompts", "preferences"]
    ),
    "sft": Stage("align.sft:run_sft", lambda c: [], ["demonstrations"], many=True),
    "sample": Stage("align.sample:run_sample", _sampled, ["demonstrations", "prompts"], many=True),
    "label": Stage("align.label:run_label", _labelled, ["preferences"]),
    "reward": Stage("align.reward_model:run_reward", _trained_on, many=True),
    "dpo": Stage("align.dpo:run_dpo", _on_sft("label"), many=True),
    "ppo": Stage("align.ppo.stage:run_ppo", _rewarded, ["demonstrations", "prompts", "preferences"], many=True),
    "compare": Stage(
        "align.compare.stage:run_compare", _compared, ["demonstrations", "prompts", "preferences"], many=True
    ),
}


def run_stage(config: Config, name: str, *, force: bool = False) -> Run:
    """Run one stage, or resume it, or find it done.

    Raises:
        InputError: the config, the data, a parent or the run folder is not fit for it.
    """
    stage = STAGES[name]
    before = [PREPARE] if config.prepare and name != PREPARE and stage.files else []
    if name != PREPARE:
        config = after_prepare(config) if before else config.prepared()
    # A parent is a stage of this pipeline or, among the policies to sample from, the folder of any finished run.
    parents = {p: config.folder(p) if p in STAGES else Path(p) for p in [*before, *stage.parents(config)]}

    def prepared() -> dict[str, Any]:
        if name == "label" and config.label.source == "people" and ranks.is_first():
            importlib.import_module("align.label").collect(config)
        inputs = stage_inputs(config, name)
        # Before the folder is opened: --force would remove a finished policy for a run that is then refused.
        if (force or not is_done(config.folder(name))) and all(map(is_done, parents.values())):
            if name == "ppo":
                importlib.import_module("align.trust").pass_gate(config, config.ppo.rewards)
            if name in TRAINED and ranks.is_first():
                importlib.import_module("align.check.command").before_stage(config, name)
        return inputs

    ranks.start(patience(config, name))
    inputs = ranks.together(prepared)
    ranks.check_same("configs", dict(_flat(config.model_dump(mode="json"))))
    ranks.check_same("data", inputs)
    with open_run(
        name,
        config.folder(name),
        inputs,
        config_yaml=config_yaml(config),
        parents=parents,
        # An unfinished prepare holds nothing to go on from: data that was refused and mended is simply read again.
        force=force or (name == PREPARE and not is_done(config.folder(name))),
        writer=ranks.is_first(),
        labels_simulated=config.label.source == "simulated" and name not in (PREPARE, "sft", "sample"),
    ) as run:
        ranks.wait()
        if ranks.share(run.finished):
            progress.say(f"{name}: already done, {run.folder}")
            return run
        progress.say(f"{name}: {'resuming in' if run.resuming else 'writing to'} {run.folder}")
        started = time.monotonic()
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars; read when tqdm is imported
        # Imported late: torch and the trainers cost seconds that a finished or a refused stage should not pay.
        training = importlib.import_module("align.training")
        module, _, function = stage.function.partition(":")
        with training.calm_libraries():
            summary = getattr(importlib.import_module(module), function)(config, run)
        ranks.wait()
        run.finish(summary)
        ranks.wait()
    progress.say(f"{name}: done in {progress.duration(time.monotonic() - started)}. {headline(summary)}")
    return run


def run_pipeline(config: Config, *, force: bool = False, accelerate: Path | None = None) -> None:
    """All stages in order, skipping what is done; `accelerate` starts all but label under a launcher."""
    for name in config.stages:
        if config.prepare is None or name == PREPARE:
            stage_inputs(config, name)  # a missing file of the last stage is said before the first one starts
    if accelerate and not accelerate.is_file():
        raise InputError(
            f"--accelerate {accelerate} does not exist: give a file such as configs/accelerate/zero2.yaml."
        )
    for name in config.stages:
        if accelerate and STAGES[name].many:
            _launch(config, name, force, accelerate)
        else:
            run_stage(config, name, force=force)


def after_prepare(config: Config) -> Config:
    """The config as the stages after prepare have it: their data is what prepare wrote.

    Raises:
        InputError: prepare has not run.
    """
    if config.prepare:
        done_digest(config.folder(PREPARE))
    return config.prepared()


def patience(config: Config, name: str) -> int:
    """Seconds after which a stage's processes give up on one that does not come to a collective."""
    section = config.section(name)
    return int((section.model_extra or {}).get("ddp_timeout", ranks.PATIENCE))


def stage_inputs(config: Config, name: str) -> dict[str, Any]:
    """Everything that decides a stage's result, flat: config keys and the digests of the files it reads.

    Raises:
        InputError: a file is missing.
    """
    stage = STAGES[name]
    inputs: dict[str, Any] = {"seed": config.seed}
    sections = [name, *(["data"] if stage.files else []), *(["label"] if name == "compare" else [])]
    if name != PREPARE:
        sections.append("model")
    for section in sections:
        for key, value in _flat(config.section(section).model_dump(mode="json"), section):
            neutral = key.rpartition(".")[2] in NEUTRAL_KEYS or key.startswith(("data.", "label.app.", "reward.gate."))
            if not neutral and key not in USE_OF_REWARD:
                inputs[key] = value
    if name == "ppo" and "reward" in config.ppo.rewards:
        inputs |= {key: getattr(config.reward, key.partition(".")[2]) for key in USE_OF_REWARD}
    if stage.files:
        inputs |= {"data.test_share": config.data.test_share, "data.max_rows": config.data.max_rows}
    for key in stage.files if name != PREPARE else ():
        path = getattr(config.data, key)
        if path is None or (key == "preferences" and config.label.source != "dataset"):
            continue
        if not Path(path).is_file():
            raise InputError(f"data.{key}: {path} does not exist: give the path of a JSONL file.")
        inputs[f"file {path}"] = file_digest(path)
    if name == PREPARE:
        inputs |= _sources(config)
    if name == "label" and config.label.source == "people":
        inputs |= importlib.import_module("align.label").labels_digest(config)
    if name == "compare":
        inputs |= importlib.import_module("align.compare.places").weights_and_files(config)
    if "sft" not in stage.parents(config) and name not in (PREPARE, "label"):
        for weights in sorted(Path(config.model.base).glob("*.safetensors")):
            inputs[f"file {weights}"] = file_digest(weights)
    return inputs


def _sources(config: Config) -> dict[str, Any]:
    """The digests of all files that are prepared, and of the test sets; of a hub dataset, its name."""
    open_source = importlib.import_module("align.data.files").open_source
    places = [source.path for key in DATA_KEYS for source in config.sources(key)]
    inputs: dict[str, Any] = {}
    for place in [*places, *(config.prepare.decontaminate if config.prepare else [])]:
        found = open_source(place)
        inputs |= {f"file {part}": file_digest(part) for part in found.parts}
        if not found.parts:
            inputs[f"hub {place}"] = place
    return inputs


def config_yaml(config: Config) -> str:
    """The fully resolved config, as it can be loaded again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def headline(summary: dict[str, Any]) -> str:
    """The figures of a summary that fit on one line."""
    parts = []
    for key, value in summary.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{k} {_number(v)}" for k, v in value.items() if isinstance(v, int | float))
            if inner:
                parts.append(f"{key} ({inner})")
        elif isinstance(value, int | float | str) and "digest" not in key:
            parts.append(f"{key} {_number(value)}")
    return "; ".join(parts).replace("_", " ")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}".lstrip("."))]
    return [(prefix, value)]


def _launch(config: Config, name: str, force: bool, accelerate: Path) -> None:
    """Run one stage under `accelerate launch`, with exactly this config."""
    _check_port(accelerate)
    with tempfile.TemporaryDirectory(prefix=f"{config.name}-") as folder:
        file, ended = Path(folder) / "config.yaml", Path(folder) / "exit-code"
        file.write_text(config_yaml(config), "utf-8")
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate)]
        command = [*launcher, "-m", "align", name, str(file), *(["--force"] if force else [])]
        process = subprocess.Popen(command, env={**os.environ, "ALIGN_EXIT_CODE": str(ended)})
        try:
            code = process.wait()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):  # a terminal's Ctrl-C has reached the launcher too
                process.terminate()
            process.wait()
            raise
        if code:
            code = int(ended.read_text()) if ended.exists() else 1  # the launcher's own says nothing
            progress.say(f"{name} ended with exit code {code} under accelerate launch; what went wrong is said above.")
            sys.exit(code)


def _check_port(accelerate: Path) -> None:
    """
    Raises:
        InputError: the port at which the launcher's processes are to meet is taken.
    """
    settings = yaml.safe_load(accelerate.read_text("utf-8")) or {}
    port = int(settings.get("main_process_port") or 29500)
    if int(settings.get("num_processes") or 1) < 2 or int(settings.get("machine_rank") or 0) > 0 or port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"port {port}, at which the processes of {accelerate} are to meet, cannot be had "
                f"({error.strerror}; another launch on this machine?): set main_process_port there to a free one."
            ) from None
