"""Along a ppo run: who is asked what, and what becomes of a hacked and an honest run.

Answers are made up here; policies that are really trained are in tests/align/ppo/test_kept.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.compare.checkpoints import Point, course, points_along
from align.compare.overoptimisation import best_of_n
from align.compare.schema import OverOptimisation
from align.generate import Answer
from reward.records import write_jsonl

POINTS = [Point("sft", 0, "base"), *(Point(f"update {n}", n, f"policies/{n}") for n in (4, 8, 12))]
# Words an answer has on average at each point: what the proxy likes for ever, and the gold up to 20.
WORDS = {"base": 8, "policies/4": 14, "policies/8": 20, "policies/12": 40}


def answers_of(path: str, seed: int = 0, prompts: int = 40) -> list[Answer]:
    """The same seed for every policy: prompts that ask for much do so of all of them."""
    rng = np.random.default_rng(seed)
    sizes = np.maximum(1, WORDS[path] + rng.normal(0, 3, prompts).round()).astype(int)
    return [Answer([7] * size, "word " * size, True) for size in sizes]


def proxy(answers: list[Answer]) -> list[float]:
    return [len(answer.ids) / 10 for answer in answers]


def gold(answers: list[Answer]) -> list[float]:
    return [1 - abs(len(answer.ids) - 20) / 10 for answer in answers]


class Asked:
    """Measures as the stage does, and remembers who was asked."""

    def __init__(self) -> None:
        self.answered: list[tuple[str, str]] = []
        self.measured: list[str] = []

    def answer(self, path: str, label: str) -> list[Answer]:
        self.answered.append((path, label))
        return answers_of(path)

    def kl(self, path: str, answers: list[Answer]) -> list[float]:
        assert answers == answers_of(path)
        self.measured.append(path)
        return [float(path.rpartition("/")[2])] * len(answers)

    def course(self, gold: Any, **given: Any) -> OverOptimisation:
        names: dict[str, Any] = {"proxy_name": "the reward model", "gold_name": "the reader", "seed": 0}
        return course(POINTS, self.answer, proxy, gold, self.kl, **names | given)


def test_every_policy_answers_once_and_the_reference_is_at_kl_0() -> None:
    asked = Asked()
    found = asked.course(gold)
    labels = ["update-00000", "update-00004", "update-00008", "update-00012"]
    assert asked.answered == [*zip(WORDS, labels, strict=True)]
    assert asked.measured == [*WORDS][1:]
    assert [(c["name"], c["step"], c["kl"]["mean"]) for c in found["checkpoints"]] == [
        ("sft", 0, 0.0),
        ("update 4", 4, 4.0),
        ("update 8", 8, 8.0),
        ("update 12", 12, 12.0),
    ]
    for path, figures in zip(WORDS, found["checkpoints"], strict=True):
        answers = answers_of(path)
        assert figures["length"]["mean"] == pytest.approx(np.mean([len(answer.ids) for answer in answers]))
        assert figures["proxy"]["mean"] == pytest.approx(np.mean(proxy(answers)))
        assert figures["gold"] is not None and figures["gold"]["mean"] == pytest.approx(np.mean(gold(answers)))


def test_a_run_that_writes_longer_for_ever_is_flagged_and_an_honest_one_is_not() -> None:
    hacked = Asked().course(gold)
    assert (hacked["parting"], hacked["recommended"], hacked["gold_name"]) == (2, 2, "the reader")
    assert hacked["sentences"][0].startswith("From update 8 on (KL 8.0 nats) the reward model still rises (+2.00)")
    honest = Asked().course(proxy)
    assert (honest["parting"], honest["recommended"]) == (None, 3)
    assert honest["sentences"][0].startswith("No over-optimisation is seen")


def test_a_judge_that_fails_once_is_no_judge() -> None:
    """Half a table would compare checkpoints on different grounds."""
    first = True

    def failing(answers: list[Answer]) -> list[float] | None:
        nonlocal first
        first, now = False, first
        return None if now else gold(answers)

    found = Asked().course(failing)
    assert found["gold_name"] is None and all(c["gold"] is None for c in found["checkpoints"])
    assert found["parting"] is None and "cannot be seen" in found["sentences"][0]


def test_drawn_answers_give_the_best_of_n() -> None:
    drawn = [answers_of("base", seed) for seed in range(5)]
    found = Asked().course(gold, drawn=drawn)
    scores = [np.array([score(answers) for answers in drawn]).T for score in (proxy, gold)]
    assert found["best_of_n"] == best_of_n(*scores, [1, 2, 4, 5])
    assert "the best of 5 answers of sft" in found["sentences"][-1]
    alone = Asked().course(lambda answers: None, drawn=drawn)["best_of_n"]
    assert alone is not None and alone["gold"] is None and alone["proxy"] == found["best_of_n"]["proxy"]


def test_points_come_from_the_run_folder(tmp_path: Path) -> None:
    """Lines of other kinds, and of an update that was done again after a kill, do not count."""
    lines = [{"update": n, "objective/kl": 1.0} for n in (0, 1, 2, 1, 2, 3)] + [{"step": 9, "update": 9, "health": []}]
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    for name in ("update-00003", "update-00001"):
        (tmp_path / "policies" / name).mkdir(parents=True)
    assert points_along("sft", "there", tmp_path) == [
        Point("sft", 0, "there"),
        Point("update 1", 1, str(tmp_path / "policies" / "update-00001")),
        Point("update 3", 3, str(tmp_path / "policies" / "update-00003")),
        Point("update 4", 4, str(tmp_path / "model")),
    ]
