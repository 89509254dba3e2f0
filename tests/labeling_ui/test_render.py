"""Answers as HTML: a battery of hostile texts against each of the two walls, and the Markdown that must survive."""

from __future__ import annotations

import time
from html.parser import HTMLParser
from typing import Any

import nh3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeling_ui import formula, render
from labeling_ui.render import TAGS, is_blank, visible
from tests.labeling_ui.payloads import HOSTILE, LATEX, PAYLOADS

VOID = {"br", "hr"}
# What was rendered behind another wall must not be found again.
answer_html = render._rendered  # what is cached under one of the patches below would be met under another


class Page(HTMLParser):
    """What a browser would find in a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.odd: list[str] = []  # comments, declarations, and ends of what was never begun
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.odd.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.odd.append(f"<!--{data}-->")

    def handle_decl(self, decl: str) -> None:
        self.odd.append(f"<!{decl}>")

    def handle_pi(self, data: str) -> None:
        self.odd.append(f"<?{data}>")

    def unknown_decl(self, data: str) -> None:
        self.odd.append(f"<![{data}]>")


def checked(html: str) -> Page:
    """A page on which nothing can run, load, cover, post, be pointed at, or end what stands around it."""
    page = Page(html)
    assert set(page.tags) <= TAGS | formula.ATTRIBUTES.keys()
    for tag, name, value in page.attributes:
        assert is_harmless(tag, name, value or ""), (tag, name, value)
    assert not page.odd and not page.open
    return page


def is_harmless(tag: str, name: str, value: str) -> bool:
    if name == "class":
        return value == "math" if tag == "span" else set(value.split()) <= formula.CLASSES.get(tag, set())
    if tag == "ol":
        return name == "start" and bool(value)
    return name in formula.ATTRIBUTES.get(tag, ()) and formula.VALUES[name].fullmatch(value) is not None


def test_the_battery_is_large() -> None:
    assert len(HOSTILE) >= 40 and len(LATEX) >= 40


@pytest.mark.parametrize("text", PAYLOADS.values(), ids=PAYLOADS)
def test_hostile_texts_are_harmless(text: str) -> None:
    html = answer_html(text)
    checked(html)
    assert not set("\0\x01\x08\x0b\x0c\x1b\x7f\x85\x9b\u202d\u202e\ud800\udfff") & set(html)


@pytest.mark.parametrize("text", PAYLOADS.values(), ids=PAYLOADS)
def test_the_allow_list_holds_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the Markdown parser let all HTML through, that of links and images included."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    raw = type("Raw", (), {"render": staticmethod(lambda text: text)})
    for made in (parser, raw):
        monkeypatch.setattr(render, "_markdown", lambda tables, made=made: made)
        checked(answer_html(text))


@pytest.mark.parametrize("text", PAYLOADS.values(), ids=PAYLOADS)
def test_the_parser_holds_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the allow-list let everything through; it alone takes a fence's language and a cell's alignment away."""
    monkeypatch.setattr(nh3, "clean", lambda html, **_: html)
    page = Page(answer_html(text))
    assert set(page.tags) <= TAGS | formula.ATTRIBUTES.keys()
    assert {name for _, name, _ in page.attributes} <= {"class", "start", *formula.VALUES}
    assert not page.odd and not page.open


