"""Answers that no model should learn to give: that repeat themselves, are left over from a page, break off, refuse.

Every check looks at the completion or the chosen answer alone. They are made so that a whole answer is hardly ever left
out (songs, lists, tables, code, other scripts and single words are whole answers), at the price of missing some.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Literal

from align.data.prepare.breaks import breaks_off
from align.data.prepare.steps import Left, Step
from align.data.prepare.texts import FENCED, answer_text_of, prose
from reward.records import Record

Check = Literal["repetition", "boilerplate", "truncated", "refusal"]

RUN = 10  # words whose coming again is a repetition
REPEATED = 0.45  # share of words (or of characters in lines) from which on an answer repeats itself
FEWEST_WORDS = 40  # fewer words are not judged: laughter, refrains, counting
SAME_CHARACTER = 100  # in a row


def quality(checks: Sequence[Check]) -> Step:
    """The step of the checks that are asked for; answers labelled false may be as bad as they are."""
    chosen = [name for name in CHECKS if name in checks]
    return Step("quality", functools.partial(_judged, tuple(chosen)))


def _judged(checks: tuple[Check, ...], record: Record) -> Record | Left:
    answer = answer_text_of(record)
    if not answer or record.get("label") is False:
        return record
    for name in checks:
        reason, find = CHECKS[name]
        if (detail := find(answer)) and not _asked_for(name, record):
            return Left(reason, detail)
    return record


_ASKED_FOR = {
    "repetition": re.compile(r"\b(?:repeat|times|lyrics|song|chorus|refrain|pattern|again and again)", re.IGNORECASE),
    "boilerplate": re.compile(
        r"\b(?:cookie|newsletter|subscri|boilerplate|banner|footer|copyright|lorem|ipsum|web ?(?:site|page)|html|"
        r"placeholder|call to action|language model|chat ?bot)",
        re.IGNORECASE,
    ),
}


def _asked_for(name: Check, record: Record) -> bool:
    """Whether the question wants such an answer: the words of a song, the text of a cookie banner."""
    pattern = _ASKED_FOR.get(name)
    return pattern is not None and bool(pattern.search(record["prompt"][-1]["content"]))


# Repetition

# A character of scripts without spaces counts as a word.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+")
_STUCK = re.compile(rf"([^\W\d_])\1{{{SAME_CHARACTER - 1}}}")


def repeats(answer: str) -> str:
    """How much of the answer it has said before, as "62 % of its words"; "" where that is not much.

    Two figures of Rae et al. 2021 (Gopher, arXiv 2112.11446, table A1), over prose without fenced code and tables: the
    share of words in runs of 10 that came before, and of characters in lines that came before. Gopher leaves web pages
    out at 0.10 and 0.20; an answer is shorter, and a song of three verses with a refrain has up to 0.4, so here it is
    `REPEATED` for both. An answer given twice has 0.5. Answers of fewer than `FEWEST_WORDS` words are not judged,
    unless one letter stands `SAME_CHARACTER` times in a row.
    """
    if stuck := _STUCK.search(answer):
        return f"{stuck[1]!r} {SAME_CHARACTER} times and more in a row"
    text = FENCED.sub(" ", answer) if "`" in answer or "~~~" in answer else answer
    if "|" in text:
        text = "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("|"))
    words = _WORD.findall(text.casefold())
    if len(words) < FEWEST_WORDS:
        return ""
    # A word of a run that came before has itself come before: with as many different words there is no need to look.
    if len(set(words)) <= (1 - REPEATED) * len(words) and (share := repeated_words(words)) >= REPEATED:
        return f"{share:.0%} of its words".replace("%", " %")
    if (share := repeated_lines(text)) >= REPEATED:
        return f"{share:.0%} of its lines".replace("%", " %")
    return ""


def repeated_words(words: Sequence[str]) -> float:
    """Share of words that stand in a run of `RUN` words that came before, in [0, 1].

    By hand: a text of 20 different words and then the same again has 40 words, of which 20 came before: 0.5.
    """
    seen: set[tuple[str, ...]] = set()
    repeated = end = 0
    for start, run in enumerate(zip(*(words[i:] for i in range(RUN)), strict=False)):
        if run in seen:
            repeated += start + RUN - max(start, end)
            end = start + RUN
        else:
            seen.add(run)
    return repeated / len(words) if words else 0.0


def repeated_lines(text: str) -> float:
    """Share of the characters in lines of at least 20 that stand in lines that came before, in [0, 1]."""
    lines = [line for line in map(str.strip, text.split("\n")) if len(line) >= 20]
    size = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / size if size else 0.0


# Boilerplate

# At the start of a sentence: what chat programs say of themselves, and what they leave around an answer.
_OF_CHAT = (
    r"as an? (?:ai|artificial intelligence)(?: large)?(?: language)?(?: model| assistant)?,? "
    r"(?:i|my|it's|it is)\b|as a (?:large )?language model,? i\b|"
    r"i(?:'m| am) (?:just |only )?an? (?:ai )?language model\b|"
    r"my (?:knowledge|training data) (?:cut-?off|only goes up to|has a cut-?off)\b"
)
# At the start of a line: what stands around the text of a web page.
_OF_PAGES = (
    r"click here to (?:subscribe|read|learn|download|view|see|sign|get|register|continue|buy)\b|"
    r"(?:this (?:web ?)?site|we|our (?:web ?)?site) uses? cookies\b|"
    r"by (?:continuing to (?:use|browse)|using) this (?:web ?)?site\b|"
    r"accept (?:all )?cookies\b|(?:subscribe|sign up) (?:to|for) our (?:free |weekly |monthly |daily )?newsletter\b|"
    r"(?:©|\(c\)|copyright ©?) ?\d{4}\b.{0,80}all rights reserved|all rights reserved\.?$|"
    r"please enable javascript\b|you (?:must|need to) be logged in to\b|"
    r"share (?:this )?(?:post |article |page )?on (?:facebook|twitter|linkedin)\b|"
    r"lorem ipsum dolor sit amet\b|skip to (?:main )?content$|regenerate response$|advertisement$|404 not found$"
)
_BOILERPLATE = re.compile(
    rf"(?:^|[.!?]\s{{1,4}}|\n\s{{0,8}})(?P<chat>{_OF_CHAT})|^[ \t]{{0,8}}(?P<page>{_OF_PAGES})",
    re.IGNORECASE | re.MULTILINE,
)


def boilerplate(answer: str) -> str:
    """The first words of boilerplate in an answer, outside code and not in quotation marks; "" where there is none."""
    found = _BOILERPLATE.search(prose(answer).replace("’", "'"))
    return (found["chat"] or found["page"])[:60] if found else ""


# Refusals


def refuses(answer: str) -> str:
    """Why an answer counts as declining, by the detector of the reports (`align.compare.texts.is_refusal`)."""
    from align.compare.texts import is_refusal  # late: it brings scipy

    return "opens as an answer that declines" if is_refusal(answer) else ""


CHECKS: dict[Check, tuple[str, Callable[[str], str]]] = {
    "repetition": ("that repeats itself", repeats),
    "boilerplate": ("of boilerplate", boilerplate),
    "truncated": ("that breaks off", breaks_off),
    "refusal": ("that refuses", refuses),
}
