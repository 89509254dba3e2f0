"""Labels as files: what models are trained on, and a table of the labels.

Every export is the same to the byte on a rerun, appears whole or not at all, and every record in it carries the split
of its comparison: a held-out prompt stays held out. What came from simulated labels says so.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from labeling_ui.comparisons import SIDES
from labeling_ui.store import Item, LabelStore, Project
from reward.aggregate import Preferences, preferences
from reward.records import InputError, Record, assistant_answer, digest, write_atomically, write_jsonl


def export_preferences(store: LabelStore, project: Project, folder: str | Path) -> Preferences:
    """Write preferences.jsonl and ties.jsonl, as `reward.aggregate.preferences` makes them; TRL reads the first."""
    found = preferences(store.votes(project), simulated=project.simulated)
    write_jsonl(place(Path(folder) / "preferences.jsonl"), found.records)
    write_jsonl(place(Path(folder) / "ties.jsonl"), found.ties)
    return found


def export_rankings(store: LabelStore, project: Project, path: str | Path) -> int:
    """Write a row for each item with a label, ordered by comparison id; returns their number. Gold items are none.

    `{prompt, answers: [text], rankings: [{annotator, ranking}], comparison_id, split, simulated}`; a ranking holds
    groups of indices of answers from best to worst, equals in one group, and may leave answers out. All pairs of a row
    belong into one batch element: its `comparison_id` is the group.

    Raises:
        InputError: the project is judged in pairs.
    """
    if project.settings.mode != "ranking":
        raise InputError(f"Project {project.name} is judged in pairs and has no rankings: export its preferences.")
    given: dict[int, list[Record]] = {}
    for label in store.labels(project):
        given.setdefault(label.item_id, []).append({"annotator": label.annotator, "ranking": label.body["ranking"]})
    rows = [
        {
            "prompt": item.payload["prompt"],
            "answers": [answer["text"] for answer in item.payload["answers"]],
            "rankings": sorted(given[item.id], key=lambda ranking: ranking["annotator"]),
            **_origin(project, item),
        }
        for item in sorted(store.items(project), key=lambda item: item.comparison_id)
        if item.gold is None and item.id in given
    ]
    write_jsonl(place(path), rows)
    return len(rows)


def export_kto(store: LabelStore, project: Project, path: str | Path) -> int:
    """Write `{prompt, completion, label, split, simulated}`, each answer of a prompt once; returns their number.

    An answer that won is true, one that lost is false. Left out are ties, and answers that did both: they are neither
    good nor bad, and TRL would train them up and down.
    """
    rows: dict[str, Record] = {}
    mixed: set[str] = set()
    for record in preferences(store.votes(project), simulated=project.simulated).records:
        for side in SIDES:
            origin = {name: record[name] for name in ("split", "simulated")}
            row = {"prompt": record["prompt"], "completion": record[side], "label": side == "chosen", **origin}
            key = digest([row["prompt"], row["completion"], row["split"]])
            if rows.setdefault(key, row)["label"] != row["label"]:
                mixed.add(key)
    kept = [row for key, row in rows.items() if key not in mixed]
    write_jsonl(place(path), kept)
    return len(kept)


def export_demonstrations(store: LabelStore, project: Project, path: str | Path) -> int:
    """Write the better answers that annotators wrote, in the order they were given; returns their number.

    `{prompt, completion, annotator, comparison_id, split, simulated}`.
    """
    # Labels before items: then every label's item is there, even while others add to the store.
    labels = [label for label in store.labels(project) if label.body.get("rewrite")]
    items = {item.id: item for item in store.items(project)}
    rows = [
        {
            "prompt": items[label.item_id].payload["prompt"],
            "completion": assistant_answer(label.body["rewrite"]),
            "annotator": label.annotator,
            **_origin(project, items[label.item_id]),
        }
        for label in labels
    ]
    write_jsonl(place(path), rows)
    return len(rows)


def place(path: str | Path) -> Path:
    """The path, whose folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _origin(project: Project, item: Item) -> Record:
    return {"comparison_id": item.comparison_id, "split": item.payload["split"], "simulated": project.simulated}


COLUMNS = (
    *("item", "split", "annotator", "order", "value", "ranking", "ratings"),
    *("seconds", "comment", "flag", "created"),
)


def export_labels_csv(store: LabelStore, project: Project, path: str | Path) -> int:
    """Write a table of the labels that count, in the order they were given, as CSV in UTF-8; returns their number.

    `order` is the answers from left to right ("1 0"), `value` counts from the left one; a ranking is "2 > 0 = 1".
    A cell that a spreadsheet would run as a formula begins with an apostrophe.
    """
    labels = store.labels(project)
    items = {item.id: item for item in store.items(project)}
    out = io.StringIO(newline="")
    table = csv.writer(out)
    table.writerow(COLUMNS)
    for label in labels:
        item, body = items[label.item_id], label.body
        row = {name: body.get(name) for name in ("value", "seconds", "comment", "flag")} | {
            "item": item.key,
            "split": item.payload["split"],
            "annotator": label.annotator,
            "order": " ".join(map(str, body["order"])),
            "ranking": " > ".join(" = ".join(map(str, group)) for group in body.get("ranking") or []),
            "ratings": json.dumps(body["ratings"], ensure_ascii=False) if body.get("ratings") else "",
            "created": label.created,
        }
        table.writerow([_cell(row[column]) for column in COLUMNS])
    write_atomically(place(path), out.getvalue())
    return len(labels)


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
