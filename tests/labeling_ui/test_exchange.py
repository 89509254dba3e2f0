"""What comes in and goes out as files: every format, every refusal, and exports that others can read."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align.data.load import load_preferences, load_prompts
from labeling_ui.assignment import Assigner
from labeling_ui.exchange import (
    export_demonstrations,
    export_kto,
    export_labels_csv,
    export_preferences,
    export_rankings,
    export_store,
    import_store,
    read_comparisons,
)
from labeling_ui.store import LabelStore, Project, Settings
from reward import records
from reward.records import InputError, Record, assistant_answer, read_jsonl, user_prompt


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def comparison(number: int = 0, answers: int = 2, **extra: Any) -> Record:
    return {
        "id": f"c{number}",
        "prompt": user_prompt(f"Question {number}?"),
        "split": "train",
        "answers": [{"text": f"Answer {n} to {number}.", "model": f"m{n}"} for n in range(answers)],
        **extra,
    }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    with LabelStore(tmp_path / "labels.db") as store:
        yield store


def give(store: LabelStore, project: Project, annotator: str, item: str, order: list[int], **said: Any) -> None:
    """A label on the item of that key."""
    number = next(each.id for each in store.items(project) if each.key == item)
    key = f"{annotator} {item}"
    judgement: Any = {"item_id": number, "annotator": annotator, "key": key, "order": order, **said}
    store.record(project, judgement)


# Comparisons in: formats

QUESTION = user_prompt("Why?")
TWO = [{"text": "Yes."}, {"text": "No."}]
JUDGED = [{"text": "Yes.", "source": "chosen"}, {"text": "No.", "source": "rejected"}]
DIALOGUE = [*user_prompt("Well?"), *assistant_answer("Well what?"), *user_prompt("Why?")]


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        ({"prompt": QUESTION, "answers": TWO, "topic": "x"}, "comparisons", {"answers": TWO, "topic": "x"}),
        ({"prompt": "Why?", "answers": TWO}, "comparisons", {"answers": TWO}),
        ({"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}, "preferences with prompt", {"answers": JUDGED}),
        (
            {"prompt": QUESTION, "chosen": assistant_answer("Yes."), "rejected": assistant_answer("No.")},
            "preferences with prompt",
            {"answers": JUDGED},
        ),
        (
            {
                "prompt": "Why?",
                "chosen": QUESTION + assistant_answer("Yes."),
                "rejected": QUESTION + assistant_answer("No."),
            },
            "preferences with prompt",
            {"answers": JUDGED},
        ),
        (
            {"chosen": DIALOGUE + assistant_answer("Yes."), "rejected": DIALOGUE + assistant_answer("No.")},
            "preferences of whole dialogues",
            {"prompt": DIALOGUE, "answers": JUDGED},
        ),
        (
            {
                "chosen": "\n\nHuman: Well?\n\nAssistant: Well what?\n\nHuman: Why?\n\nAssistant: Yes.",
                "rejected": "\n\nHuman: Well?\n\nAssistant: Well what?\n\nHuman: Why?\n\nAssistant: No.",
            },
            "preferences of whole dialogues",
            {"prompt": DIALOGUE, "answers": JUDGED},
        ),
        (
            {
                "fields": {"prompt": "Why?", "response1": "Yes.", "response2": "No.", "response3": None},
                "metadata": {"topic": "x"},
                "responses": {"preference": [{"value": ["response1"], "user_id": "u", "status": "submitted"}]},
                "suggestions": {"preference": {"value": ["response2"]}},
            },
            "an Argilla export",
            {"answers": TWO, "metadata": {"topic": "x"}},
        ),
        (
            {"fields": {"instruction": "Say why.", "input": "Rain.", "response-1": "Yes.", "response-2": "No."}},
            "an Argilla export",
            {"prompt": user_prompt("Say why.\n\nRain."), "answers": TWO},
        ),
        (
            {"data": {"prompt": "Why?", "answer1": "Yes.", "answer2": "No."}, "annotations": [{"result": []}]},
            "a Label Studio export",
            {"answers": TWO},
        ),
        (
            {"data": {"a": "x", "question": "Why?", "response_b": "No.", "response_A": "Yes."}},
            "a Label Studio export",
            {"answers": TWO, "a": "x"},
        ),
        (
            {"data": {"text": "Why?", "text1": "Yes.", "text2": "No."}},
            "a Label Studio export",
            {"answers": TWO},
        ),
        (
            {"prompt": "Why?", "answer_1": "Yes.", "model_1": "big", "answer_2": "No.", "answer_2_model": "small"},
            "columns prompt, answer_1, answer_2",
            {"answers": [{"text": "Yes.", "model": "big"}, {"text": "No.", "model": "small"}]},
        ),
    ],
)
@pytest.mark.parametrize("container", ["JSONL", "JSON"])
def test_formats(row: Record, form: str, expected: Record, container: str) -> None:
    content = jsonl(row) if container == "JSONL" else json.dumps([row], indent=2).encode()
    (record,), sentence = read_comparisons(content, "file", test_share=0)
    assert sentence.startswith(f"file: 1 comparisons (1 train, 0 test), read as {form} ({container})")
    assert {name: record[name] for name in record if name != "id"} == {"prompt": QUESTION, "split": "train", **expected}


@pytest.mark.parametrize("lines", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(lines: str, delimiter: str) -> None:
    rows = [
        ["ID", "Prompt ", "a", "b"],
        ["7", "Why?", "Yes.\nYes, indeed; really,\ttruly.", "No."],
        [],
        ["8", "How?", "So.", "Ök."],
    ]
    quoted = lines.join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    found, sentence = read_comparisons(b"\xef\xbb\xbf" + quoted.encode(), "table.csv", test_share=0)
    assert [(row["id"], row["prompt"][0]["content"], [a["text"] for a in row["answers"]]) for row in found] == [
        ("7", "Why?", ["Yes.\nYes, indeed; really,\ttruly.", "No."]),
        ("8", "How?", ["So.", "Ök."]),
    ]
    assert sentence == "table.csv: 2 comparisons (2 train, 0 test), read as columns prompt, a, b (CSV)."


def test_nine_answers_in_order_and_empty_cells_left_out() -> None:
    columns = ",".join(f"answer_{n}" for n in (3, 1, 2, 9, 8, 7, 6, 5, 4))
    found, _ = read_comparisons(f"prompt,{columns}\nQ,c,a,b,i,h,g,f,e,d\nR,,a,b,,,,,,\n".encode())
    assert [[answer["text"] for answer in row["answers"]] for row in found] == [list("abcdefghi"), ["a", "b"]]


def test_what_others_said_is_left_out_and_named() -> None:
    row = {"prompt": "Why?", "chosen": "Yes.", "rejected": "No.", "margin": 1.0, "comparison_id": "c", "pair": [0, 1]}
    (record,), sentence = read_comparisons(jsonl(row | {"topic": "x"}))
    assert record.keys() == {"id", "prompt", "split", "answers", "topic"}
    assert sentence.endswith("; not used: comparison_id, margin, pair.")


def test_new_labels_in_another_tool_change_no_comparison() -> None:
    task = {"id": 3, "data": {"prompt": "Why?", "answer1": "Yes.", "answer2": "No."}, "annotations": []}
    labelled = task | {"annotations": [{"id": 1}], "updated_at": "2026-11-21"}
    assert read_comparisons(jsonl(task))[0] == read_comparisons(jsonl(labelled))[0]


# Comparisons in: ids, splits, places


def test_ids_are_kept_as_text() -> None:
    rows = [{"id": 7, "data": {"prompt": "a", "answer1": "b", "answer2": "c"}}]
    assert read_comparisons(json.dumps(rows).encode())[0][0]["id"] == "7"
    argilla = {"external_id": "x-1", "fields": {"prompt": "a", "response1": "b", "response2": "c"}}
    assert read_comparisons(jsonl(argilla))[0][0]["id"] == "x-1"


def test_id_without_one_is_the_digest_of_the_content() -> None:
    row = {"prompt": "Why?", "answer_1": "Yes.", "answer_2": "No."}
    canonical = '{"answers":[{"text":"Yes."},{"text":"No."}],"prompt":[{"content":"Why?","role":"user"}]}'
    expected = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    for same in (row, row | {"id": ""}, row | {"split": "test"}):
        assert read_comparisons(jsonl(same))[0][0]["id"] == expected
    assert read_comparisons(jsonl(row | {"answer_2": "No!"}))[0][0]["id"] != expected


def test_splits_are_kept_or_those_of_the_rest_of_the_project(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "answer_1": "Yes.", "answer_2": "No."} for n in range(50)]
    path = records_file(tmp_path, rows)
    sides = [row["split"] for row in read_comparisons(path, test_share=0.3)[0]]
    assert sides == [row["split"] for row in load_prompts(path, 0.3).records]
    assert set(sides) == {"train", "test"}
    given = [row | {"split": ("train", "test")[n % 2]} for n, row in enumerate(rows)]
    assert [row["split"] for row in read_comparisons(jsonl(*given))[0]] == ["train", "test"] * 25


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c", "split": "test"},
        {"fields": {"prompt": "a", "response1": "b", "response2": "c"}, "metadata": {"split": "test"}},
        {"data": {"prompt": "a", "answer1": "b", "answer2": "c", "split": "test"}},
    ],
)
def test_split_of_other_tools(row: Record) -> None:
    assert read_comparisons(jsonl(row), test_share=0)[0][0]["split"] == "test"


def test_a_comparison_cannot_take_the_names_of_an_item() -> None:
    (record,), sentence = read_comparisons(jsonl(comparison(pair=[0, 1], comparison_id="x")))
    assert record == comparison()
    assert sentence.endswith("; not used: comparison_id, pair.")


def records_file(folder: Path, rows: list[Record]) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(jsonl(*rows))
    return path


def test_repeated_rows_are_read_once_and_counted() -> None:
    row = {"prompt": "Why?", "answer_1": "Yes.", "answer_2": "No."}
    found, sentence = read_comparisons(jsonl(row, row | {"answer_1": "Maybe."}, row))
    assert [each["answers"][0]["text"] for each in found] == ["Yes.", "Maybe."]
    assert "; 1 repeated rows left out" in sentence


def test_line_separators_inside_of_json_end_no_line() -> None:
    (record,), _ = read_comparisons(jsonl({"prompt": "a\u2028b\x85c", "answer_1": "d", "answer_2": "e"}))
    assert record["prompt"][0]["content"] == "a\u2028b\x85c"


def test_what_was_read_goes_into_a_store_once(store: LabelStore) -> None:
    project = store.create_project("p")
    own = read_comparisons(jsonl(comparison(0), comparison(1, 3, gold=[0, 2])))[0]
    assert own == [comparison(0), comparison(1, 3, gold=[0, 2])]
    preferences = jsonl({"prompt": "Why?", "chosen": "Yes.", "rejected": "No."})
    assert store.add_items(project, own + read_comparisons(preferences)[0]).added == 5
    assert store.add_items(project, read_comparisons(preferences)[0]).added == 0


FINE = {"prompt": "Why?", "answer_1": "Yes.", "answer_2": "No."}
DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "file is empty"),
        (b" \n", "file is empty"),
        (b"[]", "file is empty"),
        (b"prompt,answer_1,answer_2\n", "file is empty"),
        (b"prompt,a,b\nWhy?,Yes.,No.\nHow?,\xff,No.\n", "file, line 3: not UTF-8"),
        (jsonl(FINE) + b'{"prompt": \n', "file, line 2: not valid JSON"),
        (b'[{"prompt": "a"},\n{"prompt"}]', "file, line 2: not valid JSON"),
        (DEEP, "file, line 1: JSON that cannot be read"),
        (jsonl(FINE) + b'{"prompt": NaN}', "file, line 2: JSON that cannot be read .NaN"),
        (b'[{"prompt": "a"}, 3]', "file, record 2: 3, but an object"),
        (jsonl(FINE) + b'{"prompt": "\\ud83d", "answer_1": "a", "answer_2": "b"}', "file, line 2: holds half"),
        (jsonl({"question": "a", "reply": "b"}), "line 1: .* cannot be told from the columns question, reply: wanted"),
        (b"just text\nand more\n", "file, line 2: the format .* columns just text: wanted"),
        (b"prompt,a,b\n\"Why\nso?\",Yes.,No.\nHow?,Yes.\n", "file, line 4: 2 cells, but the header has 3"),
        (b'prompt,a,b\n"Why\nso?",Yes.\n', "file, line 2: 2 cells, but the header has 3"),
        (b'prompt,a,b\n"Why"so?,Yes.,No.\n', "file, line 2: not valid CSV"),
        (b"prompt,a,A\nWhy?,Yes.,No.\n", "line 1: the column 'a' is there twice"),
        (jsonl(FINE, FINE | {"answer_2": ""}), "file, line 2: 1 answers, but at least 2"),
        (jsonl(FINE, {"prompt": "Why?"}), "file, line 2: no answer among the columns prompt"),
        (jsonl(FINE | {f"answer_{n}": str(n) for n in range(3, 11)}), "line 1: 10 answers, .* more than 9"),
        (jsonl(comparison(answers=1)), "line 1: 1 answers"),
        (jsonl(comparison(), comparison(1) | {"answers": ["a", "b"]}), 'line 2: "answers" must be a list of objects'),
        (jsonl(FINE, FINE | {"answer_1": 3}), "line 2: `answer_1` is 3, but text is wanted"),
        (jsonl(FINE, FINE | {"prompt": " "}), "line 2: `prompt` is ' ', but text is wanted"),
        (jsonl(FINE, FINE | {"prompt": ""}), "line 2: no prompt among the columns answer_1, answer_2, prompt"),
        (jsonl(FINE | {"prompt": [{"role": "boss", "content": "a"}]}), "line 1: `prompt` is .* roles system"),
        (jsonl(FINE | {"prompt": assistant_answer("a")}), "line 1: a prompt must end with a user turn, .* assistant"),
        (jsonl(FINE | {"split": "validation"}), "line 1: the split is 'validation'"),
        (jsonl(FINE | {"id": [1]}), r"line 1: the id is \[1\]"),
        (jsonl(FINE | {"id": 1}, FINE | {"id": "1", "answer_1": "?"}), "line 2: the id 1 is that of file, line 1 too"),
        (
            jsonl(FINE | {"split": "test"}, FINE | {"answer_1": "?", "split": "train"}),
            "line 2: the prompt is on the train side here, and on the test side in file, line 1",
        ),
        (jsonl({"prompt": "a", "chosen": QUESTION, "rejected": "c"}), "line 1: `chosen` should be one assistant turn"),
        (jsonl({"prompt": "a", "chosen": "b"} | {"rejected": None}), "line 1: `rejected` is None"),
        (jsonl({"chosen": "b", "rejected": "c"}), "line 1: `chosen` is text without a prompt"),
        (
            jsonl({"chosen": DIALOGUE + assistant_answer("b"), "rejected": QUESTION + assistant_answer("c")}),
            "line 1: the dialogues chosen and rejected do not share",
        ),
        (jsonl({"chosen": DIALOGUE, "rejected": DIALOGUE}), "line 1: `chosen` must end with an assistant turn"),
        (jsonl({"chosen": assistant_answer("b"), "rejected": assistant_answer("c")}), "line 1: a prompt .* nothing"),
        (jsonl({"fields": {"prompt": "a", "text": "b"}}), "line 1: no answer among the columns id, prompt, split"),
        (jsonl({"fields": {"prompt": "a", "response1": "b", "response2": "c"}}, {"fields": 3}), "line 2: `fields` and"),
        (b'[{"data": {"prompt": "a", "answer1": "b", "answer2": "c"}}, {"data": 3}]', "record 2: `data` of"),
    ],
)  # fmt: skip
def test_refusals(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_comparisons(content, "file")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist: give the path"):
        read_comparisons(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        read_comparisons(tmp_path)


def test_no_heavy_import() -> None:
    heavy = "('torch', 'transformers', 'trl', 'datasets', 'pandas', 'gradio')"
    script = f"import labeling_ui.exchange, sys; print([name for name in {heavy} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


# Labels out


@pytest.fixture
def pairs(store: LabelStore) -> Project:
    """A win, a tie, three answers to one held-out prompt, a gold item, and one that nobody judged."""
    project = store.create_project("pairs", settings=Settings(overlap=3, criteria=("kind",)))
    held_out = comparison(2, 3, split="test")
    store.add_items(project, [comparison(0), comparison(1), held_out, comparison(3, gold=[0, 1]), comparison(4)])
    give(store, project, "ann", "c0:0-1", [1, 0], value=2, seconds=1.5, rewrite="Better.", ratings={"kind": {"1": 5}})
    give(store, project, "bob", "c0:0-1", [0, 1], value=7, comment="=SUM(A1)", flag='- odd, "very"')
    give(store, project, "ann", "c1:0-1", [0, 1], value=4, comment="@me")
    give(store, project, "+cy", "c2:0-1", [0, 1], value=1)
    give(store, project, "+cy", "c2:1-2", [2, 1], value=6, rewrite="Held out.")
    give(store, project, "ann", "c3:0-1", [0, 1], value=1)
    return project


def test_preferences(store: LabelStore, pairs: Project, tmp_path: Path) -> None:
    export_preferences(store, pairs, tmp_path / "new" / "out")
    found = read_jsonl(tmp_path / "new" / "out" / "preferences.jsonl")
    # ann: the answer on the left, 1, is better (6 in the pair's order); bob: 7. (2 + 3) / 2 steps.
    assert found[0] == {
        "prompt": user_prompt("Question 0?"),
        "chosen": assistant_answer("Answer 1 to 0."),
        "rejected": assistant_answer("Answer 0 to 0."),
        "chosen_index": 1,
        "margin": 2.5,
        "weight": 1.0,
        "annotators": ["ann", "bob"],
        "strengths": [2, 3],
        "comparison_id": "c0",
        "pair": [0, 1],
        "split": "train",
        "simulated": False,
    }
    chosen = [(row["comparison_id"], row["pair"], row["chosen"][0]["content"]) for row in found[1:]]
    assert chosen == [("c2", [0, 1], "Answer 0 to 2."), ("c2", [1, 2], "Answer 1 to 2.")]
    assert [row["comparison_id"] for row in read_jsonl(tmp_path / "new" / "out" / "ties.jsonl")] == ["c1"]


def test_preferences_are_those_of_trl_and_of_this_project(store: LabelStore, pairs: Project, tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    export_preferences(store, pairs, tmp_path)
    path = tmp_path / "preferences.jsonl"
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    for row in loaded:
        assert trl.is_conversational(row)
        assert [[turn["role"] for turn in row[name]] for name in ("prompt", "chosen", "rejected")] == [
            ["user"],
            ["assistant"],
            ["assistant"],
        ]
        assert trl.maybe_extract_prompt(row) == row
    assert load_preferences(path, 0.5).records == read_jsonl(path)
    again, _ = read_comparisons(path)
    assert [row["answers"][0]["text"] for row in again] == [row["chosen"][0]["content"] for row in loaded]


def test_kto(store: LabelStore, pairs: Project, tmp_path: Path) -> None:
    give(store, pairs, "+cy", "c2:0-2", [0, 2], value=1)
    assert export_kto(store, pairs, tmp_path / "kto.jsonl") == 4
    found = read_jsonl(tmp_path / "kto.jsonl")
    assert found[0] == {
        "prompt": user_prompt("Question 0?"),
        "completion": assistant_answer("Answer 1 to 0."),
        "label": True,
        "split": "train",
        "simulated": False,
    }
    # Answer 0 won twice and answer 2 lost twice, each is there once; answer 1 did both.
    assert [(row["completion"][0]["content"], row["label"], row["split"]) for row in found] == [
        ("Answer 1 to 0.", True, "train"),
        ("Answer 0 to 0.", False, "train"),
        ("Answer 0 to 2.", True, "test"),
        ("Answer 2 to 2.", False, "test"),
    ]


def test_demonstrations(store: LabelStore, pairs: Project, tmp_path: Path) -> None:
    assert export_demonstrations(store, pairs, tmp_path / "demonstrations.jsonl") == 2
    first, second = read_jsonl(tmp_path / "demonstrations.jsonl")
    assert first == {
        "prompt": user_prompt("Question 0?"),
        "completion": assistant_answer("Better."),
        "annotator": "ann",
        "comparison_id": "c0",
        "split": "train",
        "simulated": False,
    }
    assert (second["completion"], second["split"]) == (assistant_answer("Held out."), "test")


def test_labels_as_a_table(store: LabelStore, pairs: Project, tmp_path: Path) -> None:
    assert export_labels_csv(store, pairs, tmp_path / "labels.csv") == 6
    with (tmp_path / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    assert first.pop("created") == store.labels(pairs)[0].created
    assert first == {
        "item": "c0:0-1",
        "split": "train",
        "annotator": "ann",
        "order": "1 0",
        "value": "2",
        "ranking": "",
        "ratings": '{"kind": {"1": 5}}',
        "seconds": "1.5",
        "comment": "",
        "flag": "",
    }
    assert (rows[1]["comment"], rows[1]["flag"]) == ("'=SUM(A1)", '\'- odd, "very"')
    assert (rows[2]["comment"], rows[3]["annotator"]) == ("'@me", "'+cy")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_cells_that_a_spreadsheet_would_run(store: LabelStore, pairs: Project, tmp_path: Path, start: str) -> None:
    give(store, pairs, f"{start}cmd|' /C calc'!A0", "c4:0-1", [0, 1], value=1, comment=f"fine {start}1")
    export_labels_csv(store, pairs, tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert last["annotator"] == f"'{start}cmd|' /C calc'!A0"
    assert last["comment"] == f"fine {start}1"


@pytest.fixture
def ranked(store: LabelStore) -> Project:
    project = store.create_project("ranked", settings=Settings(mode="ranking", overlap=3))
    gold = comparison(6, 2, gold=[0, 1])
    store.add_items(project, [comparison(9, 3, split="test"), comparison(8, 3), comparison(7, 2), gold])
    give(store, project, "ann", "c6:0-1", [0, 1], ranking=[[0], [1]])
    give(store, project, "bob", "c9:0-1-2", [1, 0, 2], ranking=[[2], [1, 0]])
    give(store, project, "ann", "c9:0-1-2", [2, 0, 1], ranking=[[0], [2]])
    give(store, project, "ann", "c8:0-1-2", [0, 1, 2], ranking=[[1], [0], [2]])
    return project


def test_rankings(store: LabelStore, ranked: Project, tmp_path: Path) -> None:
    assert export_rankings(store, ranked, tmp_path / "rankings.jsonl") == 2
    first, second = read_jsonl(tmp_path / "rankings.jsonl")
    assert (first["comparison_id"], first["split"]) == ("c8", "train")
    assert second == {
        "prompt": user_prompt("Question 9?"),
        "answers": ["Answer 0 to 9.", "Answer 1 to 9.", "Answer 2 to 9."],
        "rankings": [{"annotator": "ann", "ranking": [[0], [2]]}, {"annotator": "bob", "ranking": [[2], [0, 1]]}],
        "comparison_id": "c9",
        "split": "test",
        "simulated": False,
    }
    export_labels_csv(store, ranked, tmp_path / "labels.csv")
    assert ",2 > 0 = 1," in (tmp_path / "labels.csv").read_text("utf-8")


def test_pairs_have_no_rankings(store: LabelStore, pairs: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pairs is judged in pairs"):
        export_rankings(store, pairs, tmp_path / "rankings.jsonl")
    assert not (tmp_path / "rankings.jsonl").exists()


EXPORTS: dict[str, Callable[[LabelStore, Project, Path], Any]] = {
    "preferences.jsonl": lambda store, project, path: export_preferences(store, project, path.parent),
    "kto.jsonl": export_kto,
    "demonstrations.jsonl": export_demonstrations,
    "labels.csv": export_labels_csv,
    "project.jsonl": export_store,
}


@pytest.mark.parametrize("name", EXPORTS)
def test_same_bytes_again_also_from_a_copy(store: LabelStore, pairs: Project, tmp_path: Path, name: str) -> None:
    export_store(store, pairs, tmp_path / "copy.jsonl")
    with LabelStore(tmp_path / "copy.db") as copy:
        project = import_store(copy, tmp_path / "copy.jsonl").project
        written = []
        for folder, place, what in (("a", store, pairs), ("b", store, pairs), ("c", copy, project)):
            EXPORTS[name](place, what, tmp_path / folder / name)
            written.append((tmp_path / folder / name).read_bytes())
    assert len(written[0]) > 100
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("name", EXPORTS)
def test_a_write_that_fails_leaves_the_file_as_it_was(
    store: LabelStore, pairs: Project, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / name
    EXPORTS[name](store, pairs, path)
    before = path.read_bytes()
    give(store, pairs, "dan", "c4:0-1", [0, 1], value=1, rewrite="New.")

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        EXPORTS[name](store, pairs, path)
    assert path.read_bytes() == before
    assert [each for each in path.parent.iterdir() if each.name.startswith(".")] == []


def test_no_record_crosses_the_split(store: LabelStore, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {n}?", "answer_1": "Yes.", "answer_2": "No.", "answer_3": "Maybe."} for n in range(30)
    ]
    comparisons, _ = read_comparisons(jsonl(*rows), test_share=0.4)
    sides = {row["prompt"][0]["content"]: row["split"] for row in comparisons}
    assert set(sides.values()) == {"train", "test"}
    for mode in ("pairwise", "ranking"):
        project = store.create_project(mode, settings=Settings(mode=mode))
        store.add_items(project, comparisons)
        for number, item in enumerate(store.items(project)):
            said = {"ranking": [[0], [2], [1]]} if mode == "ranking" else {"value": 1 + number % 7}
            give(store, project, "ann", item.key, list(item.answers), rewrite="Better.", **said)
        export_preferences(store, project, tmp_path)
        export_kto(store, project, tmp_path / "kto.jsonl")
        export_demonstrations(store, project, tmp_path / "demonstrations.jsonl")
        if mode == "ranking":
            export_rankings(store, project, tmp_path / "rankings.jsonl")
        files = sorted(tmp_path.glob("*.jsonl"))
        assert len(files) == (4 if mode == "pairwise" else 5)
        for path in files:
            found = read_jsonl(path) if path.stat().st_size else []
            assert all(row["split"] == sides[row["prompt"][0]["content"]] for row in found)
            if path.name != "ties.jsonl":
                assert {row["split"] for row in found} == {"train", "test"}


def test_what_a_program_judged_says_so(store: LabelStore, tmp_path: Path) -> None:
    project = store.create_project("robots", simulated=True)
    store.add_items(project, [comparison()])
    give(store, project, "bot", "c0:0-1", [0, 1], value=1, rewrite="Beep.")
    export_preferences(store, project, tmp_path)
    export_kto(store, project, tmp_path / "kto.jsonl")
    export_demonstrations(store, project, tmp_path / "demonstrations.jsonl")
    for name in ("preferences", "kto", "demonstrations"):
        assert all(row["simulated"] is True for row in read_jsonl(tmp_path / f"{name}.jsonl"))


# A whole project


@pytest.fixture
def lived(store: LabelStore) -> Project:
    """A project with two versions of guidelines, a label, a skip, a label taken back and given anew, and a rewrite."""
    store.create_project("other")
    store.add_items(store.project("other"), [comparison(0)])
    store.create_project("lived", instructions="Be kind.", settings=Settings(overlap=2, gold_share=0, criteria=("x",)))
    project = store.create_project("lived", instructions="Be kind and brief.")
    store.add_items(
        project, [comparison(0), comparison(1, 3, topic="ä\u2028"), comparison(2, split="test", gold=[1, 0])]
    )
    assigner = Assigner(store, project)
    lease = assigner.next("ann")
    all_said: list[dict[str, Any]] = [
        {"value": 2, "rewrite": "Bétter.", "seconds": 0.1 + 0.2},
        {"value": 7},
        {"value": 4},
    ]
    for number, said in enumerate(all_said):
        assert lease is not None
        if number == 2:
            said["ratings"] = {"x": {str(lease.order[0]): 3}}
        _, lease, _ = assigner.label("ann", lease.token, f"k{number}", {"order": list(lease.order), **said})
    lease = assigner.undo("ann", "u0")
    assert lease is not None
    _, lease, _ = assigner.label("ann", lease.token, "k3", {"order": list(lease.order), "value": 1})
    assert lease is not None
    assigner.skip("ann", lease.token, "s0", {"order": list(lease.order), "reason": "not my field", "flag": "=odd"})
    lease = assigner.next("bob")
    assert lease is not None
    assigner.label("bob", lease.token, "k4", {"order": list(lease.order), "value": 6, "comment": "fine"})
    assigner.undo("bob", "u1")
    assigner.release("bob")
    give(store, project, "cy", "c2:0-1", [1, 0], value=1)
    return project


def told(store: LabelStore, project: Project) -> list[Any]:
    """All that can be seen of a project from outside, without its row numbers."""
    items = {item.id: item for item in store.items(project)}
    events = [(items[e.item_id].key, e.annotator, e.kind, e.key, e.body, e.created) for e in store.events(project)]
    labels = [(items[e.item_id].key, e.key) for e in store.labels(project)]
    content = [(item.key, item.answers, item.digest, item.payload, item.gold) for item in items.values()]
    facts = [project.simulated, project.settings, project.created, project.instructions, project.guidelines]
    progress = Assigner(store, project).progress("ann")
    return [facts, content, events, labels, progress, store.digest(project), store.votes(project)]


def test_import_of_an_export_is_the_same_project(store: LabelStore, lived: Project, tmp_path: Path) -> None:
    export_store(store, lived, tmp_path / "a.jsonl")
    kinds = [event.kind for event in store.events(lived)]
    assert kinds == ["label", "label", "label", "undo", "label", "skip", "label", "undo", "label"]
    with LabelStore(tmp_path / "copy.db") as copy:
        restored = import_store(copy, tmp_path / "a.jsonl")
        assert (restored.items, restored.events) == (5, 9)
        assert told(copy, restored.project) == told(store, lived)
        assert len(copy.labels(restored.project)) == 4
        export_store(copy, restored.project, tmp_path / "b.jsonl")
        again = import_store(copy, tmp_path / "b.jsonl")
        assert (again.project, again.items, again.events) == (restored.project, 0, 0)
        export_store(copy, restored.project, tmp_path / "c.jsonl")
    written = [(tmp_path / name).read_bytes() for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    assert written[0] == written[1] == written[2]
    assert "Bétter.".encode() in written[0]


def test_rankings_survive_too(store: LabelStore, ranked: Project, tmp_path: Path) -> None:
    export_store(store, ranked, tmp_path / "a.jsonl")
    with LabelStore(tmp_path / "copy.db") as copy:
        assert told(copy, import_store(copy, tmp_path / "a.jsonl").project) == told(store, ranked)


def test_work_goes_on_in_the_copy_and_comes_back(store: LabelStore, lived: Project, tmp_path: Path) -> None:
    export_store(store, lived, tmp_path / "a.jsonl")
    with LabelStore(tmp_path / "copy.db") as copy:
        project = import_store(copy, tmp_path / "a.jsonl").project
        # ann has judged or skipped four of the four pairs that are no gold; bob has taken back his only label.
        assert Assigner(copy, project).next("ann") is None
        assigner = Assigner(copy, project)
        lease = assigner.next("bob")
        assert lease is not None
        assigner.label("bob", lease.token, "new", {"order": list(lease.order), "value": 5})
        export_store(copy, project, tmp_path / "b.jsonl")
        after = told(copy, project)
    before = store.count_labels(lived)
    assert import_store(store, tmp_path / "b.jsonl").events == 1
    assert store.count_labels(lived) == before + 1
    assert told(store, lived) == after
    assert store.labels(store.project("other")) == []


def test_criteria_may_have_changed_since(store: LabelStore, lived: Project, tmp_path: Path) -> None:
    project = store.create_project("lived", settings=Settings(overlap=3, gold_share=0, criteria=("y",)))
    export_store(store, project, tmp_path / "a.jsonl")
    with LabelStore(tmp_path / "copy.db") as copy:
        assert told(copy, import_store(copy, tmp_path / "a.jsonl").project) == told(store, project)


def change_line(lines: list[Record], number: int, **changed: Any) -> None:
    """Change fields of the event on a line; of its body, where they are the body's."""
    event = lines[number - 1]["event"]
    for name, value in changed.items():
        (event if name in event else event["body"])[name] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(0), "is no exported project, its first line has the columns comparison"),
        (lambda lines: lines[0].update(version=2), "has version 2 of the format"),
        (lambda lines: lines[0].pop("settings"), "line 1: The project's line cannot be read"),
        (lambda lines: lines[0]["settings"].update(overlap=0), "line 1: A project's overlap is 0"),
        (lambda lines: lines[0]["settings"].update(speed=1), "line 1: The project's line cannot be read"),
        (lambda lines: lines[0].update(simulated="no"), "line 1: The project's name, guidelines or dates"),
        (lambda lines: lines[0].update(guidelines=[]), "line 1: The project's name, guidelines or dates"),
        (lambda lines: lines[1]["comparison"].update(split="both"), "line 2: Comparison c0 has the split 'both'"),
        (lambda lines: lines[2]["comparison"].update(id="c0"), "line 3: The comparison c0 is there twice"),
        (lambda lines: lines.insert(2, {"note": 1}), "line 3: The columns are note"),
        (lambda lines: change_line(lines, 5, item="c9:0-1"), "line 5: The item c9:0-1 is of no comparison above"),
        (lambda lines: change_line(lines, 5, annotator=""), "line 5: An event has the columns"),
        (lambda lines: change_line(lines, 6, key="k0"), "line 6: The key k0 is there twice"),
        (lambda lines: change_line(lines, 5, kind="praise"), "line 5: The kind is 'praise'"),
        (lambda lines: change_line(lines, 5, value=8), "line 5: A label has the value 8"),
        (lambda lines: change_line(lines, 5, order=["0", "1"]), "line 5: The order is"),
        (lambda lines: change_line(lines, 8, undoes="k9"), "line 8: What it takes back, 'k9', is nothing"),
        (lambda lines: change_line(lines, 8, annotator="bob"), "line 8: What it takes back, 'k2', is nothing"),
        (
            lambda lines: [line["comparison"]["answers"][0].update(text="Forged.") for line in lines[1:4]],
            "line 5: The label was given to other texts",
        ),
    ],
)
def test_broken_exports_are_refused_before_anything_is_stored(
    store: LabelStore, lived: Project, tmp_path: Path, change: Callable[[list[Record]], Any], message: str
) -> None:
    export_store(store, lived, tmp_path / "a.jsonl")
    lines = read_jsonl(tmp_path / "a.jsonl")
    change(lines)
    (tmp_path / "b.jsonl").write_bytes(jsonl(*lines))
    with LabelStore(tmp_path / "copy.db") as copy:
        with pytest.raises(InputError, match=message):
            import_store(copy, tmp_path / "b.jsonl")
        assert copy.projects() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: change_line(lines, 5, seconds=99), "the key k0 belongs to another event in project lived"),
        (lambda lines: lines[0].update(simulated=True), "lived is there already with another mode, or with labels by"),
        (lambda lines: lines[0]["guidelines"][0].update(text="Be rude."), "another text as version 1"),
        (lambda lines: lines[1]["comparison"].update(topic="?"), "Comparison c0 is in project lived with different"),
    ],
)
def test_what_contradicts_the_store_is_refused(
    store: LabelStore, lived: Project, tmp_path: Path, change: Callable[[list[Record]], Any], message: str
) -> None:
    export_store(store, lived, tmp_path / "a.jsonl")
    before = told(store, lived)
    lines = read_jsonl(tmp_path / "a.jsonl")
    change(lines)
    (tmp_path / "b.jsonl").write_bytes(jsonl(*lines))
    with pytest.raises(InputError, match=message):
        import_store(store, tmp_path / "b.jsonl")
    assert told(store, store.project("lived")) == before


def test_a_reviewers_verdict_survives_too(store: LabelStore, lived: Project, tmp_path: Path) -> None:
    store.adjudicate(lived, "c0:0-1", "rev", {"value": 7}, "v0")
    export_store(store, lived, tmp_path / "a.jsonl")
    with LabelStore(tmp_path / "copy.db") as copy:
        project = import_store(copy, tmp_path / "a.jsonl").project
        assert told(copy, project) == told(store, lived)
        export_store(copy, project, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    lines = read_jsonl(tmp_path / "a.jsonl")
    lines[-1]["event"]["body"]["value"] = 9
    (tmp_path / "b.jsonl").write_bytes(jsonl(*lines))
    with LabelStore(tmp_path / "other.db") as other, pytest.raises(InputError, match="A label has the value 9"):
        import_store(other, tmp_path / "b.jsonl")
