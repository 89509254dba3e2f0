"""A plan as text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from align import progress
from align.plan.memory import HEAP
from align.plan.planning import USABLE, Machine, Plan, StagePlan
from align.plan.rates import GPUS
from align.plan.stages import TRAINING

PARTS = (
    "weights",
    "adapters",
    "gradients",
    "optimiser",
    "activations",
    "logits",
    "KV cache",
    "folded",
    "files",
    "libraries",
)


def as_text(plan: Plan) -> str:
    """All there is to say, section after section."""
    parts = [_head(plan), _memory(plan), _layouts(plan), _launch(plan), *_misfits(plan), _assumptions(plan)]
    return "\n\n".join(part for part in parts if part)


def _head(plan: Plan) -> str:
    shape, machine = plan.shape, plan.machine
    bits = f"{plan.precision.bits:g} bits a weight"
    model = f"{shape.name}: {shape.parameters:,} parameters, {shape.layers} layers, {bits}"
    return f"{plan.config.name} on {_machine(machine)}\n{model}"


def _machine(machine: Machine) -> str:
    if machine.gpus == 0:
        return f"this machine's CPU, {gib(machine.memory)} GiB of memory"
    known = "" if machine.memory != GPUS[machine.gpu][1] * 2**30 else f" {machine.gpu}"
    return f"{machine.gpus} GPU{'s' * (machine.gpus > 1)}{known} of {gib(machine.memory)} GiB"


def _memory(plan: Plan) -> str:
    shown = [part for part in PARTS if any(stage.phase.parts.get(part) for stage in plan.stages)]
    head = ["stage", *shown, "peak", "at", "batch", "largest", "time"]
    rows = [
        [
            stage.stage,
            *(gib(stage.phase.parts.get(part, 0.0)) for part in shown),
            gib(stage.phase.total) + ("" if stage.fits else " !"),
            stage.phase.name,
            str(stage.batch),
            "none" if stage.largest is None else str(stage.largest),
            progress.duration(stage.seconds),
        ]
        for stage in plan.stages
    ]
    if "label" in plan.config.stages:
        rows.append(["label", *[""] * len(shown), "", "people, or seconds", "", "", ""])
    where = "on each GPU" if plan.machine.gpus else "of the process"
    largest = "largest: the largest batch within 90 % of it"
    return f"GiB {where} at the stage's peak ({largest}):\n{table(head, rows)}"


def _layouts(plan: Plan) -> str:
    stages = [stage for stage in plan.stages if stage.totals]
    if not stages:
        return ""
    columns = list(dict.fromkeys(key for stage in stages for key in stage.totals or {}))
    kinds = list(dict.fromkeys(kind for _, kind in columns))
    names = list(dict.fromkeys(name for name, _ in columns))
    rows = []
    for stage in stages:
        for kind in kinds:
            totals = [(stage.totals or {}).get((name, kind)) for name in names]
            if any(totals):
                rows.append([stage.stage, kind, *("–" if total is None else gib(total) for total in totals)])
    return f"GiB by launcher and by the base's number format:\n{table(['stage', 'base', *names], rows)}"


def _launch(plan: Plan) -> str:
    if plan.file is None:
        return "Launch: `align run CONFIG`, in one process."
    return (
        f"Launch: `align run CONFIG --accelerate configs/accelerate/{plan.file}`"
        + (f" with num_processes: {plan.machine.gpus}" if plan.machine.gpus > 1 else "")
        + "."
    )


def _misfits(plan: Plan) -> list[str]:
    return [_misfit(stage, plan) for stage in plan.stages if not stage.fits]


def _misfit(stage: StagePlan, plan: Plan) -> str:
    room = gib(plan.machine.usable)
    said = f"{stage.stage} does not fit: it takes {gib(stage.phase.total)} GiB where {room} GiB may be filled."
    if stage.stage not in TRAINING:
        batch = f"a batch_size of {stage.largest}" if stage.largest else "a smaller or quantised base"
        return f"{said} It would with {batch}."
    if not stage.remedies:
        return f"{said} Neither a batch of 1, gradient checkpointing, ZeRO-3 nor 4 bits would do: take more GPUs."
    options = "; ".join(f"{what} ({gib(size)} GiB)" for what, size in stage.remedies)
    return f"{said} What would make it fit: {options}."


def _assumptions(plan: Plan) -> str:
    lines = [f"Speed: {plan.rate.source}."]
    for source in dict.fromkeys(f"{stage.rows.source}" for stage in plan.stages):
        own = ", ".join(stage.stage for stage in plan.stages if stage.rows.source == source)
        lines.append(f"Rows of {own}: {source}.")
    lines.append(f"A stage may fill {USABLE:.0%} of the memory; held-out measurements are not in the times.")
    if plan.machine.gpus == 0:
        lines.append(f"The allocator holds {HEAP:g} times what activations take (measured).")
    else:
        lines.append("Nothing here was measured on a GPU.")
    if "ppo" in plan.config.stages and set(plan.config.ppo.rewards) != {"reward"}:
        lines.append("Reward models other than the reward stage's are not counted.")
    return "\n".join(lines)


def gib(size: float) -> str:
    """Bytes in GiB, as long as needed."""
    value = size / 2**30
    return (
        "0" if value < 0.005 else f"{value:.2f}" if value < 10 else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; words to the left, numbers to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    words = [not any(c.isdigit() for row in cells[1:] for c in row[i]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, words, strict=True)
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
