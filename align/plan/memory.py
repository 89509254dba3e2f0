"""Bytes a stage holds at its peak on one device, as pure functions of shapes and token counts.

Sources: the split of weights, gradients and optimiser states over N processes is that of ZeRO (arXiv 1910.02054,
section 3, with K = 12 bytes for Adam in mixed precision). What a layer keeps for its backward pass is counted tensor by
tensor in the manner of arXiv 2205.05198 (section 4.1), but for LoRA on frozen weights, for attention that keeps no
score matrix, and for the functions of `align.lean`, `align.lora` and `align.prefix`, which keep less. NF4 is 4 bits
with a constant of 8 bits a block of 64 and one of 32 bits 256 blocks (arXiv 2305.14314, section 3): 4.127 bits.

All sizes are bytes. P places computed, Q query and K key slots with their padding (see `Tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from align.logprobs import FROZEN_BLOCK, FROZEN_TILE, TILE
from align.plan.shapes import Adapter, Shape

GiB = 2**30
F32 = 4

# What glibc's allocator holds of the activations while they come and go: measured over reward, dpo and sft steps on two
# models, 1.33 to 1.37 from the second step on (docs/plan.md). Blocks of 32 MiB and more are given back at once.
HEAP = 1.35
HEAP_LIMIT = 32 * 2**20
# Trainer, tokenizer, dataset and thread pools once a stage runs, on top of the imports. Measured: 96 to 126 MiB.
LIBRARIES = 110 * 2**20
# CUDA context, cuBLAS workspaces and the allocator's rounding. Assumed: no GPU was at hand to measure on.
GPU_CONTEXT = GiB
GPU_ROUNDING = 1.1
# DeepSpeed's own defaults, in elements: gradients wait in a bucket, and ZeRO-3 keeps so many gathered weights.
BUCKET = 500_000_000
LIVE = 1_000_000_000
# Rows read at a time without gradient, where a stage measures on held-out answers (align.logprobs.answer_logprobs).
READ_ROWS = 16


@dataclass(frozen=True)
class Precision:
    """bits: of a weight of the base's linear layers; size: bytes of everything else and of what is computed with;
    autocast: to bfloat16."""

    bits: float
    size: int
    autocast: bool = False

    @property
    def computed(self) -> int:
        return 2 if self.autocast else self.size


@dataclass(frozen=True)
class Layout:
    """How a stage is launched: on a GPU or not, on how many processes, with which ZeRO stage, with offload or not."""

    gpu: bool = False
    processes: int = 1
    zero: int = 0
    offload: bool = False

    @property
    def deepspeed(self) -> bool:
        return self.zero > 0


@dataclass(frozen=True)
class Tokens:
    """What one forward pass reads.

    places: tokens that are computed. queries, keys: slots of attention, padding included. masked: elements of the
    masks. answers: tokens whose logits are wanted. packed: the rows lie in one sequence (align.prefix).
    """

    places: int
    queries: int
    keys: int
    masked: int
    answers: int
    packed: bool


@dataclass(frozen=True)
class Phase:
    """A time at which memory may be at its peak. `parts` in bytes, by name."""

    name: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def weights(shape: Shape, precision: Precision, layout: Layout) -> float:
    """The base on one device. Under ZeRO-3 a share, and the layers that are gathered for their turn."""
    whole = _whole(shape, precision)
    if layout.zero < 3:
        return whole
    live = min(1.0, max(LIVE, shape.largest) / shape.parameters) * whole
    held = 0.0 if layout.offload else whole / layout.processes
    return min(whole, held + live)


def _whole(shape: Shape, precision: Precision) -> float:
    return shape.linear * precision.bits / 8 + (shape.parameters - shape.linear) * precision.size


def trained(count: int, size: int, layout: Layout) -> dict[str, float]:
    """Gradients and AdamW's states of `count` trained weights of `size` bytes each.

    Plain data parallel keeps a second copy of the gradients in its buckets; DeepSpeed a bucket of its own, and under it
    the states are 12 bytes a weight: a copy in f32 and two moments.
    """
    gradients = count * size / (layout.processes if layout.zero >= 2 else 1)
    if layout.zero == 0 and layout.processes > 1:
        gradients *= 2
    if layout.deepspeed:
        gradients += min(BUCKET, count) * size
    states = count * 12 / layout.processes if layout.deepspeed else count * 2 * size
    return {"gradients": gradients, "optimiser": 0.0 if layout.offload else states}


def layer_tensors(
    shape: Shape, adapter: Adapter | None, precision: Precision, tokens: Tokens, lean: bool
) -> list[float]:
    """Bytes of every tensor that one decoder layer keeps for its backward pass.

    Args:
        adapter: None where every weight is trained.
        lean: norms, gated MLPs and LoRA layers are those of `align.lean` and `align.lora` (f32 on a CPU).
    """
    s, places = precision.computed, tokens.places
    hidden, width, heads = shape.hidden, shape.width, shape.head_width
    copies = adapter.copies if adapter else {"attention": 3, "output": 1, "mlp": 2, "down": 1}
    kept: list[float] = [F32 * places * hidden] * 2  # what the norms read, in f32
    if adapter is None:
        kept += [s * places * hidden] * 2  # and what their own weights are multiplied with
    # PEFT casts the input of every layer to its adapter's type, each for itself, unless it is of that type already.
    shared = precision.size == F32 and not precision.autocast if adapter else not precision.autocast
    copy = precision.computed if adapter is None or precision.autocast else F32
    inputs = {"attention": hidden, "output": heads, "mlp": hidden, "down": width}
    for part, size in inputs.items():
        if part == "output" and shared and not tokens.packed:
            continue  # attention's own output, kept below
        kept += [copy * places * size] * (min(1, round(copies[part])) if shared else round(copies[part]))
    key = shape.key_width if tokens.packed or not tokens.masked else heads  # a mask makes transformers repeat keys
    kept += [s * tokens.queries * heads] * 2 + [s * tokens.keys * key] * 2
    kept += [F32 * tokens.queries * shape.heads, s * tokens.masked]
    kept += [s * places * width] * (1 if not shape.gated else 2 if lean else 3)
    if adapter is not None:
        low = 2 if precision.autocast else F32
        kept.append(low * places * adapter.low)
    return kept


def activations(
    shape: Shape,
    adapter: Adapter | None,
    precision: Precision,
    tokens: Tokens,
    layout: Layout,
    checkpointing: bool = False,
) -> float:
    """What all layers keep from the forward to the backward pass.

    Below the lowest adapter nothing is kept. With checkpointing every layer keeps its input, and one at a time is
    computed again. Autocast from f32 keeps the bfloat16 copies of the weights too.
    """
    lean = adapter is not None and not layout.gpu and precision.size == F32 and not precision.autocast
    one = layer_tensors(shape, adapter, precision, tokens, lean)
    layers = shape.layers - (adapter.first if adapter else 0)
    if checkpointing:
        kept = [precision.size * tokens.places * shape.hidden] * shape.layers + one
    else:
        kept = one * layers
    copied = 2 * shape.linear * layers / shape.layers if precision.autocast and precision.size == F32 else 0
    return _held(kept, layout) + copied


def _held(tensors: Sequence[float], layout: Layout) -> float:
    if layout.gpu:
        return GPU_ROUNDING * sum(tensors)
    return sum(size * (HEAP if size < HEAP_LIMIT else 1) for size in tensors)


def logits(shape: Shape, precision: Precision, tokens: Tokens, layout: Layout, frozen: bool) -> float:
    """What the vocabulary head needs at once.

    Of a frozen head: one block of logits, its exponentials, and the hidden states' gradient. Else up to a tile of
    positions: logits in the computed type and in f32, their softmax and their gradient.
    """
    if not tokens.answers:
        return 0.0
    device = "cuda" if layout.gpu else "cpu"
    if frozen:
        tile = min(tokens.answers, FROZEN_TILE.get(device, TILE))
        block = min(shape.vocabulary, FROZEN_BLOCK.get(device, shape.vocabulary))
        return tile * block * (precision.computed + 2 * F32) + tokens.answers * shape.hidden * (
            precision.computed + F32
        )
    return min(tokens.answers, TILE) * shape.vocabulary * (precision.computed + 3 * F32)


def read_logits(shape: Shape, answers: int) -> float:
    """Logits and their softmax in f32, where a model with a head that could be trained is read without gradient."""
    return min(answers, TILE) * shape.vocabulary * 2 * F32


def cache(shape: Shape, precision: Precision, rows: int, length: int) -> float:
    """Keys and values of `rows` rows of `length` tokens, in all layers."""
    return 2.0 * shape.layers * shape.key_width * precision.computed * rows * length


def folded(adapter: Adapter | None, precision: Precision) -> float:
    """The original weights, set aside while a LoRA adapter is folded in; quantised ones are left alone."""
    return 0.0 if adapter is None or precision.bits < 16 else adapter.adapted * precision.bits / 8


def sampling(shape: Shape, precision: Precision, rows: int, prompts: int) -> float:
    """What one step of the sampler needs beside the cache: logits, log-probabilities, probabilities and their entropy
    in f32; or, while the prompts are read, one layer's products over all their tokens."""
    step = rows * shape.vocabulary * 4 * F32
    reading = prompts * (3 * shape.width + 4 * shape.hidden + 2 * shape.head_width) * precision.computed
    return float(max(step, reading))


def libraries(layout: Layout) -> float:
    """What a running stage holds beside tensors that are counted here."""
    return GPU_CONTEXT if layout.gpu else LIBRARIES
