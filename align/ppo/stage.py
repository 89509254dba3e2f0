"""Stage 6, ppo: align the policy against the reward model, on the training prompts, at bounded KL.

The folder's `model` is a PEFT adapter on the SFT model (or a whole model with `ppo.adapter: null`), with the value head
beside it.
"""

from __future__ import annotations

from typing import Any

from align import models, progress, ranks, training
from align.config import Config
from align.data.load import only
from align.data.render import prompt_ids
from align.runs import Run
from align.sample import fitting_prompts, gather_prompts, sft_model
from reward.records import read_jsonl


def run_ppo(config: Config, run: Run) -> dict[str, Any]:
    """Train; returns score, KL and length at the beginning and at the end."""
    from transformers import set_seed

    from align.ppo.cast import build_cast
    from align.ppo.trainer import PPOTrainer

    section, base = config.ppo, sft_model(config)
    tokenizer = models.load_tokenizer(base, config.model)
    records = only("train", gather_prompts(config), "prompts")
    kept, _ = fitting_prompts(run, tokenizer, records, section.max_prompt_length)
    set_seed(config.seed)
    with training.refused_settings(run.stage):
        cast = build_cast(config, base, config.folder("reward") / "model")
        arguments = training.trainer_arguments(config, section, run)
        trainer = PPOTrainer(cast, arguments, [prompt_ids(tokenizer, record["prompt"]) for record in kept], tokenizer)
    progress.say(
        f"  {len(kept)} prompts; {arguments.num_updates} updates of {trainer.episodes} episodes, "
        f"{section.num_ppo_epochs} passes each"
    )
    training.train(trainer, run)
    trainer.save_model(str(run.folder / "model"))
    del trainer, cast
    training.release()
    ranks.wait()
    if not ranks.is_first():
        return {}
    # The last line of a step wins: a step that was done again after a kill has two.
    lines = {line["step"]: line for line in read_jsonl(run.folder / "metrics.jsonl") if "objective/kl" in line}
    updates = [lines[step] for step in sorted(lines)]
    quarter = max(1, len(updates) // 4)
    summary: dict[str, Any] = {
        "prompts": len(kept),
        "episodes": arguments.num_updates * arguments.local_episodes * ranks.world_size(),
    }
    for name, key in (("score", "objective/score"), ("kl", "objective/kl"), ("length", "episode/length")):
        ends = {"first": updates[:quarter], "last": updates[-quarter:]}
        summary[name] = {end: round(sum(u[key] for u in us) / len(us), 4) for end, us in ends.items()}
    return summary
