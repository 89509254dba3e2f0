"""The trust page stays true, inert and the same, whatever texts and gaps the data put into it."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from reward.trust import Figures, assess, judge, verdict
from reward.trust_report import render_html
from tests.reward.trust_data import longer, luck, manners, record, scorer, sound

NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></div></table><style>body{display:none}</style><iframe src='https://evil.example'></iframe>",
    "<!-- ]]> {{ 7 * 7 }} {% raw %} </title> <svg onload=alert(1)> &lt;b&gt;",
    "\u202eمرحبا بالعالم\u202c $x$ \\alpha",
    "long " * 200,
]
OURS = (
    "html head meta title style body header main section h1 h2 h3 p strong bdi div small "
    "table thead tbody tr th td figure figcaption svg g path defs use clippath rect text tspan"
)


class Page(HTMLParser):
    """Every tag with its attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._within: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._within:
            while self._within.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._within:
            self.text += data


def page(figures: Figures) -> str:
    checks = judge(figures)
    return render_html(figures, checks, verdict(figures, checks))


@pytest.fixture(scope="module")
def figures() -> Figures:
    """Figures of an ensemble of two, with hostile sources and annotators, and whatever else can be there."""
    pairs = [
        {
            **each,
            "source": NASTY[number % len(NASTY)],
            "annotators": [NASTY[number % 3], NASTY[3 + number % 3], "ann"],
            "strengths": [(-1, 1, 2)[number % 3], 3, 0 if number % 4 == 0 else 1],
            "chosen_index": number % 2,
            "simulated": True,
        }
        for number, each in enumerate(manners(60))
    ]
    train = [{**each, "chosen_index": 0} for each in manners(80, 1000)]
    return assess(train, pairs, scorer(sound, lambda text: sound(text) + 0.1 * luck(text)), probed=20)


@pytest.fixture(scope="module")
def html(figures: Figures) -> str:
    return page(figures)


def test_nothing_in_the_page_can_act(html: str) -> None:
    ours = set(OURS.split())
    for tag, attributes in Page(html).tags:
        assert tag in ours
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "srcset", "action", "formaction", "srcdoc", "background", "poster", "ping"}
            if name in {"href", "xlink:href"}:
                assert tag == "use" and value and value.startswith("#")


def test_hostile_names_are_shown_as_they_are(html: str) -> None:
    text = Page(html).text
    for nasty in NASTY:
        assert text.count(nasty) >= 2  # as a source and as an annotator


def test_the_page_asks_nobody_for_anything(html: str) -> None:
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in Page(html).tags
    for tag, attributes in Page(html).tags:
        for name, value in attributes.items():
            assert name.startswith("xmlns") or not re.search(r"https?://", value or ""), (tag, name, value)
    [style] = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "max-width: 40rem" in style
    assert "<?xml" not in html and html.lower().count("<!doctype") == 1


def test_ids_are_unique_and_every_reference_resolves(html: str) -> None:
    ids = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"|aria-labelledby="([^"]+)"', html))
    assert {name for names in wanted for name in names if name} <= set(ids)


def test_four_plots_take_the_pages_colours(html: str) -> None:
    assert html.count('<svg role="img"') == 4
    assert "#010203" not in html and "#040506" not in html
    assert "currentColor" in html and "var(--plot-rule)" in html


def test_the_order_is_notice_verdict_checks_plots_tables_method(figures: Figures, html: str) -> None:
    text = Page(html).text
    order = [
        "Labels here are simulated",
        "A policy may be trained on this reward model",
        "In words",
        "Reliability",
        "Accuracy by length gap",
        "Reward against length",
        "Probes",
        "Ceiling and floors",
        "Spread of the heads",
        "Method",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    for check in judge(figures):
        assert check.sentence.replace(" %", "\u00a0%") in text.replace("\u2060", "")


def test_refusals_stand_above_what_passed() -> None:
    refused = page(assess(longer(60, 1000), longer(60), scorer(len), probed=20))
    text = Page(refused).text
    assert text.index("Refused.") < text.index("beyond length refused") < text.index("accuracy passed")
    assert "Labels here are simulated" not in text


def test_a_notice_only_where_labels_are_simulated(figures: Figures, html: str) -> None:
    assert 'role="note"' in html
    other = copy.deepcopy(figures)
    other["simulated"] = False
    assert 'role="note"' not in page(other)


def test_same_figures_same_bytes(figures: Figures) -> None:
    assert page(figures) == page(copy.deepcopy(figures))


def test_what_was_not_measured_says_why() -> None:
    text = Page(page(assess([], [record(0, "rain", "salt water")], scorer(len)))).text
    for why in (
        "Votes are not recorded.",
        "Sources are not recorded.",
        "Margins are not recorded.",
        "The model has one head.",
        "There are no training pairs to learn a rule from.",
        "a single prompt cannot be halved",
    ):
        assert why in text
    assert "None" not in text and "nan" not in text


def test_constant_rewards_can_be_drawn() -> None:
    html = page(assess(manners(20, 1000), manners(40), scorer(lambda text: 0.0), probed=5))
    assert html.count('<svg role="img"') == 4
