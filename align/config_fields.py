"""The fields of the libraries' own config classes, and the words for a value that does not fit.

A section of our config takes every field of its library's class under its own name. The class itself is the list of
names and types, imported only when a key outside our documented ones is met.
"""

from __future__ import annotations

import difflib
import functools
import typing
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError


class KeyProblem(ValueError):
    """A problem with one key of a section, so that the sentence can name its line."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class LibrarySection(BaseModel):
    """A section that takes every field of a library's config class, except those it owns, with the reason."""

    model_config = ConfigDict(extra="allow")
    config_class: ClassVar[str]
    owned_keys: ClassVar[dict[str, str]]


@functools.cache
def config_fields(config_class: str) -> dict[str, Any]:
    """Field name -> type of a library's config dataclass, such as "trl.SFTConfig". Imports the library."""
    import dataclasses
    import importlib

    module, _, name = config_class.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):  # an annotation that names something only type checkers see
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(cls) if field.init}


def check_extras(section: LibrarySection) -> None:
    """Check the keys that are not documented here against the library's own config class, and convert their values."""
    if not section.model_extra:
        return
    known, owned = config_fields(section.config_class), section.owned_keys
    for key, value in section.model_extra.items():
        if key in owned:
            raise KeyProblem(key, f"`{key}` cannot be set: {owned[key]}")
        if key not in known:
            fields = type(section).model_fields
            raise KeyProblem(key, unknown_key(key, fields, known, f", and every other field of {section.config_class}"))
        try:
            section.model_extra[key] = _library_type(known[key]).validate_python(value)
        except ValidationError as error:
            wanted = " or ".join(dict.fromkeys(wanted_by(e) for e in error.errors()))
            raise KeyProblem(key, f"`{key}` is {shown(value)}, but {wanted} is wanted") from None
        except PydanticUserError:  # a type pydantic has no schema for: the library checks it itself
            pass


def unknown_key(key: str, fields: typing.Iterable[str], more: typing.Iterable[str] = (), and_more: str = "") -> str:
    """`fields` are ours and listed where nothing is near; `more` are a library's, too many to list."""
    nearest = difflib.get_close_matches(key, [*fields, *more], n=1, cutoff=0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"known keys are {', '.join(sorted(fields))}{and_more}"
    return f"unknown key `{key}`: {hint}"


def _library_type(hint: Any) -> TypeAdapter[Any]:
    """The checker of a library's type: true is not a number, and infinity is not a setting."""
    if {hint, *typing.get_args(hint)} & {int, float} and bool not in (hint, *typing.get_args(hint)):
        hint = Annotated[hint, BeforeValidator(_no_bool)]
    try:
        return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    except PydanticUserError:  # a type that brings a configuration of its own
        return TypeAdapter(hint)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "a number")
    return value


def hint_schema(hint: Any) -> dict[str, Any]:
    try:
        return TypeAdapter(hint).json_schema()
    except (PydanticUserError, ValueError):
        return {}


def shown(value: Any) -> str:
    text = repr(value)
    return "null" if value is None else f"{text if len(text) <= 80 else text[:77] + '...'} ({kind_of(value)})"


def wanted_by(error: Any) -> str:
    """What pydantic would have accepted, in words."""
    context = error.get("ctx", {})
    limits = {"greater_than": "above {gt}", "greater_than_equal": "at least {ge}", "less_than": "below {lt}"}
    limits |= {"less_than_equal": "at most {le}"}
    kind = error["type"]
    if kind == "string_pattern_mismatch":
        return "text of letters, digits, dots, dashes and underscores that begins with a letter or a digit"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "finite_number":
        return "a finite number"
    if kind in limits:
        return "a number " + limits[kind].format(**context)
    if kind in ("literal_error", "enum"):
        return f"one of {context['expected']}"
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "a list"}
    kinds |= {"model": "a section of keys", "dict": "a section of keys", "none": "null"}
    return kinds.get(kind.split("_")[0], error["msg"][0].lower() + error["msg"][1:])


def kind_of(value: Any) -> str:
    names = {bool: "true/false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    names |= {dict: "a section", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
