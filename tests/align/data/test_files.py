"""Rows come out of every container as they went in, one by one; what cannot be read exactly is refused by its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.data import files
from align.data.files import open_source
from reward.records import InputError

Row = dict[str, Any]
ROWS: list[Row] = [{"prompt": "Why?", "completion": "Because."}, {"prompt": "Wö?", "completion": 'Dört, ["},\n\u2028.'}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path: Path) -> list[Row]:
    return [row for _, row in open_source(path).rows()]


def places(path: Path) -> list[str]:
    return [where for where, _ in open_source(path).rows()]


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(InputError) as error:
        read(path)
    said = str(error.value)
    assert str(path) in said and said.endswith("."), said
    for part in parts:
        assert part in said, said


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(content: bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def table(delimiter: str = ",", end: str = "\r\n") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(ROWS[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


# Containers

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content", "container", "second"),
    [
        ("a.jsonl", JSONL, "JSONL", "line 2"),
        ("a.jsonl", JSONL.rstrip(), "JSONL", "line 2"),
        ("a.jsonl", BOM + JSONL, "JSONL", "line 2"),
        ("a.jsonl", b"\n \n" + JSONL.replace(b"\n{", b"\r\n\r\n{"), "JSONL", "line 5"),
        ("no_suffix", JSONL, "JSONL", "line 2"),
        ("a.json", json.dumps(ROWS).encode(), "JSON", "record 2"),
        ("a.jsonl", BOM + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(), "JSON", "record 2"),
        ("a.csv", table(), "CSV", "line 3"),
        ("a.csv", BOM + table(";", "\n"), "CSV", "line 3"),
        ("a.tsv", table("\t"), "CSV", "line 3"),
        ("no_suffix", table(), "CSV", "line 3"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_containers(file: Any, name: str, content: bytes, container: str, second: str, packed: bool) -> None:
    path = file(gzip.compress(content), name + ".gz") if packed else file(content, name)
    source = open_source(path)
    assert source.container == container + (", gzip" if packed else "")
    assert read(path) == ROWS
    assert places(path)[1] == f"{path}, {second}"


def test_gzip_is_told_from_its_content(file: Any) -> None:
    assert read(file(gzip.compress(JSONL), "rows.jsonl")) == ROWS


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.text('"\\[]{},:\n\t é😀'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('ab"\\[]{},', max_size=4), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.dictionaries(st.text('ab"\\[]{},', max_size=4), VALUES, max_size=4), min_size=1, max_size=4), st.data()
)
def test_any_json_list_at_any_chunk_size(file: Any, rows: list[Row], data: st.DataObject) -> None:
    indent, escaped = data.draw(st.sampled_from([None, 2])), data.draw(st.booleans())
    path = file(json.dumps(rows, indent=indent, ensure_ascii=escaped).encode(), "a.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", data.draw(st.integers(1, 9)))
        assert read(path) == rows


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_cells_keep_their_line_ends_and_places(file: Any, name: str) -> None:
    content = b'prompt,completion,split\n"a\nb",c,\n\n"d\re","f ""g"", ;\th",test\n'
    path = file(gzip.compress(content) if name.endswith("gz") else content, name)
    assert list(open_source(path).rows()) == [
        (f"{path}, line 2", {"prompt": "a\nb", "completion": "c"}),
        (f"{path}, line 5", {"prompt": "d\re", "completion": 'f "g", ;\th', "split": "test"}),
    ]


# Parquet


def parquet(path: Path, rows: list[Row], schema: Any = None) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return path


def test_parquet_files_and_folders(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho."}], "n": 1, "x": None}
    one = parquet(tmp_path / "train-00000-of-00002.parquet", [talk | {"split": None}])
    two = parquet(tmp_path / "train-00001-of-00002.parquet", [talk | {"split": None}])
    assert read(one) == [talk]  # a split of null is none
    assert places(tmp_path) == [f"{one}, row 1", f"{two}, row 1"]


def test_parquet_is_read_by_batches(tmp_path: Path) -> None:
    import itertools

    path = parquet(tmp_path / "a.parquet", [{"prompt": f"Why {n}?"} for n in range(1000)])
    assert places(path)[999] == f"{path}, row 1000"
    assert [row for _, row in itertools.islice(open_source(path).rows(), 2)] == [
        {"prompt": f"Why {n}?"} for n in (0, 1)
    ]


def test_parts_with_other_columns_are_refused_with_both(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [{"prompt": "Why?", "label": True}])
    second = parquet(tmp_path / "b.parquet", [{"prompt": "Why?", "label": "yes"}])
    with pytest.raises(InputError) as error:
        read(tmp_path)
    said = str(error.value)
    assert said.startswith(f"{second} has other columns than a.parquet (")
    assert "prompt: string, label: string, but prompt: string, label: bool" in said


def test_a_folder_of_several_splits_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", [{"prompt": "Why?"}])
    refused(tmp_path, "holds the splits test, train: put the parts of one into a folder of its own")


def test_dates_become_text_and_bytes_are_refused(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    day = datetime(2026, 11, 22, 8, 30, tzinfo=UTC)
    assert read(parquet(tmp_path / "a.parquet", [{"prompt": "Why?", "made": day}]))[0]["made"].startswith(
        "2026-11-22 08:30"
    )
    refused(parquet(tmp_path / "b.parquet", [{"prompt": "Why?", "image": b"x"}]), "the column image is binary")


def test_damaged_parquet(file: Any, tmp_path: Path) -> None:
    whole = parquet(tmp_path / "a.parquet", [{"prompt": "Why?"}]).read_bytes()
    refused(file(whole[:-20], "b.parquet"), "damaged Parquet", "fetch or write it again")


# The hub


def test_a_hub_dataset_without_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"^owner/name:train is no file here, and .* it cannot be had \(.*\): check the"
    ):
        list(open_source("owner/name:train").rows())


@pytest.mark.parametrize("name", ["folder/rows.jsonl", "folder/rows.parquet", "./name", "a/b/c", "rows", "/owner/name"])
def test_what_is_no_hub_id_is_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{name} does not exist: give the path of a file of JSONL"):
        open_source(name)


def test_splits_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself cannot be had in a test: its answer is made here, of the library's own classes."""
    import datasets

    def load(name: str, split: str | None) -> Any:
        parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
        return parts[split] if split else datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(open_source("owner/name:test").rows()) == [("owner/name:test, row 1", ROWS[0])]
    with pytest.raises(
        InputError, match=r"owner/name has the splits train, test: name one, such as owner/name:train\."
    ):
        list(open_source("owner/name").rows())


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    Path("owner/name").write_bytes(JSONL)
    assert [row for _, row in open_source("owner/name").rows()] == ROWS


