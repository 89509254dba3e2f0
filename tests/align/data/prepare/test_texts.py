"""Code is told from prose, and every text of a record is changed, or none."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.prepare.texts import CODE, FENCED, outside, prose, with_texts
from reward.records import Record, assistant_answer, user_prompt


def upper(text: str) -> str:
    return outside(CODE, text, str.upper)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a `b` c", "A `b` C"),
        ("a\n```py\nb\n\n  c\n```\nd", "A\n```py\nb\n\n  c\n```\nD"),
        ("a\n~~~\nb\n~~~\nc", "A\n~~~\nb\n~~~\nC"),
        ("- a\n  ```\n  b\n  ```\n- c", "- A\n  ```\n  b\n  ```\n- C"),  # in a list
        ("````\n```\na\n```\n````\nb", "````\n```\na\n```\n````\nB"),  # a fence within a longer one
        ("a\n```\nb", "A\n```\nb"),  # never closed
        ("``` a", "``` a"),  # never begun: the rest of the line is its language
        ("a ` b", "A ` B"),
        ("a `b\nc` d", "A `B\nC` D"),  # not across lines
        ("```a``` b", "```a``` B"),  # in a line
        ("~~~ the end ~~~\na", "~~~ THE END ~~~\nA"),  # an ornament
    ],
)
def test_what_is_code_is_left_alone(text: str, wanted: str) -> None:
    assert upper(text) == wanted


@settings(derandomize=True, deadline=None)
@given(st.text(alphabet="ab`~\n \t", max_size=60))
def test_a_text_put_together_again_is_itself(text: str) -> None:
    for pattern in (CODE, FENCED):
        assert outside(pattern, text, lambda part: part) == text


def test_prose_is_without_code_and_addresses() -> None:
    text = "See https://example.org/a?b=c (or www.example.org) and `x = 1`:\n```\ny\n```\nDone."
    assert prose(text).split() == ["See", "(or", ")", "and", ":", "Done."]
    assert prose("No code.") == "No code."


def test_every_text_is_changed_and_nothing_else() -> None:
    pair: Record = {
        "prompt": user_prompt("why", system="be brief"),
        "chosen": assistant_answer("a"),
        "rejected": assistant_answer("b"),
        "source": "s",
    }
    made = with_texts(pair, str.upper)
    assert made == {
        "prompt": user_prompt("WHY", system="BE BRIEF"),
        "chosen": assistant_answer("A"),
        "rejected": assistant_answer("B"),
        "source": "s",
    }
    assert pair["prompt"][1]["content"] == "why"  # the record that went in is as it was
    compared: Record = {"id": "1", "prompt": user_prompt("WHY"), "answers": [{"text": "a", "model": "m"}]}
    assert with_texts(compared, str.upper) == {**compared, "answers": [{"text": "A", "model": "m"}]}


def test_the_same_object_where_nothing_changes() -> None:
    record: Record = {"prompt": user_prompt("WHY"), "completion": assistant_answer("A")}
    assert with_texts(record, str.upper) is record


@pytest.mark.parametrize("unit", ["`", "```\n", "~~~~\na", "``` a\n", "\n```", "`a\n", " ```", "\t"])
def test_hostile_code_takes_linear_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    prose(text)
    assert time.process_time() - start < 1
