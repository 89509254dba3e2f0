"""Every data convention becomes the same records; what cannot is refused by file and line, or left out and counted."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.data.load import Loaded, load_demonstrations, load_preferences, load_prompts, only, unique_prompts
from reward.records import InputError, prompt_id, read_jsonl, split_of, user_prompt

Row = dict[str, Any]
Load = Callable[..., Loaded]

USER = [{"role": "user", "content": "Why?"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?"},
]
GOOD = [{"role": "assistant", "content": "Because."}]
BAD = [{"role": "assistant", "content": "No idea."}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
        return path

    return write


def fields(record: Row, *names: str) -> tuple[Any, ...]:
    return tuple(record[name] for name in names)


# Formats


@pytest.mark.parametrize(
    ("row", "format", "prompt"),
    [
        ({"prompt": "Why?", "completion": "Because."}, "prompt/completion", USER),
        ({"prompt": TALK, "completion": GOOD}, "prompt/completion", TALK),
        ({"prompt": TALK, "completion": "Because."}, "prompt/completion", TALK),
        ({"messages": [*TALK, *GOOD]}, "messages", TALK),
        ({"instruction": "Why?", "output": "Because."}, "instruction/input/output", USER),
        ({"instruction": "Why?", "input": None, "output": "Because."}, "instruction/input/output", USER),
        (
            {"instruction": " Add. ", "input": "1, 2\n", "output": "Because."},
            "instruction/input/output",
            user_prompt("Add.\n\n1, 2"),
        ),
        (
            {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."},
            "prompt/chosen/rejected, chosen answers as demonstrations",
            USER,
        ),
    ],
)
def test_demonstrations(write: Callable[..., Path], row: Row, format: str, prompt: list[Row]) -> None:
    loaded = load_demonstrations(write(row), 0.2)
    assert loaded.format == format and loaded.dropped == []
    [record] = loaded.records
    assert fields(record, "prompt", "completion", "split") == (prompt, GOOD, split_of(prompt, 0.2))
    assert "chosen" not in record and "rejected" not in record


@pytest.mark.parametrize(
    ("row", "format", "prompt"),
    [
        ({"prompt": "Why?"}, "prompt", USER),
        ({"prompt": TALK}, "prompt", TALK),
        ({"messages": TALK}, "messages", TALK),
        ({"messages": [*TALK, *GOOD]}, "messages", TALK),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "instruction", user_prompt("Add.\n\n1, 2")),
        ({"prompt": "Why?", "completion": "Because."}, "prompt", USER),
    ],
)
def test_prompts(write: Callable[..., Path], row: Row, format: str, prompt: list[Row]) -> None:
    loaded = load_prompts(write(row), 0.2)
    assert loaded.format == format
    [record] = loaded.records
    assert fields(record, "prompt", "split") == (prompt, split_of(prompt, 0.2))


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "format", "prompt"),
    [
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}, "prompt/chosen/rejected", USER),
        ({"prompt": TALK, "chosen": GOOD, "rejected": BAD}, "prompt/chosen/rejected", TALK),
        ({"messages": TALK, "chosen": "Because.", "rejected": "No idea."}, "messages/chosen/rejected", TALK),
        (
            {"instruction": "Add.", "input": "1, 2", "chosen": "Because.", "rejected": "No idea."},
            "instruction/chosen/rejected",
            user_prompt("Add.\n\n1, 2"),
        ),
        (
            {"chosen": HH + " Because.", "rejected": HH + " No idea.\n"},
            "dialogues chosen/rejected",
            TALK[1:],
        ),
        ({"chosen": [*TALK, *GOOD], "rejected": [*TALK, *BAD]}, "dialogues chosen/rejected", TALK),
        (
            {"chosen": "Human: Why?\n\nAssistant: Because.", "rejected": "Human: Why?\n\nAssistant: No idea."},
            None,
            USER,
        ),
    ],
)
def test_preferences(write: Callable[..., Path], row: Row, format: str | None, prompt: list[Row]) -> None:
    loaded = load_preferences(write(row), 0.2)
    assert loaded.format == (format or loaded.format) and loaded.dropped == []
    [record] = loaded.records
    wanted = (prompt, GOOD, BAD, split_of(prompt, 0.2))
    assert fields(record, "prompt", "chosen", "rejected", "split") == wanted


def test_paragraphs_inside_a_dialogue_turn_stay_in_it(write: Callable[..., Path]) -> None:
    answer = "First.\n\nSecond, with a Human: inside.\n\n- Assistant: a word"
    row = {"chosen": HH + " " + answer, "rejected": HH + " No."}
    assert load_preferences(write(row), 0.2).records[0]["chosen"][0]["content"] == answer


def test_extra_columns_ride_along(write: Callable[..., Path]) -> None:
    row = {"prompt": "Why?", "completion": "Because.", "topic": {"name": "life"}, "licence": None}
    for load in (load_demonstrations, load_prompts):
        [record] = load(write(row), 0.2).records
        assert fields(record, "topic", "licence") == ({"name": "life"}, None)
    [record] = load_preferences(write({"chosen": HH + " A", "rejected": HH + " B", "margin": 0.5}), 0.2).records
    assert record["margin"] == 0.5


# What is refused


@pytest.mark.parametrize(
    ("load", "row", "wanted"),
    [
        (load_demonstrations, {"question": 1, "answer": 2}, ["answer, question", "demonstrations", "completion"]),
        (
            load_demonstrations,
            {"prompt": "Why?"},
            ["columns prompt", "prompt and completion, messages, or instruction"],
        ),
        (load_prompts, {"query": 1}, ["columns query", "prompt, messages or instruction"]),
        (load_preferences, {"prompt": "a", "chosen": "b"}, ["columns chosen, prompt", "chosen and rejected"]),
        (load_preferences, {"prompt": "a", "better": "b", "worse": "c"}, ["better, prompt, worse", "preferences"]),
    ],
)
def test_unknown_columns_are_named_with_those_wanted(
    write: Callable[..., Path], load: Load, row: Row, wanted: list[str]
) -> None:
    path = write(row)
    with pytest.raises(InputError) as error:
        load(path, 0.2)
    for part in [str(path), *wanted]:
        assert part in str(error.value)


FINE_DEMONSTRATION = {"prompt": "Why?", "completion": "Because."}
FINE_MESSAGES = {"messages": [*USER, *GOOD]}
FINE_INSTRUCTION = {"instruction": "Why?", "output": "Because."}
FINE_PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
FINE_DIALOGUES = {"chosen": HH + " A", "rejected": HH + " B"}


@pytest.mark.parametrize(
    ("load", "fine", "row", "wanted"),
    [
        (
            load_demonstrations,
            FINE_DEMONSTRATION,
            {"prompt": "x"},
            "column `completion` is missing; the row has prompt",
        ),
        (load_demonstrations, FINE_DEMONSTRATION, {"prompt": None, "completion": "a"}, "column `prompt` is missing"),
        (load_demonstrations, FINE_DEMONSTRATION, {"prompt": 7, "completion": "a"}, "but this is 7"),
        (load_demonstrations, FINE_DEMONSTRATION, {"prompt": "", "completion": "a"}, "the prompt is empty"),
        (load_demonstrations, FINE_DEMONSTRATION, {"prompt": [], "completion": "a"}, "but this is []"),
        (load_demonstrations, FINE_DEMONSTRATION, {"prompt": {"text": "x"}, "completion": "a"}, "but this is {'text'"),
        (load_demonstrations, FINE_DEMONSTRATION, {"prompt": [["x"]], "completion": "a"}, "but this is [['x']]"),
        (load_demonstrations, FINE_DEMONSTRATION, {"prompt": "x", "completion": 3.5}, "but this is 3.5"),
        (load_demonstrations, FINE_DEMONSTRATION, {"prompt": "x", "completion": USER}, "its turns are: user"),
        (load_demonstrations, FINE_DEMONSTRATION, {"prompt": [*USER, *GOOD], "completion": "a"}, "ends with assistant"),
        (load_demonstrations, FINE_DEMONSTRATION, {"prompt": TALK[:1], "completion": "a"}, "ends with system"),
        (
            load_demonstrations,
            FINE_MESSAGES,
            {"messages": [{"role": "human", "content": "x"}, {"role": "gpt", "content": "y"}]},
            "role 'human' is unknown; the roles are system, user, assistant, tool",
        ),
        (load_demonstrations, FINE_MESSAGES, {"messages": [{"from": "human", "value": "x"}]}, "role None is unknown"),
        (load_demonstrations, FINE_MESSAGES, {"messages": [{"role": ["user"], "content": "x"}]}, "is unknown"),
        (
            load_demonstrations,
            FINE_MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, *GOOD]},
            "the content of a user turn is [{'type': 'text'}], but text is wanted",
        ),
        (load_demonstrations, FINE_MESSAGES, {"messages": [{"role": "user", "content": None}]}, "user turn is None"),
        (load_demonstrations, FINE_MESSAGES, {"messages": USER}, "must end with an assistant turn, but ends with user"),
        (load_demonstrations, FINE_MESSAGES, {"messages": GOOD}, "ends with nothing"),
        (load_demonstrations, FINE_INSTRUCTION, {"instruction": "x", "output": ["a"]}, "`output` is ['a']"),
        (load_demonstrations, FINE_INSTRUCTION, {"instruction": " ", "output": "a"}, "the instruction is empty"),
        (load_demonstrations, FINE_INSTRUCTION, {"instruction": 5, "output": "a"}, "`instruction` is 5"),
        (load_demonstrations, FINE_INSTRUCTION, {"instruction": "x", "input": 5, "output": "a"}, "`input` is 5"),
        (load_prompts, {"prompt": "x"}, {"messages": USER}, "column `prompt` is missing; the row has messages"),
        (load_prompts, {"messages": USER}, {"messages": GOOD}, "ends with nothing"),
        (load_prompts, {"instruction": "x"}, {"instruction": "x", "input": {}}, "`input` is {}"),
        (load_preferences, FINE_PAIR, {"prompt": "x", "chosen": "a"}, "column `rejected` is missing"),
        (load_preferences, FINE_PAIR, {"prompt": "x", "chosen": "a", "rejected": None}, "column `rejected` is missing"),
        (load_preferences, FINE_PAIR, {"prompt": "x", "chosen": 1, "rejected": 2}, "but this is 1"),
        (
            load_preferences,
            FINE_PAIR,
            {"prompt": "x", "chosen": [*USER, *GOOD], "rejected": [*USER, *BAD]},
            "`chosen` should be one assistant turn beside its prompt, but its turns are: user, assistant",
        ),
        (
            load_preferences,
            FINE_DIALOGUES,
            {"chosen": "Blue.", "rejected": "Red."},
            "`chosen` is text without a prompt",
        ),
        (load_preferences, FINE_DIALOGUES, {"chosen": HH + " A", "rejected": "\n\nAssistant: B"}, "without a prompt"),
        (load_preferences, FINE_DIALOGUES, {"chosen": HH + " A\n\nHuman: x", "rejected": HH}, "but ends with user"),
        (
            load_preferences,
            FINE_DIALOGUES,
            {"chosen": "Be kind." + HH + " A", "rejected": "Be kind." + HH + " B"},
            "`chosen` has text before its first turn, 'Be kind.'",
        ),
        (load_preferences, FINE_DIALOGUES, {"chosen": GOOD, "rejected": BAD}, "ends with nothing"),
        (load_demonstrations, FINE_DEMONSTRATION, "[1, 2]", "a JSON list, but an object"),
        (load_demonstrations, FINE_DEMONSTRATION, '{"prompt": ', "not valid JSON"),
        (load_demonstrations, FINE_DEMONSTRATION, '{"prompt": ' + "[" * 100_000, "cannot be read"),
        (load_demonstrations, FINE_DEMONSTRATION, '{"prompt": ' + "1" * 5000 + "}", "cannot be read"),
        (load_demonstrations, FINE_DEMONSTRATION, '{"prompt": "\\ud83d", "completion": "a"}', "half of a character"),
        (
            load_demonstrations,
            FINE_DEMONSTRATION,
            FINE_DEMONSTRATION | {"split": "valid"},
            "split is 'valid', but train",
        ),
        (load_prompts, {"prompt": "x"}, {"prompt": "y", "split": None}, "split is None, but train or test"),
        (load_preferences, FINE_PAIR, FINE_PAIR | {"split": ["test"]}, "split is ['test'], but train or test"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(
    write: Callable[..., Path], load: Load, fine: Row, row: Any, wanted: str
) -> None:
    path = write(fine, "", fine, row)  # the blank line counts
    with pytest.raises(InputError) as error:
        load(path, 0.2)
    assert f"{path}, line 4: " in str(error.value)
    assert wanted in str(error.value)


def test_a_whole_character_beyond_16_bits_is_text(write: Callable[..., Path]) -> None:
    assert load_prompts(write('{"prompt": "\\ud83d\\ude00"}'), 0.2).records[0]["prompt"][0]["content"] == "😀"


@pytest.mark.parametrize("load", [load_demonstrations, load_prompts, load_preferences])
def test_missing_and_empty_files(tmp_path: Path, load: Load) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "none.jsonl", 0.2)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="is empty"):
        load(tmp_path / "empty.jsonl", 0.2)


# What is left out


def test_rows_left_out_are_kept_with_their_reason(write: Callable[..., Path]) -> None:
    other = HH.replace("Why?", "Who?")
    rows = [
        {"chosen": HH + " A", "rejected": HH + " B"},
        {"chosen": HH + " A", "rejected": HH + "  A\n"},
        {"chosen": HH + " A", "rejected": other + " B"},
        {"chosen": HH, "rejected": HH + " B"},
        {"chosen": HH + " A", "rejected": HH},
    ]
    loaded = load_preferences(write(*rows), 0.2)
    reasons = [
        "with identical chosen and rejected",
        "whose chosen and rejected dialogues do not share their prompt",
        "with an empty chosen answer",
    ]
    assert [d["reason"] for d in loaded.dropped] == reasons
    assert [d["record"] for d in loaded.dropped] == rows[1:4]
    assert len(loaded.records) == 2  # an empty answer may be the worse one
    assert loaded.counts()["left out"] == dict.fromkeys(reasons, 1)
    assert all(f"1 {reason}" in loaded.sentence() for reason in reasons)


def test_empty_demonstrations_are_left_out(write: Callable[..., Path]) -> None:
    loaded = load_demonstrations(write(FINE_DEMONSTRATION, {"prompt": "Who?", "completion": " \n"}), 0.2)
    assert len(loaded.records) == 1
    assert loaded.counts()["left out"] == {"with an empty answer": 1}


@pytest.mark.parametrize(
    ("load", "row"),
    [
        (load_demonstrations, {"prompt": "Why?", "completion": ""}),
        (load_demonstrations, {"prompt": "Why?", "chosen": "a", "rejected": "a"}),
        (load_preferences, {"prompt": "Why?", "chosen": "a", "rejected": "a"}),
        (load_preferences, {"prompt": "Why?", "chosen": "", "rejected": "a"}),
    ],
)
def test_nothing_left_is_refused_with_the_reason(write: Callable[..., Path], load: Load, row: Row) -> None:
    with pytest.raises(InputError, match=r"no row is left \(0 rows .*left out: 2 with"):
        load(write(row, row), 0.2)


def test_max_rows_reads_the_first(write: Callable[..., Path]) -> None:
    path = write(*({"prompt": f"Why {i}?", "completion": "Because."} for i in range(9)))
    assert [r["prompt"][0]["content"] for r in load_demonstrations(path, 0.2, 3).records] == [
        "Why 0?",
        "Why 1?",
        "Why 2?",
    ]


# Sides


def test_the_sides_do_not_depend_on_the_order_and_hold_the_share(write: Callable[..., Path]) -> None:
    rows = [{"prompt": f"Question number {i}?"} for i in range(4000)]
    sides = {r["prompt"][0]["content"]: r["split"] for r in load_prompts(write(*rows), 0.2).records}
    random.Random(0).shuffle(rows)
    again = {r["prompt"][0]["content"]: r["split"] for r in load_prompts(write(*rows[:3000]), 0.2).records}
    assert again.items() <= sides.items()
    # 800 expected; the standard deviation of a binomial count is 25.
    assert abs(sum(side == "test" for side in sides.values()) - 800) < 100


def test_a_larger_share_only_adds_to_the_test_side(write: Callable[..., Path]) -> None:
    path = write(*({"prompt": f"Question number {i}?"} for i in range(500)))
    small, large = (
        {r["prompt"][0]["content"] for r in load_prompts(path, share).records if r["split"] == "test"}
        for share in (0.1, 0.3)
    )
    assert small < large


@pytest.mark.parametrize(
    ("load", "row"),
    [(load_demonstrations, FINE_DEMONSTRATION), (load_prompts, {"prompt": "x"}), (load_preferences, FINE_PAIR)],
)
@pytest.mark.parametrize("side", ["train", "test"])
def test_a_split_column_is_honoured(write: Callable[..., Path], load: Load, row: Row, side: str) -> None:
    assert [r["split"] for r in load(write(row | {"split": side}), 0.5).records] == [side]


def test_a_prompt_on_both_sides_is_refused(write: Callable[..., Path]) -> None:
    rows = [{"prompt": "Why?", "split": "train"}, {"prompt": " why? ", "split": "test"}]
    with pytest.raises(InputError, match="train side in one row and on the test side in another"):
        load_prompts(write(*rows), 0.2)


def test_unique_prompts_and_only() -> None:
    def record(text: str, split: str, **extra: Any) -> Row:
        return {"prompt": user_prompt(text), "split": split, **extra}

    first = [record("Why?", "train", completion=GOOD), record("Who?", "test")]
    second = [record(" why?", "train"), record("When?", "train", topic="time")]
    found = unique_prompts(first, second)
    assert [r["prompt"][0]["content"] for r in found] == ["Why?", "Who?", "When?"]
    assert [r["prompt_id"] for r in found] == [prompt_id(user_prompt(text)) for text in ("Why?", "Who?", "When?")]
    assert {key for r in found for key in r} == {"prompt", "prompt_id", "split", "topic"}  # answers stay behind
    assert [r["prompt"][0]["content"] for r in only("test", found, "prompts")] == ["Who?"]
    with pytest.raises(InputError, match="none of the 1 prompts is on the test side"):
        only("test", found[:1], "prompts")


# Real files


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def dialogue(turns: list[Row]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


def test_hh_dialogues_render_back_to_the_original_text(shared_data: Path) -> None:
    path = shared_data / "data/preference/hh_harmless_base.jsonl"
    loaded = load_preferences(path, 0.2)
    out = [json.dumps(d["record"]) for d in loaded.dropped]
    originals = [row for row in read_jsonl(path) if json.dumps(row) not in out]
    assert len(originals) == len(loaded.records) > 1790
    for row, record in zip(originals, loaded.records, strict=True):
        for side in ("chosen", "rejected"):
            assert squeezed(dialogue([*record["prompt"], *record[side]])) == squeezed(row[side])
            assert len(record[side]) == 1


def test_polite_pairs_keep_their_words(shared_data: Path) -> None:
    path = shared_data / "data/preference/polite.jsonl"
    rows, loaded = read_jsonl(path), load_preferences(path, 0.2)
    same = [row for row in rows if row["chosen"].strip() == row["rejected"].strip()]
    assert loaded.counts()["left out"] == {"with identical chosen and rejected": len(same)}
    for row, record in zip((r for r in rows if r not in same), loaded.records, strict=True):
        [turn] = record["prompt"]
        assert squeezed(turn["content"]) == squeezed(row["instruction"] + row["input"])
        assert fields(record, "chosen", "rejected") == tuple(
            [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")
        )
    demonstrations = load_demonstrations(path, 0.2).records
    assert [r["completion"] for r in demonstrations] == [r["chosen"] for r in loaded.records]


def test_oasst_pairs_keep_their_conversations(shared_data: Path) -> None:
    path = shared_data / "data/preference/oasst_pairs.jsonl"
    rows, loaded = read_jsonl(path), load_preferences(path, 0.2)
    assert loaded.dropped == []
    for row, record in zip(rows, loaded.records, strict=True):
        assert record["prompt"] == row["messages"] and record["prompt"][-1]["role"] == "user"
        assert record["chosen"][0]["content"] == row["chosen"]
        assert record["tree_id"] == row["tree_id"]


def test_instructions_keep_their_words(shared_data: Path) -> None:
    path = shared_data / "data/instruct/instruct_mixed_4000.jsonl"
    rows, loaded = read_jsonl(path), load_demonstrations(path, 0.2)
    assert len(loaded.records) + len(loaded.dropped) == len(rows) and len(loaded.dropped) < 10
    kept = (row for row in rows if row["output"].strip())
    for row, record in zip(kept, loaded.records, strict=True):
        assert squeezed(record["prompt"][0]["content"]) == squeezed(row["instruction"] + row["input"])
        assert record["completion"][0]["content"] == row["output"]


# What the project ships

QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "quickstart"


def test_quickstart_demonstrations() -> None:
    loaded = load_demonstrations(QUICKSTART / "demonstrations.jsonl", 0.2)
    assert loaded.dropped == []
    assert all(re.search(r"[.!?)\"'”]$", r["completion"][0]["content"]) for r in loaded.records)
    assert all(r["prompt"][0]["content"].strip() == r["prompt"][0]["content"] for r in loaded.records)
    assert len(only("train", loaded.records, "demonstrations")) >= 200
    assert len(only("test", loaded.records, "demonstrations")) >= 50


def test_quickstart_prompts_are_new_and_unique() -> None:
    demonstrations = load_demonstrations(QUICKSTART / "demonstrations.jsonl", 0.2).records
    prompts = load_prompts(QUICKSTART / "prompts.jsonl", 0.2).records
    assert len(unique_prompts(demonstrations, prompts)) == len(demonstrations) + len(prompts)
    assert len(only("train", prompts, "prompts")) >= 60
    assert len(only("test", prompts, "prompts")) >= 10


def test_every_quickstart_file_is_one_that_a_stage_reads() -> None:
    assert {path.name for path in QUICKSTART.glob("*.jsonl")} == {"demonstrations.jsonl", "prompts.jsonl"}
