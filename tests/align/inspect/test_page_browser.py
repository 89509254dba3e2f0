"""The page of tokens in a real Chromium: inert, narrow and wide, light and dark, and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from align.inspect.page import render_html
from align.inspect.stages import Seen
from align.inspect.tokens import Part, Role, Row, Token
from tests.conftest import in_browser

pytestmark = in_browser

NASTY = "<script>document.title = 'run'</script>\u202e" + "long" * 60


def tokens(texts: list[str], role: Role) -> tuple[Token, ...]:
    return tuple(Token(number + 700, text, role, text.startswith("<|")) for number, text in enumerate(texts))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    prompt = tokens(["<|im_start|>", "user", "\n", "What", " is", " rain", "?", "<|im_end|>", "\n"], "context")
    chosen = tokens(["Water", " from", " clouds", ".", NASTY, "<|im_end|>", "\n"], "loss")
    scored = (*tokens(["No", "."], "context"), *tokens(["<|im_end|>"], "score"))
    parts = Part("prompt", prompt, "shared by both answers"), Part("chosen", chosen, ""), Part("rejected", scored, "")
    seen = Seen("quick", "dpo", "runs/quick/3-label/preferences.jsonl", "Both answers.", (Row("pair 1", parts),), 0, "")
    path = tmp_path_factory.mktemp("page") / "tokens.html"
    path.write_text(render_html(seen), "utf-8")
    return path.as_uri()


@pytest.fixture
def show(chromium: Any, address: str) -> Iterator[Any]:
    """Opens the page; afterwards it is to have asked nobody for anything and to have complained of nothing."""
    opened = []

    def show(**options: Any) -> Any:
        context = chromium.new_context(**options)
        page = context.new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        opened.append((context, page))
        return page

    yield show
    for context, page in opened:
        assert page.said == [] and page.asked == [address]
        context.close()


def test_every_run_says_in_words_whether_it_carries_loss(show: Any) -> None:
    page = show()
    assert page.locator(".run .label").all_inner_texts() == ["no loss", "loss", "no loss", "score read here"]
    assert page.locator(".run.loss .token").first.inner_text().split() == ["Water", "700"]
    assert page.title() == "quick: the tokens of dpo"  # and no script has changed it


def test_nothing_runs_over_the_edge(show: Any) -> None:
    page = show()
    for width in (360, 768, 1280):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe(show: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = show(color_scheme=scheme)
    found = axe.Axe().run(page).response["violations"]
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []


def test_on_paper_loss_is_a_line_and_not_a_colour(show: Any) -> None:
    page = show()
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    borders = page.evaluate(
        "['.run.loss', '.run.context'].map(name => getComputedStyle(document.querySelector(name)).borderLeftWidth)"
    )
    assert borders[0] != borders[1]
