"""Looking back on ppo: the reference, the policies kept along the way and the last answer the same held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align import models, progress, training
from align.compare.checkpoints import course, points_along
from align.compare.contestants import Contestant, answers_of
from align.compare.judging import Answered, AnyReward, Judge, PipelineReward
from align.compare.likelihoods import ADAPTER_OFF, answer_figures
from align.compare.schema import OverOptimisation
from align.config import Config
from align.data.render import prompt_ids
from align.generate import Answer
from align.logprobs import Pair
from align.ppo.kept import kept_policies
from align.runs import Run
from align.sample import sft_model
from reward.records import Record


def over_optimisation(
    config: Config, run: Run, found: Sequence[Contestant], prompts: Sequence[Record], judges: Sequence[Judge]
) -> OverOptimisation | None:
    """Reward against KL along ppo's run, on the first `compare.checkpoint_prompts` prompts.

    The proxy is what ppo climbed, its rewards in their weights; the gold is the first judge that gives scores and that
    ppo did not climb. None where ppo kept no policy along the way.
    """
    section, folder = config.compare, config.folder("ppo")
    asked = [*prompts[: section.checkpoint_prompts]]
    if not asked or not kept_policies(folder):
        return None
    tokenizer = next(one.tokenizer for one in found if one.place == "ppo")
    base, name = sft_model(config), "sft" if "sft" in config.stages else "base"
    points = points_along(name, base, folder)

    def answers(path: str, label: str, seed: str = "") -> list[Answer]:
        return answers_of(config, run, Contestant(label, path, path, tokenizer), asked, label, seed)

    # All answers first, so that every judge is loaded once, for all of them.
    given = {point.path: answers(point.path, point.label) for point in points}
    drawn = {f"draw {n}": answers(base, f"draw-{n}", f" draw {n}") for n in range(section.best_of_n)}
    ids = [prompt_ids(tokenizer, record["prompt"]) for record in asked]
    seen = Answered(asked, dict.fromkeys([*given, *drawn], ids), given | drawn)
    proxy_name, proxy = _proxy(config, seen)
    gold_name, gold = _gold(judges, seen)
    whose = {id(answers): name for name, answers in seen.answers.items()}

    def kl(path: str, answers: list[Answer]) -> list[float]:
        return _kl(config, path, base, [(p, a.ids) for p, a in zip(ids, answers, strict=True)], tokenizer.pad_token_id)

    return course(
        points,
        lambda path, label: given[path],
        lambda answers: proxy[whose[id(answers)]],
        lambda answers: gold.get(whose[id(answers)]),
        kl,
        proxy_name=proxy_name,
        gold_name=gold_name,
        seed=config.seed,
        drawn=[*drawn.values()],
    )


def _proxy(config: Config, seen: Answered) -> tuple[str, dict[str, list[float]]]:
    """(its name, every answer's score by what ppo climbed)."""
    rewards = config.ppo.rewards
    weights = config.ppo.reward_weights or [1.0] * len(rewards)
    judges: list[Judge] = [
        PipelineReward(config, climbed=True) if reward == "reward" else AnyReward(reward, climbed=True)
        for reward in rewards
    ]
    total = {name: np.zeros(len(seen.prompts)) for name in seen.answers}
    for judge, weight in zip(judges, weights, strict=True):
        for name, scores in judge.judge(seen).scores.items():
            # As in ppo, a reward that does not apply to an answer adds nothing.
            total[name] += weight * np.array([0.0 if score is None else score for score in scores])
    name = f"the {judges[0].name}" if len(judges) == 1 else "the sum of ppo's rewards"
    return name, {each: scores.tolist() for each, scores in total.items()}


def _gold(judges: Sequence[Judge], seen: Answered) -> tuple[str | None, dict[str, list[float]]]:
    """(name, scores) of the first judge that gives every answer a score and that ppo never saw; (None, {}) without."""
    for judge in judges:
        if judge.independent and judge.gives_scores:
            scores = judge.judge(seen).scores
            whole = {name: [s for s in told if s is not None] for name, told in scores.items()}
            if all(len(told) == len(seen.prompts) for told in whole.values()):
                return f"the {judge.name}", whole
    return None, {}


def _kl(config: Config, path: str, base: str, pairs: Sequence[Pair], pad_id: int) -> list[float]:
    """Exact nats per answer to the reference; 0 for an empty one."""
    model = models.load_policy(path, config.model)
    reference = ADAPTER_OFF if hasattr(model, "peft_config") else models.load_causal_lm(base, config.model)
    kept = [pair for pair in pairs if pair[1]]
    with progress.bar("compare: likelihoods along the way", len(kept)) as report:
        found = iter(answer_figures(model, reference, kept, pad_id, on_progress=report))
    del model, reference
    training.release()
    return [float(next(found).kl or 0.0) if pair[1] else 0.0 for pair in pairs]
