"""Stage 5, dpo: direct preference optimisation with TRL's DPOTrainer; the reference is the model with its adapter off.

The folder's `model` is a PEFT adapter on the SFT model (or a whole model with `dpo.adapter: null`).
"""

from __future__ import annotations

from typing import Any

from align import models, progress, ranks, training
from align.batches import whole_steps
from align.compare.statistics import accuracy_interval
from align.config import Config
from align.heads import lean_head
from align.logprobs import Pair, answer_logprobs
from align.reference import reference_logprobs
from align.reward_model import preference_rows
from align.runs import Run
from align.sample import sft_model
from reward.records import Record, write_jsonl


def run_dpo(config: Config, run: Run) -> dict[str, Any]:
    """Train; returns reward accuracy (with exact 95 % interval) and margin on held-out pairs."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import DPOTrainer

    section, base = config.dpo, sft_model(config)
    tokenizer = models.load_tokenizer(base, config.model)
    train, test, summary = preference_rows(config, run, tokenizer, section.max_length)
    set_seed(config.seed)
    with training.refused_settings(run.stage):
        trainer = DPOTrainer(
            model=models.load_causal_lm(base, config.model),
            ref_model=None if section.adapter else models.load_causal_lm(base, config.model),
            args=training.trainer_arguments(config, section, run, precompute_ref_log_probs=False),
            train_dataset=Dataset.from_list(
                [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in train]
            ),
            processing_class=tokenizer,
            peft_config=models.lora_config(section.adapter, "CAUSAL_LM") if section.adapter else None,
        )
    if not section.model_dump().get("use_weighting"):  # WPO needs a figure that only TRL's own head computes
        lean_head(trainer.model)
    reference = trainer.ref_model and trainer.accelerator.unwrap_model(trainer.ref_model)
    training.make_lean(section, run, *filter(None, [trainer.model, reference]))
    if section.precompute_ref_log_probs and not (trainer.ld_alpha or trainer.args.sync_ref_model):
        precompute_reference(trainer, reference or trainer.model, tokenizer.pad_token_id)
    whole_steps(trainer)
    closing = training.train(trainer, run)
    target = run.folder / "model"
    trainer.save_model(str(target))
    del trainer
    training.release()
    ranks.wait()
    if not ranks.is_first():
        return {}
    tokenizer.save_pretrained(target)
    margins = implicit_margins(config, str(target), test, tokenizer.pad_token_id, section.beta)
    write_jsonl(
        run.folder / "held_out_margins.jsonl",
        [{"comparison_id": row["comparison_id"], "margin": m} for row, m in zip(test, margins, strict=True)],
    )
    return {
        **summary,
        "train_loss": closing.get("train_loss"),
        "held_out_pairs": len(test),
        "held_out_accuracy": accuracy_interval(sum(m > 0 for m in margins), len(test)).record(),
        "held_out_margin": sum(margins) / len(margins),
    }


def precompute_reference(trainer: Any, model: Any, pad_id: int) -> None:
    """Give the trainer's rows the reference's log-probabilities as columns, as TRL's own precomputation does; where
    ZeRO-3 holds the model in parts, leave them to the training step."""
    if ranks.is_split(model):
        return
    rows = [((r["prompt_ids"], r["chosen_ids"]), (r["prompt_ids"], r["rejected_ids"])) for r in trainer.train_dataset]
    model.to(trainer.args.device)
    size = 2 * trainer.args.per_device_train_batch_size
    with progress.bar("dpo: reference", 2 * len(rows) // ranks.world_size()) as report, trainer.accelerator.autocast():
        found = reference_logprobs(model, rows, pad_id, batch_size=size, on_progress=report)
    for name, values in zip(("ref_chosen_logps", "ref_rejected_logps"), zip(*found, strict=True), strict=True):
        trainer.train_dataset = trainer.train_dataset.add_column(name, list(values))
    trainer.precompute_ref_logps = True
    trainer.ref_model = None


@ranks.loading_whole()
def implicit_margins(config: Config, folder: str, rows: list[Record], pad_id: int, beta: float) -> list[float]:
    """DPO's implicit reward of chosen minus that of rejected, for every pair:

        beta * [log pi(c)/ref(c) - log pi(r)/ref(r)]            (equation 5 of arXiv 2305.18290)

    measured with the saved policy and the SFT model as reference.
    """
    pairs: list[Pair] = [(r["prompt_ids"], r[side]) for side in ("chosen_ids", "rejected_ids") for r in rows]
    sums: list[list[float]] = []
    for what, path in (("policy", folder), ("reference", sft_model(config))):
        model = models.load_policy(path, config.model)
        with progress.bar(f"dpo: held-out pairs, {what}", len(pairs)) as report:
            sums.append([float(row.sum()) for row in answer_logprobs(model, pairs, pad_id, on_progress=report)])
        del model
        training.release()
    rewards = [beta * (policy - reference) for policy, reference in zip(*sums, strict=True)]
    return [chosen - rejected for chosen, rejected in zip(rewards[: len(rows)], rewards[len(rows) :], strict=True)]
