"""The chat page in a real Chromium, against the app on a real socket, a real store and real tiny models."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from align.chat import Conversation, Conversations, Sampling
from align.speakers import Answer, find_places, load_speakers
from labeling_ui.address import Address
from labeling_ui.chat_page import serving_chat
from labeling_ui.server import first_link
from labeling_ui.store import LabelStore
from reward.aggregate import preferences
from tests.align.test_chat import adapter, make_run
from tests.conftest import free_port, in_browser, make_tiny_model
from tests.labeling_ui.conftest import WATCH
from tests.labeling_ui.payloads import TEXTS, bare
from tests.labeling_ui.test_hostile_pages import COVERED, KNOWN, STRANGE, assert_unharmed, read

pytestmark = in_browser


class Scripted(Conversations):
    """Real conversations, but where `script` holds texts, the models "say" those."""

    script: tuple[str, str] | None = None

    def _answers(
        self, found: Conversation, text: str, told: Callable[[int, str], None], stopped: Callable[[], bool]
    ) -> list[Answer]:
        if self.script is None:
            return super()._answers(found, text, told, stopped)
        for place, speaker in enumerate(found.order):
            told(place, self.script[speaker][:-1])
            told(place, self.script[speaker])
        return [Answer(said, True, "", 0) for said in self.script]


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    folder = tmp_path_factory.mktemp("chat")
    sft = make_run(folder / "1-sft", "sft", make_tiny_model)
    dpo = make_run(folder / "5-dpo", "dpo", adapter(sft / "model", 1), {"sft": sft})
    with LabelStore(folder / "labels.sqlite", busy_seconds=0.2) as store:
        yield Scripted(load_speakers(find_places(str(dpo))), Sampling(12, 1.0, seed=5), store, "tiny", blind=True)


@pytest.fixture(scope="module")
def page(talk: Scripted, chromium: Any) -> Iterator[Any]:
    """The page, let in by the printed link."""
    with serving_chat(talk.store, Address(port=free_port()), talk) as site:
        context = chromium.new_context(viewport={"width": 1100, "height": 760})
        context.add_init_script(WATCH)
        page = context.new_page()
        page.outside, page.errors, page.dialogs, page.opened = [], [], [], []
        own = (site.origins[0], "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(own) else page.outside.append(r.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("popup", lambda other: page.opened.append(other.url))
        page.goto(str(first_link(talk.store, site)))
        page.click("text=Start")
        page.wait_for_function("() => document.getElementById('align')?.dataset.shown", timeout=20000)
        yield page
        context.close()


def state(page: Any, words: str) -> None:
    page.wait_for_function("words => document.getElementById('al-state').innerText === words", arg=words, timeout=20000)


def fresh(page: Any, blind: bool = True) -> None:
    """A new conversation."""
    page.set_checked("#al-blind", blind)
    before = page.get_attribute("#align", "data-shown")
    page.click("#al-new")
    page.wait_for_function("before => document.getElementById('align').dataset.shown !== before", arg=before)


def ask(page: Any, text: str) -> list[str]:
    """Send a message by the keyboard; the answers to it, from left to right, as they are shown."""
    before = page.get_attribute("#align", "data-shown")
    page.fill("#al-text", text)
    page.press("#al-text", "Enter")
    page.wait_for_function(
        "before => document.getElementById('align').dataset.shown !== before"
        " && document.getElementById('al-stop').hidden",
        arg=before,
        timeout=20000,
    )
    return list(page.locator(".ch-answers").last.locator(".al-text").all_text_contents())


def test_ask_vote_blind_and_see_who_it_was(talk: Scripted, page: Any) -> None:
    talk.script = None
    fresh(page)
    assert page.inner_text("#al-who") == "two models, names hidden until your vote"
    left, right = ask(page, "What is rain?")
    assert left != right and page.input_value("#al-text") == ""
    shown = page.inner_text("body")
    assert "sft" not in shown and "dpo" not in shown
    page.keyboard.press("Escape")
    page.keyboard.press("3")
    state(page, "Saved")
    project = talk.store.project("tiny-chat")
    (item,), (event,) = talk.store.items(project), talk.store.labels(project)
    by_place = [item.payload["answers"][i] for i in event.body["order"]]
    assert event.body["value"] == 6 and event.body["seconds"] > 0
    names = [answer["model"] for answer in by_place]
    assert f"Left was {names[0]}, right was {names[1]}." in page.inner_text("#al-message")
    assert page.locator("#al-talk h2").all_inner_texts() == [f"Left: {names[0]}", f"Right: {names[1]}"]
    (record,) = preferences(talk.store.votes(project), simulated=False).records
    assert read(record["chosen"][0]["content"]) == bare(right)
    # The next message begins a new conversation, with a new draw and hidden names.
    assert page.is_hidden("#al-votes") and len(ask(page, "What is salt?")) == 2
    assert page.locator("#al-talk .ch-mine").count() == 1 and page.locator("#al-talk h2").first.inner_text() == "Left"
    assert not page.outside and not page.errors


def test_names_can_be_shown_and_a_reload_loses_nothing(talk: Scripted, page: Any) -> None:
    talk.script = None
    fresh(page, blind=False)
    assert page.inner_text("#al-who") == "sft and dpo"
    first = ask(page, "One?")
    second = ask(page, "Two?")
    page.fill("#al-text", "half a thought")
    page.reload()
    page.wait_for_function("() => document.getElementById('align')?.dataset.shown", timeout=20000)
    assert page.input_value("#al-text") == "half a thought"
    assert page.locator("#al-talk .ch-answers .al-text").all_text_contents() == [*first, *second]
    page.click("text=Left is better")
    state(page, "Saved")
    (item,) = talk.store.items(talk.store.project("tiny-chat-dialogues"))
    assert item.payload["blind"] is False
    page.fill("#al-text", "")


def test_what_goes_wrong_is_said_and_the_message_stays(talk: Scripted, page: Any) -> None:
    talk.script = None
    fresh(page)
    page.fill("#al-text", "  ")
    page.click("#al-send")
    assert "empty" in page.inner_text("#al-message")
    long = "rain " * 1500
    page.fill("#al-text", long)
    page.click("#al-send")
    state(page, "Not done")
    assert "shorten the message" in page.inner_text("#al-message")
    assert page.input_value("#al-text") == long and page.locator("#al-talk .ch-mine").count() == 0
    talk.script = ("the same", "the same")
    ask(page, "Hi")
    assert "same answer" in page.inner_text("#al-message")
    assert page.get_attribute('[data-choice="tie"]', "aria-disabled") == "true"


def test_a_vote_waits_for_a_locked_database(talk: Scripted, page: Any) -> None:
    talk.script = ("One.", "Two.")
    fresh(page)
    ask(page, "Which?")
    before = talk.store.count_labels(talk.store.create_project("tiny-chat"))
    with sqlite3.connect(talk.store.database.name, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        page.click("text=Tie")
        state(page, "Not stored yet")
        assert "kept here and sent again" in page.inner_text("#al-message")
        other.execute("ROLLBACK")
    state(page, "Saved")
    assert talk.store.count_labels(talk.store.project("tiny-chat")) == before + 1


def test_hostile_answers_are_text(talk: Scripted, page: Any) -> None:
    """As they grow and when they are done: nothing runs, loads, covers or leads away, and the text can be read."""
    where = page.url
    fresh(page)
    texts = TEXTS[::4]  # what renders them is tested with all of them
    for first in range(0, len(texts), 2):
        pair = texts[first], texts[(first + 1) % len(texts)]
        talk.script = pair
        said = ask(page, f"`{first}` {pair[0][:300]}")
        shown = {bare(text) for text in said}
        assert all(read(text) in shown for text in pair if read(text)), pair
        assert page.evaluate(STRANGE, [".al-text", KNOWN]) == []
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    assert page.evaluate(COVERED, ["#al-send", '[data-choice="left"]', '[data-choice="right"]']) == []
    assert_unharmed(page, where)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_axe_finds_nothing(talk: Scripted, page: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    talk.script = ("First\n\n```\n" + "long " * 60 + "\n```", "Second " * 40)
    page.set_viewport_size({"width": 360, "height": 740})
    if page.get_attribute("#align", "data-theme") != scheme:
        page.click("#al-dark")
    fresh(page)
    ask(page, "What is rain?")
    left, right = (page.locator(".ch-answers .al-answer").nth(n).bounding_box() for n in (0, 1))
    assert right["y"] >= left["y"] + left["height"] and left["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    found = axe.Axe().run(page).response["violations"]
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
    page.set_viewport_size({"width": 1100, "height": 760})
