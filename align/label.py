"""Stage 3, label: from comparisons to preferences, by a simulated panel, an existing dataset, or people.

Writes preferences.jsonl (see `reward.records`), ties.jsonl and dropped.jsonl. Simulated labels go through the same
label store as people's, and everything made from them says so.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from align import progress, ranks
from align.config import Config
from align.data.load import load_preferences
from align.runs import Run, is_done
from labeling_ui.address import Address
from labeling_ui.panel import HiddenPreference, label_with_panel, make_panel
from labeling_ui.store import LabelStore, Project, Settings
from reward.aggregate import Preferences, preferences
from reward.records import InputError, Record, prompt_text, read_jsonl, write_jsonl


def run_label(config: Config, run: Run) -> dict[str, Any]:
    """Label; returns the number of preferences on each side, of ties and of labels."""
    if not ranks.is_first():
        return {}
    if config.label.source == "dataset":
        return _from_dataset(config, run)
    with LabelStore(store_address(config)) as store:
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
            _export(store, project, run)
        found = preferences(store.votes(project), simulated=project.simulated, method=config.label.aggregate)
        labels, digest = store.count_labels(project), store.digest(project)
    summary = _write(run, found.records, found.ties, [])
    return summary | {
        "labels": labels,
        "labels_digest": digest,
        "identical": found.identical,
        "unlabelled": found.unlabelled,
        "aggregate": config.label.aggregate,
        **_reliability(found),
    }


def _reliability(found: Preferences) -> dict[str, Any]:
    """What the annotators' reliability was found to be, said aloud; nothing for plain majority."""
    if not found.reliability:
        return {}
    known, doubtful = len(found.reliability), len(found.uninformative)
    progress.say(f"  label: {doubtful} of {known} annotators tell next to nothing or have it reversed")
    return {"annotators": known, "uninformative": doubtful}


def store_address(config: Config) -> str:
    """Where the label database of people is, a path or a URL; the simulated panel's lies in its stage's folder."""
    if config.label.store:
        return config.label.store
    if config.label.source != "simulated":
        # Beside the stage's folder: what --force clears must not be what people said.
        config.folder("label").parent.mkdir(parents=True, exist_ok=True)
        return str(config.folder("label").parent / "labels.sqlite")
    return str(config.folder("label") / "labels.sqlite")


def labels_digest(config: Config) -> dict[str, Any]:
    """People's labels as an input of the stage: new labels in the database make a new stage."""
    with LabelStore(store_address(config)) as store:
        project = _project(config, store)
        return {"labels": store.count_labels(project), "labels_digest": store.digest(project)}


# -- people -----------------------------------------------------------------------------------------------------------


def collect(config: Config) -> None:
    """Wait until people have given the labels that are wanted, serving the app meanwhile.

    Nothing is waited for where the stage is done, where enough labels are there, or where `label.finish` says so. It
    can be stopped at any moment and started again: a label is on the disk before its annotator sees that it is saved.
    """
    if is_done(config.folder("label")):
        return
    with LabelStore(store_address(config)) as store:
        project = _project(config, store)
        _import(config, store, project)
        items = sum(item.gold is None for item in store.items(project))
        wanted = config.label.labels or items * _overlap(config)
        if config.label.finish or store.closed(project) or (items and store.count_labels(project) >= wanted):
            return
        if not items:
            raise InputError(
                f"project {project.name} in {store.database.name} has nothing to label: run `align sample` before, or "
                "import comparisons."
            )
        if wanted > items * _overlap(config):
            raise InputError(
                f"label.labels is {wanted}, but {items} items with label.labels_per_item={_overlap(config)} can get "
                f"{items * _overlap(config)} labels: ask for fewer, or for more labels an item."
            )
        _prioritise(config, store, project)
        serve_until(config, store, project, wanted)


def _prioritise(config: Config, store: LabelStore, project: Project) -> None:
    """Ask first where a reward model is least certain; looked at anew at every start, for items may have come."""
    if config.label.uncertain_by is None:
        return
    if config.label.policy != "active":
        raise InputError(
            f"label.uncertain_by orders the items under label.policy: active, but the policy is {config.label.policy}: "
            "set one or the other."
        )
    from align.uncertainty import prioritise

    scored = prioritise(store, project, config.label.uncertain_by)
    progress.say(f"  label: {scored} items come by the uncertainty of {config.label.uncertain_by}")


