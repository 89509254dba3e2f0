"""The plan of a config: for every stage memory, time, the largest batch that fits, and how to launch it.

machine = Machine(gpus=8, memory=80 * 10**9, gpu="h100")
found = plan(load_config("configs/hh.yaml"), machine)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align import models
from align.config import (
    CompareSection,
    Config,
    DpoSection,
    ModelSection,
    PpoSection,
    RewardSection,
    SampleSection,
    TrainerSection,
)
from align.plan import rates, rows, stages
from align.plan.memory import F32, Layout, Phase, Precision
from align.plan.shapes import Adapter, Base, Shape, read_base
from align.plan.stages import TRAINING, Job
from reward.records import InputError

# Share of a device that a plan may fill: the formulas are good to about a tenth (docs/plan.md).
USABLE = 0.9
LARGEST_BATCH = 4096
NF4 = 4.127  # bits a weight with double quantisation, 4.5 without
BITS = {"16 bit": 16.0, "8 bit": 8.0, "4 bit": NF4}
LAYOUTS = {
    "one process each": (0, False),
    "ZeRO-1": (1, False),
    "ZeRO-2": (2, False),
    "ZeRO-3": (3, False),
    "ZeRO-3, offload": (3, True),
}
FILES = {
    "ZeRO-1": "zero1.yaml",
    "ZeRO-2": "zero2.yaml",
    "ZeRO-3": "zero3.yaml",
    "ZeRO-3, offload": "zero3_offload.yaml",
}
NODE = 8  # GPUs of a machine, in multi_node.yaml


@dataclass(frozen=True)
class Machine:
    """gpus: 0 is a CPU. memory: bytes of each GPU, or of the machine. gpu: a name of `rates.GPUS`.
    tflops: what a step reaches on each device, where the reader knows."""

    gpus: int
    memory: int
    gpu: str = "a100"
    tflops: float | None = None

    @property
    def usable(self) -> float:
        return USABLE * self.memory


@dataclass(frozen=True)
class StagePlan:
    """phase: the peak. largest: batch that fits, None where none does. totals: bytes by layout and number format.
    remedies: what would make a stage fit that does not, with the bytes it would take then."""

    stage: str
    batch: int
    phase: Phase
    seconds: float
    rows: rows.Rows
    fits: bool
    largest: int | None = None
    totals: dict[tuple[str, str], float] | None = None
    remedies: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Plan:
    """layout: the name in `LAYOUTS` that is suggested, with the file under configs/accelerate/ for it."""

    config: Config
    machine: Machine
    shape: Shape
    precision: Precision
    rate: rates.Rate
    layout: str
    file: str | None
    stages: list[StagePlan]

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)


def memory_size(text: str) -> int:
    """Bytes of `80GB` or `24GiB`.

    Raises:
        InputError: it is neither, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB|TB|TiB)", text.strip())
    units = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    size = int(float(found[1]) * units[found[2]]) if found else 0
    if size <= 0:
        raise InputError(f"`--gpu-memory {text}` is no size: write a number with its unit, such as 80GB or 24GiB.")
    return size


def machine_of(gpus: int = 0, gpu: str | None = None, size: str | None = None, tflops: float | None = None) -> Machine:
    """The machine of the command line; without GPUs, this one.

    Raises:
        InputError: an unknown GPU, a size that is none, or a GPU's property without GPUs.
    """
    if gpus < 0 or (tflops is not None and tflops <= 0):
        raise InputError("`--gpus` is a number of at least 1 (without it, this machine's CPU), `--tflops` above 0.")
    if gpus == 0:
        if gpu or size:
            raise InputError("`--gpu` and `--gpu-memory` describe GPUs, but there are none: give `--gpus N` as well.")
        return Machine(0, rates.device_memory(Layout(), ""), tflops=tflops)
    name = (gpu or "a100").lower()
    if name not in rates.GPUS:
        raise InputError(
            f"`--gpu {gpu}` is unknown: take one of {', '.join(rates.GPUS)}, or --gpu-memory and --tflops."
        )
    return Machine(gpus, memory_size(size) if size else rates.device_memory(Layout(gpu=True), name), name, tflops)


def plan(config: Config, machine: Machine) -> Plan:
    """The plan of all stages of a config.

    Raises:
        InputError: the base's shape cannot be read, an adapter does not fit it, or a data file is malformed.
    """
    drawing = _Drawing(config, machine)
    layout = drawing.layout()
    found = [drawing.stage(stage, layout) for stage in config.stages if stage != "label"]
    return Plan(
        config, machine, drawing.base.shape, drawing.precision, drawing.rate, layout, _file(machine, layout), found
    )


def _file(machine: Machine, layout: str) -> str | None:
    if machine.gpus == 0:
        return None
    if machine.gpus > NODE and layout != "ZeRO-3, offload":
        return "multi_node.yaml"
    return FILES.get(layout, "single_gpu.yaml")


