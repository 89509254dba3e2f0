"""Accounts: invitations, passwords, lock-out and sessions, with a clock turned by hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import argon2
import pytest

from labeling_ui.accounts import (
    ADDRESS_FAILURES,
    INVITATION_SECONDS,
    LOCKOUT_FAILURES,
    LOCKOUT_SECONDS,
    LONGEST_PASSWORD,
    SESSION_SECONDS,
    Accounts,
    Annotator,
    Denied,
)
from labeling_ui.store import LabelStore
from reward.records import InputError
from tests.labeling_ui.conftest import Clock, on_both

PASSWORD, OTHER = "correct horse battery", "staple staple paper"
WRONG = "The name or the password is wrong."


@pytest.fixture(autouse=True)
def cheap_hashes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """argon2id at a thousandth of its cost, for a hundred passwords are checked here."""
    if "real_hashes" not in request.fixturenames:
        cheap = partial(argon2.PasswordHasher, time_cost=1, memory_cost=64, parallelism=1)
        monkeypatch.setattr(argon2, "PasswordHasher", cheap)


@pytest.fixture
def real_hashes() -> None:
    """Hashes as they are made for people."""


@pytest.fixture
def accounts(store: LabelStore) -> Accounts:
    return Accounts(store)


@pytest.fixture
def ann(accounts: Accounts) -> str:
    accounts.sign_up(accounts.invite("annotator"), "ann", PASSWORD)
    return "ann"


class Watched:
    """Counts the hashes that are verified, and keeps them."""

    def __init__(self, accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hashes: list[str] = []
        verify = accounts._hasher.verify

        def watched(hashed: str, password: Any) -> bool:
            self.hashes.append(hashed)
            return verify(hashed, password)

        monkeypatch.setattr(accounts, "_hasher", type("Hasher", (), {"verify": staticmethod(watched)}))


def fail(accounts: Accounts, name: str, times: int = 1, **more: Any) -> None:
    for _ in range(times):
        with pytest.raises(Denied, match=WRONG):
            accounts.log_in(name, OTHER, **more)


# Invitations


@pytest.mark.parametrize("role", ["annotator", "reviewer", "admin"])
@on_both
def test_an_invitation_makes_one_account_of_its_role(accounts: Accounts, role: str) -> None:
    token = accounts.invite(role)
    assert accounts.invited_role(token) == role
    cookie = accounts.sign_up(token, "Ann.B", PASSWORD)
    assert accounts.session(cookie) == Annotator("Ann.B", role)
    assert accounts.invited_role(token) is None
    with pytest.raises(Denied, match="used or over"):
        accounts.sign_up(token, "bob", PASSWORD)
    assert [each["name"] for each in accounts.annotators()] == ["Ann.B"]


@on_both
def test_an_invitation_ends(accounts: Accounts, clock: Clock) -> None:
    token = accounts.invite("annotator")
    short = accounts.invite("annotator", seconds=60)
    clock.seconds += 60
    assert accounts.invited_role(short) is None
    with pytest.raises(Denied, match="used or over"):
        accounts.sign_up(short, "ann", PASSWORD)
    clock.seconds += INVITATION_SECONDS - 61
    assert accounts.invited_role(token) == "annotator"
    clock.seconds += 1
    assert accounts.invited_role(token) is None
    assert accounts.annotators() == []


@on_both
def test_an_invitation_used_by_many_at_once_lets_one_in(accounts: Accounts) -> None:
    token, barrier = accounts.invite("annotator"), threading.Barrier(8)

    def join(number: int) -> bool:
        barrier.wait()
        try:
            accounts.sign_up(token, f"ann-{number}", PASSWORD)
        except Denied:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(join, range(8))) == 1
    assert len(accounts.annotators()) == 1


@on_both
def test_an_invitation_can_be_used_up_without_an_account(accounts: Accounts) -> None:
    token = accounts.invite("admin")
    accounts.use_invitation(token, "local")
    assert accounts.invited_role(token) is None
    with pytest.raises(Denied, match="used or over"):
        accounts.use_invitation(token, "local")


@pytest.mark.parametrize("token", ["", "nonsense", "\ud800", "x" * 10_000, "\0"])
def test_no_invitation_no_account(accounts: Accounts, token: str) -> None:
    assert accounts.invited_role(token) is None
    with pytest.raises(Denied, match="used or over"):
        accounts.sign_up(token, "ann", PASSWORD)


def test_a_role_must_be_known(accounts: Accounts) -> None:
    with pytest.raises(InputError, match="role 'owner' is none of annotator, reviewer, admin"):
        accounts.invite("owner")


# Sign-up


@pytest.mark.parametrize(
    ("name", "password", "sentence"),
    [
        ("", PASSWORD, "A name has 1 to 64"),
        ("a" * 65, PASSWORD, "A name has 1 to 64"),
        ("-ann", PASSWORD, "A name has 1 to 64"),
        ("ann smith", PASSWORD, "A name has 1 to 64"),
        ("ann\n", PASSWORD, "A name has 1 to 64"),
        ("ann<b>", PASSWORD, "A name has 1 to 64"),
        ("änn", PASSWORD, "A name has 1 to 64"),
        ("ann\u202e", PASSWORD, "A name has 1 to 64"),
        ("ann", "too short", "10 to 256 characters"),
        ("ann", "long enough! " * 20, "10 to 256 characters"),
        ("annette", "i am aNNettE!", "does not hold the name"),
        ("ann", "abababababab", "at least five different"),
    ],
)
def test_what_is_refused_leaves_the_invitation_for_another_try(
    accounts: Accounts, name: str, password: str, sentence: str
) -> None:
    token = accounts.invite("annotator")
    with pytest.raises(Denied, match=sentence):
        accounts.sign_up(token, name, password)
    assert accounts.annotators() == []
    accounts.sign_up(token, "ann", PASSWORD)


@pytest.mark.parametrize("name", ["ann", "ANN"])
@on_both
def test_a_name_is_taken_in_any_case(accounts: Accounts, ann: str, name: str) -> None:
    token = accounts.invite("admin")
    with pytest.raises(Denied, match=f"The name {name} is taken"):
        accounts.sign_up(token, name, OTHER)
    assert accounts.annotators()[0]["role"] == "annotator"
    with pytest.raises(Denied):
        accounts.log_in("ann", OTHER)


def test_a_short_name_rules_no_password_out(accounts: Accounts) -> None:
    accounts.sign_up(accounts.invite("annotator"), "a", PASSWORD)


def test_no_hash_is_made_for_who_has_no_invitation(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(password: str) -> str:
        raise AssertionError("a stranger can make this machine work")

    monkeypatch.setattr(accounts, "_hash", hashed)
    with pytest.raises(Denied, match="used or over"):
        accounts.sign_up("nonsense", "ann", PASSWORD)


# Log-in


@pytest.mark.parametrize("name", ["ann", "Ann", "ANN"])
@on_both
def test_log_in(accounts: Accounts, ann: str, name: str) -> None:
    assert accounts.session(accounts.log_in(name, PASSWORD)) == Annotator("ann", "annotator")


@pytest.mark.parametrize(
    "password", ["\ud800 half a pair", "zwölf Boxkämpfer", "p" * 9 + "assword\0", "😀😁😂🤣😃😄😅😆😉😊"]
)
def test_passwords_of_any_characters(accounts: Accounts, password: str) -> None:
    accounts.sign_up(accounts.invite("annotator"), "ann", password)
    assert accounts.session(accounts.log_in("ann", password))
    with pytest.raises(Denied, match=WRONG):
        accounts.log_in("ann", password[:-1])


def test_a_password_counts_to_its_last_character(accounts: Accounts) -> None:
    password = "0123456789" * 26
    accounts.sign_up(accounts.invite("annotator"), "ann", password[:LONGEST_PASSWORD])
    for wrong in (password, password[: LONGEST_PASSWORD - 1], password[:LONGEST_PASSWORD] + "x" * 1_000_000):
        with pytest.raises(Denied, match=WRONG):
            accounts.log_in("ann", wrong)
    accounts.log_in("ann", password[:LONGEST_PASSWORD])


@pytest.mark.parametrize("name", ["", "bob", "ann'--", "ann\0", "\ud800", "%", "x" * 100_000, "ann\u202e"])
@on_both
def test_odd_names_are_wrong_names(accounts: Accounts, ann: str, name: str) -> None:
    fail(accounts, name)


def test_an_unknown_name_takes_the_same_path(accounts: Accounts, ann: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hash of the same cost is checked for a wrong password, an unknown name, a shut-out and a local account."""
    accounts.local("local")
    accounts.sign_up(accounts.invite("annotator"), "gone", PASSWORD)
    accounts.disable("gone")
    watched = Watched(accounts, monkeypatch)
    for name in ("ann", "nobody", "gone", "local", "\ud800"):
        fail(accounts, name)
    assert len(watched.hashes) == 5
    assert len({hashed.rsplit("$", 2)[0] for hashed in watched.hashes}) == 1  # kind, version and cost


