"""Record files: what is read, what is refused and how, and that a failed write leaves the old file."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.records import (
    InputError,
    answer_text,
    assistant_answer,
    digest,
    file_digest,
    prompt_id,
    prompt_text,
    read_jsonl,
    split_of,
    user_prompt,
    write_json,
    write_jsonl,
)

# The same examples on every run, and no failure because a machine was busy.
deterministic = settings(derandomize=True, deadline=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


# Reading


@settings(deterministic, max_examples=40)
@given(st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    write_jsonl(path, records)
    assert read_jsonl(path) == records


def test_blank_lines_bom_and_windows_line_ends(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": "\xc3\xa9"}')
    assert read_jsonl(path) == [{"a": 1}, {"a": "é"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": }\n', r"line 3: not valid JSON \(Expecting value at column 7\)"),
        (b'{"a": 1}\n[1, 2]\n', "line 2: a JSON list, but an object"),
        (b'"text"\n', "line 1: a JSON str, but an object"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', "line 2: not UTF-8"),
        (b'{"a": 1}\n{"a": 2', "line 2: not valid JSON"),
        (b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n', "line 2: not valid JSON"),
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_bad_files_are_refused_by_line(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_jsonl(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl does not exist"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder, not a file"):
        read_jsonl(tmp_path)


# Writing


def test_text_stays_readable(path: Path) -> None:
    write_jsonl(path, [{"text": "naïve\n→"}])
    assert path.read_text(encoding="utf-8") == '{"text": "naïve\\n→"}\n'


def test_failed_serialisation_keeps_the_old_file(path: Path) -> None:
    write_jsonl(path, [{"old": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"new": 1}, {"new": object()}])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_jsonl(path) == [{"old": 1}]
    assert list(path.parent.iterdir()) == [path]


def test_failed_encoding_keeps_the_old_file_and_leaves_no_litter(path: Path) -> None:
    write_jsonl(path, [{"old": 1}])
    with pytest.raises(UnicodeEncodeError):  # half of a surrogate pair: only the write itself can find out
        write_jsonl(path, [{"new": "\ud800"}])
    assert read_jsonl(path) == [{"old": 1}]
    assert list(path.parent.iterdir()) == [path]


def test_replacing_a_folder_fails_without_litter(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_json(tmp_path / "taken", {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_file_is_as_readable_as_any_other(path: Path) -> None:
    plain = path.with_name("plain")
    plain.write_text("")
    write_json(path, {})
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_write_json_is_for_people(path: Path) -> None:
    write_json(path, {"b": 1, "a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'


# Digests


def test_digest_by_hand() -> None:
    canonical = '{"a":[1,2.5,null],"é":"ü"}'
    assert digest({"é": "ü", "a": [1, 2.5, None]}) == hashlib.sha256(canonical.encode()).hexdigest()


@deterministic
@given(st.dictionaries(st.text(), json_values, min_size=2, max_size=5))
def test_digest_ignores_the_order_of_keys_and_survives_json(value: dict[str, Any]) -> None:
    assert digest(dict(reversed(value.items()))) == digest(value) == digest(json.loads(json.dumps(value)))


def test_digest_of_a_list_depends_on_its_order() -> None:
    assert digest([1, 2]) != digest([2, 1])


def test_file_digest(path: Path) -> None:
    path.write_bytes(b"abc")
    # The example of FIPS 180-2, appendix B.1.
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Prompts and splits


def test_prompt_text_is_one_paragraph_a_turn() -> None:
    assert prompt_text(user_prompt(" Why? ", system="Be kind.")) == "system: Be kind.\n\nuser: Why?"


def test_prompt_id_by_hand_ignores_case_and_outer_space() -> None:
    expected = hashlib.sha256(b"user: why?").hexdigest()[:16]
    assert prompt_id(user_prompt("Why?")) == prompt_id(user_prompt("  WHY?\n")) == expected
    assert prompt_id(user_prompt("Why?", system="Be kind.")) != expected


def test_splits_are_frozen() -> None:
    """By `printf "user: question 0" | sha256sum`; a change here would move prompts of every existing project."""
    place = 0x72281535 / 2**32
    assert split_of(user_prompt("Question 0"), place) == "train"
    assert split_of(user_prompt("Question 0"), place + 2**-32) == "test"


def test_share_of_test_prompts() -> None:
    """2,000 prompts at 0.2: 400 expected, standard deviation sqrt(2000 * 0.2 * 0.8) = 17.9."""
    sides = [split_of(user_prompt(f"Question {number}"), 0.2) for number in range(2000)]
    assert abs(sides.count("test") - 400) < 4 * 17.9


@deterministic
@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_only_adds_to_the_test_side(text: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    if split_of(user_prompt(text), small) == "test":
        assert split_of(user_prompt(text), large) == "test"
    assert split_of(user_prompt(text), 0.0) == "train"
    assert split_of(user_prompt(text), 1.0) == "test"


def test_answer_text_takes_both_forms() -> None:
    assert answer_text("plain") == answer_text(assistant_answer("plain")) == "plain"
