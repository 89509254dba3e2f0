"""Near-duplicates: signatures against exact similarity and datasketch, clusters against every pair compared."""

from __future__ import annotations

import hashlib
import os
import random
import string
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.prepare import duplicates
from align.data.prepare.duplicates import (
    PERMUTATIONS,
    band_width,
    clusters,
    estimate,
    exact_key,
    jaccard,
    sign,
    words,
)

VOCABULARY = [a + b + c for a in "bdfgk" for b in "aeiou" for c in string.ascii_lowercase]


def made_up(draw: random.Random, length: int) -> list[str]:
    return draw.choices(VOCABULARY, k=length)


def replaced(draw: random.Random, text: list[str], count: int) -> list[str]:
    """The text with `count` of its words, far from each other, replaced by new ones."""
    edited = list(text)
    for place in draw.sample(range(1, len(text) - 1, 3), count):
        edited[place] = f"new{draw.random()}".replace(".", "")
    return edited


# Words and keys

HINDI = "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don't stop, believing!", "don t stop believing"),
        ("Don\u2019t \u201cstop\u201d\u2014believing\u2026", "don t stop believing"),
        ("snake_case, x\u00b2 and na\u00efve", "snake_case x\u00b2 and na\u00efve"),
        ("Stra\u00dfe", "strasse"),
        ("\u4e2d\u6587, ok", "\u4e2d \u6587 ok"),
        ("\u65e5\u672c\u306e", "\u65e5 \u672c \u306e"),
        (f"{HINDI}\u0964", HINDI),
        ("\u0e44\u0e17\u0e22", "\u0e44 \u0e17 \u0e22"),
        ("half \ud800 a character", "half a character"),
        ("?! ... \u2014", ""),
        ("2+3 = 5", "2 3 5"),
    ],
)  # fmt: skip
def test_words(text: str, wanted: str) -> None:
    assert words(text) == wanted.split()


def test_signs_of_arithmetic_are_words_where_they_are_asked_for() -> None:
    assert words("2+3 = 5, 7-4, well-known", signs=True) == ["2", "+", "3", "=", "5", "7", "-", "4", "well", "known"]
    first, second = (f"Reckon step by step and say only the result: 12 {sign} 5 {sign} 7 {sign} 1" for sign in "+-")
    assert jaccard(first, second) < 0.8


@given(st.text(), st.text())
def test_exact_keys_are_equal_where_the_texts_are_but_for_case_and_white_space(one: str, other: str) -> None:
    assert (exact_key(one) == exact_key(other)) == (one.casefold().split() == other.casefold().split())
    assert exact_key(one) == exact_key(f" \n{one}\t") and len(exact_key(one)) == 16


def test_exact_keys_of_texts_that_look_alike() -> None:
    assert exact_key("The  sky\nis BLUE") == exact_key("the sky is blue") != exact_key("the sky is blue.")
    assert exact_key("a b") != exact_key("ab")
    assert exact_key("\ud800") != exact_key("")


# Signatures


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="ab .\u4e2d", max_size=40), max_size=8))
def test_a_signature_depends_on_its_text_alone(texts: list[str]) -> None:
    signatures = sign(texts)
    assert signatures.shape == (len(texts), PERMUTATIONS) and signatures.dtype == np.uint32
    for text, row in zip(texts, signatures, strict=True):
        assert np.array_equal(sign([text])[0], row)


