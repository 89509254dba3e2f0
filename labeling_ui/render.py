"""Answers as safe HTML: Markdown as it is meant, and nothing that runs, loads, covers or posts.

What a model wrote, and what somebody imported, is hostile. Markdown is rendered without raw HTML and the result passes
an allow-list of tags that can neither run a script, load anything from elsewhere, lie over the page nor send a form.
LaTeX becomes MathML on the server (`labeling_ui.formula`): a renderer in the browser would be one more thing to trust.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any

from labeling_ui import formula

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
_INLINE_DOLLAR = ("$", 1000)
# A formula on lines of its own: of a mark that is never closed, so many lines are searched.
MOST_LINES = 40
# "$5 and 6$" speaks of money, "$5 \times 6$" does not.
_PROSE = re.compile(r"\d[^$]*\s[^\W\d_]{2,}")
# Of formulas in one text, in characters and ten for each; the rest of them is shown as it was written.
MOST_MATH = 20_000
# Markdown fills the short rows of a table, so that a small text can become a huge page.
MOST_CELLS = 50_000


def answer_html(text: str) -> str:
    """Markdown as HTML with nothing in it but the tags above, `start` on a list, the class `math` on a span, and the
    elements, attributes and classes of `labeling_ui.formula`."""
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
        tags=TAGS | formula.ATTRIBUTES.keys(),
        attributes={"ol": {"start"}, "*": set(), **formula.ATTRIBUTES},
        attribute_filter=formula.fits,
        allowed_classes={"span": {"math"}, **formula.CLASSES},
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
    parser.block.ruler.before("fence", "math_block", _math_block, {"alt": ["paragraph", "blockquote", "list"]})
    parser.add_render_rule("math", _render_math)
    parser.add_render_rule("math_block", _render_math)
    return parser


def _heading(bracket: str) -> Any:
    # Two levels lower, so that an answer's headings stand below the page's own.
    def render(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        return f"{bracket}h{min(6, int(tokens[index].tag[1]) + 2)}>"

    return render


# -- formulas ---------------------------------------------------------------------------------------------------------


def _math(state: Any, silent: bool) -> bool:
    """A formula within a line: $...$, $$...$$, \\(...\\) or \\[...\\]."""
    start, opened = state.pos, state.src[state.pos : state.pos + 2]
    if opened not in _MATH:
        if opened[:1] != "$":
            return False
        opened = "$"
    closed, longest = _MATH.get(opened, _INLINE_DOLLAR)
    first = start + len(opened)
    # One character at least stands between the two.
    last = min(state.posMax, first + longest + len(closed))
    end = state.src.find(closed, first + 1, last)
    while opened == "$" and end > 0 and state.src[end - 1] == "\\":
        end = state.src.find(closed, end + 1, last)
    if end < 0 or (opened == "$" and not _is_formula(state.src, start, end)):
        return False
    if not silent:
        token = state.push("math", "span", 0)
        token.content, token.markup = state.src[first:end], opened
    state.pos = end + len(closed)
    return True


def _is_formula(text: str, start: int, end: int) -> bool:
    """Whether two dollar signs enclose a formula: as other Markdown has it, no space within them and no word, number
    or other dollar sign at them; and no prose between two prices."""
    before, inner, after = text[start - 1 : start] if start else "", text[start + 1 : end], text[end + 1 : end + 2]
    if before.isalnum() or after.isalnum() or "$" in (before, after):
        return False
    if inner[0].isspace() or inner[-1].isspace():
        return False
    return "\\" in inner or not _PROSE.match(inner)


def _math_block(state: Any, start: int, last: int, silent: bool) -> bool:
    """A formula that begins and ends a line: Markdown would take a line of it that begins with - or + for a list."""
    if state.is_code_block(start):
        return False
    at = state.bMarks[start] + state.tShift[start]
    opened = state.src[at : at + 2]
    if opened not in _MATH or opened == r"\(":
        return False
    closed, longest = _MATH[opened]
    # Of very many marks that are never closed, all but this look would take seconds; quotes have marks of their own.
    if state.src.find(closed, at + 2, at + 2 * longest) < 0:
        return False
    found: list[str] = []
    for number in range(start, min(last, start + MOST_LINES)):
        if number > start and (state.isEmpty(number) or state.sCount[number] < state.blkIndent):
            return False
        line = state.src[state.bMarks[number] + state.tShift[number] + 2 * (number == start) : state.eMarks[number]]
        inner, mark, rest = line.partition(closed)
        found.append(inner)
        if mark:
            break
    else:
        return False
    content = "\n".join(found)
    # What follows the mark on its line is a full stop or a comma, or this is a formula within a line.
    if rest.strip() not in ("", ".", ",", ";") or not content.strip() or len(content) > longest:
        return False
    if not silent:
        state.line = number + 1
        token = state.push("math_block", "p", 0)
        token.block, token.content, token.markup, token.info = True, content, opened, rest.strip()
        token.map = [start, state.line]
    return True


def _render_math(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    from markdown_it.common.utils import escapeHtml

    token = tokens[index]
    env["math"] = env.get("math", 0) + len(token.content) + 10  # a formula of one letter costs time too
    html = formula.mathml(token.content, block=token.markup in ("$$", r"\[")) if env["math"] <= MOST_MATH else None
    if html is None:
        closed = _MATH.get(token.markup, _INLINE_DOLLAR)[0]
        html = f'<span class="math">{escapeHtml(token.markup + token.content + closed)}</span>'
    return f"<p>{html}{escapeHtml(token.info)}</p>\n" if token.block else html
