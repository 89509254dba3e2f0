"""Text of test sets in training rows: found in every format and to the word, and nothing by accident."""

from __future__ import annotations

import csv
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.prepare import contamination
from align.data.prepare.contamination import Contamination, Shared, decontamination
from align.data.prepare.duplicates import words
from align.data.prepare.steps import Left
from reward.records import InputError, assistant_answer, user_prompt

Row = dict[str, Any]

N = 13
QUESTION = (
    "A merchant of three cities buys seven silver lamps, sells five of them at twice their price, and gives the other "
    "two to her brother; how much has she earned?"
)
DIALOGUE = f"\n\nHuman: {QUESTION}\n\nAssistant:"
ANSWER = (
    "She pays seven prices and is paid ten, so her gain is three times what a single lamp had cost her in the morning "
    "market."
)


def write(path: Path, *rows: Row) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def looks_for(*paths: Path, n: int = N) -> Contamination:
    return Contamination([contamination.TestSet.of(path, n) for path in paths], n)


def demonstration(prompt: str, completion: str = "I do not know that.") -> Row:
    return {"prompt": user_prompt(prompt), "completion": assistant_answer(completion)}


# What is found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "completion": ANSWER},
        {"prompt": user_prompt(QUESTION), "chosen": assistant_answer(ANSWER), "rejected": assistant_answer("No.")},
        {"messages": [*user_prompt(QUESTION), *assistant_answer(ANSWER)]},
        {"instruction": QUESTION, "input": "", "output": ANSWER},
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        {"chosen": f"{DIALOGUE} {ANSWER}", "rejected": f"{DIALOGUE} No."},
        {"prompt": QUESTION, "answers": [{"text": ANSWER}, {"text": "No."}]},
        {"prompt": QUESTION, "canonical_solution": ANSWER},
        {"question": QUESTION, "answer": ANSWER},
        {"question_id": 81, "category": "maths", "turns": [QUESTION, ANSWER]},
        {"doc": {"stem": QUESTION, "choices": [{"label": "A", "text": ANSWER}]}},
        # Sound rows that are no records: both answers the same, and a role that nobody knows.
        {"prompt": QUESTION, "chosen": ANSWER, "rejected": ANSWER},
        {"messages": [{"role": "teacher", "content": QUESTION}, {"role": "pupil", "content": ANSWER}]},
    ],
)  # fmt: skip
def test_prompts_and_answers_of_a_test_set_in_any_format(tmp_path: Path, row: Row) -> None:
    looks = looks_for(write(tmp_path / "exam.jsonl", row))
    for text in (QUESTION, ANSWER):
        begins = " ".join(words(text)[:N])
        assert looks.find(demonstration(text)) == Shared("exam.jsonl", begins)
        assert looks.find(demonstration("Why is the sky blue?", f"Well: {text}")) == Shared("exam.jsonl", begins)
        pair = {
            "prompt": user_prompt("Why?"),
            "chosen": assistant_answer("So."),
            "rejected": assistant_answer(text.upper()),
        }
        assert looks.find(pair) == Shared("exam.jsonl", begins)
        answers = {"id": "1", "prompt": user_prompt("Why?"), "answers": [{"text": "So."}, {"text": text}]}
        assert looks.find(answers) == Shared("exam.jsonl", begins)
    assert looks.find(demonstration("Why is the sky blue?", "Because short waves are scattered more.")) is None


