"""What the report says in words and shows side by side: notices, the judges' reliability, verdicts, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.compare import contestants as who
from align.compare import verdict
from align.compare.contestants import Contestant
from align.compare.judging import Answered, Judge, Judgement, judge_names
from align.compare.people import People
from align.compare.schema import Example, ModelFigures
from align.compare.schema import Judge as JudgeFigures
from align.compare.statistics import Estimate, WinRate, verdict_sentence
from align.config import Config
from align.runs import read_info
from reward.records import prompt_text


def notices_of_pipeline(config: Config, has_ppo: bool) -> list[str]:
    """What the pipeline's own stages say that a reader must know."""
    said = []
    if config.label.source == "simulated" and "label" in config.stages:
        said.append(
            "These labels are simulated: a program with a documented taste stood in for people. The figures show that "
            "the pipeline works, not that people prefer a model."
        )
    if has_ppo:
        said += _summary(config, "ppo").get("reward_trust", [])
    if "reward" in judge_names(config) and not _summary(config, "reward").get("trusted", True):
        said.append(
            "The reward model, a judge here, failed its own trust report: what it prefers says little about the models."
        )
    return said


def notices(
    config: Config,
    found: Sequence[Contestant],
    judges: Sequence[Judge],
    seen: Answered,
    judgements: Mapping[str, Judgement],
) -> list[str]:
    """What a reader must know before believing a figure."""
    said = notices_of_pipeline(config, any(one.place == "ppo" for one in found))
    count = len(seen.prompts)
    if count < verdict.FEW_PROMPTS:
        said.append(
            f"There are only {count} prompts: nothing but a huge difference could be seen. Compare on at least "
            f"{verdict.FEW_PROMPTS}, better 200."
        )
    if not any(judge.independent for judge in judges):
        said.append(
            "No judge is independent of ppo: all of them are what it was trained on. Ask people, or a judge that ppo "
            "has not seen, before shipping ppo."
        )
    said += who.differences(found)
    for one in found:
        empty = sum(not answer.text.strip() for answer in seen.answers[one.name])
        if empty:
            which = "Every answer" if empty == count else f"{empty} of {count} answers"
            said.append(f"{which} of {one.name} {'is' if empty in (1, count) else 'are'} empty.")
        if one.trained_on is None and one.given is None:
            said.append(f"What {one.name} was trained on is not known here: prompts it has seen could not be left out.")
    for judge in judges:
        told = judgements[judge.name]
        if told.asked and told.failed > told.asked / 10:
            said.append(
                f"The {judge.name} gave no usable answer to {told.failed} of {told.asked} questions: its figures rest "
                "on the others."
            )
    return said


def _summary(config: Config, stage: str) -> dict[str, Any]:
    summary: dict[str, Any] = (read_info(config.folder(stage)) or {}).get("summary", {})
    return summary


def judge_figures(judges: Sequence[Judge], judgements: Mapping[str, Judgement]) -> list[JudgeFigures]:
    """What is known of every judge's reliability."""
    voted = judgements.get(People.name)
    found: list[JudgeFigures] = []
    for judge in judges:
        told = judgements[judge.name]
        figures: JudgeFigures = {
            "name": judge.name,
            "description": judge.description,
            "independent": judge.independent,
            "sentences": [],
        }
        if told.asked:
            figures |= {"asked": told.asked, "failed": told.failed}
        if bias := verdict.bias_of(told):
            figures["bias"] = bias
        agrees = verdict.agreement(told, voted, "people") if voted and told is not voted else None
        if agrees:
            figures["agreement"] = agrees
        if judge.trust:
            figures["trust"] = judge.trust
        figures["sentences"] = verdict.reliability(told, bias, agrees)
        if told.votes:
            votes = sum(told.votes.values())
            figures["sentences"].append(f"{votes} votes were cast on {len(told.votes)} models' pairs.")
        found.append(figures)
    return found


def sentences(judge: str, figures: Sequence[ModelFigures], equal: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    """The verdict on every model by the judge that is told first."""
    base, said = figures[0], []
    for figure in figures[1:]:
        name, kl, length = figure["name"], figure["kl"], figure["length"]
        won = figure.get("win_rate", {}).get(judge)
        if won is None:
            said.append(f"It is not known whether {name} is better than {base['name']}: the {judge} gave no verdict.")
            continue
        win = WinRate(won["rate"], won["low"], won["high"], won["wins"], won["ties"], won["losses"], won["n"])
        ratio = (
            length["mean"] / base["length"]["mean"] if length and base["length"] and base["length"]["mean"] else None
        )
        moved = kl["mean"] if kl else None
        said.append(verdict_sentence(name, base["name"], win, f"the {judge}", moved, ratio, equal[name].get(judge)))
    return said


def examples(seen: Answered, judgements: Mapping[str, Judgement], judge: str, count: int) -> list[Example]:
    """The first `count` prompts with their answers, the worst regressions first."""
    scores = judgements[judge].scores
    margins = {
        name: [(mine or 0.0) - (base or 0.0) for mine, base in zip(scores[name], scores[seen.first], strict=True)]
        for name in seen.others
        if name in scores
    }
    order = verdict.worst_first(judgements[judge].outcomes, margins)
    return [
        {
            "prompt": prompt_text(seen.prompts[number]["prompt"]),
            "answers": [
                {
                    "model": name,
                    "text": answers[number].text,
                    "scores": {
                        by: round(score, 3)
                        for by, told in judgements.items()
                        if name in told.scores and (score := told.scores[name][number]) is not None
                    },
                    "outcomes": {
                        by: outcome
                        for by, told in judgements.items()
                        if name in told.outcomes and (outcome := told.outcomes[name][number]) is not None
                    },
                }
                for name, answers in seen.answers.items()
            ],
        }
        for number in order[:count]
    ]
