"""A judge that is loaded here: of three letters, the likeliest next token is its verdict.

It cannot answer nonsense, needs one forward pass a question, and says the same every time. A reasoning model judges so
without its thoughts: put those behind an endpoint.

Shapes: B questions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align import models
from align.compare.llm_judge import Shown, Told, exhibits, task, unmarked
from align.config import ModelSection
from align.data.render import prompt_ids
from reward.records import InputError, digest, file_digest, user_prompt

FORMAT = "Which answer is better? Reply with one letter: A, B, or C if they are equally good."
LETTERS = ("A", "B", "C")
# Ways of writing the verdict; the first that leaves a tokenizer one token a letter is taken.
LEADS = ("Verdict: ", "Verdict:\n", "Verdict: (", "Verdict=")


class LocalModel:
    """Reads verdicts off a causal language model: a folder, an adapter's folder, a hub id, or smollm2-135m.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, model: str, guidelines: str, seed: int) -> None:
        self._name, self._seed, self._task = model, seed, task(guidelines)
        self._place = _place(model)
        # Another model in a folder of the same name is another judge.
        weights = {f.name: file_digest(f) for f in sorted(Path(self._place).glob("*.safetensors"))}
        self.identity = [model, None, digest(weights)]
        self._model: Any = None
        self._tokenizer: Any = None
        self._batch_size = 8

    def ask(
        self, questions: Sequence[Shown], tell: Callable[[int, Told], None], on_progress: Callable[[int], object]
    ) -> None:
        """Put all questions in batches of similar length, longest first; those too long for the model have no verdict.

        Raises:
            InputError: the model or its tokenizer cannot be loaded, or has no single tokens for the letters.
        """
        import torch

        from align.logprobs import by_length, collate, states_before_answers, vocabulary_logits

        self._load()
        lead, letters = verdict_tokens(self._tokenizer, self._name)
        rows = [self._row(shown) + lead for shown in questions]
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
        fitting = [index for index, row in enumerate(rows) if len(row) <= most]
        for index, row in enumerate(rows):
            if len(row) > most:
                tell(index, Told(None, 0, f"the question has {len(row)} tokens, and the model takes {most}"))
        done = len(rows) - len(fitting)
        if done:
            on_progress(done)
        pairs = [(rows[index], letters[:1]) for index in fitting]
        device = next(self._model.parameters()).device
        for batch in by_length(pairs, self._batch_size):
            with torch.no_grad():
                # Padding stands on the right, out of sight: any token will do.
                rows_BS = collate([pairs[place] for place in batch], letters[0], device)
                logits_BV = vocabulary_logits(self._model, states_before_answers(self._model, rows_BS))
            for place, logits in zip(batch, logits_BV[:, letters].tolist(), strict=True):
                tell(fitting[place], Told(verdict_of(*logits), 1))
            done += len(batch)
            on_progress(done)

    def close(self) -> None:
        from align import training

        self._model = self._tokenizer = None
        training.release()

    def _load(self) -> None:
        if self._model is None:
            self._tokenizer = models.load_reward_tokenizer(self._place)
            self._model = models.merged(models.load_policy(self._place, ModelSection())).eval()

    def _row(self, shown: Shown) -> list[int]:
        """Tokens of a question up to the point where the verdict begins."""
        tokenizer = self._tokenizer
        # Special ones alone: some tokenizers also add runs of spaces.
        marks = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        safe = Shown(*(unmarked(text, marks) for text in (shown.prompt, shown.first, shown.second)))
        text = f"{self._task}\n\n{exhibits(safe, self._seed)}\n\n{FORMAT}"
        if not tokenizer.chat_template:
            ids = list(tokenizer(f"{text}\n\n")["input_ids"])
            return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        ids = prompt_ids(tokenizer, user_prompt(text))
        if tokenizer.decode(ids[-8:]).rstrip().endswith("<think>"):  # a template that begins the thoughts itself
            ids += tokenizer("\n</think>\n\n", add_special_tokens=False)["input_ids"]
        return ids


def verdict_of(a: float, b: float, tie: float) -> float:
    """1, 0.5 or 0 from the logits of the three letters; a letter has won only if it is the likeliest by itself."""
    if a > max(b, tie):
        return 1.0
    return 0.0 if b > max(a, tie) else 0.5


def verdict_tokens(tokenizer: Any, name: str) -> tuple[list[int], list[int]]:
    """(tokens that begin a verdict, the token of each letter after them).

    Raises:
        InputError: the letters are not one token each in any of the ways tried.
    """
    for lead in LEADS:
        wholes = [list(tokenizer(lead + letter, add_special_tokens=False)["input_ids"]) for letter in LETTERS]
        begins = {tuple(whole[:-1]) for whole in wholes}
        last = [whole[-1] for whole in wholes]
        if len(begins) == 1 and len({*last, tokenizer.unk_token_id}) == len(LETTERS) + 1:
            return list(begins.pop()), last
    raise InputError(
        f"the tokenizer of {name} has no single tokens for {', '.join(LETTERS)}, so no verdict can be read off it: "
        "give another model as compare.llm.model, or put this one behind an endpoint."
    )


def _place(model: str) -> str:
    """The folder or hub id that the model is loaded from."""
    if (Path(model) / "adapter_config.json").is_file():
        return model
    try:
        return models.base_path(ModelSection(base=model))
    except InputError as error:
        raise InputError(str(error).replace("model.base", "compare.llm.model")) from error
