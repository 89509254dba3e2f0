"""The labelling page in a real Chromium, against the app on a real socket."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labeling_ui.accounts import Accounts
from labeling_ui.address import Address
from labeling_ui.server import serving
from labeling_ui.store import LabelStore, Settings
from tests.labeling_ui.conftest import comparison

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="CHROMIUM IS NOT INSTALLED: the page is not tested"),
    pytest.mark.browser,
]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--no-first-run", "--disable-sync", "--disable-quic"]
PASSWORD = "correct horse battery"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """The app over one database; it can be stopped and started again at the same address."""

    def __init__(self, path: Path) -> None:
        self.store, self.port = LabelStore(path), free_port()
        self.start()

    def start(self) -> None:
        self.block = serving(self.store, Address(port=self.port))
        self.origin = self.block.__enter__().origins[0]

    def stop(self) -> None:
        self.block.__exit__(None, None, None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("browser") / "labels.db")
    yield server
    server.stop()
    server.store.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def project(server: Server, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes a project of this test's own."""

    def make(items: int = 40, **settings: Any) -> Any:
        found = server.store.create_project(
            request.node.name,
            instructions="Prefer what is **true**.",
            settings=Settings(**{"gold_share": 0.0, **settings}),
        )
        answers = 4 if found.settings.mode == "ranking" else 2
        server.store.add_items(found, [comparison(n, answers=answers) for n in range(items)])
        return found

    return make


@pytest.fixture
def open_page(server: Server, chromium: Any) -> Iterator[Callable[..., Any]]:
    contexts = []

    def open_page(project: Any, name: str = "ann", **options: Any) -> Any:
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.outside, page.errors = [], []
        page.on(
            "request",
            lambda r: page.outside.append(r.url) if not r.url.startswith((server.origin, "data:", "blob:")) else None,
        )
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        role = "admin" if name.startswith("admin") else "annotator"
        accounts = Accounts(server.store)
        if any(each["name"] == name for each in accounts.annotators()):
            page.goto(f"{server.origin}/login")
        else:
            page.goto(f"{server.origin}/join?token={accounts.invite(role)}")
        page.fill("#name", name)
        page.fill("#password", PASSWORD)
        page.click("button[type=submit]")
        page.goto(f"{server.origin}/label/?project={project.name}")
        painted(page)
        return page

    yield open_page
    for context in contexts:
        context.close()


def painted(page: Any, before: str | None = None) -> str:
    """Wait until an item other than `before` stands on the screen; its lease."""
    page.wait_for_function(
        "before => { const a = document.getElementById('align'); "
        "return a && a.dataset.painted && a.dataset.painted !== before && a.dataset.painted === a.dataset.lease; }",
        arg=before,
        timeout=20000,
    )
    return str(page.evaluate("document.getElementById('align').dataset.painted"))


def press(page: Any, key: str) -> str:
    before = page.evaluate("document.getElementById('align').dataset.painted")
    page.keyboard.press(key)
    return painted(page, before)


def labels(server: Server, project: Any) -> list[Any]:
    return server.store.labels(project)


def test_one_key_stores_a_label_and_brings_the_next(server: Server, project: Any, open_page: Any) -> None:
    made = project()
    page = open_page(made)
    for key in "1473":
        press(page, key)
    assert [event.body["value"] for event in labels(server, made)] == [1, 4, 7, 3]
    assert "4 by you" in page.inner_text("#al-progress") and page.inner_text("#al-state") == "Saved"
    first = page.inner_text("#al-prompt")
    page.click(".al-value >> nth=5")
    page.wait_for_function("before => document.getElementById('al-prompt').innerText !== before", arg=first)
    assert labels(server, made)[-1].body["value"] == 6
    assert all(event.body["seconds"] is not None and event.body["lease"] for event in labels(server, made))
    assert not page.outside and not page.errors


