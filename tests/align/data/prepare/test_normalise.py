"""What is broken is mended, what is meant stays, and a second run changes nothing."""

from __future__ import annotations

import itertools
import pickle
import time

import pytest
from ftfy.badness import is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.prepare.normalise import normalise, normalised
from align.data.prepare.steps import Left
from reward.records import Record, assistant_answer, user_prompt

FAMILY = "👨\u200d👩\u200d👧"
RAINBOW = "🏳\ufe0f\u200d🌈"
WALES = "\U0001f3f4\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f"


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("schÃ¶n", "schön"),
        ("Itâ€™s water.", "It’s water."),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет"),
        ("voil\u00c3 le travail", "voilà le travail"),  # the last byte of à became a space
        ("日本 schÃ¶n", "日本 schön"),  # a line that was no one-byte encoding as a whole
        ("schÃ¶n &amp; ﬁn, ＯＫ “ja”", "schön &amp; ﬁn, ＯＫ “ja”"),  # mended, and otherwise as it was
        ("A fine line, and â€œanotherâ€\x9d.", "A fine line, and “another”."),
        ("don\x92t", "don’t"),
        ("cafe\u0301", "café"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("\ufeffa\x00b\u200bc\u00add\u2060e", "abcde"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("left\u202e to right", "left to right"),
        ("pay\u200dload, in\u200cvisible", "payload, invisible"),
        ("a\U000e0068\U000e0069b", "ab"),  # tags without a flag: hidden text
        ("a \nb\t\n\n c \n", "a\nb\n\n c"),
        (" Paris\n\n", "Paris"),
        ("\n \n  x = 1\n  y = 2", "  x = 1\n  y = 2"),
        ("Ã\u200b©", "é"),  # broken once more after it was broken
        ("ก\u200bข\u200b\u200bค \u200b ง", "ก\u200bข\u200bค  ง"),
    ],
)
def test_what_is_broken_is_mended(broken: str, mended: str) -> None:
    assert normalised(broken) == mended


@pytest.mark.parametrize(
    "text",
    [
        "It’s “quoted” — and so on…",
        "« Où est l’œuvre ? » Œdipe, naïve, ÀÉÎ.",
        "„Straße“, Łódź, Đorđe, Ğ ı, Việt Nam, ñandú",
        "Ἀρχὴ ἥμισυ παντός. Привет, мир! שלום, עולם. مرحبا",
        "日本語、中文、한국어　と　ＦＵＬＬ　ｗｉｄｔｈ ｶﾅ",
        "x² + ½ ≤ √2 ≈ 1.41 ± 3×10⁻³ °C, ∂f/∂x, ∑ᵢ, H₂O, 5 µm",
        r"\(\frac{a}{b}\) and $x_1 \\ \alpha$ and $$\int f$$",
        "ﬁnd the ﬂow &lt;b&gt; &amp; \\u00e9 \\x92",
        "├── a\n│   └── b\n╔══╗\n▓▓░░ ✓ ✗ → ⇒ ★",
        "می\u200cخواهم هم\u200cچنین",  # Persian needs its non-joiners
        "क्\u200dष र्\u200cक",  # and Hindi both
        f"{FAMILY} {RAINBOW} {WALES} 👍🏽 ❤\ufe0f\u200d🔥",
        "مرحبا \u200fab\u200e 123",  # direction marks among letters from right to left
        "def f():\n    if x:\n\treturn 1",
        "    return x",
        "Roses are red,  \nviolets are blue.",  # Markdown's line break
        "```diff\n- a \n+ b\t\n \n```",  # white space that code means
        "Broken text such as `schÃ¶n` and\n```\nâ€™ cafe\u0301\n```",
        "UTF-8 read as Latin-1 shows é as Ã©.",
        "$5 — £3 — €4 — ¥2 © ® ™ § ¶",
        "¿Qué? ¡Sí! nº 1, 2ª",
        "",
    ],
)
def test_what_is_meant_stays(text: str) -> None:
    assert normalised(text) == text


# Everything that any of the rules looks at, so that they meet.
PIECES = [
    *"aÃ©â€™œ\x92\xa0\xad \t\n\r\x0b\x00`",
    *"\u200b\u200c\u200d\u2060\ufeff\u200f\u202e\u2028\u0301\ufe0f",
    *("```", "  ", "  \n", "ก", "م", "👩", "🏳", "\U0001f3f4", "\U000e0067", "\U000e007f", "\x1b[0m", "\x1b", "[31m"),
    *("Ã\xa0", "â€\x9d", "Ã¢â‚¬â„¢", "utf-8", "Ð¿", "\u2126", "\u0958"),
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.text(
    alphabet=st.characters(exclude_categories=["Cs"]), max_size=30
)


@settings(derandomize=True, deadline=None, max_examples=600)
@given(TEXT)
def test_a_second_run_changes_nothing(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(alphabet=st.characters(codec="ascii", categories=["L", "N", "P", "S"]), max_size=40))
def test_plain_signs_are_never_changed(text: str) -> None:
    assert normalised(text) == text


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(alphabet="äöüßéèêàçñøåłžščř ", min_size=4, max_size=30))
def test_a_broken_encoding_is_undone(text: str) -> None:
    """Words of several letters, read as Windows-1252 though they are UTF-8, come out as they were."""
    whole = "Lösung für " + " ".join(text.split())
    try:
        broken = whole.encode().decode("cp1252")
    except UnicodeDecodeError:  # some bytes have no letter there
        return
    assert normalised(broken) == normalised(whole)


def test_what_is_not_looked_at_would_not_have_been_mended() -> None:
    """Texts of ASCII and the usual quotation marks and dashes are spared ftfy: no three of them look broken to it."""
    signs = [*"‘’“”–—…•", *"aA1 .?!,(/", "\n"]
    assert not any(is_bad("".join(three)) for three in itertools.product(signs, repeat=3))


def demonstration(answer: str) -> Record:
    return {"prompt": user_prompt("Why?"), "completion": assistant_answer(answer)}


def pair(chosen: str, rejected: str) -> Record:
    return {"prompt": user_prompt("Why?"), "chosen": assistant_answer(chosen), "rejected": assistant_answer(rejected)}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (demonstration(" \u200b\n"), "with an empty answer"),
        (pair("\ufeff", "b"), "with an empty chosen answer"),
        (pair("It’s so.", "Itâ€™s so.\r\n"), "with identical chosen and rejected"),
        ({"prompt": user_prompt("\u200b"), "completion": assistant_answer("a")}, "with an empty prompt"),
    ],
)
def test_rows_of_which_nothing_is_left(record: Record, reason: str) -> None:
    assert normalise().apply(record) == Left(reason)


def test_a_rejected_answer_may_be_empty() -> None:
    assert normalise().apply(pair("a", " ")) == pair("a", "")


def test_the_very_same_record_comes_out_where_nothing_is_broken() -> None:
    step = pickle.loads(pickle.dumps(normalise()))
    for record in (demonstration("Because."), pair("Weil es so ist — für immer.", "nein")):
        assert step.apply(record) is record
    assert not step.private


@pytest.mark.parametrize(
    "unit", ["Ã", "é", "e\u0301", " ", " \n", "ก\u200b", "\u200d", "\U0001f3f4\U000e0067", "\r", "â€", "\x1b["]
)
def test_hostile_text_takes_linear_time(unit: str) -> None:
    text = "ä" + unit * (1_000_000 // len(unit))
    start = time.process_time()
    normalised(text)
    assert time.process_time() - start < 4
