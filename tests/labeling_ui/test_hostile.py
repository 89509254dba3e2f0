"""Every hostile text on every surface that answers over HTTP: log-in pages, refusals, the admin page's parts, exports.

What a browser makes of the pages is `test_hostile_pages`; what the renderer makes of a text, `test_render`.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import argon2
import pytest
from fastapi.testclient import TestClient

from labeling_ui import admin
from labeling_ui.accounts import Accounts
from labeling_ui.address import Site
from labeling_ui.app import create_app
from labeling_ui.render import visible
from labeling_ui.store import LabelStore, Project, Settings
from reward.records import InputError
from tests.labeling_ui.conftest import PASSWORD, comparison
from tests.labeling_ui.payloads import PAYLOADS, TEXTS, bare, chunks, judged
from tests.labeling_ui.test_render import Page

ORIGIN = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def module_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStore]:
    with LabelStore(tmp_path_factory.mktemp("hostile") / "labels.db") as store:
        yield store


@pytest.fixture(scope="module")
def hostile(module_store: LabelStore) -> Project:
    return judged(module_store, "judged </title><script>alert(1)</script>")


@pytest.fixture(autouse=True)
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap = partial(argon2.PasswordHasher, time_cost=1, memory_cost=64, parallelism=1)
    monkeypatch.setattr(argon2, "PasswordHasher", cheap)


@pytest.fixture(scope="module")
def whole_app(module_store: LabelStore) -> Any:
    """With the admin's routes."""
    return create_app(module_store, Site([ORIGIN]))


def client(store: LabelStore, role: str | None = None, app: Any = None, **site: Any) -> TestClient:
    app = app or create_app(store, Site([ORIGIN], **site), pages=False)
    browser = TestClient(app, base_url=ORIGIN, headers={"Origin": ORIGIN}, follow_redirects=False)
    if role:
        name = f"{role}-{len(Accounts(store).annotators())}"
        form = {"token": Accounts(store).invite(role), "name": name, "password": PASSWORD}
        assert browser.post("/join", data=form).status_code == 303
    return browser


def test_the_battery_is_large() -> None:
    assert len(TEXTS) >= 40 and len(TEXTS) > 0.95 * len(PAYLOADS)


# Log-in pages


def shape(html: str) -> Any:
    page = Page(html)
    return page.tags, [(tag, name) for tag, name, _ in page.attributes], page.odd


def test_log_in_pages_stay_as_they_are(module_store: LabelStore) -> None:
    """Whatever name, token or password is sent, the page has the elements it has for a harmless one."""
    everyone, alone = client(module_store), client(module_store, local=True)
    token = Accounts(module_store).invite("annotator")

    def shapes(text: str) -> list[Any]:
        answers = [
            everyone.get("/join", params={"token": text}),
            everyone.post("/join", data={"token": token, "name": text, "password": text}),
            everyone.post("/login", data={"name": text, "password": text}),
            alone.get("/local", params={"token": text}),
            alone.post("/local", data={"token": text}),
        ]
        assert all(answer.headers["content-type"].startswith("text/html") for answer in answers)
        return [(answer.status_code, *shape(answer.text)) for answer in answers]

    harmless = shapes("?")
    for texts in chunks(4):
        assert shapes(" ".join(texts)) == harmless, texts


# Refusals that quote what was sent


def test_refusals_are_json_and_nothing_else(module_store: LabelStore, whole_app: Any) -> None:
    browser = client(module_store, "admin", whole_app)
    module_store.create_project("people")
    for texts in chunks(4):
        text = " ".join(texts)
        answers = [
            browser.get("/api/next", params={"project": text}),
            browser.get("/api/admin/export", params={"project": text}),
            browser.post("/api/label", json={"project": "people", "lease": text[:200], "key": "k", "value": 1}),
            browser.post("/api/label", content=text.encode()),
            browser.post("/api/admin/import", params={"project": "people", "name": text}, content=text.encode()),
            browser.post("/api/admin/import", params={"project": "people"}, content=json.dumps([{text: text}])),
        ]
        for answer in answers:
            assert answer.status_code in (409, 422), (text, answer.text)
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.json()["error"].endswith((".", ").")), text