class _Drawing:
    """What the stages of one plan share."""

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config, self.machine = config, machine
        self.base = read_base(config.model)
        self.tokenizer = rows.tokenizer_of(config)
        self.precision = _precision(config.model, machine.gpus > 0)
        bf16 = self.precision.size == 2
        self.rate = (
            rates.gpu_rate(machine.gpu, machine.tflops) if machine.gpus else rates.cpu_rate(bf16, machine.tflops)
        )
        self._bases: dict[str, Base] = {}
        self._adapters: dict[str, Adapter | None] = {}
        self._rows: dict[str, rows.Rows] = {}

    def layout(self) -> str:
        """The first layout, from the cheapest on, in which most training stages fit."""
        jobs = [self.job(stage) for stage in self.config.stages if stage in TRAINING]

        def fitting(name: str) -> int:
            return sum(self._fits(self._laid_out(job, name)) for job in jobs)

        return max(self._layouts(), key=fitting)  # of equals, the first

    def _layouts(self) -> list[str]:
        """Those that can be launched: splitting wants processes, and quantised weights cannot be split."""
        if self.machine.gpus == 0:
            return ["one process each"]
        several = ["ZeRO-2", "ZeRO-3"] if self.machine.gpus > 1 else ["one process each"]
        if self.machine.gpus > NODE:
            several = ["ZeRO-3"]
        return [
            name for name in [*several, "ZeRO-3, offload"] if self.precision.bits >= 16 or "ZeRO-3" not in name
        ] or ["ZeRO-2"]

    def stage(self, stage: str, layout: str) -> StagePlan:
        if stage not in TRAINING:
            return self._generation(stage)
        job = self._laid_out(self.job(stage), layout)
        phase, fits = stages.peak(job), self._fits(job)
        return StagePlan(
            stage,
            job.batch,
            phase,
            stages.seconds(job, self.rate),
            job.rows,
            fits,
            largest_batch(job, self.machine.usable),
            self._totals(job),
            [] if fits else self._remedies(job),
        )

    def _generation(self, stage: str) -> StagePlan:
        section: Any = self.config.section(stage)
        found = self.rows_of(stage)
        layout = Layout(gpu=self.machine.gpus > 0)
        prompts = min(found.count, section.max_prompts or found.count)
        answers = prompts * (section.answers_per_prompt if stage == "sample" else len(self.config.compared_models()))

        def at(batch: int) -> float:
            return stages.generation(self.base.shape, self.precision, layout, found, batch).total

        phase = stages.generation(self.base.shape, self.precision, layout, found, section.batch_size)
        seconds = stages.generation_seconds(
            self.base.shape, self.precision, layout, found, section.batch_size, answers, self.rate
        )
        usable = self.machine.usable
        return StagePlan(stage, section.batch_size, phase, seconds, found, phase.total <= usable, _largest(at, usable))

    # -- a training stage ---------------------------------------------------------------------------------------------

    def job(self, stage: str) -> Job:
        """A training stage as one process runs it."""
        section: Any = self.config.section(stage)
        gpu = self.machine.gpus > 0
        base = self._base(stage)
        autocast = section.bf16 if section.bf16 is not None else gpu and self.precision.size == 2
        precision = self.precision if base is self.base else replace(self.precision, bits=8.0 * self.precision.size)
        shape = base.shape
        same = abs(shape.files - precision.bits / 8 * shape.parameters) < 0.01 * shape.files  # as in the files
        return Job(
            stage,
            shape,
            replace(precision, autocast=autocast),
            Layout(gpu=gpu),
            self.rows_of(stage),
            section.per_device_train_batch_size,
            self._adapter(stage),
            section,
            section.gradient_checkpointing,
            self._adapter("reward") if stage == "ppo" and "reward" in section.rewards else None,
            mapped=not gpu and precision.bits == 8 * F32 and same,
            converted=0 if gpu or same or ("sft" in self.config.stages and stage != "sft") else shape.files,
        )

    def _base(self, stage: str) -> Base:
        """The model a stage stands on; a reward model may have one of its own."""
        own = self.config.reward.base if stage == "reward" else None
        if own is None:
            return self.base
        if own not in self._bases:
            self._bases[own] = read_base(self.config.model.model_copy(update={"base": own}))
        return self._bases[own]

    def _adapter(self, stage: str) -> Adapter | None:
        section = self.config.section(stage)
        if not isinstance(section, TrainerSection) or section.adapter is None:
            return None
        heads = self.config.reward.ensemble if stage == "reward" else 0
        key = f"{section.adapter.model_dump_json()} {heads} {self._base(stage).shape.name}"
        if key not in self._adapters:
            self._adapters[key] = self._base(stage).adapter(section.adapter, heads)
        return self._adapters[key]

    def rows_of(self, stage: str) -> rows.Rows:
        section, kind = self.config.section(stage), stage
        if isinstance(section, RewardSection | DpoSection):
            kind = f"preferences of {section.max_length}"
        if kind not in self._rows:
            self._rows[kind] = self._read(stage)
        return self._rows[kind]

    def _read(self, stage: str) -> rows.Rows:
        config, tokenizer, section = self.config, self.tokenizer, self.config.section(stage)
        if isinstance(section, RewardSection | DpoSection):
            return rows.preference_rows(config, tokenizer, section.max_length)
        if isinstance(section, PpoSection):
            return rows.prompt_rows(config, tokenizer, section.max_prompt_length, section.response_length)
        if isinstance(section, SampleSection | CompareSection):
            return rows.prompt_rows(config, tokenizer, section.max_prompt_length, section.max_new_tokens)
        return rows.demonstration_rows(config, tokenizer)

    def _laid_out(self, job: Job, name: str) -> Job:
        zero, offload = LAYOUTS[name]
        processes = max(1, self.machine.gpus)
        return replace(job, layout=Layout(job.layout.gpu, processes, zero, offload))

    def _fits(self, job: Job) -> bool:
        return stages.peak(job).total <= self.machine.usable

    def _totals(self, job: Job) -> dict[tuple[str, str], float]:
        """Peak by layout and number format; quantised weights are neither split nor trained."""
        formats = dict(BITS) if job.precision.size == 2 else {"32 bit": 32.0, "8 bit": 8.0, "4 bit": NF4}
        several = LAYOUTS if self.machine.gpus > 1 else {"one process each": (0, False), "ZeRO-3, offload": (3, True)}
        found = {}
        for name in several if self.machine.gpus else ["one process each"]:
            for kind, bits in formats.items():
                if bits < 16 and ("ZeRO-3" in name or job.adapter is None):
                    continue
                found[name, kind] = stages.peak(self._laid_out(_in_bits(job, bits), name)).total
        return found

    def _remedies(self, job: Job) -> list[tuple[str, float]]:
        """What would make it fit, each alone, then all of them together."""
        best = self._layouts()[-1]
        quantised = "8 bit" if job.adapter is not None and job.precision.bits >= 16 else ""
        tried: list[tuple[str, Callable[[Job], Job]]] = [
            (f"{job.stage}.per_device_train_batch_size: 1", lambda j: replace(j, batch=1)),
            (f"{job.stage}.gradient_checkpointing: true", lambda j: replace(j, checkpointing=True)),
        ]
        if best != "one process each" and job.precision.bits >= 16:
            tried.append((FILES[best], lambda j: self._laid_out(j, best)))
        if quantised:
            name = "ZeRO-2" if self.machine.gpus > 1 else "one process each"
            tried.append(("model.quantization: {load_in_4bit: true}", lambda j: self._laid_out(_in_bits(j, NF4), name)))
        changed = [(what, change(job)) for what, change in tried]
        found = [(what, stages.peak(other).total) for what, other in changed]
        found = [(what, size) for what, size in found if size <= self.machine.usable]
        if found:
            return found
        together = job
        names = []
        for what, change in [t for t in tried if not t[0].endswith(".yaml") or not quantised]:
            together = change(together)
            names.append(what)
            size = stages.peak(together).total
            if size <= self.machine.usable:
                return [(" and ".join(names), size)]
        return []


