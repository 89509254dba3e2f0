"""Reward against KL along a ppo run: the reference, the policies kept on the way, and the last, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.compare.overoptimisation import best_of_n, summarise
from align.compare.schema import BestOfN, OverOptimisation
from align.generate import Answer
from align.ppo.kept import kept_policies
from reward.records import read_jsonl

Scores = Callable[[list[Answer]], list[float]]  # one for each answer


@dataclass(frozen=True)
class Point:
    """A policy along the way.

    Attributes:
        name: as sentences call it: "update 12".
        step: updates done; 0 is the reference.
        path: what is loaded.
    """

    name: str
    step: int
    path: str

    @property
    def label(self) -> str:
        """A name for files: "update-00012"; "update-00000" is the reference."""
        return f"update-{self.step:05d}"


def points_along(reference: str, path: str, folder: Path) -> list[Point]:
    """The reference, the policies that a finished ppo run kept, and the one it ended with, in the order of training.

    Args:
        reference, path: name of the model that ppo started from, and what is loaded.
        folder: the run folder of ppo.
    """
    records = read_jsonl(folder / "metrics.jsonl")
    last = 1 + max(record["update"] for record in records if "objective/kl" in record)
    ways = [(step, str(kept)) for step, kept in kept_policies(folder)] + [(last, str((folder / "model").resolve()))]
    return [Point(reference, 0, path), *(Point(f"update {step}", step, where) for step, where in ways)]


def course(
    points: Sequence[Point],
    answer: Callable[[str, str], list[Answer]],
    proxy: Scores,
    gold: Callable[[list[Answer]], list[float] | None],
    kl: Callable[[str, list[Answer]], list[float]],
    *,
    proxy_name: str,
    gold_name: str | None,
    seed: int,
    drawn: Sequence[list[Answer]] = (),
) -> OverOptimisation:
    """Every policy answers, and its answers are scored; a policy is loaded for one point at a time.

    Args:
        points: the reference first, the final policy last.
        answer: (path, label of the point) to its answers, one to each prompt, always the same prompts in one order.
        proxy: answers to their scores by what the policy was trained on.
        gold: answers to their scores by a judge that the policy never saw; None where there is no such judge, which
            then holds for all points.
        kl: (path, its answers) to nats per answer, to the reference. Not asked of the reference, whose KL is 0.
        drawn: further answers of the reference, M of them to each prompt as M lists; empty: no curve of the best of n.
    """
    proxy_CP, gold_CP, kl_CP, length_CP = [], [], [], []
    for number, point in enumerate(points):
        answers = answer(point.path, point.label)
        proxy_CP.append(proxy(answers))
        gold_CP.append(gold(answers))
        kl_CP.append(kl(point.path, answers) if number else [0.0] * len(answers))
        length_CP.append([float(len(each.ids)) for each in answers])
    held_out = [scores for scores in gold_CP if scores is not None]
    believed = len(held_out) == len(points)
    return summarise(
        [point.name for point in points],
        [point.step for point in points],
        proxy_CP,
        held_out if believed else None,
        kl_CP,
        length_CP,
        proxy_name,
        gold_name if believed else None,
        _curve(drawn, proxy, gold) if drawn else None,
        seed,
    )


def _curve(drawn: Sequence[list[Answer]], proxy: Scores, gold: Callable[[list[Answer]], list[float] | None]) -> BestOfN:
    """The best of 1, 2, 4, ... and of all M."""
    proxy_MP, gold_MP = [proxy(answers) for answers in drawn], [gold(answers) for answers in drawn]
    held_out = [scores for scores in gold_MP if scores is not None]
    ns = sorted({len(drawn), *(2**i for i in range(len(drawn).bit_length()))})
    gold_PM = [*zip(*held_out, strict=True)] if len(held_out) == len(drawn) else None
    return best_of_n([*zip(*proxy_MP, strict=True)], gold_PM, ns)
