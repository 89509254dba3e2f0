"""Bases that bitsandbytes holds in 4 or 8 bits, and the SFT adapter that stays below what is trained on them.

Merged into quantised weights, an adapter would mostly be lost in rounding. The sft stage therefore leaves its adapter
beside the base, and every later stage loads the two as one frozen model: `lay_below` makes the adapter part of the
linear layers themselves. To PEFT and TRL that model is a base like any other. "Adapter off" is then the SFT model, what
is trained is one adapter alone, and so is what is saved.

Shapes: I and O a layer's input and output size, R the adapter's rank.
"""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import linear

from align.config import ModelSection, QuantizationSection
from align.logprobs import base_model
from align.runs import read_info
from reward.records import InputError


def settings(section: QuantizationSection, dtype: torch.dtype) -> Any:
    """transformers' BitsAndBytesConfig; `dtype` is what `bnb_4bit_compute_dtype: auto` means.

    Raises:
        InputError: bitsandbytes is not installed, or ZeRO-3 would split the base.
    """
    from transformers import BitsAndBytesConfig
    from transformers.integrations import is_deepspeed_zero3_enabled

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "model.quantization needs bitsandbytes, which is not installed: run `pip install 'align-rlhf[quantised]'`."
        )
    if is_deepspeed_zero3_enabled():
        raise InputError(
            "ZeRO-3 splits the base's weights, which model.quantization packs into blocks of its own: launch with "
            "ZeRO-1 or ZeRO-2, or leave model.quantization out."
        )
    keys = section.model_dump()
    if keys["bnb_4bit_compute_dtype"] == "auto":
        keys["bnb_4bit_compute_dtype"] = dtype
    return BitsAndBytesConfig(**keys)


def is_quantised(model: Any) -> bool:
    """Whether bitsandbytes holds the weights under `model`, adapted or not."""
    base = base_model(model)
    return bool(getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False))


def as_held(place: str, section: ModelSection) -> ModelSection:
    """`section`, but quantised as the base was in the run that wrote `place`. The section's own base, and what no run
    wrote, are held as `section` says.

    Adapters learn around the rounding of their own base, so on another they are not the policy that was trained.
    """
    found = None if place == section.base else _of_run(place)
    return section if found is None else section.model_copy(update={"quantization": found[0]})


def same_base(place: str, model: Any) -> bool:
    """Whether the run that wrote `place` held its base as `model` is held; True where no run wrote it."""
    found = _of_run(place)
    if found is None:
        return True
    ours = getattr(base_model(model).config, "quantization_config", None) if is_quantised(model) else None
    if found[0] is None or ours is None:
        return found[0] is None and ours is None
    theirs = settings(found[0], getattr(ours, "bnb_4bit_compute_dtype", torch.float32))
    return bool(theirs.to_dict() == ours.to_dict())


def _of_run(place: str) -> tuple[QuantizationSection | None] | None:
    """How the run that wrote a model's folder held the base under it; None where no run wrote the folder.

    Raises:
        InputError: what the run wrote of itself cannot be read.
    """
    if not Path(place).is_dir():
        return None
    for run in Path(place).resolve().parents[:2]:  # <run>/model, and <run>/policies/update-00012
        info, file = read_info(run), run / "config.yaml"
        if info is None or not file.is_file():
            continue
        try:
            config = yaml.safe_load(file.read_text("utf-8"))
            keys = config["model"].get("quantization")
            own_base = info["stage"] == "reward" and config["reward"].get("base")  # never quantised
            return (None if keys is None or own_base else QuantizationSection(**keys),)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise InputError(f"{file} cannot be read ({type(error).__name__}: {error}).") from None
    return None


# -- layers -----------------------------------------------------------------------------------------------------------


def compute_alike(model: Any) -> None:
    """On a CPU, let the quantised layers of `model` compute in evaluation what they compute in training.

    Where bitsandbytes is left to itself there, it multiplies 8-bit inputs by 8-bit weights in evaluation only, with
    results that depend on the batch, and on processors with AVX512-BF16 it repacks 4-bit weights for good at the first
    evaluation, into a format without gradient. A policy would then differ from itself as its reference by hundredths.
    """
    import bitsandbytes

    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt) and layer.weight.device.type == "cpu":
            layer.forward = types.MethodType(_as_in_training, layer)


def _as_in_training(self: Any, x: Tensor) -> Tensor:
    training, self.training = self.training, True
    try:
        result: Tensor = type(self).forward(self, x)
        return result
    finally:
        self.training = training


def lay_below(model: Any, folder: str) -> Any:
    """The model whose linear layers compute `W x + s B A x`, with A, B and s of the LoRA adapter in `folder`, frozen.

    Args:
        model: a `PreTrainedModel` without adapters, of any head: the adapter's weights for a head it lacks are left.

    Raises:
        InputError: the adapter is not plain LoRA, or its weights do not fit the model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import load_peft_weights

    config = PeftConfig.from_pretrained(folder)
    config.task_type = None  # it was trained under a language model's head, and goes below any
    adapted = PeftModel.from_pretrained(model, folder, config=config)
    wanted, there = set(get_peft_model_state_dict(adapted)), set(load_peft_weights(folder, device="cpu"))
    left = [name for name in there - wanted if name.startswith(f"base_model.model.{model.base_model_prefix}.")]
    if wanted - there or left:
        raise InputError(
            f"{folder} does not fit its base {model.name_or_path}: {len(wanted - there)} of its weights are missing, "
            f"{len(left)} left over."
        )
    if reason := no_plain_lora(adapted):
        raise InputError(f"{folder} cannot stay below other adapters on a quantised base: {reason}.")
    below = [layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
    parts = [(m.get_base_layer(), m.lora_A["default"], m.lora_B["default"], m.scaling["default"]) for m in below]
    model = adapted.unload()
    for layer, a, b, scaling in parts:
        # Not called lora: PEFT and the digest of a reference take what is called so for an adapter that may be off.
        layer.below_RI = nn.Parameter(a.weight.detach(), requires_grad=False)
        layer.below_OR = nn.Parameter(scaling * b.weight.detach(), requires_grad=False)
        layer.register_forward_hook(_add_below)
    model.name_or_path = model.config._name_or_path = folder  # what adapters trained on it name as their base
    return model


def _add_below(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    low = linear(inputs[0].to(layer.below_RI.dtype), layer.below_RI)
    return output + linear(low, layer.below_OR).to(output.dtype)


def no_plain_lora(model: Any) -> str | None:
    """Why what is trained in a `PeftModel` is more than `s B A x` on linear layers, as a clause; None where it is not.

    DoRA, biases, trained tokens and modules kept whole have no place below another adapter.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return f"{name} is trained beside the adapter (modules_to_save, trainable_token_indices)"
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module.get_base_layer(), nn.Linear):
            return f"{name} is a {type(module.get_base_layer()).__name__}, no linear layer"
        if module.lora_variant or any(module.lora_bias.values()):
            return f"{name} is not plain LoRA (use_dora, lora_bias and other variants)"
    return None


def keep_precision(model: Any) -> None:
    """Give what is trained on a quantised base the number format that it has on any other: adapters float32, modules
    that are kept whole the base's.

    TRL makes all of it bfloat16, in which AdamW's small steps are lost on weights that have grown.
    """
    if not is_quantised(model):
        return
    whole = base_model(model).get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if ".lora_" in name else whole)
