"""The trust report of a reward model, and the gate that ppo passes through.

What is measured and what it means stands in `reward.trust`; here are the model, the run folder and the refusal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align import progress
from align.config import Config
from align.runs import Run
from align.scorer import Scorer
from reward import trust
from reward.records import InputError, Message, Record, answer_text, prompt_id, write_jsonl
from reward.scoring import RewardScores, head_scores

REPORT = "trust.json"


def examine(config: Config, run: Run, reader: Scorer, train: list[Record], test: list[Record]) -> dict[str, Any]:
    """Score what was held out, write held_out_scores.jsonl, trust.json and trust.html; returns the headline figures."""
    scores = _Scores(reader, config.reward.per_device_eval_batch_size)
    prompts = [row["prompt"] for row in test] * 2
    answers = [answer_text(row[side]) for side in ("chosen", "rejected") for row in test]
    with progress.bar("reward: held-out pairs", len(prompts)) as report:
        scores.report = report
        found = scores(prompts, answers)
    write_jsonl(
        run.folder / "held_out_scores.jsonl",
        [
            {
                "comparison_id": row["comparison_id"],
                "chosen_reward": found.mean[i],
                "rejected_reward": found.mean[i + len(test)],
                "chosen_std": found.std[i],
                "rejected_std": found.std[i + len(test)],
            }
            for i, row in enumerate(test)
        ],
    )
    scores.report = lambda done: None
    with progress.bar("reward: trust report", 100) as report:
        figures = trust.assess(
            train,
            test,
            scores,
            seed=config.seed,
            probed=config.reward.probed,
            fits=scores.fits,
            on_progress=lambda done, total: report(100 * done // max(total, 1)),
        )
    checks = trust.judge(figures, gate_of(config))
    trust.write_report(run.folder, figures, checks)
    sentence = trust.verdict(figures, checks)
    progress.say(f"  {sentence}")
    progress.say(f"  report: {run.folder / 'trust.html'}")
    return {
        "held_out_pairs": len(test),
        "held_out_accuracy": {
            "rate": figures["accuracy"]["mean"],
            "low": figures["accuracy"]["low"],
            "high": figures["accuracy"]["high"],
            "n": len(test),
        },
        "held_out_margin": float(np.mean(found.mean[: len(test)] - found.mean[len(test) :])),
        "trusted": not trust.refusals(checks),
        "verdict": sentence,
    }


def gate_of(config: Config) -> trust.Gate:
    """The thresholds of the config."""
    gate = config.reward.gate.model_dump()
    return trust.Gate(**gate | {"forgiven_probes": tuple(gate["forgiven_probes"])})


def pass_gate(config: Config, rewards: Sequence[str]) -> list[str]:
    """Let ppo climb these reward models, or refuse; returns what later reports must say of them.

    Only a reward model with a trust report beside its `model` folder can be judged; of another, that is said.

    Args:
        rewards: folders of reward models, names and functions, as ppo.rewards has them.

    Raises:
        InputError: a reward model fails a check and `reward.trust` is not "ignore"; names each with its figure.
    """
    said = []
    for reward in rewards:
        path = (config.folder("reward") if reward == "reward" else Path(reward).parent) / REPORT
        if not path.is_file():
            if reward == "reward":
                raise InputError(f"{path} is missing: run `align reward` again with --force, it writes the report.")
            if Path(reward).is_dir():
                said.append(f"The reward model {reward} has no trust report: nothing is known of its worth.")
            continue
        try:
            checks = trust.judge(json.loads(path.read_text("utf-8"))["figures"], gate_of(config))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is damaged: run the reward stage again with --force, it writes it anew."
            ) from None
        failed = trust.refusals(checks)
        if not failed:
            continue
        reasons = ", ".join(_short(check) for check in failed)
        which = "the reward model" if reward == "reward" else f"the reward model {reward}"
        count = "1 check" if len(failed) == 1 else f"{len(failed)} checks"
        if config.reward.trust != "ignore":
            raise InputError(
                f"{which} fails {count} of its trust report, so ppo would climb what it got wrong: {reasons}. "
                f"{path.with_suffix('.html')} says what that means. Train it on more or better labels, relax "
                "reward.gate if a threshold is wrong for your data, or set reward.trust: ignore, which every later "
                "report will say."
            )
        said.append(
            f"{which[0].upper()}{which[1:]} that ppo climbed failed {count} of its trust report, which "
            f"reward.trust: ignore let pass: {reasons}."
        )
    return said


def _short(check: trust.Check) -> str:
    """A failed check with its figure, as part of a list."""
    figure = "not measured" if check.figure is None else f"{check.figure:.2f}"
    return f"{check.name} {figure} (threshold {check.threshold:g})"


class _Scores:
    """`reward.scoring.score` that scores nothing twice."""

    def __init__(self, reader: Scorer, batch_size: int) -> None:
        self.reader, self.batch_size = reader, batch_size
        self.report: Any = lambda done: None
        self.known: dict[tuple[str, str], np.ndarray[Any, Any]] = {}

    def __call__(self, prompts: Sequence[list[Message]], answers: Sequence[str]) -> RewardScores:
        keys = [(prompt_id(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
        new = {key: place for place, key in enumerate(keys) if key not in self.known}
        rows = self.reader.rows([prompts[i] for i in new.values()], [answers[i] for i in new.values()])
        heads_NM = head_scores(
            self.reader.model,
            rows,
            self.reader.pad_id,
            batch_size=self.batch_size,
            groups=[prompt for prompt, _ in new],
            on_progress=self.report,
        )
        self.known |= dict(zip(new, heads_NM, strict=True))
        return RewardScores.of(np.stack([self.known[key] for key in keys]))

    def fits(self, prompt: list[Message], answer: str) -> bool:
        """Whether the model has places for this answer."""
        limit = self.reader.max_length
        return limit is None or len(self.reader.row(prompt, answer)["input_ids"]) <= limit
