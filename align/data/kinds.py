"""The five kinds of records, and what each can become without a guess."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from align.data.names import Kind
from align.data.turns import CannotHold
from labeling_ui.checks import MOST_ANSWERS
from labeling_ui.comparisons import LEFT_OUT
from reward.records import InputError, Record, assistant_answer, digest

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "demonstration": ("prompt", "completion"),
    "prompt": ("prompt",),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "comparison": ("id", "prompt", "answers"),
}

OWN = {column for columns in COLUMNS.values() for column in columns} - {"id"}


def kind_of(record: Record) -> Kind:
    """The kind of a record that a format has read."""
    if "answers" in record:
        return "comparison"
    if "chosen" in record:
        return "preference"
    if "completion" in record:
        return "unpaired" if "label" in record else "demonstration"
    return "prompt"


def check_possible(given: Kind, wanted: Kind) -> None:
    """Refuse what no row of such a file could become.

    Raises:
        InputError: pairs are wanted of answers that nothing pairs, or truths that nobody told.
    """
    reasons: dict[tuple[Kind, Kind], str] = {
        ("demonstration", "preference"): "a demonstration has one answer, and a preference two",
        ("demonstration", "comparison"): "a demonstration has one answer, and a comparison at least two",
        ("demonstration", "unpaired"): "nobody said whether a demonstration's answer is good or bad",
        ("unpaired", "preference"): "nothing says which of its answers were held against each other",
        ("comparison", "unpaired"): "a rank says which answer is better, and not whether it is good",
        ("unpaired", "comparison"): "nothing says which of its answers were held against each other",
    }
    if reason := reasons.get((given, wanted)):
        raise InputError(f"{given} records cannot become {wanted} records: {reason}; choose another kind with --to.")


def become(record: Record, wanted: Kind) -> Iterator[Record | CannotHold]:
    """The records of the wanted kind in a record, with its further columns; or why there is none."""
    given = kind_of(record)
    rest = {name: value for name, value in record.items() if name not in COLUMNS[given] and name not in OWN}
    if given == wanted == "comparison":
        yield _compared(record)
    elif given == "comparison" and wanted == "preference":
        yield from _pairs(record, rest)
    elif given == "comparison" and wanted == "demonstration":
        yield _best(record, rest)
    elif wanted == "prompt":
        yield {"prompt": record["prompt"], **rest}
    elif given == "prompt":
        yield CannotHold("without an answer")
    elif given == wanted:
        yield record if wanted == "preference" else _answered(record)
    elif given == "preference":
        yield from _of_a_pair(record, rest, wanted)
    elif given == "unpaired" and wanted == "demonstration":
        good = {"prompt": record["prompt"], "completion": record["completion"], **rest}
        yield _answered(good) if record["label"] else CannotHold("whose answer is labelled false")
    else:
        raise AssertionError(f"{given} to {wanted} was refused before")


def _of_a_pair(record: Record, rest: Record, wanted: Kind) -> Iterator[Record | CannotHold]:
    prompt = record["prompt"]
    if wanted == "demonstration":
        yield _answered({"prompt": prompt, "completion": record["chosen"], **rest})
    elif wanted == "unpaired":
        for side in ("chosen", "rejected"):
            yield {"prompt": prompt, "completion": record[side], "label": side == "chosen", **rest}
    else:
        answers = [{"text": record[side][0]["content"], "source": side} for side in ("chosen", "rejected")]
        rest = {name: value for name, value in rest.items() if name not in LEFT_OUT}
        number = str(rest.pop("id", "") or digest({"prompt": prompt, "answers": answers})[:16])
        yield {"id": number, "prompt": prompt, "answers": answers, **rest}


def _answered(record: Record) -> Record | CannotHold:
    return record if record["completion"][0]["content"].strip() else CannotHold("with an empty answer")


def _compared(record: Record) -> Record | CannotHold:
    count = len(record["answers"])
    if count < 2:
        return CannotHold("with one answer, which is no choice")
    return record if count <= MOST_ANSWERS else CannotHold(f"with more than {MOST_ANSWERS} answers")


def _judged(answers: list[Record]) -> tuple[str, list[tuple[int, Record, float]]]:
    """(rank or score, [(index, answer, worth)] of the answers that have one); a higher worth is better."""
    measure = "rank" if any(answer.get("rank") is not None for answer in answers) else "score"
    given = [(i, answer, answer.get(measure)) for i, answer in enumerate(answers)]
    sign = -1.0 if measure == "rank" else 1.0
    return measure, [(i, answer, sign * value) for i, answer, value in given if value is not None]


def _pairs(record: Record, rest: Record) -> Iterator[Record | CannotHold]:
    """A preference for every two answers of different rank or score; ties are left out one by one."""
    measure, judged = _judged(record["answers"])
    if len(judged) < 2:
        yield CannotHold("without two answers that have a rank or a score")
    for (i, one, first), (j, two, second) in itertools.combinations(judged, 2):
        better, worse = (one, two) if first > second else (two, one)
        if first == second:
            yield CannotHold("(pairs) with the same rank or score")
        elif better["text"].strip() == worse["text"].strip():
            yield CannotHold("(pairs) with identical chosen and rejected")
        elif not better["text"].strip():
            yield CannotHold("(pairs) with an empty chosen answer")
        else:
            yield {
                "prompt": record["prompt"],
                "chosen": assistant_answer(better["text"]),
                "rejected": assistant_answer(worse["text"]),
                **rest,
                "comparison_id": record["id"],
                "pair": [i, j],
                f"{measure}s": [better[measure], worse[measure]],
            }


def _best(record: Record, rest: Record) -> Record | CannotHold:
    """The answer of the best rank or score, or the only one there is."""
    answers = record["answers"]
    _, judged = _judged(answers)
    if not judged and len(answers) != 1:
        return CannotHold("with several answers, of which none has a rank or a score")
    text = max(judged, key=lambda each: each[2])[1]["text"] if judged else answers[0]["text"]
    return _answered({"prompt": record["prompt"], "completion": assistant_answer(text), **rest})
