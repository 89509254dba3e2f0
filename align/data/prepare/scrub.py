"""Personal data and secrets, each replaced by a mark: <email>, <phone>, <key>, <card>, <ip>.

Patterns of our own, in all columns; names and postal addresses are not found. Every pattern
starts at a border and has bounds or gives nothing back, so that a megabyte of hostile text takes well under a second.

Phone numbers: `phonenumbers`, a port of Google's library, was tried and left out. It finds national forms of the one
country only that it is told; it takes 23 MB, and 3.6 times as long as the patterns here on 1,500 dialogues.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from align.data.prepare.steps import Step
from reward.records import Record

Found = Literal["email", "phone", "key", "card", "ip"]


def scrub(kinds: Sequence[Found]) -> Step:
    """The step that replaces what is asked for, in all columns; what was there is kept nowhere."""
    return Step("scrub", functools.partial(scrubbed_record, kinds=tuple(kinds)), private=True)


# Whose these are is told by who gave them their names; a mark would make one of many.
_NAMES = {"id", "comparison_id", "annotator", "annotators"}


def scrubbed_record(record: Record, kinds: Sequence[Found]) -> Record:
    """The record with all text of it scrubbed, whatever the column, but for ids and the names of annotators; the very
    same object where nothing is found."""
    made = {name: value if name in _NAMES else _scrubbed(value, kinds) for name, value in record.items()}
    return record if made == record else made


def _scrubbed(value: Any, kinds: Sequence[Found]) -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(inner, kinds) for key, inner in value.items()}
    if isinstance(value, list):
        return [_scrubbed(inner, kinds) for inner in value]
    return scrubbed(value, kinds) if isinstance(value, str) else value


def scrubbed(text: str, kinds: Sequence[Found]) -> str:
    """The text with marks for what is asked for. Keys go first: parts of them look like numbers of other kinds.

    >>> scrubbed("Write to jane@example.org or call +44 20 7946 0958.", ["email", "phone"])
    'Write to <email> or call <phone>.'
    """
    for kind, replace in _REPLACE.items():
        if kind in kinds:
            text = replace(text)
    return text


# E-mail

_LETTER = "A-Za-z\u00c0-\u024f"
# Not "user@host.method(": a product of matrices in Python.
_EMAIL = re.compile(
    rf"(?<![{_LETTER}0-9._%+-])[{_LETTER}0-9._%+-]{{1,64}}@(?:[{_LETTER}0-9-]{{1,63}}\.){{1,8}}[A-Za-z]{{2,24}}"
    rf"(?![{_LETTER}0-9_(])"
)


def _emails(text: str) -> str:
    return _EMAIL.sub("<email>", text) if "@" in text else text


# Keys

_PREFIXED = (
    r"sk-(?=[A-Za-z_-]{0,80}\d)[A-Za-z0-9_-]{20,}+",  # OpenAI, Anthropic and others
    r"[srp]k_(?:live|test)_[A-Za-z0-9]{16,}+",  # Stripe
    r"gh[pousr]_[A-Za-z0-9]{30,}+",  # GitHub
    r"github_pat_[A-Za-z0-9_]{22,}+",
    r"glpat-[A-Za-z0-9_-]{20,}+",  # GitLab
    r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",  # AWS
    r"xox[abeoprs]-[A-Za-z0-9-]{10,}+",  # Slack
    r"hf_[A-Za-z0-9]{30,}+",  # Hugging Face
    r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",  # Google
    r"ya29\.[A-Za-z0-9_-]{20,}+",
    r"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])",
    r"pypi-[A-Za-z0-9_-]{50,}+",
    r"SG\.[A-Za-z0-9_-]{16,40}\.[A-Za-z0-9_-]{16,}+",  # SendGrid
    r"eyJ[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]{8,}+",  # JSON web tokens
)
_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{'|'.join(_PREFIXED)})")
_NAMED_SECRET = re.compile(
    r"(?i)(aws_secret_access_key[\"']?\s{0,3}[=:]\s{0,3}[\"']?)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"
)
# A whole block, or the lines of one that is never closed.
_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:[^-]|-(?!----))*+-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----|(?:\s{0,4}[A-Za-z0-9+/=]{40,}+)++)"
)
# One of these is in every key: looking for them costs less than looking for keys.
_KEY_SIGNS = (
    "sk-", "k_", "gh", "github_", "glpat", "AKIA", "ASIA", "xox", "hf_", "AIza", "ya29", "npm_", "pypi-", "SG.", "eyJ"
)  # fmt: skip


def _keys(text: str) -> str:
    if "-----BEGIN" in text:
        text = _PEM.sub("<key>", text)
    if any(sign in text for sign in _KEY_SIGNS):
        text = _KEY.sub("<key>", text)
    return _NAMED_SECRET.sub(r"\1<key>", text) if "secret" in text.casefold() else text


# Cards

# As the card shows it (4-4-4-4, 4-6-5), or without a break in the ranges that are in use.
_CARD = re.compile(
    r"(?<![\w.,/+-])(?:[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3[47]\d{2}([ -])\d{6}\2\d{5}|"
    r"4\d{12}(?:\d{3})?(?:\d{3})?|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|"
    r"6(?:011|4[4-9]\d|5\d\d)\d{12}|62\d{14,17})(?![\w-]|[.,]\d)",
    re.ASCII,
)


def _cards(text: str) -> str:
    if not _LONG.search(text):
        return text
    return _CARD.sub(lambda found: "<card>" if luhn(found.group()) else found.group(), text)


def luhn(number: str) -> bool:
    """Whether the last digit is the check digit of ISO/IEC 7812-1, annex B.

    By hand: 79927398713 has the sum 70, which ten divides.
    """
    digits = [int(each) for each in number if each.isdigit()]
    doubled = [sum(divmod(2 * each, 10)) for each in digits[-2::-2]]
    return (sum(digits[::-2]) + sum(doubled)) % 10 == 0


# IP addresses

_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = re.compile(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w-]|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])", re.ASCII)
# What makes four numbers a version or the number of a section.
_VERSION_BEFORE = re.compile(
    r"(?:\b(?:v|ver|versions?|release|releases|build|firmware|driver|section|chapter|clause|figure|table|update|patch)\.?|§|"
    r"[=<>~!]=|[\^~@]|[A-Za-z]/|[<>])\s{0,2}\Z",
    re.IGNORECASE,
)
_NOBODYS = ("0.", "127.", "255.")  # this host and masks


def _addresses(text: str) -> str:
    if text.count(".") >= 3:
        text = _IPV4.sub(_ipv4_mark, text)
    return _IPV6.sub(_ipv6_mark, text) if text.count(":") >= 2 else text


def _ipv4_mark(found: re.Match[str]) -> str:
    address, before = found.group(), found.string[max(0, found.start() - 16) : found.start()]
    kept = _is_section(found) or address.startswith(_NOBODYS) or _VERSION_BEFORE.search(before)
    return address if kept else "<ip>"


def _is_section(found: re.Match[str]) -> bool:
    """Whether four numbers begin a heading, as in "1.2.3.4 Results"."""
    if found.start() and found.string[found.start() - 1] != "\n":
        return False
    follows = found.string[found.end() : found.end() + 3].lstrip(".")
    small = all(1 <= int(part) <= 20 for part in found.group().split("."))
    return small and follows[:1] in ("\t", " ") and follows.strip().isalpha()


def _ipv6_mark(found: re.Match[str]) -> str:
    address = found.group()
    if sum(map(bool, address.split(":"))) < 3:  # "::1", a scope operator, a time
        return address
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return "<ip>"


# Phone numbers

_LONG = re.compile(r"\d{2}[\d() ./-]{2,8}\d{2}")  # without that no number here is a phone's or a card's
_PHONE = re.compile(
    r"(?<![\w.,/+$€£#-])(?:"
    # +49 (0)30 901820, +1-202-555-0143
    r"\+\d{1,3}(?:[ ./-]?(?:\d{1,5}|\(\d{1,5}\))){1,6}"
    # 202-555-0143, (202) 555-0143, 1.202.555.0143
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4}"
    # (030) 901820
    r"|\(0\d{1,4}\) ?\d{2,8}(?:[ -]\d{2,8}){0,3}"
    # 202 555 0143, 020 7946 0958, 06 12 34 56 78, 0171/1234567, 0044 20 7946 0958; not among further numbers
    r"|(?<!\d )(?:(?:1 )?[2-9]\d{2} [2-9]\d{2} \d{4}|0\d{1,4}(?:[ ./-]\d{2,8}){1,5})(?! \d)"
    r")(?![\w-]|[.,:/]\d)",
    re.ASCII,
)
_SAID = re.compile(
    r"(?i)(\b(?:phone|telephone|tel|mobile|cell|fax|whatsapp|call|text|dial|ring)\b"
    r"(?: (?:me|us|number|no|is|at|on|him|her)){0,3}[.:]{0,2} ?)("
    r"\(?\d(?:[ .()-]{0,2}\d){6,14})(?![\w-]|[.,:/%]\d)",
    re.ASCII,
)
_DATE = re.compile(
    r"\d{1,2}[-./ ]\d{1,2}[-./ ](?:1[89]|20|21)\d\d"
    r"|(?:1[89]|20|21)\d\d(?:[-./ ]?(?:0[1-9]|1[0-2])[-./ ]?[0-3]\d| ?- ?(?:1[89]|20|21)\d\d)"
)
_BOOK_BEFORE = re.compile(r"\b(?:ISBN|ISSN|DOI|EAN|UPC|SKU)(?:[- ]?1[03])?:?\s{0,2}\Z", re.IGNORECASE)


def _phones(text: str) -> str:
    if not _LONG.search(text):
        return text
    text = _PHONE.sub(lambda found: "<phone>" if _is_phone(found.group(), found) else found.group(), text)
    return _SAID.sub(_said_mark, text)


def _said_mark(found: re.Match[str]) -> str:
    before, number = found[1], found[2]
    amount = number.isdigit() and len(number) < 9 and not before.rstrip().endswith((":", "."))  # "call 1000000 times"
    return f"{before}<phone>" if not amount and _is_phone(number, found) else found.group()


def _is_phone(number: str, found: re.Match[str]) -> bool:
    """Whether a number that looks like a phone's has its length, and is no date, book or amount (+10 000 000)."""
    digits = sum(map(str.isdigit, number))
    if _DATE.match(number) or _BOOK_BEFORE.search(found.string[max(0, found.start() - 16) : found.start()]):
        return False
    if number.startswith("+"):
        return 8 <= digits <= 15 and not re.match(r"\+0|\+1[ .-]?\(?[01]", number) and not number.endswith(" 000")
    if number.startswith(("0", "(0")):
        return 9 <= digits <= (15 if number.startswith("00") else 12)
    return 7 <= digits <= 15


_REPLACE: dict[Found, Callable[[str], str]] = {
    "key": _keys,
    "email": _emails,
    "card": _cards,
    "ip": _addresses,
    "phone": _phones,
}
