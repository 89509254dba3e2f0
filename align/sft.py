"""Stage 1, sft: teach the base to answer, on demonstrations, with the loss on answer tokens only.

The adapter is merged into the base at the end: the folder's `model` is a whole model in Hugging Face layout, and every
later stage stands on it. With `sft.adapter: null` every weight is trained. On a quantised base the adapter is not
merged: the folder's `model` is the adapter, and later stages stand on the two (`align.quantised`).
"""

from __future__ import annotations

import math
import shutil
from typing import Any

from align import models, progress, ranks, training
from align.batches import whole_steps
from align.config import Config
from align.data.load import load_demonstrations, only
from align.data.render import answer_ids, demonstration_row, fit, prompt_ids
from align.heads import lean_head
from align.logprobs import Pair, answer_logprobs
from align.quantised import no_plain_lora
from align.runs import Run, free_space
from reward.records import InputError, Record, write_jsonl


def run_sft(config: Config, run: Run) -> dict[str, Any]:
    """Fine-tune, save; returns held-out loss (nats per answer token) and perplexity before and after."""
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTTrainer

    section = config.sft
    if config.data.demonstrations is None:
        raise InputError("sft needs data.demonstrations: the path of a JSONL file of prompts with good answers.")
    loaded = load_demonstrations(config.data.demonstrations, config.data.test_share, config.data.max_rows)
    progress.say(f"  demonstrations: {loaded.sentence()}")
    base = models.base_path(config.model)
    merges = section.adapter is not None and config.model.quantization is None
    free_space(run.folder, 0 if config.model.quantization else 3 * models.checkpoint_bytes(base), "sft")
    tokenizer = models.load_tokenizer(base, config.model)

    def length(record: Record) -> int:
        record["_row"] = demonstration_row(tokenizer, record)
        return len(record["_row"]["input_ids"])

    kept, too_long = fit(loaded.records, length, section.max_length, "demonstrations", "sft.max_length")
    for record in too_long:
        loaded.drop(
            {k: v for k, v in record.items() if k != "_row"}, f"longer than max_length={section.max_length} tokens"
        )
    if too_long:
        progress.say(f"  left out {len(too_long)} demonstrations longer than max_length={section.max_length} tokens")
    if run.writer:
        write_jsonl(run.folder / "dropped.jsonl", loaded.dropped)
    train = only("train", kept, "demonstrations")
    held_out: list[Pair] = [
        (prompt_ids(tokenizer, r["prompt"]), answer_ids(tokenizer, r["prompt"], r["completion"]))
        for r in kept
        if r["split"] == "test"
    ]

    set_seed(config.seed)
    model = models.load_causal_lm(base, config.model)
    before = held_out_loss(model, held_out, tokenizer.pad_token_id, "before") if ranks.is_first() else math.nan
    ranks.wait()
    with training.refused_settings(run.stage):
        trainer = SFTTrainer(
            model=model,
            args=training.trainer_arguments(config, section, run),
            train_dataset=Dataset.from_list([record["_row"] for record in train]),
            processing_class=tokenizer,
            peft_config=models.lora_config(section.adapter, "CAUSAL_LM") if section.adapter else None,
        )
    if config.model.quantization and (reason := no_plain_lora(trainer.model)):
        raise InputError(
            f"sft: {reason}, but on a quantised base the adapter stays below later ones: keep to plain LoRA on linear "
            "layers in sft.adapter, or leave model.quantization out."
        )
    lean_head(trainer.model)
    training.make_lean(section, run, trainer.model)
    whole_steps(trainer)
    closing = training.train(trainer, run)

    # The merged model is built from what was saved, not from what is in memory: under ZeRO no process holds it whole.
    target = run.folder / "model"
    trainer.save_model(str(run.work / "trained" if merges else target))
    del trainer, model
    training.release()
    ranks.wait()
    after = math.nan
    if ranks.is_first():
        with ranks.loading_whole():  # alone: under ZeRO-3 a model is else split among all as it is loaded
            if merges:
                from peft import PeftModel

                model = PeftModel.from_pretrained(models.load_causal_lm(base, config.model), str(run.work / "trained"))
                if target.exists():
                    shutil.rmtree(target)
                model = models.merged(model)
                # Sequence classifiers find the last token by the config's padding token; it has to be the tokenizer's.
                model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
                model.generation_config.pad_token_id = tokenizer.pad_token_id
                model.save_pretrained(target)
            else:
                model = models.load_policy(str(target), config.model)
            tokenizer.save_pretrained(target)
            after = held_out_loss(model, held_out, tokenizer.pad_token_id, "after")
    ranks.wait()
    return {
        "data": loaded.counts(),
        "train_loss": closing.get("train_loss"),
        "held_out_rows": len(held_out),
        "held_out_loss": {"before": _figure(before), "after": _figure(after)},
        "held_out_perplexity": {"before": _figure(math.exp(before)), "after": _figure(math.exp(after))},
    }


def held_out_loss(model: Any, pairs: list[Pair], pad_id: int, when: str) -> float:
    """Mean negative log-probability in nats per answer token; nan without held-out pairs."""
    if not pairs:
        return math.nan
    with progress.bar(f"sft: held-out loss {when}", len(pairs)) as report:
        logprobs = answer_logprobs(model, pairs, pad_id, on_progress=report)
    return -sum(float(row.sum()) for row in logprobs) / sum(len(row) for row in logprobs)


def _figure(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
