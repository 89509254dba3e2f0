"""Unicode and white space as their writer meant them; nothing that a reader sees, or a program reads, is changed.

A text is mended (mojibake, by ftfy), composed (NFC), rid of characters that show nothing, and trimmed, again and again
until nothing changes: so a second run changes nothing. Code, fenced or between backticks, is neither mended nor
composed, nor is a text that speaks of encodings mended: it may show broken text on purpose. White space in fenced code
stays.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import TYPE_CHECKING

from align.data.prepare.steps import Left, Step
from align.data.prepare.texts import CODE, FENCED, outside, with_texts
from reward.records import Record

if TYPE_CHECKING:
    from ftfy import TextFixerConfig


def normalise() -> Step:
    """The step; a row is left out where nothing is left of its prompt or answer, or both answers of a pair are one."""
    return Step("normalise", _normalise)


def _normalise(record: Record) -> Record | Left:
    made = with_texts(record, normalised)
    reason = _without_sense(made)
    return Left(reason) if reason else made


def _without_sense(record: Record) -> str:
    """Why no stage could use the record, in the words of `align data convert`; "" where one could."""
    if not record["prompt"][-1]["content"].strip():
        return "with an empty prompt"
    if "completion" in record and not record["completion"][0]["content"].strip():
        return "with an empty answer"
    if "chosen" in record:
        chosen, rejected = (record[side][0]["content"].strip() for side in ("chosen", "rejected"))
        if chosen == rejected:
            return "with identical chosen and rejected"
        if not chosen:
            return "with an empty chosen answer"
    return ""


def normalised(text: str) -> str:
    """The text in its normal form, which is its own normal form.

    >>> normalised("It\\u2019s a cafe\\u0301 \\r\\n")
    'It’s a café'
    """
    while (mended := _once(text)) != text:
        text = mended
    return text


def _once(text: str) -> str:
    if not text.isascii() and _NOT_PLAIN.search(text):
        text = outside(CODE, text, _mended)
    if _UNSEEN.search(text):
        text = _seen(text)
    return _trimmed(text)


# Broken characters

_NOT_PLAIN = re.compile("[^\x00-\x7f‘’“”–—…•]")  # what most English texts have beside ASCII is never broken by itself
_HALVES = re.compile("[\ud800-\udfff]")
_OF_ENCODINGS = re.compile(r"mojibake|utf-?8|latin-?1|8859-|1252|\bencod|charset|garbled", re.IGNORECASE)


@functools.cache
def _switches() -> TextFixerConfig:
    """ftfy's switches, every one. It is only asked about prose that its rule for mojibake (`is_bad`) calls broken."""
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        fix_encoding=True,  # "schÃ¶n" is "schön": UTF-8 that was read as a one-byte encoding
        restore_byte_a0=True,  # the same, after a program took a byte of it for a space: "voilÃ  le"
        replace_lossy_sequences=True,  # the same, where a byte is lost: U+FFFD for its character only
        decode_inconsistent_utf8=True,  # the same within a line that is otherwise fine
        fix_c1_controls=True,  # U+0093 is “ of Windows-1252; nobody writes control characters of that range
        fix_surrogates=True,  # two halves of a character become the character; JSON cannot hold a half
        unescape_html=False,  # "&lt;" in an answer about HTML means "&lt;"
        fix_latin_ligatures=False,  # "ﬁ" is how it was written
        fix_character_width=False,  # full-width forms belong to Chinese and Japanese text
        uncurl_quotes=False,  # curly quotation marks are right, and straight ones are code
        fix_line_breaks=False,  # ours, in code too
        remove_terminal_escapes=False,  # ours, in code too
        remove_control_chars=False,  # ours, with the zero-width characters, which ftfy leaves
        normalization=None,  # ours: not only where the encoding is broken
        explain=False,
    )


