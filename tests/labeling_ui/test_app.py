"""The app's routes: log-in, what other pages may not do, and what annotators get to see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from labeling_ui.accounts import Accounts
from labeling_ui.address import Address, Site
from labeling_ui.app import create_app
from labeling_ui.store import LabelStore, Project, Settings
from reward.records import InputError
from tests.labeling_ui.conftest import Clock, comparison

ORIGIN = "http://127.0.0.1:8765"
PASSWORD = "correct horse battery"


@pytest.fixture
def where(tmp_path: Any) -> str:
    return str(tmp_path / "labels.db")


@pytest.fixture
def app(store: LabelStore) -> Any:
    return create_app(store, Site([ORIGIN]), pages=False)


@pytest.fixture
def people(store: LabelStore) -> Project:
    project = store.create_project("people", instructions="Be **kind**.", settings=Settings(gold_share=0.0))
    store.add_items(project, [comparison(n) for n in range(5)])
    return project


def client(app: Any, **headers: str) -> TestClient:
    return TestClient(app, base_url=ORIGIN, headers={"Origin": ORIGIN, **headers}, follow_redirects=False)


def joined(app: Any, store: LabelStore, name: str = "ann", role: str = "annotator") -> TestClient:
    browser, token = client(app), Accounts(store).invite(role)
    response = browser.post("/join", data={"token": token, "name": name, "password": PASSWORD})
    assert response.status_code == 303 and response.headers["location"] == "/label/"
    return browser


@pytest.fixture
def ann(app: Any, store: LabelStore, people: Project) -> Iterator[TestClient]:
    with joined(app, store) as browser:
        yield browser


def send(browser: TestClient, path: str, **body: Any) -> Any:
    return browser.post(path, json={"project": "people", **body})


# Log-in


def test_nobody_comes_in_without_an_account(app: Any, store: LabelStore, people: Project) -> None:
    stranger = client(app)
    assert stranger.get("/").headers["location"] == "/login"
    for path in ("/api/projects", "/api/next?project=people"):
        assert stranger.get(path).status_code == 409, path
    for path in ("/api/label", "/api/skip", "/api/undo", "/api/heartbeat", "/api/release"):
        assert send(stranger, path, lease="x", key="k").json()["reason"] == "login"
    assert client(app).post("/join", data={"token": "x", "name": "eve", "password": PASSWORD}).status_code == 403
    assert stranger.get("/openapi.json").status_code == stranger.get("/docs").status_code == 404


def test_the_cookie_is_kept_from_scripts_and_other_sites(app: Any, store: LabelStore) -> None:
    browser, token = client(app), Accounts(store).invite("annotator")
    made = browser.post("/join", data={"token": token, "name": "ann", "password": PASSWORD}).headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(made.split("; "))
    safe = TestClient(
        create_app(store, Site(["https://label.example.org"]), pages=False), base_url="https://label.example.org"
    )
    answer = safe.post(
        "/login",
        data={"name": "ann", "password": PASSWORD},
        headers={"Origin": "https://label.example.org"},
        follow_redirects=False,
    )
    assert answer.headers["set-cookie"].startswith("__Host-align=") and "Secure" in answer.headers["set-cookie"]
    assert "max-age=" in answer.headers["strict-transport-security"]


def test_log_in_lock_out_and_log_out(app: Any, store: LabelStore, ann: TestClient, clock: Clock) -> None:
    browser = client(app)
    for _ in range(5):
        wrong = browser.post("/login", data={"name": "ann", "password": "wrong wrong wrong"})
        assert wrong.status_code == 403 and "name or the password is wrong" in wrong.text
    locked = browser.post("/login", data={"name": "ann", "password": PASSWORD})
    assert locked.status_code == 403 and "too many failed attempts" in locked.text
    clock.seconds += 301
    assert browser.post("/login", data={"name": "ann", "password": PASSWORD}).status_code == 303
    assert browser.get("/api/projects").json()["name"] == "ann"
    kept = dict(browser.cookies)
    assert browser.post("/logout").status_code == 303
    again = client(app)
    again.cookies.update(kept)
    assert again.get("/api/projects").status_code == 409  # the session is over, not only the cookie forgotten


def test_sessions_survive_a_restart(store: LabelStore, ann: TestClient) -> None:
    other = client(create_app(store, Site([ORIGIN]), pages=False))
    other.cookies.update(dict(ann.cookies))
    assert other.get("/api/projects").json()["name"] == "ann"


def test_one_person_comes_in_by_the_link_once(store: LabelStore, people: Project) -> None:
    app = create_app(store, Site([ORIGIN], local=True), pages=False)
    token = Accounts(store).invite("admin")
    browser = client(app)
    for wrong in ("guess", "", Accounts(store).invite("annotator")):
        assert browser.get("/local", params={"token": wrong}).status_code == 403
        assert browser.post("/local", data={"token": wrong}).status_code == 403
    entered = browser.post("/local", data={"token": token})
    assert (entered.status_code, entered.headers["location"]) == (303, "/label/")
    assert browser.get("/api/projects").json()["role"] == "admin"
    for late in (client(app).get(f"/local?token={token}"), client(app).post("/local", data={"token": token})):
        assert late.status_code == 403 and "Open the printed link" in late.text and "set-cookie" not in late.headers
    assert client(app).post("/login", data={"name": "local", "password": ""}).status_code == 403
    ordinary = client(create_app(store, Site([ORIGIN]), pages=False))
    other = Accounts(store).invite("admin")
    assert ordinary.get(f"/local?token={other}").status_code == 403
    assert ordinary.post("/local", data={"token": other}).status_code == 403
    assert ordinary.post("/login", data={"name": "local", "password": ""}).status_code == 403


def test_looking_at_the_link_does_not_use_it_up(store: LabelStore, people: Project) -> None:
    """Mail scanners, previews and browsers that fetch ahead ask for every link; a person presses the button."""
    app = create_app(store, Site([ORIGIN], local=True), pages=False)
    token = Accounts(store).invite("admin")
    scanner = client(app, **{"Sec-Purpose": "prefetch", "Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"})
    for look in (scanner.get, scanner.head, scanner.get):
        seen = look(f"/local?token={token}")
        assert seen.status_code in (200, 405) and "set-cookie" not in seen.headers
        assert seen.headers["cache-control"] == "no-store"
    assert f'value="{token}"' in seen.text and "<button" in seen.text
    assert scanner.get("/api/projects").status_code == 409
    for origin in OTHERS:
        evil = TestClient(app, base_url=ORIGIN, headers={"Origin": origin}, follow_redirects=False)
        assert evil.post("/local", data={"token": token}).status_code == 403
    assert client(app).post("/local", data={"token": token}).status_code == 303


# Other pages


OTHERS = [
    "http://evil.example",
    "null",
    "http://127.0.0.1:9999",
    "http://sub.127.0.0.1:8765",
    "https://127.0.0.1:8765",
    "",
]


@pytest.mark.parametrize("origin", OTHERS)
def test_no_other_origin_changes_or_reads_anything(
    store: LabelStore, ann: TestClient, people: Project, origin: str
) -> None:
    lease = ann.get("/api/next?project=people").json()["item"]["lease"]
    evil = TestClient(ann.app, base_url=ORIGIN, headers={"Origin": origin}, follow_redirects=False)
    evil.cookies.update(dict(ann.cookies))
    for path in (
        "/api/label",
        "/api/skip",
        "/api/undo",
        "/api/heartbeat",
        "/api/release",
        "/api/admin/import?project=people",
    ):
        response = send(evil, path, lease=lease, key="k", value=1, reason="x")
        assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
    for path in ("/login", "/join", "/local", "/logout"):
        assert evil.post(path, data={}).status_code == 403
    assert evil.get("/api/next?project=people").status_code == 403
    preflight = evil.options("/api/label", headers={"Access-Control-Request-Method": "POST"})
    assert preflight.status_code in (400, 403) and "access-control-allow-origin" not in preflight.headers
    assert store.count_labels(people) == 0


def test_a_request_without_origin_changes_nothing(store: LabelStore, ann: TestClient, people: Project) -> None:
    bare = TestClient(ann.app, base_url=ORIGIN)
    bare.cookies.update(dict(ann.cookies))
    assert send(bare, "/api/undo", key="k").status_code == 403


def test_a_sibling_subdomain_reads_nothing(ann: TestClient) -> None:
    for site in ("same-site", "cross-site"):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
        assert ann.get("/api/next?project=people", headers=headers).status_code == 403
    assert ann.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 303


def test_another_name_for_this_machine_is_refused(app: Any) -> None:
    for host in ("evil.example", "evil.example:8765", "127.0.0.1", ""):
        assert client(app, Host=host).get("/login").status_code == 403


def test_every_answer_has_the_headers(app: Any, ann: TestClient) -> None:
    for response in (
        ann.get("/login"),
        ann.get("/api/next?project=people"),
        ann.get("/nothing"),
        client(app, Host="x").get("/"),
    ):
        policy = response.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy and "object-src 'none'" in policy and "form-action 'self'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert ann.get("/api/next?project=people").headers["cache-control"] == "no-store"


# Labelling


def test_one_request_saves_and_brings_the_next(store: LabelStore, ann: TestClient, people: Project) -> None:
    told = ann.get("/api/next?project=people").json()
    assert told["progress"] == {"mine": 0, "given": 0, "wanted": 5}
    assert told["guidelines"] == {"html": "<p>Be <strong>kind</strong>.</p>\n", "version": 1}
    said = {"lease": told["item"]["lease"], "key": "k1", "value": 3, "seconds": 4.5, "comment": "closer"}
    answer = send(ann, "/api/label", **said).json()
    assert answer["saved"] == "k1" and answer["item"]["lease"] != told["item"]["lease"]
    assert answer["progress"] == {"mine": 1, "given": 1, "wanted": 5}
    again = send(ann, "/api/label", **said).json()
    assert again["saved"] == "k1" and again["item"]["lease"] == answer["item"]["lease"]
    (event,) = store.labels(people)
    assert (event.annotator, event.body["value"], event.body["seconds"], event.body["comment"]) == (
        "ann",
        3,
        4.5,
        "closer",
    )
    back = send(ann, "/api/undo", key="u1").json()
    assert back["item"]["before"]["value"] == 3 and back["progress"]["mine"] == 0


def test_nothing_is_told_that_would_break_blindness(store: LabelStore, app: Any) -> None:
    project = store.create_project("people", settings=Settings(gold_share=0.5))
    secret = [
        {"text": "One.", "model": "SECRET-base", "sampling": {"seed": "SECRET"}},
        {"text": "Two.", "model": "SECRET-ppo"},
    ]
    made = [comparison(n) | {"answers": secret, "id": f"SECRET-{n}", "source": "SECRET"} for n in range(10)]
    store.add_items(project, [each | ({"gold": [0, 1]} if n % 2 else {}) for n, each in enumerate(made)])
    browser, seen = joined(app, store), set()
    told = browser.get("/api/next?project=people").json()
    while told["item"]:
        assert "SECRET" not in json.dumps(told) and "gold" not in json.dumps(told)
        seen.add(frozenset(told["item"]))
        told = send(browser, "/api/label", lease=told["item"]["lease"], key=told["item"]["lease"], value=4).json()
    assert len(seen) == 1  # gold items look like the others


def test_someone_elses_lease_is_refused(store: LabelStore, app: Any, ann: TestClient, people: Project) -> None:
    lease = ann.get("/api/next?project=people").json()["item"]["lease"]
    bob = joined(app, store, "bob")
    for path in ("/api/label", "/api/skip", "/api/heartbeat"):
        response = send(bob, path, lease=lease, key="k", value=1, reason="x")
        assert response.status_code == 409 and response.json()["reason"] == "stranger"
    assert store.count_labels(people) == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"value": 0},
        {"value": "3"},
        {"value": None},
        {"value": 3, "key": ""},
        {"value": 3, "key": 7},
        {"value": 3, "key": "k" * 300},
        {"value": 3, "ranking": [[0], [1]]},
        {"value": 3, "ratings": {"style": {"0": 9}}},
        {"value": 3, "comment": "x" * 20_000},
        {"value": 3, "comment": 5},
        {"value": 3, "comment": "a\0b"},
        {"value": 3, "seconds": -1},
        {"value": 3, "project": 5},
    ],
    ids=str,
)
def test_what_cannot_be_said_is_refused_with_a_sentence(
    store: LabelStore, ann: TestClient, people: Project, changed: dict[str, Any]
) -> None:
    lease = ann.get("/api/next?project=people").json()["item"]["lease"]
    response = send(ann, "/api/label", **{"lease": lease, "key": "k", **changed})
    assert response.status_code == 422 and response.json()["error"].endswith(".")
    assert store.count_labels(people) == 0


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff\xfe", b'{"project": "\\ud800"}', b"[" * 100_000], ids=repr)
def test_a_body_that_is_no_json_is_refused(ann: TestClient, body: bytes) -> None:
    response = ann.post("/api/label", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422 and "JSON" in response.json()["error"]


def test_a_body_that_is_too_large_is_refused(ann: TestClient) -> None:
    assert ann.post("/api/label", content=b"x" * 2_000_001).status_code == 413


def test_a_simulated_project_is_not_for_people(store: LabelStore, ann: TestClient) -> None:
    store.create_project("robots", simulated=True)
    assert ann.get("/api/next?project=robots").json()["reason"] == "simulated"
    assert [each["name"] for each in ann.get("/api/projects").json()["projects"]] == ["people"]


def test_a_locked_database_keeps_the_label_in_the_page(store: LabelStore, ann: TestClient, people: Project) -> None:
    import sqlite3

    lease = ann.get("/api/next?project=people").json()["item"]["lease"]
    with LabelStore(store.database.name, busy_seconds=0.1) as impatient:
        browser = client(create_app(impatient, Site([ORIGIN]), pages=False))
        browser.cookies.update(dict(ann.cookies))
        other = sqlite3.connect(store.database.name, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        response = send(browser, "/api/label", lease=lease, key="k", value=2)
        assert response.status_code == 503 and "kept in this page" in response.json()["error"]
        other.execute("ROLLBACK")
        other.close()
        assert send(browser, "/api/label", lease=lease, key="k", value=2).status_code == 200
    assert store.count_labels(people) == 1


# Addresses


def test_passwords_never_travel_in_clear() -> None:
    assert Address().origins() == ["http://127.0.0.1:8765", "http://localhost:8765"]
    assert Address(url="https://label.example.org").origins() == ["https://label.example.org"]
    for address in (Address(host="0.0.0.0"), Address(host="0.0.0.0", url="http://label.example.org")):
        with pytest.raises(InputError, match="clear text"):
            address.origins()
    with pytest.raises(InputError, match="an origin such as"):
        Address(url="https://label.example.org/path").origins()
