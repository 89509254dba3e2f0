"""What every model can still do: the tasks of `compare.tasks` and `compare.lm_eval`."""

from __future__ import annotations

from collections.abc import Sequence

from align import models, progress, training
from align.compare.contestants import Contestant
from align.compare.schema import TaskFigure
from align.compare.tasks import Task, load_task, measure_task, run_lm_eval
from align.config import Config
from align.generate import generate
from reward.records import InputError
from reward.statistics import MeanFigure

# A short answer is asked for: what follows is not read.
ANSWER_TOKENS = 32


def tasks_of(config: Config) -> list[Task]:
    """The task files, read and checked.

    Raises:
        InputError: a file is missing or malformed, or two have one name.
    """
    tasks = [load_task(path) for path in config.compare.tasks]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise InputError(f"compare.tasks has two files of one name ({', '.join(names)}): rename one.")
    return tasks


def measure_abilities(
    config: Config, found: Sequence[Contestant], tasks: Sequence[Task]
) -> tuple[dict[str, dict[str, TaskFigure]], dict[str, dict[str, MeanFigure]]]:
    """(figures by model and task file, figures by model and lm-eval metric); a file of answers has none."""
    section = config.compare
    on_files: dict[str, dict[str, TaskFigure]] = {}
    by_lm_eval: dict[str, dict[str, MeanFigure]] = {}
    if not tasks and not section.lm_eval:
        return on_files, by_lm_eval
    greedy = section.model_copy(update={"temperature": 0.0, "max_new_tokens": ANSWER_TOKENS})
    for one in found:
        if one.tokenizer is None:
            continue
        model = models.merged(models.load_policy(one.path, config.model))

        def answer(prompts: list[list[int]], model: object = model, one: Contestant = one) -> list[str]:
            texts = [""] * len(prompts)
            for indices, answers in generate(model, one.tokenizer, prompts, greedy, f"{config.seed} task"):
                for index, given in zip(indices, answers, strict=True):
                    texts[index] = given.text
            return texts

        for task in tasks:
            count = sum(map(len, task.choices)) if task.choices else len(task.prompts)
            with progress.bar(f"compare: {one.name} on {task.name}", count) as report:
                figure = measure_task(task, model, one.tokenizer, answer, on_progress=report)
            on_files.setdefault(one.name, {})[task.name] = figure
        if section.lm_eval:
            progress.say(f"  compare: {one.name} on lm-eval's {', '.join(section.lm_eval)}")
            by_lm_eval[one.name] = run_lm_eval(section.lm_eval, model, one.tokenizer)
        del model
        training.release()
    return on_files, by_lm_eval
