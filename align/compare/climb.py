"""Looking back on ppo: the reference, the policies kept along the way and the last answer the same held-out prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from align import progress, training
from align.compare.checkpoints import Point, course, points_along
from align.compare.contestants import Contestant, answers_of
from align.compare.judging import Answered, AnyReward, Judge, Judgement, PipelineReward
from align.compare.measuring import Measured, Reference, along
from align.compare.schema import OverOptimisation
from align.config import Config
from align.data.render import prompt_ids
from align.generate import Answer
from align.ppo.kept import kept_policies
from align.runs import Run
from reward.records import Record


@dataclass(frozen=True)
class LookedBack:
    """What is judged and measured along ppo's way: the first C of the compared prompts, answered by every point.

    Attributes:
        reference: what ppo started from, and KL is measured to.
        points: the reference, the policies kept, the last.
        known: by path, the names of the points that are compared anyway and have answered.
        given: by path, the answers of the other points.
        drawn: by name, further draws of the reference, for best-of-n.
    """

    reference: Reference
    points: list[Point]
    known: dict[str, str]
    given: dict[str, list[Answer]]
    drawn: dict[str, list[Answer]]
    prompts: list[Record]
    prompt_ids: list[list[int]]


def answers_along(
    config: Config, run: Run, found: Sequence[Contestant], seen: Answered, reference: Reference | None
) -> LookedBack | None:
    """The answers of the policies that ppo kept, to the first `compare.checkpoint_prompts` prompts; all processes must
    come here. None where ppo is not compared or kept no policy along the way."""
    section, folder = config.compare, config.folder("ppo")
    count = min(section.checkpoint_prompts, len(seen.prompts))
    compared = any(one.place == "ppo" for one in found)
    if not compared or not count or not kept_policies(folder) or reference is None:
        return None
    points = points_along(reference.name, reference.path, folder)
    known = {one.path: one.name for one in found if one.path in {point.path for point in points}}
    asked, tokenizer = seen.prompts[:count], reference.tokenizer

    def answers(path: str, label: str, seed: str = "") -> list[Answer]:
        return answers_of(config, run, Contestant(label, path, path, tokenizer), asked, label, seed)

    given = {p.path: answers(p.path, p.label) for p in points if p.path not in known}
    drawn = {f"draw {n}": answers(reference.path, f"draw-{n}", f" draw {n}") for n in range(section.best_of_n)}
    ids = [prompt_ids(tokenizer, record["prompt"]) for record in asked]
    return LookedBack(reference, points, known, given, drawn, asked, ids)


def over_optimisation(
    config: Config,
    back: LookedBack,
    judges: Sequence[Judge],
    seen: Answered,
    judgements: Mapping[str, Judgement],
    measured: Measured,
) -> OverOptimisation:
    """Reward against KL along ppo's run.

    The proxy is what ppo climbed, its rewards in their weights; the gold is the first judge that gives scores and that
    ppo did not climb. What the comparison has answered, judged and measured already (the reference, where it is
    compared, and the final policy) is not done again.
    """
    count, known, given, drawn = len(back.prompts), back.known, back.given, back.drawn
    # All answers at once, so that every judge is loaded once, for all of them.
    new = Answered(back.prompts, dict.fromkeys([*given, *drawn], back.prompt_ids), given | drawn)
    proxies, proxy_name = _climbed(config)

    def scores(judge: Judge) -> dict[str, list[float | None]]:
        """Of every point by its path, and of every draw."""
        told = judge.judge(new).scores
        before = judgements.get(judge.name) or judge.judge(_part(seen, known.values()))
        return told | {path: before.scores[name][:count] for path, name in known.items()}

    proxy: dict[str, np.ndarray] = {}
    for judge, weight in proxies:
        for name, each in scores(judge).items():
            # As in ppo, a reward that does not apply to an answer adds nothing.
            proxy[name] = proxy.get(name, 0) + weight * np.array([score or 0.0 for score in each])
    gold_name, gold = None, dict[str, list[float | None]]()
    for judge in judges:
        if judge.independent and judge.gives_scores and gold_name is None:
            told = scores(judge)
            if not any(None in each for each in told.values()):
                gold_name, gold = f"the {judge.name}", told
    whole = given | {path: seen.answers[name][:count] for path, name in known.items()} | drawn
    whose = {id(each): name for name, each in whole.items()}

    def kl(path: str, answers: list[Answer]) -> list[float]:
        rows = measured.answers[known[path]][:count] if path in known else []
        if not rows or any(row and row.kl is None for row in rows):
            pairs = [(p, a.ids) for p, a in zip(back.prompt_ids, answers, strict=True)]
            with progress.bar("compare: likelihoods along the way", count) as report:
                pad_id = back.reference.tokenizer.pad_token_id
                rows, model = along(config, path, pairs, pad_id, back.reference, report)
            del model
            training.release()
        return [0.0 if row is None else float(row.kl or 0.0) for row in rows]

    return course(
        back.points,
        lambda path, label: whole[path],
        lambda answers: [float(score) for score in proxy[whose[id(answers)]]],
        lambda answers: [score for score in gold.get(whose[id(answers)], []) if score is not None] or None,
        kl,
        proxy_name=proxy_name,
        gold_name=gold_name,
        seed=config.seed,
        drawn=[*drawn.values()],
    )


def _part(seen: Answered, names: Iterable[str]) -> Answered:
    """The answers of some models only."""
    kept = [*names]
    return Answered(seen.prompts, {n: seen.prompt_ids[n] for n in kept}, {n: seen.answers[n] for n in kept})


def _climbed(config: Config) -> tuple[list[tuple[Judge, float]], str]:
    """(what ppo climbed, with its weights; its name in a sentence)."""
    rewards = config.ppo.rewards
    weights = config.ppo.reward_weights or [1.0] * len(rewards)
    judges: list[Judge] = [
        PipelineReward(config, climbed=True) if reward == "reward" else AnyReward(reward, climbed=True)
        for reward in rewards
    ]
    name = f"the {judges[0].name}" if len(judges) == 1 else "the sum of ppo's rewards"
    return [*zip(judges, weights, strict=True)], name