@on_both
def test_a_local_account_has_no_password_that_fits(accounts: Accounts) -> None:
    assert accounts.session(accounts.local("local")) == Annotator("local", "admin")
    assert accounts.session(accounts.local("local")) == Annotator("local", "admin")
    assert [each["name"] for each in accounts.annotators()] == ["local"]
    for password in ("", "local", PASSWORD):
        with pytest.raises(Denied, match=WRONG):
            accounts.log_in("local", password)


# Lock-out


@on_both
def test_lock_out_and_its_end(accounts: Accounts, ann: str, clock: Clock) -> None:
    fail(accounts, "ann", LOCKOUT_FAILURES)
    for password in (PASSWORD, OTHER):
        with pytest.raises(Denied, match="too many failed attempts: try again in 5 min"):
            accounts.log_in("ann", password)
    clock.seconds += LOCKOUT_SECONDS - 61
    with pytest.raises(Denied, match="try again in 2 min"):
        accounts.log_in("ANN", PASSWORD)
    clock.seconds += 60.5
    with pytest.raises(Denied, match="try again in 1 min"):
        accounts.log_in("ann", PASSWORD)
    clock.seconds += 0.5
    accounts.log_in("ann", PASSWORD)
    fail(accounts, "ann", LOCKOUT_FAILURES - 1)
    accounts.log_in("ann", PASSWORD)


