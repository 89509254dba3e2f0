"""reward <- labeling_ui <- align, one direction only; and what handles records alone loads no model library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"reward": {"labeling_ui", "align"}, "labeling_ui": {"align"}}
FILES = [(package, path) for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import in a file, those inside functions and TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield node.lineno, ast.unparse(node.args[0]).strip("'").partition(".")[0]


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_imports_go_one_way(package: str, path: Path) -> None:
    wrong = [f"{path.relative_to(ROOT)}:{line} imports {name}" for line, name in imported(path)]
    wrong = [sentence for sentence in wrong if sentence.rpartition(" ")[2] in FORBIDDEN[package]]
    assert not wrong


def test_the_law_is_looked_for_where_the_code_is() -> None:
    assert {package for package, _ in FILES} == set(FORBIDDEN)
    assert {"reward", "align"} <= {name for path in (ROOT / "align").rglob("*.py") for _, name in imported(path)}


LIGHT = [
    "reward.records",
    "reward.aggregate",
    "labeling_ui.store",
    "labeling_ui.assignment",
    "labeling_ui.exchange",
    "labeling_ui.quality",
    "labeling_ui.panel",
    "align.cli",
    "align.check.command",
    "align.inspect.command",
    "align.data.report",
    "align.config_file",
]


@pytest.mark.parametrize("module", LIGHT)
def test_records_labels_and_the_command_line_load_no_model_library(module: str) -> None:
    script = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'trl', 'gradio') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.strip() == "[]"