# What is refused

WIDE = JSONL.decode()


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b"", ["is empty"]),
        ("a.csv", b"", ["is empty"]),
        ("a.jsonl", b"\n \n\n", ["is empty"]),
        ("a.json", b" [ ]\n", ["is empty"]),
        ("a.csv", b"prompt,completion\n", ["is empty"]),
        ("a.jsonl", gzip.compress(b"", mtime=0), ["is empty"]),
        ("a.jsonl", WIDE.encode("utf-16"), ["is UTF-16", "iconv -f UTF-16 -t UTF-8 a.jsonl"]),
        ("a.jsonl", WIDE.encode("utf-16-le"), ["is UTF-16", "iconv -f UTF-16LE -t UTF-8"]),
        ("a.jsonl", WIDE.encode("utf-16-be"), ["is UTF-16", "iconv -f UTF-16BE -t UTF-8"]),
        ("a.csv", table().decode().encode("utf-16-le"), ["is UTF-16"]),
        ("a.jsonl", WIDE.encode("utf-32"), ["is UTF-32"]),
        ("a.jsonl", JSONL + WIDE.encode("latin-1", "replace"), ["line 4: not UTF-8"]),
        ("a.json", b'[{"a": "b"},\n{"a": "\xff"}]', ["line 2: not UTF-8"]),
        ("a.csv", b"prompt,completion\na,b\n\xff,c\n", ["line 3: not UTF-8"]),
        ("a.jsonl.gz", gzip.compress(JSONL * 9, mtime=0)[:-30], ["the gzip file ends early: fetch or write it again"]),
        ("a.jsonl.gz", gzip.compress(JSONL * 9, mtime=0)[:-4] + b"\1\2\3\4", ["the gzip file is damaged"]),
        ("a.zip", b"PK\x03\x04abcdefgh", ["is packed with zip: unpack it first"]),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdabcdefgh", ["is packed with zstandard"]),
        ("a.jsonl", JSONL + b'{"a": NaN}\n', ["line 3: NaN is no JSON number; write null, or leave it out"]),
        ("a.jsonl", JSONL + b'{"a": [-Infinity]}\n', ["line 3: -Infinity is no JSON number"]),
        ("a.jsonl", JSONL + b'{"a": 1e999}\n', ["line 3: the number 1e999 is too large"]),
        ("a.jsonl", JSONL + b'{"a": {"b": 1, "c": 2, "b": 1}}\n', ["line 3: the key 'b' is there twice; keep one"]),
        ("a.json", b'[{"a": 1}, {"a": 1, "a": 2}]', ["record 2: the key 'a' is there twice"]),
        ("a.jsonl", JSONL + b'"text"\n', ["line 3: a JSON str, but an object like"]),
        ("a.json", b'[{"a": 1}, 7]', ["record 2: a JSON int, but an object like"]),
        ("a.jsonl", JSONL + b'{"a": \n', ["line 3: not valid JSON (Expecting value"]),
        ("a.jsonl", b'{\n  "a": 1\n}\n', ["line 1: not valid JSON", "one complete JSON object per line"]),
        ("a.json", b'[{"a": 1}, {"a": }]', ["record 2: not valid JSON"]),
        ("a.json", b'[{"a": 1},]', ["record 2: not valid JSON"]),
        ("a.json", b'[{"a": 1}, {"a"', ["the JSON list ends early, after 1 records"]),
        ("a.json", b'[{"a": 1}] [{"a": 1}]', ["something follows the JSON list"]),
        ("a.jsonl", JSONL + b'{"a": "\\ud83d"}\n', ["line 3: holds half of a character"]),
        ("a.jsonl", JSONL + b"[" * 100_000, ["line 3: JSON that cannot be read"]),
        ("a.csv", b"prompt,completion\na,b\nc\n", ["line 3: 1 cells, but the header has 2"]),
        ("a.csv", b"prompt, Prompt\na,b\n", ["line 1: the column 'prompt' is there twice"]),
        ("a.csv", b'prompt,completion\n"a,b\n', ["line 2: not valid CSV"]),
    ],
)  # fmt: skip
def test_bad_files(file: Any, name: str, content: bytes, parts: list[str]) -> None:
    refused(file(content, name), *parts)


