"""Each stage as phases of memory and as arithmetic: what `align.sft`, `align.dpo` and the others do, on paper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from align.plan import memory, rates
from align.plan.memory import Layout, Phase, Precision, Tokens
from align.plan.rows import Rows, packed_tokens, tokens_of
from align.plan.shapes import Adapter, Shape

TRAINING = ("sft", "reward", "dpo", "ppo")


@dataclass(frozen=True)
class Job:
    """A training stage of a config on a model.

    batch: rows a forward pass on each device. adapters: of the stage ("own") and, in ppo, of the reward model.
    mapped: on a CPU, weights come straight from a file of the same type, and rows nobody reads are never resident.
    converted: bytes of the weight files, where weights are held in another type: both are there while they are loaded.
    """

    stage: str
    shape: Shape
    precision: Precision
    layout: Layout
    rows: Rows
    batch: int
    adapter: Adapter | None
    section: Any
    checkpointing: bool
    reward_adapter: Adapter | None = None
    mapped: bool = False
    converted: int = 0

    @property
    def tokens(self) -> Tokens:
        rows = self.rows.batch(self.batch)
        if self.rows.limit:
            return packed_tokens(rows, self.rows.limit, self.rows.count)
        return tokens_of(rows, self.rows.common, self.section.share_prefixes)

    @property
    def episodes(self) -> int:
        """Of an update of ppo, on each process."""
        return int(self.batch * self.section.gradient_accumulation_steps * self.section.num_mini_batches)


def with_batch(job: Job, batch: int) -> Job:
    return replace(job, batch=batch)


def phases(job: Job) -> list[Phase]:
    """When memory may be at its peak."""
    held = _held(job)
    found = [Phase("training", held | _training(job))]
    kept = 0.0 if job.layout.gpu else found[0].parts["activations"]  # freed, and still the process's (memory.HEAP)
    if job.converted:  # after training the model is loaded again, as it was saved
        again = kept if job.stage != "ppo" else 0.0
        found.append(Phase("loading", {**_bare(job), "activations": again, "files": job.converted}))
    rows = job.rows.batch(memory.READ_ROWS)
    answers = sum(sum(row.answers) for row in rows)
    if job.stage == "sft":
        reading = memory.read_logits(job.shape, answers)
        found.append(Phase("held-out before", {**_bare(job), "logits": reading}))
    if job.stage == "dpo":
        reading = memory.read_logits(job.shape, answers // 2)
        found.append(Phase("held-out after", {**_bare(job), "activations": kept, "logits": reading}))
    if job.stage == "ppo":
        found.append(Phase("sampling", held | _sampling(job)))
    return found


def peak(job: Job) -> Phase:
    return max(phases(job), key=lambda phase: phase.total)


def _bare(job: Job) -> dict[str, float]:
    """A model alone, as it is loaded to be read."""
    return {"weights": _base(job), "libraries": memory.libraries(job.layout)}


def _base(job: Job) -> float:
    size = memory.weights(job.shape, job.precision, job.layout)
    unread = 0
    if job.stage == "reward":
        unread += job.shape.head  # a sequence classifier has none
    if job.mapped and (job.stage == "reward" or job.shape.head):
        unread += job.shape.embedding
    return size * (1 - unread / job.shape.parameters) if unread else size


def _held(job: Job) -> dict[str, float]:
    """What stays from step to step."""
    base = _base(job)
    if job.adapter is None:
        adapters = 0.0
        if job.stage in ("dpo", "ppo"):  # the reference is a model of its own
            base *= 2
    else:
        adapters = float(memory.F32 * job.adapter.parameters)
    if job.stage == "ppo":
        adapters *= 2 if job.section.value_adapter else 1
        adapters += memory.F32 * job.reward_adapter.parameters if job.reward_adapter else 0
    count, size = _trained(job)
    return {
        "weights": base,
        "adapters": adapters,
        **memory.trained(count, size, job.layout),
        "libraries": memory.libraries(job.layout),
    }


def _trained(job: Job) -> tuple[int, int]:
    """(trained weights, bytes of each)."""
    if job.adapter is None:
        return job.shape.parameters, job.precision.size
    twice = 2 if job.stage == "ppo" and job.section.value_adapter else 1
    return job.adapter.parameters * twice, memory.F32


def _training(job: Job) -> dict[str, float]:
    tokens = job.tokens
    kept = memory.activations(job.shape, job.adapter, job.precision, tokens, job.layout, job.checkpointing)
    frozen = job.adapter is not None and not job.precision.autocast
    # On GPUs, TRL's own kernels hold a tile of logits at a time, whatever is trained.
    frozen = frozen or (job.layout.gpu and job.stage in ("sft", "dpo"))
    logits = 0.0
    if job.stage != "reward":
        logits = memory.logits(job.shape, job.precision, tokens, job.layout, frozen)
    if job.stage == "ppo":
        kept *= 1 + job.section.value_adapter + (job.section.ptx_coef > 0)
    return {"activations": kept, "logits": logits}


def _sampling(job: Job) -> dict[str, float]:
    """The rollout. Under ZeRO-3 the weights are gathered whole for it."""
    episodes, section = job.episodes, job.section
    rows = min(section.rollout_batch_size or episodes, episodes)
    batch = job.rows.batch(rows)
    length = max(row.longest for row in batch)
    prompts = job.rows.common + sum(max(row.prompt - job.rows.common, 0) for row in batch)
    more = {
        "folded": memory.folded(job.adapter, job.precision),
        "KV cache": memory.cache(job.shape, job.precision, rows, length),
        "logits": memory.sampling(job.shape, job.precision, rows, prompts),
        "gradients": 0.0,
    }
    if job.layout.zero == 3:
        whole = memory.weights(job.shape, job.precision, replace(job.layout, zero=2))
        own = 0.0 if job.layout.offload else whole / job.layout.processes
        more["weights"] = whole + own
    return more


def generation(shape: Shape, precision: Precision, layout: Layout, rows: Rows, batch: int) -> Phase:
    """What `sample` and `compare` hold while a merged model answers `batch` prompts at a time."""
    found = rows.batch(batch)
    length = max(row.longest for row in found)
    return Phase(
        "sampling",
        {
            "weights": memory.weights(shape, precision, replace(layout, zero=0, offload=False)),
            "KV cache": memory.cache(shape, precision, batch, length),
            "logits": memory.sampling(shape, precision, batch, sum(row.prompt for row in found)),
            "libraries": memory.libraries(layout),
        },
    )


# -- time -------------------------------------------------------------------------------------------------------------


def seconds(job: Job, rate: rates.Rate) -> float:
    """Of the whole stage's training, held-out figures left out."""
    return _ppo_seconds(job, rate) if job.stage == "ppo" else _epoch_seconds(job, rate)