def test_keys_without_a_pause_are_stored_or_visibly_refused(server: Server, project: Any, open_page: Any) -> None:
    made = project()
    page = open_page(made)
    page.evaluate(
        "() => { for (let i = 0; i < 30; i += 1) document.dispatchEvent(new KeyboardEvent('keydown', "
        "{ key: '2', code: 'Digit2', bubbles: true })); }".replace(
            "document.dispatchEvent", "document.body.dispatchEvent"
        )
    )
    page.wait_for_function("() => document.getElementById('al-state').innerText === 'Saved'")
    stored, told = len(labels(server, made)), page.inner_text("#al-message")
    assert stored == 1 and told.startswith("29 keys were not taken")
    before = stored
    for _ in range(30):
        page.keyboard.press("3")
    page.wait_for_function("() => document.getElementById('al-state').innerText === 'Saved'")
    stored = len(labels(server, made)) - before
    told = page.inner_text("#al-message")
    refused = int(told.split()[0]) if told else 0
    assert stored >= 1 and stored <= 30 and (stored == 30 or refused >= 1)


def test_a_key_is_painted_within_100_ms(server: Server, project: Any, open_page: Any) -> None:
    page = open_page(project(60))
    taken = page.evaluate(
        """async () => {
          const box = document.getElementById("align"), taken = [];
          for (let i = 0; i < 40; i += 1) {
            const before = box.dataset.painted, started = performance.now();
            document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "2", code: "Digit2", bubbles: true }));
            while (box.dataset.painted === before) await new Promise((done) => requestAnimationFrame(done));
            taken.push(performance.now() - started);
            await new Promise((done) => setTimeout(done, 50));
          }
          return taken.sort((a, b) => a - b);
        }"""
    )
    # The figure itself is benchmarks/labeling_page.py's; here a machine busy with other tests gets some slack.
    assert taken[len(taken) // 2] < 100


def test_undo_brings_back_what_was_said(server: Server, project: Any, open_page: Any) -> None:
    made = project()
    page = open_page(made)
    prompt = page.inner_text("#al-prompt")
    page.keyboard.press("c")
    page.keyboard.type("too long")
    page.keyboard.press("Escape")
    press(page, "2")
    press(page, "u")
    assert page.inner_text("#al-prompt") == prompt and page.input_value("#al-comment") == "too long"
    assert page.locator(".al-before").get_attribute("data-value") == "2"
    page.keyboard.press("Escape")
    press(page, "5")
    assert [e.body["value"] for e in labels(server, made)] == [5]
    assert [e.kind for e in server.store.events(made)] == ["label", "undo", "label"]


def test_skip_with_a_reason_and_a_better_answer(server: Server, project: Any, open_page: Any) -> None:
    made = project()
    page = open_page(made)
    page.keyboard.press("s")
    assert page.locator("#al-reasons button").count() == 5
    press(page, "2")
    page.keyboard.press("r")
    page.keyboard.type("A better answer, 1 2 3.")
    page.keyboard.press("Escape")
    press(page, "4")
    skipped, label = server.store.events(made)
    assert (skipped.kind, skipped.body["reason"]) == ("skip", "Both unusable")
    assert label.body["rewrite"] == "A better answer, 1 2 3."


def test_four_answers_are_ranked_with_five_keys(server: Server, project: Any, open_page: Any) -> None:
    made = project(mode="ranking")
    page = open_page(made)
    for key in ("3", "1", "Shift+4", "2"):
        page.keyboard.press(key)
    assert page.inner_text("#al-ranking") == "3 > 1 = 4 > 2"
    press(page, "Enter")
    (event,) = labels(server, made)
    order = event.body["order"]
    assert event.body["ranking"] == [[order[2]], sorted([order[0], order[3]]), [order[1]]]
    page.keyboard.press("Enter")
    assert "at least two" in page.inner_text("#al-message")
    for key in ("2", "1"):
        page.keyboard.press(key)
    press(page, "Enter")  # a part of them
    assert sum(map(len, labels(server, made)[1].body["ranking"])) == 2


def test_a_label_outlives_the_server(server: Server, project: Any, open_page: Any) -> None:
    made = project()
    page = open_page(made)
    before = page.evaluate("document.getElementById('align').dataset.painted")
    server.stop()
    page.keyboard.press("6")
    page.wait_for_function("() => document.getElementById('align').dataset.state === 'offline'", timeout=20000)
    assert "kept here" in page.inner_text("#al-state")
    time.sleep(1)
    server.start()
    painted(page, before)
    assert [event.body["value"] for event in labels(server, made)] == [6]
    assert page.url.endswith(f"project={made.name}")  # no new log-in


def test_a_label_outlives_the_page(server: Server, project: Any, open_page: Any) -> None:
    made = project()
    page = open_page(made)
    server.stop()
    page.keyboard.press("6")
    page.wait_for_function("() => document.getElementById('align').dataset.state === 'offline'", timeout=20000)
    server.start()
    page.goto(f"{server.origin}/label/?project={made.name}")
    painted(page)
    assert [event.body["value"] for event in labels(server, made)] == [6]


HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit=1'>",
    "<img src='http://evil.example/a.png'>",
    "![pixel](http://evil.example/b.png)",
    "[click](javascript:window.hit=1)",
    "<a href='http://evil.example' onmouseover='window.hit=1'>x</a>",
    "<iframe src='http://evil.example'></iframe>",
    "<svg onload='window.hit=1'><script>window.hit=1</script></svg>",
    "<style>* { background: url(http://evil.example/c) }</style>",
    "<div style='position:fixed;inset:0;z-index:99999;background:red'>cover</div>",
    "<form action='http://evil.example'><input name=password><button>Log in</button></form>",
    "<p id='al-undo'>duplicate</p><div class='al-bar'>x</div>",
    "<object data='http://evil.example'></object><embed src='http://evil.example'>",
    "<link rel=stylesheet href='http://evil.example/d.css'><base href='http://evil.example'>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=1>",
    "<details open ontoggle='window.hit=1'>x</details>",
    "<video src='http://evil.example/e.mp4' autoplay onerror='window.hit=1'></video>",
    "```html\n<script>window.hit=1</script>\n```",
    "</div></section><h1>out</h1><script>window.hit=1</script>",
    "\u202egnitirw desrever \u2066x\u2069 \u0007\u001b[31m",
]


