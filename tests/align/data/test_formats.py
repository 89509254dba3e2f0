"""Every format is told from its columns and read into the records that it says; nothing in it is guessed or lost."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.formats import FORMATS, format_of, recognise
from align.data.kinds import become, check_possible, kind_of
from align.data.layouts import HOLDS, laid_out
from align.data.names import KINDS
from align.data.turns import CannotHold
from reward.records import InputError, assistant_answer, user_prompt

Row = dict[str, Any]

WHY = user_prompt("Why does bread rise?")
GOOD, BAD = assistant_answer("Yeast makes gas."), assistant_answer("Magic.")
TALK = [
    {"role": "system", "content": "Be brief."},
    *user_prompt("Hello."),
    *assistant_answer("Hello!"),
    *WHY,
]
HH = "\n\nHuman: Hello.\n\nAssistant: Hello!\n\nHuman: Why does bread rise?\n\nAssistant:"
SAID = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hello."},
    {"from": "gpt", "value": "Hello!"},
    {"from": "human", "value": "Why does bread rise?"},
]

DEMONSTRATION = {"prompt": WHY, "completion": GOOD}
TALKED = {"prompt": TALK, "completion": GOOD}
PAIR = {"prompt": WHY, "chosen": GOOD, "rejected": BAD}
TALKED_PAIR = {"prompt": TALK, "chosen": GOOD, "rejected": BAD}
TWO = [{"text": "Yeast makes gas."}, {"text": "Magic."}]


def node(name: str, parent: str | None, role: str, text: str, **more: Any) -> Row:
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, **more}


TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": node("t", None, "prompter", "Why does bread rise?", lang="en")
    | {
        "replies": [
            node("a", "t", "assistant", "Magic.", rank=1)
            | {
                "replies": [
                    node("c", "a", "prompter", "Really?") | {"replies": [node("d", "c", "assistant", "No.", rank=None)]}
                ]
            },
            node("b", "t", "assistant", "Yeast makes gas.", rank=0) | {"replies": []},
            node("x", "t", "assistant", "Buy now!", rank=2, deleted=True) | {"replies": []},
        ]
    },
}
OF_THE_TREE = [
    {
        "id": "t",
        "prompt": WHY,
        "answers": [
            {"text": "Magic.", "rank": 1, "message_id": "a"},
            {"text": "Yeast makes gas.", "rank": 0, "message_id": "b"},
        ],
        "tree_id": "t",
    },
    {
        "id": "c",
        "prompt": [*WHY, *BAD, *user_prompt("Really?")],
        "answers": [{"text": "No.", "message_id": "d"}],
        "tree_id": "t",
    },
]


@pytest.mark.parametrize(
    ("name", "row", "records"),
    [
        # TRL
        ("prompt", {"prompt": "Why does bread rise?"}, [{"prompt": WHY}]),
        ("prompt", {"prompt": TALK}, [{"prompt": TALK}]),
        ("prompt/completion", {"prompt": "Why does bread rise?", "completion": "Yeast makes gas."}, [DEMONSTRATION]),
        ("prompt/completion", {"prompt": TALK, "completion": GOOD}, [TALKED]),
        ("prompt/completion", {"prompt": TALK, "completion": [*TALK, *GOOD]}, [TALKED]),
        ("prompt/completion", {"prompt": WHY, "completion": GOOD, "label": None}, [DEMONSTRATION]),
        (
            "prompt/completion/label",
            {"prompt": WHY, "completion": "Magic.", "label": False, "topic": "bread"},
            [{"prompt": WHY, "completion": BAD, "label": False, "topic": "bread"}],
        ),
        (
            "prompt/completion/label",
            {"prompt": "Why does bread rise?", "completion": "Magic.", "label": "False"},  # as a table has it
            [{"prompt": WHY, "completion": BAD, "label": False}],
        ),
        ("prompt/chosen/rejected", {"prompt": WHY, "chosen": "Yeast makes gas.", "rejected": BAD}, [PAIR]),
        (
            "prompt/chosen/rejected",  # the dialogue repeats the prompt
            {"prompt": "Why does bread rise?", "chosen": [*WHY, *GOOD], "rejected": [*WHY, *BAD], "messages": []},
            [PAIR | {"messages": []}],
        ),
        ("prompt/chosen/rejected", {"prompt": TALK, "chosen": [*TALK, *GOOD], "rejected": BAD}, [TALKED_PAIR]),
        (
            "prompt/chosen/rejected",
            {"prompt": HH, "chosen": "Yeast makes gas.", "rejected": "Magic."},
            [{**PAIR, "prompt": TALK[1:]}],
        ),
        ("messages/chosen/rejected", {"messages": TALK, "chosen": "Yeast makes gas.", "rejected": BAD}, [TALKED_PAIR]),
        ("dialogues chosen/rejected", {"chosen": [*TALK, *GOOD], "rejected": [*TALK, *BAD]}, [TALKED_PAIR]),
        ("messages", {"messages": [*TALK, *GOOD], "id": 7}, [TALKED | {"id": 7}]),
        ("messages", {"messages": TALK}, [{"prompt": TALK}]),
        # hh-rlhf
        (
            "dialogues chosen/rejected",
            {"chosen": HH + " Yeast makes gas.", "rejected": HH + " Magic.\n"},
            [{**PAIR, "prompt": TALK[1:]}],
        ),
        ("Human/Assistant text", {"text": HH + " Yeast makes gas."}, [{**DEMONSTRATION, "prompt": TALK[1:]}]),
        # Alpaca
        (
            "instruction/input/output",
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            [{"prompt": user_prompt("Add.\n\n1, 2"), "completion": assistant_answer("3")}],
        ),
        (
            "instruction/input/output",
            {
                "instruction": "Why does bread rise?",
                "input": "",
                "output": "Yeast makes gas.",
                "system": "Be brief.",
                "history": [["Hello.", "Hello!"]],
            },
            [TALKED],
        ),
        (
            "instruction/chosen/rejected",
            {
                "instruction": "Why does bread rise?",
                "system": "",
                "output": "x",
                "chosen": "Yeast makes gas.",
                "rejected": "Magic.",
            },
            [PAIR | {"output": "x"}],
        ),
        ("instruction", {"instruction": "Why does bread rise?"}, [{"prompt": WHY}]),
        # ShareGPT
        (
            "ShareGPT conversations",
            {"id": "q", "conversations": [*SAID, {"from": "gpt", "value": "Yeast makes gas."}]},
            [TALKED | {"id": "q"}],
        ),
        (
            "ShareGPT conversations",
            {"system": "Be brief.", "conversations": [*SAID[1:], {"from": "chatgpt", "value": "Yeast makes gas."}]},
            [TALKED],
        ),
        (
            "ShareGPT conversations",
            {"conversations": [{"from": "human", "value": "Sum?"}, {"from": "observation", "value": "3"}]},
            [{"prompt": [*user_prompt("Sum?"), {"role": "tool", "content": "3"}]}],
        ),
        (
            "ShareGPT conversations/chosen/rejected",
            {
                "conversations": SAID,
                "chosen": {"from": "gpt", "value": "Yeast makes gas."},
                "rejected": {"from": "gpt", "value": "Magic."},
            },
            [TALKED_PAIR],
        ),
        # OpenAI
        (
            "messages",
            {"messages": [*TALK[:2], TALK[2] | {"weight": 0}, *WHY, GOOD[0] | {"weight": 1}]},
            [TALKED],
        ),
        (
            "messages",
            {"messages": [*WHY, GOOD[0] | {"tool_calls": None, "name": None}], "tools": []},
            [DEMONSTRATION | {"tools": []}],
        ),
        (
            "OpenAI preferences",
            {"input": {"messages": TALK, "tools": []}, "preferred_output": GOOD, "non_preferred_output": BAD},
            [TALKED_PAIR],
        ),
        # Several answers
        (
            "a prompt with a list of answers",
            {"id": "c1", "prompt": WHY, "split": "train", "answers": [{"text": "A", "model": "m", "sampling": None}]},
            [{"id": "c1", "prompt": WHY, "split": "train", "answers": [{"text": "A", "model": "m"}]}],
        ),
        (
            "a prompt with a list of answers",  # as UltraFeedback
            {
                "id": 3,
                "instruction": "Why does bread rise?",
                "completions": [
                    {"model": "m", "response": "Yeast makes gas.", "overall_score": 8.5, "critique": "Fine."},
                    {"model": "n", "response": "Magic.", "overall_score": 2},
                ],
            },
            [
                {
                    "id": "3",
                    "prompt": WHY,
                    "answers": [
                        {"text": "Yeast makes gas.", "model": "m", "score": 8.5, "critique": "Fine."},
                        {"text": "Magic.", "model": "n", "score": 2},
                    ],
                }
            ],
        ),
        (
            "a prompt with a list of answers",
            {"id": "r", "prompt": HH, "responses": ["Yeast makes gas.", "Magic."], "ranks": [1, 2]},
            [
                {
                    "id": "r",
                    "prompt": TALK[1:],
                    "answers": [{"text": "Yeast makes gas.", "rank": 1}, {"text": "Magic.", "rank": 2}],
                }
            ],
        ),
        (
            "a prompt with columns of answers",
            {"id": 5, "prompt": "Why does bread rise?", "answer_1": "Yeast makes gas.", "answer_2": "Magic."},
            [{"id": "5", "prompt": WHY, "answers": TWO}],
        ),
        (
            "an Argilla export",
            {
                "id": "u",
                "fields": {"prompt": "Why does bread rise?", "response1": "Yeast makes gas.", "response2": "Magic."},
                "metadata": {"split": "test"},
                "responses": {"preference": []},
            },
            [{"id": "u", "prompt": WHY, "split": "test", "answers": TWO, "metadata": {"split": "test"}}],
        ),
        (
            "a Label Studio export",
            {
                "id": 9,
                "data": {"prompt": "Why does bread rise?", "answer1": "Yeast makes gas.", "answer2": "Magic."},
                "annotations": [],
            },
            [{"id": "9", "prompt": WHY, "answers": TWO}],
        ),
        ("OpenAssistant trees", TREE, OF_THE_TREE),
    ],
)
def test_formats(name: str, row: Row, records: list[Row]) -> None:
    found = format_of(row)
    assert found is not None and found.name == name
    assert found.read(row, "f, line 1") == records


def test_every_format_of_the_table_is_tested() -> None:
    [mark] = test_formats.pytestmark
    tested = {name for name, *_ in mark.args[1]} | {"OpenAssistant messages"}
    assert tested == {known.name for known in FORMATS}


# What a record cannot hold, and what is malformed


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [*WHY, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "with `tool_calls`",
        ),
        ({"messages": [*WHY, GOOD[0] | {"name": "Ann"}]}, "with `name` in a turn, which no record holds"),
        ({"messages": [*WHY, *GOOD], "tools": [{"type": "function"}]}, "with `tools`, which no record holds"),
        ({"messages": [*WHY, GOOD[0] | {"weight": 0}]}, "whose last answer has a weight other than 1"),
        ({"messages": [*WHY, BAD[0] | {"weight": 1}, *WHY, *GOOD]}, "with a weight on an answer before the last"),
        ({"prompt": WHY, "completion": [GOOD[0] | {"thinking": "Hm."}]}, "with `thinking` in a turn"),
        ({"prompt": WHY, "chosen": "Same. ", "rejected": "Same."}, "with identical chosen and rejected"),
        ({"prompt": WHY, "chosen": " ", "rejected": "Same."}, "with an empty chosen answer"),
        ({"chosen": HH + " A", "rejected": HH.replace("Why", "How") + " B"}, "do not share their prompt"),
        ({"conversations": SAID, "system": "Be long."}, "with a column `system` beside a system turn"),
        ({"conversations": SAID, "tools": "[]x"}, "with `tools`"),
        (
            {"input": {"messages": WHY, "tools": [{}]}, "preferred_output": GOOD, "non_preferred_output": BAD},
            "with `tools`",
        ),
        ({"prompt": "a", "answer_1": "b", "answer_2": ""}, "with one answer, which is no choice"),
        ({"message_tree_id": "t", "prompt": node("t", None, "prompter", "Why?")}, "in which no prompt has an answer"),
    ],
)
def test_what_says_more_than_a_record_is_left_out(row: Row, reason: str) -> None:
    found = format_of(row)
    assert found is not None
    with pytest.raises(CannotHold) as error:
        found.read(row, "f, line 1")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        # Never a prompt from characters that two answers share.
        ({"chosen": "The sky is blue", "rejected": "The sky is blue and vast"}, "`chosen` is text without a prompt"),
        ({"text": "The sky is blue."}, "`text` is text without a prompt"),
        ({"prompt": "Why?", "chosen": [*WHY, *GOOD], "rejected": BAD}, "its turns are: user, assistant"),
        (
            {"prompt": WHY, "chosen": [*WHY, *GOOD, *WHY, *GOOD], "rejected": BAD},
            "its turns are: user, assistant, user",
        ),
        ({"prompt": WHY, "completion": GOOD, "label": 1}, "`label` is 1, but true or false is wanted"),
        ({"prompt": WHY, "completion": GOOD, "label": "good"}, "`label` is 'good'"),
        ({"messages": [{"role": "human", "content": "x"}]}, "role 'human' is unknown"),
        ({"messages": [*WHY, {"role": "assistant", "content": None}]}, "the content of a assistant turn is None"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "but text is wanted"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "a turn is from 'narrator', which is unknown"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "a turn is from 'function_call'"),
        ({"conversations": [{"from": "human", "value": None}]}, "the content of a user turn is None"),
        ({"conversations": "x"}, "a conversation is a list of {from, value}, but this is 'x'"),
        ({"instruction": "x", "output": "y", "history": ["a", "b"]}, "`history` holds 'a'"),
        ({"instruction": "x", "output": "y", "system": 3}, "`system` is 3, but text is wanted"),
        ({"input": {}, "preferred_output": GOOD, "non_preferred_output": BAD}, "column `prompt` is missing"),
        ({"prompt": "x", "answers": "a"}, "`answers` is 'a', but a list of answers is wanted"),
        ({"prompt": "x", "answers": [3]}, "`answers` holds 3, but texts"),
        ({"prompt": "x", "answers": [{"txt": "a"}]}, "`answers` holds {'txt': 'a'}"),
        ({"prompt": "x", "answers": ["a", "b"], "scores": [1]}, "`scores` is [1], but one for each of `answers`"),
        ({"prompt": "x", "answers": [{"text": "a", "score": "N/A"}]}, "the score of an answer is 'N/A'"),
        ({"prompt": "x", "answer_1": True, "answer_2": "b"}, "`answer_1` is True, but text is wanted"),
    ],
)
def test_what_is_malformed_is_refused_by_its_place(row: Row, said: str) -> None:
    found = format_of(row)
    assert found is not None
    with pytest.raises(InputError) as error:
        found.read(row, "f, line 7")
    assert str(error.value).startswith("f, line 7: ") and said in str(error.value)


# Trees


def flat(*nodes: Row) -> list[tuple[str, Row]]:
    return [(f"f, line {n}", {"message_tree_id": "t", **each}) for n, each in enumerate(nodes, start=1)]


ROOT = node("t", None, "prompter", "Why does bread rise?")
FLAT = [
    ROOT,
    node("a", "t", "assistant", "Magic.", rank=1),
    node("b", "t", "assistant", "Yeast makes gas.", rank=0),
    node("x", "t", "assistant", "Buy now!", rank=2, deleted=True),
    node("c", "a", "prompter", "Really?"),
    node("d", "c", "assistant", "No."),
]


def grown(*nodes: Row) -> list[Row]:
    found = format_of(flat(*nodes)[0][1])
    assert found is not None and found.name == "OpenAssistant messages" and found.gather is not None
    return [record for where, row in found.gather(iter(flat(*nodes))) for record in found.read(row, where)]


def test_messages_row_by_row_are_the_same_trees() -> None:
    assert grown(*FLAT) == OF_THE_TREE
    assert grown(*reversed(FLAT)) == [
        record | {"answers": sorted(record["answers"], key=lambda answer: answer["text"], reverse=True)}
        for record in OF_THE_TREE
    ]


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([ROOT, node("a", "gone", "assistant", "x")], "line 2: the parent gone of message a is missing"),
        (
            [ROOT, node("a", "b", "assistant", "x"), node("b", "a", "prompter", "y")],
            "line 1: the tree goes in a circle",
        ),
        ([node("t", "t", "prompter", "x")], "line 1: the tree goes in a circle"),
        ([ROOT, ROOT], "line 2: the message t is there twice"),
        ([ROOT, node("u", None, "prompter", "x")], "line 1: the tree has 2 messages without a parent"),
        ([ROOT, node("a", "t", "robot", "x")], "line 1: role 'robot' is unknown"),
        ([ROOT, {"message_tree_id": "u", **ROOT}, ROOT], "line 3: the rows of tree t stand apart"),
    ],
)
def test_broken_trees(nodes: list[Row], said: str) -> None:
    rows = flat(*nodes)
    if "apart" in said:
        rows[1][1]["message_tree_id"] = "u"
    found = format_of(rows[0][1])
    assert found is not None and found.gather is not None
    with pytest.raises(InputError) as error:
        for where, row in list(found.gather(iter(rows))):
            found.read(row, where)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (node("t", "t", "assistant", "x"), "the message t is in the tree twice"),
        (node("a", "b", "assistant", "x"), "message a hangs on t, but its parent_id is b"),
        (node("a", "t", "assistant", "x") | {"text": None}, "column `text` is missing"),
        (node("a", "t", "assistant", "x", replies={"b": 1}), "the replies of message a are {'b': 1}"),
        ("x", "a message of a tree is 'x'"),
    ],
)
def test_broken_nested_trees(reply: Any, said: str) -> None:
    row = {"message_tree_id": "t", "prompt": ROOT | {"replies": [reply]}}
    found = format_of(row)
    assert found is not None
    with pytest.raises(InputError, match=r"^f, line 1: ") as error:
        found.read(row, "f, line 1")
    assert said in str(error.value)


# Telling formats apart


def placed(*rows: Row) -> list[tuple[str, Row]]:
    return [(f"f, line {n}", row) for n, row in enumerate(rows, start=1)]


@pytest.mark.parametrize(
    ("row", "nearest", "lacks"),
    [
        ({"promt": "x", "completion": "y"}, "prompt/completion", "which lacks prompt"),
        ({"prompt": None, "chosen": "y", "reject": "z"}, "dialogues chosen/rejected", "which lacks rejected"),
        ({"instruction": None, "input": "x", "output": "y"}, "instruction/input/output", "which lacks instruction"),
        ({"conversation": []}, "ShareGPT conversations", "which lacks conversations"),
        ({"message": []}, "messages", "which lacks messages"),
        ({"fields": "x"}, "an Argilla export", "whose columns hold something else"),
    ],
)
def test_unknown_columns_name_the_nearest_format(row: Row, nearest: str, lacks: str) -> None:
    with pytest.raises(InputError) as error:
        recognise(placed(row))
    said = str(error.value)
    assert said.startswith("f, line 1: the columns ") and f"the nearest is {nearest}, {lacks}: rename" in said, said


def test_the_row_that_disagrees_is_named_with_what_differs() -> None:
    rows = [DEMONSTRATION] * 99
    assert recognise(placed(*rows)).name == "prompt/completion"
    with pytest.raises(InputError) as error:
        recognise(placed(*rows, {"prompt": "x", "chosen": "y", "rejected": "z"}))
    assert str(error.value).startswith(
        "f, line 100: is prompt/chosen/rejected, but f, line 1 is prompt/completion (has chosen, rejected besides and "
        "lacks completion)"
    )
    with pytest.raises(InputError, match=r"^f, line 100: is in no known format, but .* \(lacks prompt\): mend the row"):
        recognise(placed(*rows, {"prompt": None, "completion": "y"}))


def test_other_columns_beside_the_format_are_no_other_format() -> None:
    assert recognise(placed(DEMONSTRATION, {**DEMONSTRATION, "topic": "bread"})).name == "prompt/completion"


# Whatever the columns hold, a row is read, left out or refused: never a traceback.

NAMES = sorted({name for known in FORMATS for need in known.needs for name in need.split("|")})
NAMES += [
    "system",
    "history",
    "tools",
    "scores",
    "ranks",
    "metadata",
    "id",
    "split",
    "parent_id",
    "answer_1",
    "answer_2",
]
KEYS = ["role", "content", "from", "value", "weight", "tool_calls", "messages", "text", "rank", "score", "replies"]
LEAVES = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "x", "user", "assistant", "gpt", HH, "true"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS + NAMES), inner, max_size=4)
        | st.just([*WHY, *GOOD])
        | st.just(WHY)
    ),
    max_leaves=8,
)


EXAMPLES = [row for _, row, _ in next(iter(test_formats.pytestmark)).args[1]] + [
    {"message_tree_id": "t", **each} for each in FLAT
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in an example something may be replaced."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from paths(each, (*path, key))


@st.composite
def spoilt(draw: st.DrawFn) -> Row:
    """An example in which one to three things are replaced, or added."""
    row = copy.deepcopy(draw(st.sampled_from(EXAMPLES)))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([*paths(row), *((name,) for name in NAMES)]))
        place: Any = row
        for key in way:
            place = place[key]
        place[last] = copy.deepcopy(draw(VALUES))
    return row


@settings(max_examples=400, deadline=None)
@given(spoilt())
def test_any_row_is_read_left_out_or_refused(row: Row) -> None:
    try:
        found = recognise(placed(row))
        rows = list(found.gather(iter(placed(row)))) if found.gather else placed(row)
        records = [record for where, each in rows for record in found.read(each, where)]
        for record in records:
            for kind in KINDS:
                try:
                    check_possible(kind_of(record), kind)
                except InputError:
                    continue
                for made in become(record, kind):
                    assert isinstance(made, CannotHold) or kind_of(made) == kind
                    if not isinstance(made, CannotHold):
                        lay_out_everywhere(made, kind)
    except InputError as error:
        assert str(error).startswith("f, line 1: ")
    except CannotHold as reason:
        assert str(reason)


def lay_out_everywhere(record: Row, kind: Any) -> None:
    for layout, kinds in HOLDS.items():
        if kind in kinds:
            with contextlib.suppress(CannotHold):
                laid_out(layout, kind, record)
