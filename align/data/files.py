"""The rows of a data file one by one, whatever it is kept in: JSONL, a JSON list, CSV, Parquet, gzip, a hub dataset.

Memory does not grow with the file: a row is read, handed on and forgotten. Every row comes with its place ("d.jsonl,
line 7"), which messages about it begin with. What cannot be read exactly as it was written is refused by a sentence.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from reward.records import InputError, Record

LONGEST = 64 * 2**20  # bytes of a line, of an object in a list, or of a cell
CHUNK = 2**20
CONTAINERS = "JSONL, a JSON list, CSV or Parquet"

Placed = tuple[str, Record]  # (place, row)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_DATA = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz")
_PACKED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class Source:
    """A data file (or folder of Parquet parts, or hub dataset) that is there, and what it is kept in."""

    name: str
    container: str
    parts: tuple[Path, ...] = ()

    def rows(self) -> Iterator[Placed]:
        """(place, row) of every row, in order.

        Raises:
            InputError: there are none, or one cannot be read.
        """
        found = False
        for placed in self._all():
            found = True
            yield placed
        if not found:
            raise _empty(self.name)

    def _all(self) -> Iterator[Placed]:
        if self.container == "a hub dataset":
            from align.data.tables import hub_rows

            yield from hub_rows(self.name)
        elif self.container == "Parquet":
            from align.data.tables import parquet_rows

            yield from parquet_rows(self.parts)
        else:
            read = {"JSONL": _jsonl_rows, "JSON": _json_rows, "CSV": _csv_rows}[self.container.removesuffix(", gzip")]
            with _text_file(self.parts[0]) as file:
                yield from read(file, str(self.parts[0]))


def open_source(place: str | Path) -> Source:
    """What a path or a hub id `owner/name[:split]` names, told from its content.

    Raises:
        InputError: there is nothing, it is empty, or it is no text in UTF-8 and no Parquet.
    """
    path = Path(place)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        if _HUB_ID.fullmatch(str(place)) and not str(place).lower().endswith(_DATA):
            return Source(str(place), "a hub dataset")
        raise InputError(f"{place} does not exist: give the path of a file of {CONTAINERS}.")
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    if not magic:
        raise _empty(str(path))
    if magic.startswith(b"PAR1"):
        return Source(str(path), "Parquet", (path,))
    packing = next((name for start, name in _PACKED.items() if magic.startswith(start)), None)
    if packing:
        raise InputError(f"{path} is packed with {packing}: unpack it first (gzip is read as it is).")
    with _text_file(path) as file:
        head = file.read(4096)
    zipped = ", gzip" if magic.startswith(b"\x1f\x8b") else ""
    return Source(str(path), _text_container(path, head) + zipped, (path,))


def _empty(name: str) -> InputError:
    return InputError(f"{name} is empty: a JSONL file with one JSON object per line is wanted.")


def _folder(path: Path) -> Source:
    """The Parquet parts of a folder, which are one table in several files; parts of several splits are not."""
    parts = tuple(sorted(path.glob("*.parquet")))
    if not parts:
        raise InputError(f"{path} is a folder without *.parquet files: give the path of a file of {CONTAINERS}.")
    splits = {match[1] for part in parts if (match := re.match(r"(.+?)-\d+-of-\d+", part.name))}
    if len(splits) > 1:
        raise InputError(
            f"{path} holds the splits {', '.join(sorted(splits))}: put the parts of one into a folder of its own."
        )
    return Source(str(path), "Parquet", parts)


def _text_container(path: Path, head: bytes) -> str:
    """ "JSONL", "JSON" (a list) or "CSV", from the first bytes and, where they leave it open, from the name."""
    if wide := next((name for mark, name in _WIDE.items() if head.startswith(mark)), None):
        raise _not_utf8(path, wide, wide)
    if b"\0" in head[:2]:
        raise _not_utf8(path, "UTF-16", "UTF-16BE" if head[:1] == b"\0" else "UTF-16LE")
    if head.startswith(b"PAR1"):
        raise InputError(f"{path} is Parquet within gzip: unpack it first (gunzip).")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if suffix in (".csv", ".tsv"):
        return "CSV"
    if start in (b"{", b"["):
        return "JSONL" if start == b"{" else "JSON"
    return "JSONL" if suffix in (".jsonl", ".ndjson", ".json") or not start else "CSV"


def _not_utf8(path: Path, found: str, code: str) -> InputError:
    return InputError(
        f"{path} is {found}, but UTF-8 is wanted: convert it, e.g. iconv -f {code} -t UTF-8 {path.name} > utf8.jsonl."
    )


@contextmanager
def _text_file(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a text file, unpacked where it is gzip."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not packed:
            yield raw
            return
        try:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield cast(IO[bytes], unpacked)
        except EOFError:
            raise InputError(f"{path}: the gzip file ends early: fetch or write it again.") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: the gzip file is damaged ({error}): fetch or write it again.") from None


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its end) of every line."""
    number = 0
    while raw := file.readline(LONGEST + 1):
        number += 1
        if len(raw) > LONGEST:
            raise _too_long(f"{name}, line {number}")
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8.") from None


