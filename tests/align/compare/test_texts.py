"""Figures of texts: by hand, by property, and against the textbook loop, scikit-learn and sacrebleu."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from align.compare import texts
from align.compare.texts import (
    common_words,
    corpus_bleu,
    distinct,
    is_refusal,
    rouge_l,
    self_similarity,
    text_figures,
    words,
)
from reward.probes import REFUSAL

WORDS = st.lists(st.sampled_from("abcde"), max_size=12)


def test_words_by_hand():
    assert words("Don't  STOP: it’s a well-known_fact, 3.5 km!") == (
        ["don't", "stop", "it’s", "a", "well-known_fact", "3", "5", "km"]
    )
    assert words("… !") == []


def test_distinct_by_hand():
    """Pairs of "a b a" are ab and ba, of "a c" ac; "b a c" across the border would be none of them."""
    assert distinct(["a b a", "A c"], 1) == pytest.approx(3 / 5)
    assert distinct(["a b a", "A c"], 2) == 1
    assert distinct(["the cat the cat"], 2) == pytest.approx(2 / 3)
    assert distinct(["x", ""], 2) == 0


@given(WORDS.filter(bool), st.integers(2, 5))
def test_saying_everything_again_divides_distinct(own, times):
    assert distinct([" ".join(own)] * times, 1) == pytest.approx(distinct([" ".join(own)], 1) / times)


# Self-similarity


def test_self_similarity_by_hand():
    """Words and pairs of "a b" are a, b, ab and of "a c" a, c, ac: one in common of three each, cosine 1/3."""
    found = self_similarity(["a b", "a c"], seed=0)
    assert found is not None
    assert (found["mean"], found["n"]) == (pytest.approx(1 / 3), 2)


def test_self_similarity_of_copies_strangers_and_nothing():
    copies, strangers = ["one two three"] * 9, [f"w{i} x{i}" for i in range(9)]
    same, different = self_similarity(copies, 0), self_similarity(strangers, 0)
    assert same and different
    assert (same["mean"], different["mean"]) == (pytest.approx(1), 0)
    empty, mixed = self_similarity(["", " "], 0), self_similarity(["", "a"], 0)
    assert empty and mixed
    assert (empty["mean"], mixed["mean"]) == (1, 0)
    assert self_similarity(["alone"], 0) is None


def test_self_similarity_is_scikit_learns_mean_cosine():
    """Where there are few answers, each is compared with all others."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    draw = random.Random(0)
    answers = [" ".join(draw.choices("abcdefgh", k=draw.randrange(1, 15))) for _ in range(20)]
    counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+").fit_transform(answers)
    cosine = cosine_similarity(counts)
    wanted = (cosine.sum() - 20) / (20 * 19)
    found = self_similarity(answers, 0)
    assert found and found["mean"] == pytest.approx(wanted)
    assert found["standard_error"] == pytest.approx(((cosine.sum(1) - 1) / 19).std(ddof=1) / np.sqrt(20))


def test_a_sample_of_others_is_near_all_of_them(monkeypatch):
    draw = random.Random(1)
    answers = [" ".join(draw.choices("abcdefghijklmnop", k=20)) for _ in range(200)]
    some, again, other = (self_similarity(answers, seed) for seed in (0, 0, 1))
    assert some == again != other
    monkeypatch.setattr(texts, "OTHERS", 10_000)
    whole = self_similarity(answers, 0)
    assert some and whole and some["mean"] == pytest.approx(whole["mean"], abs=0.01) and some["mean"] != whole["mean"]


# Refusals


