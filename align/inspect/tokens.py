"""Tokens as people can read them: each with its id, its own text, and what it is for.

Texts come from data, which strangers write: `visible` makes of every character one that can be seen and does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# context: read, without loss. loss: the model is trained to write it. score: a reward model's score is read here.
Role = Literal["context", "loss", "score"]

MOST_BYTES = 4  # of a character in UTF-8, so of one that is spread over several tokens
REPLACEMENT = "\ufffd"  # what decoders write for a part of a character
SHOWN = {" ": "␣", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", "␣": "\\u2423"}
PART_OF_CHARACTER = "\\…"


@dataclass(frozen=True)
class Token:
    """id: in the vocabulary. text: as it is decoded; empty for a part of a character that a later token completes.
    is_special: a control token, which no text spells."""

    id: int
    text: str
    role: Role
    is_special: bool = False

    @property
    def shown(self) -> str:
        return visible(self.text) if self.text else PART_OF_CHARACTER


@dataclass(frozen=True)
class Part:
    """A prompt or an answer.

    note: what is to be known of it, as after "12 tokens, ".
    """

    name: str
    tokens: tuple[Token, ...]
    note: str

    @property
    def trained(self) -> int:
        """Tokens that carry loss."""
        return sum(token.role == "loss" for token in self.tokens)

    @property
    def runs(self) -> list[tuple[Role, list[Token]]]:
        """The tokens in order, cut where their role changes."""
        runs: list[tuple[Role, list[Token]]] = []
        for token in self.tokens:
            if not runs or runs[-1][0] != token.role:
                runs.append((token.role, []))
            runs[-1][1].append(token)
        return runs

    @property
    def counts(self) -> str:
        """ "12 tokens, 12 with loss, the stop token <|im_end|> last"."""
        count = len(self.tokens)
        said = [f"{count} token{'s' * (count != 1)}"]
        if all(token.role != "score" for token in self.tokens):
            said.append(f"{self.trained or 'none'} with loss")
        return ", ".join([*said, *([self.note] if self.note else [])])


@dataclass(frozen=True)
class Row:
    """One row of a stage, such as a pair: its prompt, then its answers. note: where it stands in training."""

    title: str
    parts: tuple[Part, ...]
    note: str = ""


def visible(text: str) -> str:
    r"""Every character as one that is seen and does nothing: a space is ␣, the rest as in a Python string.

    No two texts look the same: a backslash is doubled, and a ␣ that is in the text is written \u2423.

    >>> print(visible("a b\x1b[31m\n"))
    a␣b\x1b[31m\n
    """
    return "".join(SHOWN.get(c) or (c if c.isprintable() else _escaped(ord(c))) for c in text)


def inert(text: str, kept: str = " \n") -> str:
    """The text with what could act on a terminal or turn a line round written out, for people: the rest stays."""
    return "".join(c if c.isprintable() or c in kept else _escaped(ord(c)) for c in text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the decoded text.

    A token is decoded behind those before it, because some tokenizers drop a space that comes first. Where a character
    is spread over tokens, the last of them has it and the others have no text.
    """
    texts: list[str] = []
    start = read = 0  # what was decoded last begins at `start`; up to `read` every token has its text
    for end in range(1, len(ids) + 1):
        before, now = (_decoded(tokenizer, ids[start:stop]) for stop in (read, end))
        if now.endswith(REPLACEMENT) and end < len(ids) and end - read < MOST_BYTES:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, end
    return texts


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], roles: Sequence[Role], before: Sequence[int] = ()
) -> tuple[Token, ...]:
    """The tokens of a part of a row; `before` are the ids of the row ahead of it."""
    special = set(tokenizer.all_special_ids)
    texts = pieces(tokenizer, [*before, *ids])[len(before) :]
    return tuple(Token(i, text, role, i in special) for i, text, role in zip(ids, texts, roles, strict=True))
