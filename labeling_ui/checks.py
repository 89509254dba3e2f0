"""What may be stored: comparisons, and what people say of them; everything else is refused with a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from labeling_ui.project import SAID, Item, Project
from reward.records import InputError, Record

# Longer texts are no answers, and a page that holds them is no page.
LONGEST_TEXT = 200_000
LONGEST_NOTE = 10_000
MOST_ANSWERS = 9


def check_judgement(project: Project, item: Item, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a judgement says, in the form it is stored in.

    Raises:
        InputError: it is none of this item, or says what cannot be said.
    """
    check_names(given)
    said: dict[str, Any] = {name: given.get(name) for name in SAID}
    order = said["order"] = list(given["order"]) if isinstance(given.get("order"), list | tuple) else given.get("order")
    if not is_order(order, item):
        raise InputError(
            f"A label of item {item.id} shows answers {order!r}: the item's answers are {list(item.answers)}."
        )
    if project.settings.mode == "pairwise":
        value = said["value"]
        if type(value) is not int or not 1 <= value <= 7 or said["ranking"] is not None:
            raise InputError(
                f"A label has the value {value!r}: a whole number from 1 (left much better) to 7 (right much better) "
                "is wanted."
            )
    else:
        said["ranking"] = _checked_ranking(item, said["ranking"])
        if said["value"] is not None:
            raise InputError("A label of a ranking project has a value: a ranking is wanted, and nothing else.")
    said["ratings"] = _checked_ratings(project, item, said["ratings"])
    said["seconds"] = checked_seconds(said["seconds"])
    for name, most in (("comment", LONGEST_NOTE), ("flag", LONGEST_NOTE), ("rewrite", LONGEST_TEXT)):
        said[name] = checked_note(name, said[name], most)
    return said


def check_names(given: Mapping[str, Any]) -> None:
    for name in ("annotator", "key"):
        text = given.get(name)
        if not isinstance(text, str) or not text.strip() or len(text) > 500 or not is_storable(text):
            raise InputError(f"A label has the {name} {text!r}: a text of 1 to 500 characters is wanted.")


def is_order(order: Any, item: Item) -> bool:
    """Whether it names each of the item's answers once."""
    return isinstance(order, list) and all(type(i) is int for i in order) and sorted(order) == list(item.answers)


def checked_seconds(seconds: Any) -> float | None:
    """Time that something took.

    Raises:
        InputError: it is no time.
    """
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if seconds is not None and not (number and 0 <= seconds < math.inf):
        raise InputError(f"A label took {seconds!r} seconds: a number of at least 0, or none, is wanted.")
    return seconds


def is_storable(text: str) -> bool:
    """Whether every database takes it: no character 0, no half of a surrogate pair."""
    try:
        return "\0" not in text and bool(text.encode("utf-8") or True)
    except UnicodeEncodeError:
        return False


def checked_note(name: str, text: Any, most: int = LONGEST_NOTE) -> str | None:
    """Words beside a label: None where there are none."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str) or len(text) > most:
        raise InputError(f"A label's {name} must be a text of at most {most} characters.")
    if "\0" in text:
        raise InputError(f"A label's {name} holds the character 0, which no text has: leave it out.")
    return text.encode("utf-8", "replace").decode()


def _checked_ranking(item: Item, ranking: Any) -> list[list[int]]:
    named = [answer for group in ranking for answer in group] if _is_ranking(ranking) else []
    if len(named) < 2 or len(set(named)) != len(named) or not set(named) <= set(item.answers):
        raise InputError(
            f"A label has the ranking {ranking!r}: groups of the answers {list(item.answers)} from best to worst are "
            "wanted, at least two answers in all and none twice."
        )
    return [sorted(group) for group in ranking]


def _is_ranking(ranking: Any) -> bool:
    groups = isinstance(ranking, list) and all(isinstance(group, list) and group for group in ranking)
    return groups and all(type(answer) is int for group in ranking for answer in group)


def _checked_ratings(project: Project, item: Item, ratings: Any) -> dict[str, dict[str, int]] | None:
    if not ratings:
        return None
    known = {str(answer) for answer in item.answers}
    for criterion, given in ratings.items() if isinstance(ratings, dict) else [("", {})]:
        fine = criterion in project.settings.criteria and isinstance(given, dict) and set(given) <= known
        if not fine or not all(type(value) is int and 1 <= value <= 5 for value in given.values()):
            raise InputError(
                f"A label has the ratings {ratings!r}: for the criteria {list(project.settings.criteria)}, whole "
                "numbers from 1 to 5 by answer are wanted."
            )
    return ratings


def check_guidelines(text: str) -> None:
    """Refuse guidelines that a database does not take."""
    if len(text) > LONGEST_TEXT:
        raise InputError(f"The guidelines have {len(text)} characters: at most {LONGEST_TEXT} are wanted.")
    if not is_storable(text):
        raise InputError("The guidelines hold the character 0 or half of a surrogate pair, which no text has.")


def checked_comparison(record: Record) -> Record:
    comparison_id = record.get("id")
    fine = isinstance(comparison_id, str) and 0 < len(comparison_id) <= 500 and is_storable(comparison_id)
    if not fine:
        raise InputError(f"A comparison has the id {comparison_id!r}: a text of 1 to 500 characters is wanted.")
    answers = record.get("answers")
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and isinstance(answer.get("text"), str) for answer in answers
    ):
        raise InputError(f'Comparison {comparison_id}: "answers" must be a list of objects like {{"text": ...}}.')
    if not 2 <= len(answers) <= MOST_ANSWERS:
        raise InputError(
            f"Comparison {comparison_id} has {len(answers)} answers: at least 2 are needed for a pair, and more than "
            f"{MOST_ANSWERS} nobody can compare."
        )
    prompt = record.get("prompt")
    if not isinstance(prompt, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in prompt
    ):
        raise InputError(f'Comparison {comparison_id}: "prompt" must be a list of {{"role", "content"}} turns of text.')
    texts = [answer["text"] for answer in answers] + [turn["content"] for turn in prompt]
    for text in texts:
        if len(text) > LONGEST_TEXT:
            raise InputError(
                f"Comparison {comparison_id} has a text of {len(text)} characters: at most {LONGEST_TEXT} are wanted."
            )
        # Models do write the character 0; as JSON every database takes it, and the page shows a mark.
        if not is_storable(text.replace("\0", "")):
            raise InputError(f"Comparison {comparison_id} has a text with half of a surrogate pair, which no text has.")
    try:
        json.dumps(record, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, ValueError, TypeError) as error:
        raise InputError(f"Comparison {comparison_id} has a column that is not JSON ({error}).") from error
    if record.get("split") not in ("train", "test"):
        raise InputError(
            f'Comparison {comparison_id} has the split {record.get("split")!r}: "train" or "test" is wanted.'
        )
    gold = record.get("gold")
    numbers = isinstance(gold, list | tuple) and len(gold) == 2 and all(type(i) is int for i in gold)
    if gold is not None and not (numbers and gold[0] != gold[1] and set(gold) <= set(range(len(answers)))):
        raise InputError(
            f"Comparison {comparison_id} has the gold {gold!r}: the indices of the better and the worse answer are "
            "wanted."
        )
    return record
