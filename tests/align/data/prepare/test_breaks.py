"""Answers that are cut are told from whole ones; `test_quality.py` has the ordinary answers that must pass."""

from __future__ import annotations

import pytest

from align.data.prepare.breaks import breaks_off

WHOLE = (
    "Sleep matters more than most people think. It sorts what you have learnt during the day. It also mends the body. "
    "Adults do best with seven to nine hours, and children need more than that."
)


@pytest.mark.parametrize(
    ("answer", "where"),
    [
        ("```py\nx = [1,", "in an open code block"),
        ("Like this:\n\n```\nfor x in y:\n    print(x)\n", "in an open code block"),
        ("- flour\n- sugar\n-", "at an empty list item"),
        ("1. Eat well.\n2. Sleep well.\n3.", "at an empty list item"),
        ("It is a matter of taste (", "after an opening bracket"),
        ("This is what they call an inter-", "within a word"),
        ("We went to the market and bought some bread, and then we saw,", "after a comma"),
        ("There are many reasons for this, such as the", "after 'the'"),
        ("You should not do that because", "after 'because'"),
        ("Here are some of the steps you can follow:", "after announcing more"),
        ("The result depends on many factors (such as age and the wea", "within a bracket"),
        (WHOLE[:-20], "within a sentence"),
        (
            "1. Heart: it grows. It is good.\n2. Diet: eat greens.\n3. Sleep: regular sleep can improve your mo",
            "within a sentence",
        ),
        ("今天天气很好。我们去公园。他们也去。因为那里有很多花和树所以", "within a sentence"),
    ],
)
def test_answers_that_break_off(answer: str, where: str) -> None:
    assert breaks_off(answer) == where


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "The year was\n1984.",  # no item of a list
        "Wash the rice.\n2.",
        "-",
        "```py\nx = [1,\n```",
        "``` a",
        "Vitamin B, C and",
        "Pick between a and",  # too short to judge
        "It is (a",
        "A line\nof a poem without any stop\nand of some length in words\nas this one is in the end",
    ],
)
def test_what_may_be_whole_is_let_alone(answer: str) -> None:
    assert breaks_off(answer) in ("", "in an open code block") and (answer == "``` a") == bool(breaks_off(answer))


def test_a_whole_answer_cut_anywhere_in_its_last_sentence_is_found_unless_it_seems_whole() -> None:
    """From the fourth word of the last sentence on; not where the cut falls after a comma or space that is dropped."""
    start = WHOLE.index("Adults do best")
    cuts = [WHOLE[:end] for end in range(start + len("Adults do best wi"), len(WHOLE))]
    found = [cut for cut in cuts if breaks_off(cut)]
    assert breaks_off(WHOLE) == "" and len(found) >= 0.95 * len(cuts)
