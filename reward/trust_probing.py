"""The experiments of the trust report: answers made up to see what the reward makes of them.

Each experiment is planned first, which lays its answers on the desk, and measured once all answers are scored: an
answer that several experiments ask for is scored once. Q probed pairs, S answers that a change applies to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from reward.probes import EDITS, PROBES, answers_of_others, gibberish_only
from reward.records import InputError, Message, Record, answer_text, prompt_id
from reward.statistics import Estimate, mean_with_interval, share_with_interval
from reward.trust_figures import figure
from reward.trust_schema import EditFigure, ProbeFigure, SpreadFigure

if TYPE_CHECKING:
    from reward.scoring import RewardScores

Score = Callable[[Sequence[list[Message]], Sequence[str]], "RewardScores"]
Fits = Callable[[list[Message], str], bool]
Progress = Callable[[int, int], object]

# Answers given to the model at a time, between two reports of progress.
BLOCK = 256

OUTSIDE = {
    "others": "The answer to another prompt.",
    "gibberish": "As many made-up words as the answer has.",
}


class Desk:
    """Answers waiting to be scored, each once, by number; then their rewards."""

    def __init__(self, score: Score, fits: Fits) -> None:
        self._score, self._fits = score, fits
        self._numbers: dict[tuple[object, str], int] = {}
        self._prompts: list[list[Message]] = []
        self._texts: list[str] = []
        self._rewards: list[NDArray[np.float64]] = []
        self._spreads: list[NDArray[np.float64]] = []
        self._scored = 0
        self.heads = 0

    def __len__(self) -> int:
        return len(self._texts)

    def place(self, prompt: list[Message], text: str) -> int:
        """The number of an answer, which is new if nobody asked for it before."""
        key = (tuple((message["role"], message["content"]) for message in prompt), text)
        if key not in self._numbers:
            self._numbers[key] = len(self._texts)
            self._prompts.append(prompt)
            self._texts.append(text)
        return self._numbers[key]

    def place_if_it_fits(self, prompt: list[Message], text: str) -> int | None:
        """As `place`; None for an answer that the model cannot read whole."""
        return self.place(prompt, text) if self._fits(prompt, text) else None

    def score_block(self) -> None:
        """Score the next `BLOCK` answers.

        Raises:
            InputError: a reward is nan or infinite.
        """
        start, stop = self._scored, min(self._scored + BLOCK, len(self))
        scores = self._score(self._prompts[start:stop], self._texts[start:stop])
        reward, spread = np.asarray(scores.mean, dtype=np.float64), np.asarray(scores.std, dtype=np.float64)
        if reward.shape != (stop - start,) or spread.shape != reward.shape:
            raise ValueError(f"score gave {reward.shape} rewards for {stop - start} answers: one for each is wanted.")
        broken = int((~np.isfinite(reward)).sum())
        if broken:
            raise InputError(
                f"The reward model gave {broken} of {stop - start} answers a reward that is nan or infinite: its "
                "weights are broken, or its number format is too small for them."
            )
        self.heads = scores.per_head.shape[1]
        self._rewards.append(reward)
        self._spreads.append(spread)
        self._scored = stop

    def score_all(self, on_progress: Progress) -> None:
        """Score what is left."""
        on_progress(self._scored, len(self))
        while self._scored < len(self):
            self.score_block()
            on_progress(self._scored, len(self))

    @property
    def reward_N(self) -> NDArray[np.float64]:
        return np.concatenate(self._rewards)

    @property
    def spread_N(self) -> NDArray[np.float64]:
        return np.concatenate(self._spreads)


def sample(test: Sequence[Record], probed: int, seed: int) -> list[int]:
    """Up to `probed` pairs with different chosen answers, as indices in rising order."""
    firsts: dict[tuple[str, str], int] = {}
    for index, record in enumerate(test):
        firsts.setdefault((prompt_id(record["prompt"]), answer_text(record["chosen"])), index)
    found = list(firsts.values())
    return found if len(found) <= probed else sorted(random.Random(seed).sample(found, probed))


def plan_probes(desk: Desk, records: Sequence[Record], seed: int) -> Callable[[float], list[ProbeFigure]]:
    """Every probe of the chosen answers; to be measured with the standard deviation of held-out rewards."""
    plans = []
    for probe in PROBES:
        rows = []
        for record in records:
            prompt, answer = record["prompt"], answer_text(record["chosen"])
            changed = probe.change(prompt, answer)
            after = None if changed == answer else desk.place_if_it_fits(prompt, changed)
            if after is not None:
                rows.append((prompt_id(prompt), desk.place(prompt, answer), after))
        plans.append((probe, rows))

    def measure(deviation: float) -> list[ProbeFigure]:
        reward_N = desk.reward_N
        figures = []
        for probe, rows in plans:
            row = ProbeFigure(
                name=probe.name,
                sentence=probe.sentence,
                liking=probe.liking,
                kind=probe.kind,
                n=len(rows),
                raised=None,
                change=None,
            )
            if rows:
                prompts = [prompt for prompt, _, _ in rows]
                change_S = np.array([reward_N[after] - reward_N[before] for _, before, after in rows])
                row["raised"] = figure(share_with_interval(change_S > 0, prompts, seed))
                if deviation > 0:
                    row["change"] = figure(mean_with_interval(change_S / deviation, prompts, seed))
            figures.append(row)
        return figures

    return measure


def plan_edits(desk: Desk, records: Sequence[Record], seed: int) -> Callable[[], list[EditFigure]]:
    """Every edit, of the chosen answer alone and of the rejected answer alone."""
    plans = []
    for edit in EDITS:
        rows = []
        for record in records:
            prompt, texts = record["prompt"], [answer_text(record[side]) for side in ("chosen", "rejected")]
            edited = [desk.place_if_it_fits(prompt, edit.change(prompt, text)) for text in texts]
            if None not in edited:
                rows.append((prompt_id(prompt), [desk.place(prompt, text) for text in texts], edited))
        plans.append((edit, rows))

    def measure() -> list[EditFigure]:
        reward_N = desk.reward_N
        figures = []
        for edit, rows in plans:
            row = EditFigure(name=edit.name, sentence=edit.sentence, n=len(rows), flipped=None)
            if rows:
                before_S2 = reward_N[np.array([before for _, before, _ in rows])]
                after_S2 = reward_N[np.array([after for _, _, after in rows])]
                gap_S = before_S2[:, 0] - before_S2[:, 1]
                # A tie that an edit breaks is no flip: nothing was turned round.
                flipped_S = gap_S * (after_S2[:, 0] - before_S2[:, 1]) < 0
                flipped_S |= gap_S * (before_S2[:, 0] - after_S2[:, 1]) < 0
                row["flipped"] = figure(share_with_interval(flipped_S, [prompt for prompt, _, _ in rows], seed))
            figures.append(row)
        return figures

    return measure


def plan_outside(desk: Desk, records: Sequence[Record], seed: int) -> Callable[[], SpreadFigure]:
    """Answers unlike the training data, one of each kind a prompt, to see whether the heads disagree more on them."""
    firsts: dict[str, Record] = {}
    for record in records:
        firsts.setdefault(prompt_id(record["prompt"]), record)
    prompts = [record["prompt"] for record in firsts.values()]
    answers = [answer_text(record["chosen"]) for record in firsts.values()]
    if len(prompts) < 2:
        return lambda: {"inside": None, "outside": [], "why": "with a single prompt there is no other to compare with"}
    texts = {
        "others": answers_of_others(answers, seed),
        "gibberish": [gibberish_only(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)],
    }
    inside = [desk.place(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    outside = {
        name: [desk.place_if_it_fits(prompt, text) for prompt, text in zip(prompts, own, strict=True)]
        for name, own in texts.items()
    }

    def measure() -> SpreadFigure:
        spread_N = desk.spread_N
        found = SpreadFigure(inside=float(spread_N[np.array(inside)].mean()), outside=[], why=None)
        for name, own in outside.items():
            both_S2 = np.array([(a, b) for a, b in zip(inside, own, strict=True) if b is not None]).reshape(-1, 2)
            if both_S2.size:
                spread_S2 = spread_N[both_S2]
                wider: Estimate = share_with_interval(spread_S2[:, 1] > spread_S2[:, 0], seed=seed)
                mean = float(spread_S2[:, 1].mean())
                found["outside"].append({"name": name, "sentence": OUTSIDE[name], "mean": mean, "wider": figure(wider)})
        return found

    return measure
