"""The steps of a section, in order, each with what it leaves out."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config_data import PrepareSection
from align.data.names import KINDS, Kind
from align.data.prepare.rows import row_steps
from align.data.prepare.steps import Left
from reward.records import InputError, Record, assistant_answer, user_prompt

EVERYTHING = PrepareSection(
    languages=["en"],
    min_answer_chars=2,
    max_answer_chars=500,
    max_prompt_chars=300,
    quality=["refusal", "truncated", "boilerplate", "repetition"],
    scrub=["email", "phone", "key", "card", "ip"],
)
RECORDS: dict[Kind, Record] = {
    "demonstration": {
        "prompt": user_prompt("Why does bread rise?"),
        "completion": assistant_answer("Yeast makes gas."),
    },
    "prompt": {"prompt": user_prompt("Why does bread rise?")},
    "preference": {
        "prompt": user_prompt("Why does bread rise?"),
        "chosen": assistant_answer("Yeast makes gas."),
        "rejected": assistant_answer("Magic."),
    },
    "unpaired": {"prompt": user_prompt("Why?"), "completion": assistant_answer("Yeast makes gas."), "label": False},
    "comparison": {"id": "1", "prompt": user_prompt("Why?"), "answers": [{"text": "Yeast."}, {"text": "Magic."}]},
}


def names(section: PrepareSection, kind: Kind) -> list[str]:
    return [step.name for step in row_steps(section, kind)]


def test_the_steps_that_are_switched_on_in_order() -> None:
    assert names(PrepareSection(), "demonstration") == ["normalise"]
    assert names(PrepareSection(normalise=False), "demonstration") == []
    assert names(EVERYTHING, "demonstration") == ["normalise", "length", "language", "quality", "scrub"]
    assert names(EVERYTHING, "preference")[-2:] == ["scrub", "scrubbed pairs"]
    assert names(EVERYTHING, "prompt") == ["normalise", "length", "language", "scrub"]
    assert names(PrepareSection(min_answer_chars=9, max_answer_chars=99), "prompt") == ["normalise"]
    assert names(PrepareSection(max_prompt_chars=9, quality=["refusal"]), "comparison") == ["normalise", "length"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_row_of_every_kind_comes_out_as_the_same_object(kind: Kind) -> None:
    record = RECORDS[kind]
    for step in pickle.loads(pickle.dumps(row_steps(EVERYTHING, kind))):
        assert step.apply(record) is record, step.name


def length(record: Record, **limits: int) -> Record | Left:
    kind: Kind = "preference" if "chosen" in record else "comparison" if "answers" in record else "demonstration"
    (step,) = row_steps(PrepareSection(normalise=False, **limits), kind)
    return step.apply(record)


def test_limits_of_length_are_inclusive() -> None:
    row = RECORDS["demonstration"]  # 20 and 16 characters
    assert length(row, min_answer_chars=16) is row and length(row, max_answer_chars=16) is row
    assert length(row, max_prompt_chars=20) is row
    short = Left("with an answer that is too short", "16 characters, at least 17 are kept")
    assert length(row, min_answer_chars=17) == short
    assert length(row, max_answer_chars=15) == Left(
        "with an answer that is too long", "16 characters, at most 15 are kept"
    )
    assert length(row, max_prompt_chars=19) == Left(
        "with a prompt that is too long", "20 characters, at most 19 are kept"
    )


def test_a_rejected_answer_may_be_short_and_not_long() -> None:
    row = RECORDS["preference"]  # chosen 16, rejected 6
    assert length(row, min_answer_chars=10) is row
    long = {**row, "rejected": assistant_answer("x" * 99)}
    assert isinstance(length(long, max_answer_chars=50), Left)
    assert isinstance(length(RECORDS["comparison"], max_answer_chars=5), Left)


def test_a_pair_that_differs_by_an_address_alone_is_none_once_it_is_scrubbed() -> None:
    pair = {
        **RECORDS["preference"],
        "chosen": assistant_answer("Ask ann@example.org."),
        "rejected": assistant_answer("Ask bob@example.org."),
    }
    scrubbing, looking = row_steps(PrepareSection(normalise=False, scrub=["email"]), "preference")
    scrubbed = scrubbing.apply(pair)
    assert isinstance(scrubbed, dict) and looking.apply(scrubbed) == Left("with identical chosen and rejected")
    assert looking.apply(pair) is pair


def test_an_answer_that_is_labelled_bad_is_not_judged() -> None:
    bad = {**RECORDS["unpaired"], "completion": assistant_answer("I'm sorry, but I can't help with that.")}
    (step,) = row_steps(PrepareSection(normalise=False, quality=["refusal"]), "unpaired")
    assert step.apply(bad) is bad
    assert step.apply({**bad, "label": True}) == Left("that refuses", "opens as an answer that declines")


def test_a_wrong_language_code_is_refused_before_the_first_row() -> None:
    with pytest.raises(InputError, match="did you mean 'en'"):
        row_steps(PrepareSection(languages=["english"]), "demonstration")


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from(["a", "I can't help", " ", "\r\n", "Ã©", "jane@x.org", "```\n", "(", "the", "1. ", "x" * 60]),
        max_size=12,
    )
)
def test_rows_once_prepared_are_left_alone(parts: list[str]) -> None:
    """What has gone through all steps goes through those that change texts again unchanged."""
    record: Record = {
        "prompt": user_prompt("Why? " + "".join(parts[:3])),
        "completion": assistant_answer("".join(parts)),
    }
    steps = row_steps(EVERYTHING, "demonstration")
    for step in steps:
        made = step.apply(record)
        if isinstance(made, Left):
            return
        record = made
    for step in steps:
        assert step.name not in ("normalise", "scrub") or step.apply(record) is record, step.name


def test_nothing_heavy_is_imported_before_a_row_comes() -> None:
    code = (
        "import sys, align.data.prepare.rows, align.data.prepare.augment;"
        "print([name for name in ('ftfy', 'py3langid', 'numpy', 'scipy', 'torch') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
