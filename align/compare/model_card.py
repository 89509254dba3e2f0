"""A summary of the report in Markdown, to paste into a model card or a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from align.compare import tables
from align.compare.schema import Report


def model_card(report: Report) -> str:
    """Notices, verdict, tables, judges, method and the data behind it; texts of others are made literal."""
    prompts = report["prompts"]
    lines = [f"# {_literal(report['pipeline'])}: is the aligned model better?", ""]
    for notice in report["notices"]:
        lines += [f"> **Note:** {_literal(notice)}", ""]
    lines += [f"- {_literal(sentence)}" for sentence in report["verdict"]]
    for title, table in (
        ("", tables.gains(report)),
        ("What it cost", tables.costs(report)),
        ("Tasks", tables.tasks(report)),
    ):
        if not table.columns:
            continue
        lines += ["", f"## {title}"] if title else []
        heads = [
            "Model",
            *(f"{column.title} ({column.unit})" if column.unit else column.title for column in table.columns),
        ]
        lines += ["", _pipes(heads), "|---|" + "---:|" * len(table.columns)]
        lines += [_pipes([row.name, *map(tables.one_line, row.cells)]) for row in table.rows]
    if climb := report.get("overoptimisation"):
        lines += ["", "## Was the reward over-climbed?", ""]
        lines += [f"- {_literal(sentence)}" for sentence in climb["sentences"]]
    lines += ["", "## Judges", ""]
    for judge in report["judges"]:
        known = [judge["description"], *([judge["trust"]] if "trust" in judge else []), *judge["sentences"]]
        lines.append(f"- **{_literal(judge['name'])}:** {_literal(' '.join(known))}")
    held_out = "held-out prompts" if prompts["split"] == "test" else "prompts"
    lines += [
        "",
        "## Method",
        "",
        f"Every model answered the same {prompts['n']} {held_out} (sha256 {prompts['digest'][:12]}). Ranges are 95 % "
        "intervals over prompts, ± is one standard error; they say nothing about another seed of training.",
    ]
    if report["lineage"]:
        lines += ["", "| Stage | Digest | Data |", "|---|---|---|"]
        for step in report["lineage"]:
            data = ", ".join(f"{path} {digest[:12]}" for path, digest in step["data"].items())
            lines.append(_pipes([step["stage"], step["digest"][:12], data]))
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """Text on one line with Markdown's and HTML's own characters made literal."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_literal, cells)) + " |"