def test_texts_longer_than_a_block_are_signed_as_the_definition_says(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    texts = [" ".join(made_up(draw, length)) for length in (3, 200, 4, 70, 65, 64, 1000, 3)]
    whole = sign(texts)
    monkeypatch.setattr(duplicates, "BLOCK", 64)
    assert np.array_equal(sign(texts), whole)
    # Of all shingles of a text, the least in each order; a text's signature is that of the union of its halves.
    long = made_up(draw, 300)
    halves = sign([" ".join(long[:151]), " ".join(long[150:])])
    assert np.array_equal(sign([" ".join(long)])[0], halves.min(axis=0))


def test_signatures_are_the_same_in_every_process_and_for_ever() -> None:
    texts = ["The quick brown fox jumps over the lazy dog.", "", "yes", "\u4e2d\u6587\u5b57 2+3"]
    program = (
        "import sys, hashlib; from align.data.prepare.duplicates import sign;"
        f"print(hashlib.sha256(sign({texts!a}).astype('<u4').tobytes()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    mine = hashlib.sha256(sign(texts).astype("<u4").tobytes()).hexdigest()
    assert done.stdout.strip() == mine, done.stderr
    assert mine == "284a57950877dd11a9c03f264640ce1f44415218c74e6ea662cc4a5ca856463e"


def test_estimates_are_unbiased_and_as_exact_as_theory_says() -> None:
    draw = random.Random(1)
    texts = [made_up(draw, 80) for _ in range(600)]
    edited = [replaced(draw, text, draw.randint(0, 20)) for text in texts]
    one, other = [" ".join(text) for text in texts], [" ".join(text) for text in edited]
    true = np.array([jaccard(*pair) for pair in zip(one, other, strict=True)])
    told = estimate(np.concatenate([sign(one), sign(other)]), np.arange(600), np.arange(600, 1200))
    variance = (true * (1 - true)).mean() / PERMUTATIONS  # of a share of 128 draws
    assert abs((told - true).mean()) < 4 * (variance / 600) ** 0.5
    assert 0.8 < ((told - true) ** 2).mean() / variance < 1.2
    assert true.min() < 0.4 and (told[true == 1] == 1).all()


def test_unlike_texts_have_unlike_signatures() -> None:
    draw = random.Random(2)
    signatures = sign([" ".join(made_up(draw, draw.randint(3, 60))) for _ in range(500)])
    one, other = np.triu_indices(500, 1)
    assert estimate(signatures, one, other).max() < 0.1


def test_estimates_agree_with_datasketch() -> None:
    datasketch = pytest.importorskip("datasketch")
    draw = random.Random(3)
    mine, theirs = [], []
    for edits in range(21):
        text = made_up(draw, 80)
        pair = [text, replaced(draw, text, edits)]
        sketches = [datasketch.MinHash(num_perm=512, seed=5) for _ in pair]
        for sketch, told in zip(sketches, pair, strict=True):
            sketch.update_batch([" ".join(shingle).encode() for shingle in pairwise(told)])
        theirs.append(sketches[0].jaccard(sketches[1]))
        mine.append(estimate(sign([" ".join(told) for told in pair]), np.array([0]), np.array([1]))[0])
    error = np.subtract(mine, theirs)
    assert np.abs(error).max() < 4 * (0.25 / 128 + 0.25 / 512) ** 0.5 and abs(error.mean()) < 0.04


@given(st.text(max_size=30), st.text(max_size=30))
def test_jaccard_is_symmetric_and_one_for_equal_texts(one: str, other: str) -> None:
    assert jaccard(one, one) == 1 and jaccard(one, other) == jaccard(other, one)
    assert 0 <= jaccard(one, other) <= 1


# Clusters


def by_every_pair(texts: list[str], threshold: float) -> list[int]:
    """What `clusters` is to find, row after row against every leader before it."""
    leaders: list[int] = []
    found = []
    for row, text in enumerate(texts):
        found.append(next((each for each in leaders if jaccard(texts[each], text) >= threshold), row))
        if found[-1] == row:
            leaders.append(row)
    return found


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_by_text_are_those_of_all_pairs(threshold: float, seed: int) -> None:
    draw = random.Random(seed)
    texts: list[list[str]] = []
    for _ in range(200):
        if texts and draw.random() < 0.5:
            texts.append(replaced(draw, draw.choice(texts), draw.randint(0, 6)))
        else:
            texts.append(made_up(draw, 60))
    told = [" ".join(text) for text in texts]
    wanted = by_every_pair(told, threshold)
    found = clusters(sign(told), threshold, lambda one, other: jaccard(told[one], told[other])).tolist()
    # A pair at the very threshold shares no band once in a hundred times.
    assert sum(a != b for a, b in zip(found, wanted, strict=True)) <= 3
    assert all(leader == row or jaccard(told[leader], told[row]) >= threshold for row, leader in enumerate(found))


def test_planted_duplicates_are_found_and_nothing_else() -> None:
    draw = random.Random(4)
    texts = [made_up(draw, draw.randint(40, 120)) for _ in range(1500)]
    origin = list(range(1500))
    for _ in range(500):
        number = draw.randrange(1500)
        texts.append(replaced(draw, texts[number], round(0.03 * len(texts[number]))))
        origin.append(number)
    found = clusters(sign([" ".join(text) for text in texts]), 0.8)
    assert np.mean(found[1500:] == origin[1500:]) >= 0.95
    assert all(origin[leader] == origin[row] for row, leader in enumerate(found))


def test_rows_that_share_a_template_meet_their_duplicates_alone() -> None:
    draw = random.Random(5)
    frame = made_up(draw, 60)
    texts = [frame + made_up(draw, 25) for _ in range(2000)]  # 0.54 alike: many bands are shared by hundreds
    copies = [replaced(draw, text, 1) for text in texts[::20]]
    found = clusters(sign([" ".join(text) for text in texts + copies]), 0.8)
    assert np.array_equal(found[:2000], np.arange(2000))
    assert np.mean(found[2000:] == np.arange(0, 2000, 20)) >= 0.95


def test_a_chain_of_small_changes_ends() -> None:
    draw = random.Random(6)
    chain = [made_up(draw, 100)]
    for place in range(2, 98):
        chain.append([*chain[-1][:place], f"new{place}", *chain[-1][place + 1 :]])
    texts = [" ".join(text) for text in chain]
    assert min(jaccard(*pair) for pair in pairwise(texts)) > 0.9
    found = clusters(sign(texts), 0.8, lambda one, other: jaccard(texts[one], texts[other]))
    assert min(jaccard(texts[leader], text) for leader, text in zip(found, texts, strict=True)) >= 0.8
    assert 4 <= len(set(found)) <= 20
    assert all(found[leader] == leader for leader in found)


def test_pairs_grow_with_the_rows_and_not_with_their_square() -> None:
    one, other = sign(["one text that a hundred files have", "and another text that they have"])
    many = np.concatenate([np.repeat([one, other], 50_000, 0), [one]])
    wanted = np.repeat([0, 50_000, 0], [50_000, 50_000, 1])
    assert np.array_equal(clusters(many, 0.8), wanted)
    # Rows that differ in one place each share nearly all bands with all others.
    family = np.repeat(one[None], 3000, 0)
    family[np.arange(3000), np.arange(3000) % PERMUTATIONS] = np.arange(3000)
    earlier, later = duplicates._candidates(family, np.arange(3000), 0.8, 0.8)
    assert len(earlier) <= 2 * 3000 * (PERMUTATIONS // band_width(0.8)) and (earlier < later).all()
    assert not clusters(family, 0.8).any()


def test_very_short_texts_are_alike_only_where_they_are_equal() -> None:
    texts = ["", "  ", "yes", "Yes", "yes!", "no", "thank you", "Thank  you", "thank you!", "?", "!"]
    assert clusters(sign(texts), 0.5).tolist() == [0, 0, 2, 2, 4, 5, 6, 6, 8, 9, 10]
    for row, leader in enumerate(clusters(sign(texts), 0.5)):
        assert jaccard(texts[row], texts[leader]) == 1


def test_one_other_word_makes_another_short_question() -> None:
    texts = [f"What is the capital of {country}?" for country in ("France", "Spain", "Italy", "FRANCE")]
    assert clusters(sign(texts), 0.8).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(("said", "wanted"), [(1.0, [0, 0]), (0.0, [0, 1])])
def test_the_texts_themselves_have_the_last_word(said: float, wanted: list[int]) -> None:
    text = " ".join(made_up(random.Random(7), 40))
    assert clusters(sign([text, text + " and more"]), 0.8, lambda one, other: said).tolist() == wanted


@pytest.mark.parametrize("count", [0, 1])
def test_of_nothing_and_of_one_row(count: int) -> None:
    assert clusters(sign(["a b c d"] * count), 0.8).tolist() == list(range(count))
    assert clusters(sign(["a b c d"] * count), 0.8).dtype == np.int64


@pytest.mark.parametrize("threshold", [0.41, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_are_as_wide_as_the_promise_allows(threshold: float) -> None:
    def missed(width: int) -> float:
        return (1 - threshold**width) ** (PERMUTATIONS // width)

    width = band_width(threshold)
    assert missed(width) <= 0.01 and (width == PERMUTATIONS or missed(width + 1) > 0.01 or threshold == 1)
