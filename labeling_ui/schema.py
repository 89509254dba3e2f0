"""The tables of a label database, the same in SQLite and in PostgreSQL.

What people did is in `events` and is never changed; `labels` says what counts today and is made from the events alone.
Content that people judged is never changed either.

This module imports no web framework and no model library.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

PROJECT = sa.Table(
    "projects",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("simulated", sa.Boolean, nullable=False),
    sa.Column("settings", sa.JSON, nullable=False),
    # Counted as labels come in: items that are no gold items, and their labels that count.
    sa.Column("item_count", sa.Integer, nullable=False, default=0),
    sa.Column("label_count", sa.Integer, nullable=False, default=0),
    sa.Column("created", sa.Text, nullable=False),
)

# What annotators are asked to look for; a label names the version it was given under.
GUIDELINE = sa.Table(
    "guidelines",
    metadata,
    sa.Column("project_id", sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)

COMPARISON = sa.Table(
    "comparisons",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("project_id", sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("comparison_id", sa.Text, nullable=False),
    sa.Column("payload", sa.JSON, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),  # its id: all comparisons of a prompt are on one side of the split
    sa.Column("split", sa.Text, nullable=False),
    sa.UniqueConstraint("project_id", "comparison_id"),
    sa.Index("comparisons_by_prompt", "project_id", "prompt"),
)

# What is judged at once: two answers of a comparison, or all of them.
ITEM = sa.Table(
    "items",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("project_id", sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("comparison", sa.ForeignKey("comparisons.id"), nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("answers", sa.JSON, nullable=False),  # indices into the comparison's answers, ascending
    sa.Column("gold", sa.JSON(none_as_null=True)),  # {"better", "worse"}: which answer is; null: no gold item
    sa.Column("labelled", sa.Integer, nullable=False, default=0),  # labels that count
    # Assignment: labels that count + leases that live, whether that is the cap, and the order in which items come.
    sa.Column("taken", sa.Integer, nullable=False, default=0),
    sa.Column("full", sa.Boolean, nullable=False, default=False),
    sa.Column("shuffle", sa.Float, nullable=False),
    sa.Column("priority", sa.Float, nullable=False, default=0.0),
    sa.UniqueConstraint("project_id", "key"),
    sa.Index("items_by_shuffle", "project_id", "full", "shuffle"),
    sa.Index("items_by_taken", "project_id", "full", "taken", "shuffle"),
    sa.Index("items_by_priority", "project_id", "full", "priority", "shuffle"),
)
# Gold items are few among many.
sa.Index(
    "items_gold",
    ITEM.c.project_id,
    ITEM.c.shuffle,
    sqlite_where=ITEM.c.gold.is_not(None),
    postgresql_where=ITEM.c.gold.is_not(None),
)

LEASE = sa.Table(
    "leases",
    metadata,
    sa.Column("token", sa.Text, primary_key=True),
    sa.Column("project_id", sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("item_id", sa.ForeignKey("items.id"), nullable=False),
    sa.Column("annotator", sa.Text, nullable=False),
    sa.Column("order", sa.JSON, nullable=False),  # the item's answers as they stand on the screen, first to last
    sa.Column("arm", sa.Text, nullable=False),  # why this item: policy, random, gold, undo
    sa.Column("issued", sa.Float, nullable=False),  # seconds since 1970
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # live, labelled, given up, expired
    sa.Column("undone", sa.Integer),  # the event that this lease lets its annotator judge again
    sa.Index("leases_expiring", "state", "expires"),
    sa.Index("leases_of_annotator", "project_id", "annotator", "state"),
    sa.Index("leases_of_item", "item_id", "state"),
)

EVENT = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("project_id", sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("item_id", sa.ForeignKey("items.id"), nullable=False, index=True),
    sa.Column("annotator", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),  # label, skip, undo, verdict
    sa.Column("key", sa.Text, nullable=False),  # idempotency key
    sa.Column("body", sa.JSON, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.UniqueConstraint("project_id", "key"),
    sa.Index("events_of_annotator", "project_id", "annotator", "id"),
    sa.CheckConstraint("kind IN ('label', 'skip', 'undo', 'verdict')"),
)

# What counts: the newest label or skip of an annotator on an item that was not undone.
LABEL = sa.Table(
    "labels",
    metadata,
    sa.Column("item_id", sa.ForeignKey("items.id"), primary_key=True),
    sa.Column("annotator", sa.Text, primary_key=True),
    sa.Column("project_id", sa.ForeignKey("projects.id"), nullable=False),
    sa.Column("event_id", sa.ForeignKey("events.id"), nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Index("labels_of_project", "project_id", "kind"),
    sa.Index("labels_of_annotator", "project_id", "annotator"),
)

# Where in the order of items an annotator has got to, so that what they judged already is not passed over again.
CURSOR = sa.Table(
    "cursors",
    metadata,
    sa.Column("project_id", sa.ForeignKey("projects.id"), primary_key=True),
    sa.Column("annotator", sa.Text, primary_key=True),
    sa.Column("arm", sa.Text, primary_key=True),
    sa.Column("first", sa.Float, nullable=False),
    sa.Column("second", sa.Float, nullable=False),
)

ANNOTATOR = sa.Table(
    "annotators",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("password", sa.Text, nullable=False),  # argon2id
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("disabled", sa.Boolean, nullable=False, default=False),
    sa.Column("created", sa.Text, nullable=False),
    sa.CheckConstraint("role IN ('annotator', 'reviewer', 'admin')"),
)

INVITATION = sa.Table(
    "invitations",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),  # sha256 of the token in the link
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("used_by", sa.Text),
)

SESSION = sa.Table(
    "sessions",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),  # sha256 of the cookie
    sa.Column("annotator", sa.Text, nullable=False, index=True),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
)

FAILURE = sa.Table(
    "failures",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, index=True),
    sa.Column("at", sa.Float, nullable=False),
)

# Tables whose rows are never changed, and what makes a row unique beside its number.
APPEND_ONLY = {"comparisons": "comparison_id", "events": "key"}


def guards(dialect: str) -> list[str]:
    """Statements that make the database itself refuse to change what is append-only."""
    if dialect == "postgresql":
        made = [
            "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION '% are append-only', TG_TABLE_NAME; END $$"
        ]
        return made + [
            f"CREATE TRIGGER {table}_guard BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
            for table in APPEND_ONLY
        ]
    changes = [
        f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} are append-only'); END"
        for table in APPEND_ONLY
        for verb in ("UPDATE", "DELETE")
    ]
    # INSERT OR REPLACE deletes the old row without firing delete triggers.
    return changes + [
        f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN EXISTS (SELECT 1 FROM {table} "
        f"WHERE id = NEW.id OR (project_id = NEW.project_id AND {key} = NEW.{key})) "
        f"BEGIN SELECT RAISE(ABORT, '{table} are append-only'); END"
        for table, key in APPEND_ONLY.items()
    ]
