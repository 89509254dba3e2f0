"""`align score`: the rewards of answers in a JSONL file, from a reward run, a model folder or a hub id.

What a line has decides what is added to it:

    prompt, completion         reward                            (also {messages}, whose last turn is the answer)
    prompt, chosen, rejected   chosen_reward, rejected_reward
    prompt, answers            rewards, in the answers' order

An ensemble also adds the standard deviation over its heads (`reward_std`, ...), and `reward_per_head`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align import progress
from align.runs import is_done, read_info
from reward.records import InputError, Record, answer_text, numbered_jsonl, user_prompt, write_jsonl

SIDES = ("chosen", "rejected")


def score_file(run: str, file: Path, out: Path | None, batch_size: int = 16) -> None:
    """Score every answer of `file` and write its records with their rewards, to `out` or standard output.

    Raises:
        InputError: the run is not a finished reward stage, or a line has nothing to score.
    """
    records = numbered_jsonl(file)
    asked = [_asked(record, f"{file}, line {number}") for number, record in records]
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out {out} cannot be written: give a file in a folder that exists.")
    place = model_place(run)

    from align.lean import lean_reading
    from align.scorer import Scorer
    from align.training import calm_libraries
    from reward.scoring import RewardScores, score

    with calm_libraries():
        reader = Scorer.load(place, batch_size=batch_size)
        lean_reading(reader.model)
        chat = bool(reader.tokenizer.chat_template)
        prompts = [
            user_prompt(prompt) if chat and isinstance(prompt, str) else prompt
            for prompt, answers in asked
            for _ in answers
        ]
        texts = [answer for _, answers in asked for answer in answers]
        with progress.bar("score", len(texts)) as report:
            found = score(reader, prompts, texts, batch_size=batch_size, on_progress=report)
    scored, start = [], 0
    for (_, record), (_, answers) in zip(records, asked, strict=True):
        part = slice(start, start + len(answers))
        start += len(answers)
        scored.append(record | _told(record, RewardScores(*(figure[part] for figure in found))))
    if out is not None:
        write_jsonl(out, scored)
        progress.say(f"{len(texts)} answers of {len(records)} lines scored: {out}")
        return
    for record in scored:
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


def model_place(run: str) -> str:
    """Where the model of `run` is: the `model` folder of a finished reward stage, or `run` itself.

    Raises:
        InputError: a run folder of another stage, or an unfinished one.
    """
    folder = Path(run)
    info = read_info(folder)
    if info is None:
        return run
    if info["stage"] != "reward":
        raise InputError(f"{run} is the folder of the stage {info['stage']}: give that of a reward stage.")
    if not is_done(folder):
        raise InputError(f"{run} is not finished: run `align reward` again, it goes on where it stopped.")
    return str(folder / "model")


def _asked(record: Record, where: str) -> tuple[Any, list[str]]:
    """(prompt, answers) of one line."""
    prompt, answers = record.get("prompt"), None
    if prompt is None and _is_conversation(record.get("messages")) and record["messages"][-1]["role"] == "assistant":
        *prompt, last = record["messages"]
        answers = [last["content"]]
    elif "answers" in record:
        given = record["answers"]
        answers = [a.get("text") if isinstance(a, dict) else a for a in given] if isinstance(given, list) else None
    elif all(side in record for side in SIDES):
        answers = [_text(record[side]) for side in SIDES]
    elif "completion" in record:
        answers = [_text(record["completion"])]
    if not (isinstance(prompt, str) or _is_conversation(prompt)) or not answers or None in answers:
        raise InputError(
            f"{where}: nothing to score; wanted is a `prompt` (text or a conversation) with `completion`, `chosen` and "
            f"`rejected`, or `answers`, or `messages` that end with the assistant; got {', '.join(record)}."
        )
    if not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{where}: an answer is no text.")
    return prompt, answers


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def _text(answer: Any) -> str | None:
    if isinstance(answer, str):
        return answer
    return answer_text(answer) if _is_conversation(answer) else None


def _told(record: Record, scores: Any) -> Record:
    mean, std, several = scores.mean.tolist(), scores.std.tolist(), scores.per_head.shape[1] > 1
    if "answers" in record:
        added: Record = {"rewards": mean, **({"reward_stds": std} if several else {})}
    elif all(side in record for side in SIDES):
        added = {f"{side}_reward": value for side, value in zip(SIDES, mean, strict=True)}
        added |= {f"{side}_reward_std": value for side, value in zip(SIDES, std, strict=True)} if several else {}
    else:
        added = {"reward": mean[0], **({"reward_std": std[0]} if several else {})}
    return added | ({"reward_per_head": _heads(scores.per_head)} if several else {})


def _heads(per_head: Any) -> Sequence[Sequence[float]]:
    found: list[list[float]] = per_head.tolist()
    return found