def test_a_wait_is_told_truly(accounts: Accounts, ann: str, clock: Clock) -> None:
    """Failures a minute apart: the first of them is forgotten, and the wait over, five minutes after it."""
    for _ in range(LOCKOUT_FAILURES):
        fail(accounts, "ann")
        clock.seconds += 50
    with pytest.raises(Denied, match="try again in 1 min"):
        accounts.log_in("ann", PASSWORD)
    clock.seconds += 50
    accounts.log_in("ann", PASSWORD)


def test_a_right_password_forgets_failures(accounts: Accounts, ann: str) -> None:
    for _ in range(3):
        fail(accounts, "ann", LOCKOUT_FAILURES - 1)
        accounts.log_in("ann", PASSWORD)


def test_one_name_locked_out_locks_no_other(accounts: Accounts, ann: str) -> None:
    accounts.sign_up(accounts.invite("annotator"), "bob", PASSWORD)
    fail(accounts, "ann", LOCKOUT_FAILURES)
    accounts.log_in("bob", PASSWORD)


def test_an_unknown_name_is_locked_out_like_a_known_one(accounts: Accounts) -> None:
    fail(accounts, "nobody", LOCKOUT_FAILURES)
    with pytest.raises(Denied, match="too many failed attempts"):
        accounts.log_in("nobody", PASSWORD)


def test_an_address_that_tries_many_names_is_locked_out(accounts: Accounts, ann: str, clock: Clock) -> None:
    for number in range(ADDRESS_FAILURES - 1):
        fail(accounts, f"name{number}", address="10.0.0.1")
    accounts.log_in("ann", PASSWORD, "10.0.0.1")  # an account of one's own does not start the count again
    fail(accounts, "name", address="10.0.0.1")
    with pytest.raises(Denied, match="too many failed attempts"):
        accounts.log_in("ann", PASSWORD, "10.0.0.1")
    accounts.log_in("ann", PASSWORD, "10.0.0.2")
    clock.seconds += LOCKOUT_SECONDS
    accounts.log_in("ann", PASSWORD, "10.0.0.1")


@on_both
def test_attempts_at_the_same_time_do_not_outnumber_the_limit(
    accounts: Accounts, ann: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, barrier = Watched(accounts, monkeypatch), threading.Barrier(16)

    def attempt(number: int) -> None:
        barrier.wait()
        with pytest.raises(Denied):
            accounts.log_in("ann", f"a wrong password {number}")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(attempt, range(16)))
    assert len(watched.hashes) == LOCKOUT_FAILURES


# Sessions


@on_both
def test_a_session_ends(accounts: Accounts, ann: str, clock: Clock) -> None:
    cookie = accounts.log_in("ann", PASSWORD)
    clock.seconds += SESSION_SECONDS - 1
    assert accounts.session(cookie) is not None
    clock.seconds += 1
    assert accounts.session(cookie) is None


@on_both
def test_sessions_survive_a_restart(where: str, clock: Clock) -> None:
    with LabelStore(where, clock=clock) as store:
        accounts = Accounts(store)
        cookie = accounts.sign_up(accounts.invite("reviewer"), "ann", PASSWORD)
        left = accounts.invite("annotator")
    with LabelStore(where, clock=clock) as store:
        accounts = Accounts(store)
        assert accounts.session(cookie) == Annotator("ann", "reviewer")
        assert accounts.invited_role(left) == "annotator"
        accounts.log_in("ann", PASSWORD)


