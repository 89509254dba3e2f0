"""The report page in a real Chromium: the filter, what strangers wrote, small and dark screens, and paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align.compare.report import write_report
from tests.align.compare.test_report import make_report
from tests.conftest import in_browser

pytestmark = in_browser

JUDGE = "simulated preference"
# (prompt, answers of base, sft, dpo; outcomes of sft and dpo)
PROMPTS = [
    ("How do I boil an egg?", ("Eight minutes.", "Never do that.", "Nine minutes."), (0.0, 1.0)),
    ("What is rain?", ("Water from clouds.", "Water from clouds.", "Water from clouds."), (0.5, 0.5)),
    ("Why is the sky blue?", ("Light scatters.", "Light scatters.", "Because."), (0.5, 0.0)),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report whose answers are known, and one in which every text is hostile."""
    known, hostile = make_report(), make_report()
    for example in hostile["examples"]:  # long enough to scroll, short enough to be laid out in a moment
        for answer in example["answers"]:
            answer["text"] = answer["text"][:5_000]
    known["models"] = known["models"][:3]
    known["judges"] = known["judges"][:1]
    known["examples"] = [
        {
            "prompt": prompt,
            "answers": [
                {"model": name, "text": text, "scores": {}, "outcomes": {} if told is None else {JUDGE: told}}
                for name, text, told in zip(("base", "sft", "dpo"), texts, (None, *outcomes), strict=True)
            ],
        }
        for prompt, texts, outcomes in PROMPTS
    ]
    folder = tmp_path_factory.mktemp("pages")
    return {name: write_report(report, folder / name) for name, report in (("known", known), ("hostile", hostile))}


@pytest.fixture
def show(chromium: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Opens a page as a file; afterwards it is to have asked nobody for anything and to have complained of nothing."""
    contexts, opened = [], []

    def show(name: str = "known", **options: Any) -> Any:
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(pages[name].as_uri())
        opened.append((page, pages[name].as_uri()))
        return page

    yield show
    for page, address in opened:
        assert page.said == [] and page.asked == [address]
    for context in contexts:
        context.close()


def shown(page: Any) -> list[str]:
    """The prompts that are not filtered out."""
    return [text.strip() for text in page.locator(".example:not([hidden]) > summary > :first-child").all_inner_texts()]


def test_search_finds_words_of_prompts_and_answers(show: Any) -> None:
    page = show()
    assert shown(page) == [prompt for prompt, *_ in PROMPTS]
    for words, wanted in (("EGG", [0]), ("scatters", [2]), ("water rain", [1]), ("minutes sky", []), ("", [0, 1, 2])):
        page.fill("input[name=search]", words)
        assert shown(page) == [PROMPTS[number][0] for number in wanted], words
        assert page.inner_text("#shown").startswith(f"{len(wanted)} of 3")


def test_only_what_a_model_lost_tied_or_won(show: Any) -> None:
    page = show()
    for label, wanted in (
        ("sft lost", [0]),
        ("sft tied", [1, 2]),
        ("dpo won", [0]),
        ("dpo lost", [2]),
        ("sft won", []),
    ):
        page.select_option("select[name=outcome]", label=label)
        assert shown(page) == [PROMPTS[number][0] for number in wanted], label
    page.select_option("select[name=outcome]", label="dpo tied")
    page.check("input[name=different]")
    assert shown(page) == []
    page.select_option("select[name=outcome]", index=0)
    assert shown(page) == [PROMPTS[0][0], PROMPTS[2][0]]


def test_enter_in_the_search_field_leaves_the_page_where_it_is(show: Any) -> None:
    page = show()
    page.fill("input[name=search]", "rain")
    page.press("input[name=search]", "Enter")
    assert shown(page) == ["What is rain?"]  # and `show` looks at the requests


def test_words_that_the_first_model_does_not_say_are_marked(show: Any) -> None:
    page = show()
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.locator(".card ins").all_inner_texts() == ["Nine"]


def test_without_scripts_everything_is_there_and_no_dead_controls(show: Any) -> None:
    page = show(java_script_enabled=False)
    assert len(shown(page)) == 3
    assert not page.locator("#filter").is_visible()


def test_what_strangers_wrote_does_nothing(show: Any) -> None:
    page = show("hostile")
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    page.fill("input[name=search]", "<script>")
    wanted = [each for each in make_report()["examples"] if "<script>" in str(each)]
    assert 0 < len(wanted) == len(shown(page))
    assert page.locator("script, iframe, img, link, object, embed").count() == 1  # our own


def test_a_script_of_somebody_else_is_not_run(chromium: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    page = chromium.new_page()
    changed = tmp_path / "changed.html"
    text = pages["known"].read_text("utf-8")
    changed.write_text(text.replace("</main>", "<script>document.title = 'run'</script></main>"), "utf-8")
    page.goto(changed.as_uri())
    assert page.title() != "run" and page.locator("#filter").is_visible()
    # Nor our own with one character more.
    changed.write_text(text.replace("</script>", " </script>"), "utf-8")
    page.goto(changed.as_uri())
    assert not page.locator("#filter").is_visible()
    page.close()


def test_nothing_runs_over_the_edge(show: Any) -> None:
    page = show("hostile")
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    for width in (360, 768, 1280):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe(show: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = show(color_scheme=scheme)
    found = axe.Axe().run(page).response["violations"]
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") != dark


def test_on_paper_every_answer_is_open_and_the_controls_are_gone(show: Any) -> None:
    page = show()
    closed = page.locator(".example").nth(2).locator(".card").first
    assert not closed.is_visible()
    page.emulate_media(media="print")
    assert closed.is_visible() and closed.bounding_box()["height"] > 20
    assert not page.locator("#filter").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