def test_a_hostile_address_finds_nothing(module_store: LabelStore) -> None:
    browser = client(module_store, "admin")
    for text in TEXTS:
        answer = browser.get("/static/" + quote(text[:500], safe=""))
        assert answer.status_code == 404 and "<script" not in answer.text


# Names


def test_a_project_takes_only_names_that_can_be_seen(module_store: LabelStore) -> None:
    for text in PAYLOADS.values():
        odd = visible(text) != text or len(text.splitlines()) > 1 or len(text) > 200
        if odd:
            with pytest.raises(InputError, match="project name"):
                module_store.create_project(text)
            with pytest.raises(InputError, match="criteria"):
                Settings(criteria=(text,))


def test_guidelines_hold_what_every_database_takes(module_store: LabelStore) -> None:
    for text in ("a\0b", "\ud800"):
        with pytest.raises(InputError, match=r"guidelines.*which no text has"):
            module_store.create_project("guided", instructions=text)


# The admin page's parts


def test_the_parts_of_the_admin_page_hold_texts_as_texts(module_store: LabelStore, hostile: Project) -> None:
    for text in PAYLOADS.values():
        html = admin.block(admin.table([text], [[text, text]]))
        page = Page(html)
        assert page.tags == ["table", "thead", "tr", "th", "tbody", "tr", "td", "td"] and not page.odd
        assert page.text == visible(text) * 3
        # Markdown takes what stands between two empty lines for its own.
        assert not set("\n\r") & set(html)
    assert shape(admin.export_html(hostile))[0] == ["p", "a"]
    progress = admin.block(admin.progress_html(module_store, hostile))
    disagreements = admin.block(admin.disagreements_html(module_store, hostile))
    remarks = admin.block(admin.remarks_html(module_store, hostile))
    allowed = {"p", "h2", "h3", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
    for html in (progress, remarks):
        assert set(Page(html).tags) <= allowed and not Page(html).odd and not set("\n\r") & set(html)
    assert not Page(disagreements).odd and not set("\n\r") & set(disagreements)
    shown = [bare(Page(html).text) for html in (progress, disagreements, remarks)]
    for text in TEXTS:
        assert bare(text[:400]) in shown[0] and bare(text) in shown[1] and bare(text)[:1000] in shown[2]


# What annotators are told


def test_nothing_of_a_gold_items_explanation_reaches_annotators(module_store: LabelStore) -> None:
    project = module_store.create_project("gold", settings=Settings(gold_share=0.5))
    secret = "EXPLAINED"
    made = [comparison(n, explanation=f"{secret} {text}", gold=[0, 1]) for n, text in enumerate(TEXTS[:30])]
    module_store.add_items(project, [*made, *(comparison(100 + n, explanation=secret) for n in range(30))])
    browser = client(module_store, "annotator")
    told, shown = browser.get("/api/next", params={"project": "gold"}).json(), 0
    while told["item"]:
        assert secret not in json.dumps(told)
        shown += 1
        said = {"project": "gold", "lease": told["item"]["lease"], "key": f"g{shown}", "value": 4}
        told = browser.post("/api/label", json=said).json()
    assert shown > 30


# Exports


def test_exports_hold_texts_as_texts(module_store: LabelStore, hostile: Project, whole_app: Any) -> None:
    browser = client(module_store, "admin", whole_app)
    answer = browser.get("/api/admin/export", params={"project": hostile.name})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"].startswith("attachment")  # never opened as a page of ours
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert all(name == Path(name).name for name in archive.namelist())
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    rows = list(csv.reader(io.StringIO(files["labels.csv"], newline="")))
    assert len({len(row) for row in rows}) == 1
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    comments = {row[rows[0].index("comment")] for row in rows[1:]}
    events = [json.loads(line).get("event", {}) for line in files["labels.jsonl"].split("\n") if line]
    said = {event["body"].get("comment") for event in events if event.get("kind") == "label"}
    for text in TEXTS:
        assert text in said and (text in comments or f"'{text}" in comments)
    better = [json.loads(line) for line in files["demonstrations.jsonl"].split("\n") if line]
    assert {row["completion"][0]["content"] for row in better} <= set(TEXTS) and len(better) > len(TEXTS) / 4
    for name, content in files.items():
        assert name == "labels.csv" or all(json.loads(line) for line in content.split("\n") if line)
