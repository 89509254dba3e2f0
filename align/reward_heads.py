"""Several score heads on one reward model: made for training, split when saved, put back when loaded.

A head is linear, so the mean of M heads is one head. What is saved is therefore a plain sequence classifier whose
head is that mean, which any library loads, and beside it `heads.safetensors` with all M for their spread:

    weight  (M, H)    bias  (M,), where the classifier's head has one
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward.records import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

HEADS = "heads.safetensors"
# Where sequence classifiers have the layer that makes the score: decoders, BERT, RoBERTa.
_PLACES = ("score", "classifier", "classifier.out_proj")


def head_place(model: Any) -> str:
    """Name of the linear layer that makes the score, inside an unadapted sequence classifier.

    Raises:
        InputError: there is none under any of the usual names.
    """
    from torch import nn

    modules = dict(model.named_modules())
    for place in _PLACES:
        if isinstance(modules.get(place), nn.Linear):
            return place
    raise InputError(f"a {type(model).__name__} has no linear score head ({', '.join(_PLACES)}): give another base.")


def widen(model: Any, heads: int) -> None:
    """Give an unadapted sequence classifier `heads` freshly drawn heads in place of its one."""
    import torch

    layer = model.get_submodule(head_place(model))
    deviation = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    weight_MH = torch.empty(heads, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    _replace(layer, weight_MH.normal_(0.0, deviation), None)


def split(folder: Path) -> None:
    """In a saved reward model, keep the mean of its heads as the head, and put all of them into `heads.safetensors`."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for file in sorted([*folder.glob("adapter_model*.safetensors"), *folder.glob("model*.safetensors")]):
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata()
        weights = load_file(file)
        found = {name: kind for name in weights if (kind := _kind(name)) and weights[name].shape[0] > 1}
        if not found:
            continue
        save_file({kind: weights[name].contiguous() for name, kind in found.items()}, folder / HEADS)
        for name in found:
            weights[name] = weights[name].float().mean(0, keepdim=True).to(weights[name].dtype)
        save_file(weights, file, metadata=metadata)
        return
    raise InputError(f"{folder} has no score head with several outputs: train `reward` again.")


def restore(model: Any, folder: Path) -> int:
    """Put the heads saved beside a loaded reward model into it; returns how many it then has.

    Args:
        model: a sequence classifier with its one head, adapted or not.

    Raises:
        InputError: they do not fit the model.
    """
    saved = load(folder)
    if saved is None:
        return 1
    weight_MH, bias_M = saved
    layers = _layers(model)
    if not layers or layers[0].in_features != weight_MH.shape[1]:
        raise InputError(f"{folder / HEADS} does not fit its model: train `reward` again.")
    for layer in layers:
        _replace(layer, weight_MH.to(layer.weight), None if bias_M is None else bias_M.to(layer.weight))
    return int(weight_MH.shape[0])


def load(folder: Path) -> tuple[Tensor, Tensor | None] | None:
    """(weight MH, bias M or None) as saved in a reward model's folder; None where it has one head."""
    from safetensors.torch import load_file

    if not (folder / HEADS).is_file():
        return None
    saved = load_file(folder / HEADS)
    return saved["weight"], saved.get("bias")


def _layers(model: Any) -> list[nn.Linear]:
    """The layers that make the score: one, or under PEFT the base's and the adapter's own."""
    from torch import nn

    return [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and _kind(f"{name}.weight")]


def _kind(name: str) -> str | None:
    """ "weight" or "bias" for a parameter of a score head, by its name in a model or in a file of PEFT's."""
    import re

    places = "|".join(re.escape(place) for place in _PLACES)
    found = re.search(rf"(?:^|\.)(?:{places})(?:\.original_module|\.modules_to_save\.\w+)?\.(weight|bias)$", name)
    return found.group(1) if found else None


def _replace(layer: nn.Linear, weight_MH: Tensor, bias_M: Tensor | None) -> None:
    import torch

    trained = layer.weight.requires_grad
    layer.weight = torch.nn.Parameter(weight_MH, requires_grad=trained)
    layer.out_features = weight_MH.shape[0]
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(weight_MH.new_zeros(len(weight_MH)) if bias_M is None else bias_M, trained)
