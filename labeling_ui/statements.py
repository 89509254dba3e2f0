"""The statements behind every label, built once.

Building a statement anew costs more than running it, and a label takes some twenty. Parameters: p project, i item, a
annotator, t token, k key, s state, now, and what is named after its column.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam

from labeling_ui.schema import COMPARISON, CURSOR, EVENT, ITEM, LABEL, LEASE, PROJECT

_P: Any = bindparam("p")
_I: Any = bindparam("i")
_A: Any = bindparam("a")
_T: Any = bindparam("t")

ITEM_BY_ID = (
    sa.select(*ITEM.c["id", "key", "answers", "gold"], *COMPARISON.c["comparison_id", "digest", "payload"])
    .join_from(ITEM, COMPARISON)
    .where(ITEM.c.project_id == _P, ITEM.c.id == _I)
)

# -- events and what counts -------------------------------------------------------------------------------------------

EVENT_BY_KEY = sa.select(EVENT).where(EVENT.c.project_id == _P, EVENT.c.key == bindparam("k"))
ADD_EVENT = sa.insert(EVENT).returning(EVENT.c.id)
EVENTS_ON_ITEM = sa.select(EVENT).where(EVENT.c.item_id == _I, EVENT.c.annotator == _A).order_by(EVENT.c.id)
LABEL_BY = sa.select(LABEL.c.event_id).where(LABEL.c.item_id == _I, LABEL.c.annotator == _A)
DROP_LABEL = sa.delete(LABEL).where(LABEL.c.item_id == _I, LABEL.c.annotator == _A)
ADD_LABEL = sa.insert(LABEL)

_LABELS = sa.select(sa.func.count()).where(LABEL.c.item_id == _I, LABEL.c.kind == "label").scalar_subquery()
_LEASES = sa.select(sa.func.count()).where(LEASE.c.item_id == _I, LEASE.c.state == "live").scalar_subquery()
_TAKEN = _LABELS + _LEASES
# Gold items have no cap, and are not counted: they are never among the open ones.
RECOUNT = (
    sa.update(ITEM)
    .where(ITEM.c.id == _I)
    .values(labelled=_LABELS, taken=_TAKEN, full=ITEM.c.gold.is_not(None) | (bindparam("cap") <= _TAKEN))
    .returning(ITEM.c.taken)
)
# Before RECOUNT, while the item holds what it was: the project's count moves by what the item's does.
_BEFORE = sa.select(ITEM.c.labelled).where(ITEM.c.id == _I).scalar_subquery()
_COUNTS = sa.exists().where(ITEM.c.id == _I, ITEM.c.gold.is_(None))
MORE_LABELS = (
    sa.update(PROJECT).where(PROJECT.c.id == _P, _COUNTS).values(label_count=PROJECT.c.label_count + _LABELS - _BEFORE)
)
_MINE = sa.select(sa.func.count()).where(LABEL.c.project_id == _P, LABEL.c.annotator == _A, LABEL.c.kind == "label")
PROGRESS = sa.select(PROJECT.c.label_count, PROJECT.c.item_count, _MINE.scalar_subquery()).where(PROJECT.c.id == _P)

# -- leases -----------------------------------------------------------------------------------------------------------

_OWN = (LEASE.c.project_id == _P) & (LEASE.c.annotator == _A)
LEASE_BY_TOKEN = sa.select(LEASE).where(LEASE.c.token == _T, _OWN)
SET_STATE = sa.update(LEASE).where(LEASE.c.token == _T).values(state=bindparam("s"))
SET_EXPIRY = sa.update(LEASE).where(LEASE.c.token == _T).values(expires=bindparam("until"))
OVERDUE = sa.select(LEASE.c.token, LEASE.c.item_id).where(
    LEASE.c.state == "live", LEASE.c.expires <= bindparam("now"), LEASE.c.project_id == _P
)
HELD = sa.select(LEASE).where(_OWN, LEASE.c.state == "live").order_by(LEASE.c.issued.desc())
ADD_LEASE = sa.insert(LEASE)

_AGAIN = LEASE.alias("again")
# What the annotator took back and did not judge again, the last taken back first.
UNDONE = (
    sa.select(LEASE)
    .join(ITEM, ITEM.c.id == LEASE.c.item_id)
    .where(
        _OWN,
        LEASE.c.state == "given up",
        LEASE.c.undone.is_not(None),
        sa.or_(ITEM.c.full.is_(False), ITEM.c.gold.is_not(None)),
        ~sa.exists().where(LABEL.c.item_id == LEASE.c.item_id, LABEL.c.annotator == _A),
        ~sa.exists().where(
            _AGAIN.c.item_id == LEASE.c.item_id, _AGAIN.c.annotator == _A, _AGAIN.c.undone > LEASE.c.undone
        ),
    )
    .order_by(LEASE.c.undone.desc())
    .limit(1)
)

# -- which item comes next --------------------------------------------------------------------------------------------

_SEEN = sa.exists().where(LABEL.c.item_id == ITEM.c.id, LABEL.c.annotator == _A)
GOLD = (
    sa.select(ITEM.c.id)
    .where(ITEM.c.project_id == _P, ITEM.c.gold.is_not(None), ~_SEEN)
    .order_by(sa.func.random())
    .limit(1)
)
_ORDERS = {
    "random": (ITEM.c.shuffle,),
    "least": (ITEM.c.taken, ITEM.c.shuffle),
    "active": (ITEM.c.priority, ITEM.c.shuffle),
}
FIRST_OPEN = {
    policy: sa.select(ITEM.c.id, order[0] if len(order) > 1 else sa.literal(0.0), ITEM.c.shuffle)
    .where(ITEM.c.project_id == _P, ITEM.c.full.is_(False), ~_SEEN)
    .order_by(*order)
    .limit(1)
    for policy, order in _ORDERS.items()
}
# The annotator's place: what lies before it they have seen, or seen full.
NEXT_OPEN = {
    policy: FIRST_OPEN[policy].where(
        ITEM.c.shuffle > bindparam("second")
        if len(order) == 1
        else sa.tuple_(*order) > sa.tuple_(bindparam("first"), bindparam("second"))
    )
    for policy, order in _ORDERS.items()
}
_PLACE = (CURSOR.c.project_id == _P) & (CURSOR.c.annotator == _A) & (CURSOR.c.arm == bindparam("policy"))
PLACE = sa.select(CURSOR.c.first, CURSOR.c.second).where(_PLACE)
SET_PLACE = sa.update(CURSOR).where(_PLACE).values(first=bindparam("f"), second=bindparam("s"))
ADD_PLACE = sa.insert(CURSOR)
