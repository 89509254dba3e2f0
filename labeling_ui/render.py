"""Answers as safe HTML: Markdown as it is meant, and nothing that runs, loads, covers or posts.

What a model wrote, and what somebody imported, is hostile. Markdown is rendered without raw HTML and the result passes
an allow-list of tags that can neither run a script, load anything from elsewhere, lie over the page nor send a form.
LaTeX is shown as code: a renderer in the browser would be one more thing to trust.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any

TAGS = {
    "p", "br", "hr", "strong", "em", "s", "code", "pre", "blockquote", "ul", "ol", "li", "h3", "h4", "h5", "h6",
    "table", "thead", "tbody", "tr", "th", "td", "span",
}  # fmt: skip
# Control characters, halves of surrogate pairs, and the two overrides that show a text in another order than it has.
# Other direction marks stay, for right-to-left languages need them; their reach ends with the paragraph.
_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff]")
# Letters and symbols by their category, but without any ink.
_INKLESS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
# What opens math, what closes it, and how long it may be: each mark that is never closed costs only so long a search.
_MATH = {"$$": ("$$", 2000), r"\[": (r"\]", 2000), r"\(": (r"\)", 1000)}
# Markdown fills the short rows of a table, so that a small text can become a huge page.
MOST_CELLS = 50_000


def answer_html(text: str) -> str:
    """Markdown as HTML with nothing in it but the tags above, `start` on a list and the class `math` on a span."""
    return _cached(text) if len(text) <= _CACHED_UP_TO else _rendered(text)


# Answers are shown to several people; long ones are rare, and their HTML is longer still.
_CACHED_UP_TO = 10_000


@functools.lru_cache(maxsize=1024)
def _cached(text: str) -> str:
    return _rendered(text)


def _rendered(text: str) -> str:
    import nh3

    lines = text.split("\n")
    tables = max(line.count("|") for line in lines) * len(lines) <= MOST_CELLS
    # Twice, for entities (&#8238;) spell characters too.
    html = visible(_markdown(tables).render(visible(text)))
    return nh3.clean(
        html,
        tags=TAGS,
        attributes={"ol": {"start"}, "*": set()},
        allowed_classes={"span": {"math"}},
        clean_content_tags={"script", "style"},
        link_rel=None,
    )


def visible(text: str) -> str:
    """The text with characters that hide, or that hide others, as marks one can see; tabs and newlines stay."""
    return _UNSEEN.sub(lambda found: "\N{SYMBOL FOR NULL}" if found[0] == "\0" else "\N{REPLACEMENT CHARACTER}", text)


def is_blank(text: str) -> bool:
    """Whether nobody would see anything of it."""
    return not any(unicodedata.category(c)[0] not in "ZC" and c not in _INKLESS for c in text)


@functools.lru_cache(maxsize=2)
def _markdown(tables: bool) -> Any:
    from markdown_it import MarkdownIt

    # "js-default" would read HTML; links and images stay as they were written.
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False, "breaks": True, "maxNesting": 20})
    parser.enable(["table", "strikethrough"] if tables else ["strikethrough"])
    parser.disable(["image", "link", "autolink", "reference", "html_block", "html_inline"])
    parser.add_render_rule("heading_open", _heading("<"))
    parser.add_render_rule("heading_close", _heading("</"))
    parser.inline.ruler.before("escape", "math", _math)
    parser.add_render_rule("math", _render_math)
    return parser


def _heading(bracket: str) -> Any:
    # Two levels lower, so that an answer's headings stand below the page's own.
    def render(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        return f"{bracket}h{min(6, int(tokens[index].tag[1]) + 2)}>"

    return render


def _math(state: Any, silent: bool) -> bool:
    start = state.pos + 2
    if (opened := state.src[state.pos : start]) not in _MATH:
        return False
    closed, longest = _MATH[opened]
    # One character at least stands between the two.
    end = state.src.find(closed, start + 1, min(state.posMax, start + longest + len(closed)))
    if end < 0:
        return False
    if not silent:
        state.push("math", "span", 0).content = state.src[state.pos : end + len(closed)]
    state.pos = end + len(closed)
    return True


def _render_math(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    from markdown_it.common.utils import escapeHtml

    return f'<span class="math">{escapeHtml(tokens[index].content)}</span>'
