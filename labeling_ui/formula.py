"""LaTeX as MathML, which browsers draw by themselves: no script, no font and no address from elsewhere.

latex2mathml converts, and is not trusted. What it makes is taken apart, and only elements that draw are written anew,
with attributes that lead nowhere, hide nothing and move nothing out of its place, and every text escaped. A formula
that holds anything else, or that cannot be converted, is no formula here: it is shown as it was written.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

# Of the source in characters, of the tree in levels and in elements. A formula of a textbook has 200, 12 and 150.
LONGEST, DEEPEST, MOST_ELEMENTS = 2000, 40, 3000

_TRUTH = re.compile(r"true|false")
# Never negative, and never wider than two letters: nothing is pushed over what stands beside it.
_SPACE = re.compile(r"(?:[01]?\.\d{1,6}|[0-2])em")
_SIZE = re.compile(r"[0-3](?:\.\d{1,6})?em")
# The attributes that are kept, and what they may say.
VALUES = {
    "display": re.compile(r"block"),
    "displaystyle": _TRUTH,
    "scriptlevel": re.compile(r"[0-3]"),
    "mathvariant": re.compile(r"normal"),
    "stretchy": _TRUTH,
    "fence": _TRUTH,
    "separator": _TRUTH,
    "symmetric": _TRUTH,
    "largeop": _TRUTH,
    "movablelimits": _TRUTH,
    "accent": _TRUTH,
    "accentunder": _TRUTH,
    "form": re.compile(r"prefix|infix|postfix"),
    "minsize": _SIZE,
    "maxsize": _SIZE,
    "width": _SPACE,
    "linethickness": re.compile(r"0(?:em|pt|px)?"),
}
# The elements that are kept, with the attributes of each.
ATTRIBUTES: dict[str, frozenset[str]] = {
    "math": frozenset({"display"}),
    "mi": frozenset({"mathvariant"}),
    "mo": frozenset(
        {"stretchy", "fence", "separator", "symmetric", "largeop", "movablelimits", "form", "minsize", "maxsize"}
    ),
    "mspace": frozenset({"width"}),
    "mfrac": frozenset({"linethickness"}),
    "mover": frozenset({"accent"}),
    "munder": frozenset({"accentunder"}),
    "munderover": frozenset({"accent", "accentunder"}),
    "mstyle": frozenset({"displaystyle", "scriptlevel"}),
    "mtable": frozenset({"displaystyle"}),
    **dict.fromkeys(
        ("mn", "mtext", "mrow", "msqrt", "mroot", "msub", "msup", "msubsup", "mtr", "mtd"), frozenset[str]()
    ),
}
# What browsers leave to style sheets: a box, bold letters, and the sides of a cell (see static/label.css).
CLASSES = {
    "mrow": {"al-boxed"},
    "mtd": {"al-left", "al-right"},
    **{tag: {"al-bold"} for tag in ("mi", "mn", "mo", "mtext")},
}
# How a formula looks without these is close enough; with any other attribute it is not drawn at all.
_WITHOUT = frozenset(
    {"xmlns", "columnalign", "columnlines", "columnspacing", "rowlines", "rowspacing", "mathvariant", "display"}
    | {"fence", "separator", "symmetric", "accent", "accentunder", "movablelimits", "largeop", "stretchy", "form"}
)
# Environments that the library knows by another name only.
_ENVIRONMENT = re.compile(r"\\(begin|end)\{(aligned|split|gathered)\}")
_CHARACTER = re.compile(r"&#x([0-9A-Fa-f]{1,6});")
_COMMAND = re.compile(r"\\[A-Za-z]")
# Of a few macros that double each other comes a formula without end.
_MACRO = re.compile(r"\\(?:[a-z]?def|let|(?:re)?new|provide|Declare)")
_TOKENS = frozenset({"mi", "mn", "mo", "mtext"})
_CHILDREN = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}


class _Odd(Exception):
    """There is something in it that is not drawn."""


def mathml(source: str, *, block: bool = False) -> str | None:
    """The formula, without the marks around it, as one `<math>` element; None: it is none that can be drawn here.

    Args:
        block: on a line of its own.
    """
    if not source.strip() or len(source) > LONGEST or _MACRO.search(source):
        return None
    try:
        written = _written(_converted(source, block), 0, [0])
    # It meets sources of every kind, hostile ones too, and may stumble in any way: the source is shown instead.
    except Exception:
        return None
    return f'<math display="block">{written}</math>' if block else f"<math>{written}</math>"


def fits(tag: str, name: str, value: str) -> str | None:
    """The value of an attribute if it may be said, as nh3 asks; attributes of HTML are none of its business."""
    return value if name not in VALUES or tag not in ATTRIBUTES or VALUES[name].fullmatch(value) else None


def _converted(source: str, block: bool) -> Any:
    """What latex2mathml makes of it, as an element of ElementTree."""
    from latex2mathml.converter import convert_to_element

    known = _ENVIRONMENT.sub(lambda found: rf"\{found[1]}{{align*}}", source)
    return convert_to_element(known, display="block" if block else "inline")


def _written(element: Any, depth: int, count: list[int]) -> str:
    """The inner part of an element, from nothing but what is known."""
    count[0] += len(element)
    if depth > DEEPEST or count[0] > MOST_ELEMENTS:
        raise _Odd
    return _text(element.text) + "".join(_outer(child, depth + 1, count) + _text(child.tail) for child in element)


def _outer(element: Any, depth: int, count: list[int]) -> str:
    tag, said = element.tag, dict(element.attrib)
    classes = []
    if tag == "menclose" and said == {"notation": "box"}:
        tag, said, classes = "mrow", {}, ["al-boxed"]
    if tag in _TOKENS and len(element):
        tag = "mrow"  # they hold text alone
    if tag == "mspace" and said.get("width", "").startswith(("-", "negative")):
        return ""  # it would draw what follows over what stands before
    if tag not in ATTRIBUTES or tag == "math" or len(element) != _CHILDREN.get(tag, len(element)):
        raise _Odd
    if said.get("mathvariant") == "bold" and tag in CLASSES:
        classes.append("al-bold")
    if tag == "mtd" and said.get("columnalign") in ("left", "right"):
        classes.append(f"al-{said['columnalign']}")
    kept = []
    for name, value in said.items():
        if name in ATTRIBUTES[tag] and VALUES[name].fullmatch(value):
            kept.append(f' {name}="{value}"')
        elif name not in _WITHOUT:
            raise _Odd
    if classes:
        kept.append(f' class="{" ".join(classes)}"')
    return f"<{tag}{''.join(kept)}>{_written(element, depth, count)}</{tag}>"


def _text(text: str | None) -> str:
    if not text:
        return ""
    # It writes some characters as references, and commands it does not know as they were written.
    plain = _CHARACTER.sub(lambda found: chr(int(found[1], 16)), text)
    if _COMMAND.search(plain):
        raise _Odd
    return escape(plain, quote=False)
