"""Reading a config file: YAML with the place of every key, `key=value` overrides, and errors as sentences."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from align.config import (
    STAGES,
    AdapterSection,
    Config,
    DpoSection,
    PpoSection,
    RewardSection,
    SftSection,
)
from align.config_base import PathMark, PathOrNameMark
from align.config_fields import KeyProblem, config_fields, hint_schema, kind_of, shown, unknown_key, wanted_by
from reward.records import InputError


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """The config in a YAML file, with `section.key=value` overrides (the value is read as YAML).

    Raises:
        InputError: missing or malformed file, unknown key (with the nearest known one), wrong type or value.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"config {path} {what}: give the path of a YAML file, such as configs/quickstart.yaml.")
    raw, lines = _read_yaml(path)
    raw.setdefault("name", path.stem)
    _resolve_paths(raw, Config, path.resolve().parent)
    return _checked(raw, lines, path, overrides)


def config_of(raw: dict[str, Any], overrides: typing.Sequence[str] = ()) -> Config:
    """The config of a command that comes without a file: paths are counted from the working directory.

    Raises:
        InputError: as `load_config`.
    """
    _resolve_paths(raw, Config, Path.cwd())
    return _checked(raw, _Lines(), Path("command line"), overrides)


def _checked(raw: dict[str, Any], lines: _Lines, path: Path, overrides: typing.Sequence[str]) -> Config:
    raw.setdefault("runs", str(Path.cwd() / "runs"))
    for override in overrides:
        _apply_override(raw, lines, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise InputError("\n".join(_sentence(group, path, lines) for group in _by_key(error))) from None


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, trainer and adapter keys included, for editors."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for section in (AdapterSection, SftSection, RewardSection, DpoSection, PpoSection):
        properties = schema["$defs"][section.__name__]["properties"]
        for key, hint in config_fields(section.config_class).items():
            if key not in section.owned_keys:
                properties.setdefault(key, hint_schema(hint))
        schema["$defs"][section.__name__]["additionalProperties"] = False
    return schema


class _Lines(dict[tuple[str | int, ...], str]):
    """Where each key was written: ("sft", "r") -> "configs/a.yaml, line 12"."""

    def of(self, location: tuple[str | int, ...], fallback: str) -> str:
        while location:
            if location in self:
                return self[location]
            location = location[:-1]
        return fallback


def _read_yaml(path: Path) -> tuple[dict[str, Any], _Lines]:
    """The mapping in the file and the place of every key in it."""
    try:
        text = path.read_text("utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not valid YAML ({error.problem or error.context}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a mapping of sections is wanted, but the file holds {kind_of(raw)}.")
    lines = _Lines()

    def walk(node: yaml.Node, location: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                place = (*location, str(key.value))
                where = f"{path}, line {key.start_mark.line + 1}"
                if place in lines:
                    raise InputError(f"{where}: `{'.'.join(map(str, place))}` is set twice; keep one of them.")
                lines[place] = where
                walk(value, place)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*location, index))

    if node is not None:
        try:
            walk(node, ())
        except RecursionError:
            raise InputError(f"{path}: not valid here (an alias stands inside its own anchor).") from None
    return _unshared(raw), lines


