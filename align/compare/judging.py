"""The judges behind one interface: whoever prefers one model's answer to another's.

A judge sees the prompts and every model's answers, and says of each model but the first, prompt by prompt, whether its
answer is preferred to the first model's. Some give every answer a score, and the higher one wins; some are shown two
answers and choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from align import models, progress, training
from align.compare.contestants import Contestant
from align.compare.llm_judge import LlmJudge, Shown, both_orders, fold
from align.config import Config
from align.generate import Answer
from align.lean import lean_reading
from align.ppo.rewards import Episodes, FunctionReward, as_reward
from align.runs import Run, read_info
from align.score import model_place
from align.scorer import Scorer
from labeling_ui.panel import HiddenPreference, preferred
from reward.records import InputError, Record, prompt_text

NAMED = ("simulated", "reward", "llm", "people")
# Columns that every prompt has: the rest is what a function may ask for.
OWN_COLUMNS = ("prompt", "prompt_id", "split")


@dataclass(frozen=True)
class Answered:
    """What is judged: P prompts, and the P answers of every model, by name; the first model is the one to beat."""

    prompts: list[Record]
    prompt_ids: dict[str, list[list[int]]]  # by model, by its own tokenizer; of a file of answers, empty lists
    answers: dict[str, list[Answer]]

    @property
    def first(self) -> str:
        return next(iter(self.answers))

    @property
    def others(self) -> list[str]:
        return [*self.answers][1:]

    @property
    def texts(self) -> list[str]:
        """The prompts as text."""
        return [prompt_text(record["prompt"]) for record in self.prompts]


@dataclass
class Judgement:
    """What a judge said.

    outcomes: by model other than the first, for every prompt 1 (preferred to the first model's answer), 0.5, 0, or
        None where there is no verdict.
    scores: by model, for every answer; only of a judge that gives scores.
    orders: by model, its outcomes where it was shown first and where second; only of a judge that sees both orders.
    asked, failed: questions put to a judge that can fail, and those without a usable answer.
    votes: by model, how many votes there are; only of people.
    """

    outcomes: dict[str, list[float | None]]
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    orders: dict[str, tuple[list[float | None], list[float | None]]] = field(default_factory=dict)
    asked: int = 0
    failed: int = 0
    votes: dict[str, int] = field(default_factory=dict)


class Judge(Protocol):
    """Whoever compares answers.

    name: as it reads after "by the": "reward model".
    independent: no compared model was optimised against its opinion.
    gives_scores: it scores every answer by itself, and needs no other beside it.
    trust: a sentence on what is known of its worth from elsewhere.
    """

    name: str
    description: str
    independent: bool
    gives_scores: bool
    trust: str | None

    def judge(self, seen: Answered) -> Judgement: ...


def by_scores(scores: dict[str, list[float | None]]) -> Judgement:
    """The higher score wins; equal ones tie; None where either answer has none."""
    first, *others = scores
    outcomes = {
        name: [_beats(mine, other) for mine, other in zip(scores[name], scores[first], strict=True)] for name in others
    }
    return Judgement(outcomes, scores)


def _beats(mine: float | None, other: float | None) -> float | None:
    if mine is None or other is None:
        return None
    return 0.5 if mine == other else float(mine > other)


class Simulated:
    """The hidden preference behind simulated labels, without the panel's noise."""

    name = "simulated preference"
    description = "The hidden preference of the simulated panel, without its noise: a documented formula, not people."
    independent = gives_scores = True
    trust: str | None = None

    def judge(self, seen: Answered) -> Judgement:
        taste, texts = HiddenPreference(), seen.texts
        scores: dict[str, list[float | None]] = {
            name: [taste.utility(text, answer.text) for text, answer in zip(texts, answers, strict=True)]
            for name, answers in seen.answers.items()
        }
        told: dict[str, list[float | None]] = {
            name: [
                preferred(taste, text, mine.text, other.text)
                for text, mine, other in zip(texts, seen.answers[name], seen.answers[seen.first], strict=True)
            ]
            for name in seen.others
        }
        return Judgement(told, scores)


class PipelineReward:
    """The pipeline's own reward model, on the policies' own tokens where it reads those."""

    name = "reward model"
    gives_scores = True

    def __init__(self, config: Config, climbed: bool) -> None:
        self.config, self.independent = config, not climbed
        self.description = "The pipeline's own reward model: the higher score wins." + (
            " It is what ppo was trained to please, so its opinion of ppo is not independent." if climbed else ""
        )
        summary = (read_info(config.folder("reward")) or {}).get("summary", {})
        self.trust: str | None = summary.get("verdict")

    def judge(self, seen: Answered) -> Judgement:
        from reward.scoring import score, score_rows

        folder = str(self.config.folder("reward") / "model")
        model = models.load_reward_model(folder, self.config.model)
        lean_reading(model)
        reader = Scorer(model, models.load_reward_tokenizer(folder), "reward")
        # All models' answers to a prompt in a row: what they share, the prompt, is computed once.
        names = list(seen.answers)
        shown = [(place, name, seen.answers[name][place]) for place in range(len(seen.prompts)) for name in names]
        whole = [seen.prompt_ids[name][place] + answer.ids for place, name, answer in shown]
        found: Sequence[float]
        with progress.bar("compare: reward", len(shown)) as report:
            if self.config.reward.base or not all(whole):
                conversations = [seen.prompts[place]["prompt"] for place, _, _ in shown]
                texts, finished = ([getattr(answer, key) for _, _, answer in shown] for key in ("text", "finished"))
                found = score(reader, conversations, texts, finished=finished, on_progress=report).mean.tolist()
            else:
                groups, pad_id = [place for place, _, _ in shown], reader.tokenizer.pad_token_id
                found = score_rows(model, whole, pad_id, groups=groups, on_progress=report)
        scores: dict[str, list[float | None]] = {
            name: [*found[number :: len(names)]] for number, name in enumerate(names)
        }
        del model, reader
        training.release()
        return by_scores(scores)


class AnyReward:
    """Any other reward: a function, or a reward model from elsewhere. Held out where ppo did not climb it."""

    gives_scores = True

    def __init__(self, place: str, climbed: bool) -> None:
        self.independent = not climbed
        self.trust: str | None = None
        path = Path(place)
        self.place = model_place(place) if path.is_dir() else place
        is_function = ":" in place and not path.exists()
        # A function is looked up at once, so that a misspelt one is said before anything is generated; a model is
        # loaded when its turn comes, and is not in memory beside the ones that answer.
        own = path.resolve().parent if path.name == "model" else path  # a stage's model is called by its stage
        name = as_reward(place).name if is_function else own.name
        self.name = f"{'' if climbed else 'held-out '}{'check' if is_function else 'reward'} {name}"
        if not is_function and (path.is_absolute() or place.startswith((".", "~"))) and not path.is_dir():
            raise InputError(
                f"compare.judges: {place} is no judge: give {', '.join(NAMED)}, package.module:function, or the folder "
                "or hub id of a reward model."
            )
        self.description = f"{place}: the higher score wins. " + (
            "It is what ppo was trained to please, so its opinion of ppo is not independent."
            if climbed
            else "No model of this pipeline was optimised against it."
        )

    def judge(self, seen: Answered) -> Judgement:
        reward = as_reward(self.place)
        names = {name for record in seen.prompts for name in record} - set(OWN_COLUMNS)
        columns = {name: [record.get(name) for record in seen.prompts] for name in sorted(names)}
        if isinstance(reward, FunctionReward):
            reward.check(columns)
        scores = {}
        with progress.bar(f"compare: {self.name}", len(seen.answers)) as report:
            for number, (name, answers) in enumerate(seen.answers.items()):
                scores[name] = reward(
                    Episodes(
                        prompts=[record["prompt"] for record in seen.prompts],
                        completions=[[{"role": "assistant", "content": answer.text}] for answer in answers],
                        prompt_ids=seen.prompt_ids[name],
                        completion_ids=[answer.ids for answer in answers],
                        finished=[answer.finished for answer in answers],
                        columns=columns,
                    )
                )
                report(number + 1)
        del reward
        training.release()
        return by_scores(scores)


class Llm:
    """A language model that is shown every pair in both orders."""

    independent, gives_scores = True, False
    trust: str | None = None

    def __init__(self, config: Config, run: Run) -> None:
        if config.compare.llm is None:
            raise InputError("compare.judges names llm: say which model it is with compare.llm.model.")
        self.asking = LlmJudge(config.compare.llm, run.folder / "llm_verdicts.jsonl", seed=config.seed)
        self.name = self.asking.name
        self.description = (
            f"{config.compare.llm.model} is shown each pair of answers in both orders. An answer wins only if it is "
            "preferred in both; where the orders disagree it is a tie."
        )

    def judge(self, seen: Answered) -> Judgement:
        texts = seen.texts
        questions: list[Shown] = []
        for name in seen.others:
            mine, base = ([answer.text for answer in seen.answers[who]] for who in (name, seen.first))
            questions += both_orders(texts, mine, base)
        with progress.bar(f"compare: {self.name}", len(questions)) as report:
            verdicts = self.asking.compare(questions, on_progress=report)
        if self.asking.failed:
            progress.say(
                f"  compare: {self.asking.failed} of {self.asking.asked} questions got no usable answer from the "
                f"{self.name} ({self.asking.why})"
            )
        self.asking.close()
        size = 2 * len(texts)
        found = Judgement({}, asked=self.asking.asked, failed=self.asking.failed)
        for number, name in enumerate(seen.others):
            outcome, forward, backward = fold(verdicts[number * size : (number + 1) * size])
            found.outcomes[name], found.orders[name] = outcome, (forward, backward)
        training.release()
        return found


def judges_of(config: Config, run: Run, found: Sequence[Contestant]) -> list[Judge]:
    """The judges of the config, or those that fit it: the first is told first.

    Raises:
        InputError: a judge is asked for that this pipeline does not have, or there is none.
    """
    from align.compare.people import People

    names = judge_names(config)
    climbed = {spec for spec in config.ppo.rewards if any(one.place == "ppo" for one in found)}
    make: dict[str, Callable[[], Judge]] = {
        "simulated": Simulated,
        "reward": lambda: PipelineReward(config, "reward" in climbed),
        "llm": lambda: Llm(config, run),
        "people": lambda: People(config),
    }
    judges = [make[name]() if name in make else AnyReward(name, name in climbed) for name in names]
    for number, judge in enumerate(judges):
        if judge.name in {other.name for other in judges[:number]}:
            judge.name = f"{judge.name} ({number + 1})"
    return judges


def judge_names(config: Config) -> list[str]:
    """`compare.judges`, or those that fit the pipeline.

    Raises:
        InputError: a judge is asked for that this pipeline does not have, one is named twice, or there is none.
    """
    simulated, reward = config.label.source == "simulated" and "label" in config.stages, "reward" in config.stages
    if config.compare.judges is None:
        names = [*(["simulated"] if simulated else []), *(["reward"] if reward else [])]
        names += ["llm"] if config.compare.llm else []
    else:
        names = [*config.compare.judges]
    if "reward" in names and not reward:
        raise InputError(
            "compare.judges names reward, but the stages have no reward model: add `reward` to stages, or name the "
            "folder of a reward model."
        )
    if "simulated" in names and not simulated:
        raise InputError("compare.judges names simulated, but no label of this pipeline is simulated: use reward.")
    if len(set(names)) < len(names):
        raise InputError(f"compare.judges is {', '.join(names)}: name each judge once.")
    if not names:
        raise InputError(
            "compare has no judge: set compare.judges to people, llm, package.module:function or a reward model, or "
            "add `reward` to stages."
        )
    return names


def plain(outcomes: Sequence[float | None]) -> tuple[list[float], np.ndarray[Any, Any]]:
    """(outcomes that were given, their prompts' numbers)."""
    numbers = [number for number, outcome in enumerate(outcomes) if outcome is not None]
    return [float(outcome) for outcome in outcomes if outcome is not None], np.array(numbers, dtype=int)
