"""A whole project as one file, to keep or to move into another database."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import sqlalchemy as sa

from labeling_ui.checks import check_guidelines, check_judgement, check_names, checked_comparison
from labeling_ui.comparisons import listed
from labeling_ui.database import value_rows
from labeling_ui.exports import place
from labeling_ui.project import Item, Project, Settings, is_name
from labeling_ui.projection import shown_digest
from labeling_ui.schema import COMPARISON, EVENT, GUIDELINE, ITEM, PROJECT
from labeling_ui.store import LabelStore
from reward.records import InputError, Record, numbered_jsonl, write_jsonl

FORMAT = "align-labels"
VERSION = 1
EVENT_FIELDS = ("annotator", "kind", "key", "body", "created")


def export_store(store: LabelStore, project: Project, path: str | Path) -> None:
    """Write the whole project as JSONL: a line on the project, its comparisons, and all that anyone ever did, in order.

    `import_store` into an empty store gives the same project; exported again, the same bytes. Accounts, leases and the
    priorities of `LabelStore.prioritise` are no part of it.
    """
    with store.database.read() as connection:
        row = connection.execute(sa.select(PROJECT).where(PROJECT.c.id == project.id)).one()
        guidelines = (
            sa.select(*GUIDELINE.c["version", "text", "created"])
            .where(GUIDELINE.c.project_id == project.id)
            .order_by(GUIDELINE.c.version)
        )
        header = {
            "format": FORMAT,
            "version": VERSION,
            "name": row.name,
            "simulated": row.simulated,
            "settings": row.settings,
            "created": row.created,
            "guidelines": [dict(each._mapping) for each in connection.execute(guidelines)],
        }
        payloads = sa.select(COMPARISON.c.payload).where(COMPARISON.c.project_id == project.id)
        records = connection.execute(payloads.order_by(COMPARISON.c.id)).scalars().all()
        done = (
            sa.select(ITEM.c.key.label("item"), *EVENT.c[EVENT_FIELDS])
            .join_from(EVENT, ITEM)
            .where(EVENT.c.project_id == project.id)
            .order_by(EVENT.c.id)
        )
        events = [dict(each._mapping) for each in connection.execute(done)]
    write_jsonl(
        place(path), [header, *({"comparison": record} for record in records), *({"event": event} for event in events)]
    )


@dataclass(frozen=True, slots=True)
class Restored:
    """The project, and how many items and events an import added to it."""

    project: Project
    items: int
    events: int


def import_store(store: LabelStore, path: str | Path) -> Restored:
    """Take in a project that `export_store` wrote; what is there already is not added again.

    A project of that name keeps its settings and gets what it lacks. The file is checked before anything is stored; an
    import that was cut off is completed by another.

    Raises:
        InputError: the file is no such export, a line (named by number) says what no store can hold, or the project is
            there with another mode, another `simulated`, other guidelines or other content under the same name.
    """
    header, records, events = _read_export(path)
    project = _restored_project(store, header)
    added = store.add_items(project, records).added
    numbers = {item.key: item.id for item in store.items(project)}
    rows = [
        {"project_id": project.id, "item_id": numbers[event["item"]]} | {name: event[name] for name in EVENT_FIELDS}
        for event in events
    ]
    with store.database.write() as connection:
        query = sa.select(EVENT).where(EVENT.c.project_id == project.id)
        found = value_rows(connection, query, EVENT.c.key, [row["key"] for row in rows])
        known = {row.key: row._mapping for row in found}
        for row in rows:
            if (before := known.get(row["key"])) and any(
                before[name] != row[name] for name in ("item_id", *EVENT_FIELDS)
            ):
                raise InputError(
                    f"{path}: the key {row['key']} belongs to another event in project {project.name}: labels never "
                    "change; import into another store."
                )
        fresh = [row for row in rows if row["key"] not in known]
        for start in range(0, len(fresh), 1000):
            connection.execute(sa.insert(EVENT), fresh[start : start + 1000])
    store.replay(project)
    return Restored(store.project(project.name), added, len(fresh))


def _restored_project(store: LabelStore, header: Record) -> Project:
    name = header["name"]
    with store.database.write() as connection:
        row = connection.execute(sa.select(PROJECT).where(PROJECT.c.name == name)).one_or_none()
        if row is None:
            values = {column: header[column] for column in ("name", "simulated", "settings", "created")}
            number = connection.execute(sa.insert(PROJECT).values(values).returning(PROJECT.c.id)).scalar_one()
        elif (row.simulated, row.settings["mode"]) != (header["simulated"], header["settings"]["mode"]):
            raise InputError(
                f"Project {name} is there already with another mode, or with labels by people where these are "
                "simulated or the other way round: import into another store."
            )
        else:
            number = row.id
        query = sa.select(GUIDELINE).where(GUIDELINE.c.project_id == number)
        known = {each.version: each.text for each in connection.execute(query)}
        for guideline in header["guidelines"]:
            added = {column: guideline[column] for column in ("version", "text", "created")}
            if added["version"] not in known:
                connection.execute(sa.insert(GUIDELINE).values(added | {"project_id": number}))
            elif known[added["version"]] != added["text"]:
                raise InputError(
                    f"Project {name} is there already with another text as version {added['version']} of its "
                    "guidelines: import into another store."
                )
    return store.project(name)


def _read_export(path: str | Path) -> tuple[Record, list[Record], list[Record]]:
    """(header, comparisons, events) of an export, all checked."""
    lines = numbered_jsonl(path)
    header = lines[0][1]
    if header.get("format") != FORMAT:
        raise InputError(
            f"{path} is no exported project, its first line has the columns {listed(header)}: import comparisons as "
            "comparisons, or export a project first."
        )
    if header.get("version") != VERSION:
        raise InputError(
            f"{path} has version {header.get('version')!r} of the format, and this program knows {VERSION}: update the "
            "program."
        )
    records: list[Record] = []
    names: set[str] = set()
    items: dict[str, Item] = {}
    events: dict[str, Record] = {}
    for number, line in lines:
        try:
            if line is header:
                project = _header_project(header)
            elif isinstance(record := line.get("comparison"), dict):
                records.append(checked_comparison(record))
                if record["id"] in names:
                    raise InputError(f"The comparison {record['id']} is there twice.")
                names.add(record["id"])
                items.update(_items(project, record))
            elif isinstance(event := line.get("event"), dict):
                _check_event(project, items, events, event)
                events[event["key"]] = event
            else:
                raise InputError(f"The columns are {listed(line)}, but comparison or event is wanted.")
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return header | {"settings": asdict(project.settings)}, records, list(events.values())


def _header_project(header: Record) -> Project:
    try:
        settings = Settings(**{**header["settings"], "criteria": tuple(header["settings"]["criteria"])})
        name, simulated, created = header["name"], header["simulated"], header["created"]
        guidelines = [(each["version"], each["text"], each["created"]) for each in header["guidelines"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"The project's line cannot be read ({error!r}): export the project again.") from None
    texts = [name, created, *(each for _, *rest in guidelines for each in rest)]
    fine = isinstance(simulated, bool) and all(isinstance(text, str) for text in texts) and is_name(name)
    if not fine or not guidelines or [version for version, *_ in guidelines] != list(range(1, len(guidelines) + 1)):
        raise InputError("The project's name, guidelines or dates are not as an export has them: export it again.")
    for _, text, _ in guidelines:
        check_guidelines(text)
    return Project(0, name, simulated, settings, created, guidelines[-1][1], len(guidelines))


def _items(project: Project, record: Record) -> dict[str, Item]:
    """The items of a comparison by key, as `LabelStore.add_items` will make them."""
    found = {}
    answers = record["answers"]
    for group in itertools.combinations(
        range(len(answers)), 2 if project.settings.mode == "pairwise" else len(answers)
    ):
        key = f"{record['id']}:{'-'.join(map(str, group))}"
        payload = {"prompt": record["prompt"], "answers": [answers[i] for i in group]}
        found[key] = Item(0, key, record["id"], group, "", payload)
    return found


def _check_event(project: Project, items: Mapping[str, Item], earlier: Mapping[str, Record], event: Record) -> None:
    """Refuse what no store can hold, and a label of other texts than those in the file."""
    texts = ("item", *(name for name in EVENT_FIELDS if name != "body"))
    if not isinstance(event.get("body"), dict) or not all(
        isinstance(event.get(name), str) and event[name].strip() for name in texts
    ):
        raise InputError(f"An event has the columns {listed(event)}: the texts {', '.join(texts)} and body are wanted.")
    check_names(event)
    item, body, kind = items.get(event["item"]), event["body"], event["kind"]
    if item is None:
        raise InputError(f"The item {event['item']} is of no comparison above.")
    if event["key"] in earlier:
        raise InputError(f"The key {event['key']} is there twice.")
    if kind == "undo":
        undone = earlier.get(str(body.get("undoes")))
        if undone is None or any(undone[name] != event[name] for name in ("item", "annotator")):
            raise InputError(f"What it takes back, {body.get('undoes')!r}, is nothing the annotator did before.")
        return
    if kind not in ("label", "skip", "verdict"):
        raise InputError(f"The kind is {kind!r}: label, skip, verdict or undo is wanted.")
    order = body.get("order")
    numbers = isinstance(order, list) and all(type(answer) is int for answer in order)
    if not numbers or sorted(order) != list(item.answers):
        raise InputError(f"The order is {order!r}: the item's answers are {list(item.answers)}.")
    if kind != "skip":
        # The criteria may have changed since.
        check_judgement(project, item, {**body, "annotator": event["annotator"], "key": event["key"], "ratings": None})
    if body.get("shown", shown := shown_digest(item, order)) != shown:
        raise InputError("The label was given to other texts than those of the comparison above.")