def _mended(text: str) -> str:
    """NFC keeps every difference that a reader can see; NFKC would make "x²" "x2"."""
    from ftfy import fix_text
    from ftfy.badness import is_bad

    if _HALVES.search(text) or (is_bad(text) and not _OF_ENCODINGS.search(text)):
        text = fix_text(text, _switches())
    return unicodedata.normalize("NFC", text)


# Characters that show nothing

_TERMINAL = re.compile("\x1b\\[[0-9;]*[A-Za-z]")  # colours: without them "[31m" would be left
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\u2028\u2029]")
# Control characters, soft hyphen, word joiner, byte order mark, deprecated and annotation marks, language tag.
_NEVER = "\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u2060\u206a-\u206f\ufeff\ufff9-\ufffc\U000e0001"
_DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_TAGS = "\U000e0020-\U000e007f"
_UNSEEN = re.compile(f"[\r\x0b\x0c\u2028\u2029{_NEVER}{_DIRECTION}{_TAGS}\u200b-\u200d]")
_NEVER_SEEN = re.compile(f"[{_NEVER}]+")
_DIRECTION_MARKS = re.compile(f"[{_DIRECTION}]+")
_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u061b\u061d-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
_BETWEEN_WORDS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer: words without spaces
_ZERO_SPACE = re.compile(f"(?<![{_BETWEEN_WORDS}])\u200b+|\u200b++(?![{_BETWEEN_WORDS}])")
# Letters that join or stack (Hebrew to Mongolian, Indic extensions, Arabic forms); pictures and their variants.
_JOINED = "\u0590-\u1cff\ua800-\uabff\ufb1d-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff\U0001e800-\U0001efff"
_PICTURES = "\u2190-\u2bff\u3030\u303d\u3297\u3299\ufe0f\U0001f000-\U0001faff"
_JOINERS = re.compile(f"(?<![{_JOINED}{_PICTURES}])[\u200c\u200d]+")
_FLAG_OR_TAGS = re.compile(f"(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)|[{_TAGS}]+")


def _seen(text: str) -> str:
    """The text without what shows nothing and means nothing, and with one sign for the end of a line.

    What stays: joiners after letters of scripts that join (Persian, Hindi) and in emoji; zero-width spaces between
    words of scripts without spaces; direction marks where anything is written from right to left; tags in flags.
    """
    text = _TERMINAL.sub("", _LINE_ENDS.sub("\n", text))
    text = _NEVER_SEEN.sub("", text)
    if text.isascii():
        return text
    if not _RIGHT_TO_LEFT.search(text):
        text = _DIRECTION_MARKS.sub("", text)
    text = _JOINERS.sub("", _ZERO_SPACE.sub("", text))
    return _FLAG_OR_TAGS.sub(lambda found: found[1] or "", text)


# White space

_TRAILING = re.compile(r"[^\S\n]\n")
_BLANK_LINES_FIRST = re.compile(r"(?:[^\S\n]*\n)+")


def _trimmed(text: str) -> str:
    """No white space around the turn and at the ends of lines; a first line keeps its indentation of two or more."""
    if _TRAILING.search(text):
        text = outside(FENCED, text, _trimmed_lines)
    text = text.rstrip()
    if text[:1].isspace():
        text = _BLANK_LINES_FIRST.sub("", text, count=1) if _BLANK_LINES_FIRST.match(text) else text
        if text[:1] in (" ", "\xa0") and not text[1:2].isspace():  # how hh-rlhf and others begin an answer
            text = text[1:]
    return text


def _trimmed_lines(text: str) -> str:
    """Two spaces at the end of a line within a paragraph stay: Markdown's line break, as in poems and addresses."""
    lines = text.split("\n")
    bare = [line.rstrip() for line in lines[:-1]]
    for number, (line, trimmed) in enumerate(zip(lines, bare, strict=False)):
        following = bare[number + 1] if number + 1 < len(bare) else lines[-1].strip()
        if trimmed and following and line.endswith("  "):
            bare[number] = trimmed + "  "
    return "\n".join([*bare, lines[-1]])