def test_hostile_answers_do_nothing(server: Server, project: Any, open_page: Any) -> None:
    made = project(0)
    hostile = [
        comparison(n, prompt=[{"role": "user", "content": text}], answers=2)
        | {"answers": [{"text": text}, {"text": "x" + text}]}
        for n, text in enumerate(HOSTILE)
    ]
    server.store.add_items(made, hostile)
    page = open_page(made)
    for number in range(len(HOSTILE)):
        found = page.evaluate(
            """() => [...document.querySelectorAll('.al-text')].flatMap((box) => [...box.querySelectorAll('*')])
              .filter((e) => e.id || e.style.cssText || [...e.attributes].some((a) => a.name.startsWith('on'))
                || ['SCRIPT', 'IMG', 'IFRAME', 'FORM', 'INPUT', 'BUTTON', 'STYLE', 'LINK', 'OBJECT', 'EMBED', 'A',
                  'VIDEO', 'BASE', 'SVG'].includes(e.tagName.toUpperCase()))
              .map((e) => e.outerHTML)"""
        )
        assert found == []
        if number + 1 < len(HOSTILE):
            press(page, "4")
    assert page.evaluate("window.hit") is None and not page.outside


def test_a_phone_shows_answers_below_each_other(server: Server, project: Any, open_page: Any) -> None:
    page = open_page(project(), viewport={"width": 360, "height": 740})
    boxes = [page.locator(".al-answer").nth(n).bounding_box() for n in (0, 1)]
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"] and boxes[0]["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    press(page, "2")


def test_the_keyboard_alone_reaches_everything(server: Server, project: Any, open_page: Any) -> None:
    made = project()
    page = open_page(made)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.dataset.value || ''"))
    assert {"al-project", "al-undo", "al-guide", "al-dark", "al-out", "al-skip", "1", "4", "7"} <= reached
    page.focus('[data-value="6"]')
    before = page.evaluate("document.getElementById('align').dataset.painted")
    page.keyboard.press("Enter")
    painted(page, before)
    assert [e.body["value"] for e in labels(server, made)] == [6]


