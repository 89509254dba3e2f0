"""Stage 4, reward: a model that scores answers as the labels would, as a LoRA adapter and score head on the SFT model.

The folder's `model` loads with plain AutoModelForSequenceClassification and PeftModel. Held-out accuracy is measured on
that saved artefact, not on what training left in memory, so that a head lost on the way would show.
"""

from __future__ import annotations

from typing import Any

from align import models, progress, ranks, training
from align.compare.statistics import accuracy_interval
from align.config import Config
from align.data.load import only
from align.data.render import fit, preference_row
from align.runs import Run
from align.sample import sft_model
from reward.records import InputError, Record, read_jsonl, write_jsonl


def run_reward(config: Config, run: Run) -> dict[str, Any]:
    """Train the reward model; returns held-out accuracy with its exact 95 % interval."""
    from transformers import set_seed

    from reward.scoring import score
    from reward.training import reward_trainer

    section, base = config.reward, sft_model(config)
    tokenizer = models.load_tokenizer(base, config.model)
    train, test, summary = preference_rows(config, run, tokenizer, section.max_length)
    if section.margin and not all("margin" in row for row in train):
        raise InputError("reward.margin is true, but the preferences carry no margins: set it to false.")

    set_seed(config.seed)
    with training.refused_settings(run.stage):
        # PEFT keeps what is in modules_to_save whole: the score head must be among it, or it is lost on reload.
        extras = (section.adapter.model_extra if section.adapter else None) or {}
        keep = sorted({*(extras.get("modules_to_save") or []), "score"})
        trainer = reward_trainer(
            models.load_reward_base(base, config.model),
            tokenizer,
            train,
            training.trainer_arguments(config, section, run),
            models.lora_config(section.adapter, "SEQ_CLS", modules_to_save=keep) if section.adapter else None,
            margin=section.margin,
            group_pairs=section.group_pairs,
        )
    training.make_lean(section, run, trainer.model)
    closing = training.train(trainer, run)
    target = run.folder / "model"
    trainer.save_model(str(target))
    del trainer
    training.release()
    ranks.wait()
    if not ranks.is_first():
        return {}

    model = models.load_reward_model(str(target), config.model)
    rows = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in test]
    with progress.bar("reward: held-out accuracy", len(rows)) as report:
        scores = score(model, rows, tokenizer.pad_token_id, on_progress=report)
    chosen, rejected = scores[: len(test)], scores[len(test) :]
    right = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    write_jsonl(
        run.folder / "held_out_scores.jsonl",
        [
            {"comparison_id": row["comparison_id"], "chosen_reward": a, "rejected_reward": b}
            for row, a, b in zip(test, chosen, rejected, strict=True)
        ],
    )
    return {
        **summary,
        "train_loss": closing.get("train_loss"),
        "held_out_pairs": len(test),
        "held_out_accuracy": accuracy_interval(right, len(test)).record(),
        "held_out_margin": sum(a - b for a, b in zip(chosen, rejected, strict=True)) / len(test),
    }


def preference_rows(
    config: Config, run: Run, tokenizer: Any, max_length: int
) -> tuple[list[Record], list[Record], dict[str, Any]]:
    """(train rows, test rows, counts): the label stage's preferences with their tokens, too long ones left out.

    Rows left out are counted, said, and written to dropped.jsonl.
    """
    records = read_jsonl(config.folder("label") / "preferences.jsonl")

    def length(record: Record) -> int:
        record |= preference_row(tokenizer, record)
        # One more for what a chat template writes after the stop token, which TRL's own rendering keeps.
        return len(record["prompt_ids"]) + max(len(record["chosen_ids"]), len(record["rejected_ids"])) + 1

    kept, too_long = fit(records, length, max_length, "pairs", f"{run.stage}.max_length")
    if too_long:
        progress.say(f"  left out {len(too_long)} of {len(records)} pairs longer than max_length={max_length} tokens")
    if run.writer:
        reason = f"longer than max_length={max_length} tokens"
        write_jsonl(run.folder / "dropped.jsonl", [{"reason": reason, "record": record} for record in too_long])
    train, test = only("train", kept, "pairs"), only("test", kept, "pairs")
    progress.say(f"  {len(train)} pairs to train on, {len(test)} held out")
    return train, test, {"train_pairs": len(train), "left_out_too_long": len(too_long)}
