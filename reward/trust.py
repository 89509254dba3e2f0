"""A reward model you may trust, or a refusal to train on it: what it is worth on pairs it has not seen.

    figures = assess(train, test, score)
    checks = judge(figures, Gate())
    write_report(folder, figures, checks)
    if refusals(checks): ...  # PPO would climb what is wrong with it

The model is asked through `score` alone, so that any model, here or behind a server, can be assessed. This module
imports neither torch nor the model libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reward.records import InputError, Record, answer_text, prompt_id, write_atomically, write_json
from reward.trust_figures import (
    HeldOut,
    baselines_of,
    by_annotator,
    by_length,
    by_margin,
    by_source,
    calibration_of,
    ceiling_of,
    figure,
    length_of,
)
from reward.trust_gate import Check, Gate, judge, refusals, verdict
from reward.trust_probing import Desk, Fits, Progress, Score, plan_edits, plan_outside, plan_probes, sample
from reward.trust_schema import SCHEMA, Figures

__all__ = ["Check", "Figures", "Gate", "assess", "judge", "refusals", "verdict", "write_report"]


def assess(
    train: Sequence[Record],
    test: Sequence[Record],
    score: Score,
    *,
    seed: int = 0,
    probed: int = 200,
    fits: Fits = lambda prompt, answer: True,
    on_progress: Progress = lambda done, total: None,
) -> Figures:
    """Everything that is measured about a reward model, ready for JSON; `reward.trust_schema` says what.

    Args:
        train, test: preference records (see `reward.records`). The baselines learn from `train`; every figure is
            measured on `test`. Used where they are there: `strengths`, one an annotator from -3 to 3 and positive
            towards the chosen answer; `margin`; `source`; `chosen_index`, 0 or 1, where the chosen answer stood in its
            pair.
        score: prompts and answer texts to their rewards, one each, in the order given.
        seed: of the bootstraps, and of which answers are probed.
        probed: at most so many pairs are probed, which takes 11 more answers each, and 13 with several heads.
        fits: whether an answer is short enough for the model. A probe can double an answer; what does not fit is left
            out and missing from the probe's n. The answers of the records themselves are always scored.
        on_progress: called with the number of answers scored so far and in all.

    Raises:
        InputError: no held-out pair, or a reward that is nan or infinite.
    """
    if not test:
        raise InputError("No pair is held out: a reward model cannot be judged on the pairs it was trained on.")
    if probed < 1:
        raise InputError(f"probed is {probed}: at least 1 pair is wanted.")
    desk = Desk(score, fits)
    sides = ("chosen", "rejected")
    pairs_P2 = np.array([[desk.place(row["prompt"], answer_text(row[side])) for side in sides] for row in test])
    answers = len(desk)
    chosen = [test[index] for index in sample(test, probed, seed)]
    probes, edits = plan_probes(desk, chosen, seed), plan_edits(desk, chosen, seed)
    desk.score_block()  # says how many heads there are: one has no spread to look at
    outside = plan_outside(desk, chosen, seed) if desk.heads > 1 else None
    desk.score_all(on_progress)

    reward_N = desk.reward_N
    held = HeldOut(test, reward_N[pairs_P2], seed)
    prompts, trained = set(held.prompt_P.tolist()), {prompt_id(record["prompt"]) for record in train}
    # From the first reward on, so that equal rewards have a deviation of exactly 0.
    deviation = float(np.std(reward_N[:answers] - reward_N[0]))
    return {
        "schema": SCHEMA,
        "simulated": any(bool(record.get("simulated")) for record in (*train, *test)),
        "seed": seed,
        "heads": desk.heads,
        "pairs": {
            "train": len(train),
            "test": len(test),
            "prompts": len(prompts),
            "shared_prompts": len(prompts & trained),
        },
        "rewards": {"mean": float(reward_N[:answers].mean()), "deviation": deviation},
        "accuracy": figure(held.accuracy()),
        "ceiling": ceiling_of(held),
        "baselines": baselines_of(train, held),
        "by_source": by_source(held),
        "by_annotator": by_annotator(held),
        "by_margin": by_margin(held),
        "by_length": by_length(held),
        "calibration": calibration_of(held),
        "length": length_of(held),
        "spread": outside() if outside else {"inside": None, "outside": [], "why": "the model has one head"},
        "probes": probes(deviation),
        "edits": edits(),
    }


def write_report(folder: Path, figures: Figures, checks: Sequence[Check]) -> Path:
    """Write `trust.json` and `trust.html` into `folder`, which is made if need be; returns the page's path.

    `trust.json` holds `{refused, verdict, checks, figures}`.

    Raises:
        ValueError: the figures are of another schema, or hold a nan or infinite number, which JSON does not have.
    """
    from reward.trust_report import render_html  # the plotting library takes a second

    if figures["schema"] != SCHEMA:
        raise ValueError(f"The figures have schema {figures['schema']}; this version writes schema {SCHEMA}.")
    folder.mkdir(parents=True, exist_ok=True)
    said = verdict(figures, checks)
    page = folder / "trust.html"
    whole = {
        "refused": bool(refusals(checks)),
        "verdict": said,
        "checks": [check.record() for check in checks],
        "figures": figures,
    }
    write_json(folder / "trust.json", whole)
    write_atomically(page, render_html(figures, checks, said))
    return page
