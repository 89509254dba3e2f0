"""The rewards PPO can climb: functions, reward models of any architecture, and weighted sums of them.

A reward sees B finished answers as `Episodes` and gives one number an answer, or None where it does not apply:

    FunctionReward   a function written for TRL's `reward_funcs`: f(prompts, completions, **columns)
    ModelReward      a sequence classifier with one label, decoder or encoder, that reads text with its own tokenizer
    Mixture          the weighted sum of several

The reward adapter on the policy's own base is the third kind; it reads the policy's tokens, so the cast is its home.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import math
import numbers
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from align.scorer import Scorer, Text, token_ids
from reward.records import InputError, Message
from reward.scoring import Aggregate, score

OWN = ("prompts", "completions", "completion_ids")  # what every function can have, whatever the columns
PROBES = ("Hello", "What is 12 + 345?", "  two  spaces\n\tand a tab", "Grüße, 世界! 🙂", "x = {'a': [1, 2]};")


@dataclass
class Episodes:
    """What a reward sees: B finished answers."""

    prompts: list[str] | list[list[Message]]  # as the dataset gave them: texts or conversations
    completions: list[str] | list[list[Message]]  # texts, or one assistant message each for conversations
    prompt_ids: list[list[int]]  # tokens of the policy
    completion_ids: list[list[int]]  # with the stop token where the answer stopped by itself
    finished: list[bool]
    columns: dict[str, list[Any]]  # the dataset's other columns, one entry an episode

    def __len__(self) -> int:
        return len(self.completions)


class Reward(Protocol):
    """The parameter is called `episodes`: that and `name` tell a reward from a function written for TRL."""

    name: str

    def __call__(self, episodes: Episodes) -> list[float | None]: ...


def checked(name: str, returned: Any, count: int) -> list[float | None]:
    """What a reward returned, as `count` plain floats or None.

    Raises:
        InputError: it is no list, tuple, tensor or array in one dimension; has another length; or an entry is neither
            a finite number nor None.
    """
    if hasattr(returned, "tolist") and hasattr(returned, "shape"):  # a tensor, an array or a series
        if len(returned.shape) != 1:
            shape = tuple(returned.shape)
            raise InputError(f"the reward `{name}` returned shape {shape} for {count} answers: ({count},) is wanted.")
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        what = f"{reprlib.repr(returned)}, a {type(returned).__name__}"
        raise InputError(f"the reward `{name}` returned {what}, for {count} answers: a list of numbers is wanted.")
    if len(returned) != count:
        raise InputError(f"the reward `{name}` returned {len(returned)} scores for {count} answers: give one for each.")
    scores: list[float | None] = []
    for position, entry in enumerate(returned):
        entry = entry.item() if isinstance(entry, torch.Tensor) and entry.ndim == 0 else entry
        if entry is not None and (isinstance(entry, bool) or not isinstance(entry, numbers.Real)):
            raise InputError(
                f"the reward `{name}` returned {reprlib.repr(entry)}, a {type(entry).__name__}, at scores[{position}]: "
                "a number is wanted, or None where the reward does not apply."
            )
        scores.append(None if entry is None else float(entry))
    wrong = [i for i, entry in enumerate(scores) if entry is not None and not math.isfinite(entry)]
    if wrong:
        raise InputError(
            f"the reward `{name}` returned {len(wrong)} of {count} scores that are NaN or infinite (the first is "
            f"{scores[wrong[0]]} at scores[{wrong[0]}]): give a finite number, or None where the reward does not apply."
        )
    return scores


class FunctionReward:
    """A function as TRL's `reward_funcs`, called with keywords.

    It gets `prompts`, `completions`, `completion_ids` and the dataset's columns: all of them if it takes `**kwargs`,
    else those it has parameters for. Where it names neither of the first two, the first two required parameters that
    are no columns are they, as in f(questions, answers).
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function) or isinstance(function, type):
            what = "a class: give an instance" if isinstance(function, type) else "not callable: give a function"
            raise InputError(f"the reward {reprlib.repr(function)} is {what}.")
        self.function = plain = function
        while isinstance(plain, functools.partial):
            plain = plain.func
        self.name: str = getattr(plain, "__name__", type(plain).__name__)
        self.parameters = list(inspect.signature(function).parameters.values())

    def check(self, columns: Iterable[str]) -> None:
        """Before anything is sampled: InputError if the function needs what is no column."""
        self._arguments(dict.fromkeys([*columns, *OWN]))

    def __call__(self, episodes: Episodes) -> list[float | None]:
        """Raises InputError where the function does, where it needs what is no column, and as `checked`."""
        args, kwargs = self._arguments(episodes.columns | {name: getattr(episodes, name) for name in OWN})
        try:
            returned = self.function(*args, **kwargs)
            if inspect.iscoroutine(returned):  # TRL takes async functions too
                returned = asyncio.run(returned)
        except Exception as error:
            what = f"{type(error).__name__} on {len(episodes)} answers: {error}"
            raise InputError(f"the reward `{self.name}` raised {what}") from error
        return checked(self.name, returned, len(episodes))

    def _arguments(self, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        kinds = inspect.Parameter
        named = [p for p in self.parameters if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
        takes_all = any(p.kind is kinds.VAR_KEYWORD for p in self.parameters)
        if self.parameters and not named and not takes_all:  # f(*args)
            return [given["prompts"], given["completions"]], {}
        unknown = [p.name for p in named if p.name not in given and p.default is p.empty]
        if len(unknown) == 2 and not {"prompts", "completions"} & {p.name for p in named}:
            given = given | {unknown[0]: given["prompts"], unknown[1]: given["completions"]}
        elif unknown:
            wanted, there = (", ".join(f"`{name}`" for name in names) for names in (unknown, sorted(given)))
            raise InputError(
                f"the reward `{self.name}` needs {wanted}, but there is only {there}: add the column to the prompts, "
                "or give the parameter a default."
            )
        by_place = [p.name for p in named if p.kind is kinds.POSITIONAL_ONLY and p.name in given]
        by_name = (given.keys() if takes_all else {p.name for p in named} & given.keys()) - set(by_place)
        return [given[name] for name in by_place], {name: given[name] for name in by_name}


class ModelReward(Scorer):
    """A reward model of any architecture, which reads text with its own tokenizer.

    Attributes:
        aggregate, lcb_coefficient: how the scores of several heads become one.
        spread: standard deviation over heads of each answer scored last.
    """

    aggregate: Aggregate = "mean"
    lcb_coefficient: float = 1.0
    spread: Sequence[float] = ()

    def __call__(self, episodes: Episodes) -> list[float | None]:
        """Raises InputError where a row is too long or cannot be rendered, and as `checked`."""
        prompts: Sequence[Text] = episodes.prompts
        completions: Sequence[Text] = episodes.completions
        scores = score(self, prompts, completions, finished=episodes.finished, batch_size=self.batch_size)
        self.spread = scores.std.tolist()
        return checked(self.name, scores.aggregated(self.aggregate, self.lcb_coefficient), len(episodes))


class Mixture:
    """The weighted sum of several rewards, each by a name of its own (a second `f` is `f_2`).

    Raises:
        InputError: no rewards, another number of weights than of rewards, or a weight that is not finite.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None) -> None:
        if not rewards:
            raise InputError("there is no reward: give at least one.")
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if len(weights) != len(rewards):
            raise InputError(f"there are {len(weights)} reward weights for {len(rewards)} rewards: give one for each.")
        for reward, weight in zip(rewards, weights, strict=True):
            if not math.isfinite(weight):
                raise InputError(f"the weight of the reward `{reward.name}` is {weight}: give a finite number.")
        self.rewards, self.weights = list(rewards), [float(weight) for weight in weights]
        self.names: list[str] = []
        for reward in rewards:
            others = (f"{reward.name}_{number}" for number in range(2, len(rewards) + 2))
            self.names.append(next(n for n in (reward.name, *others) if n not in self.names))

    def check(self, columns: Iterable[str]) -> None:
        """Whether every function finds the columns it needs; raises as `FunctionReward.check` does."""
        columns = list(columns)
        for reward in self.rewards:
            if isinstance(reward, FunctionReward):
                reward.check(columns)

    def __call__(self, episodes: Episodes) -> tuple[list[float], dict[str, list[float]]]:
        """(weighted sum B, scores B of each reward before its weight, with NaN where it does not apply).

        A reward of several heads also has their standard deviation there, as `<name>/spread`.

        Raises:
            InputError: what a reward raises, or no reward applies to an answer.
        """
        named = zip(self.names, self.rewards, strict=True)
        parts = {name: checked(name, reward(episodes), len(episodes)) for name, reward in named}
        rows = list(zip(*parts.values(), strict=True))
        silent = [i for i, row in enumerate(rows) if all(s is None for s in row)]
        if silent:
            raise InputError(
                f"no reward applies to {len(silent)} of {len(episodes)} answers (the first is number {silent[0]} from "
                f"0): at least one of {', '.join(self.names)} must give a number."
            )
        total = [sum(w * s for w, s in zip(self.weights, row, strict=True) if s is not None) for row in rows]
        spreads = {
            f"{name}/spread": [float(s) for s in spread]
            for name, reward in zip(self.names, self.rewards, strict=True)
            if any(spread := getattr(reward, "spread", ()))
        }
        told = {name: [math.nan if s is None else s for s in scores] for name, scores in parts.items()}
        return total, told | spreads


def as_reward(thing: Any, tokenizer: Any = None, **load: Any) -> Reward:
    """A reward from what a user gives for one.

    Args:
        thing: a reward already; `package.module:function`; the folder or hub id of a reward model; a loaded one, with
            its tokenizer; or a function.
        load: dtype, device, batch_size and max_length of a reward model, as `ModelReward.load` takes them.

    Raises:
        InputError: it is none of these, or cannot be imported or loaded.
    """
    if isinstance(thing, str) and ":" in thing and not Path(thing).exists():
        return as_reward(_imported(thing))
    if isinstance(thing, (str, Path)):
        return ModelReward.load(thing, **load)
    if isinstance(thing, torch.nn.Module) and hasattr(thing, "config"):
        name = Path(str(getattr(thing.config, "_name_or_path", ""))).name or type(thing).__name__
        if tokenizer is None:
            raise InputError(f"the reward model `{name}` comes without a tokenizer: give the one it was trained with.")
        sizes = {key: value for key, value in load.items() if key in ("batch_size", "max_length")}
        return ModelReward(thing, tokenizer, name, **sizes)
    if callable(thing):
        reward = FunctionReward(thing)
        own = isinstance(getattr(thing, "name", None), str) and "episodes" in {p.name for p in reward.parameters}
        return thing if own else reward
    raise InputError(
        f"{reprlib.repr(thing)}, a {type(thing).__name__}, is no reward: give a function, `package.module:function`, "
        "the folder or hub id of a reward model, or a loaded reward model with its tokenizer."
    )


def _imported(path: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; the current folder is looked in last."""
    module_name, _, name = path.rpartition(":")
    if str(Path.cwd()) not in sys.path:  # console scripts do not look where they were started
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"the reward {path} cannot be imported: importing {module_name} raised {what}") from error
    if not callable(found := getattr(module, name, None)):
        there = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        what = f"`{name}` is a {type(found).__name__}" if hasattr(module, name) else f"there is no `{name}`"
        raise InputError(f"{what} in {module_name}: name one of its functions ({', '.join(there) or 'it has none'}).")
    return found


def same_tokenizer(a: Any, b: Any) -> str | None:
    """None where two tokenizers give the same ids for everything that matters, else the first difference, as a clause.

    Compared are the vocabularies, the special tokens, and the ids of a few texts; chat templates are not.
    """
    if len(a) != len(b):
        return f"{len(a)} tokens against {len(b)}"
    mine, theirs = a.get_vocab(), b.get_vocab()
    if mine != theirs:
        token = min((t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)), key=lambda t: (len(t), t))
        return f"the token {token!r} is {mine.get(token)} against {theirs.get(token)}"
    words = {"eos": "stop", "bos": "start", "pad": "padding", "unk": "unknown", "cls": "class", "sep": "separator"}
    for kind, word in words.items():
        one, other = getattr(a, f"{kind}_token_id"), getattr(b, f"{kind}_token_id")
        if one != other:
            return f"the {word} token is {one} against {other}"
    for text in PROBES:
        if token_ids(a, text) != token_ids(b, text):
            return f"{text!r} is {token_ids(a, text)} against {token_ids(b, text)}"
    return None