def _project(config: Config, store: LabelStore) -> Project:
    """The project, made or brought to what the config says."""
    name, section = config.label.project or config.name, config.label
    known = next((project for project in store.projects() if project.name == name), None)
    if known is not None and known.simulated:
        raise InputError(f"project {name} holds simulated labels: set label.source: simulated.")
    settings = Settings(
        mode=section.mode,
        overlap=_overlap(config),
        policy=section.policy,
        gold_share=section.gold_share,
        lease_seconds=section.lease_seconds,
        criteria=tuple(section.criteria),
    )
    guidelines = Path(section.guidelines).read_text("utf-8") if section.guidelines else ""
    return store.create_project(name, instructions=guidelines, settings=settings)


def _overlap(config: Config) -> int:
    return config.label.labels_per_item


def _import(config: Config, store: LabelStore, project: Project) -> None:
    made = config.folder("sample") / "comparisons.jsonl"
    if "sample" in config.stages and made.is_file():
        found = store.add_items(project, read_jsonl(made))
        if found.added:
            progress.say(f"  label: {found.added} items from {made} were added to project {project.name}")


def import_file(config: Config, path: Path) -> str:
    """Add the comparisons of a file to the project that people label; in words, what it was and what was added.

    Raises:
        InputError: it is no file of comparisons; nothing was added. What it quotes of the file cannot drive a terminal.
    """
    from labeling_ui.exchange import read_comparisons
    from labeling_ui.render import visible

    try:
        records, sentence = read_comparisons(path, test_share=config.data.test_share)
        with LabelStore(store_address(config)) as store:
            project = _project(config, store)
            found = store.add_items(project, records)
            said = f"{sentence}\nProject {project.name} in {store.database.name}: {found.sentence()}"
    except InputError as error:
        raise InputError(visible(str(error)).replace("\r", " ")) from error
    return visible(said).replace("\r", " ")


def invitation(config: Config, role: str) -> str:
    """A link that lets one person join the labelling app."""
    from labeling_ui.accounts import Accounts

    with LabelStore(store_address(config)) as store:
        return f"{_address(config).origins()[0]}/join?token={Accounts(store).invite(role)}"


def _address(config: Config) -> Address:
    app = config.label.app
    tls = None
    if app.tls_certificate or app.tls_key:
        if not (app.tls_certificate and app.tls_key):
            raise InputError("label.app: tls_certificate and tls_key come together: give both.")
        tls = Path(app.tls_certificate), Path(app.tls_key)
    return Address(app.host, app.port, tls, app.url)


def serve_until(config: Config, store: LabelStore, project: Project, wanted: int) -> None:
    """Serve the app until the project has so many labels, or is closed."""
    from labeling_ui.server import first_link, serving

    app = config.label.app
    with serving(store, _address(config), local=app.local) as site:
        progress.say(
            f"  label: project {project.name} is open at {site.origins[0]}/label/?project={quote(project.name)}"
        )
        if link := first_link(store, site):
            whose = "you in" if app.local else "in the first admin, who invites the others"
            progress.say(f"  label: this link lets {whose}, once: {link}")
        progress.say(
            "  label: stop with Ctrl-C at any time; the same command goes on. label.finish=true ends it early."
        )
        with progress.bar("label: by people", wanted) as report:
            while (count := store.count_labels(project)) < wanted and not store.closed(project):
                report(count, f"{count} labels")
                time.sleep(1)
            report(min(count, wanted))
    progress.say(f"  label: {count} labels are in, going on")


def _export(store: LabelStore, project: Project, run: Run) -> None:
    """What people's labels hold beside preferences."""
    from labeling_ui import exchange

    exchange.export_labels_csv(store, project, run.folder / "labels.csv")
    exchange.export_demonstrations(store, project, run.folder / "demonstrations.jsonl")
    exchange.export_store(store, project, run.folder / "labels.jsonl")


def _simulate(config: Config, store: LabelStore) -> Any:
    progress.say("  SIMULATED LABELS: a program with a documented taste stands in for people (labeling_ui/panel.py).")
    comparisons = read_jsonl(config.folder("sample") / "comparisons.jsonl")
    settings = Settings(overlap=config.label.labels_per_item)
    project = store.create_project(config.name, simulated=True, settings=settings)
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
    if config.label.aggregate != "majority":
        raise InputError(
            f"label.aggregate is {config.label.aggregate}, but a dataset holds preferences and not who voted what: "
            "remove the key, or import the labels and set label.source: people."
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
