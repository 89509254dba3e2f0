"""Reward models as they are read: a sequence classifier of any architecture, its tokenizer, and its rendering of text.

`Scorer` is what `reward.score` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError

from align import models
from align.config import ModelSection
from align.data.render import answer_ids, prompt_ids
from reward.records import InputError, Message, answer_text

Text = str | list[Message]  # plain, or a conversation


class Scorer:
    """A sequence classifier with one label, its tokenizer, and how the two read prompt and answer.

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
        self.is_encoder = tokenizer.sep_token_id is not None and tokenizer.sep_token_id in token_ids(
            tokenizer, "a", "b"
        )
        limit = _most_tokens(model, tokenizer, self.is_encoder)
        if max_length is not None and limit is not None and max_length > limit:
            raise InputError(f"the reward `{name}` has max_length {max_length}, but the model takes {limit} tokens.")
        self.max_length = limit if max_length is None else max_length
        # Fixed here: scoring writes the padding token it used into the model's config.
        pad_id = tokenizer.pad_token_id
        self.pad_id: int | None = model.config.get_text_config().pad_token_id if pad_id is None else pad_id

    def rows(
        self, prompts: Sequence[Text], answers: Sequence[Text], finished: Sequence[bool] | None = None
    ) -> list[dict[str, list[int]]]:
        """`row` of each answer.

        Raises:
            InputError: a row cannot be rendered, or is too long.
        """
        told = zip(prompts, answers, finished if finished is not None else [True] * len(answers), strict=True)
        rows = [self.row(prompt, answer, done) for prompt, answer, done in told]
        sizes = [len(row["input_ids"]) for row in rows]
        longer = [size for size in sizes if self.max_length is not None and size > self.max_length]
        if longer:
            raise InputError(
                f"{len(longer)} of {len(rows)} answers with their prompts are too long for the reward `{self.name}`: "
                f"the longest has {max(longer)} tokens, the limit is {self.max_length}. Give shorter prompts, sample "
                "shorter answers, or raise max_length if the model has places for more."
            )
        return rows

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
        ids = token_ids(self.tokenizer, before + joint + answer_text(completion))
        return {"input_ids": ids if stop is None or not finished or ids[-1:] == [stop] else [*ids, stop]}

    def border(self, prompt: Text, completion: Text) -> int:
        """Where the answer begins in `row`; 0 where it cannot be told."""
        if self.is_encoder and (isinstance(prompt, str) or not self.tokenizer.chat_template):
            before = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
            kinds = self.tokenizer(before, answer_text(completion)).sequence_ids()
            return next((place for place, kind in enumerate(kinds) if kind == 1), 0)
        if isinstance(prompt, str) or not self.tokenizer.chat_template:
            return 0
        return len(prompt_ids(self.tokenizer, prompt))

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

    @classmethod
    def load(
        cls,
        source: str | Path,
        dtype: Any = None,
        device: Any = None,
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> Self:
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
        model = models.load_reward_model(place, ModelSection(), dtype)
        tokenizer = models.load_reward_tokenizer(place)
        # A stage writes <run>/<stage>/model: its folder's own name says nothing.
        name = path.resolve().parent.name if path.name == "model" and path.is_dir() else path.name
        return cls(model.to(device or models.device()), tokenizer, name or place, batch_size, max_length)


def token_ids(tokenizer: Any, *texts: str) -> list[int]:
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
