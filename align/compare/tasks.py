"""Abilities on tasks with labels: files of one's own, and tasks of lm-eval by name.

A task file is JSONL, one question a line:

    {prompt | messages, label, choices?}

`prompt` is text or a conversation, `messages` a conversation; `label` is the right answer as text, and with `choices`
(a list of texts) one of them. Either every line has choices or none has.

Shapes: N questions.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from align.compare.schema import ShareFigure, TaskFigure
from align.data.load import conversation
from align.data.render import answer_ids, prompt_ids
from align.logprobs import Pair, answer_logprobs
from reward.records import InputError, Message, Record, assistant_answer, numbered_jsonl
from reward.statistics import MeanFigure, Z, accuracy_interval


@dataclass(frozen=True)
class Task:
    """Questions with their right answers.

    Attributes:
        name: the file's, without its ending.
        prompts: conversations that end with a user turn.
        labels: the right answers, one a prompt.
        choices: what may be chosen at each prompt; None where the answer is free text.
    """

    name: str
    prompts: list[list[Message]]
    labels: list[str]
    choices: list[list[str]] | None

    @property
    def has_classes(self) -> bool:
        """Whether labels are classes: every question offers the same choices, in whatever order."""
        return self.choices is not None and len({frozenset(own) for own in self.choices}) == 1


def load_task(path: str | Path) -> Task:
    """A task from its file.

    Raises:
        InputError: the file is missing or empty, or a line (named by number) lacks a column, has a label that is none
            of its choices, fewer than two different choices, or choices where the first line has none.
    """
    prompts, labels, choices = [], [], []
    for number, row in numbered_jsonl(path):
        where = f"{path}, line {number}"
        prompts.append(_prompt(row, where))
        labels.append(_text(row, "label", where))
        choices.append(_choices(row, where))
        if (choices[-1] is None) != (choices[0] is None):
            raise InputError(f"{where}: the first line has choices and this one not, or the reverse; give all or none.")
        if choices[-1] is not None and labels[-1] not in choices[-1]:
            raise InputError(f"{where}: the label {labels[-1]!r} is none of the choices {', '.join(choices[-1])}.")
    return Task(Path(path).stem, prompts, labels, None if choices[0] is None else cast(list[list[str]], choices))


def measure_task(
    task: Task,
    model: Any,
    tokenizer: Any,
    answer: Callable[[list[list[int]]], Sequence[str]],
    *,
    batch_size: int = 16,
    on_progress: Callable[[int], object] = lambda done: None,
) -> TaskFigure:
    """How often a model is right on a task.

    With choices, the model is right where the label is its `chosen` one. Without, its answer must be the label after
    `normalised`: ask in the prompt for the answer and nothing else.

    Args:
        answer: generates texts to prompts given as tokens, in order; called once, and only without choices. Greedy
            generation makes the figure one of the model alone.
        on_progress: called with the number of choices read; not called without choices.
    """
    if task.choices is not None:
        predictions = chosen(task, model, tokenizer, batch_size=batch_size, on_progress=on_progress)
        return task_figure(task.labels, predictions, classes=task.has_classes)
    texts = answer([prompt_ids(tokenizer, prompt) for prompt in task.prompts])
    labels, predictions = ([normalised(text) for text in column] for column in (task.labels, texts))
    return task_figure(labels, predictions, classes=False)


def chosen(
    task: Task,
    model: Any,
    tokenizer: Any,
    *,
    batch_size: int = 16,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[str]:
    """The choice at each prompt whose mean log-likelihood per token, as the assistant's answer, is highest.

    The stop token counts as a token. The mean keeps long choices from losing for their length; of equals the first
    wins.

    Raises:
        InputError: the chat template cannot render a choice, or a row is longer than the model has places for.
    """
    assert task.choices is not None
    rows: list[Pair] = []
    for prompt, own in zip(task.prompts, task.choices, strict=True):
        before = prompt_ids(tokenizer, prompt)
        rows += [(before, answer_ids(tokenizer, prompt, assistant_answer(choice))) for choice in own]
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt) + len(choice) for prompt, choice in rows)
    if places is not None and longest > places:
        raise InputError(
            f"the task {task.name} has a question of {longest} tokens with its choice, but the model has places for "
            f"{places}: shorten or remove it."
        )
    pad_id = tokenizer.pad_token_id
    found = answer_logprobs(model, rows, pad_id, batch_size=batch_size, on_progress=on_progress)
    means = iter([float(logprobs.mean()) for logprobs in found])
    likelihoods = [[next(means) for _ in own] for own in task.choices]
    return [own[int(np.argmax(mean))] for own, mean in zip(task.choices, likelihoods, strict=True)]


def normalised(text: str) -> str:
    """Text as free answers are compared: no case, no punctuation around words, one space between them.

    "The  Nile." is "the nile"; "3.14" and "-5" stay; articles stay. Text of punctuation alone is left as it is.
    """
    words = [_bare(word) for word in unicodedata.normalize("NFKC", text).casefold().split()]
    return " ".join(word for word in words if word) or text.strip()


def task_figure(labels: Sequence[str], predictions: Sequence[str], *, classes: bool = True) -> TaskFigure:
    """Accuracy with its exact interval (Clopper and Pearson) and, over classes, mean precision, recall and F1.

    The means are over the classes that occur among the labels, each counting alike (macro); a class that is never
    predicted has precision 0.

    Args:
        classes: whether labels are classes; precision, recall and F1 are None where they are not.

    By hand: labels a a a b and predictions a a b b have accuracy 3/4; precision 1 and 1/2, recall 2/3 and 1, F1 4/5
    and 2/3.

    Raises:
        ValueError: no labels, or not one prediction each.
    """
    if not labels or len(labels) != len(predictions):
        raise ValueError(f"{len(labels)} labels and {len(predictions)} predictions: at least one is wanted, in pairs.")
    right = sum(label == prediction for label, prediction in zip(labels, predictions, strict=True))
    means: dict[str, float | None] = {"precision": None, "recall": None, "f1": None}
    if classes:
        from sklearn.metrics import precision_recall_fscore_support

        kinds = sorted(set(labels))
        macro = precision_recall_fscore_support(labels, predictions, labels=kinds, average="macro", zero_division=0)
        means = dict(zip(means, map(float, macro[:3]), strict=True))
    accuracy = cast(ShareFigure, accuracy_interval(right, len(labels)).record())
    return cast(TaskFigure, {"accuracy": accuracy, **means, "n": len(labels)})


def _prompt(row: Record, where: str) -> list[Message]:
    column = "messages" if "messages" in row else "prompt"
    if row.get(column) is None:
        raise InputError(
            f"{where}: neither `prompt` nor `messages`; the row has {', '.join(sorted(row)) or 'none'}, but prompt and "
            "label are wanted."
        )
    turns = conversation(row[column], where)
    if turns[-1]["role"] not in ("user", "tool"):
        raise InputError(f"{where}: a question must end with a user turn, but this one ends with {turns[-1]['role']}.")
    return turns


def _text(row: Record, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'{where}: `{column}` is {value!r}, but text is wanted, such as "yes".')
    return value


def _choices(row: Record, where: str) -> list[str] | None:
    own = row.get("choices")
    if own is None:
        return None
    if not isinstance(own, list) or not all(isinstance(choice, str) and choice.strip() for choice in own):
        raise InputError(f"{where}: `choices` is {own!r}, but a list of texts is wanted.")
    if len(set(own)) < max(2, len(own)):
        raise InputError(f"{where}: `choices` is {own!r}, but two or more different texts are wanted.")
    return own


def _bare(word: str) -> str:
    """A word without punctuation around it; a sign before a number stays."""
    start, end = 0, len(word)
    while start < end and _is_punctuation(word[start]) and not re.match(r"-\.?\d", word[start:end]):
        start += 1
    while start < end and _is_punctuation(word[end - 1]):
        end -= 1
    return word[start:end]


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


# lm-eval


def run_lm_eval(
    names: Sequence[str],
    model: Any,
    tokenizer: Any,
    batch_size: int = 16,
    limit: int | None = None,
    folder: str | Path | None = None,
) -> dict[str, MeanFigure]:
    """Figures of lm-eval's tasks on a model that is already loaded: "<task>/<metric>" to value, interval and n.

    Tasks run with lm-eval's own settings: its prompts and number of shots, without a chat template, its seeds. The
    standard error is the one it reports; low and high are 1.96 of them away (so they can leave [0, 1] where questions
    are few), and None where it reports none. It seeds the global generators of random, numpy and torch.

    Args:
        names: tasks, groups or tags.
        limit: at most so many questions of each task, for a first look.
        folder: of further tasks, as YAML.

    Raises:
        InputError: lm-eval is not installed, a name is unknown, or a task cannot be loaded (its data, mostly).
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(
            f"compare.lm_eval names {', '.join(names)}, but lm-eval cannot be imported ({error}): run "
            "`pip install lm-eval`, or leave the key out. Its tasks fetch their data from the Hugging Face hub once."
        ) from error
    manager = _task_manager(None if folder is None else str(folder))
    _check_names(names, manager.all_tasks)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(wrapped, tasks=[*names], task_manager=manager, limit=limit, log_samples=False)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise InputError(
            f"lm-eval cannot run {', '.join(names)}: {first}. Its tasks take their data from the Hugging Face hub or "
            "its cache on this machine."
        ) from error
    assert found is not None  # only other ranks get None
    return flattened(found["results"])


@functools.cache
def _task_manager(folder: str | None) -> Any:
    """lm-eval's index of tasks; made once for all models, as reading its 10,000 files takes 20 s."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"the nearest are {', '.join(near)}" if near else "see `lm-eval ls tasks`"
            raise InputError(f"compare.lm_eval: lm-eval has no task {name!r}; {hint}.")


def flattened(results: Record) -> dict[str, MeanFigure]:
    """lm-eval's results as one figure for each task and metric.

    Args:
        results: by task, `{"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 20, ...}`: metric and filter, of
            which "none" is left out of the name.
    """
    figures: dict[str, MeanFigure] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, (int, float)) and math.isfinite(error)
            name = f"{task}/{metric}" if filtered == "none" else f"{task}/{metric} ({filtered})"
            figures[name] = {
                "mean": float(value),
                "low": value - Z * error if known else None,
                "high": value + Z * error if known else None,
                "standard_error": float(error) if known else None,
                "n": int(values["sample_len"]),
            }
    return figures
