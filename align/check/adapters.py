"""Whether an adapter's `target_modules` name what the model has: PEFT passes over what it does not find."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from align import models
from align.check.findings import Finding, refused
from align.check.templates import model_of
from align.config import Config, TrainerSection

ALL = "all-linear"


def adapter_fits(config: Config, stage: str) -> list[Finding]:
    """Refuse names of modules and numbers of layers that the stage's model does not have.

    The model is built without weights. One that cannot be built so (remote code, another library's) is not looked at.
    """
    section = config.section(stage)
    adapter = section.adapter if isinstance(section, TrainerSection) else None
    layers = (adapter.model_extra or {}).get("layers_to_transform") if adapter else None
    if adapter is None or (adapter.target_modules == ALL and layers is None):
        return []
    names, depth = _modules(config, stage)
    if not names:
        return []
    key = f"{stage}.adapter.target_modules"
    wanted = adapter.target_modules
    found: list[Finding] = []
    if isinstance(wanted, str) and wanted != ALL:
        if not any(_matches(wanted, name) for name in names):
            whole = {name.rpartition(".")[2] for name in names}
            advice = f"write [{wanted}]" if wanted in whole else "write a list of names, or all-linear"
            found.append(
                refused(
                    stage,
                    f"{key} is the text {wanted!r}, which PEFT reads as a regular expression for whole paths such as "
                    f"{names[-1]}, and none of the model's {len(names)} modules matches it: {advice}.",
                )
            )
    elif not isinstance(wanted, str):
        ends = sorted({name.rpartition(".")[2] for name in names})
        for item in wanted:
            if not any(name == item or name.endswith(f".{item}") for name in names):
                near = difflib.get_close_matches(item, ends, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(ends)}."
                found.append(
                    refused(
                        stage,
                        f"{key} names {item}, which no module of the model is called, and PEFT says nothing: {hint}",
                    )
                )
    if layers is not None and depth:
        asked = [layers] if isinstance(layers, int) else list(layers)
        if beyond := [layer for layer in asked if layer >= depth or layer < 0]:
            found.append(
                refused(
                    stage,
                    f"{stage}.adapter.layers_to_transform names layer {beyond[0]}, but the model has {depth}, numbered "
                    f"from 0 to {depth - 1}: {len(beyond)} of {len(asked)} would be passed over.",
                )
            )
    return found


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _modules(config: Config, stage: str) -> tuple[list[str], int]:
    """(paths of the modules that are matrices, number of layers); ([], 0) where the model cannot be built."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    try:
        told = AutoConfig.from_pretrained(_whole(config, stage))
        with torch.device("meta"):
            model = kind.from_config(told)
    except (OSError, ValueError, ImportError, AttributeError, KeyError, RuntimeError, NotImplementedError):
        return [], 0
    matrices = (name for name, weight in model.named_parameters() if name.endswith(".weight") and weight.ndim > 1)
    names = sorted({name.rpartition(".")[0] for name in matrices})
    return names, int(getattr(told.get_text_config(), "num_hidden_layers", 0) or 0)


def _whole(config: Config, stage: str) -> str:
    """A folder with the whole model's config: that of the base where the SFT model is an adapter."""
    folder = model_of(config, stage)
    return models.base_path(config.model) if (Path(folder) / "adapter_config.json").is_file() else folder
