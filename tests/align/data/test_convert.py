"""`align data convert`: there and back is the identity; what a kind or a layout cannot hold is listed, never lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align import cli
from align.data.convert import Counts, convert
from align.data.kinds import COLUMNS, kind_of
from align.data.layouts import HOLDS
from align.data.load import load_demonstrations, load_preferences, load_prompts
from align.data.names import KINDS, LAYOUTS
from labeling_ui.comparisons import read_comparisons
from reward.records import InputError, assistant_answer, read_jsonl, user_prompt

Row = dict[str, Any]

WHY = user_prompt("Why does bread rise?")
GOOD, BAD = assistant_answer("Yeast makes gas."), assistant_answer("Magic.")
PAIR: Row = {"prompt": WHY, "chosen": GOOD, "rejected": BAD}
DEMONSTRATION: Row = {"prompt": WHY, "completion": GOOD}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(path: Path, *rows: Row) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def converted(folder: Path, kind: Any, *rows: Row, layout: Any = "jsonl") -> tuple[list[Row], list[Row], Counts]:
    """(records, what was left out, counts) of rows."""
    out = folder / "out.jsonl"
    counts = convert(write(folder / "in.jsonl", *rows), out, kind, layout, force=True, say=lambda line: None)
    dropped = folder / "out.dropped.jsonl"
    return read_jsonl(out), read_jsonl(dropped) if dropped.exists() else [], counts


# There and back

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [*"\x85=", "Hi", " a ", "a\n\nHuman: b", "\r", "a,b;\t\"c\"", "=1+1", "\ufeffx", "x\0y", "Assistant: c", "true",
     "😀\u2028", "Human: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"]
)  # fmt: skip
ASKED = TEXT.filter(lambda text: bool(text.strip()))


@st.composite
def prompts(draw: st.DrawFn) -> list[Row]:
    turns = user_prompt(draw(ASKED))
    if draw(st.integers(0, 3)) == 0:
        roles = draw(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=4))
        before = [{"role": role, "content": draw(TEXT)} for role in roles]
        last = {"role": draw(st.sampled_from(["user", "tool"])), "content": draw(TEXT)}
        turns = [*before, last]
    elif draw(st.booleans()):
        system = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
        turns = [*system, *user_prompt(draw(TEXT)), *assistant_answer(draw(TEXT)), *turns]
    return turns


@st.composite
def records(draw: st.DrawFn, kind: str) -> Row:
    record: Row = {"prompt": draw(prompts())}
    if kind in ("demonstration", "unpaired"):
        record["completion"] = assistant_answer(draw(ASKED))
    if kind == "unpaired":
        record["label"] = draw(st.booleans())
    if kind == "preference":
        better = draw(ASKED)
        worse = draw(TEXT.filter(lambda text: text.strip() != better.strip()))
        record |= {"chosen": assistant_answer(better), "rejected": assistant_answer(worse)}
    if kind == "comparison":
        texts = draw(st.lists(TEXT, min_size=2, max_size=9))
        record |= {"id": draw(st.text("abc1", min_size=1)), "answers": [{"text": text} for text in texts]}
        for answer in record["answers"]:
            if draw(st.booleans()):
                answer["model"] = draw(st.sampled_from(["m", "n"]))
        if draw(st.booleans()):
            for rank, answer in enumerate(record["answers"]):
                answer["rank"] = rank
    if draw(st.booleans()):
        record["split"] = draw(st.sampled_from(["train", "test"]))
    return record


SUFFIXES = {"csv": "csv", "parquet": "parquet"}
PAIRS = [(layout, kind) for layout in LAYOUTS for kind in HOLDS[layout]]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize(("layout", "kind"), PAIRS)
def test_there_and_back(folder: Path, data: st.DataObject, layout: Any, kind: Any) -> None:
    rows = data.draw(st.lists(records(kind), min_size=1, max_size=8))
    packed = layout != "parquet" and data.draw(st.booleans())
    there = folder / (f"there.{SUFFIXES.get(layout, 'jsonl')}" + (".gz" if packed else ""))
    plain = write(folder / "in.jsonl", *rows, {**SIMPLE[kind], "prompt": WHY})  # one that every layout holds
    counts = convert(plain, there, kind, layout, force=True, say=lambda line: None)
    dropped = folder / "there.dropped.jsonl"
    lost = [row["record"] for row in read_jsonl(dropped)] if dropped.exists() else []
    assert counts.records + len(lost) == len(rows) + 1
    convert(there, folder / "back.jsonl", kind, force=True, say=lambda line: None)
    back = read_jsonl(folder / "back.jsonl")
    kept = [*rows, SIMPLE[kind]]
    for row in lost:
        kept.remove(row)
    named = ("split",) if layout in ("jsonl", "trl", "csv", "parquet") else ()
    names = (*COLUMNS[kind], *named)
    assert [without_nulls(row) for row in back] == [{n: row[n] for n in names if n in row} for row in kept]


def without_nulls(row: Row) -> Row:
    if "answers" in row:
        row = row | {"answers": [{k: v for k, v in answer.items() if v is not None} for answer in row["answers"]]}
    return row


SIMPLE: dict[str, Row] = {
    "demonstration": DEMONSTRATION,
    "prompt": {"prompt": WHY},
    "preference": PAIR,
    "unpaired": {**DEMONSTRATION, "label": True},
    "comparison": {"prompt": WHY, "id": "c", "answers": [{"text": "Yes."}, {"text": "No."}]},
}


@pytest.mark.parametrize(
    ("layout", "kind", "row", "reason"),
    [
        ("hh", "preference", {**PAIR, "prompt": [{"role": "system", "content": "Be."}, *WHY]}, "with a system turn"),
        ("hh", "demonstration", {**DEMONSTRATION, "completion": assistant_answer("Gas.\n")}, "with white space around"),
        ("hh", "preference", {**PAIR, "rejected": assistant_answer("A\n\nHuman: B")}, "the beginning of another"),
        ("alpaca", "prompt", {"prompt": [*WHY, {"role": "tool", "content": "3"}]}, "not user and assistant in turn"),
        ("openai", "demonstration", {**DEMONSTRATION, "prompt": [*WHY, {"role": "tool", "content": "3"}]}, "tool turn"),
        ("csv", "preference", {**PAIR, "prompt": [*WHY, *BAD, *WHY]}, "with more than one user turn in the prompt"),
        (
            "csv",
            "comparison",
            {**SIMPLE["comparison"], "answers": [{"text": "a", "rank": 1}, {"text": "b"}]},
            "whose answers have rank",
        ),
    ],
)
def test_what_a_layout_cannot_hold_is_listed(folder: Path, layout: Any, kind: Any, row: Row, reason: str) -> None:
    source = write(folder / "in.jsonl", row, SIMPLE[kind])
    counts = convert(source, folder / "out.x", kind, layout, say=lambda line: None)
    assert counts.records == 1
    [dropped] = read_jsonl(folder / "out.dropped.jsonl")
    assert reason in dropped["reason"]
    assert (dropped["record"], dropped["where"]) == (row, f"{source}, line 1")


@pytest.mark.parametrize(
    ("layout", "kind"), [(lay, kind) for lay in LAYOUTS for kind in KINDS if kind not in HOLDS[lay]]
)
def test_kinds_without_a_place_in_a_layout_are_refused(folder: Path, layout: Any, kind: Any) -> None:
    with pytest.raises(InputError, match=f"--format {layout} has no place for {kind} records"):
        convert(write(folder / "in.jsonl", SIMPLE[kind]), folder / "out", kind, layout)
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]


# From kind to kind

RANKED = {
    "id": "c",
    "prompt": WHY,
    "topic": "bread",
    "answers": [{"text": "B", "rank": 1}, {"text": "A", "rank": 0}, {"text": "C", "rank": 1}, {"text": "D"}],
}


def test_ranks_become_all_pairs_but_the_ties(folder: Path) -> None:
    made, dropped, counts = converted(folder, "preference", RANKED)
    pair = {"prompt": WHY, "topic": "bread", "comparison_id": "c", "chosen": assistant_answer("A"), "ranks": [0, 1]}
    assert made == [
        {**pair, "rejected": assistant_answer("B"), "pair": [0, 1]},
        {**pair, "rejected": assistant_answer("C"), "pair": [1, 2]},
    ]
    assert [row["reason"] for row in dropped] == ["(pairs) with the same rank or score"]
    assert (counts.rows, counts.records) == (1, 2)


def test_higher_scores_are_better_and_lower_ranks(folder: Path) -> None:
    scored = {
        "instruction": "x",
        "completions": [{"response": "A", "overall_score": 2}, {"response": "B", "overall_score": 3.5}],
    }
    [made], _, _ = converted(folder, "preference", scored)
    assert (made["chosen"][0]["content"], made["scores"]) == ("B", [3.5, 2])
    [best], _, _ = converted(folder, "demonstration", scored)
    assert best["completion"] == assistant_answer("B")
    [best], _, _ = converted(folder, "demonstration", RANKED)
    assert best["completion"] == assistant_answer("A")


@pytest.mark.parametrize(
    ("kind", "row", "records", "reasons"),
    [
        ("demonstration", PAIR | {"topic": "x"}, [DEMONSTRATION | {"topic": "x"}], []),
        ("prompt", PAIR | {"topic": "x"}, [{"prompt": WHY, "topic": "x"}], []),
        ("prompt", RANKED, [{"prompt": WHY, "topic": "bread"}], []),
        (
            "unpaired",
            PAIR,
            [{**DEMONSTRATION, "label": True}, {"prompt": WHY, "completion": BAD, "label": False}],
            [],
        ),
        (
            "comparison",
            PAIR | {"id": 3, "margin": 1.0},
            [
                {
                    "id": "3",
                    "prompt": WHY,
                    "answers": [
                        {"text": "Yeast makes gas.", "source": "chosen"},
                        {"text": "Magic.", "source": "rejected"},
                    ],
                }
            ],
            [],
        ),
        ("demonstration", {**DEMONSTRATION, "label": True}, [DEMONSTRATION], []),
        ("demonstration", {**DEMONSTRATION, "label": False}, [], ["whose answer is labelled false"]),
        ("demonstration", {"prompt": WHY, "completion": " "}, [], ["with an empty answer"]),
        ("demonstration", {"messages": WHY}, [], ["without an answer"]),
        ("preference", {"prompt": WHY, "answers": ["A", "B"]}, [], ["without two answers that have a rank or a score"]),
        ("demonstration", {"prompt": WHY, "answers": ["A", "B"]}, [], ["with several answers, of which none has"]),
        (
            "demonstration",
            {"prompt": WHY, "answers": ["A"]},
            [{"prompt": WHY, "completion": assistant_answer("A")}],
            [],
        ),
        ("comparison", {"prompt": WHY, "answers": ["A"]}, [], ["with one answer, which is no choice"]),
        ("comparison", {"prompt": WHY, "answers": list("ABCDEFGHIJ")}, [], ["with more than 9 answers"]),
        ("preference", {"prompt": WHY, "answers": ["A", " A"], "scores": [1, 2]}, [], ["with identical chosen and"]),
        ("preference", {"prompt": WHY, "answers": ["A", " "], "scores": [1, 2]}, [], ["with an empty chosen answer"]),
    ],
)
def test_what_a_record_becomes(folder: Path, kind: Any, row: Row, records: list[Row], reasons: list[str]) -> None:
    if reasons:  # nothing is left, which is an error that says why
        with pytest.raises(InputError, match="no row is left of 1") as error:
            converted(folder, kind, row)
        assert reasons[0] in str(error.value)
        assert [path.name for path in folder.iterdir()] == ["in.jsonl"]
        return
    made, dropped, _ = converted(folder, kind, row)
    assert (made, dropped) == (records, [])
    assert {kind_of(record) for record in made} == {kind}


@pytest.mark.parametrize(
    ("given_kind", "wanted"),
    [
        ("demonstration", "preference"),
        ("demonstration", "unpaired"),
        ("unpaired", "preference"),
        ("comparison", "unpaired"),
    ],
)
def test_what_nothing_says_is_not_made_up(folder: Path, given_kind: str, wanted: Any) -> None:
    with pytest.raises(InputError, match=f"^{given_kind} records cannot become {wanted} records: "):
        converted(folder, wanted, SIMPLE[given_kind])


def test_further_columns_ride_along_but_for_those_that_tell_formats(folder: Path) -> None:
    rows = [DEMONSTRATION | {"label": None, "topic": {"a": [1]}, "rejected": "x"}, DEMONSTRATION | {"source": "web"}]
    made, _, counts = converted(folder, "demonstration", *rows)
    assert made == [DEMONSTRATION | {"topic": {"a": [1]}}, DEMONSTRATION | {"source": "web"}]
    assert counts.columns == {"rejected"}  # a null says nothing
    assert counts.others == 1 and counts.other.endswith("line 2 (without rejected, without topic, with source)")
    assert converted(folder, "demonstration", *rows, layout="trl")[2].columns == {"rejected", "topic", "source"}


def test_unused_columns_of_exports_are_named(folder: Path) -> None:
    row = {"id": 1, "data": {"prompt": "a", "answer1": "b", "answer2": "c"}, "annotations": [{"id": 1}]}
    assert converted(folder, "comparison", row)[2].columns == {"annotations"}


def test_trees_become_pairs(folder: Path) -> None:
    answers = [
        {"message_id": f"a{n}", "parent_id": "t", "role": "assistant", "text": f"A{n}", "rank": n} for n in range(3)
    ]
    tree = {
        "message_tree_id": "t",
        "prompt": {"message_id": "t", "role": "prompter", "text": "Why?", "replies": answers},
    }
    made, _, _ = converted(folder, "preference", tree)
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in made] == [
        ("A0", "A1"),
        ("A0", "A2"),
        ("A1", "A2"),
    ]
    flat = [
        {"message_tree_id": "t", "parent_id": None, **tree["prompt"]},
        *({"message_tree_id": "t", **a} for a in answers),
    ]
    for row in flat:
        row.pop("replies", None)
    assert converted(folder, "preference", *flat)[0] == made


# What a stage then reads


def test_what_is_written_is_what_the_stages_read(folder: Path) -> None:
    out = folder / "out.jsonl"
    sharegpt = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "id": "7"}
    convert(write(folder / "in.jsonl", sharegpt), out, "demonstration", say=lambda line: None)
    [record] = load_demonstrations(out, 0.2).records
    assert (record["prompt"], record["completion"], record["id"]) == (user_prompt("Why?"), assistant_answer("So."), "7")
    convert(folder / "in.jsonl", folder / "p.jsonl", "prompt", say=lambda line: None)
    assert load_prompts(folder / "p.jsonl", 0.2).records[0]["prompt"] == user_prompt("Why?")
    convert(write(folder / "pairs.jsonl", PAIR), folder / "c.jsonl", "comparison", say=lambda line: None)
    [comparison], _ = read_comparisons(folder / "c.jsonl")
    assert [answer["text"] for answer in comparison["answers"]] == ["Yeast makes gas.", "Magic."]


@pytest.mark.parametrize("layout", ["csv", "parquet", "trl"])
def test_tables_are_read_by_the_stages_as_they_are(folder: Path, layout: Any) -> None:
    source = write(folder / "in.jsonl", PAIR, {**PAIR, "prompt": user_prompt("How?"), "split": "test"})
    convert(source, folder / "out", "preference", layout, say=lambda line: None)
    assert [
        [record[name] for name in ("prompt", "chosen", "rejected")]
        for record in load_preferences(folder / "out", 0.2).records
    ] == [[WHY, GOOD, BAD], [user_prompt("How?"), GOOD, BAD]]


def test_a_stage_names_the_format_that_has_to_be_converted(folder: Path) -> None:
    sharegpt = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
    with pytest.raises(
        InputError, match=r"It reads as ShareGPT conversations: `align data convert IN OUT --to demonst"
    ):
        load_demonstrations(write(folder / "in.jsonl", sharegpt), 0.2)
    with pytest.raises(InputError, match=r"wanted: chosen and rejected, with prompt, messages or instruction\.$"):
        load_preferences(folder / "in.jsonl", 0.2)


# What is refused


def test_nothing_is_written_over_or_half(folder: Path) -> None:
    source = write(folder / "in.jsonl", *[DEMONSTRATION] * 150, {"prompt": WHY, "chosen": "a", "rejected": "b"})
    with pytest.raises(InputError, match=r"line 151: is prompt/chosen/rejected, but .*line 1 is prompt/completion"):
        convert(source, folder / "out.jsonl", "demonstration", say=lambda line: None)
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]
    kept = write(folder / "out.jsonl", PAIR)
    with pytest.raises(InputError, match=r"out\.jsonl is there already: give another name, or --force"):
        convert(source, kept, "demonstration")
    with pytest.raises(InputError, match=r"line 151"):
        convert(source, kept, "demonstration", force=True, say=lambda line: None)
    assert read_jsonl(kept) == [PAIR]
    with pytest.raises(InputError, match="is what is converted: give the result another name"):
        convert(source, source, "demonstration", force=True)
    with pytest.raises(InputError, match="is a folder: give another name"):
        convert(source, folder, "demonstration", force=True)
    with pytest.raises(InputError, match=r"cannot write to .*/in\.jsonl: .*: give OUT another folder"):
        convert(kept, source / "out.jsonl", "preference", say=lambda line: None)


def test_an_old_list_of_what_was_left_out_goes_with_its_conversion(folder: Path) -> None:
    _, dropped, _ = converted(folder, "demonstration", DEMONSTRATION, {"prompt": WHY, "completion": ""})
    assert len(dropped) == 1
    assert converted(folder, "demonstration", DEMONSTRATION)[1] == []


@pytest.mark.parametrize("bad", [{"split": "valid"}, {"split": 3}])
def test_an_unknown_split(folder: Path, bad: Row) -> None:
    with pytest.raises(InputError, match=r"line 1: split is .*, but train or test is wanted\."):
        converted(folder, "demonstration", DEMONSTRATION | bad)


def test_numbers_that_are_none_are_listed(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"], "score": [1.0, float("nan")]})
    pyarrow.parquet.write_table(table, folder / "in.parquet")
    counts = convert(folder / "in.parquet", folder / "out.jsonl", "demonstration", say=lambda line: None)
    assert counts.records == 1 and counts.reasons.total() == 1
    [dropped] = read_jsonl(folder / "out.dropped.jsonl")
    assert "a number that is none" in dropped["reason"] and dropped["record"]["prompt"] == "b"


# The command


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["align", "data", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_the_command_says_what_it_did(main: Any, folder: Path) -> None:
    talk = [{"role": "system", "content": "Be\nbrief."}, *WHY]
    source = write(folder / "in.jsonl", {**PAIR, "prompt": talk}, PAIR | {"rejected": GOOD}, PAIR | {"topic": "x"})
    code, out, err = main("convert", source, folder / "out.csv", "--to", "preference", "--format", "hh")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{source}: JSONL, read as prompt/chosen/rejected",
        f"For example {source}, line 3:",
        "  prompt, user: Why does bread rise?",
        "  chosen, assistant: Yeast makes gas.",
        "  rejected, assistant: Magic.",
        f"3 rows in, 1 preference records out: {folder / 'out.csv'} (hh)",
        f"Left out, with the reasons in {folder / 'out.dropped.jsonl'}: 1 with a system turn, which hh text cannot "
        "hold, 1 with identical chosen and rejected",
        "Columns left out: topic",
        f"1 rows have other columns than the first, beginning with {source}, line 3 (with topic)",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["in.jsonl", "out.jsonl"], "Missing option '--to'"),
        (["in.jsonl", "out.jsonl", "--to", "pairs"], "'pairs' is not one of 'demonstration', 'prompt'"),
        (["none.jsonl", "out.jsonl", "--to", "prompt"], "none.jsonl does not exist"),
        (["in.jsonl", "out.jsonl", "--to", "prompt"], "in.jsonl, line 1: the columns question are those of no known"),
    ],
)
def test_refusals_are_exit_code_2_and_one_sentence(
    main: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(folder)
    write(folder / "in.jsonl", {"question": "x"})
    code, _, err = main("convert", *arguments)
    assert code == 2 and err.startswith("align: ") and said in err and err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['align', 'data', 'convert', '--help']\nfrom align.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'numpy', 'labeling_ui') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_converting_jsonl_loads_nothing_heavy(folder: Path) -> None:
    source = write(folder / "in.jsonl", PAIR)
    script = (
        f"import sys; from align.data.convert import convert; from pathlib import Path\n"
        f"convert({str(source)!r}, Path({str(folder / 'out.jsonl')!r}), 'preference')\n"
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'numpy', 'transformers') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


# Real files


def squeezed(*texts: str) -> str:
    return "".join("".join(texts).split())


def spoken(turns: list[Row]) -> str:
    return squeezed(*(f"{'Human' if t['role'] == 'user' else 'Assistant'}: {t['content']}" for t in turns))


def test_hh_pairs_keep_every_word_and_no_prompt_is_guessed(folder: Path, shared_data: Path) -> None:
    path = shared_data / "data/preference/hh_harmless_base.jsonl"
    made, dropped, counts = converted(folder, "preference", *read_jsonl(path))
    assert counts.rows == 1812 == len(made) + len(dropped)
    out = [row["record"] for row in dropped]
    for row, record in zip([row for row in read_jsonl(path) if row not in out], made, strict=True):
        for side in ("chosen", "rejected"):
            assert spoken([*record["prompt"], *record[side]]) == squeezed(row[side])
            assert len(record[side]) == 1 and record["prompt"][-1]["role"] == "user"
    apart = [row for row in dropped if "do not share their prompt" in row["reason"]]
    assert len(apart) == 4
    for row in apart:
        before = [row["record"][side].rpartition("\n\nAssistant:")[0] for side in ("chosen", "rejected")]
        assert before[0] != before[1]


def test_oasst_pairs_keep_their_conversations(folder: Path, shared_data: Path) -> None:
    rows = read_jsonl(shared_data / "data/preference/oasst_pairs.jsonl")
    made, dropped, _ = converted(folder, "preference", *rows)
    assert dropped == []
    for row, record in zip(rows, made, strict=True):
        assert record["prompt"] == row["messages"]
        assert [record[side][0]["content"] for side in ("chosen", "rejected")] == [row["chosen"], row["rejected"]]


def test_polite_pairs_keep_their_words(folder: Path, shared_data: Path) -> None:
    rows = read_jsonl(shared_data / "data/preference/polite.jsonl")
    made, dropped, _ = converted(folder, "preference", *rows)
    assert {row["reason"] for row in dropped} == {"with identical chosen and rejected"}
    kept = [row for row in rows if row not in [each["record"] for each in dropped]]
    for row, record in zip(kept, made, strict=True):
        [turn] = record["prompt"]
        assert squeezed(turn["content"]) == squeezed(row["instruction"], row["input"])


def test_instructions_keep_their_words(folder: Path, shared_data: Path) -> None:
    rows = read_jsonl(shared_data / "data/instruct/instruct_mixed_4000.jsonl")
    made, dropped, counts = converted(folder, "demonstration", *rows)
    assert counts.rows == 4000 == len(made) + len(dropped)
    out = [row["record"] for row in dropped]
    for row, record in zip([row for row in rows if row not in out], made, strict=True):
        assert squeezed(record["prompt"][0]["content"]) == squeezed(row["instruction"], row["input"])
        assert record["completion"] == assistant_answer(row["output"])
        assert (record["source"], record["license"]) == (row["source"], row["license"])


# Size


@pytest.mark.slow
@pytest.mark.processes
def test_200_000_rows_in_flat_memory(folder: Path) -> None:
    def peak(count: int) -> float:
        source = folder / f"{count}.jsonl"
        with source.open("w") as out:
            for number in range(count):
                out.write(json.dumps({"messages": [*user_prompt(f"Why {number}?" * 20), *GOOD]}) + "\n")
        script = (
            "import resource, sys; from align.data.convert import convert; from pathlib import Path\n"
            f"convert({str(source)!r}, Path({str(folder / 'out.jsonl')!r}), 'demonstration', force=True)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
        )
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return float(ended.stdout.splitlines()[-1])

    small, large = peak(2_000), peak(200_000)
    assert large < small + 5, (small, large)  # MiB