def test_a_table_and_a_list_are_read_as_well(tmp_path: Path) -> None:
    (tmp_path / "exam.json").write_text(json.dumps([{"question": QUESTION}]), "utf-8")
    with (tmp_path / "exam.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "question"], [1, QUESTION]])
    for name in ("exam.json", "exam.csv"):
        found = looks_for(tmp_path / name).find(demonstration(QUESTION))
        assert found is not None and found.test_set == name


def test_case_punctuation_and_white_space_make_no_difference(tmp_path: Path) -> None:
    looks = looks_for(write(tmp_path / "exam.jsonl", {"question": QUESTION}))
    mangled = QUESTION.upper().replace(",", " -").replace(" ", "\n ").replace(";", "")
    assert looks.find(demonstration(f"Tell me this, please: {mangled} (Think!)")) is not None


LETTERS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(st.lists(LETTERS, min_size=1, max_size=4), LETTERS)
def test_found_is_what_shares_a_run_of_different_words(
    tmp_path_factory: pytest.TempPathFactory, tests: list[list[str]], text: list[str]
) -> None:
    """Against sets of tuples: runs of 5 words of which 3 are different; shorter texts whole, from 3 words on."""

    def telling(said: list[str], n: int) -> set[tuple[str, ...]]:
        runs = {tuple(said[place : place + n]) for place in range(len(said) - n + 1)}
        return {run for run in runs if len(set(run)) > len(run) / 2}

    # The first row only keeps the file from having nothing to find.
    rows = [{"question": "one two three four"}, *({"question": " ".join(said)} for said in tests)]
    path = write(tmp_path_factory.mktemp("tests") / "t.jsonl", *rows)
    found = looks_for(path, n=5).find({"prompt": user_prompt(" ".join(text))})
    if len(text) >= 5:
        wanted = any(telling(text, 5) & telling(said, 5) for said in tests)
    else:
        wanted = len(text) >= 3 and bool(telling(text, len(text))) and text in tests
    assert (found is not None) == wanted
    assert found is None or found.words in " ".join(text)


@pytest.mark.parametrize(("shared", "found"), [(N - 1, False), (N, True), (N + 5, True)])
def test_a_run_is_as_long_as_one_says(tmp_path: Path, shared: int, found: bool) -> None:
    looks = looks_for(write(tmp_path / "exam.jsonl", {"question": QUESTION}))
    for start in range(3):
        part = " ".join(words(QUESTION)[start : start + shared])
        assert (looks.find(demonstration(f"It is said that {part} and so on")) is not None) == found


def test_a_short_question_counts_where_it_is_the_whole_turn(tmp_path: Path) -> None:
    rows = [{"prompt": "Who wrote the Iliad?", "completion": "It was Homer, they say."}, {"prompt": "Why?"}]
    looks = looks_for(write(tmp_path / "exam.jsonl", *rows))
    assert looks.find(demonstration("who wrote the ILIAD")) == Shared("exam.jsonl", "who wrote the iliad")
    assert looks.find(
        {"prompt": [*user_prompt("Hi"), *assistant_answer("Hello."), *user_prompt("Who wrote the Iliad?")]}
    )
    for prompt, answer in [
        ("Who wrote the Iliad and the Odyssey?", "Homer."),
        ("Name a poet.", "It was Homer, they say."),  # a short answer is nobody's property
        ("It was Homer, they say.", "Yes."),
        ("Tell me.", "Who wrote the Iliad?"),
        ("Why?", "Because."),
    ]:
        assert looks.find(demonstration(prompt, answer)) is None, prompt


# What is not found by accident


def test_few_words_said_again_and_again_are_no_test_set(tmp_path: Path) -> None:
    looks = looks_for(write(tmp_path / "exam.jsonl", {"question": "yes " * 40 + QUESTION}, {"question": "no no no no"}))
    for text in ["yes " * 5, "yes " * 40, "Yes! " * 13, "no no no no", "ha " * 50, "yes no " * 30]:
        assert looks.find(demonstration(text, text)) is None
    assert looks.find(demonstration(QUESTION)) is not None


def test_the_same_words_in_another_order_are_another_text(tmp_path: Path) -> None:
    looks = looks_for(write(tmp_path / "exam.jsonl", {"question": QUESTION}))
    draw = random.Random(0)
    for _ in range(20):
        assert looks.find(demonstration(" ".join(draw.sample(words(QUESTION), len(words(QUESTION)))))) is None


SYSTEM = "You are a helpful, respectful and honest assistant and always answer as truthfully and as briefly as you can."
SHAREGPT_ANSWER = {"from": "gpt", "value": ANSWER}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": SYSTEM}, *user_prompt(QUESTION), *assistant_answer(ANSWER)]},
        {"conversations": [{"from": "system", "value": SYSTEM}, {"from": "human", "value": QUESTION}, SHAREGPT_ANSWER]},
        {"system": SYSTEM, "instruction": QUESTION, "output": ANSWER},
        {"system_prompt": SYSTEM, "question": QUESTION},
        {"dialogue": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]},
    ],
)  # fmt: skip
def test_a_common_system_prompt_is_no_contamination(tmp_path: Path, row: Row) -> None:
    looks = looks_for(write(tmp_path / "exam.jsonl", row))
    system = [{"role": "system", "content": SYSTEM}]
    assert looks.find({"prompt": [*system, *user_prompt("Why is the sky blue?")]}) is None
    assert looks.find(demonstration(SYSTEM)) is None
    assert looks.find({"prompt": [*system, *user_prompt(QUESTION)]}) is not None


