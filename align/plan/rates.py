"""How much arithmetic a stage is, and how fast a machine does it.

A product of P tokens with W weights is 2 P W operations; its gradient for the tokens as many again, and for the weights
as many again where they are trained (arXiv 2001.08361, section 2.1: 6 a weight in all; 4 under LoRA). Attention adds
4 x keys x head width for every query and layer. Decoding is bound by reading the weights and the cache, not by this.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from align.plan.memory import GiB, Layout
from align.plan.shapes import Adapter, Shape

# Dense bf16 peak in TFLOP/s, memory in GiB and its bandwidth in TB/s, from the vendors' data sheets.
GPUS: dict[str, tuple[float, int, float]] = {
    "t4": (65.0, 16, 0.32),
    "v100": (125.0, 32, 0.9),
    "a10": (125.0, 24, 0.6),
    "l4": (121.0, 24, 0.3),
    "rtx3090": (71.0, 24, 0.94),
    "rtx4090": (165.0, 24, 1.01),
    "l40s": (362.0, 48, 0.86),
    "a100-40gb": (312.0, 40, 1.56),
    "a100": (312.0, 80, 2.0),
    "h100": (989.0, 80, 3.35),
    "h200": (989.0, 141, 4.8),
    "b200": (2250.0, 180, 8.0),
    "mi300x": (1307.0, 192, 5.3),
}
# Assumed shares of the peak. Training on GPUs is mostly reported between 0.3 and 0.5; small batches stay below.
UTILISATION = 0.35
BANDWIDTH_SHARE = 0.6
# On a CPU a training step reaches this share of a large product's rate; the rest is norms, attention and copies.
CPU_SHARE = 0.6


@dataclass(frozen=True)
class Rate:
    """flops: operations a second that a step reaches on one device; bandwidth: bytes a second while decoding.
    source: how they are known, for people."""

    flops: float
    bandwidth: float
    source: str


def gpu_rate(name: str, tflops: float | None = None) -> Rate:
    """What a step reaches on a GPU of this name; `tflops` is given in its place if the reader knows better."""
    peak, _, bandwidth = GPUS[name]
    reached = tflops * 1e12 if tflops else peak * 1e12 * UTILISATION
    source = f"{tflops:g} TFLOP/s as given" if tflops else f"assumed: {peak:g} TFLOP/s peak x {UTILISATION:g}"
    return Rate(reached, bandwidth * 1e12 * BANDWIDTH_SHARE, f"{source}; {bandwidth:g} TB/s x {BANDWIDTH_SHARE:g}")


def cpu_rate(bf16: bool, tflops: float | None = None) -> Rate:
    """What a step reaches on this machine, from a large product and a large copy that are timed here (under 2 s)."""
    bandwidth = _bandwidth()
    if tflops:
        return Rate(tflops * 1e12, bandwidth, f"{tflops:g} TFLOP/s as given")
    product = _product_rate(bf16)
    source = f"measured: a product at {product / 1e9:.0f} GFLOP/s x {CPU_SHARE:g}; {bandwidth / 1e9:.1f} GB/s"
    return Rate(product * CPU_SHARE, bandwidth, source)


def _product_rate(bf16: bool, seconds: float = 0.6) -> float:
    """Operations a second of a product of 512 rows, the best of those that fit into the time."""
    import torch

    size = 512
    a, b = (torch.randn(size, size, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    return 2 * size**3 / _quickest(lambda: a @ b, seconds)


def _bandwidth(seconds: float = 0.4) -> float:
    """Bytes a second read by a product of a matrix and a vector that no cache holds."""
    import torch

    a, b = torch.randn(4096, 4096), torch.randn(4096)
    return a.numel() * 4 / _quickest(lambda: a @ b, seconds)


def _quickest(function: object, seconds: float) -> float:
    assert callable(function)
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        function()
        now = time.perf_counter()
        best = min(best, now - started)
        if now > end:
            return best


def forward_flops(shape: Shape, places: float, length: float, answers: float, layers: float | None = None) -> float:
    """One pass over `places` tokens of rows of `length`, with logits of `answers` of them."""
    share = 1.0 if layers is None else layers / shape.layers
    active = _active(shape)
    attention = 4.0 * places * length / 2 * shape.head_width * shape.layers
    return share * (2.0 * places * active + attention) + 2.0 * answers * shape.vocabulary * shape.hidden


def training_flops(
    shape: Shape, adapter: Adapter | None, places: float, length: float, answers: float, checkpointing: bool = False
) -> float:
    """Forward and backward over the same. Under LoRA the gradient stops at the lowest adapter, and frozen weights take
    none of their own; checkpointing computes the layers again."""
    forward = forward_flops(shape, places, length, answers)
    if adapter is None:
        return forward * (4 if checkpointing else 3)
    above = forward_flops(shape, places, length, answers, layers=shape.layers - adapter.first)
    return forward + above * (2 if checkpointing else 1) + 6.0 * places * adapter.parameters


def decoding_seconds(shape: Shape, rate: Rate, size: float, rows: int, length: float, tokens: int) -> float:
    """Seconds to draw `tokens` tokens for `rows` rows at once: every token reads the weights (`size` bytes) and the
    cache, or computes, whichever takes longer."""
    cache = 2.0 * shape.layers * shape.key_width * 2 * rows * length
    computed = rows * forward_flops(shape, 1, 2 * length, 1)
    return tokens * max((size + cache) / rate.bandwidth, computed / rate.flops)


def _active(shape: Shape) -> float:
    """Weights a token is multiplied with: of a mixture, those of the experts it is sent to."""
    attention = 2 * shape.hidden * (shape.head_width + shape.key_width)
    mlp = (3 if shape.gated else 2) * shape.hidden * shape.width
    return min(shape.linear, shape.layers * (attention + mlp))


def device_memory(layout: Layout, name: str) -> int:
    """Bytes of a GPU of this name, or of this machine."""
    if layout.gpu:
        return GPUS[name][1] * GiB
    import psutil

    return int(psutil.virtual_memory().total)
