"""Texts that say the same: exactly (a key), or nearly (MinHash signatures, found by bands, checked one by one).

How alike two texts are is the Jaccard similarity of their sets of two-word shingles: shingles of both over shingles of
either, without case, punctuation and white space. Replacing one of w words changes two of w - 1 shingles, so that at
the default threshold of 0.8 texts may differ in about one word of eighteen, and one other word inside a question of
fewer than that makes it another question. How often a text repeats itself makes no difference to its set. Texts of
fewer than three words have no set worth comparing: they are alike where their exact keys are equal.

A signature holds, for each of 128 orders of all shingles (Broder 1997), the first one of the text. The share of places
in which two signatures agree estimates the similarity without bias, with a standard deviation of sqrt(s (1 - s) / 128):
0.035 at 0.8. Texts that are nowhere near the threshold are therefore never taken for alike; those within 0.05 of it
fall to either side, and among thousands of rows that are all 0.7 alike to each other 3 in 100 find one that seems
nearer. `similarity=` settles these by the texts themselves.

Names: `rows` are texts by number; a `band` is `width` neighbouring places of a signature, and rows that agree in a
whole band are candidates. All of it is numpy: `sign` takes a sixth of the time of datasketch 2.0's MinHash (a third of
that of its bulk interface), and its MinHashLSH takes 14 s and 790 MiB for 100,000 rows, where the keys of one band
after another take a second and 8 bytes a row. datasketch is the oracle of the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b, shake_128
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any
from zlib import crc32

import numpy as np

Array = np.ndarray[Any, Any]

PERMUTATIONS = 128
SHORTEST = 3  # words of a text that is compared by its shingles
MISSED = 0.01  # share of pairs exactly at the threshold that may share no band
BLOCK = 2048  # shingles whose 128 hashes are held at a time: 1 MiB, which stays in the cache
COMPARED = 2**16  # pairs of signatures held at a time: 64 MiB

# Scripts without spaces between words: there every character counts as a word.
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
# Marks that only separate: told one by one because \w would also break words at the vowel signs of Indic scripts.
_MARKS = (
    r"!-/:-@\[-\^`{-~"
    "\x00-\x1f\x7f-\xa9\xab-\xb1\xb4\xb6-\xb8\xbb\xbf\xd7\xf7\u060c\u061b\u061f\u066a-\u066d\u06d4\u0964\u0965"
    "\u2000-\u206f\u2212\u3000-\u3004\u3006-\u303f\ud800-\udfff\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_SPELT = rf"[^\s{_MARKS}{_ALONE}]+|[{_ALONE}]"
_WORD = re.compile(_SPELT)
# Signs of arithmetic make a difference: 12 + 5 and 12 - 5 are two questions.
_WORD_OR_SIGN = re.compile(rf"{_SPELT}|[+/^=<>%×÷]|[-−](?=\s*\d)")


def words(text: str, signs: bool = False) -> list[str]:
    """The words of a text without case and punctuation; with `signs`, signs of arithmetic are words too.

    >>> words("Don't: 3 + 4 = 7!")
    ['don', 't', '3', '4', '7']
    """
    return (_WORD_OR_SIGN if signs else _WORD).findall(text.casefold())


def codes(found: Sequence[str]) -> Array:
    """A number for every word, the same on every machine: (words,) uint32."""
    return np.fromiter(map(crc32, map(str.encode, found)), np.uint32, len(found))


def exact_key(text: str) -> bytes:
    """128 bits that are equal for texts that differ in case and white space alone."""
    return blake2b(_plain(text), digest_size=16).digest()


def _plain(text: str) -> bytes:
    return " ".join(text.casefold().split()).encode("utf-8", "surrogatepass")


def jaccard(one: str, other: str) -> float:
    """How alike two texts are, between 0 and 1, by the texts themselves: what signatures estimate.

    >>> jaccard("the cat sat on the mat", "The cat sat on a mat.")  # 3 of 7 shingles: the-cat, cat-sat, sat-on
    0.42857142857142855
    """
    first, second = words(one, signs=True), words(other, signs=True)
    if min(len(first), len(second)) < SHORTEST:
        return float(_plain(one) == _plain(other))
    mine, theirs = set(pairwise(first)), set(pairwise(second))
    return len(mine & theirs) / len(mine | theirs)


def spread(count: int, seed: int) -> Array:
    """(count,) uint64 that look random and are all odd: SplitMix64, since no library promises its numbers for ever."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mixed(steps + np.uint64(seed)) | np.uint64(1)