@pytest.mark.parametrize(
    "answer",
    [
        REFUSAL,
        "I cannot help with that.",
        "I can’t assist with that request.",
        "I'm sorry, but I can't do that.",
        "I’m sorry, but I cannot tell you how.",
        "SORRY, BUT I CANNOT FULFILL YOUR REQUEST",
        "As an AI language model, I don't have feelings.",
        "As an AI, I have no opinion.",
        "As a language model trained by a company, I have none.",
        "I am unable to provide medical advice.",
        "I'm not able to give you that.",
        "Unfortunately, I cannot provide this.",
        "I apologize, but I'm unable to continue.",
        "My apologies, but we are not able to share it.",
        "I must respectfully decline.",
        "I refuse to answer.",
        "I won't help you with that.",
        "I do not feel comfortable writing this.",
        "That's an interesting question, but I can't answer it.",
        "I'm just an AI, so ask a doctor.",
        "Thanks for asking! I will not provide instructions.",
        "This goes against my guidelines.",
        "Sorry, can't help with that",
    ],
)
def test_refusals_are_seen(answer):
    assert is_refusal(answer) and is_refusal(f"\n  {answer.upper()} {'More words. ' * 50}")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I can't wait to tell you!",
        "I can't help but smile. I can't help laughing.",
        "I'm sorry to hear that. You can't sleep?",
        "I'm sorry for your loss.",
        "I won't give up.",
        "I cannot recall a better summer.",
        'He said: "I cannot help you."',
        "You cannot help it.",
        "You could say: I am sorry you are in a tight spot, but I cannot lend money.",
        "Reply warmly: thank you for inviting me, I am truly sorry I cannot be there.",
        "You should decline the offer and refuse to pay.",
        "Plants need light. They can't make food without it.",
        "As an aid to memory, write it down.",
        "As an AI researcher, you know this.",
        "Rain is water. " * 20 + "I cannot help with that.",
    ],
)
def test_other_answers_are_no_refusals(answer):
    assert not is_refusal(answer)


# BLEU and ROUGE-L


def test_bleu_by_hand():
    """8 of 9 words, 6 of 8 pairs, 4 of 7 triples and 2 of 6 fours match, and the lengths agree."""
    answer, reference = "a b c d e x f g h", "a b c d e y f g h"
    wanted = 100 * (8 / 9 * 6 / 8 * 4 / 7 * 2 / 6) ** 0.25
    assert corpus_bleu([answer], [reference]) == pytest.approx(wanted)
    assert corpus_bleu([reference], [reference]) == pytest.approx(100)
    # A brevity penalty of exp(1 - 9/5): the five words are all right.
    assert corpus_bleu(["a b c d e"], [reference]) == pytest.approx(100 * np.exp(1 - 9 / 5))
    assert corpus_bleu(["", "z"], [reference, reference]) < 1


def test_rouge_by_hand():
    assert rouge_l("The cat sat.", "the black cat sat down") == pytest.approx(0.75)
    # Lin 2004, section 3.2: reference "police killed the gunman"; beta 1 gives the paper's 3/4 and 2/4.
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(2 / 4)
    assert (rouge_l("", "a"), rouge_l("a", ""), rouge_l("a", "b"), rouge_l("a", "a")) == (0, 0, 0, 1)


@given(WORDS, WORDS)
def test_common_words_are_those_of_the_textbook_table(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if left == right else max(table[i, j + 1], table[i + 1, j])
    assert common_words(a, b) == table[-1, -1] == common_words(b, a)


def test_rouge_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    draw = random.Random(2)
    for _ in range(50):
        a, b = (" ".join(draw.choices("abcdefgh", k=draw.randrange(1, 40))) for _ in range(2))
        assert rouge_l(a, b) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure)


# Together


def test_figures_of_a_model():
    answers = ["The sky is blue.", "I'm sorry, but I can't say.", "  ", "The sky is blue."]
    found = text_figures(answers, ["The sky is blue.", None, "Yes.", None], seed=3)
    exact = binomtest(1, 4).proportion_ci(0.95)
    assert found["refusals"] == {"rate": 0.25, "low": exact.low, "high": exact.high, "n": 4}
    assert found["empty"] == found["refusals"]
    assert found["references"] == 2
    assert found["rouge_l"] and (found["rouge_l"]["mean"], found["rouge_l"]["n"]) == (0.5, 2)
    assert found["bleu"] == pytest.approx(corpus_bleu([answers[0], answers[2]], ["The sky is blue.", "Yes."]))
    assert found["distinct_1"] == pytest.approx(10 / 14)
    assert found["self_similarity"] == self_similarity(answers, 3)


def test_without_references_there_is_no_likeness():
    found = text_figures(["a b"], [None], seed=0)
    assert (found["bleu"], found["rouge_l"], found["references"], found["self_similarity"]) == (None, None, 0, None)
    with pytest.raises(ValueError, match="0 answers"):
        text_figures([], [], seed=0)
    with pytest.raises(ValueError, match="in pairs"):
        text_figures(["a"], [None, None], seed=0)
