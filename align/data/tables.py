"""Rows of Parquet files and of hub datasets: tables with types, of which those that JSON has are taken."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward.records import InputError, Record

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 256


def parquet_rows(parts: Sequence[Path]) -> Iterator[tuple[str, Record]]:
    """(file and row number, row) of every row of Parquet files that are parts of one table.

    Dates and times are read as ISO 8601 text.

    Raises:
        InputError: a file is damaged, parts differ in their columns, or a column has a type that JSON does not have.
    """
    import pyarrow
    import pyarrow.parquet

    first: pyarrow.Schema | None = None
    for part in parts:
        try:
            with pyarrow.parquet.ParquetFile(part) as file:
                schema = file.schema_arrow
                _check_types(schema, part)
                if first is not None and not schema.equals(first):
                    raise InputError(
                        f"{part} has other columns than {parts[0].name} ({_listed(schema)}, but {_listed(first)}): "
                        "convert them one by one, or give them the same columns."
                    )
                first = schema
                number = 0
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                    for row in _texts_of_times(batch).to_pylist():
                        number += 1
                        if row.get("split", "") is None:
                            del row["split"]  # the column is there for other rows
                        yield f"{part}, row {number}", row
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{part}: damaged Parquet ({_one_line(error)}): fetch or write it again.") from None


def _check_types(schema: pyarrow.Schema, part: Path) -> None:
    for field in schema:
        if not (_is_json(field.type) or _is_time(field.type)):
            raise InputError(
                f"{part}: the column {field.name} is {field.type}, which no record holds: leave it out of the file."
            )


def _is_time(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_date(kind) or types.is_timestamp(kind) or types.is_time(kind))


def _is_json(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    if types.is_dictionary(kind):
        return _is_json(kind.value_type)
    simple = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_floating)
    return any(is_kind(kind) for is_kind in (*simple, types.is_boolean, types.is_null))


def _texts_of_times(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    import pyarrow

    for index, field in enumerate(batch.schema):
        if _is_time(field.type):
            batch = batch.set_column(index, field.name, batch.column(index).cast(pyarrow.string()))
    return batch


def _listed(schema: pyarrow.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def hub_rows(place: str) -> Iterator[tuple[str, Record]]:
    """(dataset and row number, row) of a dataset `owner/name[:split]` of the hub, through the cache of `datasets`.

    Raises:
        InputError: it cannot be had, or has several splits and none is named.
    """
    import datasets

    name, _, split = place.partition(":")
    try:
        found: Any = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # no network, no such dataset, no right to it, no such split: the hub's own words say it
        raise InputError(
            f"{place} is no file here, and as a dataset of the hub it cannot be had ({_one_line(error)}): check the "
            "name and the network, or give the path of a file."
        ) from None
    if isinstance(found, dict):
        if len(found) > 1:
            raise InputError(
                f"{place} has the splits {', '.join(found)}: name one, such as {place}:{next(iter(found))}."
            )
        found = next(iter(found.values()))
    for number, row in enumerate(found, start=1):
        yield f"{place}, row {number}", row


def _one_line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
    return text if len(text) <= 200 else text[:197] + "..."
