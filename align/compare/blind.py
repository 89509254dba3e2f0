"""Blind pairs for people: the compared models' answers as a project of the labelling app.

Annotators see two answers to a held-out prompt and no name; which model stands left is drawn when the pair is lent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from align.config import Config
from align.generate import Answer
from align.label import store_address
from labeling_ui.store import LabelStore, Settings
from reward.records import Record, digest

GUIDELINES = "Which answer would you rather have been given? Neither length nor form is a merit of its own."


def project_name(config: Config) -> str:
    """The project in the label database that holds the pairs."""
    return f"{config.name}-compare"


def send_blind_pairs(config: Config, prompts: Sequence[Record], answers: Mapping[str, Sequence[Answer]]) -> int:
    """Add a pair for every prompt and every model but the first, which it is compared with.

    The ids come from the content, so that sending the same answers again adds nothing. Returns the number added.
    """
    first, *others = answers
    comparisons = []
    for index, prompt in enumerate(prompts):
        for name in others:
            texts = [{"text": answers[model][index].text, "model": model} for model in (first, name)]
            comparison = {"prompt": prompt["prompt"], "split": "test", "answers": texts}
            if texts[0]["text"] != texts[1]["text"]:
                comparisons.append({"id": digest(comparison)[:16], **comparison})
    with LabelStore(store_address(config)) as store:
        settings = Settings(overlap=config.label.labels_per_item, gold_share=0.0)
        project = store.create_project(project_name(config), instructions=GUIDELINES, settings=settings)
        return store.add_items(project, comparisons).added
