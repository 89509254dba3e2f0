"""What can be told of rows without a tokenizer, on every one of them.

Every test takes the stage, the rows and, where it needs more, what it needs; it gives findings and raises nothing. The
shares from which something is refused stand below: under them noise is likelier than a mistake.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from align.check.findings import Finding, part, refused, warned
from align.check.reading import Rows
from align.data.kinds import COLUMNS
from align.data.turns import short
from reward.records import Message, Record, answer_text

MOST_REPEATED = 0.5  # of the rows: half a file said twice is a file put together twice
MOST_CONTRADICTED = 0.1  # of the pairs: people disagree with themselves on a few per cent of hard pairs
MOST_LEFT_OUT = 0.5  # of the rows that reading found unusable
SAID_LEFT_OUT = 0.05
FEWEST_PAIRS = 30  # below which nothing is said of which side is the better one
ALIKE_TOLD = 0.9  # of the pairs that tell: so many on one side look like exchanged columns
SHORTER = 0.6  # of the pairs: where people choose, the chosen answer is the shorter one in 0.3 to 0.55 of them
READ = 2000  # pairs that are searched for refusals, drawn by a seed
RENDERED = 0.5  # of the prompts: so many with marks of turns in their text have been through a template already


def turns_of(rows: Rows, record: Record) -> Iterator[Message]:
    """All turns of a record, those of the prompt first."""
    for column in COLUMNS[rows.kind]:
        yield from record[column]


def of_both_sides(stage: str, rows: Rows, others: Iterable[Rows]) -> list[Finding]:
    """Prompts to train on that, but for case and white space, are test prompts here or in another file."""
    held_out: dict[bytes, tuple[Rows, int]] = {}
    for each in [rows, *(other for other in others if other is not rows)]:
        for index, record in enumerate(each.records):
            if record["split"] == "test":
                held_out.setdefault(each.keys("prompt")[index], (each, index))
    if not held_out:
        return []
    keys = rows.keys("prompt")
    shared = [
        (index, held_out[keys[index]])
        for index, record in enumerate(rows.records)
        if record["split"] == "train" and keys[index] in held_out
    ]
    if not shared:
        return []
    index, (other, test) = shared[0]
    there = _line(rows, test) if other is rows else other.place(test)
    return [
        refused(
            stage,
            f"{part(len(shared), len(rows.records))} of {rows.key} train on a prompt of the test side, but for case "
            f"and white space: {rows.place(index)} is train and {there} is test, "
            f"{short(other.records[test]['prompt'][-1]['content'])}. Give both the same split, or let the prepare "
            "stage normalise and split them.",
        )
    ]


def repeated(stage: str, rows: Rows) -> list[Finding]:
    """Rows that say what an earlier one said; copies that augmentation made and marked do not count."""
    first: dict[tuple[bytes, ...], int] = {}
    again: list[tuple[int, int]] = []
    for index, key in enumerate(zip(*map(rows.keys, COLUMNS[rows.kind]), strict=True)):
        if not rows.records[index].get("augmented") and (earlier := first.setdefault(key, index)) != index:
            again.append((index, earlier))
    if not again:
        return []
    index, earlier = again[0]
    what = (
        f"{part(len(again), len(rows.records))} of {rows.key} repeat an earlier one, first {rows.place(index)}, which "
        f"says what {_line(rows, earlier)} says"
    )
    if len(again) > MOST_REPEATED * len(rows.records):
        advice = f"more than {MOST_REPEATED:.0%} is refused, as they would be trained on several times an epoch"
        return [
            refused(stage, f"{what}: {advice.replace('%', ' %')}; drop the copies, or let the prepare stage do it.")
        ]
    return [warned(stage, f"{what}: they count as often as they are there; the prepare stage drops them.")]


def contradicted(stage: str, rows: Rows) -> list[Finding]:
    """Pairs of which another row of the same prompt says the opposite."""
    said: dict[tuple[bytes, frozenset[bytes]], list[tuple[bytes, int]]] = defaultdict(list)
    sides = zip(rows.keys("prompt"), rows.keys("chosen"), rows.keys("rejected"), strict=True)
    for index, (prompt, chosen, rejected) in enumerate(sides):
        if not rows.records[index].get("augmented"):
            said[prompt, frozenset((chosen, rejected))].append((chosen, index))
    torn = [found for found in said.values() if len({chosen for chosen, _ in found}) > 1]
    if not torn:
        return []
    count = sum(map(len, torn))
    (chosen, index), *more = torn[0]
    other = next(place for each, place in more if each != chosen)
    what = (
        f"{part(count, len(rows.records), 'pairs')} of {rows.key} contradict one another: {rows.place(index)} prefers "
        f"one answer and {_line(rows, other)} the other, to the same prompt"
    )
    if count > MOST_CONTRADICTED * len(rows.records):
        limit = f"{MOST_CONTRADICTED:.0%}".replace("%", " %")
        return [refused(stage, f"{what}. More than {limit} is refused: settle them by a majority, or drop both.")]
    return [warned(stage, f"{what}. They cancel out in training: settle them by a majority, or drop both.")]


def unlike_only_in_case(stage: str, rows: Rows) -> list[Finding]:
    """Pairs whose two answers differ in nothing but case and white space."""
    sides = zip(rows.keys("chosen"), rows.keys("rejected"), strict=True)
    alike = [index for index, (chosen, rejected) in enumerate(sides) if chosen == rejected]
    if not alike:
        return []
    return [
        warned(
            stage,
            f"{part(len(alike), len(rows.records), 'pairs')} of {rows.key} differ only in case and white space, first "
            f"{rows.place(alike[0])}: that is what would be learnt from them; drop them if it is not meant.",
        )
    ]


def left_out(stage: str, rows: Rows) -> list[Finding]:
    """How much of a file reading has left out as unusable."""
    whole = len(rows.dropped) + len(rows.records)
    if len(rows.dropped) <= SAID_LEFT_OUT * whole:
        return []
    reasons = Counter(dropped["reason"] for dropped in rows.dropped)
    named = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    what = f"{part(len(rows.dropped), whole)} of {rows.key} cannot be used: {named}"
    if len(rows.dropped) > MOST_LEFT_OUT * whole:
        return [refused(stage, f"{what}. More than half is refused: mend the file, or take them out of it.")]
    return [warned(stage, f"{what}. They are left out; look at a few of them.")]


def exchanged(stage: str, rows: Rows, seed: int) -> list[Finding]:
    """Signs that chosen and rejected have been mistaken for one another. No more than signs: nothing is refused."""
    pairs = rows.records
    if len(pairs) < FEWEST_PAIRS:
        return []
    return [*_by_refusals(stage, rows, seed), *_by_length(stage, rows), *_by_scores(stage, rows)]


def _by_refusals(stage: str, rows: Rows, seed: int) -> list[Finding]:
    from align.compare.texts import is_refusal

    drawn = random.Random(seed).sample(rows.records, min(READ, len(rows.records)))
    told = [
        refuses[0]
        for record in drawn
        if (refuses := [is_refusal(answer_text(record[side])) for side in ("chosen", "rejected")])[0] != refuses[1]
    ]
    if len(told) < max(10, 0.05 * len(drawn)) or sum(told) < ALIKE_TOLD * len(told):
        return []
    return [
        warned(
            stage,
            f"where one answer of {rows.key} refuses and the other does not, the chosen one is the refusal in "
            f"{part(sum(told), len(told), 'pairs')}: are chosen and rejected exchanged? Where refusing is what is to "
            "be learnt, this is as it should be.",
        )
    ]


def _by_length(stage: str, rows: Rows) -> list[Finding]:
    lengths = [[len(answer_text(record[side])) for side in ("chosen", "rejected")] for record in rows.records]
    known = [(chosen, rejected) for chosen, rejected in lengths if chosen != rejected]
    shorter = sum(chosen < rejected for chosen, rejected in known)
    # The lower end of the share's 95 % interval: two standard deviations of a fair coin are the root of the count.
    if not known or shorter - math.sqrt(len(known)) < SHORTER * len(known):
        return []
    return [
        warned(
            stage,
            f"in {part(shorter, len(known), 'pairs')} of {rows.key} the chosen answer is the shorter one, while people "
            "mostly prefer the longer: are chosen and rejected exchanged?",
        )
    ]


_MEASURES = re.compile(r"score|rating|reward|grade|quality|rank")


def _by_scores(stage: str, rows: Rows) -> list[Finding]:
    """A number beside each of the two answers that says the opposite of the columns in most rows."""
    found: list[Finding] = []
    for name, one, other in _measured(rows.records[0]):
        values = [(_number(record, one), _number(record, other)) for record in rows.records]
        known = [(a, b) for a, b in values if a is not None and b is not None and a != b]
        lower_is_better = "rank" in name
        against = sum((a < b) != lower_is_better for a, b in known)
        if known and against > len(known) / 2:
            found.append(
                warned(
                    stage,
                    f"{name} of {rows.key}: the chosen answer has the worse {'rank' if lower_is_better else 'number'} "
                    f"in {part(against, len(known), 'pairs')}: are chosen and rejected exchanged?",
                )
            )
    return found


_Path = tuple[str, int | None]


def _measured(record: Record) -> Iterator[tuple[str, _Path, _Path]]:
    """(name for people, where chosen's number is, where rejected's is) of the columns that measure the answers."""
    for column, value in record.items():
        if column in ("scores", "ranks", "ratings") and isinstance(value, list) and len(value) == 2:
            yield f"the column {short(column)}", (column, 0), (column, 1)
        other = column.replace("chosen", "rejected")
        if "chosen" in column and other in record and _MEASURES.search(column.lower()):
            yield f"the columns {short(column)} and {short(other)}", (column, None), (other, None)


def _number(record: Record, path: _Path) -> float | None:
    column, index = path
    value = record.get(column)
    if index is not None:
        value = value[index] if isinstance(value, list) and len(value) > index else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# How published templates begin a turn; a prompt that holds one has been rendered before, or is two turns in one.
_MARKS = re.compile(
    r"^\s*(?:###\s*(?:Instruction|Human|User|Question)\b|\[INST\]|<s>|Human:|USER:|User:|<\|?(?:im_start|user|system)\|?>"
    r"|<start_of_turn>|Below is an instruction that describes a task)"
)


def rendered_before(stage: str, rows: Rows) -> list[Finding]:
    """Prompts whose text begins with the marks of a template: they would go through a second one."""
    marked = [i for i, record in enumerate(rows.records) if _MARKS.match(record["prompt"][-1]["content"])]
    if not marked or len(marked) < RENDERED * len(rows.records):
        return []
    mark = _MARKS.match(rows.records[marked[0]]["prompt"][-1]["content"])
    assert mark is not None
    return [
        warned(
            stage,
            f"{part(len(marked), len(rows.records), 'prompts')} of {rows.key} begin with the mark of a template "
            f"({mark[0].strip()!r}, first {rows.place(marked[0])}), and the chat template will be put around it: give "
            "the text alone, or its turns as a list of {role, content}.",
        )
    ]


def control_tokens_in(stage: str, rows: Rows, of_turns: dict[str, int], others: dict[str, int]) -> list[Finding]:
    """Text that the tokenizer reads as control tokens: it could open or end a turn.

    Args:
        of_turns: the tokens that begin and end turns and rows, by their text; refused.
        others: the tokenizer's further special tokens; warned.
    """
    known = {**others, **of_turns}
    if not known:
        return []
    pattern = re.compile("|".join(re.escape(text) for text in sorted(known, key=len, reverse=True)))
    hits: dict[bool, list[tuple[int, str, str]]] = {True: [], False: []}
    for index, record in enumerate(rows.records):
        for turn in turns_of(rows, record):
            if match := pattern.search(turn["content"]):
                hits[match[0] in of_turns].append((index, turn["role"], match[0]))
                break
    found: list[Finding] = []
    if hits[True]:
        index, role, text = hits[True][0]
        found.append(
            refused(
                stage,
                f"{rows.place(index)}: the {role} turn holds {text}, which the tokenizer reads as control token "
                f"{known[text]} and not as text, so that text could open or end a turn; such is in "
                f"{part(len(hits[True]), len(rows.records))} of {rows.key}. Take the rows out, or write it otherwise, "
                "such as with a space in it.",
            )
        )
    if hits[False]:
        index, role, text = hits[False][0]
        found.append(
            warned(
                stage,
                f"{rows.place(index)}: the {role} turn holds {text}, which the tokenizer reads as special token "
                f"{known[text]} and not as text; such is in {part(len(hits[False]), len(rows.records))} of {rows.key}. "
                "Write it otherwise if it is meant as text.",
            )
        )
    return found


def _line(rows: Rows, index: int) -> str:
    """The place without the file's name, where one was named just before."""
    place = rows.place(index)
    return place.removeprefix(f"{rows.path}, ") if isinstance(rows.path, Path) else place
