"""What one answer says that another does not, word by word."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import pairwise

Segment = tuple[str, bool]  # a stretch of text, and whether it is new

# White space; one character of a script that writes no spaces between words; any other run of characters.
_TOKENS = re.compile(r"\s+|[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
# The matcher takes time in proportion to the pairs of equal words, over and over: at these bounds a second at
# worst. They hold what the ends do not share: two texts that differ in one place are compared whatever their length.
MOST_WORDS, MOST_PAIRS = 1_000, 15_000


def new_words(old: str, new: str) -> list[Segment] | None:
    """`new` cut into stretches, those that `old` does not have at this place marked; joined, they are `new` again.

    White space that differs is no difference; between two new words it belongs to them. None where the texts are too
    long and too different to be compared in a moment.

    By hand: old "a red house", new "a blue house" gives ("a ", False), ("blue", True), (" house", False).
    """
    tokens = _TOKENS.findall(new)
    places = [place for place, token in enumerate(tokens) if not token.isspace()]
    kept = _kept([token for token in _TOKENS.findall(old) if not token.isspace()], [tokens[i] for i in places])
    if kept is None:
        return None
    is_new = [False] * len(tokens)
    for place, is_kept in zip(places, kept, strict=True):
        is_new[place] = not is_kept
    for before, after in pairwise(places):
        if after == before + 2:
            is_new[before + 1] = is_new[before] and is_new[after]
    found: list[Segment] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or is_new[end] != is_new[start]:
            found.append(("".join(tokens[start:end]), is_new[start]))
            start = end
    return found


def _kept(old: Sequence[str], new: Sequence[str]) -> list[bool] | None:
    """Which words of `new` are words of `old` in the same order; None where finding out would take too long."""
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    old, middle = old[head : len(old) - tail], new[head : len(new) - tail]
    counts, others = Counter(old), Counter(middle)
    if max(len(old), len(middle)) > MOST_WORDS or sum(counts[w] * n for w, n in others.items()) > MOST_PAIRS:
        return None
    found = [False] * len(middle)
    for block in SequenceMatcher(None, old, middle, autojunk=False).get_matching_blocks():
        found[block.b : block.b + block.size] = [True] * block.size
    return [True] * head + found + [True] * tail
