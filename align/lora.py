"""LoRA layers at the cost of their base layers.

A LoRA layer's own products are no wider than its rank, a few per cent of the work. What makes it slow is what surrounds
them: PEFT scales, adds and keeps whole outputs in steps of their own, and while decoding each step is a call. `folded`
adds the adapter to the weights for as long as nothing is trained; `lean_lora` trains with the same numbers in fewer
passes over memory.

Shapes: N rows, I and O the layer's input and output size, R the rank.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lean_lora(model: Any) -> None:
    """From now on the plain LoRA layers of `model` compute `x W^T + s (x A^T) B^T` as one function.

    It adds to the output in place, forwards and backwards, where PEFT makes four tensors of its size. Layers of other
    kinds are left alone, and so is every call that is not plain: several adapters or none, dropout, mixed precision,
    weights that ZeRO-3 has split, a base that is trained.
    """
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if type(layer) is Linear and type(layer.get_base_layer()) is torch.nn.Linear and "forward" not in vars(layer):
            layer.forward = types.MethodType(_lean_forward, layer)


def _lean_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter = None if args or kwargs else _lean_adapter(self, x)
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)
    base = self.get_base_layer()
    return _Adapted.apply(
        x, base.weight, base.bias, self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter]
    )


def _lean_adapter(layer: Any, x: Tensor) -> str | None:
    """The one adapter in force, where the layer and this call are plain."""
    if layer.disable_adapters or layer.merged or torch.is_autocast_enabled(x.device.type):
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias[active[0]]:
        return None
    base, dropout = layer.get_base_layer(), layer.lora_dropout[active[0]]
    if base._forward_hooks:  # an adapter below this one
        return None
    if layer.training and getattr(dropout, "p", 0) > 0:
        return None
    weights = base.weight, layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
    if weights[0].requires_grad or any(w.dtype != x.dtype or hasattr(w, "ds_id") for w in weights):
        return None
    return active[0]


class _Adapted(torch.autograd.Function):
    """`x W^T + b + s (x A^T) B^T` with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        low_NR = x_NI @ a_RI.T
        y_NO = torch.nn.functional.linear(x_NI, weight_OI, bias_O).addmm_(low_NR, b_OR.T, alpha=scaling)
        ctx.save_for_backward(x_NI, low_NR, weight_OI, a_RI, b_OR)
        ctx.scaling = scaling
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, low_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        low_grad_NR = (grad_NO @ b_OR).mul_(ctx.scaling)
        x_grad = a_grad_RI = b_grad_OR = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad_NO @ weight_OI).addmm_(low_grad_NR, a_RI).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            a_grad_RI = low_grad_NR.T @ x_NI
        if ctx.needs_input_grad[4]:
            b_grad_OR = (grad_NO.T @ low_NR).mul_(ctx.scaling)
        return x_grad, None, None, a_grad_RI, b_grad_OR, None


# Below so many rows a matrix product on a CPU is bound by reading the weights.
FEW_ROWS = 192


@contextlib.contextmanager
def for_few_rows(model: Any) -> Iterator[None]:
    """Inside, linear layers on a CPU compute `(W x^T)^T` for inputs of a few rows.

    A product with few rows on the left spends more time on rearranging the weights for the kernel than on the
    arithmetic; with the weights on the left nothing is rearranged. Measured: half the time with 2 rows, two
    thirds with 16, four fifths with 64.
    """
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear and "forward" not in vars(m)]
    layers = [m for m in layers if m.weight.device.type == "cpu" and not hasattr(m.weight, "ds_id")]
    for layer in layers:
        layer.forward = types.MethodType(_few_rows_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _few_rows_forward(self: Any, x: Tensor) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if not 1 < rows <= FEW_ROWS or x.dtype != self.weight.dtype or torch.is_autocast_enabled("cpu"):
        return type(self).forward(self, x)
    y_NO = (self.weight @ x.reshape(rows, -1).T).T.contiguous()
    if self.bias is not None:
        y_NO += self.bias
    return y_NO.view(*x.shape[:-1], -1)


@contextlib.contextmanager
def folded(model: Any) -> Iterator[bool]:
    """Inside, the active LoRA adapter is folded into the base weights; afterwards they are restored bit for bit.

    An adapter left beside its weights costs more than half of decoding time again, for a product no wider than its
    rank. Unfolding by subtraction would leave rounding in the base after every update, so the originals are set aside:
    for the time of sampling, when no activations are held, the adapted weights exist twice.

    Yields whether anything was folded: quantised or shared weights and layers PEFT cannot fold are left alone.
    """
    layers = _foldable(model)
    if not layers:
        yield False
        return
    weights = [layer.get_base_layer().weight for layer in layers]
    originals = [weight.detach().clone() for weight in weights]
    try:
        for layer in layers:
            layer.merge()
        yield True
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()
        with torch.no_grad():
            for weight in reversed(weights):
                weight.copy_(originals.pop())


def _foldable(model: Any) -> list[Any]:
    """The LoRA layers with an active adapter, if every one of them can be folded; else none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.merged and not m.disable_adapters]
    layers = [layer for layer in layers if set(layer.active_adapters) & set(getattr(layer, "lora_A", {}))]
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return layers if all(_is_plain(m) and owners[id(m.get_base_layer().weight)] == 1 for m in layers) else []


def _is_plain(layer: Any) -> bool:
    """Whether it is LoRA or DoRA on a linear layer that does nothing else with its weight, held in floating point.

    A subclass may quantise its weight on the fly; of the other variants of LoRA some cannot be folded, some are random.
    """
    from peft.tuners.lora import Linear
    from peft.tuners.lora.variants import DoraLinearVariant
    from transformers.pytorch_utils import Conv1D

    if type(layer) is not Linear or type(layer.get_base_layer()) not in (torch.nn.Linear, Conv1D):
        return False
    if any(layer.lora_bias.values()) or any(type(v) is not DoraLinearVariant for v in layer.lora_variant.values()):
        return False
    dtype = layer.get_base_layer().weight.dtype
    return dtype.is_floating_point and dtype.itemsize > 1
