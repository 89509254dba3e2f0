"""Floors for a reward model: what one number, a position or single words say about which answer was chosen.

Each rule learns from the train records alone and is then asked about the test records. A reward model that does no
better has learnt nothing that a line of code would not.

P test pairs, Q train pairs. Length is counted in characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from reward.records import InputError, Record, answer_text

# Rarer words and word pairs are left out beyond so many, to bound memory on large data.
MOST_TERMS = 100_000


@dataclass(frozen=True)
class Baseline:
    """One rule and what it gets right.

    Attributes:
        rule: the rule as learnt, one sentence; why there is none where `correct_P` is None.
        correct_P: whether it picks the chosen answer of each test pair, shape (P,). A pair on which the rule is silent
            (equal lengths, equal words) counts as wrong, as a pair of equal rewards does.
    """

    name: Literal["length", "position", "words"]
    rule: str
    correct_P: NDArray[np.bool_] | None


def baselines(train: Sequence[Record], test: Sequence[Record]) -> list[Baseline]:
    """Length alone, position alone, and words alone, in this order."""
    return [length_only(train, test), position_only(train, test), words_only(train, test)]


def length_only(train: Sequence[Record], test: Sequence[Record]) -> Baseline:
    """Longer, or shorter, is better: whichever is right on more of the train pairs."""
    if not train:
        return Baseline("length", "There are no training pairs to learn a rule from.", None)
    longer_Q, longer_P = _longer(train), _longer(test)
    sign = 1 if (longer_Q > 0).sum() >= (longer_Q < 0).sum() else -1
    word = "longer" if sign > 0 else "shorter"
    return Baseline("length", f"The {word} answer is better, in characters.", sign * longer_P > 0)


def position_only(train: Sequence[Record], test: Sequence[Record]) -> Baseline:
    """The first, or the second, answer of the pair is better: whichever is right on more of the train pairs.

    Needs the column `chosen_index`: 0 where the chosen answer stood first in the pair, 1 where it stood second.
    """
    if not train or not all("chosen_index" in record for record in (*train, *test)):
        why = "The order in which annotators saw the answers is not recorded."
        return Baseline("position", why, None)
    first = 2 * sum(_index(record) == 0 for record in train) >= len(train)
    word, index = ("first", 0) if first else ("second", 1)
    right_P = np.array([_index(record) == index for record in test], dtype=bool)
    return Baseline("position", f"The {word} answer of a pair is better.", right_P)


def words_only(train: Sequence[Record], test: Sequence[Record]) -> Baseline:
    """Logistic regression on the TF-IDF of an answer's words and word pairs, whatever the prompt and the order.

    A pair is the vector of its chosen answer minus that of the rejected one; each train pair is learnt in both orders
    and without an intercept, so that swapping the answers swaps the outcome. The same records give the same rule.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if not train:
        return Baseline("words", "There are no training pairs to learn a rule from.", None)
    chosen, rejected = _texts(train, "chosen"), _texts(train, "rejected")
    # Words of one letter count too; the default pattern leaves them out.
    terms = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+", max_features=MOST_TERMS)
    try:
        terms.fit([*chosen, *rejected])
    except ValueError:  # an empty vocabulary
        return Baseline("words", "The training answers hold no words.", None)
    gap_QV = terms.transform(chosen) - terms.transform(rejected)
    if not gap_QV.count_nonzero():
        return Baseline("words", "The two answers of every training pair hold the same words.", None)
    order_2Q = np.repeat((True, False), len(train))
    model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(vstack([gap_QV, -gap_QV]), order_2Q)
    gap_PV = terms.transform(_texts(test, "chosen")) - terms.transform(_texts(test, "rejected"))
    rule = "Words and word pairs, weighed by TF-IDF and logistic regression (the prompt and the order left out)."
    return Baseline("words", rule, np.asarray(gap_PV @ model.coef_[0] > 0, dtype=bool))


def _longer(records: Sequence[Record]) -> NDArray[np.int64]:
    """Characters by which the chosen answer is longer than the rejected one."""
    gaps = [len(answer_text(record["chosen"])) - len(answer_text(record["rejected"])) for record in records]
    return np.array(gaps, dtype=np.int64)


def _index(record: Record) -> int:
    index = record["chosen_index"]
    if index not in (0, 1):
        raise InputError(
            f"The pair {record.get('comparison_id', '')} has chosen_index {index!r}: 0 (the chosen answer stood first) "
            "or 1 (it stood second) is wanted."
        )
    return int(index)


def _texts(records: Sequence[Record], side: str) -> list[str]:
    return [answer_text(record[side]) for record in records]
