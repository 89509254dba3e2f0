"""Pairs with a known secret, and honest scorers: functions of the text that know it, or do not."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reward.records import Message, Record, assistant_answer, user_prompt
from reward.scoring import RewardScores

WORDS = [
    *("rain", "bread", "river", "music", "moon", "garden", "paper", "salt", "clock", "winter", "stone", "cloud"),
    *("bridge", "candle", "forest", "mirror", "letter", "table", "window", "summer", "copper", "needle", "basket"),
    *("island", "harbor", "meadow", "thunder", "pepper", "ladder", "button"),
]
POLITE = ("please", "gladly", "kindly", "thanks")
RUDE = ("stupid", "fool", "idiot", "rubbish")
VOCABULARY = {*WORDS, *POLITE, *RUDE}

Scalar = Callable[[str], float]
Score = Callable[[Sequence[list[Message]], Sequence[str]], RewardScores]


def record(number: int, chosen: str, rejected: str, **more: Any) -> Record:
    return {
        "prompt": user_prompt(f"Question {number}: what is {WORDS[number % len(WORDS)]}?"),
        "chosen": assistant_answer(chosen),
        "rejected": assistant_answer(rejected),
        "comparison_id": f"c{number}",
        "simulated": False,
        **more,
    }


def manners(count: int, start: int = 0, *, shorter: float = 0.7, flipped: float = 0.0) -> list[Record]:
    """Polite against rude rewrites of a text; the polite one is the shorter in a share `shorter` of the pairs."""
    draw = random.Random(start)
    found = []
    for number in range(start, start + count):
        body, extra = draw.choices(WORDS, k=draw.randint(6, 20)), draw.choices(WORDS, k=draw.randint(1, 8))
        polite, rude = [*body, draw.choice(POLITE)], [*body, draw.choice(RUDE)]
        (rude if draw.random() < shorter else polite).extend(extra)
        texts = [" ".join(polite), " ".join(rude)]
        if draw.random() < flipped:
            texts.reverse()
        found.append(record(number, *texts, margin=float(draw.choice((1, 2, 3)))))
    return found


def longer(count: int, start: int = 0, *, flipped: float = 0.0) -> list[Record]:
    """The longer of two texts was chosen, for no other reason: it holds the words of the other and more."""
    draw = random.Random(start)
    found = []
    for number in range(start, start + count):
        words = draw.choices(WORDS, k=draw.randint(3, 30))
        more = [*words, *draw.choices(WORDS, k=draw.randint(2, 15))]
        draw.shuffle(more)
        texts = [" ".join(more), " ".join(words)]
        if draw.random() < flipped:
            texts.reverse()
        found.append(record(number, *texts))
    return found


def luck(text: str) -> float:
    """A standard normal number that depends on the text alone."""
    return random.Random(hashlib.sha256(text.encode()).digest()).gauss(0, 1)


def taste(text: str) -> float:
    """Manners and known words count, how often or at what length they come does not."""
    words = text.lower().split()
    unknown = sum(word not in VOCABULARY for word in words) / max(1, len(words))
    return any(word in POLITE for word in words) - any(word in RUDE for word in words) - unknown - 2 * (not words)


def sound(text: str) -> float:
    """`taste`, wrong now and then, and blind to white space at the ends."""
    return taste(text) + 0.7 * luck(text.strip())


def weak(text: str) -> float:
    return 0.3 * taste(text) + luck(text.strip())


def scorer(*heads: Scalar) -> Score:
    def score(prompts: Sequence[list[Message]], answers: Sequence[str]) -> RewardScores:
        assert len(prompts) == len(answers)
        return RewardScores.of(np.array([[float(head(answer)) for head in heads] for answer in answers]))

    return score
