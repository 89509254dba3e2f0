"""What a model and its adapters are made of, counted on torch's meta device: exact, and no weight is loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align import models
from align.config import AdapterSection, ModelSection
from reward.records import InputError

# The parts of a decoder layer, by what their linear layers are called. Those of one part read the same input.
PARTS = {
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "query", "key", "value", "q", "k", "v"),
    "output": ("o_proj", "out_proj", "wo", "o"),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "wi", "w1", "w3"),
    "down": ("down_proj", "fc2", "dense_4h_to_h", "w2"),
}
PART_OF = {name: part for part, names in PARTS.items() for name in names}


@dataclass(frozen=True)
class Shape:
    """A decoder-only language model.

    width: of the MLP, all experts a token passes through together.
    head_width: of queries, over all heads; key_width: of keys, over all key heads.
    parameters: all weights, a tied vocabulary matrix once.
    embedding: weights of the input embeddings; head: of an output matrix of its own, 0 where it is tied.
    linear: weights of the linear layers without the output matrix: what is multiplied, quantised and folded.
    largest: weights of the largest decoder layer.
    files: bytes of the weight files, where the model is a folder that holds them; else 0.
    """

    name: str
    layers: int
    hidden: int
    width: int
    heads: int
    head_width: int
    key_width: int
    vocabulary: int
    gated: bool
    context: int
    parameters: int
    embedding: int
    head: int
    linear: int
    largest: int
    files: int = 0


@dataclass(frozen=True)
class Adapter:
    """LoRA on a model.

    parameters: trained weights, a score head and whatever else is trained whole included.
    first: the lowest layer with an adapter; below it nothing is kept for the backward pass.
    copies: how many adapted linear layers there are of each part of `PARTS`, in a layer; `low`: their ranks' sum.
    adapted: weights of the linear layers below the adapters, which sampling sets aside.
    """

    parameters: int
    first: int
    copies: dict[str, float]
    low: float
    adapted: int


@dataclass(frozen=True)
class Base:
    """A model on the meta device, with its shape."""

    shape: Shape
    model: Any

    def adapter(self, section: AdapterSection, heads: int = 0) -> Adapter:
        """What the adapter of a stage adds; `heads` score heads are trained with it where it is a reward model's.

        Raises:
            InputError: PEFT finds nothing to adapt.
        """
        import torch
        from peft import get_peft_model

        try:
            with torch.device("meta"):
                adapted = get_peft_model(self.model, models.lora_config(section, "CAUSAL_LM"))
        except ValueError as error:
            raise InputError(f"the adapter does not fit {self.shape.name}: {str(error).splitlines()[0]}") from None
        try:
            return _adapter(adapted, self.shape, heads)
        finally:
            adapted.unload()


def read_base(section: ModelSection) -> Base:
    """The base of a pipeline, from its config.json alone; a folder that holds nothing else will do.

    Raises:
        InputError: there is no config.json, here or on the hub, or transformers does not know its architecture.
    """
    from transformers import AutoConfig

    path = models.base_path(section)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        if Path(path).is_dir():
            raise InputError(f"cannot read {path}/config.json: {str(error).strip().splitlines()[0]}") from None
        raise InputError(
            f"cannot read the shape of {section.base}: it is neither a folder nor a model that the hub or its cache "
            "gives here; give a folder with the model's config.json, or a hub id with a network."
        ) from None
    return base_of(config, section.base, models.checkpoint_bytes(path), section.trust_remote_code)


def base_of(config: Any, name: str, files: int = 0, trust_remote_code: bool = False) -> Base:
    """The same from a transformers config.

    Raises:
        InputError: it is not a decoder-only language model's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config.quantization_config = None
    del config.quantization_config  # the weights are counted, however they were stored
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        shape = _shape(model, name, files)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{name} is no language model that can be planned: {str(error).splitlines()[0]}") from None
    return Base(shape, model)


def _shape(model: Any, name: str, files: int) -> Shape:
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layers = _decoder_layers(model)
    return Shape(
        name=name,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        width=_width(config),
        heads=config.num_attention_heads,
        head_width=config.num_attention_heads * head_size,
        key_width=key_heads * head_size,
        vocabulary=embedding.shape[0],
        gated=any(name.endswith(("gate_proj", "gate_up_proj", "w3")) for name, _ in model.named_modules()),
        context=getattr(config, "max_position_embeddings", None) or 0,
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        linear=sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1),
        largest=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        files=files,
    )


def _decoder_layers(model: Any) -> Any:
    """The list of decoder layers: the longest list of modules that is as long as the config says."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not lists:
        raise AttributeError("no list of decoder layers is found in it")
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def _width(config: Any) -> int:
    """Of the MLP, as one token meets it: of a mixture, the experts it is sent to."""
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    if experts := getattr(config, "num_experts_per_tok", None):
        width = experts * (getattr(config, "moe_intermediate_size", None) or width)
    return int(width)


def _adapter(adapted: Any, shape: Shape, heads: int) -> Adapter:
    from peft.tuners.lora import LoraLayer

    counts: Counter[str] = Counter()
    low, weights, layers = 0, 0, set()
    for name, module in adapted.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        parts = name.split(".")
        numbers = [int(part) for part in parts if part.isdigit()]
        layers.add(numbers[0] if numbers else 0)
        counts[PART_OF.get(parts[-1], "mlp")] += 1
        low += module.r["default"]
        weights += module.get_base_layer().weight.numel()
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad) + heads * shape.hidden
    return Adapter(
        parameters=trained,
        first=min(layers),
        copies={part: counts[part] / len(layers) for part in PARTS},
        low=low / len(layers),
        adapted=weights,
    )
