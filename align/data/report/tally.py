"""What is known of a file once its rows have passed by, one after another.

Memory does not grow with the rows, but for 8 bytes of each pair, by which labels of one pair find each other.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from align.data.names import Kind
from align.data.report.schema import SAMPLED, Group, Pairs
from reward.records import Record, answer_text, iter_jsonl, prompt_id

MOST_SOURCES = 1_000  # names counted one by one; further ones together
MOST_SHOWN = 12
OTHERS = "(others)"


class Tally:
    """Counts over all rows of a file, and a sample drawn by the seed, in which every row is equally likely to be."""

    def __init__(self, kind: Kind, seed: int, size: int = SAMPLED) -> None:
        self.kind, self.size = kind, size
        self.rows = self.augmented = 0
        self.sides: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()  # sign of chosen's length less rejected's
        self.sample: list[Record] = []
        self._votes = array("Q")
        self._draw = random.Random(f"data report {seed} {kind}")

    @classmethod
    def of(cls, path: Path, kind: Kind, seed: int) -> Tally:
        tally = cls(kind, seed)
        for _, record in iter_jsonl(path):
            tally.add(record)
        return tally

    def add(self, record: Record) -> None:
        self._keep(record)
        self.rows += 1
        self.sides[record.get("split", "train")] += 1
        if "source" in record:
            name = str(record["source"])[:80]
            self.sources[name if name in self.sources or len(self.sources) < MOST_SOURCES else OTHERS] += 1
        if "augmented" in record:  # it repeats another row: what people said is counted there
            self.augmented += 1
        elif self.kind == "preference":
            self._vote(record)

    def _keep(self, record: Record) -> None:
        """Algorithm R of Vitter 1985: row i takes the place of a kept one with probability size / i."""
        if self.rows < self.size:
            self.sample.append(record)
        elif (place := self._draw.randrange(self.rows + 1)) < self.size:
            self.sample[place] = record

    def _vote(self, record: Record) -> None:
        chosen, rejected = answer_text(record["chosen"]), answer_text(record["rejected"])
        self.lengths[(len(chosen) > len(rejected)) - (len(chosen) < len(rejected))] += 1
        first, second = sorted((chosen.strip(), rejected.strip()))
        said = "\x1f".join((prompt_id(record["prompt"]), first, second))
        key = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")
        self._votes.append(key & ~1 | (first == chosen.strip()))

    def pairs(self) -> Pairs | None:
        """None for other files than those of preferences."""
        if self.kind != "preference":
            return None
        votes = np.frombuffer(self._votes, np.uint64) if self._votes else np.empty(0, np.uint64)
        _, pair, labels = np.unique(votes >> np.uint64(1), return_inverse=True, return_counts=True)
        for_first = np.bincount(pair.reshape(-1), votes & np.uint64(1), minlength=len(labels))
        again = labels > 1
        agreeing = int((again & ((for_first == 0) | (for_first == labels))).sum())
        several, longer, shorter = int(again.sum()), self.lengths[1], self.lengths[-1]
        return Pairs(
            longer=longer,
            shorter=shorter,
            equal=self.lengths[0],
            longer_share=share(longer, longer + shorter),
            labelled_again=several,
            agreeing=agreeing,
            agreement=share(agreeing, several),
        )


def share(part: int, whole: int) -> float | None:
    """Of nothing, None."""
    return round(part / whole, 4) if whole else None


def groups_of(counts: Counter[str], whole: int, least: int = 1, most: int = MOST_SHOWN) -> list[Group]:
    """The largest groups of at least `least` rows, ties by name; what is left over is not told."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        Group(name=name, rows=rows, share=share(rows, whole) or 0.0) for name, rows in ordered[:most] if rows >= least
    ]
