"""The steps that look at one row alone, in the order in which they are taken."""

from __future__ import annotations

import functools

from align.config_data import PrepareSection
from align.data.names import Kind
from align.data.prepare.language import language
from align.data.prepare.normalise import normalise
from align.data.prepare.quality import quality
from align.data.prepare.scrub import scrub
from align.data.prepare.steps import Left, Step
from reward.records import Record, answer_text


def row_steps(section: PrepareSection, kind: Kind) -> list[Step]:
    """The steps that are switched on and can do anything to this kind of records.

    Every step can be pickled, so that worker processes can be handed it, and costs nothing before its first row but for
    the check of language codes.

    Raises:
        InputError: a language code is unknown.
    """
    steps: list[Step] = []
    if section.normalise:
        steps.append(normalise())
    answered = kind in ("demonstration", "unpaired", "preference")
    least = section.min_answer_chars if answered else 0
    longest = None if kind == "prompt" else section.max_answer_chars
    # That no answer is empty is seen to where rows are read.
    if least > 1 or longest is not None or section.max_prompt_chars is not None:
        measure = functools.partial(_fitting, least, longest, section.max_prompt_chars)
        steps.append(Step("length", measure))
    if section.languages:
        steps.append(language(section.languages))
    if section.quality and answered:
        steps.append(quality(section.quality))
    if section.scrub:
        steps.append(scrub(section.scrub))
        if kind == "preference":  # a step of its own, so that the row it leaves out is listed as it was scrubbed
            steps.append(Step("scrubbed pairs", _two_answers))
    return steps


def _fitting(least: int, longest: int | None, longest_prompt: int | None, record: Record) -> Record | Left:
    """The record, unless a text of it is too short or too long, in characters.

    A rejected answer may be as short as it is: that may be what is wrong with it.
    """
    if longest_prompt is not None:
        size = sum(len(turn["content"]) for turn in record["prompt"])
        if size > longest_prompt:
            return Left("with a prompt that is too long", f"{size} characters, at most {longest_prompt} are kept")
    sizes = _answer_sizes(record)
    if sizes and sizes[0] < least:
        return Left("with an answer that is too short", f"{sizes[0]} characters, at least {least} are kept")
    if longest is not None and sizes and max(sizes) > longest:
        return Left("with an answer that is too long", f"{max(sizes)} characters, at most {longest} are kept")
    return record


def _two_answers(record: Record) -> Record | Left:
    """The pair, unless its answers differed by nothing but what is now a mark."""
    same = answer_text(record["chosen"]).strip() == answer_text(record["rejected"]).strip()
    return Left("with identical chosen and rejected") if same else record


def _answer_sizes(record: Record) -> list[int]:
    """Characters of each answer, of the completion or the chosen one first."""
    columns = [record[name] for name in ("completion", "chosen", "rejected") if name in record]
    sizes = [sum(len(turn["content"]) for turn in turns) for turns in columns]
    return sizes + [len(answer["text"]) for answer in record.get("answers", ())]