def test_what_all_texts_of_a_test_set_begin_with_is_a_template(tmp_path: Path) -> None:
    template = "Below is an instruction that describes a task. Write a response that appropriately completes it. "
    draw = random.Random(1)
    questions = [" ".join(f"w{draw.randrange(10**6)}" for _ in range(20)) for _ in range(30)]
    path = write(tmp_path / "exam.jsonl", *({"question": template + question} for question in questions))
    looks = looks_for(path)
    assert looks.tests[0].templates == len(words(template)) - N + 1
    assert looks.find(demonstration(template + "Write a poem about the sea.")) is None
    assert all(looks.find(demonstration(question)) is not None for question in questions)
    # One question in a hundred rows, beside a hundred answers, is still a question.
    rows = [{"question": QUESTION, "answer": question} for question in questions]
    assert looks_for(write(tmp_path / "again.jsonl", *rows)).find(demonstration(QUESTION)) is not None


# The step


def test_the_step_leaves_rows_out_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    paths = [
        write(tmp_path / "exam.jsonl", {"question": QUESTION}),
        write(tmp_path / "old" / "exam.jsonl", {"question": ANSWER}),
        write(tmp_path / "quiz.jsonl", {"question": "Who wrote the Iliad?"}),
    ]
    step = decontamination(paths)
    step = pickle.loads(pickle.dumps(step))  # as it goes to worker processes
    clean = demonstration("Why is the sky blue?")
    assert step.apply(clean) is clean
    left = step.apply(demonstration("Who wrote the Iliad?"))
    assert left == Left("shared with test set quiz.jsonl", "who wrote the iliad")
    # Two sets of one name are told apart.
    for path, text in zip(paths, (QUESTION, ANSWER), strict=False):
        left = step.apply(demonstration("Well?", text))
        assert left == Left(f"shared with test set {path}", " ".join(words(text)[:N]))


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ("", ["is empty"]),
        ('{"label": 1}\n', ["exam.jsonl", "has no text of at least 3 different words", "column of text"]),
        ('{"question": "yes yes yes yes"}\n', ["has no text"]),
        ('{"question": \n', ["line 1", "not valid JSON"]),
    ],
)
def test_a_test_set_without_text_is_refused(tmp_path: Path, rows: str, wanted: list[str]) -> None:
    path = tmp_path / "exam.jsonl"
    path.write_text(rows, "utf-8")
    with pytest.raises(InputError) as error:
        decontamination([path], N)
    assert all(part in str(error.value) for part in wanted), error.value


def test_a_missing_test_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        decontamination([tmp_path / "none.jsonl"], N)


def test_real_test_sets_are_found_in_themselves_and_hardly_in_others(shared_data: Path) -> None:
    path = shared_data / "data/eval/mt_bench_question.jsonl"
    looks = looks_for(path)
    turns = [turn for line in path.read_text("utf-8").splitlines() for turn in json.loads(line)["turns"]]
    missed = [turn for turn in turns if looks.find(demonstration(turn)) is None]
    assert all(len(words(turn)) < 3 or len(set(words(turn))) <= len(words(turn)) / 2 for turn in missed), missed
    others = [json.loads(line) for line in (shared_data / "data/instruct/instruct_mixed_4000.jsonl").open("rb")]
    found = [row for row in others if looks.find(demonstration(row["instruction"], row["output"])) is not None]
    assert len(found) < 10