def test_without_log_in_there_is_no_page(server: Server, chromium: Any) -> None:
    context = chromium.new_context()
    page = context.new_page()
    for path in ("/label/", "/admin/", "/"):
        page.goto(server.origin + path)
        assert page.url == f"{server.origin}/login"
    context.close()


# The admin page


def test_the_admin_page(server: Server, project: Any, open_page: Any) -> None:
    made = project(3, overlap=2)
    items = server.store.items(made)
    for name, value in (("<b>eve</b>", 1), ("bob", 7)):
        said = {"item_id": items[0].id, "annotator": name, "key": name, "order": [0, 1], "value": value}
        server.store.record(made, {**said, "comment": "<img src=x onerror=window.hit=1>"})  # type: ignore[arg-type]
    page = open_page(made, name="admin-1")
    page.goto(f"{server.origin}/admin/")
    page.wait_for_selector("text=Annotators")
    box = page.get_by_label("Project", exact=True)
    box.fill(made.name)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=2 of 6 labels")
    assert "<b>eve</b>" in page.inner_text("body")  # as text
    page.get_by_role("tab", name="Disagreements").click()
    page.wait_for_selector("summary")
    page.locator("summary").first.click()
    assert "<img src=x" in page.inner_text("details")
    page.get_by_label("Item", exact=True).fill(items[0].key)
    page.get_by_role("button", name="Decide").click()
    page.wait_for_selector("text=Decided.")
    assert [e.kind for e in server.store.events(made)] == ["label", "label", "verdict"]
    page.get_by_role("tab", name="People").click()
    page.get_by_role("button", name="Make an invitation link").click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('textarea,input')].some((e) => e.value.includes('/join?token='))"
    )
    assert page.evaluate("window.hit") is None and not page.outside and not page.errors


def test_the_admin_page_is_closed_to_annotators(server: Server, project: Any, open_page: Any) -> None:
    made = project(3)
    page = open_page(made)
    page.goto(f"{server.origin}/admin/")
    assert page.url == f"{server.origin}/login"
    answers = page.evaluate(
        """async () => {
          const found = [];
          for (const path of ["/admin/gradio_api/queue/join", "/admin/gradio_api/run/predict", "/admin/config",
            "/admin/gradio_api/info", "/api/admin/export?project=x", "/admin/gradio_api/upload"]) {
            const post = !path.includes("config") && !path.includes("export") && !path.includes("info");
            const told = await fetch(path, post ? { method: "POST", body: JSON.stringify({ data: [], fn_index: 0,
              session_hash: "x" }), headers: { "Content-Type": "application/json" } } : {});
            found.push([path, told.status]);
          }
          return found;
        }"""
    )
    assert all(status in (401, 403, 404, 409) for _, status in answers), answers


# Accessibility


def serious(page: Any) -> list[str]:
    """What axe finds serious or critical on a page, each with the elements."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {[node['html'][:120] for node in each['nodes']][:3]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("mode", ["pairwise", "ranking"])
def test_axe_on_the_label_page(server: Server, project: Any, open_page: Any, mode: str, scheme: str) -> None:
    page = open_page(project(mode=mode, criteria=("style", "truth")), color_scheme=scheme)
    page.keyboard.press("s")
    page.locator("#al-notes summary").click()
    assert serious(page) == []


def test_axe_on_the_log_in_pages(server: Server, chromium: Any) -> None:
    context = chromium.new_context()
    page = context.new_page()
    for path in ("/login", f"/join?token={Accounts(server.store).invite('annotator')}", "/join?token=none"):
        page.goto(server.origin + path)
        assert serious(page) == []
    context.close()


def test_axe_on_the_admin_page(server: Server, project: Any, open_page: Any) -> None:
    page = open_page(project(3), name="admin-2")
    page.goto(f"{server.origin}/admin/")
    page.wait_for_selector("text=Annotators")
    assert serious(page) == []
