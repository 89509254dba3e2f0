"""What the tests of quantised bases share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from align.config import ModelSection, QuantizationSection
from align.quantised import compute_alike

FOUR, EIGHT = QuantizationSection(load_in_4bit=True), QuantizationSection(load_in_8bit=True)
IDS = torch.tensor([[5, 9, 40, 77, 12, 3, 101, 50], [7, 7, 30, 200, 150, 90, 60, 2]])


def plain_settings() -> Any:
    """What a user of transformers writes for `quantization: {load_in_4bit: true}` in float32."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def section(quantization: QuantizationSection | None = FOUR, **keys: Any) -> ModelSection:
    return ModelSection(dtype="float32", quantization=quantization, **keys)


def logits(model: Any) -> Tensor:
    """As bitsandbytes computes in training: in evaluation it rounds otherwise on some processors, and on those with
    AVX512-BF16 refuses layers as narrow as the tests'."""
    compute_alike(model)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def below_of(model: Any) -> dict[str, Tensor]:
    return {n.replace(".base_layer", ""): p.detach().clone() for n, p in model.named_parameters() if ".below_" in n}
