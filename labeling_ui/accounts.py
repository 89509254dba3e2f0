"""Who may do what: annotators, their passwords, sessions and invitations.

Nobody signs up without an invitation, nothing has a default password, and every secret in the database is a digest:
argon2id of passwords, sha256 of tokens, which are random and long. Sessions live in the database, so that a restart
logs nobody out and a session can be revoked.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import threading
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from labeling_ui.database import now_text
from labeling_ui.schema import ANNOTATOR, FAILURE, INVITATION, SESSION
from labeling_ui.store import LabelStore
from reward.records import InputError

ROLES = ("annotator", "reviewer", "admin")
SESSION_SECONDS = 14 * 24 * 3600.0
INVITATION_SECONDS = 7 * 24 * 3600.0
# So many failures within so long a time, and a name (or an address) must wait until they are past.
LOCKOUT_FAILURES, LOCKOUT_SECONDS = 5, 300.0
ADDRESS_FAILURES = 30
SHORTEST_PASSWORD, LONGEST_PASSWORD = 10, 256
INVITATION_OVER = "This invitation is used or over: ask for a new one."
# Built once: every request asks it.
_BY_COOKIE = (
    sa.select(ANNOTATOR.c.name, ANNOTATOR.c.role)
    .join(SESSION, SESSION.c.annotator == ANNOTATOR.c.name)
    .where(
        SESSION.c.digest == sa.bindparam("digest"),
        SESSION.c.expires > sa.bindparam("now"),
        ANNOTATOR.c.disabled.is_(False),
    )
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")


@dataclass(frozen=True, slots=True)
class Annotator:
    """Someone who is logged in."""

    name: str
    role: str

    def may(self, role: str) -> bool:
        """Whether they have at least this role."""
        return ROLES.index(self.role) >= ROLES.index(role)


class Denied(InputError):
    """A log-in or sign-up that is refused; the sentence is for the person."""


class Accounts:
    """The accounts in a label store."""

    def __init__(self, store: LabelStore) -> None:
        from argon2 import PasswordHasher

        self.store, self._hasher = store, PasswordHasher()
        self._hash_of_nobody = self._hasher.hash(secrets.token_urlsafe(16))
        self._hashing = threading.Semaphore(2)  # each takes 64 MiB; a flood of log-ins must not take all memory

    # -- invitations ----------------------------------------------------------------------------------------------

    def invite(self, role: str, seconds: float = INVITATION_SECONDS) -> str:
        """A token that lets one person sign up in this role."""
        if role not in ROLES:
            raise InputError(f"The role {role!r} is none of {', '.join(ROLES)}.")
        token = secrets.token_urlsafe(24)
        row = {"digest": _digest(token), "role": role, "expires": self.store.now() + seconds, "used_by": None}
        with self.store.database.write() as connection:
            connection.execute(sa.insert(INVITATION).values(row))
        return token

    def sign_up(self, token: str, name: str, password: str) -> str:
        """Make an account by an invitation; returns a session's cookie.

        Raises:
            Denied: the invitation is unknown, used or over, the name is taken or odd, or the password too short.
        """
        if not _NAME.fullmatch(name):
            raise Denied("A name has 1 to 64 letters, digits or . _ @ + - and begins with a letter or digit.")
        self._check_password(name, password)
        if self.invited_role(token) is None:
            raise Denied(INVITATION_OVER)  # before the password is hashed, which is dear
        hashed = self._hash(password)
        with self.store.database.write() as connection:
            row = self._invitation(connection, token)
            if row is None:
                raise Denied(INVITATION_OVER)
            taken = sa.select(ANNOTATOR.c.name).where(sa.func.lower(ANNOTATOR.c.name) == name.lower())
            if connection.execute(taken).first() is not None:
                raise Denied(f"The name {name} is taken: choose another.")
            values = {"name": name, "password": hashed, "role": row.role, "disabled": False}
            connection.execute(sa.insert(ANNOTATOR).values(**values, created=now_text(self.store.now())))
            where = INVITATION.c.digest == row.digest
            connection.execute(sa.update(INVITATION).where(where).values(used_by=name))
            return self._new_session(connection, name)

    def invited_role(self, token: str) -> str | None:
        """The role an invitation gives; None: it is unknown, used or over."""
        with self.store.database.read() as connection:
            row = self._invitation(connection, token)
        return None if row is None else str(row.role)

    def use_invitation(self, token: str, name: str) -> None:
        """Use an invitation up for someone who needs no account of their own making.

        Raises:
            Denied: it is unknown, used or over.
        """
        with self.store.database.write() as connection:
            if self._invitation(connection, token) is None:
                raise Denied(INVITATION_OVER)
            where = INVITATION.c.digest == _digest(token)
            connection.execute(sa.update(INVITATION).where(where).values(used_by=name))

    def _invitation(self, connection: sa.Connection, token: str) -> Any:
        where = (INVITATION.c.digest == _digest(token)) & INVITATION.c.used_by.is_(None)
        query = sa.select(INVITATION).where(where, INVITATION.c.expires > self.store.now())
        return connection.execute(query).one_or_none()

    # -- sessions -------------------------------------------------------------------------------------------------

    def log_in(self, name: str, password: str, address: str = "") -> str:
        """A session's cookie.

        Raises:
            Denied: name or password is wrong (which of them is not said), or there were too many failures.
        """
        # All that can be no name is one nobody: it may hold what no database takes.
        name = name.lower() if _NAME.fullmatch(name) else ""
        names = [f"name {name}", f"address {address[:64]}"]
        with self.store.database.write() as connection:
            now = self.store.now()
            connection.execute(sa.delete(FAILURE).where(FAILURE.c.at <= now - LOCKOUT_SECONDS))
            self._check_failures(connection, names)
            # A failure until the password proves right: attempts at the same time must not outnumber the limit.
            rows = [{"name": each, "at": now} for each in names]
            attempt = connection.execute(sa.insert(FAILURE).returning(FAILURE.c.id), rows).scalars().all()
            where = (sa.func.lower(ANNOTATOR.c.name) == name) & ANNOTATOR.c.disabled.is_(False)
            row = connection.execute(sa.select(ANNOTATOR).where(where)).one_or_none()
        # An unknown name takes as long as a wrong password.
        hashed = (row and row.password) or self._hash_of_nobody
        if not self._fits(hashed, password) or row is None:
            raise Denied("The name or the password is wrong.")
        with self.store.database.write() as connection:
            connection.execute(sa.delete(FAILURE).where((FAILURE.c.name == names[0]) | FAILURE.c.id.in_(attempt)))
            return self._new_session(connection, row.name)

    def _check_failures(self, connection: sa.Connection, names: list[str]) -> None:
        now = self.store.now()
        for name, most in zip(names, (LOCKOUT_FAILURES, ADDRESS_FAILURES), strict=True):
            where = (FAILURE.c.name == name) & (FAILURE.c.at > now - LOCKOUT_SECONDS)
            # The wait is over when one fewer than the limit are left.
            query = sa.select(FAILURE.c.at).where(where).order_by(FAILURE.c.at.desc()).offset(most - 1).limit(1)
            if (decisive := connection.execute(query).scalar_one_or_none()) is not None:
                wait = math.ceil((decisive + LOCKOUT_SECONDS - now) / 60)
                raise Denied(f"There were too many failed attempts: try again in {wait} min.")

    def session(self, cookie: str | None) -> Annotator | None:
        """Whose session a cookie is; None: nobody's, or it is over or revoked."""
        if not cookie or len(cookie) > 200:
            return None
        with self.store.database.read() as connection:
            row = connection.execute(_BY_COOKIE, {"digest": _digest(cookie), "now": self.store.now()}).one_or_none()
        return None if row is None else Annotator(row.name, row.role)

    def log_out(self, cookie: str) -> None:
        with self.store.database.write() as connection:
            connection.execute(sa.delete(SESSION).where(SESSION.c.digest == _digest(cookie)))

    def revoke(self, name: str) -> int:
        """End all sessions of an annotator; how many there were."""
        with self.store.database.write() as connection:
            return connection.execute(sa.delete(SESSION).where(SESSION.c.annotator == name)).rowcount

    def disable(self, name: str, disabled: bool = True) -> None:
        """Shut an annotator out, or let them in again; their labels stay.

        Raises:
            InputError: there is no such annotator, or they are the last admin.
        """
        with self.store.database.write() as connection:
            admins = sa.select(ANNOTATOR.c.name).where(ANNOTATOR.c.role == "admin", ANNOTATOR.c.disabled.is_(False))
            if disabled and connection.execute(admins).scalars().all() == [name]:
                raise InputError(f"{name} is the last admin: make another one first.")
            changed = sa.update(ANNOTATOR).where(ANNOTATOR.c.name == name).values(disabled=disabled)
            if connection.execute(changed).rowcount == 0:
                raise InputError(f"There is no annotator {name}.")
            if disabled:
                connection.execute(sa.delete(SESSION).where(SESSION.c.annotator == name))

    def annotators(self) -> list[dict[str, Any]]:
        """Everyone: name, role, disabled, created."""
        columns = ANNOTATOR.c["name", "role", "disabled", "created"]
        with self.store.database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(sa.select(*columns).order_by(ANNOTATOR.c.name))]

    def has_admin(self) -> bool:
        with self.store.database.read() as connection:
            where = (ANNOTATOR.c.role == "admin") & ANNOTATOR.c.disabled.is_(False)
            return connection.execute(sa.select(ANNOTATOR.c.name).where(where)).first() is not None

    def local(self, name: str) -> str:
        """A session for the one person of the single-user mode; their account has no password that fits."""
        with self.store.database.write() as connection:
            if connection.execute(sa.select(ANNOTATOR.c.name).where(ANNOTATOR.c.name == name)).first() is None:
                values = {"name": name, "password": "", "role": "admin", "disabled": False}
                connection.execute(sa.insert(ANNOTATOR).values(**values, created=now_text(self.store.now())))
            return self._new_session(connection, name)

    def _new_session(self, connection: sa.Connection, name: str) -> str:
        cookie, now = secrets.token_urlsafe(32), self.store.now()
        connection.execute(sa.delete(SESSION).where(SESSION.c.expires < now))
        row = {"digest": _digest(cookie), "annotator": name, "created": now, "expires": now + SESSION_SECONDS}
        connection.execute(sa.insert(SESSION).values(row))
        return cookie

    # -- passwords ------------------------------------------------------------------------------------------------

    def _check_password(self, name: str, password: str) -> None:
        if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
            raise Denied(f"A password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters.")
        # A name of one letter is in almost every password.
        if (len(name) > 3 and name.lower() in password.lower()) or len(set(password)) < 5:
            raise Denied("A password does not hold the name, and has at least five different characters.")

    def _hash(self, password: str) -> str:
        with self._hashing:
            return self._hasher.hash(_octets(password))

    def _fits(self, hashed: str, password: str) -> bool:
        from argon2.exceptions import InvalidHashError, VerificationError

        try:
            with self._hashing:
                return self._hasher.verify(hashed, _octets(password[: LONGEST_PASSWORD + 1]))
        except (VerificationError, InvalidHashError):
            return False


def _digest(token: str) -> str:
    """Tokens are random and long: a plain digest keeps them from whoever reads the database."""
    return hashlib.sha256(_octets(token)).hexdigest()


def _octets(text: str) -> bytes:
    # JSON can carry halves of surrogate pairs: they are wrong, but no reason to fail.
    return text.encode("utf-8", "surrogatepass")