@on_both
def test_a_lock_out_survives_a_restart(where: str, clock: Clock) -> None:
    with LabelStore(where, clock=clock) as store:
        fail(Accounts(store), "ann", LOCKOUT_FAILURES)
    with LabelStore(where, clock=clock) as store, pytest.raises(Denied, match="too many failed attempts"):
        Accounts(store).log_in("ann", PASSWORD)


@on_both
def test_log_out_ends_one_session_and_revoke_all(accounts: Accounts, ann: str) -> None:
    one, two, three = (accounts.log_in("ann", PASSWORD) for _ in range(3))
    assert len({one, two, three}) == 3
    accounts.log_out(one)
    assert accounts.session(one) is None and accounts.session(two) is not None
    assert accounts.revoke("ann") == 3  # that of the sign-up too
    assert accounts.session(two) is None and accounts.session(three) is None
    accounts.log_in("ann", PASSWORD)


@pytest.mark.parametrize("cookie", [None, "", "nonsense", "\ud800", "\0", "x" * 201, "' OR 1=1 --"])
def test_nobodys_cookie(accounts: Accounts, ann: str, cookie: str | None) -> None:
    assert accounts.session(cookie) is None
    accounts.log_out(cookie or "")


def test_roles_contain_each_other() -> None:
    assert Annotator("a", "admin").may("annotator") and Annotator("a", "reviewer").may("reviewer")
    assert not Annotator("a", "reviewer").may("admin") and not Annotator("a", "annotator").may("reviewer")


# Who is shut out


@on_both
def test_disable_shuts_out_at_once_and_can_be_taken_back(accounts: Accounts, ann: str) -> None:
    cookie = accounts.log_in("ann", PASSWORD)
    accounts.disable("ann")
    assert accounts.session(cookie) is None
    with pytest.raises(Denied, match=WRONG):
        accounts.log_in("ann", PASSWORD)
    assert accounts.annotators()[0]["disabled"]
    accounts.disable("ann", False)
    assert accounts.session(cookie) is None  # the old session does not come back
    accounts.log_in("ann", PASSWORD)


@on_both
def test_the_last_admin_stays(accounts: Accounts) -> None:
    assert not accounts.has_admin()
    for name in ("one", "two"):
        accounts.sign_up(accounts.invite("admin"), name, PASSWORD)
    accounts.disable("two")
    with pytest.raises(InputError, match="one is the last admin"):
        accounts.disable("one")
    assert accounts.has_admin()
    accounts.disable("two")  # shut out already, and not the last
    accounts.disable("two", False)
    accounts.disable("one")
    assert accounts.has_admin()


@on_both
def test_nobody_is_not_disabled(accounts: Accounts) -> None:
    with pytest.raises(InputError, match="no annotator bob"):
        accounts.disable("bob")


# What the database knows


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[tuple[Path, Accounts]]:
    with LabelStore(tmp_path / "labels.db") as store:
        yield tmp_path, Accounts(store)


def test_no_secret_is_in_the_database(sqlite: tuple[Path, Accounts]) -> None:
    folder, accounts = sqlite
    unused, used = accounts.invite("annotator"), accounts.invite("annotator")
    secrets = [unused, used, accounts.sign_up(used, "ann", PASSWORD), accounts.log_in("ann", PASSWORD), PASSWORD, OTHER]
    secrets.append(accounts.local("local"))
    fail(accounts, "ann")
    stored = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"ann" in stored and b"$argon2id$" in stored
    assert not [secret for secret in secrets if secret.encode() in stored]


def test_passwords_are_hashed_at_full_cost(real_hashes: None, sqlite: tuple[Path, Accounts]) -> None:
    """At least what OWASP asks of argon2id: 19 MiB and 2 rounds. Equal passwords have different hashes."""
    _, accounts = sqlite
    one, other = accounts._hash(PASSWORD), accounts._hash(PASSWORD)
    assert one != other and one.startswith("$argon2id$")
    cost = argon2.extract_parameters(one)
    assert cost.memory_cost >= 19 * 1024 and cost.time_cost >= 2
    assert argon2.extract_parameters(accounts._hash_of_nobody) == cost


def test_tokens_are_long_and_never_the_same(accounts: Accounts, ann: str) -> None:
    tokens = [accounts.invite("annotator") for _ in range(20)] + [accounts.log_in("ann", PASSWORD) for _ in range(20)]
    assert len(set(tokens)) == 40
    assert min(map(len, tokens)) >= 32  # 192 random bits
