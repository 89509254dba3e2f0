"""From a model back to its labels and data: the chain of run folders, for people."""

from __future__ import annotations

from pathlib import Path

from align.runs import lineage


def as_text(folder: Path) -> str:
    """The chain behind a run folder, one block a stage, the folder itself first.

    Raises:
        InputError: not a run folder.
    """
    lines = []
    for entry in lineage(folder):
        lines.append(f"{entry['stage']}  {entry['folder']}")
        lines.append(f"    digest   {entry['digest']}")
        if entry["simulated_labels"]:
            lines.append("    labels   SIMULATED: no person judged these answers")
        if "labels_digest" in entry["summary"]:
            lines.append(f"    labels   {entry['summary']['labels']}, sha256 {entry['summary']['labels_digest']}")
        lines += [f"    data     {path}  sha256 {sha}" for path, sha in entry["data"].items()]
        if entry["parents"]:
            lines.append(f"    made of  {', '.join(entry['parents'])}")
        if "stale" in entry:
            lines.append(f"    WARNING  {entry['stale']}")
    return "\n".join(lines)
