"""Stage 3, label: from comparisons to preferences, by a simulated panel, an existing dataset, or people.

Writes preferences.jsonl (see `reward.records`), ties.jsonl and dropped.jsonl. Simulated labels go through the same
label store as people's, and everything made from them says so.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from align import progress, ranks
from align.config import Config
from align.data.load import load_preferences
from align.runs import Run
from labeling_ui.panel import HiddenPreference, label_with_panel, make_panel
from labeling_ui.store import LabelStore
from reward.aggregate import preferences
from reward.records import InputError, Record, prompt_text, read_jsonl, write_jsonl


def run_label(config: Config, run: Run) -> dict[str, Any]:
    """Label; returns the number of preferences on each side, of ties and of labels."""
    if not ranks.is_first():
        return {}
    if config.label.source == "dataset":
        return _from_dataset(config, run)
    with LabelStore(store_path(config)) as store:
        if config.label.source == "simulated":
            project = _simulate(config, store)
        else:
            project = store.project(config.label.project or config.name)
            if project.simulated:
                raise InputError(f"project {project.name} holds simulated labels: set label.source: simulated.")
            if (count := store.count_labels(project)) < config.label.min_labels:
                raise InputError(
                    f"project {project.name} has {count} labels, label.min_labels wants {config.label.min_labels}."
                )
        found = preferences(store.votes(project), simulated=project.simulated)
        labels, digest = store.count_labels(project), store.digest(project)
    summary = _write(run, found.records, found.ties, [])
    return summary | {
        "labels": labels,
        "labels_digest": digest,
        "identical": found.identical,
        "unlabelled": found.unlabelled,
    }


def store_path(config: Config) -> Path:
    """The label database.

    Raises:
        InputError: labels should come from people, but there is no database.
    """
    path = Path(config.label.store) if config.label.store else config.folder("label") / "labels.sqlite"
    if config.label.source == "people" and not path.is_file():
        raise InputError(
            f"label.source is people, but there is no label database at {path}: set label.store to the labelling app's "
            "database, or use label.source: simulated or dataset."
        )
    return path


def labels_digest(config: Config) -> dict[str, Any]:
    """People's labels as an input of the stage: new labels in the database make a new stage."""
    with LabelStore(store_path(config)) as store:
        project = store.project(config.label.project or config.name)
        return {"labels": store.count_labels(project), "labels_digest": store.digest(project)}


def _simulate(config: Config, store: LabelStore) -> Any:
    progress.say("  SIMULATED LABELS: a program with a documented taste stands in for people (labeling_ui/panel.py).")
    comparisons = read_jsonl(config.folder("sample") / "comparisons.jsonl")
    project = store.create_project(config.name, simulated=True)
    store.add_items(project, comparisons)
    with progress.bar("label: simulated panel", len(store.items(project)) * config.label.labels_per_item) as report:
        label_with_panel(
            store,
            project,
            annotators=make_panel(config.label.annotators, config.seed),
            labels_per_item=config.label.labels_per_item,
            preference=HiddenPreference(),
            seed=config.seed,
            on_progress=lambda done, total: report(done),
        )
    return project


def _from_dataset(config: Config, run: Run) -> dict[str, Any]:
    if config.data.preferences is None:
        raise InputError(
            "label.source is dataset, but data.preferences is not set: give the path of a JSONL file of pairs."
        )
    loaded = load_preferences(config.data.preferences, config.data.test_share, config.data.max_rows)
    progress.say(f"  preferences: {loaded.sentence()}")
    for number, record in enumerate(loaded.records):
        record.setdefault("comparison_id", f"{Path(loaded.path).stem}-{number}")
        record.setdefault("simulated", False)
    return _write(run, loaded.records, [], loaded.dropped) | {"data": loaded.counts()}


def _write(run: Run, records: list[Record], ties: list[Record], dropped: list[Record]) -> dict[str, Any]:
    sides = Counter(record["split"] for record in records)
    for side in ("train", "test"):
        if not sides[side]:
            raise InputError(f"no preference is left on the {side} side ({len(ties)} ties): label more comparisons.")
    write_jsonl(run.folder / "preferences.jsonl", records)
    write_jsonl(run.folder / "ties.jsonl", ties)
    write_jsonl(run.folder / "dropped.jsonl", dropped)
    return {
        "preferences": dict(sides),
        "ties": len(ties),
        "left_out": len(dropped),
        "chosen_longer": round(sum(_longer(record) for record in records) / len(records), 3),
    }


def _longer(record: Record) -> bool:
    return len(prompt_text(record["chosen"])) > len(prompt_text(record["rejected"]))
