"""The data report in a real Chromium: inert, narrow and wide, light and dark, and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from align.data.report.page import render_html
from tests.align.data.report.test_report import hostile_report
from tests.conftest import in_browser

pytestmark = in_browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "data_report.html"
    path.write_text(render_html(hostile_report()), "utf-8")
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
        page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        opened.append((context, page))
        return page

    yield show
    for context, page in opened:
        assert page.said == [] and page.asked == [address]
        context.close()


def test_what_to_look_at_comes_first_and_nothing_acts(show: Any) -> None:
    page = show()
    assert page.locator("h2").first.inner_text().lower() == "what to look at"
    assert "<script>alert(1)</script>" in page.locator(".looks li").first.inner_text()
    assert page.locator("script, iframe, img, link, object, embed").count() == 0
    assert page.evaluate("getComputedStyle(document.querySelector('main')).display") == "block"


def test_nothing_runs_over_the_edge(show: Any) -> None:
    page = show()
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    for width in (360, 768, 1280):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe(show: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = show(color_scheme=scheme)
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    found = axe.Axe().run(page).response["violations"]
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []


def test_on_paper_the_examples_are_open(show: Any) -> None:
    page = show()
    example = page.locator("details .card").first
    assert not example.is_visible()
    page.emulate_media(media="print")
    assert example.is_visible() and example.bounding_box()["height"] > 20