def test_missing_files_and_empty_folders(tmp_path: Path) -> None:
    refused(tmp_path / "none.jsonl", "does not exist: give the path of a file of JSONL, a JSON list, CSV or Parquet")
    refused(tmp_path, "is a folder without *.parquet files")


# Memory


@pytest.mark.parametrize(
    ("start", "place"), [(b'{"prompt": "', "line 1"), (b'[{"prompt": "', "record 1"), (b'prompt\n"', "line 2")]
)
def test_a_row_over_the_limit_is_refused_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, place: str
) -> None:
    assert files.LONGEST == 64 * 2**20
    monkeypatch.setattr(files, "LONGEST", 2 * 2**20)
    path = tmp_path / "a.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(start)
        for _ in range(32):
            out.write(b"x" * 2**20)
        out.write(b'"}')
    tracemalloc.start()
    try:
        refused(path, f"{path}, {place}: longer than 2 MiB")
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "Why? " * 200, "completion": "Because. " * 200})

    def peak(name: str, count: int) -> int:
        path = tmp_path / name
        text = f"[{','.join([row] * count)}]" if name.endswith("json") else f"{row}\n" * count
        path.write_text(text)
        del text
        tracemalloc.start()
        for _ in open_source(path).rows():
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    for name in ("a.jsonl", "a.json"):
        small, large = peak(name, 700), peak(name, 2800)  # 2 and 8 MB
        assert large < small + 2**19, (name, small, large)
