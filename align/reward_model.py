"""Stage 4, reward: a model that scores answers as the labels would, as a LoRA adapter and score head on the SFT model.

The folder's `model` loads with plain AutoModelForSequenceClassification and PeftModel; `heads.safetensors` beside it
holds the heads of an ensemble. Everything held out is measured on that saved artefact, not on what training left in
memory, so that a head lost on the way would show; trust.json and trust.html say what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from align import models, progress, ranks, reward_heads, training, trust
from align.batches import whole_steps
from align.config import Config
from align.data.load import only
from align.data.render import fit, pair_length, preference_row
from align.lean import lean_reading
from align.runs import Run
from align.sample import sft_model
from align.scorer import Scorer
from reward.elements import Labels
from reward.records import InputError, Record, prompt_id, read_jsonl, write_jsonl

Reading = Callable[[Any, Record], Record]  # a preference record's tokens, by tokenizer


def run_reward(config: Config, run: Run) -> dict[str, Any]:
    """Train the reward model and judge it; returns held-out accuracy with its 95 % interval and the verdict."""
    from transformers import set_seed

    from reward.training import reward_trainer

    section = config.reward
    read: Reading = preference_row
    encoder = False
    set_seed(config.seed)
    if section.base is None:
        base = sft_model(config)
        tokenizer = models.load_tokenizer(base, config.model)
        model = models.load_reward_base(base, config.model, heads=section.ensemble)
    else:
        other = config.model.model_copy(update={"base": section.base, "quantization": None})
        base = models.base_path(other)
        tokenizer = models.load_reward_tokenizer(base)
        model = models.load_reward_base(base, other, heads=section.ensemble)
        scorer = Scorer(model, tokenizer, section.base, max_length=section.max_length)
        read, encoder = scorer_rows(scorer), scorer.is_encoder
    train, test, summary = preference_rows(config, run, tokenizer, section.max_length, read)
    _check_margins(section.margin, train)
    ties = tied_rows(config, tokenizer, section.max_length, read) if section.ties != "ignore" else []

    with training.refused_settings(run.stage):
        trainer = reward_trainer(
            model,
            tokenizer,
            [*train, *ties],
            training.trainer_arguments(config, section, run),
            _adapter(config, model),
            Labels(
                margin=section.margin,
                group_pairs=section.group_pairs,
                disagreement=section.disagreement,
                label_smoothing=section.label_smoothing,
                ties=section.ties,
                ensemble=section.ensemble,
                seed=config.seed,
            ),
            encoder=encoder,
        )
    del model
    training.make_lean(section, run, trainer.model)
    whole_steps(trainer)
    closing = training.train(trainer, run)
    target = run.folder / "model"
    trainer.save_model(str(target))
    del trainer
    training.release()
    ranks.wait()
    if not ranks.is_first():
        return {}
    if section.ensemble > 1:
        reward_heads.split(target)

    with ranks.loading_whole():
        reader = Scorer(models.load_reward_model(str(target), config.model), tokenizer, "reward")
        if section.share_prefixes:
            lean_reading(reader.model)
        told = trust.examine(config, run, reader, train, test)
    return {
        **summary,
        **({"train_ties": len(ties)} if section.ties != "ignore" else {}),
        "train_loss": closing.get("train_loss"),
        **told,
    }


def _adapter(config: Config, model: Any) -> Any:
    """PEFT keeps what is in modules_to_save whole: what came from no file must be among it, or it is lost on reload."""
    section = config.reward.adapter
    if section is None:
        return None
    asked = (section.model_extra or {}).get("modules_to_save") or []
    return models.lora_config(section, "SEQ_CLS", modules_to_save=sorted({*asked, *model.fresh_modules}))


def _check_margins(wanted: bool, rows: Sequence[Record]) -> None:
    if not wanted:
        return
    if not all("margin" in row for row in rows):
        raise InputError("reward.margin is true, but the preferences carry no margins: set it to false.")
    wrong = [row["margin"] for row in rows if not 0 <= row["margin"] < float("inf")]
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(rows)} preferences have a margin out of range (the first is {wrong[0]}): a margin "
            "is a gap towards the chosen answer, 0 or more; mend the data or set reward.margin to false."
        )


def scorer_rows(scorer: Scorer) -> Reading:
    """The tokens of a record as a model on a base of its own reads them, split where the answer begins."""

    def read(_: Any, record: Record) -> Record:
        rows = {side: scorer.row(record["prompt"], record[side]) for side in ("chosen", "rejected")}
        borders = {side: scorer.border(record["prompt"], record[side]) for side in rows}
        cut = min(borders.values()) if len(set(borders.values())) == 1 else 0
        chosen, rejected = (rows[side]["input_ids"] for side in ("chosen", "rejected"))
        return {
            "prompt_ids": chosen[:cut],
            "chosen_ids": chosen[cut:],
            "rejected_ids": rejected[cut:],
            "prompt_key": prompt_id(record["prompt"]),
        }

    return read


def preference_rows(
    config: Config, run: Run, tokenizer: Any, max_length: int, read: Reading = preference_row
) -> tuple[list[Record], list[Record], dict[str, Any]]:
    """(train rows, test rows, counts): the label stage's preferences with their tokens, too long ones left out.

    Rows left out are counted, said, and written to dropped.jsonl.
    """
    records = read_jsonl(config.folder("label") / "preferences.jsonl")
    kept, too_long = _fitting(records, tokenizer, max_length, read, f"{run.stage}.max_length")
    if too_long:
        progress.say(f"  left out {len(too_long)} of {len(records)} pairs longer than max_length={max_length} tokens")
    if run.writer:
        reason = f"longer than max_length={max_length} tokens"
        write_jsonl(run.folder / "dropped.jsonl", [{"reason": reason, "record": record} for record in too_long])
    train, test = only("train", kept, "pairs"), only("test", kept, "pairs")
    progress.say(f"  {len(train)} pairs to train on, {len(test)} held out")
    return train, test, {"train_pairs": len(train), "left_out_too_long": len(too_long)}


def tied_rows(config: Config, tokenizer: Any, max_length: int, read: Reading = preference_row) -> list[Record]:
    """The training side's ties with their tokens; too long ones are left out and said."""
    path = config.folder("label") / "ties.jsonl"
    found = read_jsonl(path) if path.is_file() and path.stat().st_size else []
    ties = [
        {"prompt": tie["prompt"], "chosen": tie["answers"][0], "rejected": tie["answers"][1], "tied": True}
        for tie in found
        if tie["split"] == "train"
    ]
    kept, too_long = _fitting(ties, tokenizer, max_length, read, "reward.max_length")
    left = f", {len(too_long)} longer than max_length={max_length} left out" if too_long else ""
    progress.say(f"  {len(kept)} ties to train on{left}")
    return kept


def _fitting(
    records: list[Record], tokenizer: Any, max_length: int, read: Reading, key: str
) -> tuple[list[Record], list[Record]]:
    def length(record: Record) -> int:
        record |= read(tokenizer, record)
        return pair_length(record)

    return fit(records, length, max_length, "pairs", key)
