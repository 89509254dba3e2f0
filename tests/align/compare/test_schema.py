"""docs/report-schema.md says what align/compare/schema.py says: every field, and what may be absent or null."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path

import pytest

from align.compare.schema import Report

PAGE = Path(__file__).parents[3] / "docs" / "report-schema.md"


def objects_of(hint, found):
    """Every TypedDict that a value of this type can hold, by name."""
    if typing.is_typeddict(hint):
        if hint.__name__ not in found:
            found[hint.__name__] = typing.get_type_hints(hint, include_extras=True)
            for field in found[hint.__name__].values():
                objects_of(field, found)
    else:
        for inner in typing.get_args(hint):
            objects_of(inner, found)
    return found


def documented():
    """By object: (type, meaning) of every field on the page."""
    found = {}
    for section in PAGE.read_text("utf-8").split("\n## ")[1:]:
        title = section.splitlines()[0]
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
        found[title] = {name: (row[1], row[2]) for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    return found


OBJECTS = objects_of(Report, {})


def test_the_page_has_every_object_and_no_other():
    assert set(documented()) == set(OBJECTS) and "MeanFigure" in OBJECTS


@pytest.mark.parametrize("name", OBJECTS)
def test_every_field_is_told(name):
    fields, told = OBJECTS[name], documented()[name]
    assert [*told] == [*fields]
    for field, hint in fields.items():
        kind, meaning = told[field]
        optional = typing.get_origin(hint) is typing.NotRequired
        inner = typing.get_args(hint)[0] if optional else hint
        nullable = isinstance(inner, types.UnionType) and type(None) in typing.get_args(inner)
        assert ("optional" in kind, "or null" in kind) == (optional, nullable), field
        assert set(re.findall(r"\[(\w+)\]", kind)) == {*objects_of(hint, {})} & set(direct(inner)), field
        assert meaning


def direct(hint):
    """The objects that a field itself is made of, not those within them."""
    if typing.is_typeddict(hint):
        return [hint.__name__]
    return [name for inner in typing.get_args(hint) for name in direct(inner)]


def test_every_link_leads_somewhere():
    text = PAGE.read_text("utf-8")
    headings = {title.lower() for title in documented()}
    assert set(re.findall(r"\(#([\w-]+)\)", text)) <= headings
    assert all((PAGE.parent / file).exists() for file in re.findall(r"\((\w[\w-]*\.md)\)", text))