def _in_bits(job: Job, bits: float) -> Job:
    return replace(job, precision=replace(job.precision, bits=bits), mapped=job.mapped and bits == 32)


def largest_batch(job: Job, usable: float) -> int | None:
    """The largest per_device_train_batch_size whose peak is within `usable` bytes; None where 1 is too large."""
    return _largest(lambda batch: stages.peak(stages.with_batch(job, batch)).total, usable)


def _largest(total: Callable[[int], float], usable: float) -> int | None:
    if total(1) > usable:
        return None
    low, high = 1, 2
    while high <= LARGEST_BATCH and total(high) <= usable:
        low, high = high, 2 * high
    if high > LARGEST_BATCH:
        return LARGEST_BATCH
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= usable else (low, middle)
    return low


def _precision(section: ModelSection, gpu: bool) -> Precision:
    """How the base is held: as `model.dtype` and `model.quantization` say; `auto` is bfloat16 on a GPU."""
    if section.dtype == "auto":
        size = 2 if gpu else models.data_type(section).itemsize
    else:
        size = {"float32": 4, "bfloat16": 2, "float16": 2}[section.dtype]
    bits = 8.0 * size
    if (quantization := section.quantization) is not None:
        double = quantization.bnb_4bit_use_double_quant
        bits = (NF4 if double else 4.5) if quantization.load_in_4bit else 8.0
    return Precision(bits, size)
