"""Policies from anywhere: the folder of a finished stage, a model's or an adapter's folder, or a hub id.

What is found is only named, with what it stands on and its tokenizer's place; loading is the caller's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from align import models
from align.config import POLICIES, ModelSection
from align.runs import done_digest, read_info
from reward.records import InputError

ADAPTER = "adapter_config.json"
TEST_SHARE = 0.2  # the default of data.test_share


@dataclass(frozen=True)
class Place:
    """A policy to be loaded.

    name: on the page and in the votes. folder: a model's, an adapter's, or a hub id. run: its run folder, None for
    models from elsewhere; then pipeline is "". test_share: of its pipeline's config.
    """

    name: str
    folder: str
    section: ModelSection
    run: Path | None = None
    pipeline: str = ""
    test_share: float = TEST_SHARE
    store: str | None = None

    @property
    def base(self) -> str | None:
        """What an adapter stands on; None for a whole model."""
        path = Path(self.folder) / ADAPTER
        if not path.is_file():
            return None
        try:
            return str(json.loads(path.read_text("utf-8"))["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is damaged: it names no base_model_name_or_path.") from None

    @property
    def tokenizer(self) -> str:
        """Where its tokenizer lies: beside it, or, where an adapter came without, beside its base."""
        beside = not self.base or any(
            (Path(self.folder) / f"tokenizer{end}").is_file() for end in (".json", "_config.json")
        )
        return self.folder if beside else str(self.base)


def run_folder(place: str) -> Path | None:
    """The stage's folder that a place names, itself or by its `model`; None where it names something else."""
    path = Path(place).expanduser()
    folder = path.parent if path.name == "model" else path
    return folder if folder.is_dir() and (folder / "run.json").is_file() and read_info(folder) else None


def find_policy(run: str, section: ModelSection | None = None) -> Place:
    """The policy that a run folder, a model's or adapter's folder, or a hub id names.

    Args:
        section: how models that are no run's own are loaded.

    Raises:
        InputError: there is no such folder, the run is not finished or holds no policy, or it is a reward model.
    """
    folder = Path(run).expanduser()
    info = read_info(folder)
    if info is not None:
        if info["stage"] not in POLICIES:
            raise InputError(
                f"{run} is the folder of the stage {info['stage']}, which holds no policy: give that of a finished "
                "sft, dpo or ppo stage, or a model's."
            )
        done_digest(folder)
        return _of_run(folder, info["stage"])
    own = (section or ModelSection()).model_copy(update={"base": run, "chat_template": None})
    path = models.base_path(own) if not (folder / ADAPTER).is_file() else str(folder)
    if not folder.exists() and run.count("/") > 1:
        raise InputError(f"{run} does not exist: give the folder of a finished stage, a model's folder, or a hub id.")
    place = Place(Path(run).name if folder.exists() else run, path, own)
    _refuse_reward_model(place)
    return place


def _of_run(folder: Path, stage: str) -> Place:
    import yaml

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        # The chat template was saved beside the model.
        section = ModelSection(**{**config["model"], "chat_template": None})
        label = config.get("label") or {}
        return Place(
            stage,
            str((folder / "model").resolve()),
            section,
            folder,
            str(config["name"]),
            float(config["data"]["test_share"]),
            label.get("store"),
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            f"{folder / 'config.yaml'} cannot be read ({type(error).__name__}: {error}): give {folder / 'model'}."
        ) from None


def _refuse_reward_model(place: Place) -> None:
    from transformers import AutoConfig

    advice = "is a reward model, which gives figures and no answers: give a policy (`align score` takes it)"
    if place.base is not None:
        if json.loads((Path(place.folder) / ADAPTER).read_text("utf-8")).get("task_type") == "SEQ_CLS":
            raise InputError(f"{place.folder} {advice}.")
        return
    try:
        config = AutoConfig.from_pretrained(place.folder, trust_remote_code=place.section.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{place.folder} is neither a folder with a model nor a model that can be had from the hub "
            f"({(str(error).strip() or type(error).__name__).splitlines()[0][:200]})."
        ) from error
    if any("SequenceClassification" in name for name in config.architectures or []):
        raise InputError(f"{place.folder} {advice}.")


def resolved(folder: str) -> str:
    """One spelling of a folder; a hub id as it is."""
    return str(Path(folder).resolve()) if Path(folder).is_dir() else folder