def rows_trained(job: Job) -> float:
    """Rows that all processes together pass through in training."""
    section = job.section
    if section.max_steps > 0:
        packed = max(1, job.rows.limit // max(1, round(job.rows.mean)))
        step = job.batch * section.gradient_accumulation_steps * job.layout.processes
        return float(section.max_steps * step * packed)
    return float(job.rows.count * section.num_train_epochs)


def _row_flops(job: Job) -> float:
    """Training on an average row."""
    places, answers = job.rows.mean, job.rows.mean_answers if job.stage != "reward" else 0
    return rates.training_flops(job.shape, job.adapter, places, places, answers, job.checkpointing)


def _epoch_seconds(job: Job, rate: rates.Rate) -> float:
    flops = rows_trained(job) * _row_flops(job)
    if job.stage == "dpo":  # the reference's pass over every pair, once
        flops += job.rows.count * rates.forward_flops(job.shape, job.rows.mean, job.rows.mean, job.rows.mean_answers)
    return flops / rate.flops / job.layout.processes


def _ppo_seconds(job: Job, rate: rates.Rate) -> float:
    section, processes = job.section, job.layout.processes
    updates = -(-section.total_episodes // (job.episodes * processes))
    rows = min(section.rollout_batch_size or job.episodes, job.episodes)
    size = memory.weights(job.shape, job.precision, replace(job.layout, zero=0, offload=False))
    answer = round(job.rows.mean_answers)
    drawing = job.episodes / rows * rates.decoding_seconds(job.shape, rate, size, rows, job.rows.mean, answer)
    one = rates.forward_flops(job.shape, job.rows.mean, job.rows.mean, job.rows.mean_answers)
    looks = (
        2 if job.layout.gpu or job.precision.size < memory.F32 else 1
    )  # reference, and policy where it is not trusted
    reading = (looks + (job.reward_adapter is not None)) * one
    learning = section.num_ppo_epochs * _row_flops(job)
    return float(updates * (drawing + job.episodes * (reading + learning) / rate.flops))


def generation_seconds(
    shape: Shape, precision: Precision, layout: Layout, rows: Rows, batch: int, answers: float, rate: rates.Rate
) -> float:
    """`answers` answers in batches, every prompt read first."""
    size = memory.weights(shape, precision, replace(layout, zero=0, offload=False))
    length = round(rows.mean_answers)
    drawing = answers / batch * rates.decoding_seconds(shape, rate, size, batch, rows.mean, length)
    return drawing + answers * rates.forward_flops(shape, rows.mean, rows.mean, 0) / rate.flops
