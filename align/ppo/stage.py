"""Stage 6, ppo: align the policy against the reward, on the training prompts, at bounded KL.

The folder's `model` is a PEFT adapter on the SFT model (or a whole model with `ppo.adapter: null`), with the value head
beside it; `policies/` holds those kept along the way, and `health.json` is what the run's figures say is wrong with it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback

from align import models, progress, ranks, training, trust
from align.config import Config
from align.data.load import load_demonstrations, only
from align.data.render import prompt_ids
from align.ppo.diagnosis import HEALTH, summary
from align.ppo.kept import KeepPolicies, updates_kept
from align.ppo.trainer import PPOTrainer
from align.runs import Run, free_space
from align.sample import fitting_prompts, gather_prompts, sft_model
from reward.records import InputError, write_json


def run_ppo(config: Config, run: Run) -> dict[str, Any]:
    """Train; returns score, KL and length at the beginning and at the end, and the findings of the last update.

    Raises:
        InputError: the reward model does not pass the gate of `align.trust`.
    """
    from transformers import set_seed

    section, base = config.ppo, sft_model(config)
    trusted = trust.pass_gate(config, section.rewards)
    tokenizer = models.load_tokenizer(base, config.model)
    records = only("train", gather_prompts(config), "prompts")
    kept, _ = fitting_prompts(run, tokenizer, records, section.max_prompt_length)
    set_seed(config.seed)
    with training.refused_settings(run.stage):
        arguments = training.trainer_arguments(
            config,
            section,
            run,
            logging_strategy="no",  # a record an update
            reward_aggregate=config.reward.aggregate,
            lcb_coefficient=config.reward.lcb_coefficient,
        )
        kept_after = updates_kept(section.keep_policies, arguments.num_updates) if section.keep_policies else []
        trainer = PPOTrainer(
            model=models.load_causal_lm(base, config.model),
            reward=[str(config.folder("reward") / "model") if r == "reward" else r for r in section.rewards],
            args=arguments,
            train_dataset=[_row(record) for record in kept],
            processing_class=tokenizer,
            ptx_dataset=_demonstrations(config, tokenizer) if section.ptx_coef > 0 else None,
            peft_config=models.lora_config(section.adapter, "CAUSAL_LM") if section.adapter else None,
        )
    trainer.tell = lambda sentence: progress.say(f"  ppo: {sentence}")
    trainer.add_callback(_Health(trainer, run))
    if kept_after:
        keep = KeepPolicies(trainer, run.folder, run.work, kept_after)
        free_space(run.folder, keep.bytes_wanted, f"ppo with keep_policies: {section.keep_policies}")
        trainer.add_callback(keep)
    progress.say(
        f"  {len(kept)} prompts; {arguments.num_updates} updates of {trainer.episodes} episodes, "
        f"{section.num_ppo_epochs} passes each"
    )
    training.train(trainer, run)
    trainer.save_model(str(run.folder / "model"))
    history, findings = trainer.history, trainer.findings
    del trainer
    training.release()
    ranks.wait()
    if not ranks.is_first():
        return {}
    quarter = max(1, len(history) // 4)
    outcome: dict[str, Any] = {"prompts": len(kept), "episodes": int(history[-1]["episodes"])}
    for name, key in (("score", "objective/score"), ("kl", "objective/kl"), ("length", "episode/length")):
        ends = {"first": history[:quarter], "last": history[-quarter:]}
        outcome[name] = {end: round(sum(u[key] for u in us) / len(us), 4) for end, us in ends.items()}
    told = [finding.sentence for finding in findings] or summary(findings)
    return {**outcome, "health": told, "reward_trust": trusted}


class _Health(TrainerCallback):
    """After every update: what the figures say is wrong, in health.json, and in metrics.jsonl whenever it changes."""

    def __init__(self, trainer: PPOTrainer, run: Run) -> None:
        self.trainer, self.run = trainer, run
        self.told: list[str] | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or "update" not in (logs or {}):
            return
        findings = self.trainer.findings
        write_json(
            self.run.folder / HEALTH,
            {
                "update": self.trainer.rollout_update,
                "summary": summary(findings),
                "findings": [{**asdict(finding), "sentence": finding.sentence} for finding in findings],
            },
        )
        sentences = [finding.sentence for finding in findings]
        if sentences != self.told and (sentences or self.told):
            self.run.metrics({"step": state.global_step, "update": self.trainer.rollout_update, "health": sentences})
        self.told = sentences


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """A prompt with the columns a reward function may ask for."""
    return {name: value for name, value in record.items() if name not in ("prompt_id", "split")}


def _demonstrations(config: Config, tokenizer: Any) -> list[dict[str, Any]]:
    """Those of the training side that fit into the length of an episode."""
    if config.data.demonstrations is None:
        raise InputError("ppo.ptx_coef mixes demonstrations in: set data.demonstrations.")
    loaded = load_demonstrations(config.data.demonstrations, config.data.test_share, config.data.max_rows)
    longest = config.ppo.max_prompt_length + config.ppo.response_length
    rows = only("train", loaded.records, "demonstrations")
    fitting = [r for r in rows if len(prompt_ids(tokenizer, [*r["prompt"], *r["completion"]])) <= longest]
    if len(fitting) < len(rows):
        progress.say(f"  left out {len(rows) - len(fitting)} demonstrations longer than {longest} tokens")
    return fitting