def _unshared(value: Any) -> Any:
    """A copy in which no two keys share a mapping: overriding one use of an anchor must not change the others."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _apply_override(raw: dict[str, Any], lines: _Lines, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise InputError(f"`{override}` is not an override: write section.key=value, such as dpo.learning_rate=1e-5.")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    written: Any = value
    for part in reversed(parts):
        written = {part: written}
    _resolve_paths(written, Config, Path.cwd())
    target = raw
    for part in parts[:-1]:
        written = written[part]
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise InputError(f"`{override}`: `{part}` holds {kind_of(target)}, not a section of keys.")
    target[parts[-1]] = written[parts[-1]]
    for place in [place for place in lines if place[: len(parts)] == parts]:
        del lines[place]  # what the file says below this key is replaced
    lines[parts] = f"command line, {override}"
    for length in range(1, len(parts)):
        lines.setdefault(parts[:length], lines[parts])


def _resolve_paths(raw: dict[str, Any], section: type[BaseModel], folder: Path) -> None:
    """Make every path in `raw` absolute, relative ones counted from `folder`."""
    for key, field in section.model_fields.items():
        if key not in raw:
            continue
        value = raw[key]
        inner = _section_type(field.annotation)
        if inner and isinstance(value, dict | list):
            for part in _listed(value):
                if isinstance(part, dict):
                    _resolve_paths(part, inner, folder)
        elif isinstance(value, str) and _is_path(field) and "://" not in value:
            raw[key] = _absolute(value, folder)
        elif _is_path(field, PathOrNameMark):
            found = [_absolute(v, folder) if _is_there(v, folder) else v for v in _listed(value)]
            raw[key] = found if isinstance(value, list) else found[0]


def _absolute(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve())


def _is_there(value: Any, folder: Path) -> bool:
    """Whether a value that may be a name or a path is a path."""
    return isinstance(value, str) and value not in ("", "base", *STAGES) and Path(_absolute(value, folder)).exists()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_path(field: FieldInfo, kind: type = PathMark) -> bool:
    options = [field.metadata, *(getattr(option, "__metadata__", ()) for option in typing.get_args(field.annotation))]
    return any(isinstance(mark, kind) for marks in options for mark in marks)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    options = tuple(inner for o in options for inner in (typing.get_args(o) if typing.get_origin(o) is list else (o,)))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _by_key(error: ValidationError) -> list[list[Any]]:
    """Pydantic's errors, those of one key together: a value that may be of two types fails once for each of them."""
    groups: dict[tuple[int | str, ...], list[Any]] = {}
    for problem in error.errors():
        location = problem["loc"] if problem["type"] == "extra_forbidden" else _without_types(problem["loc"])
        groups.setdefault(location, []).append({**problem, "loc": location})
    # A wrong item of a list is told by its place; that the list is not of the other type too would only confuse.
    return [
        group for at, group in groups.items() if not any(len(o) > len(at) > 0 and o[: len(at)] == at for o in groups)
    ]


def _without_types(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A pydantic location without the type names it puts behind the key of a union: `str`, `list[str]`."""
    return tuple(part for part in location if part not in ("str", "list[str]"))


def _sentence(errors: list[Any], path: Path, lines: _Lines) -> str:
    """What is wrong with one key as a sentence for people."""
    error = errors[0]
    location = error["loc"]
    name = ".".join(str(part) for part in location)
    where = lines.of(location, str(path))
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for part in location[:-1]:
            if isinstance(part, str):  # a number is the place in a list of sections
                section = _section_type(section.model_fields[part].annotation) or section
        message = unknown_key(str(location[-1]), section.model_fields)
        return (
            f"{where}: {message}"
            if len(location) == 1
            else f"{where}: in `{'.'.join(map(str, location[:-1]))}`, {message}"
        )
    if error["type"] == "value_error":
        problem = error["ctx"]["error"]
        if isinstance(problem, KeyProblem) and not location:  # between sections: the key is a path of its own
            return f"{lines.of(tuple(problem.key.split('.')), where)}: {problem}."
        if isinstance(problem, KeyProblem):
            where = lines.of((*location, problem.key), where)
            return f"{where}: in `{name}`, {problem}{'' if str(problem).endswith('?') else '.'}"
        return f"{where}: `{name}` {problem}."
    if error["type"] == "missing":
        return f"{where}: `{name}` is missing."
    if error["type"] == "invalid_key":
        return f"{where}: the key {error['input']!r} is {kind_of(error['input'])}, but keys are text."
    wanted = " or ".join(dict.fromkeys(wanted_by(error) for error in errors))
    return f"{where}: `{name}` is {shown(error['input'])}, but {wanted} is wanted."
