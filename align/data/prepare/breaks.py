"""Answers that break off: cut by a length limit, or by whoever copied them, within a word, a sentence, a list or code.

A missing full stop alone proves nothing: people write so, and so do titles, lists, poems and answers of one word. It
counts only where everything else in the answer is punctuated.
"""

from __future__ import annotations

import re

from align.data.prepare.texts import CODE, FENCED

_FEWEST_WORDS = 5  # "42", "Paris", "The Beatles" and "Vitamin B, C and" are not judged by their end
_SENTENCES = 2  # complete ones, before an unfinished one is held against an answer
_FRAGMENT = 4  # words of what is left unfinished after a sentence in the same line
_FRAGMENT_LINE = 8  # words of an unfinished last line, which may be a greeting or a name

_MARKER = re.compile(r"[ \t]*(?:[-*+•]|(\d{1,2})[.)])[ \t]*")
_ITEM = re.compile(r"[ \t]*(?:[-*+•]|\d{1,2}[.)])[ \t]+\S")
_OPENS = re.compile(r"(?<![:;='-])[(\[{“‘«「『]\Z")
_HALF_A_WORD = re.compile(r"[^\W\d_]-\Z")
_COMMA = re.compile(r"[^\W\d_][,，、]\Z")
# No English sentence ends with one of them. "a" is also a word of other languages, and a grade.
_DANGLING = re.compile(r" (?:the|an|a|and|or|because|your|my|their|our|every|whose|than|into|between|including)\Z")
_ENGLISH = re.compile(r"\b(?:the|is|are|to|you|of)\b", re.IGNORECASE)
_ANNOUNCES = re.compile(
    r"\b(?:following|here (?:is|are)|here's|steps|tips|such as|examples?|includes?|including)\b[^\n:]{0,60}:\Z", re.I
)
_SENTENCE_END = re.compile(r"[.!?…؟।](?=[\"'”’)\]*_]{0,3}(?:\s|\Z))|[。！？]")
_GREETING = re.compile(r"\s*(?:yours|sincerely|best|kind|warm|with|love|regards|cheers|thanks?)\b", re.IGNORECASE)
_CLOSERS = "\"'”’»)]}*_`~|>」』】） \t"
_STOPS = tuple(".!?…。！？؟।:;：；,，、")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")


def breaks_off(answer: str) -> str:
    """Where an answer breaks off, as "within a sentence"; "" for one that is, or may be, whole."""
    text = answer.rstrip()
    fences = [*FENCED.finditer(text)] if "`" in text or "~~~" in text else []
    if fences and fences[-1].end() == len(text):
        whole = _closed(fences[-1]) or fences[-1]["fence"][0] == "~"  # a row of tildes may be an ornament
        return "" if whole else "in an open code block"
    line = text[text.rfind("\n") + 1 :]
    if _empty_item(text, line):
        return "at an empty list item"
    if _words(text) < _FEWEST_WORDS or line.lstrip().startswith(("|", "#", "—", "–", ">")):
        return ""
    if _OPENS.search(line):
        return "after an opening bracket"
    if _HALF_A_WORD.search(line):
        return "within a word"
    if _COMMA.search(line) and _words(line) >= _FRAGMENT_LINE:
        return "after a comma"
    if _DANGLING.search(line) and _ENGLISH.search(text[: -len(line.split()[-1])]):
        return f"after {line.split()[-1]!r}"
    if _ANNOUNCES.search(line):
        return "after announcing more"
    if text[-1].isalpha() and _open_bracket(line):
        return "within a bracket"
    return "within a sentence" if _unfinished(CODE.sub("`code`.", text) if fences else text) else ""


def _closed(found: re.Match[str]) -> bool:
    """Whether a fenced block ends with a line that is its fence."""
    last = found.group().rstrip().rpartition("\n")[2].strip()
    return "\n" in found.group() and last.startswith(found["fence"]) and not last.strip(found["fence"][0])


def _empty_item(text: str, line: str) -> bool:
    """Whether the last line is a list marker alone, after an item of the same list."""
    marker = _MARKER.fullmatch(line)
    if not marker or len(line) == len(text):
        return False
    before = [each for each in text[: -len(line)].split("\n") if each.strip()]
    if not marker[1]:
        return bool(before) and bool(_ITEM.match(before[-1])) and line.strip() in ("-", "*", "+", "•")
    wanted = re.compile(rf"[ \t]*{int(marker[1]) - 1}[.)][ \t]+\S")
    return any(wanted.match(each) for each in before)


def _open_bracket(line: str) -> bool:
    """Whether a bracket of the last sentence is never closed; faces such as :( are none."""
    sentence = re.split(r"[.!?。！？]\s", re.sub(r"[:;=]['-]?[()]|(?<!\()\b\w\)", "", line))[-1]
    return any(sentence.count(opening) > sentence.count(closing) for opening, closing in ("()", "[]"))


def _unfinished(text: str) -> bool:
    """Whether the last sentence has no end, in an answer in which all others have one."""
    if not text[-1].isalpha():
        return False
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    if len(ends) < _SENTENCES:
        return False
    start = text.rfind("\n") + 1
    if text[start:].split()[-1].startswith(("#", "@", "http", "www.")):
        return False
    fragment, fewest = (text[ends[-1] :], _FRAGMENT) if ends[-1] > start else (text[start:], _FRAGMENT_LINE)
    if _words(fragment) < fewest or _GREETING.match(fragment):
        return False
    fewest = 1 if _ITEM.match(text[start:]) else _FRAGMENT  # a list is punctuated as a whole, or not
    others = [line for line in text[:start].split("\n") if _words(line) >= fewest and not line.startswith("#")]
    return all(line.rstrip(_CLOSERS).endswith(_STOPS) or not line.rstrip(_CLOSERS)[-1:].isalnum() for line in others)


def _words(text: str) -> int:
    """Words of a text; two characters of Chinese or Japanese count as one."""
    return len(text.split()) + len(_CJK.findall(text)) // 2
