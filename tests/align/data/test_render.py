"""The answer mask covers the answer and its stop token, nothing else, and the prompt is what generation starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.data.render import answer_ids, demonstration_row, fit, preference_row, prompt_ids
from reward.records import InputError, assistant_answer, user_prompt

deterministic = settings(derandomize=True, deadline=None)

CONVERSATIONS = {
    "one turn": user_prompt("What is rain?"),
    "system": user_prompt("What is rain?", system="Be brief."),
    "several turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello, how can I help?"},
        {"role": "user", "content": "What is salt?"},
        {"role": "assistant", "content": "A mineral."},
        {"role": "user", "content": "And paper?"},
    ],
    "tool": [*user_prompt("What time is it?"), {"role": "tool", "content": "12:30"}],
}
ANSWER = assistant_answer("The answer about rain is short and kind.")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def with_template(tiny_model: Path, template: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    return tokenizer


def chatml(prompt: list[dict[str, str]]) -> str:
    """The template worked by hand."""
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in prompt)
    return turns + "<|im_start|>assistant\n"


@pytest.mark.parametrize("prompt", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_the_mask_covers_the_answer_and_its_stop_token(
    tokenizer: PreTrainedTokenizerFast, prompt: list[dict[str, str]]
) -> None:
    row = demonstration_row(tokenizer, {"prompt": prompt, "completion": ANSWER})
    trained = [label for label in row["labels"] if label != -100]
    untrained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert tokenizer.decode(untrained) == chatml(prompt)
    assert tokenizer.decode(trained) == ANSWER[0]["content"] + "<|im_end|>"
    assert trained.count(tokenizer.eos_token_id) == 1 and trained[-1] == tokenizer.eos_token_id
    assert row["labels"] == [-100] * len(untrained) + trained
    assert row["input_ids"] == untrained + trained


@pytest.mark.parametrize("prompt", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_prompt_and_answer_begin_the_tokenisation_of_the_whole_conversation(
    tokenizer: PreTrainedTokenizerFast, prompt: list[dict[str, str]]
) -> None:
    whole = tokenizer.apply_chat_template([*prompt, *ANSWER], return_dict=True)["input_ids"]
    before, answer = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, prompt, ANSWER)
    assert before + answer == whole[: len(before) + len(answer)]
    assert tokenizer.decode(whole[len(before) + len(answer) :]) == "\n"  # what the template writes after the stop token
    # and the same by the library's own route: a mask of assistant tokens from the prompt's length
    assert before == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def test_preference_row_masks_both_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = CONVERSATIONS["several turns"]
    row = preference_row(
        tokenizer, {"prompt": prompt, "chosen": ANSWER, "rejected": assistant_answer("No."), "margin": 1.0}
    )
    assert {key: tokenizer.decode(ids) for key, ids in row.items()} == {
        "prompt_ids": chatml(prompt),
        "chosen_ids": ANSWER[0]["content"] + "<|im_end|>",
        "rejected_ids": "No.<|im_end|>",
    }


def test_rendering_changes_nothing_it_is_given(tokenizer: PreTrainedTokenizerFast) -> None:
    record = {"prompt": user_prompt("Why?"), "completion": assistant_answer("Because.")}
    demonstration_row(tokenizer, record)
    assert record == {"prompt": user_prompt("Why?"), "completion": assistant_answer("Because.")}


def test_padding_is_not_the_stop_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    row = demonstration_row(tokenizer, {"prompt": user_prompt("Why?"), "completion": ANSWER})
    assert tokenizer.pad_token_id not in row["input_ids"]


# Without the special tokens' own spelling: text that holds them is not what these rows are about.
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(
    lambda text: bool(text.strip()) and "<|" not in text
)


@settings(deterministic, max_examples=150)
@given(texts, texts)
def test_tokens_decode_to_the_texts(tiny_model: Path, question: str, answer: str) -> None:
    tokenizer = _cached(tiny_model)
    prompt, completion = user_prompt(question), assistant_answer(answer)
    before, after = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, prompt, completion)
    assert tokenizer.decode(before, clean_up_tokenization_spaces=False) == chatml(prompt)
    assert tokenizer.decode(after, clean_up_tokenization_spaces=False) == answer + "<|im_end|>"
    assert (
        tokenizer.decode(before + after, clean_up_tokenization_spaces=False) == chatml(prompt) + answer + "<|im_end|>"
    )


_tokenizers: dict[Path, Any] = {}


def _cached(folder: Path) -> Any:
    if folder not in _tokenizers:
        _tokenizers[folder] = AutoTokenizer.from_pretrained(folder)
    return _tokenizers[folder]


def test_an_answer_that_merges_with_the_border_keeps_the_prompt_of_generation(tiny_model: Path) -> None:
    """A tokenizer with a token for two newlines: the template's own and the answer's first would become one."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "ĊĊ"])}
    model = Tokenizer(BPE(vocabulary, [("Ċ", "Ċ")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    merging = PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=AutoTokenizer.from_pretrained(tiny_model).chat_template,
    )
    prompt, answer = user_prompt("Why?"), assistant_answer("\n\nBecause.")
    whole = merging.apply_chat_template([*prompt, *answer], return_dict=True)["input_ids"]
    before = prompt_ids(merging, prompt)
    assert whole[: len(before)] != before  # else this test shows nothing
    assert merging.decode(answer_ids(merging, prompt, answer)) == "\n\nBecause.<|im_end|>"


# Templates that cannot be used


def test_a_template_that_changes_the_prompt_is_refused(tiny_model: Path) -> None:
    counting = "{{ messages | length }} turns\n{% for m in messages %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    with pytest.raises(InputError) as error:
        answer_ids(with_template(tiny_model, counting), user_prompt("Why?"), ANSWER)
    message = str(error.value)
    assert message.startswith("the chat template renders a prompt differently once an answer follows")
    assert "'1 turns\\nWhy?" in message and "'2 turns\\nWhy?" in message
    assert message.endswith("Set model.chat_template.")


def test_a_template_without_the_generation_prompt_in_the_answer_is_refused(tiny_model: Path) -> None:
    other = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant says: ' }}{% endif %}"
    )
    with pytest.raises(InputError, match=r"Assistant says: .* alone and .*assistant: The answe"):
        answer_ids(with_template(tiny_model, other), user_prompt("Why?"), ANSWER)


def test_a_template_without_a_stop_token_is_refused(tiny_model: Path) -> None:
    endless = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(InputError, match=r"writes no stop token \(<\|im_end\|>\) after an answer"):
        answer_ids(with_template(tiny_model, endless), user_prompt("Why?"), ANSWER)


def test_a_stop_token_before_the_answer_does_not_count(tiny_model: Path) -> None:
    """A template that closes the user's turn but not the assistant's."""
    template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'user' %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match="writes no stop token"):
        answer_ids(with_template(tiny_model, template), user_prompt("Why?"), ANSWER)


# fit


def test_fit_keeps_the_order_and_counts() -> None:
    records = [{"n": n} for n in (3, 9, 10, 11, 1)]
    kept, too_long = fit(records, lambda r: r["n"], 10, "rows", "sft.max_length")
    assert [r["n"] for r in kept] == [3, 9, 10, 1]
    assert [r["n"] for r in too_long] == [11]
    assert fit([], lambda r: r["n"], 10, "rows", "sft.max_length") == ([], [])


def test_fit_names_the_limit_the_longest_and_the_key() -> None:
    with pytest.raises(
        InputError, match=r"all 2 pairs are longer than dpo\.max_length=4 tokens \(the longest has 7\): raise dpo\.max"
    ):
        fit([{"n": 5}, {"n": 7}], lambda r: r["n"], 4, "pairs", "dpo.max_length")
