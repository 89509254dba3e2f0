"""Tokens as text: nothing is lost, nothing acts, and no two texts look the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.inspect.tokens import PART_OF_CHARACTER, Part, Token, pieces, tokens_of, visible

deterministic = settings(derandomize=True, deadline=None, max_examples=200)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def pieced() -> PreTrainedTokenizerFast:
    """As SentencePiece writes words, with a mark before them that decoding drops from the first."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    made = Tokenizer(BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = ["the rain falls on the garden and on the river"] * 20
    made.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


@deterministic
@given(text=TEXTS)
def test_pieces_together_are_the_decoded_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids) == text


def test_a_character_in_several_tokens_is_told_once(tokenizer: Any) -> None:
    ids = tokenizer("a🦆b")["input_ids"]
    assert len(ids) == 6
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🦆", "b"]
    shown = [token.shown for token in tokens_of(tokenizer, ids, ["loss"] * 6)]
    assert shown == ["a", PART_OF_CHARACTER, PART_OF_CHARACTER, PART_OF_CHARACTER, "🦆", "b"]


def test_a_row_that_ends_within_a_character_has_a_text_for_every_token(tokenizer: Any) -> None:
    ids = tokenizer("a🦆")["input_ids"][:3]
    assert pieces(tokenizer, ids) == ["a", "", "\ufffd"]


def test_bytes_that_are_no_character_do_not_swallow_the_rest(tokenizer: Any) -> None:
    alone = tokenizer("🦆")["input_ids"][0]
    ids = [alone] * 9 + tokenizer("rain")["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found).endswith("rain") and found[-1]
    assert sum(bool(piece) for piece in found[:9]) >= 2


def test_spaces_that_a_tokenizer_drops_from_single_tokens_are_there(pieced: PreTrainedTokenizerFast) -> None:
    ids = pieced("the rain falls")["input_ids"]
    assert pieced.decode(ids[-1:]) == pieced.decode(ids[-1:]).lstrip()  # alone, the space is gone
    found = pieces(pieced, ids)
    assert "".join(found) == "the rain falls" and any(piece.startswith(" ") for piece in found)


def test_an_answer_is_decoded_behind_its_prompt(pieced: PreTrainedTokenizerFast) -> None:
    prompt, answer = pieced("the rain")["input_ids"], pieced("falls")["input_ids"]
    told = tokens_of(pieced, answer, ["loss"] * len(answer), before=prompt)
    assert "".join(token.text for token in told) == " falls"


@deterministic
@given(text=st.text(max_size=40))
def test_what_is_shown_is_one_line_of_printable_characters(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable() and " " not in shown


@deterministic
@given(text=st.text(max_size=40))
def test_what_is_shown_says_exactly_what_the_text_is(text: str) -> None:
    """Read back, it is the text: so no two texts look the same."""
    plain = {"\\n": "\n", "\\r": "\r", "\\t": "\t", "\\\\": "\\", "␣": " "}
    pattern = r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}|\\.|␣"
    read = re.sub(pattern, lambda m: plain.get(m[0]) or chr(int(m[0][2:], 16)), visible(text))
    assert read == text


@pytest.mark.parametrize(("text", "shown"), [
    ("a b", "a␣b"), ("␣", "\\u2423"), ("\n", "\\n"), ("\\n", "\\\\n"), ("\x1b[31m", "\\x1b[31m"), ("\u202e", "\\u202e"),
    ("\u200b", "\\u200b"), ("\U000e0041", "\\U000e0041"), ("\xa0", "\\xa0"), ("é水🦆", "é水🦆"), ("<b>", "<b>"),
])  # fmt: skip
def test_shown_by_hand(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_counts_say_what_is_trained() -> None:
    told = tuple(Token(number, "x", role) for number, role in enumerate(["context", "loss", "loss"]))
    assert Part("answer", told, "no stop token").counts == "3 tokens, 2 with loss, no stop token"
    assert Part("prompt", told[:1], "").counts == "1 token, none with loss"
    assert Part("chosen", (Token(1, "x", "context"), Token(2, "y", "score")), "").counts == "2 tokens"
    assert [(role, len(run)) for role, run in Part("answer", told, "").runs] == [("context", 1), ("loss", 2)]
