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
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence

from align import models
from align.config import ModelSection
from align.data.render import answer_ids, prompt_ids
from reward.records import InputError, Message, answer_text
from reward.scoring import score

Text = str | list[Message]  # plain, or a conversation
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


class ModelReward:
    """A sequence classifier with one label and its own tokenizer: the score of prompt and answer.

    A conversation is rendered by the tokenizer's chat template and cut after the stop token (a template that writes
    no stop token stands whole). Everything else is a pair of texts to an encoder, and to a decoder prompt and answer
    in a row with the stop token behind them; the turns of a conversation then stand on lines of their own.

    The stop token follows an answer only where the policy wrote one: an unfinished answer is scored as it stands.

    Args:
        model: a `PreTrainedModel` for sequence classification, or a `PeftModel` of one.
        tokenizer: of `model`. The score of a decoder is read at the last token that is not its padding token, as
            plain transformers reads it; a tokenizer without one has the score at the last token.
        max_length: refuse rows of more tokens; without it, rows of more tokens than the model has places for.

    Raises:
        InputError: several labels, an encoder-decoder, or a tokenizer or `max_length` that does not fit the model.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, batch_size: int = 16, max_length: int | None = None
    ) -> None:
        if model.config.num_labels != 1:
            raise InputError(f"the reward `{name}` has {model.config.num_labels} labels: a reward model has one.")
        if model.config.is_encoder_decoder:
            raise InputError(f"the reward `{name}` is an encoder-decoder: give a decoder (Llama) or an encoder (BERT).")
        places, largest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
        if largest >= places:
            raise InputError(
                f"the tokenizer of the reward `{name}` has tokens up to {largest}, but the model embeds {places}: give "
                "the tokenizer that the model was trained with."
            )
        self.model, self.tokenizer, self.name, self.batch_size = model.eval(), tokenizer, name, batch_size
        self.is_encoder = tokenizer.sep_token_id is not None and tokenizer.sep_token_id in _ids(tokenizer, "a", "b")
        limit = _most_tokens(model, tokenizer, self.is_encoder)
        if max_length is not None and limit is not None and max_length > limit:
            raise InputError(f"the reward `{name}` has max_length {max_length}, but the model takes {limit} tokens.")
        self.max_length = limit if max_length is None else max_length
        # Fixed here: scoring writes the padding token it used into the model's config.
        pad_id = tokenizer.pad_token_id
        self.pad_id: int | None = model.config.get_text_config().pad_token_id if pad_id is None else pad_id

    def __call__(self, episodes: Episodes) -> list[float | None]:
        """Raises InputError where a row is too long or cannot be rendered, and as `checked`."""
        prompts: Sequence[Text] = episodes.prompts
        completions: Sequence[Text] = episodes.completions
        told = zip(prompts, completions, episodes.finished, strict=True)
        rows = [self.row(prompt, completion, finished) for prompt, completion, finished in told]
        sizes = [len(row["input_ids"]) for row in rows]
        longer = [size for size in sizes if self.max_length is not None and size > self.max_length]
        if longer:
            raise InputError(
                f"{len(longer)} of {len(rows)} answers with their prompts are too long for the reward `{self.name}`: "
                f"the longest has {max(longer)} tokens, the limit is {self.max_length}. Give shorter prompts, sample "
                "shorter answers, or raise max_length if the model has places for more."
            )
        if self.is_encoder:
            return checked(self.name, self._encode(rows), len(episodes))
        ids = [row["input_ids"] for row in rows]
        # Without a padding token any filler will do that no row ends in: it is masked, and read over from the right.
        ends = {row[-1] for row in ids}
        filler = next(i for i in range(len(ends) + 1) if i not in ends) if self.pad_id is None else self.pad_id
        return checked(self.name, score(self.model, ids, filler, batch_size=self.batch_size), len(episodes))

    def row(self, prompt: Text, completion: Text, finished: bool = True) -> dict[str, list[int]]:
        """The model's inputs for one episode; an encoder's with its attention mask and token types."""
        stop = self.tokenizer.eos_token_id
        if not isinstance(prompt, str) and self.tokenizer.chat_template:
            ids = self._conversation(prompt, completion)
            if not finished and ids[-1] == stop:
                ids = ids[:-1]
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        before = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        if self.is_encoder:
            return dict(self.tokenizer(before, answer_text(completion)))
        joint = "" if isinstance(prompt, str) else "\n"
        ids = _ids(self.tokenizer, before + joint + answer_text(completion))
        return {"input_ids": ids if stop is None or not finished or ids[-1:] == [stop] else [*ids, stop]}

    def _conversation(self, prompt: list[Message], completion: Text) -> list[int]:
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        try:
            before = prompt_ids(self.tokenizer, prompt)
            whole = list(self.tokenizer.apply_chat_template([*prompt, *answer], return_dict=True)["input_ids"])
            stop = self.tokenizer.eos_token_id
            stops = whole.count(stop) > before.count(stop)
            return before + answer_ids(self.tokenizer, prompt, answer) if stops else whole
        except (InputError, TemplateError) as error:
            raise InputError(f"the chat template of the reward `{self.name}` failed: {error}") from error

    @torch.no_grad()
    def _encode(self, rows: list[dict[str, list[int]]]) -> list[float]:
        """Scores of an encoder, which is told by the attention mask alone where a row ends."""
        self.model.eval()
        device = next(self.model.parameters()).device
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            inputs = {}
            for name in rows[indices[0]]:
                fill = (self.pad_id or 0) if name == "input_ids" else 0
                columns = [torch.tensor(rows[i][name]) for i in indices]
                inputs[name] = pad_sequence(columns, batch_first=True, padding_value=fill).to(device)
            logits_B1 = self.model(**inputs).logits
            for index, value in zip(indices, logits_B1[:, 0].float().tolist(), strict=True):
                scores[index] = value
        return scores

    @classmethod
    def load(
        cls,
        source: str | Path,
        dtype: Any = None,
        device: Any = None,
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> ModelReward:
        """A reward model from a folder or a hub id: a whole model, or a PEFT adapter that is loaded with its base.

        Args:
            dtype, device: of the model; what `model.dtype: auto` means, and this process's device, without.

        Raises:
            InputError: there is nothing to load, or a weight would be random or does not fit one label.
        """
        place, path = str(source), Path(source)
        is_path = isinstance(source, Path) or place.startswith((".", "~", "/")) or place.count("/") > 1
        if is_path and not path.is_dir():
            raise InputError(f"the reward model {place} does not exist: give a folder or a hub id.")
        try:
            model, tokenizer = _load(place, dtype or models.data_type(ModelSection()))
        except InputError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise InputError(f"cannot load the reward model {place}: {reason}") from error
        # A stage writes <run>/<stage>/model: its folder's own name says nothing.
        name = path.resolve().parent.name if path.name == "model" and path.is_dir() else path.name
        return cls(model.to(device or models.device()), tokenizer, name or place, batch_size, max_length)


def _load(place: str, dtype: Any) -> tuple[Any, Any]:
    """(model, tokenizer), every weight of the model read from a file."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    is_adapter = find_adapter_config_file(place) is not None
    base = str(PeftConfig.from_pretrained(place).base_model_name_or_path) if is_adapter else place
    # Heads of another size are let through here and refused below, with a sentence.
    model, info = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    random, shapes = set(info["missing_keys"]), {name: tuple(there) for name, there, _ in info["mismatched_keys"]}
    weights = load_peft_weights(place, device="cpu") if is_adapter else {}
    for key, weight in weights.items():  # an adapter brings its head along, under the base model's names
        name = key.removeprefix("base_model.model.")
        random.discard(name)
        shapes[name] = tuple(weight.shape)
    own = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    wrong = [f"{name} is {shape}, not {own[name]}" for name, shape in shapes.items() if own.get(name, shape) != shape]
    if wrong:
        raise InputError(f"{place} is no reward model with one label: {'; '.join(sorted(wrong))}.")
    if random:
        raise InputError(
            f"{place} has no trained score head ({', '.join(sorted(random))} would be random): give a sequence "
            "classifier with one label, or an adapter with task_type SEQ_CLS and modules_to_save of its head."
        )
    if is_adapter:
        model = PeftModel.from_pretrained(model, place)
        absent = set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(weights)
        if absent:
            raise InputError(f"{place} does not fit its base {base}: {len(absent)} of its weights are missing.")
    for source in (place, base):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError):
            continue
        if len(tokenizer) > len(tokenizer.all_special_ids):  # else made up from the model's config
            return model, tokenizer
    raise InputError(f"{place} has no tokenizer: save the one that the model was trained with beside it.")


def _ids(tokenizer: Any, *texts: str) -> list[int]:
    return list(tokenizer(*texts)["input_ids"])


def _most_tokens(model: Any, tokenizer: Any, is_encoder: bool) -> int | None:
    """The longest row the model has places for; None where nothing says so."""
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and hasattr(m, "padding_idx")]
    if tables and tables[0].padding_idx is not None:  # RoBERTa counts its places from behind the padding token
        places -= tables[0].padding_idx + 1
    # A tokenizer that does not know its limit says 1e30.
    limits = [places, tokenizer.model_max_length if is_encoder else 0]
    return min((int(limit) for limit in limits if 0 < limit < 1e9), default=None)


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
        return total, {name: [math.nan if s is None else s for s in scores] for name, scores in parts.items()}


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
        if _ids(a, text) != _ids(b, text):
            return f"{text!r} is {_ids(a, text)} against {_ids(b, text)}"
    return None