def _too_long(where: str) -> InputError:
    return InputError(
        f"{where}: longer than {LONGEST // 2**20} MiB, which no row of text is; one complete JSON object per line is "
        "wanted, with the line's end after it."
    )


def _jsonl_rows(file: IO[bytes], name: str) -> Iterator[Placed]:
    for number, line in _lines(file, name):
        if line.strip():
            where = f"{name}, line {number}"
            yield where, parse_row(line.strip(), where)


def _json_rows(file: IO[bytes], name: str) -> Iterator[Placed]:
    for number, text in enumerate(_elements(file, name), start=1):
        where = f"{name}, record {number}"
        yield where, parse_row(text, where)


_OUTSIDE = re.compile(r'["\[\]{},]')
_INSIDE = re.compile(r'["\\]')


def _elements(file: IO[bytes], name: str) -> Iterator[str]:
    """The texts between the commas of a JSON list, as they stand; what is in them is checked where they are parsed."""
    depth = number = size = 0
    quoted = closed = False
    skip = 0  # characters of the next chunk that an escape at the end of this one takes
    held: list[str] = []
    for chunk in _decoded(file, name):
        start, position = 0, skip
        if closed and chunk.strip():
            raise _trailing(name)
        while match := (_INSIDE if quoted else _OUTSIDE).search(chunk, position):
            position, mark = match.end(), match[0]
            if mark == "\\":
                position += 1
            elif mark == '"':
                quoted = not quoted
            elif mark in "[{":
                depth += 1
                start = position if depth == 1 else start
            elif mark in "]}":
                depth -= 1
            closed = depth == 0
            if closed and (mark != "]" or chunk[position:].strip()):
                raise _trailing(name)
            if (mark == "," and depth == 1) or closed:
                text = "".join([*held, chunk[start : match.start()]])
                if mark == "," or number or text.strip():
                    number += 1
                    yield text
                held, size, start = [], 0, position
        skip = max(position - len(chunk), 0)
        if not closed:
            held.append(chunk[start:])
            size += len(chunk) - start
        if size > LONGEST:
            raise _too_long(f"{name}, record {number + 1}")
    if not closed:
        raise InputError(f"{name}: the JSON list ends early, after {number} records: fetch or write it again.")


def _trailing(name: str) -> InputError:
    return InputError(f"{name}: something follows the JSON list: one list of all rows is wanted.")


def _decoded(file: IO[bytes], name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    while True:
        raw = file.read(CHUNK)
        try:
            yield decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line += raw.count(b"\n", 0, error.start)
            raise InputError(f"{name}, line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8.") from None
        if not raw:
            return
        line += raw.count(b"\n")


class _Refused(ValueError):
    """Valid for Python's parser, and still nothing that has one meaning."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Refused(f"the key {twice!r} is there twice; keep one of them")
    return found


def _constant(name: str) -> None:
    raise _Refused(f"{name} is no JSON number; write null, or leave it out")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _Refused(f"the number {text[:30]} is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)


def parse_row(text: str, where: str) -> Record:
    """The object in a line or between two commas of a list.

    Raises:
        InputError: it is no JSON, no object, or says something that has no one meaning (a key twice, NaN).
    """
    try:
        row = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); one complete JSON object per line is "
            "wanted."
        ) from None
    except _Refused as error:
        raise InputError(f"{where}: {error}.") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise InputError(f"{where}: JSON that cannot be read ({error}).") from None
    if not isinstance(row, dict):
        raise InputError(
            f'{where}: a JSON {type(row).__name__}, but an object like {{"prompt": ...}} is wanted on every line.'
        )
    if "\\ud" in text.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where}: holds half of a character (a lone \\ud800 to \\udfff escape); write the whole character "
                "instead."
            ) from None
    return row


def _csv_rows(file: IO[bytes], name: str) -> Iterator[Placed]:
    """Rows by the names in the header, in small letters; an empty cell `split` says nothing and is left out."""
    first = file.readline(LONGEST + 1)
    file.seek(0)
    delimiter = "\t" if ".tsv" in Path(name).suffixes else max(",;\t", key=first.decode("utf-8", "replace").count)
    csv.field_size_limit(LONGEST)
    reader = csv.reader((line for _, line in _lines(file, name)), delimiter=delimiter, strict=True)
    header: list[str] = []
    last = 0
    try:
        for cells in reader:
            # A row with line breaks in its cells is named by the line it begins on.
            where, last = f"{name}, line {last + 1}", reader.line_num
            if not any(cells):
                continue
            if not header:
                header = _header(cells, where)
            elif len(cells) != len(header):
                raise InputError(
                    f"{where}: {len(cells)} cells, but the header has {len(header)}: put quotes around cells with "
                    f"{delimiter!r} or a line break in them."
                )
            else:
                yield where, {k: v for k, v in zip(header, cells, strict=True) if v or k != "split"}
    except csv.Error as error:
        raise InputError(f"{name}, line {last + 1}: not valid CSV ({error}).") from None


def _header(cells: list[str], where: str) -> list[str]:
    header = [cell.strip().lower() for cell in cells]
    if twice := [column for column, count in Counter(header).items() if count > 1]:
        raise InputError(f"{where}: the column {twice[0]!r} is there twice: give each a name of its own.")
    return header