def _mixed(numbers: Array) -> Array:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of the result depends on every bit of the number."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


_LEFT, _RIGHT = spread(2, seed=1)
# An odd multiplier permutes the numbers below 2^32; the hashes of shingles are random already, and need no addend.
_ORDERS = (spread(PERMUTATIONS, seed=2) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def sign(texts: Sequence[str]) -> Array:
    """The signatures of texts: (rows, PERMUTATIONS) uint32, each from its text alone, the same on every machine."""
    signatures = np.empty((len(texts), PERMUTATIONS), np.uint32)
    long, found = [], []
    for row, text in enumerate(texts):
        told = words(text, signs=True)
        if len(told) < SHORTEST:
            signatures[row] = np.frombuffer(shake_128(_plain(text)).digest(4 * PERMUTATIONS), "<u4")
        else:
            long.append(row)
            found.append(codes(told))
    if long:
        signatures[long] = _minima(*_shingles(found))
    return signatures


def _shingles(found: list[Array]) -> tuple[Array, Array]:
    """(shingles,) uint32 of all texts one after another, and (texts,) where each text's begin."""
    flat = np.concatenate(found).astype(np.uint64)
    ends = np.cumsum([len(each) for each in found])
    hashes = (_mixed(flat[:-1] * _LEFT + flat[1:] * _RIGHT) >> np.uint64(32)).astype(np.uint32)
    within = np.delete(hashes, ends[:-1] - 1)  # without those of the last word of a text and the first of the next
    return within, np.concatenate([[0], ends[:-1] - np.arange(1, len(ends))])


def _minima(shingles: Array, starts: Array) -> Array:
    """Of every text the least of its shingles in each order: (texts, PERMUTATIONS) uint32."""
    least = np.full((len(starts), PERMUTATIONS), np.iinfo(np.uint32).max, np.uint32)
    for row, (start, end) in enumerate(pairwise([*starts.tolist(), len(shingles)])):
        for begin in range(start, end, BLOCK):
            block = shingles[begin : min(begin + BLOCK, end), None] * _ORDERS
            # Not np.minimum.reduceat over all texts at once, which takes three times as long an element.
            np.minimum(least[row], block.min(axis=0), out=least[row])
    return least


def estimate(signatures: Array, one: Array, other: Array) -> Array:
    """Similarity of pairs of rows by their signatures: (pairs,) between 0 and 1."""
    alike = np.empty(len(one))
    for begin in range(0, len(one), COMPARED):
        part = slice(begin, begin + COMPARED)
        alike[part] = (signatures[one[part]] == signatures[other[part]]).mean(axis=1)
    return alike


def clusters(signatures: Array, threshold: float, similarity: Callable[[int, int], float] | None = None) -> Array:
    """Rows that are nearly the same as an earlier one, in near linear time and memory.

    The first row of a cluster leads it, and every member is as alike to it as the threshold says: a chain of small
    changes ends where it has gone too far. A row that is alike to several leaders goes to the earliest.

    Args:
        signatures: (rows, PERMUTATIONS) of `sign`.
        threshold: least similarity within a cluster, over 0 and at most 1.
        similarity: of two rows by number, where their signatures' estimate is not exact enough; rows of equal
            signatures are not asked about.

    Returns:
        (rows,) int64, the number of the first row of each row's cluster: its own where it is alone, or the first.
    """
    assert 0 < threshold <= 1
    # Equal signatures are one row from here on: short answers come a hundred thousand times.
    first, same = _equal(signatures)
    # What the texts will decide is asked for three standard deviations below the threshold.
    slack = 3 * (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5 if similarity else 0.0
    earlier, later = _candidates(signatures, first, threshold, threshold - slack)
    leaders = list(range(len(signatures)))

    def estimated(one: int, other: int) -> float:
        return np.count_nonzero(signatures[one] == signatures[other]) / PERMUTATIONS

    alike = similarity or estimated
    for row, pairs in groupby(_one_by_one(later, earlier), key=itemgetter(0)):
        # The leaders of earlier rows are settled. An earlier row that is alike stands for its whole cluster.
        for leader in sorted({leaders[other] for _, other in pairs}):
            if alike(leader, row) >= threshold:
                leaders[row] = leader
                break
    return np.array(leaders, np.int64)[first[same]]


def _one_by_one(first: Array, second: Array) -> Iterator[tuple[int, int]]:
    """Two arrays side by side as numbers of Python: a part at a time, since these take nine times the memory."""
    for begin in range(0, len(first), COMPARED):
        part = slice(begin, begin + COMPARED)
        yield from zip(first[part].tolist(), second[part].tolist(), strict=True)


def _equal(signatures: Array) -> tuple[Array, Array]:
    """(distinct,) the first row of every signature, ascending, and (rows,) which of these each row is equal to."""
    keys = np.ascontiguousarray(signatures).view(np.uint64) @ spread(PERMUTATIONS // 2, seed=4)
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[group]


def _candidates(signatures: Array, first: Array, threshold: float, least: float) -> tuple[Array, Array]:
    """Pairs (earlier row, later row) of the rows `first` that share a band and whose estimate is at least `least`.

    They come by later row, then by earlier. Within a band every row meets two others that share it: the first, and the
    one before it. The pairs are so in proportion to the rows, whatever all rows have in common.
    """
    rows, width = len(first), band_width(threshold)
    bands = PERMUTATIONS // width
    keys = (_band(signatures, number % bands, width)[first] for number in range(bands + 1))
    found = []
    for key, tie in pairwise(keys):
        met = _met(key, tie)
        found.append(met[estimate(signatures, first[met % rows], first[met // rows]) >= least])
    once = np.unique(np.concatenate(found))
    return first[once % rows], first[once // rows]


def band_width(threshold: float) -> int:
    """Places of a band: the most with which a pair at the threshold shares one with probability 1 - MISSED.

    >>> band_width(0.8)  # 21 bands of 6: 1 - (1 - 0.8**6)**21 = 0.998
    6
    """
    fine = [1]
    for width in range(2, PERMUTATIONS + 1):
        if (1 - threshold**width) ** (PERMUTATIONS // width) <= MISSED:
            fine.append(width)
    return max(fine)


def _band(signatures: Array, number: int, width: int) -> Array:
    """(rows,) uint64, equal for rows that agree in the whole band."""
    key = np.zeros(len(signatures), np.uint64)
    for place in range(number * width, (number + 1) * width):
        key = _mixed(key + signatures[:, place] * _LEFT)
    return key


def _met(key: Array, tie: Array) -> Array:
    """The pairs that meet in one band, each as one number: later * rows + earlier.

    Among those that share a key, rows that share the next band's key as well stand together: where a common phrase
    brings thousands into one band, what is really alike still meets.
    """
    order = np.argsort(key)
    same = np.diff(key[order]) == 0
    shared = order[np.append(same, False) | np.append(False, same)] if len(order) else order
    if not len(shared):
        return shared
    shared = shared[np.lexsort((shared, tie[shared], key[shared]))]
    begins = np.flatnonzero(np.diff(key[shared], prepend=~key[shared[0]]))
    sizes = np.diff(begins, append=len(shared))
    first = np.repeat(np.minimum.reduceat(shared, begins), sizes)
    before = np.roll(shared, 1)
    before[begins] = shared[begins]
    one, other = np.concatenate([first, before]), np.concatenate([shared, shared])
    pairs = np.maximum(one, other) * len(key) + np.minimum(one, other)
    return np.unique(pairs[one != other])
