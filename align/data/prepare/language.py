"""Rows in other languages than those asked for, by py3langid (BSD-3, 139 languages; langid.py, Lui and Baldwin 2012).

A row is left out only where the model is sure: short texts, code, numbers and mixtures of languages stay. Measured on
107 pieces, of 30 bytes of letters, of 40 sentences in ten languages (`tests/align/data/prepare/test_language.py`): none
is left out where its own language is wanted, and 95 % are where another is.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.data.prepare.steps import Left, Step
from align.data.prepare.texts import answer_text_of, prose
from reward.records import InputError, Record

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

TOO_SHORT = 30  # bytes of letters: about 30 letters of English, 15 of Russian or Hebrew, 10 of Chinese
# A row is left out where the languages asked for have together at most this probability, and another at least that. The
# second keeps lists of names and dishes, whose probability is spread; the first alone would not.
UNLIKELY, SURE = 0.02, 0.6
LOOKED_AT = 150  # characters of the last turn of the prompt, and of the answer
NO_LANGUAGE = "zxx"  # the model's label for numbers, markup and names

_NOT_LETTERS = re.compile(r"[\W\d_]+")
# What people write for a language, where no code is near it.
_OTHERWISE = {
    "arabic": "ar", "bengali": "bn", "chinese": "zh", "mandarin": "zh", "cn": "zh", "czech": "cs", "cz": "cs",
    "danish": "da", "dk": "da", "dutch": "nl", "nederlands": "nl", "english": "en", "eng": "en", "us": "en", "gb": "en",
    "finnish": "fi", "french": "fr", "français": "fr", "fra": "fr", "german": "de", "deutsch": "de", "deu": "de",
    "ger": "de", "greek": "el", "gr": "el", "hebrew": "he", "hindi": "hi", "indonesian": "id", "italian": "it",
    "italiano": "it", "japanese": "ja", "jp": "ja", "korean": "ko", "kr": "ko", "nb": "no", "norwegian": "no",
    "persian": "fa", "farsi": "fa", "polish": "pl", "polski": "pl", "portuguese": "pt", "português": "pt",
    "russian": "ru", "spanish": "es", "español": "es", "spa": "es", "swedish": "sv", "svenska": "sv", "turkish": "tr",
    "ua": "uk", "ukrainian": "uk", "vietnamese": "vi", "vn": "vi",
}  # fmt: skip


def language(wanted: Sequence[str]) -> Step:
    """The step that leaves out rows that are surely in none of the languages.

    Args:
        wanted: codes as py3langid has them, ISO 639-1 where a language has one: "en", "pt", "zh".

    Raises:
        InputError: a code that no language has.
    """
    check_codes(wanted)
    return Step("language", functools.partial(_in_language, frozenset(wanted)))


def _in_language(wanted: frozenset[str], record: Record) -> Record | Left:
    code = other_language(text_to_tell(record), wanted)
    return Left("in another language", code) if code else record


def other_language(text: str, wanted: frozenset[str]) -> str:
    """The language of a text that is surely in none of those wanted; "" where it is in one, or that is hard to tell."""
    if len(_NOT_LETTERS.sub("", text).encode(errors="replace")) < TOO_SHORT:
        return ""
    code, probability = _model().classify(text)
    if code in wanted or code == NO_LANGUAGE or probability < SURE:
        return ""
    of_wanted = sum(other for name, other in _model().rank(text) if name in wanted)
    return str(code) if of_wanted <= UNLIKELY else ""


def text_to_tell(record: Record) -> str:
    """The beginning of the last turn of the prompt and of the answer, without code and addresses."""
    asked = prose(record["prompt"][-1]["content"][: 4 * LOOKED_AT])
    answer = prose(answer_text_of(record)[: 4 * LOOKED_AT])
    return f"{asked.strip()[:LOOKED_AT]}\n{answer.strip()[:LOOKED_AT]}"


def check_codes(codes: Sequence[str]) -> None:
    """Refuse codes of no language that the model knows.

    Raises:
        InputError: names the nearest known code.
    """
    known = sorted(label for label in _model().labels if label != NO_LANGUAGE)
    for code in codes:
        if code not in known:
            near = _nearest(code, known)
            hint = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}."
            raise InputError(
                f"prepare.languages names {code!r}, but codes of ISO 639 are wanted, such as en, de or zh: {hint}"
            )


def _nearest(code: str, known: Sequence[str]) -> str:
    plain = re.split(r"[-_ ]", code.strip().casefold())[0]  # "en" of "EN", "en-GB", "en_US"
    if plain in known:
        return plain
    if len(plain) > 3:
        close = difflib.get_close_matches(plain, _OTHERWISE, n=1, cutoff=0.6)
        return _OTHERWISE[close[0]] if close else ""
    return _OTHERWISE.get(plain) or difflib.get_close_matches(plain, known, n=1, cutoff=0.0)[0]


@functools.cache
def _model() -> LanguageIdentifier:
    """The model, once a process: 5 MB on disk, about half a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
