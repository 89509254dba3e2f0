"""From comparisons to the items that people judge."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import sqlalchemy as sa

from labeling_ui.database import value_rows
from labeling_ui.project import Imported, Project
from labeling_ui.schema import COMPARISON, ITEM, PROJECT
from reward.records import InputError, Record, prompt_id
from reward.records import digest as content_digest


def add_items(connection: sa.Connection, project: Project, records: list[Record]) -> Imported:
    """Add the items of checked comparisons, within one transaction.

    Raises:
        InputError: a comparison has the id of another with different content, or its prompt stands on the other side.
    """
    added = there = identical = 0
    _check_sides(connection, project, records)
    wanted = [record["id"] for record in records]
    query = sa.select(COMPARISON).where(COMPARISON.c.project_id == project.id)
    digests = {
        row.comparison_id: row.digest for row in value_rows(connection, query, COMPARISON.c.comparison_id, wanted)
    }
    for record in records:
        comparison_id, digest = record["id"], content_digest(record)
        groups, same = _groups(project, record)
        if known := digests.get(comparison_id):
            if known != digest:
                raise InputError(
                    f"Comparison {comparison_id} is in project {project.name} with different content: "
                    "what people judged cannot change; give the new content an id of its own."
                )
            there += len(groups)
            continue
        row = {
            "project_id": project.id,
            "comparison_id": comparison_id,
            "payload": record,
            "digest": digest,
            "prompt": prompt_id(record["prompt"]),
            "split": record["split"],
        }
        comparison = connection.execute(sa.insert(COMPARISON).returning(COMPARISON.c.id), row).scalar_one()
        if rows := [_item_row(project, comparison, record, group) for group in groups]:
            connection.execute(sa.insert(ITEM), rows)
        identical += same
        digests[comparison_id] = digest
        added += len(groups)
    counted = sa.select(sa.func.count()).where(ITEM.c.project_id == project.id, ITEM.c.gold.is_(None))
    connection.execute(
        sa.update(PROJECT).where(PROJECT.c.id == project.id).values(item_count=counted.scalar_subquery())
    )
    return Imported(added, there, identical)


def _check_sides(connection: sa.Connection, project: Project, records: list[Record]) -> None:
    """Refuse a prompt that is held out under one id and trained on under another."""
    prompts = [prompt_id(record["prompt"]) for record in records]
    columns = COMPARISON.c["prompt", "split", "comparison_id"]
    query = sa.select(*columns).where(COMPARISON.c.project_id == project.id)
    sides = {row.prompt: row for row in value_rows(connection, query, COMPARISON.c.prompt, list(set(prompts)))}
    known = {prompt: (row.split, row.comparison_id) for prompt, row in sides.items()}
    for record, prompt in zip(records, prompts, strict=True):
        split, other = known.setdefault(prompt, (record["split"], record["id"]))
        if split != record["split"]:
            raise InputError(
                f"Comparison {record['id']} is on the {record['split']} side, but its prompt is on the {split} "
                f"side in comparison {other}: give all comparisons of a prompt the same split."
            )


def _groups(project: Project, record: Record) -> tuple[list[tuple[int, ...]], int]:
    """(answers that are judged together, how many such groups hold one text only and are left out)."""
    texts = [answer["text"] for answer in record["answers"]]
    size = 2 if project.settings.mode == "pairwise" else len(texts)
    groups = list(itertools.combinations(range(len(texts)), size))
    # A program is not bothered, and its preferences count the pairs that are left out.
    kept = [group for group in groups if project.simulated or len({texts[i] for i in group}) > 1]
    return kept, len(groups) - len(kept)


def _item_row(project: Project, comparison: int, record: Record, group: tuple[int, ...]) -> dict[str, Any]:
    key = f"{record['id']}:{'-'.join(map(str, group))}"
    drawn = hashlib.sha256(f"{project.name} {key}".encode("utf-8", "surrogatepass")).digest()
    gold = record.get("gold")
    if gold is not None:
        gold = {"better": gold[0], "worse": gold[1]} if set(gold) <= set(group) else None
    return {
        "project_id": project.id,
        "comparison": comparison,
        "key": key,
        "answers": list(group),
        "gold": gold,
        "taken": 0,
        "full": gold is not None,
        "shuffle": int.from_bytes(drawn[:6]) / 2**48,
        "priority": 0.0,
    }