def test_without_the_walls_the_battery_would_get_through() -> None:
    """The checks see what they look for."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable(["table"])
    through = 0
    for text in HOSTILE.values():
        try:
            checked(parser.render(text))
        except AssertionError:
            through += 1
    assert through > 0.6 * len(HOSTILE)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from([*sorted(PAYLOADS.values()), "\n", "\n\n", "> ", "- ", "    ", "|", "`", "$$", "**", "\\("])
    )
)
def test_hostile_texts_in_any_company(parts: list[str]) -> None:
    checked(answer_html("".join(parts)))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(st.characters(codec=None)))
def test_any_text_renders(text: str) -> None:
    checked(answer_html(text))


# What is harmless survives

LINE, BLOCK = "<math><mrow>", '<math display="block"><mrow>'
A_1 = "<msub><mi>a</mi><mn>1</mn></msub>"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**bold** and *slanted*", "<p><strong>bold</strong> and <em>slanted</em></p>\n"),
        ("~~gone~~", "<p><s>gone</s></p>\n"),
        ("one\ntwo", "<p>one<br>\ntwo</p>\n"),
        ("one\n\ntwo", "<p>one</p>\n<p>two</p>\n"),
        ("# Title\n## Part", "<h3>Title</h3><h4>Part</h4>"),
        ("###### Deep", "<h6>Deep</h6>"),
        ("Title\n=====", "<h3>Title</h3>"),
        ("- a\n- b", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>\n"),
        ("3. a\n4. b", '<ol start="3">\n<li>a</li>\n<li>b</li>\n</ol>\n'),
        ("> said", "<blockquote>\n<p>said</p>\n</blockquote>\n"),
        ("`x < 1`", "<p><code>x &lt; 1</code></p>\n"),
        ("```python\nif a < b:\n    pass\n```", "<pre><code>if a &lt; b:\n    pass\n</code></pre>\n"),
        ("---", "<hr>\n"),
        ("1 < 2 & 3 > 2", "<p>1 &lt; 2 &amp; 3 &gt; 2</p>\n"),
        ("<b>tags</b> are shown", "<p>&lt;b&gt;tags&lt;/b&gt; are shown</p>\n"),
        ("[a link](https://a.example)", "<p>[a link](https://a.example)</p>\n"),
        ("![an image](a.png)", "<p>![an image](a.png)</p>\n"),
        ("costs $5, not $6", "<p>costs $5, not $6</p>\n"),
        ("$$x < y$$", f"<p>{BLOCK}<mi>x</mi><mo>&lt;</mo><mi>y</mi></mrow></math></p>\n"),
        ("$$\nx\n= y\n- z\n$$.", f"<p>{BLOCK}<mi>x</mi><mo>=</mo><mi>y</mi><mo>−</mo><mi>z</mi></mrow></math>.</p>\n"),
        ("We have\n\\[ x \\]\nhere", f"<p>We have</p>\n<p>{BLOCK}<mi>x</mi></mrow></math></p>\n<p>here</p>\n"),
        (r"so \(a_1 = b\) is", f"<p>so {LINE}{A_1}<mo>=</mo><mi>b</mi></mrow></math> is</p>\n"),
        ("so $a_1 = b$.", f"<p>so {LINE}{A_1}<mo>=</mo><mi>b</mi></mrow></math>.</p>\n"),
        ("- **$y$**", f"<ul>\n<li><strong>{LINE}<mi>y</mi></mrow></math></strong></li>\n</ul>\n"),
        (r"\(\nosuchcommand{x}\)", r'<p><span class="math">\(\nosuchcommand{x}\)</span></p>' "\n"),
        ("$5 and 6$ or US$7 and $8", "<p>$5 and 6$ or US$7 and $8</p>\n"),
        (r"\$x\$ and $ x $ and $x$y", "<p>$x$ and $ x $ and $x$y</p>\n"),
        ("`$x$`", "<p><code>$x$</code></p>\n"),
        (r"`\(code\)`", r"<p><code>\(code\)</code></p>" "\n"),
        (r"\(never closed", "<p>(never closed</p>\n"),
        (r"\*plain\*", "<p>*plain*</p>\n"),
        ("עברית \u2067abc\u2069 \u200fمرحبا", "<p>עברית \u2067abc\u2069 \u200fمرحبا</p>\n"),
        ("👩‍👩‍👧 é 漢字", "<p>👩‍👩‍👧 é 漢字</p>\n"),
        ("", ""),
    ],
)
def test_markdown_survives(text: str, html: str) -> None:
    assert answer_html(text) == html
    checked(html)


def test_a_table_survives() -> None:
    page = checked(answer_html("| a | b |\n|:--|--:|\n| **1** | `2` |\n| 3 | 4 |"))
    assert page.tags == [
        *("table", "thead", "tr", "th", "th", "tbody"),
        *("tr", "td", "strong", "td", "code", "tr", "td", "td"),
    ]
    assert page.text.split() == ["a", "b", "1", "2", "3", "4"]


def test_nothing_that_was_written_is_lost() -> None:
    for name, text in PAYLOADS.items():
        if "alert(1)" in text and name != "script as a fence's language":  # no Markdown shows that
            assert "alert(1)" in Page(answer_html(text)).text, name


def test_math_of_great_length_is_text() -> None:
    assert "math" in answer_html("$$" + "x" * 2000 + "$$")
    assert "math" not in answer_html("$$" + "x" * 2001 + "$$")
    assert "math" in answer_html(r"\(" + "x" * 1000 + r"\)")
    assert "math" not in answer_html(r"\(" + "x" * 1001 + r"\)")
    assert "math" not in answer_html("$$$$")


# Size

FILLERS = [
    "x", "word ", "line\n", "para\n\n", "*", "**a", "*a **b ", "_", "~~", "`", "` `` ", "```\n", "[", "[[a](", "![",
    "<", "<a ", "&", "&amp;", "\\", "\\(", "\\[", "$", "$$", "$$a ", ">", "> ", "- ", "1. ", "    ", "# ", "|", "|a",
    "a|b\n", "|-", "-|-\n", "---\n", "===\n", "<!--", "\0", "\u202e", "\ud800", "é", "😀", "- a\n  ", "> - ",
    "*a_b`c[d](e)<f>", "\\\n", "a\r", "\t", "$$\n", "\\[a\n", "$$a\n", "$a$ ", "$a$\n", "$\\frac{1}{2}$ ", "$|$ ",
]  # fmt: skip


@pytest.mark.parametrize("filler", FILLERS, ids=repr)
def test_100_kilobytes_take_seconds_at_most(filler: str) -> None:
    """Nothing grows with the square of the text, which would take minutes; the slowest takes 2 s."""
    text = (filler * 100_000)[:100_000]
    start = time.process_time()
    html = answer_html(text)
    assert time.process_time() - start < 10
    checked(html)
    assert len(html) < 30 * len(text)


@pytest.mark.parametrize("columns", [10, 100, 300, 1000])
def test_a_table_of_empty_cells_does_not_swell(columns: int) -> None:
    """Markdown fills up short rows: without a limit, 2 kB become 650 kB, and 100 kB as many tables as fit."""
    swollen = "|" * (columns + 1) + "\n" + "|-" * columns + "|\n" + "|\n" * columns + "\n"
    text = swollen * (100_000 // len(swollen) + 1)
    start = time.process_time()
    html = answer_html(text)
    assert time.process_time() - start < 10
    assert len(html) < 30 * len(text)
    checked(html)


@pytest.mark.parametrize("opened", ["> ", "- ", "* ", "1. ", "> - ", "<div>", "**_", "[", "(", "<b><i>"])
@pytest.mark.parametrize("depth", [10, 100, 5000])
def test_deep_nesting(opened: str, depth: int) -> None:
    page = checked(answer_html(opened * depth + "core"))
    deepest = max((page.tags.count(tag) for tag in ("blockquote", "ul", "ol")), default=0)
    assert deepest <= 20


# Characters


def test_visible() -> None:
    assert visible("a\0b\x07c\x1bd\x7fe\x85f\ud800g\u202eh") == "a␀b�c�d�e�f�g�h"
    assert visible("tab\tline\r\nend") == "tab\tline\r\nend"
    assert visible("😀 \u200d \u2066 עברית") == "😀 \u200d \u2066 עברית"


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        ("", True),
        (" \t\r\n", True),
        ("\u200b\u200d\ufeff\u2060", True),
        ("\u3000\u00a0\u2003", True),
        ("\0\x1b", True),
        ("\u2800\u3164\u115f", True),
        ("\u202e\u2066", True),
        (".", False),
        ("\u200bx", False),
        ("漢", False),
        ("😀", False),
    ],
)
def test_is_blank(text: str, blank: bool) -> None:
    assert is_blank(text) is blank


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    import subprocess
    import sys

    heavy = "{'nh3', 'markdown_it', 'latex2mathml', 'gradio', 'torch', 'align'}"
    code = f"import sys, labeling_ui.render; print({heavy} & sys.modules.keys())"
    found: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
